"""From logits to the next token."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from glm_jax import configs
from glm_jax.configs import POSITIVE, Rule, at_least, within

# Logits divided by it must stay finite in float32, and apart.
_TEMPERATURE = Rule(
  '0, or in [1e-30, 1e30]',
  lambda x: x == 0 or 1e-30 <= x <= 1e30,
  'use 0 for greedy decoding',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How tokens are chosen; the names are those of transformers' GenerationConfig.

  Attributes:
    temperature: 0 takes the most probable token.
    top_k: only among so many of the most probable; 0 for all.
    top_p: only among the most probable that together reach this probability.
    min_p: only among those at least this share as probable as the most probable.
    repetition_penalty: divides the logits of tokens that the row has already, or
      multiplies them where they are negative (Keskar et al., CTRL, 2019); 1 for none.
  """

  temperature: Annotated[float, _TEMPERATURE] = 0.0
  top_k: Annotated[int, at_least(0).but('use 0 for no limit')] = 0
  top_p: Annotated[float, within('(0, 1]').but('use 1 for no limit')] = 1.0
  min_p: Annotated[float, within('[0, 1]').but('use 0 for no limit')] = 0.0
  repetition_penalty: Annotated[float, POSITIVE] = 1.0

  def __post_init__(self):
    configs.check_fields(self)


def penalize(logits_BV: jax.Array, had_BV: jax.Array, penalty: float) -> jax.Array:
  """Logits, less for tokens that a row has had.

  Example:
    >>> penalize(jnp.array([[2.0, -2.0, 1.0]]), jnp.array([[True, True, False]]), 2.0)
    Array([[ 1., -4.,  1.]], dtype=float32)
  """
  less = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
  return jnp.where(had_BV, less, logits_BV)


def sample(logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array) -> jax.Array:
  """One token a row, [B] int32.

  Args:
    logits_BV: float32; -inf for tokens that are not allowed.
    sampling: how.
    keys_B: a key a row, so that it does not matter which rows it stands beside; consumed;
      unused when greedy.

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> sample(jnp.array([[0.0, 2.0, 1.0]]), Sampling(), keys).tolist()
    [1]
  """
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, -1).astype(jnp.int32)
  # The order is Hugging Face's: temperature, then top_k, top_p and min_p of what is left.
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
  if sampling.min_p:
    # p / max p is exp of the difference of the logits.
    ratios = jnp.exp(logits_BV - logits_BV.max(-1, keepdims=True))
    logits_BV = jnp.where(ratios < sampling.min_p, -jnp.inf, logits_BV)
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
