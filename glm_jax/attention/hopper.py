"""Hopper: gradients of attention, whose kernels pass over what nobody sees.

tokamax's backward pass multiplies all T x S pairs and masks them afterwards; a packed or
causal row sees a half of them or less. Here a tile of queries reads the blocks of keys
between the first and the last that it sees, and a tile of keys the blocks of queries that
see it. Otherwise FlashAttention-2's backward pass (Dao 2023, algorithm 2) in two kernels,
each a warpgroup that loads and two that multiply.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_BLOCK = 64  # rows of one product of a warpgroup
_GROUPS = 2  # warpgroups that multiply, each with rows of its own
TILE = _GROUPS * _BLOCK
_STAGES = 2  # blocks in flight

_SQUARE = plgpu.Layout.WGMMA  # [rows, columns] over the threads of a warpgroup
_ROWS, _COLUMNS = _SQUARE.reduce(1), _SQUARE.reduce(0)
_LOG2E = math.log2(math.e)
# Before jax 0.11, `plgpu.load` took the index apart.
_NO_INDEX = ((),) if jax.__version_info__ < (0, 11) else ()


def gradients(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  d_out: jax.Array,
  out: jax.Array,
  statistics: tuple[jax.Array, jax.Array],
  start: jax.Array,
  end: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The gradients of softmax(q k' / sqrt(H)) v.

  Args:
    q: [B, T, N, H], T a multiple of `TILE`; bfloat16 or float16, as k, v, d_out and out.
    k: [B, S, K, H], S a multiple of `TILE`.
    v: [B, S, K, H].
    d_out: [B, T, N, H], the gradient of the output.
    out: [B, T, N, H], the output.
    statistics: float32 [B, N, T]: of the scaled scores that a query sees, the largest, and
      the sum of their exponentials over that of the largest.
    start: int32 [B, T].
    end: [B, T]; a query sees the keys [start, end), of which there is one at least.

  Returns:
    The gradients of q, k and v, in their shapes and dtypes.
  """
  H = q.shape[-1]
  largest, total = statistics
  log_total = (largest + jnp.log(total)) * _LOG2E
  # What a softmax's gradient subtracts: the sum of p * dp over the keys.
  delta = jnp.einsum('BTNH,BTNH->BNT', out, d_out, preferred_element_type=jnp.float32)
  # Shared memory is laid out in 64 columns.
  wide = [jnp.pad(x, [(0, 0)] * 3 + [(0, -H % 64)]) for x in (q, k, v, d_out)]
  run = functools.partial(_row, scale=H**-0.5)
  d_q, d_k, d_v = jax.vmap(run)(*wide, log_total, delta, start, end)
  return d_q[..., :H], d_k[..., :H], d_v[..., :H]


def _row(q, k, v, d_out, log_total, delta, start, end, *, scale):
  """`gradients` of one row of the batch."""
  T, N, H = q.shape
  S, K, _ = k.shape
  G = N // K
  array = lambda *shape: jax.ShapeDtypeStruct(shape, q.dtype)
  call = functools.partial(
    plgpu.kernel,
    scratch_types=[
      _shared((_GROUPS, _BLOCK, H), q.dtype),
      _shared((_GROUPS, _BLOCK, H), q.dtype),
      plgpu.Barrier(num_barriers=_GROUPS, num_arrivals=2),
    ],
    compiler_params=plgpu.CompilerParams(approx_math=True),
    grid_names=('heads', 'tiles'),
    num_threads=_GROUPS + 1,
    thread_name='group',
  )
  d_q = call(
    functools.partial(_d_q, G=G, scale=scale),
    out_type=array(T, N, H),
    grid=(N, T // TILE),
  )(q, d_out, k, v, log_total, delta, start, end, *_keys_of(start, end))
  # Heads of queries that share a head of keys are summed afterwards: to the first tiles of
  # a causal row all queries belong, and a tile for each head evens that out.
  d_k, d_v = call(
    functools.partial(_d_kv, G=G, scale=scale),
    out_type=(array(S, N, H), array(S, N, H)),
    grid=(N, S // TILE),
  )(k, v, q, d_out, log_total, delta, start, end, *_queries_of(start, end, S))
  total = lambda x: x.reshape(S, K, G, H).sum(2, dtype=jnp.float32).astype(x.dtype)
  return d_q, total(d_k), total(d_v)


def _keys_of(start: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The blocks of keys [first, last) that a tile of queries sees, int32 [T / TILE]."""
  first = start.reshape(-1, TILE).min(1) // _BLOCK
  last = pl.cdiv(end.reshape(-1, TILE).max(1), _BLOCK)
  return first, last


def _queries_of(start: jax.Array, end: jax.Array, S: int) -> tuple[jax.Array, jax.Array]:
  """The blocks of queries [first, last) that see a tile of keys, int32 [S / TILE].

  One block at least, since a pipeline has a step; its pairs are masked.
  """
  key = jnp.arange(0, S, TILE)[:, None]
  sees = (start < key + TILE) & (end > key)
  sees = sees.reshape(S // TILE, -1, _BLOCK).any(-1)
  first = sees.argmax(1)
  last = sees.shape[1] - sees[:, ::-1].argmax(1)
  last = jnp.where(sees.any(1), last, 1)
  return first.astype(jnp.int32), last.astype(jnp.int32)


def _d_q(
  q, d_out, k, v, log_total, delta, start, end, first, last, d_q, *scratch, G, scale
):
  """A tile of queries of one head: over the keys that it sees."""
  q_shared, d_out_shared, barriers = scratch
  head, tile = lax.axis_index('heads'), lax.axis_index('tiles')
  group = lax.axis_index('group')
  rows = pl.ds(tile * TILE + group * _BLOCK, _BLOCK)
  head_k = lax.div(head, jnp.array(G, head.dtype))
  first, last = first[tile], last[tile]
  H = q.shape[-1]

  def whole(pipeline):
    own_q, own_d_out = q_shared.at[group], d_out_shared.at[group]
    barrier = barriers.at[group]
    plgpu.copy_gmem_to_smem(q.at[rows, head], own_q, barrier)
    plgpu.copy_gmem_to_smem(d_out.at[rows, head], own_d_out, barrier)
    of_rows = [_load(x.at[head, rows], _ROWS) for x in (log_total, delta)]
    of_rows += [_load(x.at[rows], _ROWS) for x in (start, end)]
    plgpu.barrier_wait(barrier)

    def accumulate(total):
      pipeline((total, *of_rows))
      return total[...]

    own_q[...] = (_accumulated(accumulate, (_BLOCK, H)) * scale).astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own_q, d_q.at[rows, head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  def block(index, v_shared, k_shared, v_used, k_used, carry):
    total, log_total, delta, start, end = carry
    own_q, own_d_out = q_shared.at[group], d_out_shared.at[group]

    def products(d_p, s):
      plgpu.wgmma(d_p, own_d_out, v_shared.T)
      plgpu.wgmma(s, own_q, k_shared.T)
      plgpu.wgmma_wait(1)
      plgpu.barrier_arrive(v_used)
      return d_p[...], s[...]

    d_p, s = _accumulated(products, (_BLOCK, _BLOCK), (_BLOCK, _BLOCK))
    over = lambda x: lax.broadcast_in_dim(x, s.shape, [0])
    key = (first + index[0]) * _BLOCK + plgpu.broadcasted_iota(
      jnp.int32, s.shape, 1, layout=_SQUARE
    )
    p = jnp.exp2(s * (scale * _LOG2E) - over(log_total))
    p = jnp.where(key >= over(start), p, 0.0)
    p = jnp.where(key < over(end), p, 0.0)
    d_s = p * (d_p - over(delta))
    plgpu.wgmma(total, d_s.astype(q.dtype), k_shared)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(k_used)
    return carry

  blocks = _blocks((_BLOCK, H), k.dtype, lambda i: (first + i, 0))
  _pipeline(block, whole, (last - first,), [blocks, blocks])(
    v.at[:, head_k], k.at[:, head_k]
  )


def _d_kv(
  k, v, q, d_out, log_total, delta, start, end, first, last, d_k, d_v, *scratch, G, scale
):
  """A tile of keys for one head of queries: over the queries that see it."""
  k_shared, v_shared, barriers = scratch
  head, tile = lax.axis_index('heads'), lax.axis_index('tiles')
  group = lax.axis_index('group')
  place = tile * TILE + group * _BLOCK
  rows = pl.ds(place, _BLOCK)
  head_k = lax.div(head, jnp.array(G, head.dtype))
  first, last = first[tile], last[tile]
  H = q.shape[-1]

  def whole(pipeline):
    own_k, own_v, barrier = k_shared.at[group], v_shared.at[group], barriers.at[group]
    plgpu.copy_gmem_to_smem(k.at[rows, head_k], own_k, barrier)
    plgpu.copy_gmem_to_smem(v.at[rows, head_k], own_v, barrier)
    plgpu.barrier_wait(barrier)

    def accumulate(*totals):
      pipeline(totals)
      return [total[...] for total in totals]

    total_k, total_v = _accumulated(accumulate, (_BLOCK, H), (_BLOCK, H))
    own_k[...] = (total_k * scale).astype(k.dtype)
    own_v[...] = total_v.astype(v.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own_k, d_k.at[rows, head], commit_group=False)
    plgpu.copy_smem_to_gmem(own_v, d_v.at[rows, head], commit_group=False)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  def block(index, *refs):
    *vectors, d_out_shared, q_shared = refs[:6]
    *vectors_used, d_out_used, q_used = refs[6:12]
    total_k, total_v = refs[12]
    own_k, own_v = k_shared.at[group], v_shared.at[group]

    def scores(s):
      plgpu.wgmma(s, own_k, q_shared.T)
      of_columns = [_load(x, _COLUMNS) for x in vectors]
      for used in vectors_used:
        plgpu.barrier_arrive(used)
      return s[...], of_columns

    s, of_columns = _accumulated(scores, (_BLOCK, _BLOCK))
    log_total, delta, start, end = (
      lax.broadcast_in_dim(x, s.shape, [1]) for x in of_columns
    )
    key = place + plgpu.broadcasted_iota(jnp.int32, s.shape, 0, layout=_SQUARE)
    p = jnp.exp2(s * (scale * _LOG2E) - log_total)
    p = jnp.where(key >= start, p, 0.0)
    p = jnp.where(key < end, p, 0.0)

    def products(d_p):
      plgpu.wgmma(d_p, own_v, d_out_shared.T)
      plgpu.wgmma(total_v, p.astype(q.dtype), d_out_shared)
      # The second goes on meanwhile.
      return plgpu.wgmma_accumulator_load(d_p, wait_n=1)

    d_s = p * (_accumulated(products, (_BLOCK, _BLOCK)) - delta)
    plgpu.wgmma(total_k, d_s.astype(q.dtype), q_shared)
    plgpu.wgmma_wait(1)
    plgpu.barrier_arrive(d_out_used)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(q_used)
    return total_k, total_v

  blocks = _blocks((_BLOCK, H), q.dtype, lambda i: (first + i, 0))
  vector = plgpu.BlockSpec((_BLOCK,), lambda i: (first + i,))
  _pipeline(block, whole, (last - first,), [vector] * 4 + [blocks, blocks])(
    log_total.at[head], delta.at[head], start, end, d_out.at[:, head], q.at[:, head]
  )


def _pipeline(block: Any, whole: Any, grid: tuple[Any, ...], specs: list[Any]) -> Any:
  """Calls `whole` of a warpgroup, whose argument runs `block` over the grid."""
  return plgpu.emit_pipeline_warp_specialized(
    block,
    grid=grid,
    max_concurrent_steps=_STAGES,
    num_compute_wgs=_GROUPS,
    memory_registers=40,
    wg_axis='group',
    manual_consumed_barriers=True,
    compute_context=whole,
    in_specs=specs,
  )


def _accumulated(run: Any, *shapes: tuple[int, int]) -> Any:
  """What `run` makes of accumulators in registers."""
  return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def _load(ref: Any, layout: Any) -> jax.Array:
  return plgpu.load(ref, *_NO_INDEX, layout=layout, optimized=False)


def _layout(shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
  """How a product wants its operands in shared memory."""
  bits = jnp.finfo(dtype).bits
  swizzle = plgpu.find_swizzle(shape[-1] * bits)
  return plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle)


def _shared(shape: tuple[int, ...], dtype: Any) -> Any:
  return plgpu.SMEM(shape, dtype, transforms=_layout(shape, dtype))


def _blocks(shape: tuple[int, ...], dtype: Any, index: Any) -> Any:
  return plgpu.BlockSpec(shape, index, transforms=_layout(shape, dtype))
