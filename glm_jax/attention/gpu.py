"""GPU: tokamax's attention kernels, which take an interval of keys for each query.

Mosaic on Hopper and data-center Blackwell (compute capability 9 and 10), Triton on other
GPUs from Ampere on (8). Triton's backward kernel knows masks alone: it runs over blocks of
queries, whose masks are small, so that no [T, S] array exists in either.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from glm_jax import configs
from glm_jax.batch import Visibility

DTYPES = ('bfloat16', 'float16')
"""What the kernels multiply."""

HEAD_SIZES = range(8, 129, 8)
"""Those that compile, forward and backward, for every kernel."""

_TILE = 128  # queries and keys are padded to a multiple of what the kernels divide by
_MASKED_QUERIES = 1024


def lacks(head_size: int, dtype: str, device: Any = None) -> str:
  """What the kernels cannot do; '' if nothing.

  Args:
    head_size: of queries, keys and values.
    dtype: of activations.
    device: where to run, which may be of a topology; None is not asked about.
  """
  if head_size not in HEAD_SIZES:
    return f'head_size={head_size} must be a multiple of 8 up to {HEAD_SIZES[-1]}'
  if str(jnp.dtype(dtype)) not in DTYPES:
    return f"dtype={str(jnp.dtype(dtype))!r} must be 'bfloat16' or 'float16'"
  if device is not None and not _capability(device) >= 8:
    return f'{device.device_kind} must be an NVIDIA GPU of compute capability 8 or more'
  if importlib.util.find_spec('tokamax') is None:
    return "tokamax must be installed: pip install 'glm_jax[gpu]'"
  return ''


def attend(
  q_BTKGH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  visibility: Visibility,
  dropout_rate: float,
  dropout_key: jax.Array | None,
) -> jax.Array:
  """See `glm_jax.attention.attend`, which refuses dropout; [B, T, K, G, H]."""
  del dropout_rate, dropout_key
  return flash(q_BTKGH, k_BSKH, v_BSKH, visibility)


def flash(
  q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visibility: Visibility
) -> jax.Array:
  """Attention by a kernel; see `glm_jax.attention.attend`.

  Args:
    q_BTKGH: queries grouped by key head, bfloat16 or float16.
    k_BSKH: keys.
    v_BSKH: values.
    visibility: [B, T] intervals into the S keys.

  Returns:
    [B, T, K, G, H] in the dtype of `q_BTKGH`; zeros where an interval is empty.

  Raises:
    ValueError: a head size, a dtype or a GPU without a kernel, or no tokamax.
  """
  B, T, K, G, H = q_BTKGH.shape
  S = k_BSKH.shape[1]
  lacking = lacks(H, q_BTKGH.dtype)
  configs.check(
    not lacking,
    "attention 'gpu_tokamax' must have a kernel",
    lacking,
    "correct that, or use attention='chunked'",
  )
  start, end = visibility
  sees = end > start
  # A softmax over nothing is NaN: such a query sees one key instead, of a block that its
  # neighbours visit anyway, and `where` drops its output and its gradient.
  own = jnp.minimum(jnp.arange(T, dtype=jnp.int32), S - 1)
  start, end = jnp.where(sees, start, own), jnp.where(sees, end, own + 1)
  start, end = (_pad(x, 'edge') for x in (start, end))
  q_BTNH = _pad(q_BTKGH.reshape(B, T, K * G, H))
  out_BTNH = _kernel(q_BTNH, _pad(k_BSKH), _pad(v_BSKH), start, end)[:, :T]
  return jnp.where(sees[..., None, None, None], out_BTNH.reshape(q_BTKGH.shape), 0)


@contextlib.contextmanager
def compiling_for(device: Any) -> Iterator[None]:
  """Lets the kernels be traced for a GPU that is not here.

  Args:
    device: of `glm_jax.performance.topologies.devices`.
  """
  import tokamax
  from tokamax._src import gpu_utils

  # Its flag lifts the checks that a GPU is there, but not the question of which.
  there = mock.patch.object(
    gpu_utils, '_compute_capability', lambda *_: _capability(device)
  )
  with tokamax.config.cross_compile(True), there:
    yield


def _capability(device: Any) -> float:
  """Of an NVIDIA GPU, such as 9.0; else 0."""
  if not device.device_kind.startswith('NVIDIA'):
    return 0.0
  return float(device.compute_capability)


def _pad(x: jax.Array, mode: str = 'constant') -> jax.Array:
  """[B, T, ...] -> [B, T', ...]."""
  padding = [(0, 0), (0, -x.shape[1] % _TILE)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, padding, mode=mode)


def _op() -> tuple[Any, bool]:
  """The kernel of this GPU, and whether its backward takes intervals."""
  from tokamax._src import gpu_utils
  from tokamax._src.ops.attention import pallas_mosaic_gpu, pallas_triton

  if gpu_utils.is_sm90() or gpu_utils.is_sm100():
    return pallas_mosaic_gpu.PallasMosaicGpuFlashAttention(), True
  return pallas_triton.PallasTritonFlashAttention(), False


@jax.custom_vjp
def _kernel(q, k, v, start, end):
  return _forward(q, k, v, start, end)[0]


def _forward(q, k, v, start, end):
  from tokamax._src.ops.attention.base import Mask

  mask = Mask(k_start=start[:, None], k_end=end[:, None])
  results = _op()[0](q, k, v, mask=mask, return_residuals=True)
  # Named so that remat can save all that the backward needs of this kernel.
  out, stats = jax.tree.map(lambda x: checkpoint_name(x, 'attention'), results)
  return out, (q, k, v, start, end, out, stats)


def _backward(saved, d_out):
  q, k, v, start, end, out, stats = saved
  op, intervals = _op()
  backward = _gradients if intervals else _gradients_by_block
  return *backward(op, q, k, v, start, end, out, stats, d_out), None, None


def _gradients(op, q, k, v, start, end, out, stats, d_out):
  from tokamax._src.ops.attention.base import Mask

  return _vjp(op, q, k, v, Mask(k_start=start[:, None], k_end=end[:, None]), out, stats, d_out)


def _gradients_by_block(op, q, k, v, start, end, out, stats, d_out):
  """Those of `_vjp`, with masks of `_MASKED_QUERIES` queries at a time."""
  from tokamax._src.ops.attention.base import Mask

  size = math.gcd(q.shape[1], _MASKED_QUERIES)

  def split(x, axis):
    shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  def block(totals, args):
    q, start, end, out, d_out, m, l = args
    mask = Mask(Visibility(start, end).mask(k.shape[1])[:, None])
    d_q, *d_kv = _vjp(op, q, k, v, mask, out, (m, l), d_out)
    return jax.tree.map(jnp.add, totals, tuple(d_kv)), d_q

  rows = [split(x, 1) for x in (q, start, end, out, d_out)]
  zeros = jnp.zeros(k.shape, jnp.float32)
  d_kv, d_q = jax.lax.scan(block, (zeros, zeros), (*rows, *(split(x, 2) for x in stats)))
  d_q = jnp.moveaxis(d_q, 0, 1).reshape(q.shape)
  return d_q, *(x.astype(k.dtype) for x in d_kv)


def _vjp(op, q, k, v, mask, out, stats, d_out):
  bound = op.bind(q, k, v, mask=mask)
  settings = {n: x for n, x in bound.kwargs.items() if n != 'return_residuals'}
  gradients = op.vjp(stats, out, d_out, *bound.args, **settings)
  return gradients['q'], gradients['k'], gradients['v']


_kernel.defvjp(_forward, _backward)
