"""The one attention function, and the choice of its backend."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from glm_jax import configs, sharding
from glm_jax.attention import chunked, cpu, dense, gpu, splash, tokamax_splash
from glm_jax.batch import Visibility

_PLATFORM = {
  'tpu_splash': 'tpu',
  'tpu_tokamax': 'tpu',
  'gpu_tokamax': 'gpu',
  'gpu_hopper': 'gpu',
  'cpu_dense': 'cpu',
}
"""The backends that run on one platform alone; 'gpu_hopper' is never chosen, for it
was compiled for its GPU and interpreted, and not yet run on one."""

BACKENDS = ('auto', 'dense', 'chunked', *_PLATFORM)

DENSE = ('dense', 'cpu_dense')
"""Those that hold the scores of all pairs; of these and 'chunked', the length says which is
best."""

_ONCE = 'cpu_once'  # what a CPU does with the one query of a decoder's step

_OF_TOKAMAX = ('tpu_tokamax', 'gpu_tokamax', 'gpu_hopper')

# By compiled estimates (README): the two cores of a v4 or v5p share JAX's kernel alone;
# elsewhere tokamax's, which does not mask full blocks, costs fewer cycles.
_BEST = {
  'TPU v4': 'tpu_splash',
  'TPU v5': 'tpu_splash',
  'TPU v5 lite': 'tpu_tokamax',
  'TPU v6 lite': 'tpu_tokamax',
  'TPU7x': 'tpu_tokamax',
}

# Up to this length the score array is small, and one matmul beats a loop of chunks.
_DENSE_LENGTH = 1024


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['visibility', 'metadata'],
  meta_fields=['backend', 'spread'],
)
@dataclasses.dataclass(frozen=True)
class Seen:
  """A `Visibility` with what its backend computes from it, once for all layers.

  Attributes:
    visibility: [B, T] intervals into the T keys of a row, in the order of the text.
    metadata: what the backend computed, on each device for its part; None if it needs none.
    backend: never 'auto'.
    spread: whether the rows are in the order of `sharding.spread`.
  """

  visibility: Visibility
  metadata: Any
  backend: str
  spread: bool


def choose(model: Any, compute: Any, device: Any, length: int) -> tuple[str, str]:
  """The backend for training a model on a device, and why.

  Args:
    model: a model configuration.
    compute: its `ComputeConfig`, whose `attention` may be 'auto'.
    device: a JAX device.
    length: positions of a row.

  Raises:
    UserError: the backend that the configuration asks for lacks something.
  """
  platform = 'gpu' if device.platform in ('gpu', 'cuda', 'rocm') else device.platform
  plain = _plain(length)
  asked, dtype = compute.attention, compute.dtype
  if asked != 'auto':
    lacking = _lacks(asked, model, dtype, platform, device, length)
    configs.check(
      not lacking,
      f'ComputeConfig.attention={asked!r} must be able to compute the model here',
      lacking,
      f"set it to 'auto', or {plain!r}",
    )
    return asked, 'as set'
  # In order of preference. JAX's own kernel is the fallback on every TPU, since it needs
  # no further package and takes rows of any length.
  candidates = {
    'tpu': (_BEST.get(device.device_kind, 'tpu_splash'), 'tpu_splash'),
    'gpu': ('gpu_tokamax',),
    'cpu': ('cpu_dense',) if plain == 'dense' else (),
  }.get(platform, ())
  why = f'best on {device.device_kind}'
  for backend in candidates:
    lacking = _lacks(backend, model, dtype, platform, device, length)
    if not lacking:
      return backend, why
    why = f'{backend} is out: {lacking}'
  return plain, why


def _lacks(
  backend: str, model: Any, dtype: str, platform: str, device: Any, length: int
) -> str:
  """What a backend cannot do for a model; '' if nothing."""
  if backend not in _PLATFORM:
    return ''
  if _PLATFORM[backend] != platform:
    return f'it runs on {_PLATFORM[backend]}, and this is {platform}'
  # None holds the probabilities that dropout would act on.
  if getattr(model, 'attention_dropout', 0):
    return f'attention_dropout={model.attention_dropout} needs the probabilities'
  if backend == 'tpu_tokamax' and length > splash.LONGEST_PACKED:
    return f'rows of {length} positions exceed {splash.LONGEST_PACKED}'
  if backend in _OF_TOKAMAX and importlib.util.find_spec('tokamax') is None:
    return f"tokamax is missing (pip install 'glm_jax[{platform}]')"
  if _PLATFORM[backend] == 'gpu':
    lacking = gpu.lacks(model.head_size, dtype, device)
    if not lacking and backend == 'gpu_hopper' and not gpu.is_hopper(device):
      lacking = f'{device.device_kind} is no Hopper GPU'
    return lacking
  return ''


def prepare(visibility: Visibility, backend: str = 'auto', *, spread: bool = False) -> Seen:
  """Computes once a step what every layer's `attend` needs.

  Args:
    visibility: [B, T] intervals into the T keys of the rows themselves.
    backend: of `BACKENDS`; 'auto' is dense up to 1,024 positions, else chunked.
    spread: whether the rows are in the order of `sharding.spread`.
  """
  _check_backend(backend)
  if backend == 'auto':
    backend = _plain(visibility.key_start.shape[1])
  module = {'tpu_splash': splash, 'tpu_tokamax': tokamax_splash}.get(backend)
  if module is None:
    return Seen(visibility, None, backend, spread)

  def metadata(visibility: Visibility) -> Any:
    # A token's interval begins where its document does, so the starts of the queries are
    # the documents of the keys. The kernels need those of all keys of a row, while the
    # intervals of the queries stay cut over devices.
    start, end = visibility
    documents = jnp.where(end > start, start, -1)
    documents = sharding.gather_length(documents, spread=spread)
    return module.prepare(visibility, documents)

  with jax.named_scope('attention_metadata'):
    rows = ('act_batch', 'act_length')
    build = sharding.per_device(metadata, (rows,), _by_device(), kernels=True)
    return Seen(visibility, build(visibility), backend, spread)


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  seen: Seen | Visibility,
  *,
  backend: str = 'auto',
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """Softmax attention in which each query sees one interval of keys.

  `softmax(q k^T / sqrt(H)) v` with the softmax in float32; a query whose interval is
  empty gets zeros. Query head `n` uses key/value head `n // (N // K)`.

  Args:
    q_BTNH: queries, any float dtype.
    k_BSKH: keys, N a multiple of K.
    v_BSKH: values.
    seen: int32 [B, T] intervals into the S keys; or, where rows attend to themselves,
      what `prepare` made of them, and each device computes its own rows and heads.
    backend: with a `Visibility`, 'dense', which holds [T, S] scores, or 'chunked', which
      never does; 'auto' is dense up to 1,024 queries.
    dropout_rate: share of the attention probabilities set to zero.
    dropout_key: a key for that; None means no dropout.

  Returns:
    [B, T, N, H] in the dtype of `q_BTNH`.

  Raises:
    UserError: an unknown backend, or one that cannot do what is asked.
  """
  B, T, _, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  chex.assert_shape([k_BSKH, v_BSKH], (B, S, K, H))
  if isinstance(seen, Visibility):
    # A cache: nothing was prepared, and XLA decides what moves between devices.
    _check_backend(backend)
    chex.assert_shape(list(seen), (B, T))
    plain = _plain(T) if backend == 'auto' else backend
    attend_by = lambda name: (
      lambda q, k, v, seen: _local(name, q, k, v, seen, None, dropout_rate, dropout_key)
    )
    arrays = (q_BTNH, k_BSKH, v_BSKH, seen)
    if backend == 'auto' and T == 1 and dropout_key is None and sharding.alone():
      by_platform = {'cpu': attend_by(_ONCE), 'default': attend_by(plain)}
      return jax.lax.platform_dependent(*arrays, **by_platform)
    return attend_by(plain)(*arrays)
  parts = sharding.axis_size('act_heads')
  if K % parts:  # every device gets the one head that its queries use
    k_BSKH, v_BSKH = (jnp.repeat(x, parts // K, axis=2) for x in (k_BSKH, v_BSKH))
  heads = ('act_batch', 'act_length', 'act_heads', None)
  # shard_map wants an array for every argument: without dropout, a key that nobody uses.
  key = jax.random.key(0) if dropout_key is None else dropout_key

  def attend_part(q, k, v, visibility, metadata, key):
    # This device's queries see keys of the whole row, in the order of the text, which is
    # the order that intervals count in.
    k, v = (sharding.gather_length(x, spread=seen.spread) for x in (k, v))
    used_key = None if dropout_key is None else jax.random.fold_in(key, _device())
    return _local(seen.backend, q, k, v, visibility, metadata, dropout_rate, used_key)

  rows = ('act_batch', 'act_length')
  run = sharding.per_device(
    attend_part, (heads, heads, heads, rows, _by_device(), ()), heads, kernels=True
  )
  return run(q_BTNH, k_BSKH, v_BSKH, seen.visibility, seen.metadata, key)


def _local(backend, q_BTNH, k_BSKH, v_BSKH, visibility, metadata, rate, key):
  """Calls the backend on the arrays of one device."""
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  configs.check(
    key is None or backend not in _PLATFORM,
    'attention with dropout must be dense or chunked',
    repr(backend),
    'set attention_dropout to 0, or choose one of these',
  )
  with jax.named_scope(f'attention_{backend}'):
    if backend in ('tpu_splash', 'tpu_tokamax'):
      module = splash if backend == 'tpu_splash' else tokamax_splash
      configs.check(
        metadata is not None,
        f'attention {backend!r} must be given what prepare() returns',
        'a Visibility',
        "use 'dense' or 'chunked' for a cache",
      )
      return module.attend(q_BTNH, k_BSKH, v_BSKH, metadata)
    # Query heads of one key head are neighbours, n = k G + g, as `attend` promises.
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    if _PLATFORM.get(backend) == 'gpu':  # names what remat may save itself, as Splash does
      own = backend == 'gpu_hopper'
      out = gpu.flash(q_BTKGH, k_BSKH, v_BSKH, visibility, own_gradients=own)
      return out.reshape(B, T, N, H)
    if backend in ('cpu_dense', _ONCE):
      on_cpu = cpu.attend if backend == 'cpu_dense' else cpu.attend_once
      out = on_cpu(q_BTKGH, k_BSKH, v_BSKH, visibility)
    else:
      implementation = {'dense': dense.attend, 'chunked': chunked.attend}[backend]
      out = implementation(q_BTKGH, k_BSKH, v_BSKH, visibility, rate, key)
    return checkpoint_name(out.reshape(B, T, N, H), 'attention')


def _plain(length: int) -> str:
  return 'dense' if length <= _DENSE_LENGTH else 'chunked'


def _check_backend(backend: str) -> None:
  configs.check(
    backend in BACKENDS,
    f'attention must be one of {BACKENDS}',
    repr(backend),
    'choose one of these',
  )


def _by_device() -> PartitionSpec:
  """The sharding of metadata: a part for each device with rows, or tokens, of its own."""
  # On its first axis alone: what a device prepared for its own rows and tokens is laid end
  # to end there, whatever the other axes of an array mean.
  axes = (*sharding.axes_of('act_batch'), *sharding.axes_of('act_length'))
  return PartitionSpec(axes)


def _device() -> jax.Array | int:
  """A number that differs between the devices that compute different probabilities."""
  names = ('act_batch', 'act_length', 'act_heads')
  axes = tuple(axis for name in names for axis in sharding.axes_of(name))
  return jax.lax.axis_index(axes) if axes else 0
