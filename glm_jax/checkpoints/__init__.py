"""Checkpoints and the folder of a run."""

import logging

from glm_jax.checkpoints.base import describe
from glm_jax.checkpoints.description import read_meta
from glm_jax.checkpoints.manager import (
  CheckpointConfig,
  Checkpoints,
  read_params,
  stored_leaves,
)
from glm_jax.checkpoints.steps import find, latest_step

__all__ = [
  'CheckpointConfig',
  'Checkpoints',
  'describe',
  'find',
  'latest_step',
  'read_meta',
  'read_params',
  'stored_leaves',
]

# Orbax looks for what its other interface would have written, and warns whoever uses this
# package as a library, whose own logging is not ours to silence.
logging.getLogger('absl').addFilter(
  lambda record: 'Metadata file does not exist' not in record.getMessage()
)
