"""Rows of tokens as a seqio source in which example g is a function of (seed, g).

The endless training stream has no state: example g is row `shuffle(g mod n)` with a
new permutation each epoch, so a run resumes from a step number alone, at any step, on
any number of processes, without reading what came before.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import seqio
import tensorflow as tf

from glm_jax.data import stateless
from glm_jax.data.rows import SCORED_FILE, TOKENS_FILE, Rows


@dataclasses.dataclass(frozen=True)
class Reading:
  """How the stream is read.

  Attributes:
    batch_size: rows of the global batch; a task used by hand yields batches of it.
    start_step: first global batch.
    max_rows: only so many rows of the split, 0 for all (validation).
  """

  batch_size: int = 32
  start_step: int = 0
  max_rows: int = 0


class IndexedRows(seqio.DataSource):
  """Batches of rows: {tokens, lengths, scored, keys, index}.

  With `shuffle`, the endless training stream; without, the split once, in order, the
  last batch filled up with empty rows (length 0, index -1), so that every process sees
  the same number of batches. Process h of H reads its slice of every global batch.
  """

  def __init__(self, rows: dict[str, Rows], reading: Reading = Reading()):
    """
    Args:
      rows: by split.
      reading: batch size and where to begin.
    """
    self.rows = rows
    self.reading = reading
    super().__init__(splits=tuple(rows), caching_permitted=False)

  def at(self, reading: Reading) -> IndexedRows:
    """The same rows read otherwise."""
    return IndexedRows(self.rows, reading)

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  @property
  def performs_internal_shuffling(self) -> bool:
    return True

  def list_shards(self, split: str) -> list[str]:
    return [split]

  def num_input_examples(self, split: str) -> None:
    return None  # else seqio would cache the endless stream in memory

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    *,
    sequence_length=None,
    num_epochs=None,
  ) -> tf.data.Dataset:
    """See the class; `seed` must be given, since the stream is a function of it."""
    if seed is None:
      raise ValueError(
        'an indexed stream is a function of its seed, got None; pass '
        'seed=0 or another integer to get_dataset.'
      )
    rows, reading = self.rows[split], self.reading
    shard = shard_info or seqio.ShardInfo(0, 1)
    if reading.batch_size % shard.num_shards:
      raise ValueError(
        f'the global batch must divide by the processes, got batch size '
        f'{reading.batch_size} and {shard.num_shards} processes; change one of them.'
      )
    local = reading.batch_size // shard.num_shards
    n = len(rows.lengths)
    if not shuffle and reading.max_rows:
      n = min(n, reading.max_rows)
    first = tf.range(shard.index * local, (shard.index + 1) * local, dtype=tf.int64)

    # Memory-mapped tensors: only rows that are asked for are read, and no Python
    # function runs in the pipeline (one that does can hang at the process's exit).
    all_tokens, all_scored = (
      tf.raw_ops.ImmutableConst(
        dtype=dtype,
        shape=rows.tokens.shape,
        memory_region_name=str(rows.tokens.filename.with_name(name)),
      )
      for dtype, name in ((tf.int32, TOKENS_FILE), (tf.bool, SCORED_FILE))
    )
    all_lengths = tf.constant(rows.lengths)

    @tf.autograph.experimental.do_not_convert
    def batch(step: tf.Tensor) -> dict[str, tf.Tensor]:
      index = step * reading.batch_size + first
      if shuffle:
        epoch = tf.cast(index // n, tf.int64)
        seeds = tf.stack(
          [tf.fill([local], tf.cast(seed, tf.int64)), epoch, tf.zeros_like(epoch)], axis=1
        )
        number = tf.raw_ops.RandomIndexShuffle(
          index=index % n,
          seed=seeds,
          max_index=tf.fill([local], tf.cast(n - 1, tf.int64)),
          rounds=4,
        )
      else:
        index = number = tf.where(index < n, index, -1)
      at = tf.maximum(number, 0)
      lengths = tf.gather(all_lengths, at)
      return {
        'tokens': tf.gather(all_tokens, at),
        'lengths': tf.where(number >= 0, lengths, 0),  # rows that fill up are empty
        'scored': tf.gather(all_scored, at),
        'keys': stateless.example_keys(seed, index),
        'index': index,
      }

    stop = np.iinfo(np.int64).max if shuffle else -(-n // reading.batch_size)
    steps = tf.data.Dataset.range(reading.start_step, stop)
    return steps.map(batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
