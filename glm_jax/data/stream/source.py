"""Rows of tokens as a seqio source in which example g is a function of (seed, g).

The endless training stream has no state: g says which corpus its row is from and which
row of an epoch of it, and every epoch has a permutation of its own. So a run resumes from
a step number alone, at any step, on any number of processes, without reading what came
before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import seqio
import tensorflow as tf

from glm_jax.configs import UserError
from glm_jax.data.rows import records
from glm_jax.data.rows.shards import StoredRows
from glm_jax.data.stream import mixing, stateless

_ROTATION = 0x5EED  # of the seed, for where a permutation begins


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


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The rows of one corpus in a mixture.

  Attributes:
    name: of it.
    rows: by split.
    share: of the examples of the training stream.
  """

  name: str
  rows: dict[str, StoredRows]
  share: float = 1.0


class IndexedRows(seqio.DataSource):
  """Batches of rows: {tokens, lengths, scored, starts, keys, index, step, corpus}.

  With `shuffle`, the endless training stream; without, the split once, in order, the
  last batch filled up with empty rows (length 0, index -1), so that every process sees
  the same number of batches. Process h of H reads its slice of every global batch.
  """

  def __init__(self, corpora: Sequence[Corpus], reading: Reading = Reading()):
    """
    Args:
      corpora: one, or several whose shares sum to 1.
      reading: batch size and where to begin.
    """
    self.corpora = tuple(corpora)
    self.reading = reading
    splits = [s for s in corpora[0].rows if all(s in c.rows for c in corpora)]
    super().__init__(splits=tuple(splits), caching_permitted=False)

  def at(self, reading: Reading) -> IndexedRows:
    """The same rows read otherwise."""
    return IndexedRows(self.corpora, reading)

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  @property
  def performs_internal_shuffling(self) -> bool:
    return True

  def list_shards(self, split: str) -> list[str]:
    return [split]

  def num_input_examples(self, split: str) -> None:
    # seqio caches small data sets in memory, and would do so with the endless stream.
    return None

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
      raise UserError(
        'an indexed stream is a function of its seed, got None; pass '
        'seed=0 or another integer to get_dataset.'
      )
    shard = shard_info or seqio.ShardInfo(0, 1)
    size = self.reading.batch_size
    if size % shard.num_shards:
      raise UserError(
        f'the global batch must divide by the processes, got batch size '
        f'{size} and {shard.num_shards} processes; change one of them.'
      )
    # Places in the global batch, [local]: consecutive, so that blocks of rows stay whole.
    local = size // shard.num_shards
    first = tf.range(shard.index * local, (shard.index + 1) * local, dtype=tf.int64)
    rows = [corpus.rows[split] for corpus in self.corpora]
    layout = rows[0].layout
    if shuffle:
      fetch, stop = self._shuffled(rows, seed), np.iinfo(np.int64).max
    else:
      fetch, total = self._in_order(rows, [*self.counts(split).values()])
      stop = -(-total // size)

    @tf.autograph.experimental.do_not_convert
    def batch(step: tf.Tensor) -> dict[str, tf.Tensor]:
      index = step * size + first
      if not shuffle:
        index = tf.where(index < total, index, -1)
      raw, corpus = fetch(index)
      fields = records.decode(tf.ensure_shape(raw, [local, layout.record_bytes]), layout)
      return {
        **fields,
        # Rows that fill up the last batch are empty.
        'lengths': tf.where(index >= 0, fields['lengths'], 0),
        'keys': stateless.example_keys(seed, index),
        'index': index,
        'step': tf.fill([local], step),
        'corpus': corpus,
      }

    steps = tf.data.Dataset.range(self.reading.start_step, stop)
    return steps.map(batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

  def _shuffled(self, rows: list[StoredRows], seed: int) -> Callable:
    """Records and corpus of the examples of the training stream."""
    readers = [records.reader(r) for r in rows]
    orders = [_order(len(r), r.block, seed, i) for i, r in enumerate(rows)]
    block = mixing.pattern([corpus.share for corpus in self.corpora], seed)
    size = len(block.corpus)
    corpus_of, rank_of = tf.constant(block.corpus), tf.constant(block.rank)
    quotas = tf.constant(block.quotas)

    # Which example of its corpus example g is, a function of g alone: the quotas of all the
    # blocks before it, and its rank in its own.
    def fetch(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
      corpus = tf.gather(corpus_of, index % size)
      number = (index // size) * tf.gather(quotas, corpus) + tf.gather(
        rank_of, index % size
      )
      return _by_corpus(readers, orders, corpus, number), corpus

    return fetch

  def counts(self, split: str) -> dict[str, int]:
    """Rows of each corpus in a split that is read once, one corpus behind the other."""
    counts = {corpus.name: len(corpus.rows[split]) for corpus in self.corpora}
    most = self.reading.max_rows
    if most:
      # Every corpus its share, as far as it has rows.
      for corpus in self.corpora:
        share = max(1, round(most * corpus.share))
        counts[corpus.name] = min(counts[corpus.name], share)
    return counts

  def _in_order(self, rows: list[StoredRows], counts: list[int]) -> tuple[Callable, int]:
    """Records and corpus of a split read once, and how many there are."""
    readers = [records.reader(r) for r in rows]
    ends = np.cumsum(counts)
    firsts = tf.constant(ends - counts, tf.int64)

    def fetch(index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
      # What fills up the batch (-1) reads row 0, which `batch` then empties.
      row = tf.maximum(index, 0)
      corpus = tf.searchsorted(tf.constant(ends, tf.int64), row, side='right')
      same = [lambda number: number] * len(rows)
      return _by_corpus(readers, same, corpus, row - tf.gather(firsts, corpus)), corpus

    return fetch, int(ends[-1])


def _by_corpus(readers, orders, corpus: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
  """Records of examples that are of several corpora, each asked once."""
  if len(readers) == 1:
    return readers[0](orders[0](number))
  parts = tf.dynamic_partition(tf.range(tf.shape(corpus)[0]), corpus, len(readers))
  content = [
    read(order(tf.gather(number, part)))
    for read, order, part in zip(readers, orders, parts, strict=True)
  ]
  return tf.dynamic_stitch(parts, content)


def _order(n: int, block: int, seed: int, corpus: int) -> Callable:
  """A function from numbers in the endless stream of a corpus to its rows.

  Blocks of consecutive rows, which storage gives at once, are permuted anew each epoch,
  and begin at another row each epoch, so that other rows stand together. What is left
  over behind the last whole block comes last.
  """
  block = min(block, n)
  blocks = n // block

  def order(number: tf.Tensor) -> tf.Tensor:
    epoch, position = number // n, number % n
    # The op behind tf.random.experimental.index_shuffle: the place of an index in a random
    # permutation, computed without the permutation. The public function fixes one of the
    # three numbers of the seed; all are needed here: seed, epoch and corpus.
    count = tf.shape(number)
    seed_of = tf.fill(count, tf.cast(seed, tf.int64))
    which = tf.raw_ops.RandomIndexShuffle(
      index=tf.minimum(position // block, blocks - 1),
      seed=tf.stack([seed_of, epoch, tf.fill(count, tf.cast(corpus, tf.int64))], axis=1),
      max_index=tf.fill(count, tf.cast(blocks - 1, tf.int64)),
      rounds=4,
    )
    if block == 1:
      return which
    # The rows behind the last whole block keep their place. Then all are turned round by a
    # number of the epoch's own, so that other rows are left over and others share a block.
    whole = position < blocks * block
    row = tf.where(whole, which * block + position % block, position)
    turn = stateless.example_keys(seed + _ROTATION + corpus, epoch)
    turn = tf.cast(turn % tf.constant(n, tf.uint64), tf.int64)
    return (row + turn) % n

  return order
