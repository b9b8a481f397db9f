"""Dense attention on a CPU, with its gradients written out.

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


def _dtypes(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Empty arrays: residuals of a gradient must be arrays, and only dtypes are kept."""
  return tuple(jnp.zeros(0, x.dtype) for x in arrays)


attend.defvjp(_forward, _backward)
