"""Updates that would do harm are left out: a gate inside the jitted step.

A gradient that is not finite would destroy the parameters, and one that is far larger than
those of the steps before it often begins a divergence (the logbook of GLM-130B names three
exploding losses and two spikes of the gradient). What such an update would have changed
stays as it is, on all devices alike, for the gate is computed from numbers of the whole
batch. Its norm does not enter the history that it was compared with: one NaN in a mean
would refuse all healthy steps behind it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from glm_jax import configs
from glm_jax.configs import at_least

NAME = 'guard'
"""Of the history in the training state, and what its metrics begin with."""

# Updates whose norms make the history: until it has so many, only what is not finite is
# left out; from then on older ones fade.
_WINDOW = 64
# Norms of a calm run scatter little: what is not several times as large harms nothing.
_LEAST_FACTOR = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
  """Which updates are left out, and when the run stops.

  Attributes:
    deviations: the logarithm of a gradient's norm may lie so many standard deviations
      above the mean of recent ones; what lies higher, and is 4 times as large as usual, is
      left out. 0 leaves out only what is not finite.
    most: updates left out in a row at which the run stops.
  """

  deviations: Annotated[float, at_least(0)] = 6.0
  most: Annotated[int, at_least(1)] = 10

  def __post_init__(self):
    configs.check_fields(self)


History = dict[str, jax.Array]
"""Scalars: `mean` and `variance` (float32) of logarithms of norms; of how many updates
(`seen`, int32, the window's at most); updates left out `in_a_row`; and all steps of the run
without an update, `skipped`."""


def fresh() -> History:
  """The history of a run that has none yet."""
  floats = {name: jnp.zeros((), jnp.float32) for name in ('mean', 'variance')}
  counts = {name: jnp.zeros((), jnp.int32) for name in ('seen', 'in_a_row', 'skipped')}
  return floats | counts


def judge(
  config: GuardConfig, history: History, loss: jax.Array, norm: jax.Array
) -> tuple[jax.Array, History]:
  """Whether an update is applied, and the history after it.

  Args:
    config: what is left out.
    history: before the update.
    loss: float32, of the whole batch; sum or mean.
    norm: float32, of the gradient, before clipping.

  Returns:
    bool[], and the history: its mean and variance are running means of the last updates
    that were applied (West 1979), weighted alike up to the window and exponentially from
    there on.

  Example:
    >>> history = fresh()
    >>> config, loss = GuardConfig(), jnp.float32(2)
    >>> for norm in [1.0, 1.1, 0.9] * 30:
    ...   applied, history = judge(config, history, loss, jnp.float32(norm))
    >>> bool(judge(config, history, loss, jnp.float32(50))[0])
    False
    >>> bool(judge(config, history, jnp.float32(jnp.nan), jnp.float32(1))[0])
    False
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  # A norm of 0, such as of a batch without targets, has no logarithm and does no harm.
  counts = finite & (norm > 0)
  log_norm = jnp.log(jnp.where(counts, norm, 1))
  distance = log_norm - history['mean']
  applied = finite
  if config.deviations:
    spread = config.deviations * jnp.sqrt(history['variance'])
    limit = jnp.maximum(spread, math.log(_LEAST_FACTOR))
    far = counts & (history['seen'] >= _WINDOW) & (distance > limit)
    applied &= ~far
  counts &= applied
  weight = 1 / jnp.minimum(history['seen'] + 1, _WINDOW).astype(jnp.float32)
  variance = (1 - weight) * (history['variance'] + weight * distance**2)
  entered = {
    'mean': history['mean'] + weight * distance,
    'variance': variance,
    'seen': jnp.minimum(history['seen'] + 1, _WINDOW),
  }
  return applied, {
    **{name: jnp.where(counts, new, history[name]) for name, new in entered.items()},
    'in_a_row': jnp.where(applied, 0, history['in_a_row'] + 1),
    'skipped': history['skipped'] + ~applied,
  }


def metrics(history: History, loss: jax.Array, norm: jax.Array) -> dict[str, Any]:
  """What `Watch` reads, as pairs of a sum and a count.

  Args:
    history: after the update.
    loss: mean of the batch.
    norm: of the gradient.
  """
  usual = jnp.where(history['seen'] > 0, jnp.exp(history['mean']), 0)
  values = {'loss': loss, 'norm': norm, 'usual': usual}
  counted = {name: history[name] for name in ('in_a_row', 'skipped')}
  return {
    f'{NAME}/{name}': (value.astype(jnp.float32), jnp.ones(()))
    for name, value in {**values, **counted}.items()
  }


class TooManyLeftOut(FloatingPointError):
  """So many updates were left out in a row that going on makes no sense.

  Attributes:
    sound: whether the parameters compute a finite loss, and are worth a checkpoint.
  """

  def __init__(self, message: str, sound: bool):
    super().__init__(message)
    self.sound = sound


class _Seen(NamedTuple):
  loss: float
  norm: float
  usual: float
  in_a_row: float
  skipped: float

  def __str__(self) -> str:
    if not math.isfinite(self.loss):
      return f'the loss was {self.loss}'
    if not math.isfinite(self.norm):
      return f"the gradient's norm was {self.norm}"
    return f"the gradient's norm was {self.norm:.3g}, and usually is {self.usual:.3g}"


class Watch:
  """Tells of updates that were left out.

  Attributes:
    skipped: steps of the whole run without an update, `TrainConfig.skip_steps` included.
  """

  def __init__(
    self, config: GuardConfig, rows: int, say: Callable[..., None], model_dir: str
  ):
    """
    Args:
      config: when the run stops.
      rows: of a batch.
      say: prints a line.
      model_dir: of the run, for messages.
    """
    self.skipped = 0
    self._config, self._rows, self._say, self._model_dir = config, rows, say, model_dir

  def taken(self) -> dict[str, float]:
    """skipped_so_far, once there are some."""
    return {'skipped_so_far': self.skipped} if self.skipped else {}

  def see(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a step without the guard's own.

    Raises:
      TooManyLeftOut: it was the last that may be left out.
    """
    own = {k.removeprefix(f'{NAME}/'): v for k, v in metrics.items() if k.startswith(NAME)}
    rest = {k: v for k, v in metrics.items() if not k.startswith(NAME)}
    if not own:
      return rest
    seen = _Seen(**{name: float(total) for name, (total, _) in own.items()})
    self.skipped = round(seen.skipped)
    if seen.in_a_row:
      rows = f'rows {(step - 1) * self._rows:,} to {step * self._rows - 1:,} of the data'
      self._say(f'step {step}: the update was left out, for {seen} ({rows})', flush=True)
    if seen.in_a_row >= self._config.most:
      raise self._stopped(step, round(seen.in_a_row), seen)
    return rest

  def _stopped(self, step: int, count: int, seen: _Seen) -> TooManyLeftOut:
    first, sound = step - count + 1, math.isfinite(seen.loss)
    rows = f'rows {(first - 1) * self._rows:,} to {step * self._rows - 1:,}'
    if sound:
      remedy = (
        'the parameters before them are saved: leave the data behind them out, too, with '
        f'TrainConfig.skip_steps=(({step + 1}, {step + count}),), go on from an earlier '
        'checkpoint with a lower learning rate, or set GuardConfig.deviations=0'
      )
    else:
      remedy = (
        f'nothing was saved since the last checkpoint in {self._model_dir}; lower the '
        'learning rate or lengthen the warm-up, and start again'
      )
    return TooManyLeftOut(
      f'updates must not be left out {self._config.most} times in a row, got steps {first} '
      f'to {step} ({rows} of the data): {seen}; {remedy}.',
      sound,
    )
