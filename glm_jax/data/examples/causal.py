"""Predicting the next token: what ChatGLM2, ChatGLM3 and GLM-4 are trained on further.

Documents that share a row do not see each other, and each counts its positions from 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

from glm_jax.batch import OBJECTIVES
from glm_jax.configs import UserError


def causal(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int],
  pad: int,
) -> tf.data.Dataset:
  """Rows of indexed sources (`stream.source`) as examples of the batch contract.

  Args:
    dataset: batches of rows of L + 1 tokens.
    sequence_length: {'tokens': L}.
    pad: id of the token that fills rows up.

  Returns:
    A dataset of {field of `Batch`: [B, L]}.
  """
  length = sequence_length['tokens']

  @tf.autograph.experimental.do_not_convert
  def make(rows: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    names = ('tokens', 'lengths', 'scored', 'starts')
    batch = causal_examples(*(rows[name] for name in names), pad)
    return {**batch, 'index': rows['index'], 'corpus': rows['corpus']}

  check_rows(dataset, length)
  return dataset.map(make, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def check_rows(dataset: tf.data.Dataset, length: int) -> None:
  """Raises UserError for rows that do not make `length` positions."""
  if dataset.element_spec['tokens'].shape.as_list()[1:] != [length + 1]:
    raise UserError(
      f'causal rows must have one token more than the feature length {length}, got '
      f'{dataset.element_spec["tokens"].shape}; plan them by prepare.row_plan.'
    )


def causal_examples(
  tokens: tf.Tensor, lengths: tf.Tensor, scored: tf.Tensor, starts: tf.Tensor, pad: int
) -> dict[str, tf.Tensor]:
  """A batch of examples.

  Args:
    tokens: [B, L + 1] int32.
    lengths: [B] int32; what follows is padding.
    scored: [B, L + 1] bool, tokens that may carry loss.
    starts: [B, L + 1] bool, where a document, or a part of one, begins.
    pad: id of the token that fills rows up.

  Returns:
    The [B, L] features of `glm_jax.batch.Batch` (no index).
  """
  L = tokens.shape[1] - 1
  # Rows are stored with zeros behind their tokens.
  tokens = tf.where(tf.range(L + 1) < lengths[:, None], tokens, pad)
  t = tf.broadcast_to(tf.range(L), [tf.shape(tokens)[0], L])
  # The last token of a row predicts nothing.
  inside = t + 1 < lengths[:, None]
  # Where the document of each token begins: the running maximum of the starts, in log L
  # doublings. After a step, each place knows the largest of the 2 * step before it.
  start = tf.where(starts[:, :-1], t, 0)
  step = 1
  while step < L:
    start = tf.maximum(start, tf.pad(start, [[0, 0], [step, 0]])[:, :L])
    step *= 2
  start = tf.where(inside, start, 0)
  # The first token of a document is not predicted from the one before it: `scored` says
  # so already where documents open with a prefix, which carries no loss.
  weights = tf.cast(inside & scored[:, 1:], tf.float32)
  return {
    'tokens': tokens[:, :-1],
    'targets': tf.where(inside, tokens[:, 1:], tokens[:, :-1]),
    'loss_weights': weights,
    'positions': tf.where(inside, t - start, 0),
    'block_positions': tf.zeros_like(t),
    'key_start': start,
    'key_end': tf.where(inside, t + 1, 0),
    'objective': tf.fill(tf.shape(t), OBJECTIVES.index('causal')),
  }
