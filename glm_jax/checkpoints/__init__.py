"""Checkpoints and the folder of a run."""

from glm_jax.checkpoints.base import describe
from glm_jax.checkpoints.manager import (
  CheckpointConfig,
  Checkpoints,
  find,
  latest_step,
  read_meta,
  read_params,
  stored_leaves,
)

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
