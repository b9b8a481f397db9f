"""From logits to the next token."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from glm_jax import configs
from glm_jax.configs import Rule, at_least, within

# Logits divided by it must stay finite in float32, and apart.
_TEMPERATURE = Rule(
  '0, or in [1e-30, 1e30]',
  lambda x: x == 0 or 1e-30 <= x <= 1e30,
  'use 0 for greedy decoding',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How tokens are chosen.

  Attributes:
    temperature: 0 takes the most probable token.
    top_k: only among so many of the most probable; 0 for all.
    top_p: only among the most probable that together reach this probability.
  """

  temperature: Annotated[float, _TEMPERATURE] = 0.0
  top_k: Annotated[int, at_least(0).but('use 0 for no limit')] = 0
  top_p: Annotated[float, within('(0, 1]').but('use 1 for no limit')] = 1.0

  def __post_init__(self):
    configs.check_fields(self)


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
  # The order is Hugging Face's: temperature, then top_k, then top_p of what is left.
  logits_BV = logits_BV / sampling.temperature
  if sampling.top_k:
    kth = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth, -jnp.inf, logits_BV)
  if sampling.top_p < 1:
    ordered = jnp.sort(logits_BV, axis=-1, descending=True)
    probs = jax.nn.softmax(ordered, axis=-1)
    # A token stays if those before it have not reached top_p. The first always does: a
    # top_p too small for float32 is 0 there.
    stays = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
    stays = stays.at[:, 0].set(True)
    # By value rather than by rank: tokens as probable as the last that stays, stay.
    lowest = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    logits_BV = jnp.where(logits_BV < lowest, -jnp.inf, logits_BV)
  return jax.random.categorical(key, logits_BV).astype(jnp.int32)
