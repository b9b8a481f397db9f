"""TPU: tokamax's Splash attention kernel, on intervals packed as in `splash`.

It walks over the visited blocks alone, and masks only those that are not full; hence
better than JAX's where the mask arithmetic is the bottleneck (v6e, tpu7x). Its backward
runs on one core of the two of a v4 or v5p: `splash` is for those.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glm_jax import configs
from glm_jax.attention import blocks, splash
from glm_jax.attention.blocks import Tiles
from glm_jax.batch import Visibility

# Kinds of blocks, as the kernel reads them; the docstring of its MaskInfo has them the
# other way round.
_PARTIAL, _FULL = 1, 2

INTERPRET: Any = False
"""Tests set it to `pltpu.InterpretParams()`: plain interpret mode computes wrong gradients,
since it does not emulate that outputs share memory with inputs."""


class TokamaxMetadata(NamedTuple):
  """What the kernel is told of each row; built once a step.

  Attributes:
    code: [B, T'] int32, a query's interval; T' is padded.
    sees: [B, T] bool, whether a query sees anything.
    forward: [B, 3, blocks] int32: rows and columns of the visited blocks in the order of
      the grid, then -1; what the kernel does there (1: masked, 2: without mask).
    backward: the same with columns first, in their order; kind 0 means nothing to do.
    counts: [B, 2] int32, visited blocks of both.
  """

  code: jax.Array
  sees: jax.Array
  forward: jax.Array
  backward: jax.Array
  counts: jax.Array


def prepare(visibility: Visibility, documents_BS: jax.Array) -> TokamaxMetadata:
  """TokamaxMetadata of rows of queries; arguments as `splash.prepare`."""
  T, S = visibility.key_start.shape[1], documents_BS.shape[1]
  configs.check(  # their intervals would not fit into an int32
    S <= splash.LONGEST_PACKED,
    f"attention 'tpu_tokamax' takes rows of up to {splash.LONGEST_PACKED} positions",
    str(S),
    "use 'tpu_splash'",
  )
  q, k = blocks.tiles(T), blocks.tiles(S)
  start, end = (jnp.pad(x, [(0, 0), (0, q.size - T)]) for x in visibility)

  def row(start_T: jax.Array, end_T: jax.Array) -> tuple[jax.Array, ...]:
    visited, full = blocks.active(start_T, end_T, q, k)
    kinds = jnp.where(visited, jnp.where(full, _FULL, _PARTIAL), 0)
    rows = blocks.one_a_row(visited)
    columns = blocks.one_a_row(visited.T)
    # In the forward kernel 0 would mean no mask; a block added for its output is masked.
    forward = _walk(rows, jnp.where(rows & ~visited, _PARTIAL, kinds))
    backward = _walk(columns, kinds.T)
    return forward, backward, jnp.stack([rows.sum(), columns.sum()])

  forward, backward, counts = jax.vmap(row)(start, end)
  return TokamaxMetadata(
    code=(start << 16) | end,
    sees=visibility.key_end > visibility.key_start,
    forward=forward,
    backward=backward,
    counts=counts.astype(jnp.int32),
  )


def attend(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, metadata: TokamaxMetadata
) -> jax.Array:
  """See `glm_jax.attention.attend`; metadata as `prepare` gives it, of the same rows."""
  B, T, _, H = q_BTNH.shape
  S = k_BSKH.shape[1]
  q, k = blocks.tiles(T), blocks.tiles(S)
  padded_q = jnp.pad(q_BTNH * H**-0.5, [(0, 0), (0, q.size - T), (0, 0), (0, 0)])
  padded_k, padded_v = (
    jnp.pad(x, [(0, 0), (0, k.size - S), (0, 0), (0, 0)]) for x in (k_BSKH, v_BSKH)
  )
  # A loop, since each row has metadata of its own; see `splash.attend`.
  rows = []
  for b in range(B):
    kernel = _kernel(jax.tree.map(lambda x, b=b: x[b], metadata), q, k)
    heads_first = [x[b].transpose(1, 0, 2) for x in (padded_q, padded_k, padded_v)]
    rows.append(kernel(*heads_first)[:, :T].transpose(1, 0, 2))
  # A query that sees nothing was given the mean of a block.
  return jnp.where(metadata.sees[..., None, None], jnp.stack(rows), 0)


def _walk(visited: jax.Array, kinds: jax.Array) -> jax.Array:
  """[3, blocks]: rows, columns and kinds of the visited blocks, row by row, then -1."""
  # The number of visited blocks is traced, so the list has room for all of them.
  rows, columns = jnp.nonzero(visited, size=visited.size, fill_value=-1)
  visited_kinds = jnp.where(rows >= 0, kinds[rows, columns], -1)
  return jnp.stack([rows, columns, visited_kinds]).astype(jnp.int32)


def _kernel(row: TokamaxMetadata, q: Tiles, k: Tiles) -> Any:
  # tokamax exports neither: its public attention takes no mask function, and lists blocks
  # when the program is built. tests/attention_test.py would notice another meaning of these
  # fields: it compares outputs and gradients with dense attention.
  from tokamax._src.ops.experimental.tpu.splash_attention import (
    base,
    splash_attention_kernel,
  )
  from tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_mask_info import (  # noqa: E501
    MaskInfo,
  )

  def info(table: jax.Array, count: jax.Array) -> MaskInfo:
    return MaskInfo(
      mask_next=None,
      active_rows=table[0],
      active_cols=table[1],
      block_mask=table[2],
      num_active_blocks=count[None],
      partial_mask_blocks=None,
      q_sequence=row.code,
    )

  return splash_attention_kernel.SplashAttentionKernel(
    info(row.forward, row.counts[0]),
    info(row.backward, row.counts[1]),
    config=splash_attention_kernel.SplashConfig(
      block_q=q.block,
      block_kv=k.block,
      block_q_dkv=q.block,
      block_kv_dkv=k.block,
      residual_checkpoint_name='attention',
      dq_reduction_steps=3,  # the only one for a grid whose size is not known
      interpret=INTERPRET,
    ),
    is_mqa=False,
    save_residuals=False,
    mask_value=base.DEFAULT_MASK_VALUE,
    mask_function=splash.sees,
    # These two only tell XLA's scheduler what the kernel costs at most.
    fwd_mask_sparsity=1.0,
    dkv_mask_sparsity=1.0,
  )
