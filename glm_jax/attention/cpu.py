"""Dense attention on a CPU: with its gradients written out, and for a single query.

The gradients that JAX derives of a softmax pass over the [T, S] scores more often than
these do, and a CPU adds up rows one number after the other. Here a row's sum is a column of
the product with the values, and what is divided by it are outputs, [T, H] and not [T, S]
(FlashAttention, Dao et al., 2022, appendix B, without its blocks).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm_jax.attention.dense import MASKED
from glm_jax.batch import Visibility


@jax.custom_vjp
def attend(
  q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visibility: Visibility
) -> jax.Array:
  """See `glm_jax.attention.attend`; queries grouped by key head, [B, T, K, G, H]."""
  return _forward(q_BTKGH, k_BSKH, v_BSKH, visibility)[0]


def _forward(q_BTKGH, k_BSKH, v_BSKH, visibility):
  B, T, K, G, H = q_BTKGH.shape
  S, f32 = k_BSKH.shape[1], jnp.float32
  # Queries of one key head are rows of one product.
  q = jnp.transpose(q_BTKGH.astype(f32), (0, 2, 3, 1, 4)).reshape(B, K, G * T, H)
  k, v = (jnp.swapaxes(x.astype(f32), 1, 2) for x in (k_BSKH, v_BSKH))
  k *= H**-0.5
  visible = visibility.mask(S)[:, None, None]
  scores = jnp.einsum('BKtH,BKSH->BKtS', q, k).reshape(B, K, G, T, S)
  scores = jnp.where(visible, scores, MASKED)
  # Above what is masked even where nothing is visible, so that exp makes that 0.
  highest = jnp.maximum(scores.max(-1, keepdims=True), MASKED / 2)
  weights = jnp.exp(scores - highest).reshape(B, K, G * T, S)
  ones = jnp.ones((B, K, S, 1), f32)
  summed = jnp.einsum('BKtS,BKSH->BKtH', weights, jnp.concatenate([v, ones], -1))
  total = jnp.where(summed[..., -1:] > 0, summed[..., -1:], 1)
  out = summed[..., :-1] / total
  kept = (q, k, v, weights, total, out, _dtypes(q_BTKGH, k_BSKH, v_BSKH))
  out = jnp.transpose(out.reshape(B, K, G, T, H), (0, 3, 1, 2, 4))
  return out.astype(q_BTKGH.dtype), kept


def _backward(kept, d_out_BTKGH):
  """Gradients of softmax(scores) v, see Dao et al., 2022, appendix B.2."""
  q, k, v, weights, total, out, like = kept
  B, T, K, G, H = d_out_BTKGH.shape
  d_out = jnp.transpose(d_out_BTKGH.astype(jnp.float32), (0, 2, 3, 1, 4))
  # probabilities = weights / total, whose division is done here, too.
  d_out = d_out.reshape(B, K, G * T, H) / total
  d_v = jnp.einsum('BKtS,BKtH->BKSH', weights, d_out)
  mean = (d_out * out).sum(-1, keepdims=True)
  d_scores = weights * (jnp.einsum('BKtH,BKSH->BKtS', d_out, v) - mean)
  d_q = jnp.einsum('BKtS,BKSH->BKtH', d_scores, k).reshape(B, K, G, T, H)
  d_k = jnp.einsum('BKtS,BKtH->BKSH', d_scores, q) * H**-0.5
  d_q = jnp.transpose(d_q, (0, 3, 1, 2, 4))
  d_k, d_v = (jnp.swapaxes(x, 1, 2) for x in (d_k, d_v))
  gradients = (d.astype(x.dtype) for d, x in zip((d_q, d_k, d_v), like, strict=True))
  return *gradients, None


def attend_once(
  q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visibility: Visibility
) -> jax.Array:
  """The same for very few queries, T, without gradients; keys and values stay where they
  lie.

  A product for each key head asks for the keys of one head after the other, and a CPU would
  copy a cache [B, S, K, H] for it, with each token. So a query is made as wide as the keys
  of all heads, [K H], with zeros but for its own head; and of a sum of values as wide, its
  own head is kept. That is K times the arithmetic, which reading the cache hides.
  """
  B, T, K, G, H = q_BTKGH.shape
  S, f32 = k_BSKH.shape[1], jnp.float32
  own_KK = jnp.eye(K, dtype=f32)
  q = jnp.einsum('BTKGH,KJ->BTKGJH', q_BTKGH.astype(f32) * H**-0.5, own_KK)
  # Axes 1 are the queries of all heads, [T K G]; W is [K H].
  q_BQW = q.reshape(B, T * K * G, K * H)
  k_BSW, v_BSW = (x.astype(f32).reshape(B, S, K * H) for x in (k_BSKH, v_BSKH))
  visible_BQS = jnp.repeat(visibility.mask(S), K * G, axis=1)
  scores_BQS = jnp.where(visible_BQS, jnp.einsum('BQW,BSW->BQS', q_BQW, k_BSW), MASKED)
  highest = jnp.maximum(scores_BQS.max(-1, keepdims=True), MASKED / 2)  # as in _forward
  weights_BQS = jnp.exp(scores_BQS - highest)
  total = weights_BQS.sum(-1, keepdims=True)
  sums_BQW = jnp.einsum('BQS,BSW->BQW', weights_BQS, v_BSW)
  sums = (sums_BQW / jnp.where(total > 0, total, 1)).reshape(B, T, K, G, K, H)
  return jnp.einsum('BTKGJH,KJ->BTKGH', sums, own_KK).astype(q_BTKGH.dtype)


def _dtypes(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Empty arrays: residuals of a gradient must be arrays, and only dtypes are kept."""
  return tuple(jnp.zeros(0, x.dtype) for x in arrays)


attend.defvjp(_forward, _backward)
