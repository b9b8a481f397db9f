"""Dense attention: the reference for every other backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm_jax.batch import Visibility

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""A score that softmax turns into 0, far enough from -inf to subtract."""


def attend(
  q_BTKGH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  visibility: Visibility,
  dropout_rate: float,
  dropout_key: jax.Array | None,
) -> jax.Array:
  """See `glm_jax.attention.attend`; queries grouped by key head, [B, T, K, G, H]."""
  scale = q_BTKGH.shape[-1] ** -0.5
  scores_BKGTS = jnp.einsum(
    'BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH * scale, preferred_element_type=jnp.float32
  )
  visible = visibility.mask(k_BSKH.shape[1])[:, None, None]
  probs_BKGTS = jax.nn.softmax(jnp.where(visible, scores_BKGTS, MASKED), axis=-1)
  # A query that sees nothing would otherwise see everything equally.
  probs_BKGTS = jnp.where(visible, probs_BKGTS, 0).astype(q_BTKGH.dtype)
  if dropout_key is not None:
    probs_BKGTS = drop(probs_BKGTS, dropout_rate, dropout_key)
  return jnp.einsum('BKGTS,BSKH->BTKGH', probs_BKGTS, v_BSKH)


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
  """Zeroes a share `rate` of `x` and scales the rest by `1 / (1 - rate)`."""
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
