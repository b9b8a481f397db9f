"""Rows of a context and all that may follow it to rows of a document a candidate.

Which wrong candidates stand beside the right one is drawn anew whenever an example comes
round, as a function of the run's seed and the example's number in the stream.
"""

from __future__ import annotations

import tensorflow as tf

from glm_jax.data.stream import stateless

_NEGATIVES = 1


def documents(
  rows: dict[str, tf.Tensor], length: int, *, most: int, negatives: int = 0
) -> dict[str, tf.Tensor]:
  """The documents of rows, each the context and a candidate, the right one first.

  Args:
    rows: of `stream.source`, [B, N]: a context and its candidates, the right one first,
      each a piece that `starts` marks.
    length: L, positions of a row of documents.
    most: candidates that a row can have.
    negatives: most wrong ones that are kept, drawn by `keys`; 0 for all.

  Returns:
    The rows with [B, L + 1] `tokens`, `scored` and `starts`, and [B] `lengths`.
  """
  starts, N = rows['starts'], rows['starts'].shape[1]
  inside = tf.range(N) < rows['lengths'][:, None]
  piece = tf.cumsum(tf.cast(starts, tf.int32), axis=1) - 1
  in_piece = (piece[..., None] == tf.range(most + 1)) & inside[..., None]
  sizes = tf.reduce_sum(tf.cast(in_piece, tf.int32), axis=1)
  begins = tf.cumsum(sizes, axis=1, exclusive=True)
  context, sizes, begins = sizes[:, :1], sizes[:, 1:], begins[:, 1:]
  chosen = _drawn(rows['keys'], sizes > 0, negatives)
  sizes = tf.gather(sizes, chosen, batch_dims=1)
  begins = tf.gather(begins, chosen, batch_dims=1)

  whole = tf.where(sizes > 0, context + sizes, 0)
  ends = tf.cumsum(whole, axis=1)
  t = tf.tile(tf.range(length + 1)[None], [tf.shape(starts)[0], 1])
  # Behind the last document there is nothing; its place is then not read.
  document = tf.searchsorted(ends, t, side='right')
  document = tf.minimum(document, ends.shape[1] - 1)
  of_document = lambda values: tf.gather(values, document, batch_dims=1)
  place = t - of_document(ends - whole)
  kept = t < ends[:, -1:]
  source = tf.where(place < context, place, of_document(begins) + place - context)
  tokens = tf.gather(rows['tokens'], tf.where(kept, source, 0), batch_dims=1)
  return {
    **rows,
    'tokens': tf.where(kept, tokens, 0),
    'scored': kept & (place >= context),
    'starts': kept & (place == 0),
    'lengths': ends[:, -1],
  }


def _drawn(keys: tf.Tensor, there: tf.Tensor, negatives: int) -> tf.Tensor:
  """[B, K]: numbers of the candidates that are kept, in their order.

  Args:
    keys: [B] uint64.
    there: [B, most] bool, whether there are so many.
    negatives: see `documents`.
  """
  others = there.shape[1] - 1
  count = min(negatives or others, others)
  # Those that are not there come last: a row that has fewer keeps all of them.
  order = tf.where(there[:, 1:], stateless.uniform(keys, _NEGATIVES, others), 2.0)
  drawn = tf.sort(tf.argsort(order, axis=1, stable=True)[:, :count], axis=1)
  return tf.pad(drawn + 1, [[0, 0], [1, 0]])
