"""The pretraining loss, as sums: the step divides once, over the global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from glm_jax.batch import OBJECTIVES, Batch

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""name -> (sum, count): they add up over micro-batches, devices and batches."""

LossFn = Callable[[Any, Any, jax.Array | None], tuple[jax.Array, Metrics]]
"""(params, batch, dropout key or None) -> (sum to differentiate, metrics with 'loss')."""


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
  """-log softmax(logits)[target], [B, T] float32.

  Example:
    >>> logits = jnp.array([[[0.0, 0.0, 100.0]]])
    >>> cross_entropy(logits, jnp.array([[2]])).tolist()
    [[0.0]]
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  chosen = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen


def pretraining_loss(model: Any) -> LossFn:
  """sum(w * ce) with w = `loss_weights`, and the same for each objective.

  Args:
    model: a Flax module called as `glm_jax.models.glm.GLM`.
  """

  def loss(params: Any, batch: Batch, key: jax.Array | None):
    logits_BTV, _ = model.apply(
      {'params': params},
      batch.tokens,
      batch.positions,
      batch.block_positions,
      batch.visibility,
      deterministic=key is None,
      rngs=None if key is None else {'dropout': key},
    )
    with jax.named_scope('loss'):
      weighted = cross_entropy(logits_BTV, batch.targets) * batch.loss_weights
      metrics = {'loss': (weighted.sum(), batch.loss_weights.sum())}
      for number, name in enumerate(OBJECTIVES):
        chosen = batch.objective == number
        metrics[f'loss/{name}'] = (
          jnp.where(chosen, weighted, 0).sum(),
          jnp.where(chosen, batch.loss_weights, 0).sum(),
        )
    return metrics['loss'][0], metrics

  return loss
