"""Losses of a unigram and a bigram, to read a model's loss beside.

Both are fitted on training *target* tokens, [eop] included. The bigram predicts a
target from the token before it in its span, smoothed as Witten & Bell (1991).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from glm_jax.batch import Batch


def fit_and_score(
  train: Iterable[Batch], validation: Iterable[Batch], vocabulary_size: int
) -> dict[str, float]:
  """{'unigram', 'bigram'}: mean loss on validation targets, in nats; {} without targets.

  Args:
    train: batches to count in.
    validation: batches to score, weighted by `loss_weights`.
    vocabulary_size: V.
  """
  V = vocabulary_size
  tokens, targets, _ = _pairs(train)
  if not len(targets):
    return {}
  counts = np.bincount(targets, minlength=V).astype(np.float64)
  unigram = (counts + 1) / (counts.sum() + V)

  # A pair is one number, token * V + target, so that the table holds only those that occur.
  pairs, pair_counts = np.unique(tokens * V + targets, return_counts=True)
  follows = np.bincount(pairs // V, weights=pair_counts, minlength=V)
  kinds = np.bincount(pairs // V, minlength=V)

  tokens, targets, weights = _pairs(validation)
  if not len(targets):
    return {}
  queries = tokens * V + targets
  index = np.minimum(np.searchsorted(pairs, queries), len(pairs) - 1)
  count = np.where(pairs[index] == queries, pair_counts[index], 0)
  # Witten-Bell: the n kinds of token that follow one count as n more sightings, which are
  # spread by the unigram. A token never seen as an input has the unigram alone.
  total = follows[tokens] + kinds[tokens]
  bigram = np.where(
    total > 0,
    (count + kinds[tokens] * unigram[targets]) / np.maximum(total, 1),
    unigram[targets],
  )
  return {
    'unigram': float(np.average(-np.log(unigram[targets]), weights=weights)),
    'bigram': float(np.average(-np.log(bigram), weights=weights)),
  }


def _pairs(batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Input token, target and weight of every scored position."""
  parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
  for batch in batches:
    scored = batch.loss_weights > 0
    parts.append(
      (
        batch.tokens[scored].astype(np.int64),
        batch.targets[scored].astype(np.int64),
        batch.loss_weights[scored],
      )
    )
  return tuple(np.concatenate(column) for column in zip(*parts, strict=True))
