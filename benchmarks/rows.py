"""Batches in GLM's own layout from a seeded generator, without text or TensorFlow."""

from __future__ import annotations

import itertools

import numpy as np

from glm_jax.batch import MIXED, OBJECTIVES, Batch


def causal(rows: int, length: int, vocab_size: int, seed: int = 0) -> Batch:
  """Full rows of one document, each token predicting the next.

  Example:
    >>> causal(1, 3, 10).key_end.tolist()
    [[1, 2, 3]]
  """
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, vocab_size, (rows, length + 1)).astype(np.int32)
  t = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
  return Batch(
    tokens=ids[:, :-1],
    targets=ids[:, 1:],
    loss_weights=np.ones((rows, length), np.float32),
    positions=t,
    block_positions=np.zeros_like(t),
    key_start=np.zeros_like(t),
    key_end=t + 1,
    objective=np.full_like(t, OBJECTIVES.index('causal')),
  )


def prefix(
  rows: int,
  length: int,
  vocab_size: int,
  *,
  documents: int = 1,
  share: float = 0.85,
  span: int = 4,
  seed: int = 0,
) -> Batch:
  """Full rows of packed documents: Part A, seen whole, then spans seen causally.

  Args:
    rows: B.
    length: T.
    vocab_size: of which tokens are drawn.
    documents: packed into a row, cut at random places.
    share: of a document that is Part A.
    span: tokens of a span of Part B.
    seed: of tokens and cuts.

  Example:
    >>> prefix(1, 8, 10, share=0.5, span=2).key_end.tolist()
    [[4, 4, 4, 4, 5, 6, 7, 8]]
    >>> prefix(1, 8, 10, share=0.5, span=2).block_positions.tolist()
    [[0, 0, 0, 0, 1, 2, 1, 2]]
  """
  rng = np.random.default_rng(seed)
  batch = causal(rows, length, vocab_size, seed)
  t = np.arange(length)
  start, end, first, block = np.zeros((4, rows, length), np.int32)
  for row in range(rows):
    # At least 8 positions a document, so that each has both parts.
    places = rng.choice(np.arange(8, length - 7, 8), documents - 1, replace=False)
    cuts = [0, *sorted(places), length]
    for begin, stop in itertools.pairwise(cuts):
      part_a = begin + round((stop - begin) * share)
      inside, after = (begin <= t) & (t < stop), (part_a <= t) & (t < stop)
      start[row, inside] = begin
      end[row, inside] = np.maximum(part_a, t + 1)[inside]
      block[row, after] = (t - part_a)[after] % span + 1
      # A span's tokens stand where its mask does, somewhere in Part A.
      masks = rng.integers(0, part_a - begin, (stop - part_a) // span + 1)
      first[row, inside] = (t - begin)[inside]
      first[row, after] = masks[(t - part_a)[after] // span]
  return batch._replace(
    loss_weights=(block > 0).astype(np.float32),
    positions=first,
    block_positions=block,
    key_start=start,
    key_end=end,
    objective=np.full_like(start, MIXED.index('blank')),
  )
