"""Stages of training, a file each, and how a seqio task becomes a run's data."""

from glm_jax.models.config import ONCE_FIELDS
from glm_jax.recipes import cloze, finetuning, grpo, ppo, preference, pretraining, reward
from glm_jax.training import config

CONFIGURABLES = (
  *config.CONFIGURABLES,
  *pretraining.CONFIGURABLES,
  *finetuning.CONFIGURABLES,
  *cloze.CONFIGURABLES,
  *preference.CONFIGURABLES,
  *reward.CONFIGURABLES,
  *ppo.CONFIGURABLES,
  *grpo.CONFIGURABLES,
)
"""What gin may bind in a run."""

MOVED = {
  **{
    f'TrainConfig.{name}': f'Pretraining.{name}'
    for name in ('task', 'feature_lengths', 'corpus', 'mixture', 'vocabulary', 'objectives')
  },
  'TrainConfig.loss': 'Pretraining.loss_config',
  'EvaluationConfig.objectives': 'Pretraining.validated',
  **{
    f'{kind}.{name}': f'ComputeConfig.{name}'
    for kind in ('GLMConfig', 'ChatGLMConfig', 'ChatGLM2Config', 'CheckpointModel')
    for name in ONCE_FIELDS
  },
}
"""Parameters in older gin files -> what they are now."""

ALTERNATIVES = (('TRAIN_STEPS', 'TRAIN_EPOCHS'),)
"""Macros of which a configuration has one: the later one given, and the other is None."""

WIRED = {
  'Pretraining': 'TrainConfig.recipe = @Pretraining()',
  'ComputeConfig': 'TrainConfig.compute = @ComputeConfig()',
}
"""What a gin file must say once for parameters of these to count."""
