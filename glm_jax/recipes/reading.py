"""The data of a run that trains on a seqio task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from glm_jax import sharding
from glm_jax.batch import Batch
from glm_jax.training import recipe
from glm_jax.training.config import TrainConfig

# One set of masks for every run, whatever its seed, so that runs can be compared.
VALIDATION_SEED = 0


class TaskStream(recipe.WorkStream):
  """Batches of a task, spread over the mesh; the state is not looked at."""

  def __init__(self, config: TrainConfig, batches: Any, process: Any, layout: Any):
    """
    Args:
      config: of the run.
      batches: a `glm_jax.data.pipeline.Stream`.
      process: a `glm_jax.data.pipeline.Process`.
      layout: of the devices.
    """
    self._config, self._batches = config, batches
    self._process, self._layout = process, layout
    # A task of the user's keeps its place in an iterator.
    self.place = None if batches.indexed else batches

  def __call__(self, state: Any) -> recipe.Work:
    batch = next(self._batches)
    tokens, flops = self._config.recipe.work(self._config, batch.visibility)
    # Every process has as many rows; those of the others are taken to be like its own.
    shares = self._process.count
    # `index` is int64, which stays on the host.
    batch = sharding.place(batch._replace(index=None), self._layout)
    return recipe.Work(batch, shares * tokens, shares * flops)


class TaskData(recipe.Data):
  """See `recipe.Data`.

  Attributes:
    prepared: what `glm_jax.data.prepare` found.
    layout: of the devices.
  """

  def __init__(
    self,
    config: TrainConfig,
    layout: sharding.Layout,
    *,
    task: str,
    feature_lengths: Mapping[str, int],
    prepared: Any,
    identity: Mapping[str, Any],
  ):
    """
    Args:
      config: of the run.
      layout: of the devices.
      task: a registered seqio task or mixture.
      feature_lengths: {'tokens': T}.
      prepared: a `glm_jax.data.prepare.Prepared`.
      identity: see `recipe.Data`.
    """
    from glm_jax.data import pipeline

    self.vocabulary, self.fingerprint = prepared.vocabulary, prepared.fingerprint
    self.identity, self.prepared = identity, prepared
    self.decided = {'packed': prepared.packed}
    self.skipped = sum(c.rows['train'].stats['skipped'] for c in prepared.corpora)
    self.task, self.feature_lengths = task, feature_lengths
    self._config, self.layout = config, layout
    if prepared.corpora:
      self.rows = sum(len(c.rows['train']) for c in prepared.corpora)
    index, count = sharding.row_share(layout)
    self._process = pipeline.Process(index=index, count=count)
    self.validation = {
      name: self._held_out(task, self._process)
      for name, task in prepared.evaluation_tasks.items()
    }
    # Of a corpus without a name there is one alone.
    if self.validation and any(c.name for c in prepared.corpora):
      task = next(iter(prepared.evaluation_tasks.values()))
      self.validated_rows = pipeline.validated_rows(task, config.evaluation.examples)

  def _held_out(self, task: str, process: Any) -> Callable[[], Iterator[Batch]]:
    """The validation split of a task, once a call, on masks that never change."""
    from glm_jax.data import pipeline

    return lambda: pipeline.batches(
      task,
      self.feature_lengths,
      batch_size=self._config.batch_size,
      seed=VALIDATION_SEED,
      split='validation',
      train=False,
      max_rows=self._config.evaluation.examples,
      process=process,
    )

  def whole_validation(self, name: str) -> Iterator[Batch]:
    """All rows of a validation set, whatever this process's share."""
    from glm_jax.data import pipeline

    return self._held_out(self.prepared.evaluation_tasks[name], pipeline.Process())()

  def stream(self, step: int) -> TaskStream:
    from glm_jax.data import pipeline

    batches = pipeline.Stream(
      self.task,
      self.feature_lengths,
      batch_size=self._config.batch_size,
      seed=self._config.seed,
      start_step=step if self.prepared.indexed else 0,
      process=self._process,
    )
    return TaskStream(self._config, batches, self._process, self.layout)

  def describe(self, step: int, train_steps: int) -> list[str]:
    from glm_jax.data import shares

    if not self.prepared.corpora:
      return []
    table = shares.table(
      self.task,
      self.feature_lengths,
      self.prepared.corpora,
      batch_size=self._config.batch_size,
      seed=self._config.seed,
      step=step,
      train_steps=train_steps,
    )
    return [*self.prepared.notes, *table]

  def examples(self) -> Iterator[Mapping[str, np.ndarray]]:
    from glm_jax.data import pipeline

    batches = pipeline.dataset(
      self.task,
      self.feature_lengths,
      batch_size=self._config.batch_size,
      seed=self._config.seed,
    )
    return batches.as_numpy_iterator()
