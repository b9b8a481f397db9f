"""The blocks of a model: a scan over stacked weights, under a rematerialisation policy.

Or, for a decoder on a CPU, one after the other over weights that are apart: XLA's CPU
backend copies the weights of a layer out of the stack before it multiplies with them,
which takes as long as the product with one token.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np

from glm_jax import attention, sharding
from glm_jax.batch import Visibility
from glm_jax.models import products
from glm_jax.models.compute import ComputeConfig

_policies = jax.checkpoint_policies

# The names are those of `checkpoint_name` in layers and attention backends: 'attention' is
# its output before the projection, 'qkv' after the rotation, 'out' after the projection,
# 'mlp' its gate and up.
_REMAT = {
  'full': None,
  'dots': _policies.dots_saveable,
  'dots_no_batch': _policies.dots_with_no_batch_dims_saveable,
  'attention': _policies.save_only_these_names('attention'),
  'attention_qkv': _policies.save_only_these_names('attention', 'qkv'),
  'projections': _policies.save_only_these_names('attention', 'qkv', 'out', 'mlp'),
  'offload': _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=['attention'],
    names_which_can_be_offloaded=['qkv', 'out'],
    offload_src='device',
    offload_dst='pinned_host',
  ),
}


def virtual_tokens(model: nn.Module, positions_BT: jax.Array) -> tuple[jax.Array, ...]:
  """What blocks are given to know virtual tokens by: their positions, which are negative.

  Nothing for a model without a collection `prefix`: its program does not change.
  """
  return (positions_BT,) if model.variables.get('prefix') else ()


def stack(
  block: type[nn.Module],
  config: Any,
  compute: ComputeConfig,
  deterministic: bool,
  x_BTD: jax.Array,
  cache: Any,
  visibility: Visibility,
  cache_start: Any,
  *by_token: Any,
) -> tuple[jax.Array, Any]:
  """`num_layers` blocks, one after the other, as a scan under a remat policy.

  Between first and last, tokens are in the order that balances a sequence axis.

  Args:
    block: a module of (config, compute, deterministic), called as
      `(x_BTD, cache, seen, cache_start, *by_token)`, that returns its output and its
      cache; `seen` as `Attention` takes it.
    config: a model configuration.
    compute: how it is computed.
    deterministic: no dropout.
    x_BTD: input of the first.
    cache: see `glm_jax.models.cache`; or None. One whose layers are apart says that the
      weights are, too (see `apart`).
    visibility: intervals into the T keys; with `cache_start`, into the slots of the cache.
    cache_start: [B] int32; None where rows attend to themselves.
    *by_token: trees of [B, T, ...], which every block is given alike.

  Returns:
    The output of the last and the caches.
  """
  seen: Any = visibility
  spread = cache is None and sharding.axis_size('act_length') > 1
  if spread:
    x_BTD, visibility, by_token = jax.tree.map(
      sharding.spread, (x_BTD, visibility, by_token)
    )
  if cache_start is None:
    seen = attention.prepare(visibility, compute.attention, spread=spread)
  if compute.remat != 'none':
    # Without prevent_cse's barriers: inside a scan nothing is merged across the passes.
    block = nn.remat(block, prevent_cse=False, policy=_REMAT[compute.remat])
  if isinstance(cache, tuple):
    caches = []
    for number, layer in enumerate(cache):
      x_BTD, layer = block(config, compute, deterministic, name=f'layers_{number}')(
        x_BTD, layer, seen, cache_start, *by_token
      )
      caches.append(layer)
    # Behind a barrier: fused with what a search does to the cache next, XLA's CPU backend
    # would overwrite slots that are yet to be read.
    return x_BTD, jax.lax.optimization_barrier(tuple(caches))
  x_BTD, cache = nn.scan(
    block,
    # A model has `params`, and may have those of `products` and `layers.Attention`.
    variable_axes={'params': 0, 'scales': 0, 'adapters': 0, 'prefix': 0},
    split_rngs={'params': True, 'dropout': True},
    # The cache has a layer axis; `seen`, `cache_start` and `by_token` are for all layers.
    in_axes=(0, *[nn.broadcast] * (2 + len(by_token))),
    length=config.num_layers,
    unroll=compute.unroll,
    metadata_params={nn.PARTITION_NAME: 'layers'},
  )(
    config, compute, deterministic, name='layers'
  )(x_BTD, cache, seen, cache_start, *by_token)
  return sharding.unspread(x_BTD) if spread else x_BTD, cache


def apart(variables: dict[str, Any]) -> dict[str, Any]:
  """The collections of a model on one CPU, each layer's weights an array of their own.

  Args:
    variables: {collection: {'layers': {...}, ...}}, weights of layers [L, ...].

  Returns:
    {collection: {'layers_0': {...}, ...}}, in the same memory, but for int8, which is
    stored as `products.turned` says.
  """
  result = {}
  for name, collection in variables.items():
    result[name] = {k: v for k, v in collection.items() if k != 'layers'}
    stacked = jax.tree.map(np.asarray, collection.get('layers', {}))
    for number in range(len(jax.tree.leaves(stacked)[0]) if stacked else 0):
      of_layer = lambda x, number=number: jax.device_put(x[number], may_alias=True)
      result[name][f'layers_{number}'] = jax.tree.map(of_layer, stacked)
  for name in [name for name in result.get('scales', {}) if name.startswith('layers_')]:
    layer, scales = result['params'][name], result['scales'][name]
    result['params'][name] = products.turned(layer, scales)
  return result


def are_apart(variables: dict[str, Any]) -> bool:
  """Whether they are what `apart` made."""
  return 'layers_0' in variables.get('params', {})
