"""AdamW as GLM was trained with, and its learning-rate schedules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glm_jax import configs

SCHEDULES = ('cosine', 'linear', 'rsqrt', 'wsd', 'constant')


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW with global clipping.

  Attributes:
    learning_rate: the peak.
    schedule: after the warm-up, one of `SCHEDULES`; see `schedule`.
    warmup_steps: of linear growth from 0.
    decay_steps: step at which the decay ends, warm-up included; 0 for the run's last.
    final_ratio: the floor, as a share of the peak.
    wsd_decay_share: share of `decay_steps` that 'wsd' spends decaying, at the end.
    beta1: decay of the first moment.
    beta2: decay of the second.
    epsilon: added to the root of the second moment.
    first_moment_dtype: 'bfloat16' saves two bytes a parameter. The second moment stays
      float32: with beta2 near 1 its steps are smaller than bfloat16 resolves.
    weight_decay: decoupled; on all but biases and layer norms, hence on every
      embedding table (THUDM/GLM glm_get_params_for_weight_decay_optimization).
    clip_norm: largest global norm of a gradient.
  """

  learning_rate: float = 4e-4
  schedule: str = 'cosine'
  warmup_steps: int = 0
  decay_steps: int = 0
  final_ratio: float = 0.1
  wsd_decay_share: float = 0.2
  beta1: float = 0.9
  beta2: float = 0.98
  epsilon: float = 1e-6
  first_moment_dtype: str = 'float32'
  weight_decay: float = 0.1
  clip_norm: float = 1.0

  def __post_init__(self):
    configs.check_types(self)
    name = 'OptimizerConfig'
    configs.check(
      self.schedule in SCHEDULES,
      f'{name}.schedule must be one of {SCHEDULES}',
      repr(self.schedule),
      'choose one of these',
    )
    configs.check(
      self.first_moment_dtype in ('float32', 'bfloat16'),
      f"{name}.first_moment_dtype must be 'float32' or 'bfloat16'",
      repr(self.first_moment_dtype),
      'choose one of these',
    )
    for field in ('learning_rate', 'epsilon', 'clip_norm'):
      value = getattr(self, field)
      configs.check(
        0 < value < math.inf, f'{name}.{field} must be positive', str(value), 'correct it'
      )
    for field in ('beta1', 'beta2'):
      value = getattr(self, field)
      configs.check(
        0 <= value < 1, f'{name}.{field} must be in [0, 1)', str(value), 'correct it'
      )
    configs.check(
      0 <= self.final_ratio <= 1,
      f'{name}.final_ratio must be in [0, 1]',
      str(self.final_ratio),
      'give the last rate as a share of the peak',
    )
    configs.check(
      0 < self.wsd_decay_share <= 1,
      f'{name}.wsd_decay_share must be in (0, 1]',
      str(self.wsd_decay_share),
      'correct it',
    )
    for field in ('warmup_steps', 'decay_steps', 'weight_decay'):
      value = getattr(self, field)
      configs.check(
        value >= 0, f'{name}.{field} must not be negative', str(value), 'correct it'
      )


def schedule(config: OptimizerConfig, train_steps: int) -> Callable[[Any], jax.Array]:
  """Step -> learning rate, float32.

  Warm-up is `peak * step / warmup_steps`. Then, with r the share of the decay that is
  over (0 to 1, where it stays):

  - cosine: `floor + (peak - floor) (1 + cos(pi r)) / 2` (THUDM/GLM learning_rates.py);
  - linear: `peak - (peak - floor) r`; the original goes on below its floor, and below 0;
  - rsqrt: `peak sqrt(warmup / step)`, not below the floor;
  - wsd: the peak, then linear to the floor over the last `wsd_decay_share`;
  - constant: the peak.

  Raises:
    ValueError: the warm-up is not shorter than the decay.

  Example:
    >>> rate = schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), 110)
    >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 60, 110, 500)]
    [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
  """
  warmup, end = config.warmup_steps, config.decay_steps or train_steps
  if config.schedule in ('cosine', 'linear', 'wsd'):
    configs.check(
      warmup < end,
      'OptimizerConfig.warmup_steps must be below decay_steps',
      f'warmup_steps={warmup}, decay_steps={end}',
      'shorten the warm-up',
    )
  peak, floor = config.learning_rate, config.learning_rate * config.final_ratio

  def rate(step: Any) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    share = jnp.clip((step - warmup) / max(end - warmup, 1), 0, 1)
    if config.schedule == 'cosine':
      value = floor + (peak - floor) * (1 + jnp.cos(jnp.pi * share)) / 2
    elif config.schedule == 'linear':
      value = peak - (peak - floor) * share
    elif config.schedule == 'rsqrt':
      value = peak * jnp.sqrt(max(warmup, 1) / jnp.maximum(step, max(warmup, 1)))
      value = jnp.maximum(value, floor)
    elif config.schedule == 'wsd':
      length = config.wsd_decay_share * end
      value = peak - (peak - floor) * jnp.clip((step - (end - length)) / length, 0, 1)
    else:
      value = jnp.full_like(step, peak)
    return jnp.where(step < warmup, peak * step / max(warmup, 1), value)

  return rate


def decays(params: Any) -> Any:
  """True for each parameter that weight decay applies to."""

  def decayed(path: Any, _: Any) -> bool:
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    return names[-1] not in ('bias', 'scale')

  return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(
  config: OptimizerConfig, train_steps: int
) -> optax.GradientTransformation:
  """Clipping, Adam, decoupled decay, learning rate: in this order."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.scale_by_adam(
      config.beta1, config.beta2, config.epsilon, mu_dtype=config.first_moment_dtype
    ),
    optax.add_decayed_weights(config.weight_decay, mask=decays),
    optax.scale_by_learning_rate(schedule(config, train_steps)),
  )
