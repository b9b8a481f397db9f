"""The pretraining loss, as sums: the step divides once, over the global batch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from glm_jax import configs, sharding
from glm_jax.attention.dense import MASKED
from glm_jax.batch import OBJECTIVES, Batch
from glm_jax.configs import at_least, within

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""name -> (sum, count): they add up over micro-batches, devices and batches."""

Variables = Mapping[str, Any]
"""Collections of Flax by name: 'params', and what a recipe or an adapter adds to them."""

LossFn = Callable[
  [Variables, Any, jax.Array | None, Mapping[str, jax.Array]], tuple[jax.Array, Metrics]
]
"""(variables, batch, dropout key or None, counts) -> (sum to differentiate, metrics).

`counts` are the recipe's, of the whole batch. Among the metrics is 'loss', whose count the
step divides the gradients by.
"""


_OFF_OR_MORE = at_least(0).but('use 0 to switch it off')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """How the loss is computed.

  Attributes:
    vocab_chunks: parts of the vocabulary that are worked on one after the other, so that
      no [B, T, V] array of logits exists; 0 for all at once, which is a little faster.
    label_smoothing: share of the target that is spread evenly over the vocabulary, in
      training: (1 - e) * ce + e * mean(-log p) (GLM, finetune of tasks/seq2seq; 0.1 there).
      What it adds is reported apart from the loss.
    z_loss: weight of `logsumexp(logits) ** 2`, which keeps logits from drifting (PaLM,
      section 5; 1e-4 there); reported apart from the loss.
  """

  vocab_chunks: Annotated[int, _OFF_OR_MORE] = 0
  z_loss: Annotated[float, _OFF_OR_MORE] = 0.0
  label_smoothing: Annotated[float, within('[0, 1)')] = 0.0

  def __post_init__(self):
    configs.check_fields(self)


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
  """-log softmax(logits)[target], [B, T] float32.

  Example:
    >>> logits = jnp.array([[[0.0, 0.0, 100.0]]])
    >>> cross_entropy(logits, jnp.array([[2]])).tolist()
    [[0.0]]
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  # A sum with one term: to take one entry of a sharded axis, XLA would gather the axis.
  is_target = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
  chosen = jnp.where(is_target, logits_BTV, 0).sum(-1)
  return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def chunked_cross_entropy(
  x_BTD: jax.Array, weight_VD: jax.Array, targets_BT: jax.Array, chunks: int
) -> tuple[jax.Array, jax.Array]:
  """`cross_entropy` and logsumexp of `x @ weight.T`, of which only a part exists at a time.

  The logits are computed again in the backward pass, which costs one more product with
  the head. Under a mesh, the head is gathered once over its width.

  Args:
    x_BTD: hidden states.
    weight_VD: the head, in the dtype of the computation.
    targets_BT: int32.
    chunks: parts of a device's vocabulary.

  Example:
    >>> x, weight = jnp.ones((1, 1, 2)), jnp.array([[0.0, 0], [50, 50], [0, 0]])
    >>> chunked_cross_entropy(x, weight, jnp.array([[1]]), 2)[0].tolist()
    [[0.0]]
  """
  return _forward(x_BTD, weight_VD, targets_BT, chunks)[0]


_TOKENS = ('act_batch', 'act_length')
_HIDDEN = ('act_batch', 'act_length', None)


def _forward(x_BTD, weight_VD, targets_BT, chunks):
  # 1. The head, [V/tensor, D/fsdp] on a device, becomes [V/tensor, D].
  def gather(weight):
    axes = sharding.axes_of('embed')
    return jax.lax.all_gather(weight, axes, axis=1, tiled=True) if axes else weight

  def local_losses(x, weight, targets):
    first = _first(weight)

    # 2. An online softmax over the chunks of a device, of which only sums [B, T] are kept:
    # the highest logit, the sum of exp(logit - highest), and the target's own logit.
    def chunk(carry, part):
      highest, total, chosen = carry
      logits, ids = _logits(x, weight, part, chunks, first)
      new = jnp.maximum(highest, logits.max(-1))
      total = total * jnp.exp(highest - new) + jnp.exp(logits - new[..., None]).sum(-1)
      # A target is in one chunk of one device; everywhere else this adds 0.
      chosen += jnp.where(ids == targets[..., None], logits, 0).sum(-1)
      return (new, total, chosen), None

    zeros = jnp.zeros(targets.shape, jnp.float32)
    (highest, total, chosen), _ = jax.lax.scan(
      chunk, (zeros + MASKED, zeros, zeros), jnp.arange(chunks)
    )
    # 3. The same over the devices that have other parts of the vocabulary.
    axes = sharding.axes_of('vocab')
    if axes:
      top = jax.lax.pmax(highest, axes)
      total, chosen = jax.lax.psum((total * jnp.exp(highest - top), chosen), axes)
      highest = top
    return highest + jnp.log(total) - chosen, highest + jnp.log(total)

  weight_VD = sharding.per_device(
    gather, (('vocab', 'embed'),), ('vocab', None), kernels=True
  )(weight_VD)
  losses = sharding.per_device(
    local_losses, (_HIDDEN, ('vocab', None), _TOKENS), _TOKENS, kernels=True
  )(x_BTD, weight_VD, targets_BT)
  return losses, (x_BTD, weight_VD, targets_BT, losses[1])


def _backward(chunks, residuals, gradients):
  x_BTD, weight_VD, targets_BT, total_BT = residuals

  def local_gradients(x, weight, targets, total, of_loss, of_total):
    first = _first(weight)

    # With p = softmax(logits), the loss has the gradient p - onehot(target) in the logits,
    # and logsumexp has p. `total` is logsumexp, so p needs no second pass over the chunks.
    def chunk(dx, part):
      logits, ids = _logits(x, weight, part, chunks, first)
      d = jnp.exp(logits - total[..., None]) * (of_loss + of_total)[..., None]
      d -= jnp.where(ids == targets[..., None], of_loss[..., None], 0)
      d = d.astype(weight.dtype)
      rows = _rows(weight, part, chunks)
      dx += jnp.einsum('BTV,VD->BTD', d, rows, preferred_element_type=jnp.float32)
      return dx, jnp.einsum('BTV,BTD->VD', d, x)

    dx, dw = jax.lax.scan(chunk, jnp.zeros(x.shape, jnp.float32), jnp.arange(chunks))
    # [chunks, rows, D] -> [V/tensor, D], without the rows that filled up the last chunk.
    dw = dw.reshape(-1, dw.shape[-1])[: weight.shape[0]]
    # As automatic differentiation would do at the edges of `per_device`: dx is summed over
    # parts of the vocabulary, dw over devices with other tokens. Scattered first, dw is a
    # device's own part when it is summed over the copies.
    vocab, width = sharding.axes_of('vocab'), sharding.axes_of('embed')
    if vocab:
      dx = jax.lax.psum(dx, vocab)
    if width:
      dw = jax.lax.psum_scatter(dw, width, scatter_dimension=1, tiled=True)
    copies = (*sharding.axes_of('act_batch'), *sharding.axes_of('act_length'))
    copies = tuple(axis for axis in copies if axis not in width)
    return dx.astype(x.dtype), jax.lax.psum(dw, copies) if copies else dw

  dx, dw = sharding.per_device(
    local_gradients,
    (_HIDDEN, ('vocab', None), *[_TOKENS] * 4),
    [_HIDDEN, ('vocab', 'embed')],
    kernels=True,
  )(x_BTD, weight_VD, targets_BT, total_BT, *gradients)
  return dx, dw, None


chunked_cross_entropy.defvjp(_forward, _backward)


def _first(weight):
  """The first piece of this device's part of the vocabulary."""
  axes = sharding.axes_of('vocab')
  return jax.lax.axis_index(axes) * weight.shape[0] if axes else 0


def _rows(weight, part, chunks):
  """Rows [size, D] of one chunk of a device's vocabulary; zeros behind the last."""
  size = math.ceil(weight.shape[0] / chunks)
  weight = jnp.pad(weight, [(0, size * chunks - weight.shape[0]), (0, 0)])
  return jax.lax.dynamic_slice_in_dim(weight, part * size, size)


def _logits(x, weight, part, chunks, first):
  """Logits of a chunk, float32, and the pieces they belong to; -1 behind the last."""
  rows = _rows(weight, part, chunks)
  logits = jnp.einsum('BTD,VD->BTV', x, rows, preferred_element_type=jnp.float32)
  row = part * rows.shape[0] + jnp.arange(rows.shape[0])
  inside = row < weight.shape[0]
  return jnp.where(inside, logits, MASKED), jnp.where(inside, first + row, -1)


def pretraining_loss(
  model: Any, config: LossConfig = LossConfig(), objectives: Sequence[str] = OBJECTIVES
) -> LossFn:
  """sum(w * ce) with w = `loss_weights`, and the same for each objective.

  Args:
    model: a Flax module called as `glm_jax.models.glm.GLM`.
    config: how it is computed.
    objectives: that rows can be of; of each, a step sums up the losses.
  """

  def loss(variables: Variables, batch: Batch, key: jax.Array | None, counts: Any = None):
    del counts  # one division by the weights of the whole batch is enough
    smooths = config.label_smoothing > 0 and key is not None

    def of_chunks(x_BTD: jax.Array, weight_VD: jax.Array) -> tuple[jax.Array, ...]:
      losses = chunked_cross_entropy(x_BTD, weight_VD, batch.targets, config.vocab_chunks)
      if not smooths:
        return losses
      # The mean of products with the rows of the head is that with their mean.
      mean_D = weight_VD.astype(jnp.float32).mean(0)
      mean = jnp.einsum('BTD,D->BT', x_BTD, mean_D, preferred_element_type=jnp.float32)
      return *losses, mean

    head = {'head': of_chunks} if config.vocab_chunks else {}
    result = applied(model, variables, batch, key, **head)
    with jax.named_scope('loss'):
      if config.vocab_chunks:
        losses_BT, total_BT, *means = result
      else:
        losses_BT = cross_entropy(result, batch.targets)
        total_BT = jax.nn.logsumexp(result, axis=-1)
        means = [result.mean(-1, dtype=jnp.float32)] if smooths else []
      weighted = losses_BT * batch.loss_weights
      metrics = {'loss': (weighted.sum(), batch.loss_weights.sum())}
      # By position, since a packed row can hold examples of several objectives.
      for name in objectives:
        chosen = batch.objective == OBJECTIVES.index(name)
        metrics[f'loss/{name}'] = (
          jnp.where(chosen, weighted, 0).sum(),
          jnp.where(chosen, batch.loss_weights, 0).sum(),
        )
      total = metrics['loss'][0]
      if config.z_loss:
        z = config.z_loss * (jnp.square(total_BT) * batch.loss_weights).sum()
        metrics['z_loss'] = (z, batch.loss_weights.sum())
        total += z
      for mean_BT in means:
        # -log p is logsumexp less the logit.
        spread = total_BT - mean_BT - losses_BT
        smoothing = config.label_smoothing * (spread * batch.loss_weights).sum()
        metrics['label_smoothing'] = (smoothing, batch.loss_weights.sum())
        total += smoothing
    return total, metrics

  return loss


def target_losses(model: Any, variables: Variables, batch: Batch, chunks: int) -> jax.Array:
  """[B, T] float32: -log p of each target, without dropout.

  Args:
    model: see `pretraining_loss`.
    variables: its collections.
    batch: of rows.
    chunks: see `LossConfig.vocab_chunks`.
  """

  def of_chunks(x_BTD: jax.Array, weight_VD: jax.Array) -> jax.Array:
    return chunked_cross_entropy(x_BTD, weight_VD, batch.targets, chunks)[0]

  head = {'head': of_chunks} if chunks else {}
  result = applied(model, variables, batch, None, **head)
  return result if chunks else cross_entropy(result, batch.targets)


def applied(
  model: Any, variables: Variables, batch: Batch, key: jax.Array | None, **head: Any
) -> jax.Array:
  """What a model makes of a batch: logits, or what `head` makes of (x_BTD, weight_VD).

  Args:
    model: see `pretraining_loss`.
    variables: its collections.
    batch: of rows.
    key: of dropout; None for none.
    **head: see `glm_jax.models.glm.GLM`.
  """
  result, _ = model.apply(
    variables,
    batch.tokens,
    batch.positions,
    batch.block_positions,
    batch.visibility,
    deterministic=key is None,
    rngs=None if key is None else {'dropout': key},
    **head,
  )
  return result
