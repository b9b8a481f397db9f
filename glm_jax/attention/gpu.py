"""GPU: tokamax's attention kernels, which take an interval of keys for each query.

Mosaic on Hopper, Triton on other GPUs from Ampere on: Mosaic's backward for Blackwell does
not fit into shared memory with intervals at head size 128. Triton's backward knows masks
alone: it runs over blocks of queries, whose masks are small. No [T, S] array exists.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import backend

from glm_jax import configs
from glm_jax.batch import Visibility

DTYPES = ('bfloat16', 'float16')
"""What the kernels multiply; float32 would be rounded to one of these, or to TF32."""

LARGEST_HEAD = 128
"""Up to which every kernel fits into the shared memory of every GPU."""

# Lengths are padded to a multiple of it: the queries of a block in Mosaic's kernel.
_TILE = 128

# Queries whose masks exist at a time in Triton's backward.
_MASKED = 1024


def lacks(head_size: int, dtype: Any, device: Any = None) -> str:
  """What the kernels cannot do; '' if nothing.

  Args:
    head_size: of queries, keys and values.
    dtype: of activations.
    device: where to run, also one of a topology; None leaves that open.
  """
  dtype = str(jnp.dtype(dtype))
  if head_size % 8 or not 8 <= head_size <= LARGEST_HEAD:
    return f'head_size={head_size} is no multiple of 8 up to {LARGEST_HEAD}'
  if dtype not in DTYPES:
    return f'{dtype!r} is none of {DTYPES}'
  if device is not None:
    kind = device.device_kind
    if not kind.startswith('NVIDIA') or float(device.compute_capability) < 8:
      return f'{kind} is no NVIDIA GPU of compute capability 8.0 or higher'
  return ''


def flash(
  q_BTKGH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  visibility: Visibility,
  *,
  own_gradients: bool = False,
) -> jax.Array:
  """Attention by the kernels of JAX's default device.

  To compile for a GPU that is not here, trace under `jax.default_device` of one that
  `glm_jax.planning.topologies` describes.

  Args:
    q_BTKGH: queries, grouped by key head.
    k_BSKH: keys.
    v_BSKH: values.
    visibility: [B, T] intervals into the S keys.
    own_gradients: by `hopper.gradients` instead of tokamax's kernel.

  Returns:
    [B, T, K, G, H] in the dtype of `q_BTKGH`; zeros where an interval is empty.

  Raises:
    UserError: no kernel for the head size, the dtype or the device; no tokamax.
  """
  B, T, K, G, H = q_BTKGH.shape
  lacking = lacks(H, q_BTKGH.dtype, backend.get_default_device())
  configs.check(
    not lacking,
    "attention 'gpu_tokamax' must have a kernel here",
    lacking,
    "change that, or choose 'chunked'",
  )
  start, end = visibility
  sees = end > start
  # The statistics of a softmax over nothing are infinite. Such a query, mostly padding at
  # the end, sees the row's last visible key, and its output and gradient are dropped.
  # In a row of padding alone that is key 0: an interval is never empty below.
  end = jnp.where(sees, end, 1)
  last = end.max(1, keepdims=True)
  start, end = jnp.where(sees, start, last - 1), jnp.where(sees, end, last)
  # Padded queries repeat the last interval, not to be empty either; padded keys are behind
  # the end of every interval.
  out_BTNH = _kernel(
    _pad(q_BTKGH.reshape(B, T, K * G, H)),
    _pad(k_BSKH),
    _pad(v_BSKH),
    _pad(start, 'edge'),
    _pad(end, 'edge'),
    own_gradients,
  )
  out_BTKGH = out_BTNH[:, :T].reshape(q_BTKGH.shape)
  return jnp.where(sees[..., None, None, None], out_BTKGH, 0)


def _pad(x: jax.Array, mode: str = 'constant') -> jax.Array:
  """[B, T, ...] -> [B, T', ...]."""
  padding = [(0, 0), (0, -x.shape[1] % _TILE)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, padding, mode=mode)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _kernel(q, k, v, start, end, own_gradients):
  return _forward(q, k, v, start, end, own_gradients)[0]


def _forward(q, k, v, start, end, own_gradients):
  """The forward pass and what the backward one needs, by names that remat can save.

  tokamax has a rule of its own, but what it keeps bears no name.
  """
  # `Mask` is not exported by tokamax; its public function takes no interval a query.
  from tokamax._src.ops.attention.base import Mask

  mask = Mask(k_start=start[:, None], k_end=end[:, None])
  results = _op()(q, k, v, mask=mask, return_residuals=True)
  out, statistics = jax.tree.map(lambda x: checkpoint_name(x, 'attention'), results)
  return out, (q, k, v, start, end, out, statistics)


def _backward(own_gradients, saved, d_out):
  from tokamax._src.ops.attention.base import Mask

  q, k, v, start, end, out, statistics = saved
  if own_gradients:
    # Only a GPU's program needs Mosaic, which takes half a second to import.
    from glm_jax.attention import hopper

    return *hopper.gradients(q, k, v, d_out, out, statistics, start, end), None, None
  if is_hopper(backend.get_default_device()):
    mask = Mask(k_start=start[:, None], k_end=end[:, None])
    return *_gradients(q, k, v, mask, out, statistics, d_out), None, None
  # Lengths are multiples of _TILE, and so is this: at least 128 queries a block.
  size = math.gcd(q.shape[1], _MASKED)

  # [.., T, ..] -> [T / size, .., size, ..], for a scan over blocks of queries.
  def split(x, axis):
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)

  def block(totals, args):
    q, start, end, out, d_out, *statistics = args
    # A bool [B, 1, size, S], the one form that Triton's backward takes.
    mask = Mask(Visibility(start, end).mask(k.shape[1])[:, None])
    d_q, *d_kv = _gradients(q, k, v, mask, out, tuple(statistics), d_out)
    return [total + d for total, d in zip(totals, d_kv, strict=True)], d_q

  rows = [split(x, 1) for x in (q, start, end, out, d_out)]
  rows += [split(x, 2) for x in statistics]  # [B, N, T]
  totals = [jnp.zeros(x.shape, jnp.float32) for x in (k, v)]
  (d_k, d_v), d_q = jax.lax.scan(block, totals, rows)
  d_q = jnp.moveaxis(d_q, 0, 1).reshape(q.shape)
  return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_kernel.defvjp(_forward, _backward)


def _gradients(q, k, v, mask, out, statistics, d_out):
  # An op's `vjp` wants the arguments as its forward call normalised them, which `bind`
  # does without running it. Both are internal to tokamax; tests/gpu_attention_test.py
  # compares the gradients with those of dense attention.
  op = _op()
  bound = op.bind(q, k, v, mask=mask)
  settings = {name: x for name, x in bound.kwargs.items() if name != 'return_residuals'}
  gradients = op.vjp(statistics, out, d_out, *bound.args, **settings)
  return gradients['q'], gradients['k'], gradients['v']


def _op() -> Any:
  from absl import flags
  from tokamax._src.ops.attention import pallas_mosaic_gpu, pallas_triton

  if not flags.FLAGS.is_parsed():  # else tokamax would parse this program's command line
    flags.FLAGS.mark_as_parsed()
  if is_hopper(backend.get_default_device()):
    return pallas_mosaic_gpu.PallasMosaicGpuFlashAttention()
  return pallas_triton.PallasTritonFlashAttention()


def is_hopper(device: Any) -> bool:
  """Whether a JAX device is of compute capability 9."""
  return 9 <= float(getattr(device, 'compute_capability', '0')) < 10
