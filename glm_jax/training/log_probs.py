"""What a policy says of tokens: log-probabilities among those that it may generate."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glm_jax.attention.dense import MASKED
from glm_jax.batch import Batch
from glm_jax.training import losses


class TokenScores(NamedTuple):
  """Of each position of rows.

  Attributes:
    log_probs: [B, T] float32, of the target.
    entropy: [B, T] float32, of what may be said there, in nats.
    states: [B, T, D], what the head reads.
  """

  log_probs: jax.Array
  entropy: jax.Array
  states: jax.Array


def said(
  model: Any,
  variables: losses.Variables,
  batch: Batch,
  *,
  allowed_V: jax.Array,
  temperature: float,
  chunks: int,
) -> TokenScores:
  """What a model says of a batch, as `glm_jax.inference.decode` samples from it.

  Args:
    model: see `losses.pretraining_loss`.
    variables: its collections.
    batch: of rows.
    allowed_V: bool, tokens that may be generated.
    temperature: that logits are divided by.
    chunks: parts of a row that are worked on one after the other and again in the backward
      pass, so that of the logits [B, T, V] only one exists at a time; 0 for all at once.
  """

  def head(x_BTD: jax.Array, weight_VD: jax.Array) -> TokenScores:
    of = lambda x_BTD, targets_BT: _of_states(
      x_BTD, weight_VD, targets_BT, allowed_V, temperature
    )
    if not chunks:
      return TokenScores(*of(x_BTD, batch.targets), x_BTD)
    length = batch.targets.shape[1]
    # [B, T, ...] -> [chunks, B, T / chunks, ...]
    size = -(-length // chunks)

    def parts(array: jax.Array) -> jax.Array:
      rest = [(0, 0)] * (array.ndim - 2)
      array = jnp.pad(array, [(0, 0), (0, size * chunks - length), *rest])
      return jnp.moveaxis(array.reshape(len(array), chunks, size, *array.shape[2:]), 1, 0)

    _, made = jax.lax.scan(
      lambda _, part: (None, jax.checkpoint(of)(*part)),
      None,
      (parts(x_BTD), parts(batch.targets)),
    )
    whole = lambda array: jnp.moveaxis(array, 0, 1).reshape(len(x_BTD), -1)[:, :length]
    return TokenScores(*map(whole, made), x_BTD)

  return losses.applied(model, variables, batch, None, head=head)


def _of_states(
  x_BTD: jax.Array,
  weight_VD: jax.Array,
  targets_BT: jax.Array,
  allowed_V: jax.Array,
  temperature: float,
) -> tuple[jax.Array, jax.Array]:
  logits_BTV = jnp.einsum(
    'BTD,VD->BTV', x_BTD, weight_VD, preferred_element_type=jnp.float32
  )
  logits_BTV = jnp.where(allowed_V, logits_BTV / temperature, MASKED)
  total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  # A sum with one term: to take one entry of a sharded axis, XLA would gather the axis.
  is_target = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
  chosen_BT = jnp.where(is_target, logits_BTV, 0).sum(-1)
  # Of what is not allowed, the logit is finite and the probability 0.
  mean_BT = (jnp.exp(logits_BTV - total_BT[..., None]) * logits_BTV).sum(-1)
  return chosen_BT - total_BT, total_BT - mean_BT
