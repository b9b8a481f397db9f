"""Answers to what a model is asked, in packed rows: of conversations and of pairs.

A row holds whole documents, and `scored` marks an answer and the token that ends it. A
causal model predicts them as it does any next token. A prefix model has a document for
each answer: Part A, what is asked, with a mask; `[sop]`; Part B, the answer, which has the
position of the mask (GLM paper, section 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import tensorflow as tf

from glm_jax.batch import OBJECTIVES
from glm_jax.data.examples import infilling, packed
from glm_jax.data.examples.causal import causal_examples, check_rows
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.rows.table import RowPlan
from glm_jax.text.vocabulary import Vocabulary

_CAUSAL, _ANSWER = map(OBJECTIVES.index, ('causal', 'answer'))


class MixedText(NamedTuple):
  """Text of pretraining between the answers.

  Attributes:
    name: of its corpus; the others hold answers.
    number: of its corpus.
    config: its objectives, of a prefix model.
    plan: of its rows.
  """

  name: str
  number: int
  config: ObjectiveConfig
  plan: RowPlan


def answers(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int],
  *,
  vocabulary: Vocabulary,
  causal: bool,
  two_positions: bool,
  text: MixedText | None = None,
) -> tf.data.Dataset:
  """Rows of indexed sources (`stream.source`) as examples of the batch contract.

  Args:
    dataset: batches of rows of L + 1 tokens.
    sequence_length: {'tokens': L}.
    vocabulary: of the tokens.
    causal: whether the model is.
    two_positions: whether a prefix model's are, see `glm_jax.models`.
    text: what is mixed in.

  Returns:
    A dataset of {field of `Batch`: [B, L]}.
  """
  length = sequence_length['tokens']
  check_rows(dataset, length)
  pad = vocabulary.specials.pad

  def of_answers(rows: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    names = ('tokens', 'lengths', 'scored', 'starts')
    batch = causal_examples(*(rows[name] for name in names), pad)
    batch['objective'] = tf.fill(tf.shape(batch['tokens']), _ANSWER)
    if causal:
      return batch
    return _with_part_a(batch, rows['starts'][:, :-1], vocabulary, two_positions)

  def of_text(rows: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    source, places = packed.take_apart(rows, text.plan)
    size = source.tokens.shape[1] + 2 * packed.spans_of_longest(text.plan)
    examples = infilling.make_examples(source, size, text.config, vocabulary)
    count = tf.shape(rows['tokens'])[0]
    examples = packed.put_together(examples, places, count, length, pad)
    return {name: examples[name] for name in _FIELDS}

  @tf.autograph.experimental.do_not_convert
  def make(rows: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    same = {name: rows[name] for name in ('index', 'corpus')}
    if text is None:
      return {**of_answers(rows), **same}
    is_text = rows['corpus'] == text.number
    if causal:
      batch = of_answers(rows)
      batch['objective'] = tf.where(is_text[:, None], _CAUSAL, batch['objective'])
      return {**batch, **same}
    # Each kind is worked on by itself, and its rows go back to their places.
    count = tf.shape(is_text)[0]
    places = tf.dynamic_partition(tf.range(count), tf.cast(is_text, tf.int32), 2)
    makers = (of_answers, of_text)
    made = [
      make({name: tf.gather(value, place) for name, value in rows.items()})
      for make, place in zip(makers, places, strict=True)
    ]
    shape = [is_text.shape[0], length]
    batch = {
      name: tf.ensure_shape(tf.dynamic_stitch(places, [part[name] for part in made]), shape)
      for name in _FIELDS
    }
    return {**batch, **same}

  return dataset.map(make, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


_FIELDS = ('tokens', 'targets', 'loss_weights', 'positions', 'block_positions')
_FIELDS += ('key_start', 'key_end', 'objective')


def _with_part_a(
  batch: dict[str, tf.Tensor], starts: tf.Tensor, vocabulary: Vocabulary, two: bool
) -> dict[str, tf.Tensor]:
  """Causal examples as those of a prefix model.

  Args:
    batch: [B, L] features; the first scored target of a document is that of its `[sop]`.
    starts: [B, L] bool, where documents begin.
    vocabulary: of the tokens.
    two: whether the model has two positions.
  """
  B, L = tf.shape(starts)[0], starts.shape[1]
  t = tf.broadcast_to(tf.range(L), tf.shape(starts))
  inside, first = batch['key_end'] > 0, batch['key_start']
  # Which document of the batch each token is in, counted through its rows.
  document = tf.cumsum(tf.cast(starts, tf.int32), axis=1) - 1 + L * tf.range(B)[:, None]

  def of_document(reduce, where: tf.Tensor, otherwise: int) -> tf.Tensor:
    """[B, L]: the first or last t of each token's document that is so."""
    values = tf.reshape(tf.where(where & inside, t, otherwise), [-1])
    found = reduce(values, tf.reshape(document, [-1]), L * B)
    return tf.gather(found, document)

  sop = of_document(tf.math.unsorted_segment_min, batch['loss_weights'] > 0, L)
  in_a, in_b = inside & (t < sop), inside & (t >= sop)
  s = vocabulary.specials
  masks = [mask for mask in (s.mask, s.gmask, s.smask) if mask is not None]
  is_mask = tf.reduce_any([batch['tokens'] == mask for mask in masks], axis=0)
  mask = of_document(tf.math.unsorted_segment_max, is_mask & in_a, 0)
  places = mask - first
  if not two and s.gmask is not None:
    # Without block positions, positions go on behind a [gMASK].
    goes_on = tf.gather(batch['tokens'], mask, batch_dims=1) == s.gmask
    places = tf.where(goes_on, batch['positions'], places)
  return {
    **batch,
    'positions': tf.where(in_b, places, batch['positions']),
    'block_positions': tf.where(in_b, t - sop + 1, 0),
    # Every document has an answer; one without would remain causal.
    'key_end': tf.where(in_a & (sop < L), sop, batch['key_end']),
  }
