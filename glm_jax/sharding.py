"""The mesh, and the tables that map logical axis names to its axes.

A mesh always exists; one device is a mesh of one. Everything runs under
`jax.set_mesh` (under the older `with mesh:` Flax drops activation constraints without
a word) and `nn.logical_axis_rules`; `active(layout)` is both. Most of the program leaves
the rest to XLA; what it must not decide runs on each device's part: see `per_device`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glm_jax import configs

AXES = ('data', 'fsdp', 'sequence', 'tensor')

_FSDP = {
  # Activations: rows over data and fsdp, their tokens over sequence, heads and MLP over
  # tensor.
  'act_batch': ('data', 'fsdp'),
  'act_length': 'sequence',
  'act_embed': None,
  'act_heads': 'tensor',
  'act_mlp': 'tensor',
  # Weights: the model width over fsdp, the other axis over tensor.
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
  'head_dim': None,
  'norm': None,  # too small to be worth gathering
  'layers': None,
}

RULES = {
  'fsdp': _FSDP,
  # Plain data parallelism: weights whole, but for the tensor axis.
  'replicated': {**_FSDP, 'embed': None},
  # The least memory: weights over the data axis, too.
  'fsdp_data': {**_FSDP, 'embed': ('fsdp', 'data')},
}
"""name -> logical axis -> mesh axis, axes, or None (whole on every device)."""

# Logical axes of one array: no two of them can be spread over the same mesh axis.
_TOGETHER = (
  *(('layers', 'embed', heads, 'head_dim') for heads in ('heads', 'kv_heads')),
  ('layers', 'embed', 'mlp'),
  ('layers', 'norm'),
  ('embed', 'vocab'),
  *(
    ('act_batch', 'act_length', name)
    for name in ('act_embed', 'act_heads', 'heads', 'kv_heads', 'act_mlp', 'mlp', 'vocab')
  ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each axis; -1 (at most one) takes what is left.

  Attributes:
    data: copies of the model, each with rows of its own; the outermost, so that slices of
      a pod, which a slower network joins, differ in it alone.
    fsdp: rows of its own, too, but parameters and optimizer are spread over it.
    sequence: the tokens of a row are spread over it, for long rows; keys and values are
      gathered for attention.
    tensor: heads, MLP and vocabulary are spread over it.
    rules: a table of `RULES`.
    overrides: logical axes that differ from it, such as {'vocab': None}.
  """

  data: int = -1
  fsdp: int = 1
  sequence: int = 1
  tensor: int = 1
  rules: str = 'fsdp'
  overrides: dict[str, str | tuple[str, ...] | None] = dataclasses.field(
    default_factory=dict
  )

  def __post_init__(self):
    configs.check_types(self)
    sizes = list(self.sizes.values())
    configs.check(
      all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
      'MeshConfig axes must be 1 or more, and one of them may be -1 (the rest)',
      _product(self.sizes),
      'correct them',
    )
    configs.check(
      self.rules in RULES,
      f'MeshConfig.rules must be one of {tuple(RULES)}',
      repr(self.rules),
      'choose one of these',
    )
    for name, axes in self.overrides.items():
      configs.check(
        name in _FSDP,
        f'MeshConfig.overrides must be of the logical axes {tuple(_FSDP)}',
        repr(name),
        'correct the name',
      )
      configs.check(
        set(_as_tuple(axes)) <= {*AXES},
        f'MeshConfig.overrides must lead to mesh axes of {AXES}, or None',
        f'{name!r}: {axes!r}',
        'correct the axis',
      )
    for names in _TOGETHER:
      used = [axis for name in names for axis in _as_tuple(self.table[name])]
      configs.check(
        len(used) == len({*used}),
        f'the mesh axes of {names}, which one array may have, must differ',
        str({name: self.table[name] for name in names}),
        'change MeshConfig.overrides',
      )

  @property
  def sizes(self) -> dict[str, int]:
    return {axis: getattr(self, axis) for axis in AXES}

  @property
  def table(self) -> dict[str, Any]:
    """Logical axis -> mesh axes."""
    return {**RULES[self.rules], **self.overrides}


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh, and what its axes are used for.

  Attributes:
    mesh: of all devices.
    rules: logical axis -> mesh axes, as pairs.
  """

  mesh: Mesh
  rules: tuple[tuple[str, Any], ...]

  @property
  def shape(self) -> dict[str, int]:
    return dict(self.mesh.shape)

  @property
  def size(self) -> int:
    return self.mesh.size

  @property
  def devices(self) -> np.ndarray:
    return self.mesh.devices

  @property
  def device_kind(self) -> str:
    return self.mesh.devices.flat[0].device_kind

  def spec(self, *logical: str | None) -> PartitionSpec:
    """Mesh axes for logical ones."""
    return nn.logical_to_mesh_axes(logical, self.rules)

  def count(self, logical: str) -> int:
    """Parts that a logical axis is cut into."""
    axes = _as_tuple(dict(self.rules)[logical])
    return int(np.prod([self.shape[axis] for axis in axes], dtype=int))

  def words(self, logical: str) -> str:
    """The mesh axes of a logical one, for a message."""
    return ' x '.join(_as_tuple(dict(self.rules)[logical]))


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Layout:
  """The mesh over all devices of all processes, neighbours where the network has them.

  Slices of a pod are the outer part of the data axis.

  Raises:
    ValueError: the axes do not multiply to the number of devices, or data does not divide
      over the slices.
  """
  devices = jax.devices() if devices is None else devices
  known = int(np.prod([size for size in config.sizes.values() if size != -1]))
  sizes = {k: len(devices) // known if v == -1 else v for k, v in config.sizes.items()}
  configs.check(
    int(np.prod(list(sizes.values()))) == len(devices),
    f'the mesh must multiply to the {len(devices)} devices',
    _product(config.sizes),
    'change MeshConfig (data=-1 takes what is left)',
  )
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  configs.check(
    sizes['data'] % slices == 0,
    f'the data axis must divide by the {slices} slices',
    f'data={sizes["data"]}',
    'change MeshConfig.data',
  )
  if slices == 1:
    shape = tuple(sizes.values())
    arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    inside = (sizes['data'] // slices, *list(sizes.values())[1:])
    arranged = mesh_utils.create_hybrid_device_mesh(
      inside, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
  mesh = Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  return Layout(mesh, tuple(config.table.items()))


@contextlib.contextmanager
def active(layout: Layout) -> Iterator[None]:
  """Inside, activations are constrained and jit runs over the mesh."""
  with jax.set_mesh(layout.mesh), nn.logical_axis_rules(layout.rules):
    yield


def check_fits(
  model: Any, batch_size: int, microbatches: int, length: int, layout: Layout
) -> None:
  """Raises ValueError if the model or the batch does not divide over the mesh.

  Args:
    model: a model configuration.
    batch_size: rows of the global batch.
    microbatches: parts of it that are worked on one after the other.
    length: positions of a row.
    layout: see `make_mesh`.
  """
  rows = layout.count('act_batch')
  configs.check(
    batch_size % (rows * microbatches) == 0,
    f'BATCH_SIZE must divide by {layout.words("act_batch")} x microbatches',
    f'BATCH_SIZE={batch_size}, {layout.words("act_batch")}={rows}, '
    f'microbatches={microbatches}',
    'change one of them',
  )
  parts = layout.count('act_length')
  configs.check(
    parts == 1 or length % (2 * parts) == 0,
    f"a row's positions must divide by twice the mesh axis {layout.words('act_length')}",
    f'{length} positions, {layout.words("act_length")}={parts}',
    'change TASK_FEATURE_LENGTHS or MeshConfig.sequence',
  )
  for name, logical in (
    ('num_heads', 'heads'),
    ('num_heads', 'act_heads'),
    ('inner_size', 'mlp'),
    ('inner_size', 'act_mlp'),
    ('vocab_size', 'vocab'),
    ('hidden_size', 'embed'),
  ):
    size, parts = getattr(model, name), layout.count(logical)
    configs.check(
      size % parts == 0,
      f"the model's {name} must divide by the mesh axis {layout.words(logical)}",
      f'{name}={size}, {layout.words(logical)}={parts}',
      'change one of them',
    )
  # Few key heads are copied, so that each device has the one that its queries use.
  heads, parts = model.num_kv_heads, layout.count('act_heads')
  axis = layout.words('act_heads')
  configs.check(
    heads % parts == 0 or parts % heads == 0,
    f"the model's num_kv_heads must divide by the mesh axis {axis}, or the other way round",
    f'num_kv_heads={heads}, {axis}={parts}',
    'change one of them',
  )


def shardings(logical: Any, shapes: Any, layout: Layout) -> Any:
  """Trees of logical PartitionSpecs and of shapes to NamedShardings.

  Key heads that are fewer than their devices are whole on each.
  """

  def place(spec: PartitionSpec, shape: Any) -> NamedSharding:
    names = [
      None if name == 'kv_heads' and shape.shape[i] % layout.count(name) else name
      for i, name in enumerate(spec)
    ]
    return NamedSharding(layout.mesh, layout.spec(*names))

  return jax.tree.map(
    place, logical, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec)
  )


def batch_sharding(layout: Layout) -> NamedSharding:
  """Of arrays [B, T]."""
  return NamedSharding(layout.mesh, layout.spec('act_batch', 'act_length'))


def replicated(layout: Layout) -> NamedSharding:
  return NamedSharding(layout.mesh, PartitionSpec())


def row_share(layout: Layout) -> tuple[int, int]:
  """Which part of every batch's rows this process reads: (number, of how many).

  Processes that share rows, since a tensor or sequence axis spans them, read the same.

  Raises:
    ValueError: the rows of a process are no even share.
  """
  rows = layout.count('act_batch')
  where = batch_sharding(layout).devices_indices_map((rows, layout.count('act_length')))
  held: dict[int, set[int]] = {}
  for device, (row, _) in where.items():
    held.setdefault(device.process_index, set()).update(range(*row.indices(rows)))
  shares = sorted({tuple(sorted(rows)) for rows in held.values()})
  configs.check(
    sum(map(len, shares)) == rows and len({*map(len, shares)}) == 1,
    'each process must hold an even share of the rows',
    f'{len(held)} processes and {_product(layout.shape)}',
    'let tensor x sequence divide or be divided by the devices of a process',
  )
  return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def place(batch: Any, layout: Layout) -> Any:
  """This process's rows of a numpy batch as arrays of the global batch."""
  sharding, (_, shares) = batch_sharding(layout), row_share(layout)

  def put(rows: np.ndarray) -> jax.Array:
    shape = (rows.shape[0] * shares, *rows.shape[1:])
    return jax.make_array_from_process_local_data(sharding, rows, shape)

  # A process has all tokens of its rows, whichever part its devices need.
  return jax.tree.map(put, batch)


def axes_of(logical: str) -> tuple[str, ...]:
  """The mesh axes that stand for a logical one here; () without a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return ()
  return _as_tuple(nn.logical_to_mesh_axes((logical,))[0])


def axis_size(logical: str) -> int:
  """Parts that a logical axis is cut into here; 1 without a mesh."""
  shape = jax.sharding.get_abstract_mesh().shape
  return int(np.prod([shape[axis] for axis in axes_of(logical)], dtype=int))


def per_device(
  f: Callable[..., Any], in_axes: Any, out_axes: Any, *, kernels: bool = False
) -> Callable[..., Any]:
  """`f` on each device's part of its arguments; without a mesh, `f` itself.

  Args:
    f: may use collectives over `axes_of(...)`.
    in_axes: for each argument, a tuple of logical axes (of every array in it), or a
      PartitionSpec.
    out_axes: the same for the result, or a list of them for several results.
    kernels: whether `f` calls kernels of its own, of which JAX cannot tell which axes
      their results vary over.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return f

  def spec(axes: Any) -> PartitionSpec:
    return axes if isinstance(axes, PartitionSpec) else nn.logical_to_mesh_axes(axes)

  in_specs = tuple(map(spec, in_axes))
  out_specs = tuple(map(spec, out_axes)) if isinstance(out_axes, list) else spec(out_axes)
  return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=not kernels)


# Causal rows cost more towards their end: of a sequence cut into 2 n chunks, device i of n
# holds chunks i and 2 n - 1 - i, so that all have the same work.


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
  B, n, t = x.shape[:3]
  x = x.reshape(B, n, 2, t // 2, *x.shape[3:])
  x = jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1)
  return x.reshape(B, n * t, *x.shape[3:])


def _exchange(x: jax.Array, back: bool) -> jax.Array:
  n = axis_size('act_length')
  if n == 1:
    return x
  axes = ('act_batch', 'act_length', *[None] * (x.ndim - 2))
  # Chunk 2 i, the first of device i, belongs to `even[i]`; its second to `odd[i]`.
  place = lambda chunk: min(chunk, 2 * n - 1 - chunk)
  even, odd = ([(i, place(2 * i + j)) for i in range(n)] for j in (0, 1))
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


def _as_tuple(axes: Any) -> tuple[str, ...]:
  return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _product(sizes: dict[str, int]) -> str:
  return ' x '.join(f'{k}={v}' for k, v in sizes.items())
