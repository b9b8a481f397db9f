"""A registered task or mixture as an iterator of this process's part of each batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from glm_jax import startup
from glm_jax.batch import DTYPES, Batch
from glm_jax.configs import ResourceError, UserError
from glm_jax.data.stream.source import IndexedRows, Reading

startup.import_tensorflow()  # the accelerator belongs to JAX, whoever came first

# The index is not a feature: only the tasks of this package have one.
_FIELDS = [name for name in Batch._fields if name != 'index']
# What TensorFlow raises for storage that fails, and not for data that is wrong.
_OF_STORAGE = (
  tf.errors.NotFoundError,
  tf.errors.PermissionDeniedError,
  tf.errors.UnavailableError,
  tf.errors.DeadlineExceededError,
)
# Of a pipeline's own pool; the other cores are left to XLA.
_THREADS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Process:
  """Which of how many processes reads.

  Attributes:
    index: of this process.
    count: of all.
  """

  index: int = 0
  count: int = 1


class Stream(Iterator[Batch]):
  """Numpy batches of `dataset`, which says what the arguments are.

  Attributes:
    indexed: the stream is a function of its step alone, and `save` is not needed.
  """

  def __init__(self, task: str, feature_lengths: Mapping[str, int], **reading: Any):
    """See `dataset`."""
    self.indexed = _is_indexed(seqio.get_mixture_or_task(task))
    self._iterator = iter(dataset(task, feature_lengths, **reading))

  def __next__(self) -> Batch:
    try:
      example = next(self._iterator)
    except tf.errors.DataLossError as error:
      raise UserError(
        f'shards must be whole, got {error.message.splitlines()[0]!r}; copy them again, or '
        'make them again.'
      ) from error
    except _OF_STORAGE as error:
      raise ResourceError(error.message.splitlines()[0]) from error
    return Batch(
      **{
        name: np.asarray(example[name], dtype)
        for name, dtype in zip(Batch._fields, DTYPES, strict=True)
        if name in example
      }
    )

  def save(self, prefix: str) -> None:
    """Writes where the iterator stands, its shuffle buffer included, to files.

    Raises:
      UserError: a pipeline whose place cannot be written, as one with Python in it.
    """
    try:
      tf.train.Checkpoint(iterator=self._iterator).write(prefix)
    except tf.errors.FailedPreconditionError as error:
      raise UserError(
        'a task must be made of TensorFlow operations alone for its place to be saved, got '
        f'{str(error).splitlines()[0][:120]}; make shards of it (make_shards, '
        "CorpusConfig.corpus='task:NAME')."
      ) from error

  def restore(self, prefix: str) -> None:
    """Goes on where `save` was called.

    Raises:
      UserError: files that are damaged, or of another task.
    """
    try:
      checkpoint = tf.train.Checkpoint(iterator=self._iterator)
      checkpoint.read(prefix).assert_consumed()
    except (tf.errors.OpError, AssertionError, ValueError) as error:
      raise UserError(
        f'the place in the data must be readable, got {prefix} ({type(error).__name__}); '
        'restore the files, or begin a run from the checkpoint with init_from.'
      ) from error


def batches(
  task: str, feature_lengths: Mapping[str, int], **reading: Any
) -> Iterator[Batch]:
  """`dataset` as numpy batches."""
  return Stream(task, feature_lengths, **reading)


def dataset(
  task: str,
  feature_lengths: Mapping[str, int],
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  split: str = 'train',
  train: bool = True,
  max_rows: int = 0,
  process: Process = Process(),
) -> tf.data.Dataset:
  """Batches of a registered seqio task or mixture, as dicts of the contract's fields.

  Args:
    task: its name.
    feature_lengths: {'tokens': L}.
    batch_size: of the global batch; each process gets its share.
    seed: the stream is a function of it.
    start_step: first global batch of an indexed task (`glm_*`); others begin at 0 and
      are taken to their place by `Stream.restore`.
    split: of the task.
    train: shuffled and endless; otherwise the split once, with fixed masks, the last
      batch filled up with rows of no loss.
    max_rows: of validation; 0 for all.
    process: this one.

  Raises:
    UserError: a task whose features are not the batch contract, or are longer than
      `feature_lengths` says (nothing is trimmed).
  """
  provider = seqio.get_mixture_or_task(task)
  features = provider.output_features
  missing = sorted(set(_FIELDS) - set(features))
  if missing:
    raise UserError(
      f'the task {task!r} must yield {_FIELDS}, but lacks {missing}; end it with one of '
      'glm_jax.data.preprocessors and use its output_features().'
    )
  whole_batches = features['tokens'].rank == 2
  if whole_batches:
    if not _is_indexed(provider):
      raise UserError(
        f'a task of whole batches must read indexed rows, got {task!r}; give its features '
        'rank 1, or mix corpora by MixtureConfig.'
      )
    reading = Reading(batch_size, start_step, max_rows)
    provider = provider.replace(source=provider.source.at(reading))
  # Validation of other tasks: each process reads all of it and keeps its part of every
  # batch, since all must see the same number of batches.
  whole = not whole_batches and not train
  examples = provider.get_dataset(
    sequence_length=dict(feature_lengths),
    split=split,
    shuffle=train,
    seed=seed,
    shard_info=None if whole else seqio.ShardInfo(process.index, process.count),
    num_epochs=None if train and not whole_batches else 1,
    # seqio would cut what is too long without a word.
    trim_output_features=False,
    try_in_mem_cache=False,
  )
  if not whole_batches:
    if start_step:
      raise UserError(
        f'a task that is not indexed begins at step 0, got start_step={start_step} for '
        f'{task!r}; restore its place with Stream.restore.'
      )
    examples = _padded(examples, feature_lengths['tokens'])
    if train:
      size = batch_size // process.count
      examples = examples.batch(size, drop_remainder=True)
    else:
      examples = examples.take(max_rows or -1).batch(batch_size)
      examples = examples.map(lambda x: _share(x, batch_size, process))
  # Batches are parallel to each other; an op within one runs in its thread. The order is
  # kept, else a stream were not a function of its seed.
  options = tf.data.Options()
  options.threading.max_intra_op_parallelism = 1
  options.threading.private_threadpool_size = _THREADS
  options.deterministic = True
  return examples.with_options(options).prefetch(2)


def validated_rows(task: str, max_rows: int) -> dict[str, int]:
  """Rows by corpus of an indexed task's validation split, in the order of their indices.

  Args:
    task: its name.
    max_rows: as `dataset` is given them.
  """
  source = seqio.get_mixture_or_task(task).source
  return source.at(Reading(max_rows=max_rows)).counts('validation')


def _padded(examples: tf.data.Dataset, length: int) -> tf.data.Dataset:
  """Single examples, padded to `length`; a longer one is an error."""

  @tf.autograph.experimental.do_not_convert
  def pad(x: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    padded = {'index': tf.cast(x.get('index', -1), tf.int64)}
    for name in _FIELDS:
      fits = tf.debugging.assert_less_equal(
        tf.size(x[name]), length, f'{name} is longer than its feature length'
      )
      with tf.control_dependencies([fits]):
        value = tf.pad(x[name], [[0, length - tf.size(x[name])]])
      padded[name] = tf.ensure_shape(value, [length])
    return padded

  return examples.map(pad, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


@tf.autograph.experimental.do_not_convert
def _share(
  batch: dict[str, tf.Tensor], size: int, process: Process
) -> dict[str, tf.Tensor]:
  """This process's rows of a batch that is first filled up with empty ones."""
  missing = size - tf.shape(batch['index'])[0]
  local = size // process.count
  local_rows = {}
  for name, value in batch.items():
    value = tf.pad(value, [[0, missing]] + [[0, 0]] * (value.shape.rank - 1))
    value = value[process.index * local : (process.index + 1) * local]
    local_rows[name] = tf.ensure_shape(value, [local, *value.shape[1:]])
  return local_rows


def _is_indexed(provider: Any) -> bool:
  return isinstance(getattr(provider, 'source', None), IndexedRows)
