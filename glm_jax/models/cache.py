"""The keys and values that later tokens attend to, as floats or as int8 with scales."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from glm_jax import sharding

Layer = dict[str, jax.Array]
Cache = Layer | tuple[Layer, ...]
"""{'k', 'v'}: [L, B, S, K, H] each, S slots a row; of int8 also {'k_scale', 'v_scale'}:
[L, B, S, K], a scale for each key and head. A layer sees its part, without L. Where layers
are apart (`glm_jax.models.stack.apart`), a tuple of such parts."""

DTYPES = ('float32', 'bfloat16', 'int8')


def init(
  config: Any, rows: int, slots: int, dtype: str = 'float32', *, apart: bool = False
) -> Cache:
  """An empty cache, spread over the mesh as activations are: rows, and heads.

  Args:
    config: of the model.
    rows: B.
    slots: S.
    dtype: of `DTYPES`.
    apart: whether layers are.
  """
  if apart:
    alone = dataclasses.replace(config, num_layers=1)
    layer = lambda: jax.tree.map(lambda x: x[0], init(alone, rows, slots, dtype))
    return tuple(layer() for _ in range(config.num_layers))
  shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_size)
  spread = spec(config, rows)
  make = lambda n, dtype: _zeros(shape[:n], jnp.dtype(dtype), PartitionSpec(*spread[:n]))
  cache = {name: make(5, dtype) for name in ('k', 'v')}
  if dtype == 'int8':
    cache |= {f'{name}_scale': make(4, 'float32') for name in ('k', 'v')}
  return cache


def spec(config: Any, rows: int) -> PartitionSpec:
  """Mesh axes of keys and values: few heads, or few rows, are whole on every device."""
  axes = (None, 'act_batch', None, 'act_heads', None)
  sizes = (1, rows, 1, config.num_kv_heads, 1)
  return PartitionSpec(
    *(
      sharding.axes_of(axis) if axis and size % sharding.axis_size(axis) == 0 else None
      for axis, size in zip(axes, sizes, strict=True)
    )
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.Array:
  """Under jit, so that no device ever holds more than its part."""
  zeros = jnp.zeros(shape, dtype)
  return jax.lax.with_sharding_constraint(zeros, spec) if any(spec) else zeros


def rows_axis(cache: Cache) -> int:
  """Which axis of all arrays is B, with S behind it."""
  return 0 if isinstance(cache, tuple) else 1


def shape(cache: Cache) -> tuple[int, int]:
  """B and S."""
  B, S = jax.tree.leaves(cache)[0].shape[rows_axis(cache) :][:2]
  return B, S


def take(cache: Cache, rows_R: jax.Array) -> Cache:
  """[L, R, S, ...]: rows of it; the last one for a number that is not there."""
  before = (slice(None),) * rows_axis(cache)
  return jax.tree.map(lambda x: x.at[*before, rows_R].get(mode='clip'), cache)


def put(cache: Cache, part: Cache, rows_R: jax.Array) -> Cache:
  """The cache, some of whose rows are now those of a part.

  Args:
    cache: [L, B, S, ...].
    part: [L, R, T, ...], T at most S.
    rows_R: int32, the row of each; B for one that is left out.
  """
  before, (_, T) = (slice(None),) * rows_axis(cache), shape(part)
  of_leaf = lambda old, new: old.at[*before, rows_R, :T].set(new, mode='drop')
  return jax.tree.map(of_leaf, cache, part)


def write(
  cache: Layer, k_BTKH: jax.Array, v_BTKH: jax.Array, start_B: jax.Array | None
) -> Layer:
  """The cache of a layer with new keys and values.

  Args:
    cache: of the layer.
    k_BTKH: new keys.
    v_BTKH: new values.
    start_B: the slot of each row's first one; None where all begin at slot 0.
  """
  new = {}
  for name, x_BTKH in (('k', k_BTKH), ('v', v_BTKH)):
    if cache[name].dtype == jnp.int8:
      x_BTKH = x_BTKH.astype(jnp.float32)
      scale_BTK = jnp.abs(x_BTKH).max(-1) / 127
      # A key of zeros has no scale.
      scale_BTK = jnp.where(scale_BTK > 0, scale_BTK, 1)
      new[f'{name}_scale'] = scale_BTK
      x_BTKH = jnp.rint(x_BTKH / scale_BTK[..., None])
    new[name] = x_BTKH.astype(cache[name].dtype)
  if start_B is None:
    update = lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, 0, 1)
    return {name: update(cache[name], x) for name, x in new.items()}
  return {name: _put(cache[name], x, start_B) for name, x in new.items()}


def _put(old: jax.Array, new: jax.Array, start_B: jax.Array) -> jax.Array:
  """[B, S, ...], in which each row has `new`, [B, T, ...], from its slot on.

  Rows have contexts of different lengths; stale keys behind are outside of every interval.
  """
  by_row = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))
  by_slice = lambda old, new, start_B: by_row(old, new, start_B, 0)
  if new.shape[:2] != (1, 1) or not sharding.alone():
    return by_slice(old, new, start_B)

  def twice(old, new, start_B):
    # A single one would be fused with what reads it, and XLA's CPU backend would copy the
    # cache to have it both before and after.
    return old.at[0, jnp.repeat(start_B, 2)].set(jnp.repeat(new[0], 2, axis=0))

  return jax.lax.platform_dependent(old, new, start_B, cpu=twice, default=by_slice)


def read(cache: Layer, dtype: Any) -> tuple[jax.Array, jax.Array]:
  """Keys and values [B, S, K, H] of a layer, for attention in `dtype`."""

  def values(name: str) -> jax.Array:
    x_BSKH = cache[name]
    if x_BSKH.dtype != jnp.int8:
      return x_BSKH
    return x_BSKH.astype(dtype) * cache[f'{name}_scale'][..., None].astype(dtype)

  return values('k'), values('v')
