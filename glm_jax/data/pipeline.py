"""A registered task or mixture as an iterator of this process's part of each batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import seqio
import tensorflow as tf

from glm_jax.batch import DTYPES, Batch
from glm_jax.data.source import IndexedRows, Reading

# The accelerator belongs to JAX.
for _kind in ('GPU', 'TPU'):
  tf.config.set_visible_devices([], _kind)

_FIELDS = [name for name in Batch._fields if name != 'index']
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


def batches(
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
) -> Iterator[Batch]:
  """Yields numpy batches of a registered seqio task or mixture.

  Args:
    task: its name.
    feature_lengths: {'tokens': L}.
    batch_size: of the global batch; each process gets its share.
    seed: the stream is a function of it.
    start_step: first global batch. An indexed task (`glm_*`) begins there at once;
      another is read up to there and thrown away.
    split: of the task.
    train: shuffled and endless; otherwise the split once, with fixed masks, the last
      batch filled up with rows of no loss.
    max_rows: of validation; 0 for all.
    process: this one.

  Raises:
    ValueError: a task whose features are not the batch contract, or are longer than
      `feature_lengths` says (nothing is trimmed).
  """
  provider = seqio.get_mixture_or_task(task)
  features = provider.output_features
  missing = sorted(set(_FIELDS) - set(features))
  if missing:
    raise ValueError(
      f'the task {task!r} must yield {_FIELDS}, but lacks {missing}; end it with one of '
      'glm_jax.data.preprocessors and use its output_features().'
    )
  whole_batches = features['tokens'].rank == 2
  if whole_batches and isinstance(provider.source, IndexedRows):
    reading = Reading(batch_size, start_step, max_rows)
    provider = provider.replace(source=provider.source.at(reading))
  dataset = provider.get_dataset(
    sequence_length=dict(feature_lengths), split=split, shuffle=train, seed=seed,
    shard_info=seqio.ShardInfo(process.index, process.count),
    num_epochs=None if train and not whole_batches else 1,
    # seqio would cut what is too long without a word.
    trim_output_features=False, try_in_mem_cache=False,
  )
  if not whole_batches:
    dataset = _to_batches(dataset, feature_lengths['tokens'], batch_size // process.count,
                          train, max_rows // process.count)
    dataset = dataset.skip(start_step)
  options = tf.data.Options()
  options.threading.max_intra_op_parallelism = 1
  options.threading.private_threadpool_size = _THREADS
  options.deterministic = True
  dataset = dataset.with_options(options).prefetch(2)
  return map(_to_numpy, dataset.as_numpy_iterator())


def _to_batches(dataset, length, local_size, train, max_rows) -> tf.data.Dataset:
  """Single examples to batches, padded to `length` with rows of no loss."""

  @tf.autograph.experimental.do_not_convert
  def pad(x):
    padded = {}
    for name in _FIELDS:
      fits = tf.debugging.assert_less_equal(
        tf.size(x[name]), length, f'{name} is longer than its feature length'
      )
      with tf.control_dependencies([fits]):
        padded[name] = tf.pad(x[name], [[0, length - tf.size(x[name])]])
    padded['index'] = x.get('index', tf.constant(-1, tf.int64))
    return {name: tf.ensure_shape(value, [] if name == 'index' else [length])
            for name, value in padded.items()}

  dataset = dataset.map(pad, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  if train:
    return dataset.batch(local_size, drop_remainder=True)
  if max_rows:
    dataset = dataset.take(max_rows)
  return dataset.batch(local_size).map(lambda x: _fill_up(x, local_size))


@tf.autograph.experimental.do_not_convert
def _fill_up(x, size):
  missing = size - tf.shape(x['index'])[0]
  return {
    name: tf.ensure_shape(
      tf.pad(value, [[0, missing]] + [[0, 0]] * (value.shape.rank - 1)),
      [size, *value.shape[1:]],
    )
    for name, value in x.items()
  }


def _to_numpy(example: dict[str, np.ndarray]) -> Batch:
  return Batch(**{
    name: np.asarray(example[name], dtype)
    for name, dtype in zip(Batch._fields, DTYPES, strict=True)
    if name in example
  })
