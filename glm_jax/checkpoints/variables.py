"""The collections of a model in a checkpoint: its parameters, and the scales of integers.

A quantised checkpoint is one like any other: its `params` have integers in `weight` and,
beside each of them, float32 in `weight_scale`, stacked over layers as the weight is; its
description says `quantized`: {'bits', 'group'}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax import configs
from glm_jax.checkpoints.description import read_meta
from glm_jax.checkpoints.manager import read_params
from glm_jax.models import quantized as integers
from glm_jax.sharding.mesh import as_tuple


def abstract(params: Any, quantized: Mapping[str, int] | None) -> dict[str, Any]:
  """Shapes, dtypes and shardings of the collections.

  Args:
    params: those of the plain model, as `glm_jax.training.state.abstract_params` has them.
    quantized: {'bits', 'group'} of the description; None for a plain model.

  Returns:
    {'params'}, or {'params', 'scales'}.

  Raises:
    UserError: the groups do not divide over the devices that hold their inputs.
  """
  if not quantized:
    return {'params': params}
  flat, scales = dict(traverse_util.flatten_dict(params)), {}
  for path, inputs in integers.products(flat):
    leaf, group = flat[path], quantized['group']
    flat[path] = jax.ShapeDtypeStruct(
      leaf.shape, integers.DTYPES[quantized['bits']], sharding=leaf.sharding
    )
    shape = (leaf.shape[0], *integers.scales_shape(leaf.shape[1:], inputs, group))
    groups = shape[1] if group else 0
    scales[path] = jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=_of_scales(leaf, path, inputs, groups)
    )
  nested = traverse_util.unflatten_dict
  return {'params': nested(flat), 'scales': nested(scales)}


def stored(params: Any, quantized: Mapping[str, int] | None) -> Any:
  """The leaves of a checkpoint's `params`; see `abstract`."""
  variables = abstract(params, quantized)
  flat = dict(traverse_util.flatten_dict(variables['params']))
  for path, leaf in traverse_util.flatten_dict(variables.get('scales', {})).items():
    flat[integers.scale_of(path)] = leaf
  return traverse_util.unflatten_dict(flat)


def read(folder: epath.Path, params: Any, merge: bool = True) -> dict[str, Any]:
  """The collections of a checkpoint, each array on its own sharding.

  Parameters have the dtypes that they are stored in, scales float32.

  Args:
    folder: the checkpoint, see `glm_jax.checkpoints.find`.
    params: see `abstract`.
    merge: see `glm_jax.checkpoints.read_params`.

  Returns:
    {'params'}, or {'params', 'scales'} of one that is quantised.

  Raises:
    UserError: see `glm_jax.checkpoints.read_params`.
  """
  quantized = read_meta(folder).get('quantized')
  abstract_leaves = stored(params, quantized)
  leaves = read_params(folder, abstract_leaves, as_stored=True, some=True, merge=merge)
  return split(leaves, quantized)


def of_channels(bits: int) -> dict[str, int] | None:
  """What a description says of integers with a scale a channel; None without integers."""
  return {'bits': bits, 'group': 0} if bits else None


def split(leaves: Any, quantized: Mapping[str, int] | None) -> dict[str, Any]:
  """The collections that leaves are of; see `stored` and `read`."""
  if not quantized:
    return {'params': leaves}
  flat, scales = traverse_util.flatten_dict(leaves), {}
  for path, _ in integers.products([*flat]):
    # Those of released models are of half precision.
    scales[path] = flat.pop(integers.scale_of(path)).astype(jnp.float32)
  nested = traverse_util.unflatten_dict
  return {'params': nested(flat), 'scales': nested(scales)}


def _of_scales(
  leaf: Any, path: tuple[str, ...], inputs: int, groups: int
) -> NamedSharding | None:
  """Outputs as the weight has them; groups as the first of its inputs."""
  if leaf.sharding is None:
    return None
  axes = (*leaf.sharding.spec, *[None] * len(leaf.shape))[: len(leaf.shape)]
  mesh = leaf.sharding.mesh
  along = None if integers.reads_the_width(path) else axes[1]
  parts = math.prod(mesh.shape[axis] for axis in as_tuple(along))
  configs.check(
    groups % parts == 0,
    f'the groups of {"/".join(path[:-1])} must divide by the mesh axis {along}',
    f'{groups} groups over {parts} devices',
    'change the mesh, or quantise with a smaller --group',
  )
  return NamedSharding(
    mesh, PartitionSpec(axes[0], *[along] * bool(groups), *axes[1 + inputs :])
  )
