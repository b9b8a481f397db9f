"""Metrics as (sum, count) pairs, which add up over micro-batches, devices and batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from glm_jax import configs

Told = Callable[[Mapping[str, float]], dict[str, float]]
"""Means of metrics to what a person is told; see `recipe.Recipe.told`."""


class Results:
  """Metrics of the latest steps, still being computed: to look at one is to wait for it.

  Attributes:
    running: those that nobody has looked at, in order.
  """

  def __init__(
    self,
    model_dir: str,
    told: Told = dict,
    see: Callable[[int, Any], Any] = lambda step, values: values,
  ):
    """
    Args:
      model_dir: of the run, for messages.
      told: of the recipe.
      see: (step, its metrics) -> those that are counted; see `guard.Watch`.
    """
    self.running: list[Any] = []
    self._model_dir, self._step, self._told, self._see = model_dir, 0, told, see
    self._since: dict[str, tuple[float, float]] = {}

  def add(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Those of a step."""
    self._step = step
    self.running.append(metrics)

  def wait(self, leave: int) -> None:
    """Looks at all but the last so many.

    Raises:
      FloatingPointError: a loss, or a gradient's norm, is not finite, and the update was
        not left out; or too many were.
    """
    while len(self.running) > leave:
      values = jax.device_get(self.running.pop(0))
      step = self._step - len(self.running)
      self._since = add(self._since, self._see(step, values))
      for name in ('loss', 'gradient_norm'):
        configs.check_finite(
          self._since.get(name, (0.0, 0.0))[0],
          f'the {name.replace("_", " ")} at step {step}',
          f'the last checkpoint in {self._model_dir} is from before; lower the learning '
          'rate or lengthen the warm-up, and start again',
        )

  def take(self) -> dict[str, float]:
    """What is told of what was looked at since the last call."""
    since, self._since = self._since, {}
    return self._told(averages(since))


def averages(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
  """(sum, count) pairs to means, leaving out what was not counted.

  Example:
    >>> averages({'loss': (6.0, 2), 'loss/document': (0.0, 0)})
    {'loss': 3.0}
  """
  pairs = {k: (float(total), float(count)) for k, (total, count) in metrics.items()}
  return {k: total / count for k, (total, count) in pairs.items() if count > 0}


def add(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
  """Adds (sum, count) pairs by name."""
  # Python's floats are float64: sums over a long validation stay exact enough.
  return {
    k: tuple(
      float(x) + float(y) for x, y in zip(a.get(k, (0, 0)), b.get(k, (0, 0)), strict=True)
    )
    for k in {**a, **b}
  }
