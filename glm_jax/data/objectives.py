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
from glm_jax.data import spans, stateless
from glm_jax.data.objective_config import ObjectiveConfig
from glm_jax.text.vocabulary import Vocabulary

_FAR = 1 << 28
(_OBJECTIVE, _ORDER, _DBLOCK, _SHORT) = range(16, 20)  # purposes, apart from spans'

_SAMPLERS = {
  'blank': spans.blank_spans,
  'document': spans.document_spans,
  'sentence': spans.sentence_spans,
}


class Source(NamedTuple):
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
  source: Source, length: int, config: ObjectiveConfig, vocabulary: Vocabulary
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
  max_spans = (length - N) // 2
  if max_spans < 1:
    raise ValueError(
      f'rows must be at least 2 tokens shorter than the feature length {length}, got '
      f'rows of {N}; raise TASK_FEATURE_LENGTHS.'
    )
  full = source.lengths
  if config.short_probability:
    source = _shorten(source, config, vocabulary)
  s = vocabulary.specials
  special = np.zeros(vocabulary.size, bool)
  special[list(vocabulary.names)] = True
  inside = tf.range(N) < source.lengths[:, None]
  is_text = inside & ~tf.gather(tf.constant(special), source.tokens)
  ends = tf.gather(tf.constant(vocabulary.ends_sentence()), source.tokens)
  room = tf.fill(tf.shape(full), max_spans) if source.room is None else source.room
  rows = spans.Rows(
    source.tokens, source.lengths, is_text, ends & is_text, source.keys, room
  )

  # Only objectives that can come up are sampled; one of them is kept for each row.
  objective = _draw(source, config)
  kept = None
  for name in config.objectives:
    drawn = _SAMPLERS[name](rows, config, max_spans)
    chosen = objective == MIXED.index(name)
    kept = drawn if kept is None else _choose(chosen, drawn, kept)
  masks = (s.mask, s.gmask, s.smask) if config.task_masks else (s.mask,) * 3
  configs.check(
    None not in masks and (s.dblock is not None or not config.dblock_probability),
    'the vocabulary must have the masks of the objectives',
    str(s),
    'set ObjectiveConfig.task_masks=False and dblock_probability=0',
  )
  example = _assemble(
    source,
    kept,
    tf.gather(tf.constant(masks), objective),
    length,
    config,
    vocabulary,
    objective=objective,
  )
  example['objective'] = tf.broadcast_to(objective[:, None], tf.shape(example['tokens']))
  example['loss_weights'] = _weigh(example['loss_weights'], objective, config)
  example['lost'] = full - source.lengths
  example['capped'] = kept.capped
  return example


def _draw(source: Source, config: ObjectiveConfig) -> tf.Tensor:
  """[B] int32, the objective of each row by the weights of its step."""
  starts = tf.constant([start for start, _ in config.phases], tf.int64)
  shares = np.array([weights for _, weights in config.phases])
  shares = shares / shares.sum(1, keepdims=True)
  below = np.cumsum(shares, axis=1)
  below[below > 1 - 1e-9] = 2.0  # whatever the rounding, the last one takes the rest
  phase = tf.searchsorted(starts, tf.maximum(source.step, 0), side='right') - 1
  below = tf.gather(tf.constant(below, tf.float32), phase)
  u = stateless.uniform(source.keys, _OBJECTIVE, 1)
  return tf.reduce_sum(tf.cast(u >= below, tf.int32), axis=1)


def _weigh(weights: tf.Tensor, objective: tf.Tensor, config: ObjectiveConfig) -> tf.Tensor:
  """Loss weights of tokens: by objective, and so that examples count alike if asked."""
  if config.loss_mean == 'example':
    total = tf.reduce_sum(weights, axis=1, keepdims=True)
    weights = weights / tf.maximum(total, 1.0)
  if set(config.loss_weights) != {1.0}:
    by_objective = tf.constant(config.loss_weights, tf.float32)
    weights = weights * tf.gather(by_objective, objective)[:, None]
  return weights


def _assemble(source, drawn, mask_ids, length, config, vocabulary, objective):
  """Parts A and B, targets, positions and visibility from spans in text order."""
  s, N = vocabulary.specials, source.tokens.shape[1]
  starts, lengths, eop = drawn.starts, drawn.lengths, drawn.ends_with_eop
  used = lengths > 0
  p = tf.broadcast_to(tf.range(length), [tf.shape(starts)[0], length])

  # Part A: position p holds text token p + (tokens hidden by the masks before it).
  hidden = tf.cumsum(tf.where(used, lengths - 1, 0), axis=1)
  mask_places = tf.where(used, starts - hidden + tf.where(used, lengths - 1, 0), _FAR)
  masks_before = tf.searchsorted(mask_places, p, side='left')
  shift = tf.gather(tf.pad(hidden, [[0, 0], [1, 0]]), masks_before, batch_dims=1)
  next_mask = tf.gather(
    tf.pad(mask_places, [[0, 0], [0, 1]], constant_values=_FAR), masks_before, batch_dims=1
  )
  is_mask = p == next_mask
  part_a = source.lengths - hidden[:, -1]

  # Part B: the spans in their order, each opened by [sop].
  if config.shuffle_spans:
    u = stateless.uniform(source.keys, _ORDER, lengths.shape[1])
    order = tf.argsort(tf.where(used, u, 2.0))
    b_starts, b_lengths, b_places = (
      tf.gather(x, order, batch_dims=1) for x in (starts, lengths, mask_places)
    )
  else:
    b_starts, b_lengths, b_places = starts, lengths, mask_places
  pieces = tf.where(b_lengths > 0, b_lengths + tf.cast(eop, tf.int32)[:, None], 0)
  piece_ends = part_a[:, None] + tf.cumsum(pieces, axis=1)
  example_length = piece_ends[:, -1]
  fits = tf.debugging.assert_less_equal(
    example_length, length, 'an example is longer than its feature length'
  )
  which = tf.minimum(tf.searchsorted(piece_ends, p, side='right'), pieces.shape[1] - 1)
  offset, start, size, place = (
    tf.gather(x, which, batch_dims=1)
    for x in (piece_ends - pieces, b_starts, b_lengths, b_places)
  )
  offset = p - offset
  in_a, in_b = p < part_a[:, None], (p >= part_a[:, None]) & (p < example_length[:, None])

  index = tf.where(in_a, p + shift, start + offset - 1)
  tokens = tf.gather(source.tokens, tf.clip_by_value(index, 0, N - 1), batch_dims=1)
  if config.dblock_probability:
    u = stateless.uniform(source.keys, _DBLOCK, length)
    noisy = objective == MIXED.index('blank')
    noise = in_b & noisy[:, None] & (u < config.dblock_probability)
    tokens = tf.where(noise, s.dblock, tokens)
  tokens = tf.where(in_b & (offset == 0), s.sop, tokens)
  tokens = tf.where(is_mask, mask_ids[:, None], tokens)

  # The target of [eop] is scored as the last token of its span.
  at_eop = offset == size
  goal = tf.clip_by_value(start + offset - tf.cast(at_eop, tf.int32), 0, N - 1)
  targets = tf.where(at_eop, s.eop, tf.gather(source.tokens, goal, batch_dims=1))
  scored = in_b & tf.gather(source.scored, goal, batch_dims=1)

  if config.original_positions:
    positions = tf.where(in_a, p + shift, start)
  else:
    positions = tf.where(in_a, p, place)
  blocks = tf.where(in_b, offset + 1, 0)
  if config.one_dimensional:
    positions, blocks = p, tf.zeros_like(p)
  elif not config.block_positions:
    goes_on = (objective == MIXED.index('document'))[:, None] & in_b
    positions = tf.where(goes_on, p, positions)
  inside = in_a | in_b
  key_end = tf.where(inside, tf.maximum(part_a[:, None], p + 1), 0)
  with tf.control_dependencies([fits] if fits is not None else []):
    return {
      'tokens': tf.where(inside, tokens, s.pad),
      'targets': tf.where(in_b, targets, s.pad),
      'loss_weights': tf.cast(scored, tf.float32),
      'positions': tf.where(inside, positions, 0),
      'block_positions': blocks,
      'key_start': tf.zeros_like(key_end),
      'key_end': key_end,
    }


def _shorten(source: Source, config: ObjectiveConfig, vocabulary: Vocabulary) -> Source:
  """Some rows become a random window of themselves, opened as a document is."""
  N, prefix = source.tokens.shape[1], vocabulary.prefix[:1]
  u = stateless.uniform(source.keys, _SHORT, 3)
  shortest = tf.minimum(32, source.lengths)
  room = tf.cast(source.lengths - shortest, tf.float32)
  size = tf.minimum(shortest + tf.cast(u[:, 1] * room, tf.int32), source.lengths)
  short = (u[:, 0] < config.short_probability) & (size < source.lengths)
  size = tf.where(short, size, source.lengths)
  room = tf.cast(source.lengths - size + 1, tf.float32)
  start = tf.minimum(tf.cast(u[:, 2] * room, tf.int32), source.lengths - size)
  index = tf.minimum(start[:, None] + tf.range(N), N - 1)
  tokens = tf.gather(source.tokens, index, batch_dims=1)
  scored = tf.gather(source.scored, index, batch_dims=1)
  if prefix:
    opening = short[:, None] & (tf.range(N) == 0)
    tokens, scored = tf.where(opening, prefix[0], tokens), scored & ~opening
  return source._replace(tokens=tokens, scored=scored, lengths=size)


def _choose(chosen, new: spans.Spans, old: spans.Spans) -> spans.Spans:
  def pick(a, b):
    return tf.where(tf.reshape(chosen, [-1] + [1] * (len(a.shape) - 1)), a, b)

  return spans.Spans(*map(pick, new, old))
