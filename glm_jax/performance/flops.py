"""FLOPs of a model, and of the blocks that a flash kernel visits."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from glm_jax.attention import blocks
from glm_jax.batch import Visibility


def matmul_weights(model: Any) -> int:
  """Weights that a token is multiplied with: all but look-ups, biases and norms."""
  D, L, H = model.hidden_size, model.num_layers, model.head_size
  N, K = model.num_heads, model.num_kv_heads
  # q and out have N heads, k and v have K; the embedding counts once, as the head.
  mlp = (3 if model.gated else 2) * D * model.inner_size
  return L * (2 * D * H * (N + K) + mlp) + D * model.vocab_size


def training(
  model: Any, tokens: float, pairs: float, frozen: int = 0, beside: int = 0
) -> float:
  """FLOPs that a step asks for, however it is computed.

  6 a token and weight (2 forward, 4 backward), and 12 a visible (query, key) pair, layer
  and unit of the heads' width; padding and recomputation do not count.

  Args:
    model: a model configuration.
    tokens: in all rows, without padding.
    pairs: (query, key) pairs that are visible.
    frozen: weights without a gradient: 2 FLOPs less a token for each.
    beside: weights of adapters.
  """
  width = model.num_heads * model.head_size
  weights = 6.0 * (matmul_weights(model) + beside) - 2.0 * frozen
  return weights * tokens + 12.0 * model.num_layers * width * pairs


def pairs(visibility: Visibility) -> int:
  """(query, key) pairs that are visible, in all rows.

  Example:
    >>> pairs(Visibility(np.zeros((1, 4)), np.array([[2, 2, 3, 0]])))
    7
  """
  end, start = (np.asarray(x, np.int64) for x in (visibility.key_end, visibility.key_start))
  return int((end - start).clip(0).sum())


def visited(visibility: Visibility) -> int:
  """(query, key) pairs in the blocks that a flash kernel visits, in all rows."""
  T = visibility.key_start.shape[1]
  cut = blocks.tiles(T)
  total = 0
  for start, end in zip(*visibility, strict=True):
    # Padded queries see no key: start = end = 0.
    start, end = (jnp.pad(jnp.asarray(x), (0, cut.size - T)) for x in (start, end))
    total += int(blocks.active(start, end, cut, cut).visited.sum()) * cut.block**2
  return total
