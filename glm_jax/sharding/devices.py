"""What XLA must not decide: functions that run on each device's part of their arguments.

Most of the program leaves to XLA what moves between devices. A few operations say it
themselves, with collectives over the mesh axes that stand for a logical one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from glm_jax.sharding.mesh import as_tuple


def axes_of(logical: str) -> tuple[str, ...]:
  """The mesh axes that stand for a logical one here; () where there is one device."""
  if alone():
    return ()
  return as_tuple(nn.logical_to_mesh_axes((logical,))[0])


def alone() -> bool:
  """Whether there is no mesh here, or one of a single device: nothing moves, or is cut.

  XLA's CPU compiler would keep gathers and sums over one device, and copy for them.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.empty or mesh.size == 1


def axis_size(logical: str) -> int:
  """Parts that a logical axis is cut into here; 1 without a mesh."""
  shape = jax.sharding.get_abstract_mesh().shape
  return int(np.prod([shape[axis] for axis in axes_of(logical)], dtype=int))


def per_device(
  f: Callable[..., Any], in_axes: Any, out_axes: Any, *, kernels: bool = False
) -> Callable[..., Any]:
  """`f` on each device's part of its arguments; where there is one device, `f` itself.

  Args:
    f: may use collectives over `axes_of(...)`.
    in_axes: for each argument, a tuple of logical axes (of every array in it), or a
      PartitionSpec.
    out_axes: the same for the result, or a list of them for several results.
    kernels: whether `f` calls kernels or has a derivative of its own, so that JAX cannot
      tell which axes its results vary over.
  """
  if alone():
    return f

  def spec(axes: Any) -> PartitionSpec:
    return axes if isinstance(axes, PartitionSpec) else nn.logical_to_mesh_axes(axes)

  in_specs = tuple(map(spec, in_axes))
  out_specs = tuple(map(spec, out_axes)) if isinstance(out_axes, list) else spec(out_axes)
  return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=not kernels)


# Causal rows cost more towards their end: of a sequence cut into 2 n chunks, device i of n
# holds chunks i and 2 n - 1 - i, so that all have the same work. With n = 4:
#
#   order of the text   0 1 | 2 3 | 4 5 | 6 7
#   spread              0 7 | 1 6 | 2 5 | 3 4


def spread(x: jax.Array) -> jax.Array:
  """[B, T, ...] from the order of the text to the order that balances the devices."""
  return _exchange(x, back=False)


def unspread(x: jax.Array) -> jax.Array:
  """The inverse of `spread`."""
  return _exchange(x, back=True)


def gather_length(x: jax.Array, *, spread: bool) -> jax.Array:
  """Inside `per_device`: all tokens of a row, in the order of the text.

  Args:
    x: this device's [B, T / n, ...].
    spread: whether the tokens are in the order of `spread`.
  """
  axes = axes_of('act_length')
  if not axes or axis_size('act_length') == 1:
    return x
  x = jax.lax.all_gather(x, axes, axis=1, tiled=not spread)
  if not spread:
    return x
  # Untiled, devices are an axis: [B, n, t, ...], each with two chunks of t / 2 tokens. The
  # first chunks are 0, 1, ..., n - 1, the second ones 2 n - 1, ..., n: turned round, they
  # follow.
  B, n, t = x.shape[:3]
  x = x.reshape(B, n, 2, t // 2, *x.shape[3:])
  x = jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1)
  return x.reshape(B, n * t, *x.shape[3:])


def _exchange(x: jax.Array, back: bool) -> jax.Array:
  """Two permutations of chunks between devices: no device ever holds a whole row."""
  n = axis_size('act_length')
  if n == 1:
    return x
  axes = ('act_batch', 'act_length', *[None] * (x.ndim - 2))
  # Pairs (from, to) for ppermute: the first one moves the even chunk 2 i of each device i,
  # the second one the odd chunk 2 i + 1. Of chunks c and 2 n - 1 - c, which end on the same
  # device, one is even and one is odd, so both are permutations.
  spread_device = lambda chunk: min(chunk, 2 * n - 1 - chunk)
  even, odd = ([(i, spread_device(2 * i + j)) for i in range(n)] for j in (0, 1))
  if back:
    even, odd = ([(b, a) for a, b in pairs] for pairs in (even, odd))

  def exchange(x: jax.Array) -> jax.Array:
    name = axes_of('act_length')
    first, second = jnp.split(x, 2, axis=1)
    # Spread, device i holds chunk i first: one with an even number where i is even.
    is_even = jax.lax.axis_index(name) % 2 == 0
    if back:
      first, second = (
        jnp.where(is_even, first, second),
        jnp.where(is_even, second, first),
      )
    first = jax.lax.ppermute(first, name, even)
    second = jax.lax.ppermute(second, name, odd)
    if not back:
      first, second = (
        jnp.where(is_even, first, second),
        jnp.where(is_even, second, first),
      )
    return jnp.concatenate([first, second], axis=1)

  return per_device(exchange, (axes,), axes)(x)
