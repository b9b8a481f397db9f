"""Checkpoints and the folder of a run."""

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
