"""One forward over rows: what a model says at each place of texts that are given."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import attention, models, sharding
from glm_jax.batch import Batch
from glm_jax.inference import scoring
from glm_jax.models import virtual

# Rows are padded to a multiple of this, so that few shapes are compiled.
_BUCKET = 64


class Loss(NamedTuple):
  """Losses of texts, in nats.

  Attributes:
    sums: [texts] float32, over what is predicted of each.
    counts: [texts] float32, tokens that are predicted.
  """

  sums: np.ndarray
  counts: np.ndarray

  @property
  def mean(self) -> float:
    """A token's, as training reports it."""
    return float(self.sums.sum() / self.counts.sum())


class Scores(NamedTuple):
  """Log-probabilities of candidates, in nats.

  Attributes:
    sums: [candidates] float32, of each candidate's tokens.
    tokens: of each of its tokens, float32.
    ends: [candidates] float32, that nothing follows.
  """

  sums: np.ndarray
  tokens: list[np.ndarray]
  ends: np.ndarray


class Forward:
  """A model on a mesh that reads rows."""

  def __init__(
    self,
    config: Any,
    variables: Any,
    compute: models.ComputeConfig,
    layout: sharding.Layout,
    batch_size: int,
  ):
    """
    Args:
      config: of the model.
      variables: its collections.
      compute: of it.
      layout: the mesh that they are on.
      batch_size: rows that are worked on at a time.
    """
    self._config, self._variables, self._compute = config, variables, compute
    self._layout, self._parts = layout, layout.count('act_batch')
    self._rows = -(-batch_size // self._parts) * self._parts

  def logits(self, rows: Batch) -> np.ndarray:
    """[B, T, V] float32, of just these rows: no more and no longer."""
    return self._run(_logits, rows)

  def logits_in_parts(self, rows: Batch) -> np.ndarray:
    """The same, a few rows at a time."""
    return np.concatenate([*self._in_parts(_logits, rows)])

  def targets(
    self, rows: Batch, allowed: np.ndarray, stops: tuple[int, ...]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [B, T] of targets, and those that a stop token is said there.

    Args:
      rows: a batch.
      allowed: [V] bool, tokens that compete.
      stops: ids.
    """
    parts = self._in_parts(_targets, rows, allowed_V=allowed, stops=stops)
    targets, ends = zip(*parts, strict=True)
    return np.concatenate(targets), np.concatenate(ends)

  def compared(self, rows: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Of each target, among all tokens: log-probability, and how many have a higher one.

    Args:
      rows: a batch.

    Returns:
      [B, T] float32, [B, T] int32.
    """
    log_probs, ranks = zip(*self._in_parts(_compared, rows), strict=True)
    return np.concatenate(log_probs), np.concatenate(ranks)

  def values(self, rows: Batch, value_D: np.ndarray) -> np.ndarray:
    """[B, T] float32: what each token is worth to a reward model."""
    return np.concatenate([*self._in_parts(_values, rows, value_D=value_D)])

  def _in_parts(self, function: Any, rows: Batch, **more: Any) -> Iterator[Any]:
    """A function of rows, a few of them at a time."""
    B, T = rows.tokens.shape
    length = -(-T // _BUCKET) * _BUCKET
    for first in range(0, B, self._rows):
      part = rows._replace(index=None)
      part = Batch(*(x if x is None else x[first : first + self._rows] for x in part))
      count = len(part.tokens)
      # Few shapes, and as many rows on every device.
      wanted = min(self._rows, 2 ** (count - 1).bit_length())
      wanted = -(-wanted // self._parts) * self._parts
      results = self._run(function, scoring.padded(part, wanted, length), **more)
      yield jax.tree.map(lambda x: x[:count, :T], results)

  def _run(self, function: Any, rows: Batch, **more: Any) -> Any:
    length = rows.tokens.shape[1] + virtual.count(self._variables)
    # As a run resolves 'auto', so that rows are computed as in training.
    backend, _ = attention.choose(
      self._config, self._compute, self._layout.devices.flat[0], length
    )
    compute = dataclasses.replace(self._compute, attention=backend)
    with sharding.active(self._layout):
      batch = sharding.place_whole(rows._replace(index=None), self._layout)
      results = function(self._config, compute, self._variables, batch, **more)
      return jax.tree.map(np.asarray, results)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(config: Any, compute: Any, variables: Any, batch: Batch) -> jax.Array:
  """[B, T, V] float32."""
  return _whole(_applied(config, compute, variables, batch).astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _values(
  config: Any, compute: Any, variables: Any, batch: Batch, value_D: jax.Array
) -> jax.Array:
  """See `Forward.values`."""
  x_BTD = _applied(config, compute, variables, batch, head=lambda x_BTD, _: x_BTD)
  return _whole(x_BTD.astype(jnp.float32) @ value_D)


def _applied(
  config: Any, compute: Any, variables: Any, batch: Batch, **head: Any
) -> jax.Array:
  P = virtual.count(variables)
  if P:
    batch = virtual.opened_batch(batch, P)
  result, _ = models.build(config, compute).apply(
    variables,
    batch.tokens,
    batch.positions,
    batch.block_positions,
    batch.visibility,
    **head,
  )
  return result[:, P:]


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames='stops')
def _targets(
  config: Any, compute: Any, variables: Any, batch: Batch, allowed_V: Any, stops: Any
) -> tuple[jax.Array, jax.Array]:
  """See `Forward.targets`."""
  logits_BTV = _logits(config, compute, variables, batch)
  logits_BTV = jnp.where(allowed_V, logits_BTV, -jnp.inf)
  log_probs_BTV = jax.nn.log_softmax(logits_BTV)
  ends_BT = jax.nn.logsumexp(log_probs_BTV[..., jnp.array(stops)], axis=-1)
  return _whole(_of_targets(log_probs_BTV, batch.targets)), _whole(ends_BT)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compared(
  config: Any, compute: Any, variables: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
  """See `Forward.compared`."""
  logits_BTV = _logits(config, compute, variables, batch)
  chosen_BT = _of_targets(logits_BTV, batch.targets)
  ranks_BT = (logits_BTV > chosen_BT[..., None]).sum(-1)
  return _whole(chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)), _whole(ranks_BT)


def _of_targets(x_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
  # A sum with one term: to take one entry of a sharded axis, XLA would gather the axis.
  is_target = jnp.arange(x_BTV.shape[-1]) == targets_BT[..., None]
  return jnp.where(is_target, x_BTV, 0).sum(-1)


def _whole(x: jax.Array) -> jax.Array:
  """The same array, all of it on every process."""
  return nn.with_logical_constraint(x, (None,) * x.ndim)
