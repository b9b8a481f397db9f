"""What a step holds in memory, from shapes alone: in seconds, without a compiler.

Parameters, the optimizer's state, the copies that are computed with and gradients are
exact. What the backward pass needs is what `jax.vjp` keeps of the very loss that trains.
What is at work beside it when memory is fullest is a rule, which the compiler's own numbers
gave (tests/fits_test.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from glm_jax import attention, sharding
from glm_jax.performance import flops
from glm_jax.training import adapters, program
from glm_jax.training.config import TrainConfig
from glm_jax.training.step import cast

# Of all that the forward pass of a layer keeps, about half exists at a time while the
# backward pass works on it, with what it makes itself; of dense attention's scores, whose
# gradients are as large, as much as all of it.
_AT_WORK, _AT_WORK_DENSE = 0.5, 1.0
# Of that, without a backward pass.
_FORWARD = 0.6
# The kernels of a TPU take heads that fill its lanes, and narrower ones are stored so, too.
_LANES = 128


class Rows(NamedTuple):
  """Bytes that a row of a batch needs, on the devices that share it.

  Attributes:
    saved: for the backward pass, of the model's width: whole on each device of a tensor
      axis.
    saved_cut: likewise, of heads or of the MLP, which that axis cuts.
    work: while one layer is worked on.
    logits: and their gradient, cut by that axis.
  """

  saved: float
  saved_cut: float
  work: float
  logits: float


def memory(
  config: TrainConfig,
  built: program.Program,
  layout: sharding.Layout,
  quantized: Mapping[str, int] | None = None,
) -> dict[str, int]:
  """Bytes of a device by kind; 'activations' and 'peak' are estimates, the rest is exact.

  Args:
    config: of the run, its model resolved.
    built: its program.
    layout: the mesh.
    quantized: bits and group of integers that are not trained.
  """
  params, dtype = built.state['params'], config.compute.dtype
  weights = jax.eval_shape(lambda tree: cast(tree, dtype), params)
  gradients = local_bytes(params, weights)
  if config.microbatches > 1:  # their sums, beside those of one part
    gradients += local_bytes(params)
  exact = {
    'parameters': local_bytes(params),
    'frozen': local_bytes(built.frozen),
    'optimizer': local_bytes(built.state['opt_state']),
    'copies': copied_bytes(params, dtype) + copied_bytes(built.frozen, dtype),
    'gradients': gradients,
  }
  tensor = layout.count('act_heads')
  count = config.batch_size / config.microbatches / layout.count('act_batch')
  count /= layout.count('act_length')
  # The gradient of the table is summed in float32, when the layers are done.
  table = 4 * math.prod(_local(params['words']['weight'])) if 'words' in params else 0
  needed = rows(config, built.attention[0], quantized)
  whole = gathered(config, tensor) if layout.count('embed') > 1 else (0.0, 0.0)
  activations = at_work(needed, count, tensor, gradients, table, whole) - gradients
  result = {k: int(v) for k, v in exact.items() if v}
  result['activations'] = int(activations)
  return {**result, 'peak': sum(result.values())}


def at_work(
  needed: Rows,
  count: float,
  tensor: int,
  gradients: float,
  table: float = 0.0,
  whole: tuple[float, float] = (0.0, 0.0),
) -> float:
  """Bytes of a device beside state and copies when memory is fullest, gradients included.

  Args:
    needed: by a row.
    count: rows at a time of the devices that share them, or a share of one.
    tensor: devices that heads, MLP and vocabulary are cut over.
    gradients: bytes.
    table: bytes of the gradient of the embedding, which layers do not see.
    whole: see `gathered`.
  """
  # Either the loss is at work, and no layer has a gradient yet, or the layers are.
  at_loss = count * needed.logits / tensor + whole[0]
  at_layers = gradients + max(count * needed.work / tensor + whole[1], table)
  return count * (needed.saved + needed.saved_cut / tensor) + max(at_loss, at_layers)


def gathered(config: TrainConfig, tensor: int) -> tuple[float, float]:
  """Bytes of weights that `MeshConfig.fsdp` spreads, and that are here whole for a while.

  Args:
    config: of the run.
    tensor: devices that heads, MLP and vocabulary are cut over.

  Returns:
    The head, for the loss; a layer and the next, which is on its way.
  """
  model, size = config.model, np.dtype(config.compute.dtype).itemsize
  head = model.hidden_size * model.vocab_size
  layer = (flops.matmul_weights(model) - head) / model.num_layers
  return size * head / tensor, 2 * size * layer / tensor


def rows(
  config: TrainConfig, backend: str, quantized: Mapping[str, int] | None = None
) -> Rows:
  """What a row needs, whatever the mesh.

  Args:
    config: of the run, its model resolved.
    backend: of attention.
    quantized: see `memory`.
  """
  model = config.model
  everything = _kept(config, backend, 'none', quantized)
  saved, saved_cut = everything
  if config.compute.remat != 'none':
    saved, saved_cut = _kept(config, backend, config.compute.remat, quantized)
  layer = sum(everything) / model.num_layers
  # In float32, and once more, rounded, as their gradient.
  size = 4 + np.dtype(config.compute.dtype).itemsize
  length = config.recipe.length + adapters.virtual_tokens(config.adapters)
  logits = size * length * model.vocab_size * config.recipe.logits_share
  share = _AT_WORK_DENSE if backend in attention.DENSE else _AT_WORK
  return Rows(saved, saved_cut, share * layer, logits)


def _kept(
  config: TrainConfig, backend: str, remat: str, quantized: Mapping[str, int] | None
) -> tuple[float, float]:
  """Bytes a row that the backward pass is left: of the model's width, and of others."""
  model, recipe = config.model, config.recipe
  compute = dataclasses.replace(
    config.compute,
    # What 'offload' adds is in the host's memory.
    remat='attention' if remat == 'offload' else remat,
    # The kernels can be traced for their device alone; they keep what 'chunked' does.
    attention=backend if backend in attention.DENSE else 'chunked',
  )
  loss, variables = program.computation(config, compute, quantized)
  parts = program.parts(config, None, quantized)

  def kept(number: int) -> Any:
    # Not of another configuration: a stage may refuse such a batch.
    batch = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct((number, *a.shape[1:]), a.dtype), recipe.batch(config)
    )

    def backward(params, frozen, batch):
      weights, others = (cast(tree, compute.dtype) for tree in (params, frozen))
      sums = recipe.counts(batch)
      of = lambda w: loss(variables(w, others), batch, jax.random.key(0), sums)
      return jax.vjp(of, weights, has_aux=True)[1]

    return jax.tree.leaves(jax.eval_shape(backward, *parts, batch))

  # The difference between two rows and one leaves out weights.
  H = model.head_size
  whole, cut = 0.0, 0.0
  for one, two in zip(kept(1), kept(2), strict=True):
    if one.shape[-1:] == (model.vocab_size,):  # `Rows.logits`
      continue
    size = (two.size - one.size) * one.dtype.itemsize
    if backend in ('tpu_splash', 'tpu_tokamax') and one.shape[-1:] == (H,):
      size *= math.ceil(H / _LANES) * _LANES / H
    if one.shape[-1:] == (model.hidden_size,):
      whole += size
    else:
      cut += size
  return whole, cut


def forward(
  config: TrainConfig, layout: sharding.Layout, needed: Rows, count: float
) -> float:
  """Bytes of a device, estimated, that a forward pass needs beside the weights.

  Args:
    config: of the run, its model resolved.
    layout: the mesh.
    needed: by a row.
    count: rows of the devices that share them.
  """
  tensor = layout.count('act_heads')
  count /= layout.count('act_length')
  whole = gathered(config, tensor) if layout.count('embed') > 1 else (0.0, 0.0)
  work = _FORWARD * count * needed.work
  return max(count * needed.logits / tensor + whole[0], work / tensor + whole[1])


def layer_work(
  config: TrainConfig, layout: sharding.Layout, needed: Rows, length: int
) -> float:
  """Bytes of a device, estimated, while a layer reads a context of so many tokens."""
  work = needed.work * length / config.recipe.length
  return _FORWARD * work / layout.count('act_heads')


def _local(array: Any) -> tuple[int, ...]:
  return array.sharding.shard_shape(array.shape)


def local_bytes(tree: Any, like: Any = None) -> int:
  """Of a device; with `like`, in its dtypes."""
  # Integers of four bits are two a byte.
  size = lambda a: jax.dtypes.itemsize_bits(a.dtype) / 8
  dtypes = jax.tree.map(size, tree if like is None else like)
  sizes = jax.tree.map(lambda a, size: size * math.prod(_local(a)), tree, dtypes)
  return int(sum(jax.tree.leaves(sizes)))


def copied_bytes(tree: Any, dtype: str) -> int:
  """Of a device: of what is computed with in another dtype than it has."""
  new = jax.eval_shape(lambda tree: cast(tree, dtype), tree)
  sizes = jax.tree.map(
    lambda a, b: (a.dtype != b.dtype) * b.dtype.itemsize * math.prod(_local(a)), tree, new
  )
  return sum(jax.tree.leaves(sizes))
