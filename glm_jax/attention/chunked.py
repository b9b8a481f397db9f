"""Chunked attention: blocks of queries, each over blocks of keys, in plain JAX.

Memory is O(T * chunk) in the forward pass, and in the backward pass too, since each block
of queries is computed again there: no [T, S] array exists in either.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm_jax.attention.dense import MASKED, drop
from glm_jax.batch import Visibility

# A chunk of scores is [B, 512, K, G, 512] float32: 1 MiB a row and query head.
QUERY_CHUNK = 512
KEY_CHUNK = 512


def attend(
  q_BTKGH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  visibility: Visibility,
  dropout_rate: float,
  dropout_key: jax.Array | None,
) -> jax.Array:
  """See `glm_jax.attention.attend`; queries grouped by key head, [B, T, K, G, H]."""
  T, S = q_BTKGH.shape[1], k_BSKH.shape[1]
  size_q, size_k = min(QUERY_CHUNK, T), min(KEY_CHUNK, S)
  q = _chunks(q_BTKGH * q_BTKGH.shape[-1] ** -0.5, size_q)
  # Rows that fill up the last chunk have an empty interval.
  start, end = _chunks(visibility.key_start, size_q), _chunks(visibility.key_end, size_q)
  k, v = _chunks(k_BSKH, size_k), _chunks(v_BSKH, size_k)

  @jax.checkpoint
  def block_of_queries(args):
    i, q, start, end = args
    # Every block of probabilities has random numbers of its own.
    key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
    return _online_softmax(q, start, end, k, v, dropout_rate, key)

  out = jax.lax.map(block_of_queries, (jnp.arange(q.shape[0]), q, start, end))
  # [chunks, B, size, K, G, H] -> [B, chunks x size, K, G, H]
  out = jnp.moveaxis(out, 0, 1).reshape(q_BTKGH.shape[0], -1, *q_BTKGH.shape[2:])
  return out[:, :T].astype(q_BTKGH.dtype)


def _chunks(x: jax.Array, size: int) -> jax.Array:
  """[B, T, ...] -> [chunks, B, size, ...], zeros behind the end."""
  padding = -x.shape[1] % size
  x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _online_softmax(q, start, end, k_chunks, v_chunks, dropout_rate, dropout_key):
  """One block of queries over all blocks of keys (Milakov & Gimelshein, 2018)."""
  size = k_chunks.shape[2]
  highest = jnp.full((*q.shape[:-1],), MASKED, jnp.float32)  # [B, t, K, G]
  total = jnp.zeros_like(highest)
  out = jnp.zeros(q.shape, jnp.float32)

  def block_of_keys(carry, args):
    highest, total, out = carry
    i, k, v = args
    s = i * size + jnp.arange(size)
    visible = (start[..., None] <= s) & (s < end[..., None])
    visible = visible[:, :, None, None]  # [B, t, 1, 1, s]
    scores = jnp.einsum('BTKGH,BSKH->BTKGS', q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores, MASKED)
    new_highest = jnp.maximum(highest, scores.max(-1))
    # While a query has seen nothing, its highest score is MASKED and exp(0) would be 1.
    weights = jnp.where(visible, jnp.exp(scores - new_highest[..., None]), 0)
    # What was summed so far is relative to the old maximum.
    shrink = jnp.exp(highest - new_highest)
    # Dropout comes after the sum: it drops probabilities, whose denominator is whole.
    total = total * shrink + weights.sum(-1)
    weights = weights.astype(v.dtype)
    if dropout_key is not None:
      weights = drop(weights, dropout_rate, jax.random.fold_in(dropout_key, i))
    update = jnp.einsum('BTKGS,BSKH->BTKGH', weights, v, preferred_element_type=jnp.float32)
    return (new_highest, total, out * shrink[..., None] + update), None

  numbers = jnp.arange(k_chunks.shape[0])
  (_, total, out), _ = jax.lax.scan(
    jax.checkpoint(block_of_keys), (highest, total, out), (numbers, k_chunks, v_chunks)
  )
  # A query without keys has out = 0 and total = 0.
  return out / jnp.where(total > 0, total, 1)[..., None]
