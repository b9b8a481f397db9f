"""Stages of training, a file each, and how a seqio task becomes a run's data."""

from glm_jax.recipes import pretraining
from glm_jax.training import config

CONFIGURABLES = (*config.CONFIGURABLES, *pretraining.CONFIGURABLES)
"""What gin may bind in a run."""

MOVED = {
  **{
    f'TrainConfig.{name}': f'Pretraining.{name}'
    for name in ('task', 'feature_lengths', 'corpus', 'mixture', 'vocabulary', 'objectives')
  },
  'TrainConfig.loss': 'Pretraining.loss_config',
  'EvaluationConfig.objectives': 'Pretraining.validated',
}
"""Parameters in gin files of before there were recipes -> what they are now."""
