"""Rows and spans to model inputs: the one assembly that all objectives share.

Part A is the text with each span replaced by one mask token, seen bidirectionally.
Part B holds the spans: `[sop] t1 .. tn` predicts `t1 .. tn [eop]`, causally. Two
positions a token: the place in the corrupted text (a span has its mask's), and 0 in
Part A or 1.. inside the span (GLM paper, section 2.1 and figure 2).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from glm_jax import configs
from glm_jax.batch import MIXED
from glm_jax.configs import UserError
from glm_jax.data.examples import spans
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.stream import stateless
from glm_jax.text.vocabulary import Vocabulary

# The bit above a token's id that says whether it is scored; more than there are pieces.
_SCORED = 1 << 24
# Purposes of random numbers, apart from those of `spans` (0 to 7).
(_OBJECTIVE, _ORDER, _DBLOCK, _SHORT) = range(16, 20)

_SAMPLERS = {
  'blank': spans.blank_spans,
  'document': spans.document_spans,
  'sentence': spans.sentence_spans,
}


class TextRows(NamedTuple):
  """What an objective is made from.

  Attributes:
    tokens: [B, N] int32.
    lengths: [B] int32.
    scored: [B, N] bool, tokens that may carry loss (a prompt does not).
    keys: [B] uint64.
    step: [B] int64, of the schedule of objectives.
    room: [B] int32, spans that each row has positions for; None for what `length` gives.
  """

  tokens: tf.Tensor
  lengths: tf.Tensor
  scored: tf.Tensor
  keys: tf.Tensor
  step: tf.Tensor
  room: tf.Tensor | None = None


def make_examples(
  source: TextRows, length: int, config: ObjectiveConfig, vocabulary: Vocabulary
) -> dict[str, tf.Tensor]:
  """A batch of examples, each of an objective drawn by `config.phases`.

  Args:
    source: rows of N tokens.
    length: L of the result, N + 2 or more.
    config: the objectives.
    vocabulary: its special pieces and sentence ends.

  Returns:
    The [B, L] features of `glm_jax.batch.Batch` (no index), and `lost`: [B] int32,
    tokens of the row outside a short window, and `capped`: [B] bool, see `Spans`.

  Raises:
    tf.errors.InvalidArgumentError: an example longer than `length` (never trimmed).
  """
  N = source.tokens.shape[1]
  # Each span adds two tokens: its mask in Part A, and [sop] in Part B.
  max_spans = (length - N) // 2
  if max_spans < 1:
    raise UserError(
      f'rows must be at least 2 tokens shorter than the feature length {length}, got '
      f'rows of {N}; raise TASK_FEATURE_LENGTHS.'
    )
  full = source.lengths
  if config.short_probability:
    source = _shorten(source, config, vocabulary)
  s = vocabulary.specials
  # What a piece is: 1 if text can spell it, and 2 more if it ends sentences.
  kinds = 1 + 2 * vocabulary.ends_sentence().astype(np.uint8)
  kinds[list(vocabulary.names)] = 0
  inside = tf.range(N) < source.lengths[:, None]
  kind = tf.gather(tf.constant(kinds), source.tokens)
  is_text = inside & (kind > 0)
  ends = is_text & (kind > 1)
  room = tf.fill(tf.shape(full), max_spans) if source.room is None else source.room
  rows = spans.Maskable(source.lengths, is_text, ends, source.keys, room)
  objective = _draw(source, config)
  drawn = _sample(rows, objective, config, max_spans)
  masks = (s.mask, s.gmask, s.smask) if config.task_masks else (s.mask,) * 3
  configs.check(
    None not in masks and (s.dblock is not None or not config.dblock_probability),
    'the vocabulary must have the masks of the objectives',
    str(s),
    'set ObjectiveConfig.task_masks=False and dblock_probability=0',
  )
  example = _assemble(
    source,
    drawn,
    tf.gather(tf.constant(masks), objective),
    length,
    config,
    vocabulary,
    objective=objective,
  )
  example['objective'] = tf.broadcast_to(objective[:, None], tf.shape(example['tokens']))
  example['loss_weights'] = _weigh(example['loss_weights'], objective, config)
  example['lost'] = full - source.lengths
  example['capped'] = drawn.capped
  return example


def _draw(source: TextRows, config: ObjectiveConfig) -> tf.Tensor:
  """[B] int32, the objective of each row by the weights of its step."""
  if len(config.objectives) == 1:
    return tf.fill(tf.shape(source.lengths), MIXED.index(config.objectives[0]))
  starts = tf.constant([start for start, _ in config.phases], tf.int64)
  shares = np.array([weights for _, weights in config.phases])
  shares = shares / shares.sum(1, keepdims=True)
  below = np.cumsum(shares, axis=1)
  below[below > 1 - 1e-9] = 2.0  # whatever the rounding, the last one takes the rest
  # Rows that are not indexed have step -1; they are of the first phase.
  phase = tf.searchsorted(starts, tf.maximum(source.step, 0), side='right') - 1
  below = tf.gather(tf.constant(below, tf.float32), phase)
  # The number of the objective is the number of cumulative shares that u has passed.
  u = stateless.uniform(source.keys, _OBJECTIVE, 1)
  return tf.reduce_sum(tf.cast(u >= below, tf.int32), axis=1)


def _sample(rows, objective, config, max_spans) -> spans.Spans:
  """Spans of each row by its objective; a sampler works on its own rows alone."""
  if len(config.objectives) == 1:
    return _SAMPLERS[config.objectives[0]](rows, config, max_spans)
  numbers, drawn = [], []
  for name in config.objectives:
    number = tf.where(objective == MIXED.index(name))[:, 0]
    subset = spans.Maskable(*(tf.gather(field, number) for field in rows))
    numbers.append(tf.cast(number, tf.int32))
    drawn.append(_SAMPLERS[name](subset, config, max_spans))
  # Field by field, back into the order of the batch.
  return spans.Spans(*(tf.dynamic_stitch(numbers, f) for f in zip(*drawn, strict=True)))


def _weigh(weights: tf.Tensor, objective: tf.Tensor, config: ObjectiveConfig) -> tf.Tensor:
  """Loss weights of tokens: by objective, and so that examples count alike if asked."""
  if config.loss_mean == 'example':
    total = tf.reduce_sum(weights, axis=1, keepdims=True)
    weights = weights / tf.maximum(total, 1.0)
  if {*config.loss_weights} != {1.0}:
    by_objective = tf.constant(config.loss_weights, tf.float32)
    weights = weights * tf.gather(by_objective, objective)[:, None]
  return weights


def _assemble(source, drawn, mask_ids, length, config, vocabulary, objective):
  """Parts A and B, targets, positions and visibility from spans in text order.

  A row is a list of ranges: text, a mask, text, a mask, ..., then [sop] and a span, [sop]
  and a span, ...; one op strings them together, for tokens and again for positions. What
  a position predicts is what stands behind it, or [eop] where that is the next [sop].
  """
  s, N = vocabulary.specials, source.tokens.shape[1]
  starts, lengths, eop = drawn.starts, drawn.lengths, drawn.ends_with_eop
  B, used = tf.shape(starts)[0], lengths > 0

  # Part A: the text before each span, then its mask; the text behind the last. [B, K + 1]
  # tables: piece k of the text is before[k] .. limits[k], between the spans k - 1 and k.
  # Unused spans stand at the end of the last used one, where their pieces are empty.
  stops = tf.where(used, starts + lengths, 0)
  stops = tf.where(used, stops, tf.reduce_max(stops, axis=1, keepdims=True))
  before = tf.pad(stops, [[0, 0], [1, 0]])
  limits = tf.concat([tf.where(used, starts, before[:, :-1]), source.lengths[:, None]], 1)
  text, masks = limits - before, tf.pad(tf.cast(used, tf.int32), [[0, 0], [0, 1]])
  mask_places = tf.cumsum(text + masks, axis=1)[:, :-1] - 1
  part_a = tf.reduce_sum(text + masks, axis=1)

  # Part B: the spans in their order, each opened by [sop].
  if config.shuffle_spans:
    u = stateless.uniform(source.keys, _ORDER, lengths.shape[1])
    # u < 1: the unused stay last.
    order = tf.argsort(tf.where(used, u, 2.0))
    b_starts, b_lengths, b_places = (
      tf.gather(value, order, batch_dims=1) for value in (starts, lengths, mask_places)
    )
  else:
    b_starts, b_lengths, b_places = starts, lengths, mask_places
  opens = tf.cast(b_lengths > 0, tf.int32)
  # A span without [eop] ends with its last target, which is no input.
  pieces = b_lengths + tf.where(eop[:, None], opens, 0)
  example_length = part_a + tf.reduce_sum(pieces, axis=1)
  fits = tf.debugging.assert_less_equal(
    example_length, length, 'an example is longer than its feature length'
  )
  with tf.control_dependencies([fits] if fits is not None else []):
    p = tf.range(length)

  # The string of ranges, of indices into `content`. Behind a row's N tokens stand its mask,
  # [sop] and padding; each token carries whether it is scored. The string has one position
  # more than the example, for the target of the last. For spans of 'c' and 'f g' in
  # 'a b c d e f g' it reads
  #   a b [MASK] d e [MASK] | [sop] c [sop] f g | padding
  # with 0 1 N 3 4 N | N+1 2 N+1 5 6 | N+2 N+2 ... as indices.
  MASK, SOP, PAD = N, N + 1, N + 2
  flagged = source.tokens + tf.where(source.scored, _SCORED, 0)
  specials = tf.stack([mask_ids, tf.fill([B], s.sop), tf.fill([B], s.pad)], axis=1)
  content = tf.reshape(tf.concat([flagged, specials], axis=1), [-1])
  index = _ranges(
    [_alternate(before, MASK), _alternate(SOP, b_starts), tf.fill([B, 1], PAD)],
    [_alternate(text, masks), _alternate(opens, b_lengths)],
    length + 1,
  )
  # The range that fills up counts on from PAD.
  index = tf.minimum(index, PAD)
  coded = tf.gather(content, index + (N + 3) * tf.range(B)[:, None])
  ids, flags = tf.bitwise.bitwise_and(coded, _SCORED - 1), coded >= _SCORED
  tokens, following = ids[:, :-1], ids[:, 1:]
  in_a, inside = p < part_a[:, None], p < example_length[:, None]
  in_b = inside & ~in_a
  # Inputs of blank spans are replaced, never their targets and never [sop] (index >= N).
  if config.dblock_probability:
    u = stateless.uniform(source.keys, _DBLOCK, length)
    noisy = (objective == MIXED.index('blank'))[:, None] & (index[:, :-1] < N)
    tokens = tf.where(noisy & in_b & (u < config.dblock_probability), s.dblock, tokens)
  # A span's last token is followed by the next [sop] or by padding; its target is [eop],
  # scored as the token is.
  at_eop = index[:, 1:] >= SOP
  targets = tf.where(at_eop, s.eop, following)
  scored = in_b & tf.where(at_eop, flags[:, :-1], flags[:, 1:])

  if config.one_dimensional:
    positions, blocks = tf.broadcast_to(p, tf.shape(tokens)), tf.zeros_like(tokens)
  elif config.original_positions:
    # Masks and their spans stand where the spans stood in the text.
    firsts = _alternate(before, tf.pad(starts, [[0, 0], [0, 1]]))
    positions, blocks = _positions(
      firsts, _alternate(text, masks), b_starts, pieces, length
    )
  else:
    # Part A is one range from 0; a span of Part B has the position of its mask throughout.
    positions, blocks = _positions(
      tf.zeros([B, 1], tf.int32), part_a[:, None], b_places, pieces, length
    )
  if not config.block_positions:
    goes_on = (objective == MIXED.index('document'))[:, None] & in_b
    positions = tf.where(goes_on, p, positions)
  # Part A sees all of itself; Part B sees Part A and itself up to here.
  key_end = tf.where(inside, tf.maximum(part_a[:, None], p + 1), 0)
  return {
    'tokens': tf.where(inside, tokens, s.pad),
    'targets': tf.where(in_b, targets, s.pad),
    'loss_weights': tf.cast(scored, tf.float32),
    'positions': tf.where(inside, positions, 0),
    'block_positions': tf.where(in_b, blocks, 0),
    'key_start': tf.zeros_like(key_end),
    'key_end': key_end,
  }


def _positions(a_firsts, a_sizes, b_places, pieces, length):
  """Both positions of each token, [B, L] int32 each, in one string of ranges.

  They are the high and the low bits of a number: in Part A a range counts the high ones,
  in a span of Part B the low ones.

  Args:
    a_firsts: [B, n] first positions of the ranges of Part A.
    a_sizes: [B, n] their lengths.
    b_places: [B, K] first position of each span of Part B.
    pieces: [B, K] their lengths.
    length: L.
  """
  # Two numbers below 2^15 fit an int32, which is half the memory of an int64.
  bits, dtype = (15, tf.int32) if length < 2**15 else (31, tf.int64)
  high = tf.constant(1 << bits, dtype)
  # Part A counts (0, 0), (1, 0), ..., in steps of `high`; a span of Part B counts
  # (place, 1), (place, 2), ... from its [sop] on, in steps of 1.
  a_starts = tf.cast(a_firsts, dtype) * high
  b_starts = tf.cast(b_places, dtype) * high + 1
  both = _ranges(
    [a_starts, b_starts, tf.zeros_like(b_starts[:, :1])],
    [tf.cast(a_sizes, dtype), tf.cast(pieces, dtype)],
    length,
    steps=[tf.fill(tf.shape(a_starts), high), tf.ones_like(b_starts)],
  )
  first = tf.bitwise.right_shift(both, tf.constant(bits, dtype))
  second = tf.bitwise.bitwise_and(both, high - 1)
  return tf.cast(first, tf.int32), tf.cast(second, tf.int32)


def _ranges(firsts, sizes, width, steps=None):
  """[B, width] rows of ranges, one behind the other, the last one filling up.

  Args:
    firsts: [B, n] tables of where ranges begin, and [B, 1] of the one that fills up.
    sizes: [B, n] tables of their lengths, without that of the last.
    width: of the result.
    steps: [B, n] tables of their steps; None for 1.
  """
  firsts, sizes = tf.concat(firsts, axis=1), tf.concat(sizes, axis=1)
  rest = width - tf.reduce_sum(sizes, axis=1, keepdims=True)
  sizes = tf.concat([sizes, rest], axis=1)
  if steps is None:
    deltas = tf.ones([1], firsts.dtype)[0]
    limits = firsts + sizes
  else:
    deltas = tf.concat([*steps, tf.ones_like(rest)], axis=1)
    limits = firsts + sizes * deltas
    deltas = tf.reshape(deltas, [-1])
  # The op behind tf.ragged.range: all ranges of all rows in one flat tensor. The sizes of
  # each row add up to `width`, so that is the table, and its row splits are not needed.
  ranges = tf.raw_ops.RaggedRange(
    starts=tf.reshape(firsts, [-1]), limits=tf.reshape(limits, [-1]), deltas=deltas
  )
  return tf.reshape(ranges.rt_dense_values, [-1, width])


def _alternate(a, b):
  """[B, 2 n]: columns of `a` and `b` in turn; one of them may be a number."""
  table = a if isinstance(b, int) else b
  a, b = (tf.fill(tf.shape(table), c) if isinstance(c, int) else c for c in (a, b))
  # [B, n, 2], flattened row by row.
  return tf.reshape(tf.stack([a, b], axis=2), [tf.shape(table)[0], -1])


def _shorten(source: TextRows, config: ObjectiveConfig, vocabulary: Vocabulary) -> TextRows:
  """Some rows become a random window of themselves, opened as a document is."""
  N, prefix = source.tokens.shape[1], vocabulary.prefix[:1]
  # Three numbers a row: whether it is cut short, to what size, and where the window is.
  u = stateless.uniform(source.keys, _SHORT, 3)
  shortest = tf.minimum(32, source.lengths)
  room = tf.cast(source.lengths - shortest, tf.float32)
  size = tf.minimum(shortest + tf.cast(u[:, 1] * room, tf.int32), source.lengths)
  short = (u[:, 0] < config.short_probability) & (size < source.lengths)
  size = tf.where(short, size, source.lengths)
  room = tf.cast(source.lengths - size + 1, tf.float32)
  start = tf.minimum(tf.cast(u[:, 2] * room, tf.int32), source.lengths - size)
  # Beyond the window the gather repeats the last token; `lengths` says it is padding.
  index = tf.minimum(start[:, None] + tf.range(N), N - 1)
  tokens = tf.gather(source.tokens, index, batch_dims=1)
  scored = tf.gather(source.scored, index, batch_dims=1)
  # The opening takes the place of the window's first token, so the size stays.
  if prefix:
    opening = short[:, None] & (tf.range(N) == 0)
    tokens, scored = tf.where(opening, prefix[0], tokens), scored & ~opening
  return source._replace(tokens=tokens, scored=scored, lengths=size)
