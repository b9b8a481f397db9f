"""From logits to the next token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from glm_jax import configs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How tokens are chosen.

  Attributes:
    temperature: 0 takes the most probable token.
    top_k: only among so many of the most probable; 0 for all.
    top_p: only among the most probable that together reach this probability.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    configs.check_types(self)
    configs.check(
      self.temperature >= 0,
      'temperature must be 0 or more',
      str(self.temperature),
      'use 0 for greedy decoding',
    )
    configs.check(
      self.top_k >= 0, 'top_k must be 0 or more', str(self.top_k), 'use 0 for no limit'
    )
    configs.check(
      0 < self.top_p <= 1, 'top_p must be in (0, 1]', str(self.top_p), 'use 1 for no limit'
    )


def sample(logits_BV: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
  """One token a row, [B] int32.

  Args:
    logits_BV: float32; -inf for tokens that are not allowed.
    sampling: how.
    key: consumed; unused when greedy.

  Example:
    >>> sample(jnp.array([[0.0, 2.0, 1.0]]), Sampling(), jax.random.key(0)).tolist()
    [1]
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)
  logits_BV = logits_BV / sampling.temperature
  if sampling.top_k:
    kth = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth, -jnp.inf, logits_BV)
  if sampling.top_p < 1:
    ordered = jnp.sort(logits_BV, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    # A token stays if those before it have not reached top_p; so one always does.
    stays = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
    lowest = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    logits_BV = jnp.where(logits_BV < lowest, -jnp.inf, logits_BV)
  return jax.random.categorical(key, logits_BV).astype(jnp.int32)
