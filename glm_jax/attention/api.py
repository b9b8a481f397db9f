"""The one attention function, and the choice of its backend."""

from __future__ import annotations

import chex
import jax

from glm_jax.attention import chunked, dense
from glm_jax.batch import Visibility

BACKENDS = ('auto', 'dense', 'chunked')

# Up to here the score array is small, and one matmul beats a loop of chunks.
_DENSE_LENGTH = 1024


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  visibility: Visibility,
  *,
  backend: str = 'auto',
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """Softmax attention in which each query sees one interval of keys.

  `softmax(q k^T / sqrt(H)) v` with the softmax in float32; a query whose interval is
  empty gets zeros. Query head `n` uses key/value head `n // (N // K)`.

  Args:
    q_BTNH: queries, any float dtype.
    k_BSKH: keys, N a multiple of K.
    v_BSKH: values.
    visibility: int32 [B, T] intervals into the S keys.
    backend: 'dense' holds [T, S] scores; 'chunked' never does; 'auto' is dense up to
      1,024 queries.
    dropout_rate: share of the attention probabilities set to zero.
    dropout_key: a key for that; None means no dropout.

  Returns:
    [B, T, N, H] in the dtype of `q_BTNH`.
  """
  if backend not in BACKENDS:
    raise ValueError(
      f'attention must be one of {BACKENDS}, got {backend!r}; choose one of these.'
    )
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  chex.assert_shape([k_BSKH, v_BSKH], (B, S, K, H))
  chex.assert_shape([visibility.key_start, visibility.key_end], (B, T))
  if backend == 'auto':
    backend = 'dense' if T <= _DENSE_LENGTH else 'chunked'
  implementation = {'dense': dense.attend, 'chunked': chunked.attend}[backend]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  with jax.named_scope(f'attention_{backend}'):
    out = implementation(q_BTKGH, k_BSKH, v_BSKH, visibility, dropout_rate, dropout_key)
  return out.reshape(B, T, N, H)
