"""What the data layer is measured against, written anew from its published description.

- `original_blank`: the token-level objective of THUDM/GLM (blocklm_utils.py), an example
  at a time in Python and NumPy.
- `t5_span_corruption`: the span corruption of T5 (Raffel et al., JMLR 2020, section
  3.1.4), an example at a time in TensorFlow, as T5X reads it.
"""

from __future__ import annotations

import math
import random

import numpy as np
import tensorflow as tf

# Span lengths: Poisson of mean 3, without its constant factor.
_PMF = [3.0**k / math.factorial(k) for k in range(1, 40)]


def original_blank(
  tokens: np.ndarray, rng: random.Random, ids: dict[str, int], size: int
) -> dict[str, np.ndarray]:
  """One example: lengths, spans, positions, parts and padding, each by a loop.

  Args:
    tokens: [n] of one document, opened by [ENC] and closed by <eos>.
    rng: random numbers.
    ids: of mask, sop and eop.
    size: padded length.
  """
  n, lengths = len(tokens), []
  while sum(lengths) < int(0.15 * n):
    lengths += rng.choices(range(1, 40), weights=_PMF)
  rng.shuffle(lengths)
  # Spans are placed in the text without [ENC] and <eos>, contracted to a point each, with
  # one token at least between two of them.
  body, total, count = n - 2, sum(lengths), len(lengths)
  starts = sorted(rng.randrange(body - total - count + 2) for _ in range(count))
  spans, before = [], 1
  for start, length in zip(starts, lengths, strict=True):
    spans.append((start + before, start + before + length))
    before += length + 1
  # Part A counts a span as one position, that of its [MASK].
  position = np.ones(n, np.int64)
  for start, end in spans:
    position[start + 1 : end] = 0
  position = np.cumsum(position) - 1
  # Part B: the spans in random order, each at the position of its [MASK].
  order = list(range(count))
  rng.shuffle(order)
  inputs, targets, positions, blocks = [], [], [], []
  for i in order:
    start, end = spans[i]
    inputs += [[ids['sop']], tokens[start:end]]
    targets += [tokens[start:end], [ids['eop']]]
    positions.append([position[start]] * (end - start + 1))
    blocks.append(np.arange(1, end - start + 2))
  # Part A: the text with [MASK] for each span.
  source, source_positions, last = [], [], 0
  for start, end in spans:
    source += [tokens[last:start], [ids['mask']]]
    source_positions += [position[last:start], [position[start]]]
    last = end
  source.append(tokens[last:])
  source_positions.append(position[last:])
  source = np.concatenate(source)
  sep = len(source)
  text = np.concatenate([source, *inputs])
  pad = np.zeros(size - len(text), np.int64)
  return {
    'text': np.concatenate([text, pad]),
    'target': np.concatenate([source, *targets, pad]),
    'loss_mask': np.concatenate([np.zeros(sep), np.ones(len(text) - sep), pad]),
    'position': np.concatenate([*source_positions, *positions, pad]),
    'block_position': np.concatenate([np.zeros(sep, np.int64), *blocks, pad]),
    'sep': np.array(sep),
  }


def t5_span_corruption(
  tokens: tf.Tensor, seeds: tf.Tensor, vocabulary_size: int
) -> dict[str, tf.Tensor]:
  """One example: noise and text in random segments, spans by sentinels.

  Args:
    tokens: [n] int32.
    seeds: [2, 2] int32.
    vocabulary_size: sentinels count down from here.
  """
  n = tf.size(tokens)
  noise = tf.cast(tf.round(tf.cast(n, tf.float32) * 0.15), tf.int32)
  spans = tf.maximum(tf.cast(tf.round(tf.cast(noise, tf.float32) / 3.0), tf.int32), 1)

  # A random composition: shuffled cuts between the elements divide them into `spans` runs.
  def segments(total: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    cuts = tf.cast(tf.range(total - 1) < spans - 1, tf.int32)
    cuts = tf.random.experimental.stateless_shuffle(cuts, seed)
    number = tf.cumsum(tf.pad(cuts, [[1, 0]]))
    return tf.math.segment_sum(tf.ones_like(number), number)

  # Text and noise take turns, text first: every second segment is noise.
  both = tf.stack([segments(n - noise, seeds[0]), segments(noise, seeds[1])], 1)
  starts = tf.cumsum(tf.reshape(both, [-1]))[:-1]
  begins = tf.math.unsorted_segment_sum(tf.ones_like(starts), starts, n)
  is_noise = tf.cumsum(begins) % 2 == 1

  def sentinels(hidden: tf.Tensor) -> tf.Tensor:
    # The first token of each run becomes a sentinel, and the others go.
    first = hidden & ~tf.pad(hidden, [[1, 0]])[:-1]
    marks = vocabulary_size - tf.cumsum(tf.cast(first, tf.int32))
    kept = tf.where(first, marks, tokens)
    return tf.boolean_mask(kept, first | ~hidden)

  return {'inputs': sentinels(is_noise), 'targets': sentinels(~is_noise)}
