"""Which tokens of a row each objective masks: three samplers, one result.

Pure TensorFlow on batches of rows, without loops over spans or rows. The laws are
those of THUDM/GLM blocklm_utils.py (class ConstructBlockStrategy); what differs is said
where it differs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from glm_jax.data.examples.objective_config import LONGEST_SPAN, ObjectiveConfig
from glm_jax.data.stream import stateless

# Sorts behind every position.
_FAR = 1 << 28

# Purposes of random numbers, one for each draw: two that shared one would be the same
# numbers, and a span's length would tell its place.
(_LENGTHS, _MIX_LENGTHS, _PLACES, _SINGLE, _SENTENCES, _RATIO, _INFILL, _PLACE) = range(8)


class Maskable(NamedTuple):
  """A batch of token rows.

  Attributes:
    lengths: [B] int32; tokens from there on are padding.
    is_text: [B, N] bool, neither special piece nor padding.
    ends_sentence: [B, N] bool, the piece holds a sentence-ending mark.
    keys: [B] uint64, see `glm_jax.data.stream.stateless`.
    room: [B] int32, spans that each row may have.
  """

  lengths: tf.Tensor
  is_text: tf.Tensor
  ends_sentence: tf.Tensor
  keys: tf.Tensor
  room: tf.Tensor


class Spans(NamedTuple):
  """Spans in text order, the unused ones last.

  Invariants: `starts` ascend, spans do not overlap, `lengths > 0` exactly where used.

  Attributes:
    starts: [B, K] int32.
    lengths: [B, K] int32, 0 where unused.
    ends_with_eop: [B] bool; False for a span that runs to the end of the row.
    capped: [B] bool, the row had room for fewer spans than were drawn.
  """

  starts: tf.Tensor
  lengths: tf.Tensor
  ends_with_eop: tf.Tensor
  capped: tf.Tensor


def blank_spans(rows: Maskable, config: ObjectiveConfig, max_spans: int) -> Spans:
  """Spans of Poisson length over ~`mask_ratio` of the row (GLM paper, section 2.1).

  Lengths are drawn until they reach the budget; spans lie inside one document each, a
  token or more apart. A document takes spans in proportion to its length, where the
  original fills the shorter ones first; spans that do not fit go to the longest one.
  """
  B, K = tf.shape(rows.lengths)[0], max_spans
  # 1. Draw K lengths and keep them until their sum reaches the budget. The law is a Poisson
  # truncated to 1..39, so the factor exp(-mean) of the pmf cancels in the cdf.
  pmf = [
    math.exp(k * math.log(config.span_mean) - math.lgamma(k + 1))
    for k in range(1, LONGEST_SPAN + 1)
  ]
  cdf = tf.constant(np.cumsum(pmf) / np.sum(pmf), tf.float32)
  lengths = tf.searchsorted(
    cdf, tf.reshape(stateless.uniform(rows.keys, _LENGTHS, K), [-1]), side='right'
  )
  lengths = tf.reshape(tf.minimum(lengths, LONGEST_SPAN - 1) + 1, [-1, K])
  budget = _budget(rows, config)
  lengths = tf.where(tf.range(K) < rows.room[:, None], lengths, 0)
  # Exclusive: the length that crosses the budget is kept.
  drawn = tf.cumsum(lengths, axis=1, exclusive=True) < budget[:, None]
  drawn &= lengths > 0
  capped = tf.reduce_sum(lengths, axis=1) < budget
  if config.single_span_probability:
    single = stateless.uniform(rows.keys, _SINGLE, 1) < config.single_span_probability
    drawn &= ~single | (tf.range(K) == 0)
    capped &= ~single[:, 0]
  # The last length drawn is the one that crosses the budget, hence longer than most:
  # in random order, place and length have nothing to do with each other.
  order = tf.argsort(tf.where(drawn, stateless.uniform(rows.keys, _MIX_LENGTHS, K), 2.0))
  lengths = tf.gather(tf.where(drawn, lengths, 0), order, batch_dims=1)

  # 2. A document (run of text) for each span. Laid end to end and stretched to the text of
  # the row, the spans fall on documents in proportion to length; the middle of a span
  # decides.
  run_starts, run_lengths = _runs(rows.is_text)
  R = tf.shape(run_lengths)[1]
  longest = tf.argmax(run_lengths, axis=1, output_type=tf.int32)[:, None]
  room = tf.gather(run_lengths, longest, batch_dims=1)
  lengths = tf.minimum(lengths, room)
  total = tf.maximum(tf.reduce_sum(lengths, axis=1, keepdims=True), 1)
  middle = tf.cumsum(lengths, axis=1, exclusive=True) + lengths // 2
  text = tf.reduce_sum(run_lengths, axis=1, keepdims=True)
  run = tf.searchsorted(
    tf.cumsum(run_lengths, axis=1), middle * text // total, side='right'
  )
  run = tf.minimum(run, R - 1)
  # A span needs a token behind it, but for the last of a run: hence the + 1 on both sides.
  # The spans of a run that is overfull all go to the longest; what that has no room for
  # is dropped.
  needed = _sum_by_run(tf.where(lengths > 0, lengths + 1, 0), run, R)
  overfull = tf.gather(needed > run_lengths + 1, run, batch_dims=1)
  run = tf.where(overfull, longest, run)
  in_longest = (run == longest) & (lengths > 0)
  used = tf.cumsum(tf.where(in_longest, lengths + 1, 0), axis=1)
  fits = ~in_longest | (used <= room + 1)
  capped |= tf.reduce_any(~fits, axis=1)
  lengths = tf.where(fits, lengths, 0)

  # 3. Places by stars and bars. Of a run, `free` tokens are in no span and separate none.
  # Each span draws how many of them precede it; the draws are sorted, and a span begins
  # behind them and behind the spans before it, each with its separating token.
  needed = _sum_by_run(tf.where(lengths > 0, lengths + 1, 0), run, R)
  free = tf.gather(run_lengths + 1 - needed, run, batch_dims=1)
  draw = tf.cast(
    stateless.uniform(rows.keys, _PLACES, K) * tf.cast(free + 1, tf.float32), tf.int32
  )
  # uniform * n may round to n itself.
  draw = tf.minimum(draw, free)
  # By run, then by draw (at most N); the unused last.
  key = run * (rows.is_text.shape[1] + 1) + draw
  order = tf.argsort(tf.where(lengths > 0, key, _FAR), stable=True)
  run, draw, lengths = (tf.gather(v, order, batch_dims=1) for v in (run, draw, lengths))
  # Summed through the whole row, then less what earlier runs hold.
  before = tf.cumsum(tf.where(lengths > 0, lengths + 1, 0), axis=1, exclusive=True)
  before -= tf.gather(tf.cumsum(needed, axis=1, exclusive=True), run, batch_dims=1)
  starts = tf.gather(run_starts, run, batch_dims=1) + draw + before
  return Spans(starts, lengths, tf.ones([B], tf.bool), capped)


def sentence_spans(rows: Maskable, config: ObjectiveConfig, max_spans: int) -> Spans:
  """Whole sentences in random order until they reach ~`mask_ratio` of the row.

  A sentence ends with a piece that holds a sentence-ending mark, or with the row. One
  that a document's end cuts short counts only in a row that has no other.
  """
  # 1. Sentences: runs of text, cut behind the pieces that end one.
  following, preceding = _neighbours(rows.is_text)
  last = rows.is_text & (rows.ends_sentence | ~following)
  first = rows.is_text & (tf.pad(last, [[0, 0], [1, 0]])[:, :-1] | ~preceding)
  at_end = tf.range(rows.is_text.shape[1]) == rows.lengths[:, None] - 1
  starts, lengths, finished = _segments(
    first, last, rows.ends_sentence | at_end, least=max_spans
  )
  any_finished = tf.reduce_any(finished, axis=1, keepdims=True)
  eligible = (lengths > 0) & (finished | ~any_finished)

  # 2. The largest of random numbers, in their order, are a random choice in random order.
  u = stateless.uniform(rows.keys, _SENTENCES, tf.shape(starts)[1])
  _, chosen = tf.math.top_k(tf.where(eligible, u, -1.0), k=max_spans)
  eligible, starts, lengths = (
    tf.gather(v, chosen, batch_dims=1) for v in (eligible, starts, lengths)
  )
  more = tf.reduce_any(eligible & (tf.range(max_spans) >= rows.room[:, None]), axis=1)
  eligible &= tf.range(max_spans) < rows.room[:, None]
  lengths = tf.where(eligible, lengths, 0)
  budget = _budget(rows, config)
  # With every slot taken, some sentences may have had none.
  more |= tf.reduce_all(eligible, axis=1)
  capped = (tf.reduce_sum(lengths, axis=1) < budget) & more
  # 3. Keep them until they reach the budget, and put them back in text order.
  taken = tf.cumsum(lengths, axis=1, exclusive=True) < budget[:, None]
  lengths = tf.where(taken, lengths, 0)
  order = tf.argsort(tf.where(lengths > 0, starts, _FAR))
  starts, lengths = (tf.gather(v, order, batch_dims=1) for v in (starts, lengths))
  return Spans(starts, lengths, tf.ones_like(capped), capped)


def document_spans(rows: Maskable, config: ObjectiveConfig, max_spans: int) -> Spans:
  """One span of `document_min_ratio` of the row or more, to its end or inside it.

  To the end it takes <eos> along and has no [eop]; rows of several documents are
  always done so. Lengths are uniform, each row its own, where the original draws one
  length for a batch.
  """
  lengths = rows.lengths
  u = stateless.uniform(rows.keys, _RATIO, 1)[:, 0]
  # Two tokens remain to be seen, but for rows that have hardly more.
  longest = tf.maximum(lengths - 2, 1)
  shortest = tf.cast(config.document_min_ratio * tf.cast(lengths, tf.float64), tf.int32)
  shortest = tf.clip_by_value(shortest, 1, longest)
  size = shortest + tf.cast(u * tf.cast(longest - shortest + 1, tf.float32), tf.int32)
  # An empty row has no span at all.
  size = tf.minimum(tf.minimum(size, longest), lengths)

  run_starts, run_lengths = _runs(rows.is_text)
  one_document = tf.reduce_sum(tf.cast(run_lengths > 0, tf.int32), axis=1) == 1
  # Looked at only where there is one document, which is then the first run.
  run_start, text = run_starts[:, 0], run_lengths[:, 0]
  infill = (
    stateless.uniform(rows.keys, _INFILL, 1)[:, 0] < config.document_infill_probability
  )
  infill &= one_document
  size = tf.where(infill, tf.minimum(size, text), size)
  free = tf.maximum(text - size, 0)
  u = stateless.uniform(rows.keys, _PLACE, 1)[:, 0]
  offset = tf.minimum(tf.cast(u * tf.cast(free + 1, tf.float32), tf.int32), free)
  starts = tf.where(infill, run_start + offset, lengths - size)
  # The other objectives' tables have K columns, and `infilling` stitches them together.
  unused = [[0, 0], [0, max_spans - 1]]
  return Spans(
    tf.pad(starts[:, None], unused),
    tf.pad(size[:, None], unused),
    infill,
    tf.zeros_like(infill),
  )


def _budget(rows: Maskable, config: ObjectiveConfig) -> tf.Tensor:
  """int(mask_ratio * length), at least one token."""
  # In float64, as Python computes it: int(0.29 * 100) is 28, and 29 in float32.
  budget = tf.cast(config.mask_ratio * tf.cast(rows.lengths, tf.float64), tf.int32)
  return tf.maximum(budget, 1)


def _runs(is_text: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Starts and lengths, [B, R] int32, of the runs of text between special pieces."""
  following, preceding = _neighbours(is_text)
  first, last = is_text & ~preceding, is_text & ~following
  return _segments(first, last, last, least=1)[:2]


def _neighbours(is_text: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Whether the token behind, and the one before, is text."""
  padded = tf.pad(is_text, [[0, 0], [1, 1]])
  return padded[:, 2:], padded[:, :-2]


def _segments(
  first: tf.Tensor, last: tf.Tensor, flag: tf.Tensor, least: int
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
  """Starts, lengths and flags, [B, R], of segments from their first and last tokens.

  There are few of them in a row, so what follows is worked on in small tables.

  Args:
    first: [B, N] bool.
    last: [B, N] bool, as many.
    flag: [B, N] bool, looked at where segments end.
    least: R is this, or the most segments of a row.
  """
  B = tf.shape(first)[0]
  # [S, 2] (row, column) each, in row-major order, so that first s and last s belong to one
  # segment.
  starts, ends = tf.where(first), tf.where(last)
  row = tf.cast(starts[:, 0], tf.int32)
  counts = tf.math.unsorted_segment_sum(tf.ones_like(row), row, B)
  R = tf.maximum(tf.reduce_max(tf.pad(counts, [[0, 1]])), least)
  # Of each segment in its row.
  number = tf.range(tf.size(row)) - tf.gather(tf.cumsum(counts, exclusive=True), row)
  cells = tf.stack([row, number], axis=1)
  size = tf.cast(ends[:, 1] - starts[:, 1] + 1, tf.int32)
  flags = tf.cast(tf.gather_nd(flag, ends), tf.int32)
  table = tf.scatter_nd(
    cells,
    tf.stack([tf.cast(starts[:, 1], tf.int32), size, flags], axis=1),
    tf.stack([B, R, 3]),
  )
  return table[..., 0], table[..., 1], table[..., 2] > 0


def _sum_by_run(values, number, count):
  # Run r of row b is segment b * count + r; negative segments are left out of the sum.
  total = tf.math.unsorted_segment_sum(
    tf.reshape(values, [-1]),
    tf.reshape(_flat_numbers(number, count), [-1]),
    tf.shape(number)[0] * count,
  )
  return tf.reshape(total, [-1, count])


def _flat_numbers(number, count):
  """Run numbers that tell the rows of a batch apart; beyond `count`, none."""
  row = tf.range(tf.shape(number)[0])[:, None] * count
  return tf.where(number < count, number + row, -1)
