"""Unigrams and bigrams, to read a model's numbers beside."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from glm_jax.batch import Batch


class NGrams:
  """Counts of tokens and of pairs, smoothed as Witten & Bell (1991).

  Attributes:
    unigram: [V] float64, the probability of each token.
  """

  def __init__(self, tokens: np.ndarray, targets: np.ndarray, vocabulary_size: int):
    """
    Args:
      tokens: [n] int64, what stands before.
      targets: [n] int64, what follows; one or more.
      vocabulary_size: V.
    """
    V = vocabulary_size
    counts = np.bincount(targets, minlength=V).astype(np.float64)
    self.unigram = (counts + 1) / (counts.sum() + V)
    # A pair is one number, token * V + target, so that the table holds only those that
    # occur.
    self._pairs, self._counts = np.unique(tokens * V + targets, return_counts=True)
    self._follows = np.bincount(self._pairs // V, weights=self._counts, minlength=V)
    self._kinds = np.bincount(self._pairs // V, minlength=V)

  def bigram(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The probability of each target behind its token, float64."""
    queries = tokens * len(self.unigram) + targets
    index = np.minimum(np.searchsorted(self._pairs, queries), len(self._pairs) - 1)
    count = np.where(self._pairs[index] == queries, self._counts[index], 0)
    # Witten-Bell: the n kinds of token that follow one count as n more sightings, which
    # are spread by the unigram. A token never seen as an input has the unigram alone.
    kinds = self._kinds[tokens]
    total = self._follows[tokens] + kinds
    smoothed = (count + kinds * self.unigram[targets]) / np.maximum(total, 1)
    return np.where(total > 0, smoothed, self.unigram[targets])

  def ranks(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """[n] int64: how many tokens the bigram finds more probable than each target."""
    ranks = np.zeros(len(targets), np.int64)
    every = np.arange(len(self.unigram))
    for token in np.unique(tokens):
      asked = tokens == token
      ranks[asked] = ranks_of(
        self.bigram(np.full_like(every, token), every), targets[asked]
      )
    return ranks


def ranks_of(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
  """[n] int64: how many tokens are more probable than each target.

  Example:
    >>> ranks_of(np.array([0.5, 0.2, 0.3]), np.array([0, 1])).tolist()
    [0, 2]
  """
  ascending = np.sort(probabilities)
  places = np.searchsorted(ascending, probabilities[targets], side='right')
  return len(probabilities) - places


def fit_and_score(
  train: Iterable[Batch], validation: Iterable[Batch], vocabulary_size: int
) -> dict[str, float]:
  """{'unigram', 'bigram'}: mean loss on validation targets, in nats; {} without targets.

  Both are fitted on training *target* tokens, [eop] included. The bigram predicts a target
  from the token before it in its span.

  Args:
    train: batches to count in.
    validation: batches to score, weighted by `loss_weights`.
    vocabulary_size: V.
  """
  tokens, targets, _ = _pairs(train)
  if not len(targets):
    return {}
  counted = NGrams(tokens, targets, vocabulary_size)
  tokens, targets, weights = _pairs(validation)
  if not len(targets):
    return {}
  loss = lambda probabilities: float(np.average(-np.log(probabilities), weights=weights))
  return {
    'unigram': loss(counted.unigram[targets]),
    'bigram': loss(counted.bigram(tokens, targets)),
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
