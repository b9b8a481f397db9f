"""The batch contract and `Visibility`: what data, models and inference share.

Shape letters, used in every name and einsum of this package:

  B batch    T query length       S key length     D model width
  N query heads    K key/value heads    G = N // K    H head size
  F MLP width      V vocabulary         L layers
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MIXED = ('blank', 'document', 'sentence')
"""The objectives that are mixed by (alpha, beta, gamma)."""
PRETRAINING = (*MIXED, 'causal')
"""Those of rows of pretraining."""
OBJECTIVES = (*PRETRAINING, 'answer')
"""Names of `Batch.objective` values, in order."""


class Visibility(NamedTuple):
  """Which keys each query sees: `key_start[b, t] <= s < key_end[b, t]`.

  Two int32 vectors a row say everything this model family needs, so that no
  [T, S] array is ever stored:

  - GLM: `key_end = max(prefix_end, t + 1)`: Part A sees all of Part A, Part B sees
    Part A and what precedes it (GLM paper, section 2.1).
  - causal: `key_end = t + 1`. Packed documents shift both ends.
  - padding: an empty interval, whose attention output is zero.

  Attributes:
    key_start: [B, T] int32, first visible key.
    key_end: [B, T] int32, one past the last visible key.
  """

  key_start: jax.Array
  key_end: jax.Array

  def mask(self, key_length: int) -> jax.Array:
    """The same as a [B, T, S] bool array, for small sizes and for tests."""
    s = jnp.arange(key_length)
    return (self.key_start[..., None] <= s) & (s < self.key_end[..., None])


def prefix_visibility(prefix_end: Any, length: Any, size: int) -> Visibility:
  """GLM's visibility for rows of one example each.

  Args:
    prefix_end: [B] int32, length of the bidirectional Part A.
    length: [B] int32, tokens in the row; the rest is padding.
    size: T, the padded length.

  Example:
    >>> prefix_visibility(jnp.array([2]), jnp.array([3]), 4).key_end.tolist()
    [[2, 2, 3, 0]]
  """
  # Part A, t < prefix_end, sees to prefix_end; a token of Part B sees to itself.
  t = jnp.arange(size)
  end = jnp.maximum(jnp.asarray(prefix_end)[:, None], t + 1)
  end = jnp.where(t < jnp.asarray(length)[:, None], end, 0).astype(jnp.int32)
  return Visibility(jnp.zeros_like(end), end)


class Batch(NamedTuple):
  """One training or validation batch, aligned by the data layer.

  Invariants: the loss is `sum(w * ce(logits[b, t], targets[b, t])) / sum(w)` with
  `w = loss_weights`, so nothing is shifted later and every weighting of examples or
  objectives is already in `loss_weights`. Rows are compact: padding only at the end.

  Attributes:
    tokens: [B, T] int32, the model's input.
    targets: [B, T] int32, what each position predicts.
    loss_weights: [B, T] float32, 0 where nothing is predicted.
    positions: [B, T] int32, first position: place in the (corrupted) text.
    block_positions: [B, T] int32, second position: 0 in Part A, 1.. inside a span.
    key_start: [B, T] int32, see `Visibility`.
    key_end: [B, T] int32, see `Visibility`.
    objective: [B, T] int32, index into `OBJECTIVES` (an example's own, at each of its
      tokens, so that packed rows can hold several).
    index: [B] int64, number of the example in the stream. It stays on the host
      (numpy): a stream is longer than int32 reaches.
  """

  tokens: Any
  targets: Any
  loss_weights: Any
  positions: Any
  block_positions: Any
  key_start: Any
  key_end: Any
  objective: Any
  index: Any = None

  @property
  def visibility(self) -> Visibility:
    return Visibility(self.key_start, self.key_end)


DTYPES = Batch(*[np.int32] * 2, np.float32, *[np.int32] * 5, np.int64)
"""The dtype of each field of a `Batch`."""
