"""Adapters of a checkpoint that become part of the weights that it rests on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax import configs
from glm_jax.models import low_rank

LeafPath = tuple[str, ...]


def check(adapters: Mapping[str, Any], folder: Any) -> None:
  """Raises UserError for adapters that cannot be merged.

  Args:
    adapters: what a checkpoint says of them.
    folder: of the checkpoint.
  """
  configs.check(
    adapters['kind'] == 'lora',
    'what is merged into weights must be low-rank factors',
    f'virtual tokens in {folder}',
    'give the checkpoint that they were trained on',
  )


def factors_of(path: LeafPath) -> list[LeafPath]:
  """Paths of a and b beside a weight, in a checkpoint.

  Example:
    >>> factors_of(('layers', 'mlp', 'up', 'weight'))[0]
    ('adapters', 'layers', 'mlp', 'up', 'a')
  """
  return [('adapters', *path[:-1], name) for name in 'ab']


def merge(
  params: Mapping[LeafPath, jax.Array],
  adapters: Mapping[str, Any],
  folder: epath.Path,
  held: Mapping[LeafPath, Any],
  read: Callable[[dict[LeafPath, Any]], Mapping[LeafPath, jax.Array]],
) -> dict[LeafPath, jax.Array]:
  """Parameters on a mesh with the adapters in them.

  Args:
    params: some of the model's, by path.
    adapters: what the checkpoint says of its own.
    folder: of the checkpoint.
    held: shapes of what it holds itself.
    read: reads arrays from it, on the shardings that it is given.

  Raises:
    UserError: virtual tokens, or weights that are integers.
  """
  check(adapters, folder)
  pairs = {
    path: factors_of(path)
    for path in params
    if path[-1] == 'weight' and factors_of(path)[0] in held
  }
  configs.check(
    all(jnp.issubdtype(params[path].dtype, jnp.floating) for path in pairs),
    'adapters are merged into plain weights',
    f'{folder}, which has them beside integers',
    f'python -m glm_jax.convert {folder} DST --to=checkpoint --dequantize, and give DST',
  )
  abstract = {
    name: jax.ShapeDtypeStruct(
      held[name].shape, held[name].dtype, sharding=_whole(params[path].sharding)
    )
    for path, own in pairs.items()
    for name in own
  }
  factors = read(abstract) if pairs else {}
  of_a_layer = lambda w, a, b: low_rank.merged(w, a, b, adapters['scaling'], jnp)
  result = dict(params)
  for path, own in pairs.items():
    merged = jax.jit(jax.vmap(of_a_layer), out_shardings=params[path].sharding)
    result[path] = merged(params[path], *(factors[name] for name in own))
  return result


def _whole(sharding: Any) -> Any:
  """All of an array on each of the devices."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  return NamedSharding(sharding.mesh, PartitionSpec())
