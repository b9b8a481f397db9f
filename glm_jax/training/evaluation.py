"""Validation during training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from glm_jax import sharding
from glm_jax.batch import Batch
from glm_jax.sharding import Layout
from glm_jax.training import metrics

Sets = Mapping[str, Callable[[], Iterator[Batch]]]
"""name -> the batches of a held-out set, numpy, this process's rows."""


class Validation:
  """Losses of each held-out set."""

  def __init__(self, sets: Sets, eval_step: Callable[[Any, Any], Any], layout: Layout):
    """
    Args:
      sets: what is validated.
      eval_step: (params, batch) -> metrics, to be jitted.
      layout: of the devices.
    """
    self._sets, self._layout = sets, layout
    self._step = jax.jit(eval_step)

  def __call__(self, params: Any) -> dict[str, float]:
    """{'loss', 'loss/<objective>'}; 'loss' is their mean, each objective alike."""
    total: dict[str, tuple[float, float]] = {}
    for batches in self._sets.values():
      for batch in batches():
        # `index` is int64, which stays on the host.
        batch = sharding.place(batch._replace(index=None), self._layout)
        total = metrics.add(total, jax.device_get(self._step(params, batch)))
    values = metrics.averages(total)
    # Weighted by tokens, 'loss' would mostly be that of the objective with long targets.
    by_objective = [v for k, v in values.items() if k.startswith('loss/')]
    if by_objective:
      values['loss'] = sum(by_objective) / len(by_objective)
    return values


def line(values: Mapping[str, float], split: bool = True) -> str:
  """One line for a person: the losses by objective, or what else was validated.

  Args:
    values: of the validation.
    split: whether there was something to validate on.

  Example:
    >>> line({'loss': 2.5, 'loss/blank': 2.0, 'loss/document': 3.0})
    'validation loss  blank 2.000  document 3.000'
    >>> line({'loss': 2.5, 'accuracy': 0.5})
    'validation  accuracy 0.500  loss 2.500'
  """
  if not values:
    return 'validation  nothing scored' if split else 'no validation split'
  losses = {k.removeprefix('loss/'): v for k, v in values.items() if k.startswith('loss/')}
  parts = [f'{k} {v:.3f}' for k, v in sorted((losses or values).items())]
  return '  '.join(['validation loss' if losses else 'validation', *parts])
