"""Validation during training, on masks that never change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from glm_jax import sharding
from glm_jax.batch import Batch
from glm_jax.sharding import Layout
from glm_jax.training import metrics
from glm_jax.training.config import TrainConfig
from glm_jax.training.losses import LossFn
from glm_jax.training.step import make_eval_step

# One set of masks for every run, whatever its seed, so that runs can be compared.
SEED = 0


def validation_batches(config: TrainConfig, task: str, process: Any) -> Iterator[Batch]:
  """The validation split of a task, once.

  Args:
    config: of the run.
    task: a registered task.
    process: a `glm_jax.data.pipeline.Process`.
  """
  from glm_jax.data import pipeline

  return pipeline.batches(
    task,
    config.feature_lengths,
    batch_size=config.batch_size,
    seed=SEED,
    split='validation',
    train=False,
    max_rows=config.evaluation.examples,
    process=process,
  )


class Validation:
  """Losses of each task's validation split."""

  def __init__(
    self,
    config: TrainConfig,
    tasks: Mapping[str, str],
    loss: LossFn,
    layout: Layout,
    process: Any,
  ):
    """
    Args:
      config: of the run.
      tasks: registered tasks to validate, by objective.
      loss: of a batch.
      layout: of the devices.
      process: this process's share of each batch.
    """
    self._config, self._tasks, self._layout = config, tasks, layout
    self._process = process
    self._step = jax.jit(make_eval_step(loss))

  def __call__(self, params: Any) -> dict[str, float]:
    """{'loss', 'loss/<objective>'}; 'loss' is their mean, each objective alike."""
    total: dict[str, tuple[float, float]] = {}
    for task in self._tasks.values():
      for batch in validation_batches(self._config, task, self._process):
        # `index` is int64, which stays on the host.
        batch = sharding.place(batch._replace(index=None), self._layout)
        total = metrics.add(total, jax.device_get(self._step(params, batch)))
    values = metrics.averages(total)
    # Weighted by tokens, 'loss' would mostly be that of the objective with long targets.
    by_objective = [v for k, v in values.items() if k.startswith('loss/')]
    if by_objective:
      values['loss'] = sum(by_objective) / len(by_objective)
    return values


def line(values: Mapping[str, float]) -> str:
  """One line for a person."""
  parts = [
    f'{k.removeprefix("loss/")} {v:.3f}'
    for k, v in sorted(values.items())
    if k.startswith('loss/')
  ]
  return 'validation loss  ' + '  '.join(parts) if parts else 'no validation split'
