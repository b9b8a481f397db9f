"""Early stopping: a run ends where a validation metric does not improve any more.

What decides stands in every checkpoint, so that a run that was killed and goes on stops at
the step at which it would have stopped.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from glm_jax import configs
from glm_jax.training.config import TrainConfig


class Stopping:
  """The history of `CheckpointConfig.best_metric`."""

  def __init__(self, config: TrainConfig, before: Mapping[str, Any] | None = None):
    """
    Args:
      config: of the run.
      before: `state` at the step that the run goes on from; None for a new run, or one
        that began before this was kept.
    """
    self._config = config
    best = config.checkpoint
    self._metric = {'metric': best.best_metric, 'mode': best.best_mode}
    # What was best of another metric says nothing of this one.
    if not before or self._metric.items() - before.items():
      before = {'best': None, 'step': 0, 'since': 0}
    self._best, self._step, self._since = before['best'], before['step'], before['since']

  @property
  def state(self) -> dict[str, Any]:
    """For a checkpoint: JSON."""
    history = {'best': self._best, 'step': self._step, 'since': self._since}
    return {**self._metric, **history}

  @property
  def over(self) -> bool:
    """Whether the run ends here."""
    return 0 < self._config.evaluation.patience <= self._since

  def see(self, step: int, values: Mapping[str, float]) -> None:
    """Takes note of a validation.

    Raises:
      UserError: there is no such metric among the names that it has.
    """
    check_metric(self._config, values)
    value = values.get(self._metric['metric'], math.nan)
    sign = 1 if self._metric['mode'] == 'min' else -1
    # What is no number is no improvement, and nothing to be better than.
    better = math.isfinite(value) and (
      self._best is None or sign * value < sign * self._best
    )
    if better:
      self._best, self._step, self._since = float(value), step, 0
    else:
      self._since += 1

  def in_words(self) -> str:
    """Why the run is over."""
    name, count = self._metric['metric'], self._since
    times = f'{count} validation' + 's' * (count > 1)
    if self._best is None:
      return f'{name} was no finite number in {times}'
    return (
      f'{name} has not improved in {times} on its {self._best:.4f} of step {self._step}'
    )


def check_metric(config: TrainConfig, names: Collection[str]) -> None:
  """Raises UserError if `best_metric` is none of what is validated, or nothing is.

  Args:
    config: of the run.
    names: of what a validation measures; none where there is nothing to validate on.
  """
  best, patience = config.checkpoint.best_metric, config.evaluation.patience
  if best in names:
    return
  configs.check(
    not patience or bool(names),
    'EvaluationConfig.patience must have a validation to wait for',
    f'patience={patience} and nothing to validate on',
    'give validation text or shards, or leave it out',
  )
  # Of whoever names no metric, nothing is asked: rows may be scored by chance alone.
  configs.check(
    not names or (best == 'loss' and not patience),
    'CheckpointConfig.best_metric must be measured by a validation',
    repr(best),
    f'choose among {", ".join(sorted(names))}',
  )
