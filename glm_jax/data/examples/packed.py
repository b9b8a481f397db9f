"""Packed rows: each document of a row becomes an example of its own, side by side.

The documents of a batch are taken apart, made into examples as any others are, and put
together again, each seeing itself alone. Row g of the stream has random numbers of its
own for each document, so an example remains a function of (seed, g).
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from glm_jax.data.examples.infilling import TextRows
from glm_jax.data.rows.table import RowPlan
from glm_jax.data.stream import stateless


class Places(NamedTuple):
  """Where D documents come from.

  Attributes:
    row: [D] int32, ascending.
    number: [D] int32, in its row.
  """

  row: tf.Tensor
  number: tf.Tensor


def take_apart(batch: dict[str, tf.Tensor], plan: RowPlan) -> tuple[TextRows, Places]:
  """The documents of packed rows as rows of their own.

  Args:
    batch: a batch of `IndexedRows`.
    plan: of the rows.
  """
  N = batch['tokens'].shape[1]
  inside = tf.range(N) < batch['lengths'][:, None]
  starts = batch['starts'] & inside
  # [D, 2], (row, place) of each document's first token, in row-major order.
  cells = tf.cast(tf.where(starts), tf.int32)
  row, first = cells[:, 0], cells[:, 1]
  # A document ends where the next one of its row begins, the last one with the row;
  # the -1 behind the last document is no row.
  same_row = tf.concat([row[1:], [-1]], 0) == row
  following = tf.concat([first[1:], [0]], 0)
  lengths = tf.where(same_row, following, tf.gather(batch['lengths'], row)) - first
  # [D, W] places in the flattened rows; W, the longest a document can be, is static.
  W = min(plan.longest, N)
  index = tf.minimum(first[:, None] + tf.range(W), N - 1) + N * row[:, None]
  in_document = tf.range(W) < lengths[:, None]
  ranks = tf.cumsum(tf.cast(starts, tf.int32), axis=1)
  number = tf.gather_nd(ranks, cells) - 1
  source = TextRows(
    tokens=tf.where(in_document, tf.gather(tf.reshape(batch['tokens'], [-1]), index), 0),
    lengths=lengths,
    scored=in_document & tf.gather(tf.reshape(batch['scored'], [-1]), index),
    keys=stateless.child_keys(tf.gather(batch['keys'], row), number),
    step=tf.gather(batch['step'], row),
    room=tf.gather(tf.constant(_spans(plan)), lengths),
  )
  return source, Places(row, number)


def put_together(
  examples: dict[str, tf.Tensor], places: Places, rows: int, length: int, pad: int
) -> dict[str, tf.Tensor]:
  """Examples side by side in their rows.

  Args:
    examples: [D, W] features of `glm_jax.batch.Batch`, and [D] counts.
    places: of the D documents.
    rows: B.
    length: L.
    pad: id of the token that fills rows up, as those of one example are.

  Returns:
    [B, L] features; of the counts, their sums, [B].

  Raises:
    tf.errors.InvalidArgumentError: a row longer than `length` (never trimmed).
  """
  # Documents ascend by row, so cumulative sizes tell where each begins: `ends` counts the
  # tokens of the whole batch, `first` those of the row.
  sizes = tf.reduce_sum(tf.cast(examples['key_end'] > 0, tf.int32), axis=1)
  ends = tf.cumsum(sizes)
  row_sizes = tf.math.unsorted_segment_sum(sizes, places.row, rows)
  before_row = tf.cumsum(row_sizes, exclusive=True)
  first = ends - sizes - tf.gather(before_row, places.row)
  fits = tf.debugging.assert_less_equal(
    row_sizes, length, 'a packed row is longer than its feature length'
  )
  with tf.control_dependencies([fits] if fits is not None else []):
    p = tf.broadcast_to(tf.range(length), [rows, length])
  inside = p < row_sizes[:, None]
  # Which document holds the token that is number p of its row, counted through the batch.
  number = tf.searchsorted(ends, tf.reshape(p + before_row[:, None], [-1]), side='right')
  number = tf.reshape(tf.minimum(number, tf.maximum(tf.size(sizes) - 1, 0)), [rows, length])
  offset = tf.gather(tf.pad(first, [[0, 1]]), number)
  width = examples['tokens'].shape[1]
  index = number * width + tf.clip_by_value(p - offset, 0, width - 1)
  features = {}
  for name, value in examples.items():
    if value.shape.rank == 1:
      value = tf.cast(value, tf.int32)
      features[name] = tf.math.unsorted_segment_sum(value, places.row, rows)
      continue
    # One more element, for a batch that has no document at all.
    flat = tf.pad(tf.reshape(value, [-1]), [[0, 1]])
    value = tf.gather(flat, index)
    # What an example sees moves with it; its positions still count from 0.
    if name in ('key_start', 'key_end'):
      value += offset
    filling = pad if name in ('tokens', 'targets') else 0
    features[name] = tf.where(inside, value, tf.cast(filling, value.dtype))
  return features


def spans_of_longest(plan: RowPlan) -> int:
  """Spans that the longest documents have room for."""
  return max(_spans(plan))


def _spans(plan: RowPlan) -> list[int]:
  return [(positions - n) // 2 for n, positions in enumerate(plan.room)]
