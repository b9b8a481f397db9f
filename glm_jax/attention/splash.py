"""TPU: JAX's Splash attention kernel, with each query's interval as its "position".

Splash computes its mask from one int32 a query and the key's index. Packing the interval
into that number (`key_start << 16 | key_end`) gives prefixes, packing and padding without
any mask in memory. Rows that are longer than 16 bits hold documents' ends there, and their
starts are segment ids. Each key head is a call of its own under `vmap`, whose axis the two
cores of a v4 or v5p share.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glm_jax.attention import blocks
from glm_jax.attention.blocks import Tiles
from glm_jax.batch import Visibility

LONGEST_PACKED = 32768
"""Keys up to which an interval fits into one int32."""

INTERPRET: Any = False
"""Tests set it, to run the kernel without a TPU."""


class SplashMetadata(NamedTuple):
  """What the kernel is told of each row; built once a step.

  Attributes:
    code: [B, T'] int32, a query's interval (or its end, with segments); T' is padded.
    sees: [B, T] bool, whether a query sees anything.
    q_segments: [B, T'] int32, or None: where a query's interval begins.
    k_segments: [B, S'] int32, or None: the document of each key, by its beginning.
    forward: [B, 2, query blocks, key blocks] int32: the next block to fetch; visited.
    backward: the same, in the order of the backward kernel.
  """

  code: jax.Array
  sees: jax.Array
  q_segments: jax.Array | None
  k_segments: jax.Array | None
  forward: jax.Array
  backward: jax.Array


def prepare(visibility: Visibility, documents_BS: jax.Array) -> SplashMetadata:
  """SplashMetadata of rows of queries.

  Args:
    visibility: [B, T] intervals into S keys.
    documents_BS: [B, S] int32, where the document of each key begins; -1 for padding.
      Used for rows beyond `LONGEST_PACKED` alone.
  """
  T, S = visibility.key_start.shape[1], documents_BS.shape[1]
  q, k = blocks.tiles(T), blocks.tiles(S)
  # Queries that fill up the last block have the empty interval [0, 0).
  start, end = (jnp.pad(x, [(0, 0), (0, q.size - T)]) for x in visibility)
  packed = S <= LONGEST_PACKED

  def row(start_T: jax.Array, end_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    visited = blocks.active(start_T, end_T, q, k).visited
    # In a row of blocks that sees nothing the forward kernel would divide by a softmax sum
    # of 0, so one block is visited. The backward kernel has no such division.
    forward = blocks.one_a_row(visited)
    return (
      jnp.stack([_next_in_rows(forward), forward.astype(jnp.int32)]),
      jnp.stack([_next_in_columns(visited), visited.astype(jnp.int32)]),
    )

  forward, backward = jax.vmap(row)(start, end)
  return SplashMetadata(
    # start < 2**15, so the sign bit stays clear, and `>> 16` brings it back.
    code=(start << 16) | end if packed else end,
    sees=visibility.key_end > visibility.key_start,
    q_segments=None if packed else start,
    k_segments=None
    if packed
    else jnp.pad(documents_BS, [(0, 0), (0, k.size - S)], constant_values=-1),
    forward=forward,
    backward=backward,
  )


def attend(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, metadata: SplashMetadata
) -> jax.Array:
  """See `glm_jax.attention.attend`; metadata as `prepare` gives it, of the same rows."""
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  q, k = blocks.tiles(T), blocks.tiles(S)
  padded_q = jnp.pad(q_BTNH * H**-0.5, [(0, 0), (0, q.size - T), (0, 0), (0, 0)])
  # [B, T', N, H] -> [B, T', K, G, H]: the kernel takes the G queries of one key head.
  padded_q = padded_q.reshape(B, q.size, K, N // K, H)
  padded_k, padded_v = (
    jnp.pad(x, [(0, 0), (0, k.size - S), (0, 0), (0, 0)]) for x in (k_BSKH, v_BSKH)
  )
  # Under vmap, rows with metadata of their own would become a loop with slices.
  rows = []
  for b in range(B):
    kernel, segments = _kernel(jax.tree.map(lambda x, b=b: x[b], metadata), q, k)
    out_KGTH = jax.vmap(kernel, in_axes=(0, 0, 0, None))(
      padded_q[b].transpose(1, 2, 0, 3),
      padded_k[b].transpose(1, 0, 2),
      padded_v[b].transpose(1, 0, 2),
      segments,
    )
    rows.append(out_KGTH.reshape(N, q.size, H)[:, :T].transpose(1, 0, 2))
  # A query that sees nothing was given the mean of a block.
  return jnp.where(metadata.sees[..., None, None], jnp.stack(rows), 0)


def _kernel(row: SplashMetadata, q: Tiles, k: Tiles) -> tuple[Any, Any]:
  # The factories that jax exports make MaskInfo from masks that are known when the program
  # is built; intervals are known in each step alone. The fields of MaskInfo may change with
  # any release, which tests/attention_test.py would notice: it compares outputs and
  # gradients with dense attention.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import (
    MaskInfo,
  )

  def info(table: jax.Array) -> MaskInfo:
    # The leading axis is of heads, which share one table. Without `partial_mask_blocks`,
    # every visited block is masked by `mask_function(q_sequence, key)`.
    return MaskInfo(
      data_next=table[0][None],
      mask_next=None,
      block_mask=table[1][None],
      partial_mask_blocks=None,
      q_sequence=row.code,
      is_dynamic_mask=False,
    )

  kernel = splash.SplashAttentionKernel(
    info(row.forward),
    None,
    info(row.backward),
    block_sizes=splash.BlockSizes(
      block_q=q.block,
      block_kv=k.block,
      block_q_dkv=q.block,
      block_kv_dkv=k.block,
      use_fused_bwd_kernel=True,
    ),
    is_mqa=True,
    save_residuals=False,
    mask_value=splash.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name='attention',
    mask_function=sees if row.q_segments is None else before,
    interpret=INTERPRET,
  )
  if row.q_segments is None:
    return lambda q, k, v, _: kernel(q, k, v), None
  return kernel, splash.SegmentIds(row.q_segments, row.k_segments)


def sees(code: jax.Array, key: jax.Array) -> jax.Array:
  return (key >= (code >> 16)) & (key < (code & 0xFFFF))


def before(end: jax.Array, key: jax.Array) -> jax.Array:
  return key < end


def _next_in_rows(visited: jax.Array) -> jax.Array:
  """The key block to fetch at each step: its own where visited, else the next one's."""
  nq, nk = visited.shape
  # Steps go row by row. A minimum from the end backwards is the next step that is visited;
  # naming its block early hides the fetch behind the steps that are skipped.
  visited_step = jnp.where(visited.reshape(-1), jnp.arange(nq * nk), nq * nk)
  following = jax.lax.cummin(visited_step, reverse=True)
  return jnp.where(following < nq * nk, following % nk, 0).reshape(nq, nk)


def _next_in_columns(visited: jax.Array) -> jax.Array:
  """The query block to fetch: the next visited one of the column, or else its first."""
  nq = visited.shape[0]
  visited_row = jnp.where(visited, jnp.arange(nq)[:, None], nq)
  following = jax.lax.cummin(visited_row, axis=0, reverse=True)
  following = jnp.where(following < nq, following, visited_row.min(0))
  return jnp.where(following < nq, following, 0)
