"""Validation during training, on masks that never change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from glm_jax import configs, sharding
from glm_jax.batch import Batch
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.training import metrics
from glm_jax.training.losses import LossFn
from glm_jax.training.step import make_eval_step

# One set of masks for every run, whatever its seed, so that runs can be compared.
SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
  """Validation of each objective that is trained on.

  Attributes:
    every: steps between validations; the last step always has one.
    examples: rows of the validation split, for each objective; 0 for all.
    objectives: what is validated, on masks of its own; None for what is trained on. Runs
      that train on different objectives are compared on one.
    fill: held-out sentences whose blanks are filled at the end; 0 for none.
  """

  every: int = 1000
  examples: int = 1024
  objectives: ObjectiveConfig | None = None
  fill: int = 5

  def __post_init__(self):
    configs.check_types(self)
    for name, least in (('every', 1), ('examples', 0), ('fill', 0)):
      value = getattr(self, name)
      configs.check(
        value >= least,
        f'EvaluationConfig.{name} must be {least} or more',
        str(value),
        'correct it',
      )


def validation_batches(config: Any, task: str, process: Any) -> Iterator[Batch]:
  """The validation split of a task, once.

  Args:
    config: a `TrainConfig`.
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
    self, config: Any, tasks: Mapping[str, str], loss: LossFn, layout: Any, process: Any
  ):
    """
    Args:
      config: a `TrainConfig`.
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
        batch = sharding.place(batch._replace(index=None), self._layout)
        total = metrics.add(total, jax.device_get(self._step(params, batch)))
    values = metrics.averages(total)
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
