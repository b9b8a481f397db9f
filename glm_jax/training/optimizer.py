"""AdamW as GLM was trained with, others beside it, and learning-rate schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from glm_jax import configs
from glm_jax.configs import POSITIVE, at_least, one_of, within
from glm_jax.training import adapters, moments, muon

ALGORITHMS = ('adamw', 'adafactor', 'muon')
SCHEDULES = ('cosine', 'linear', 'rsqrt', 'wsd', 'constant')
# Those that reach their floor at a step.
ENDING = ('cosine', 'linear', 'wsd')


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW, Adafactor or Muon, with global clipping.

  Beside four bytes a parameter, and its gradient while a step lasts, a device holds 8 bytes
  of moments with AdamW, 6 or 4 with one or both of them in bfloat16; 4 or 2 with Adafactor,
  and next to none with `beta1 = 0`; 4 or 2 with Muon for the matrices of layers.

  Attributes:
    algorithm: 'adamw', or 'adafactor': its second moment is a row and a column of each
      matrix (`moments.scale_by_factored_moment`); or 'muon': the updates of matrices of
      layers are made orthogonal, all else is AdamW's (`glm_jax.training.muon`). Learning
      rate and decay are those of AdamW: Adafactor's is not relative to a parameter's size,
      as T5's is, and Muon's updates have the size of AdamW's.
    learning_rate: its peak, after the warm-up.
    schedule: after the warm-up, one of `SCHEDULES`; see `schedule`.
    warmup_steps: of linear growth from 0.
    decay_steps: step at which the decay ends, warm-up included; 0 for the run's last.
    final_ratio: the floor, as a share of the peak.
    wsd_decay_share: share of `decay_steps` that 'wsd' spends decaying, at the end.
    beta1: decay of the first moment. Adafactor has none at 0; 0.95 is usual with Muon.
    beta2: decay of the second; of Adafactor's, which begins with less, the largest.
    epsilon: added to the root of the second moment.
    first_moment_dtype: 'bfloat16' saves two bytes a parameter.
    second_moment_dtype: likewise, of AdamW. With beta2 near 1 its steps are smaller than
      bfloat16 resolves, so that it is rounded at random (`moments.rounded`).
    weight_decay: decoupled; on all but biases, layer norms and adapters, hence on every
      embedding table (THUDM/GLM glm_get_params_for_weight_decay_optimization).
    clip_norm: largest global norm of a gradient.
  """

  algorithm: Annotated[str, one_of(*ALGORITHMS)] = 'adamw'
  learning_rate: Annotated[float, POSITIVE] = 4e-4
  schedule: Annotated[str, one_of(*SCHEDULES)] = 'cosine'
  warmup_steps: Annotated[int, at_least(0)] = 0
  decay_steps: Annotated[int, at_least(0)] = 0
  final_ratio: Annotated[
    float, within('[0, 1]').but('give the last rate as a share of the peak')
  ] = 0.1
  wsd_decay_share: Annotated[float, within('(0, 1]')] = 0.2
  beta1: Annotated[float, within('[0, 1)')] = 0.9
  beta2: Annotated[float, within('[0, 1)')] = 0.98
  epsilon: Annotated[float, POSITIVE] = 1e-6
  first_moment_dtype: Annotated[str, one_of('float32', 'bfloat16')] = 'float32'
  second_moment_dtype: Annotated[str, one_of('float32', 'bfloat16')] = 'float32'
  weight_decay: Annotated[float, at_least(0)] = 0.1
  clip_norm: Annotated[float, POSITIVE] = 1.0

  def __post_init__(self):
    configs.check_fields(self)
    factored = self.algorithm == 'adafactor'
    configs.check(
      not factored or self.second_moment_dtype == 'float32',
      "Adafactor's second moment, a row and a column of each matrix, must be float32",
      f'second_moment_dtype={self.second_moment_dtype!r}',
      "leave it out, or set algorithm='adamw'",
    )
    configs.check(
      not factored or self.beta1 > 0 or self.first_moment_dtype == 'float32',
      'first_moment_dtype must be of a first moment, which Adafactor lacks at beta1=0',
      f'first_moment_dtype={self.first_moment_dtype!r}',
      'leave it out, or raise beta1',
    )


def holds(config: OptimizerConfig) -> str:
  """What its state consists of, which a resumed run keeps.

  Example:
    >>> holds(OptimizerConfig()), holds(OptimizerConfig(algorithm='adafactor', beta1=0.0))
    ('adamw', 'adafactor without a first moment')
  """
  lacks = config.algorithm == 'adafactor' and not config.beta1
  return config.algorithm + (' without a first moment' if lacks else '')


def ends(config: OptimizerConfig, train_steps: int) -> tuple[int, int]:
  """The steps at which the warm-up and the decay of a run end.

  A run that is tried for a few steps of a preset may be shorter than its warm-up: the
  warm-up then is a tenth of the run, so that the run has a rate at all.

  Args:
    config: of the optimizer.
    train_steps: of the whole run, at which a decay without `decay_steps` ends.

  Returns:
    (end of the warm-up, end of the decay).

  Raises:
    UserError: `decay_steps` is set, and the warm-up is not shorter.

  Example:
    >>> config = OptimizerConfig(warmup_steps=100)
    >>> ends(config, 1000), ends(config, 20)
    ((100, 1000), (2, 20))
  """
  warmup, end = config.warmup_steps, config.decay_steps or train_steps
  if config.schedule not in ENDING or warmup < end:
    return warmup, end
  configs.check(
    not config.decay_steps,
    'OptimizerConfig.warmup_steps must be below decay_steps',
    f'warmup_steps={warmup}, decay_steps={end}',
    'shorten the warm-up',
  )
  return end // 10, end


def in_words(config: OptimizerConfig, train_steps: int) -> list[str]:
  """What a person is told of a warm-up that was shortened.

  Example:
    >>> in_words(OptimizerConfig(warmup_steps=100), 20)
    ['a warm-up of 100 steps does not fit into 20: it is 2']
  """
  warmup, _ = ends(config, train_steps)
  if warmup == config.warmup_steps:
    return []
  asked = config.warmup_steps
  return [f'a warm-up of {asked} steps does not fit into {train_steps}: it is {warmup}']


def schedule(config: OptimizerConfig, train_steps: int) -> Callable[[Any], jax.Array]:
  """Step -> learning rate, float32.

  Warm-up is `peak * step / warmup_steps`; `ends` says where it ends, and the decay. Then,
  with r the share of the decay that is over (0 to 1, where it stays):

  - cosine: `floor + (peak - floor) (1 + cos(pi r)) / 2` (THUDM/GLM learning_rates.py);
  - linear: `peak - (peak - floor) r`; the original goes on below its floor, and below 0;
  - rsqrt: `peak sqrt(warmup / step)`, not below the floor;
  - wsd: the peak, then linear to the floor over the last `wsd_decay_share`;
  - constant: the peak.

  Raises:
    UserError: see `ends`.

  Example:
    >>> rate = schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10), 110)
    >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 60, 110, 500)]
    [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
  """
  warmup, end = ends(config, train_steps)
  peak, floor = config.learning_rate, config.learning_rate * config.final_ratio

  # Traced: the optimizer calls it with its own count of steps, an array.
  def rate(step: Any) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    share = jnp.clip((step - warmup) / max(end - warmup, 1), 0, 1)
    if config.schedule == 'cosine':
      value = floor + (peak - floor) * (1 + jnp.cos(jnp.pi * share)) / 2
    elif config.schedule == 'linear':
      value = peak - (peak - floor) * share
    elif config.schedule == 'rsqrt':
      # Continuous at the end of the warm-up, and finite at step 0.
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

  def decay(path: Any, _: Any) -> bool:
    # Adapters begin at 0, or near it, and are small by their rank.
    return moments.is_weight(path) and path[0].key not in adapters.NAMES

  return jax.tree_util.tree_map_with_path(decay, params)


def make_optimizer(
  config: OptimizerConfig, train_steps: int
) -> optax.GradientTransformation:
  """Clipping, moments, decoupled decay, learning rate: in this order."""
  scale = {'adamw': _adam, 'adafactor': _adafactor, 'muon': _muon}[config.algorithm]
  # Decay comes after the division by moments, hence decoupled, and before the rate that
  # scales it.
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    *scale(config),
    optax.add_decayed_weights(config.weight_decay, mask=decays),
    optax.scale_by_learning_rate(schedule(config, train_steps)),
  )


def _adam(config: OptimizerConfig) -> list[optax.GradientTransformation]:
  adam = optax.scale_by_adam(
    config.beta1, config.beta2, config.epsilon, mu_dtype=config.first_moment_dtype
  )
  return [moments.rounded(adam) if config.second_moment_dtype == 'bfloat16' else adam]


def _adafactor(config: OptimizerConfig) -> list[optax.GradientTransformation]:
  scale = moments.scale_by_factored_moment(config.beta2, config.epsilon)
  if not config.beta1:
    return [scale]
  # Not corrected for its start at 0: the first updates would be as large as their bound.
  mean = optax.ema(
    config.beta1, debias=False, accumulator_dtype=jnp.dtype(config.first_moment_dtype)
  )
  return [scale, mean]


def _muon(config: OptimizerConfig) -> list[optax.GradientTransformation]:
  dtype = config.first_moment_dtype
  return [muon.scale_by_muon(config.beta1, dtype, optax.chain(*_adam(config)))]
