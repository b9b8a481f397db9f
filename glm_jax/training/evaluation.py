"""Validation during training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from glm_jax import sharding
from glm_jax.batch import Batch
from glm_jax.sharding import Layout
from glm_jax.training import metrics, stopping
from glm_jax.training.config import TrainConfig
from glm_jax.training.program import Program
from glm_jax.training.recipe import Data, Recipe

_OF_CORPUS = 'corpus/{}/{}'
_OF_OBJECTIVE = 'loss/'

Sets = Mapping[str, Callable[[], Iterator[Batch]]]
"""name -> the batches of a held-out set, numpy, this process's rows."""


class Validation:
  """What is measured of each held-out set, and of each corpus in all of them."""

  def __init__(
    self,
    sets: Sets,
    eval_step: Callable[[Any, Any], Any],
    layout: Layout,
    corpora: Mapping[str, int] = MappingProxyType({}),
    told: metrics.Told = dict,
  ):
    """
    Args:
      sets: what is validated.
      eval_step: (variables, batch) -> metrics, to be jitted.
      layout: of the devices.
      corpora: rows of each in every set, see `recipe.Data.validated_rows`.
      told: of the recipe.
    """
    self._sets, self._layout, self._told = sets, layout, told
    self._step = jax.jit(eval_step)
    self._corpora = tuple(corpora)
    self._ends = np.cumsum([*corpora.values()])

  def __call__(self, variables: Any) -> dict[str, float]:
    """{'loss', 'loss/<objective>', 'corpus/<name>/loss'}, and what else is measured.

    'loss' is the mean of those of the objectives, each alike, of all rows or a corpus's. Of
    a corpus there is all but its losses by objective, such as 'corpus/<name>/accuracy'.
    """
    total: dict[str, tuple[float, float]] = {}
    of_corpus = [total] * len(self._corpora)
    for batches in self._sets.values():
      for number, batch in enumerate(batches()):
        measured = self._measure(variables, batch)
        total = metrics.add(total, measured)
        there = self._there(number, batch)
        for i in there:
          # Few batches hold rows of two corpora, and are worked on again for each.
          own = measured
          if len(there) > 1:
            own = self._measure(variables, self._rows(batch, i))
          of_corpus[i] = metrics.add(of_corpus[i], own)
    values = self._means(total)
    for name, sums in zip(self._corpora, of_corpus, strict=True):
      means = self._means(sums)
      values |= {_OF_CORPUS.format(name, metric): means[metric] for metric in _whole(means)}
    return values

  def _means(self, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    values = self._told(metrics.averages(sums))
    # Weighted by tokens, 'loss' would mostly be that of the objective with long targets.
    by_objective = [v for k, v in values.items() if k.startswith(_OF_OBJECTIVE)]
    if by_objective:
      values['loss'] = sum(by_objective) / len(by_objective)
    return values

  def _measure(self, variables: Any, batch: Batch) -> dict[str, Any]:
    # `index` is int64, which stays on the host.
    batch = sharding.place(batch._replace(index=None), self._layout)
    return jax.device_get(self._step(variables, batch))

  def _there(self, number: int, batch: Batch) -> range:
    """Which corpora the global batch of that number holds, the same in every process."""
    if not self._corpora:
      return range(0)
    size = len(batch.tokens) * sharding.row_share(self._layout)[1]
    ends = (number * size, (number + 1) * size - 1)
    first, last = np.searchsorted(self._ends, ends, side='right')
    # Behind the last corpus, rows without loss fill the batch up.
    return range(first, min(last, len(self._corpora) - 1) + 1)

  def _rows(self, batch: Batch, corpus: int) -> Batch:
    """The batch with the loss of the rows of one corpus alone."""
    own = np.searchsorted(self._ends, batch.index, side='right') == corpus
    return batch._replace(loss_weights=np.where(own[:, None], batch.loss_weights, 0))


def _whole(names: Iterable[str]) -> list[str]:
  """Those of metrics that are not one objective's alone."""
  return [name for name in names if not name.startswith(_OF_OBJECTIVE)]


def check(config: TrainConfig, data: Data, built: Program, layout: Layout) -> None:
  """Traces an evaluation, and looks at what it would measure.

  Args:
    config: of the run.
    data: of its recipe.
    built: its program.
    layout: of the devices.

  Raises:
    UserError: `best_metric` is not among it; see `stopping.check_metric`.
  """
  with sharding.active(layout):
    variables = jax.eval_shape(built.variables, built.state['params'], built.frozen)
    names = jax.eval_shape(built.eval_step, variables, built.batch)
    names = config.recipe.told(dict.fromkeys(names, 1.0))
  # What a recipe of one's own measures besides, its first validation shows.
  if type(config.recipe).validate is Recipe.validate:
    corpora = [
      _OF_CORPUS.format(name, metric)
      for name in data.validated_rows
      for metric in _whole(names)
    ]
    stopping.check_metric(config, [*names, *corpora] if data.validation else [])


def line(values: Mapping[str, float], split: bool = True) -> str:
  """One line for a person: the losses by objective, and what else was validated.

  Of corpora, one number each: the accuracy where there is one, else the loss.

  Args:
    values: of the validation.
    split: whether there was something to validate on.

  Example:
    >>> line({'loss': 2.5, 'loss/blank': 2.0, 'loss/document': 3.0})
    'validation loss  blank 2.000  document 3.000'
    >>> line({'loss': 2.5, 'loss/blank': 2.5, 'corpus/a/loss': 2.0, 'corpus/b/loss': 3.0})
    'validation loss  blank 2.500  (corpora: a 2.000  b 3.000)'
    >>> line({'loss': 2.5, 'loss/answer': 2.5, 'accuracy': 0.5})
    'validation loss  answer 2.500  accuracy 0.500'
    >>> line({'loss': 2.5, 'accuracy': 0.5})
    'validation  accuracy 0.500  loss 2.500'
    >>> line({'accuracy': 0.5, 'corpus/a/accuracy': 0.5, 'corpus/a/loss': 2.0})
    'validation  accuracy 0.500  (accuracy of corpora: a 0.500)'
  """
  if not values:
    return 'validation  nothing scored' if split else 'no validation split'
  of_corpora = {k: v for k, v in values.items() if k.startswith('corpus/')}
  judged = any(k.endswith('/accuracy') for k in of_corpora)
  ending, what = ('/accuracy', 'accuracy of corpora') if judged else ('/loss', 'corpora')
  corpora = [
    f'{k.removeprefix("corpus/").removesuffix(ending)} {v:.3f}'
    for k, v in of_corpora.items()
    if k.endswith(ending)
  ]
  own = {k: v for k, v in values.items() if k not in of_corpora}
  others = {k: own[k] for k in _whole(own)}
  losses = {k.removeprefix(_OF_OBJECTIVE): own[k] for k in own if k not in others}
  if losses:  # whose mean it is
    others.pop('loss', None)
  parts = [f'{k} {v:.3f}' for part in (losses, others) for k, v in sorted(part.items())]
  if corpora:
    parts.append(f'({what}: {"  ".join(corpora)})')
  return '  '.join(['validation loss' if losses else 'validation', *parts])
