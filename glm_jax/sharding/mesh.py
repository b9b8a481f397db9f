"""The mesh, and the tables that map logical axis names to its axes.

A mesh always exists; one device is a mesh of one. Everything runs under
`jax.set_mesh` (under the older `with mesh:` Flax drops activation constraints without
a word) and `nn.logical_axis_rules`; `active(layout)` is both.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from glm_jax import configs
from glm_jax.configs import one_of

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
  rules: Annotated[str, one_of(*RULES)] = 'fsdp'
  overrides: dict[str, str | tuple[str, ...] | None] = dataclasses.field(
    default_factory=dict
  )

  def __post_init__(self):
    configs.check_fields(self)
    sizes = list(self.sizes.values())
    configs.check(
      all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
      'MeshConfig axes must be 1 or more, and one of them may be -1 (the rest)',
      product_of(self.sizes),
      'give each axis its number of devices',
    )
    for name, axes in self.overrides.items():
      configs.check(
        name in _FSDP,
        f'MeshConfig.overrides must be of the logical axes {tuple(_FSDP)}',
        repr(name),
        'choose one of these',
      )
      configs.check(
        set(as_tuple(axes)) <= {*AXES},
        f'MeshConfig.overrides must lead to mesh axes of {AXES}, or None',
        f'{name!r}: {axes!r}',
        'choose among these',
      )
    # JAX would refuse such a sharding, too, but only once a step is traced, and in terms of
    # one array's dimensions.
    for names in _TOGETHER:
      used = [axis for name in names for axis in as_tuple(self.table[name])]
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
    axes = as_tuple(dict(self.rules)[logical])
    return int(np.prod([self.shape[axis] for axis in axes], dtype=int))

  def replace(self, **axes: Any) -> Layout:
    """The same mesh, with other mesh axes (or None) for some logical ones."""
    return Layout(self.mesh, tuple({**dict(self.rules), **axes}.items()))

  def words(self, logical: str) -> str:
    """The mesh axes of a logical one, for a message."""
    return ' x '.join(as_tuple(dict(self.rules)[logical]))


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Layout:
  """The mesh over all devices of all processes, neighbours where the network has them.

  Slices of a pod are the outer part of the data axis.

  Raises:
    UserError: the axes do not multiply to the number of devices, or data does not divide
      over the slices.
  """
  devices = jax.devices() if devices is None else devices
  known = int(np.prod([size for size in config.sizes.values() if size != -1]))
  sizes = {k: len(devices) // known if v == -1 else v for k, v in config.sizes.items()}
  configs.check(
    int(np.prod(list(sizes.values()))) == len(devices),
    f'the mesh must multiply to the {len(devices)} devices',
    product_of(config.sizes),
    'change MeshConfig (data=-1 takes what is left)',
  )
  # Only devices of a pod of several slices have a slice_index.
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  configs.check(
    sizes['data'] % slices == 0,
    f'the data axis must divide by the {slices} slices',
    f'data={sizes["data"]}',
    'change MeshConfig.data',
  )
  # Both functions follow the torus of the network. Two axes of the mesh may share one of
  # its dimensions, such as tensor=2 and fsdp=8 a dimension of 16, which is no default.
  if slices == 1:
    shape = tuple(sizes.values())
    arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    slice_shape = (sizes['data'] // slices, *list(sizes.values())[1:])
    arranged = mesh_utils.create_hybrid_device_mesh(
      slice_shape, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
  mesh = Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  return Layout(mesh, tuple(config.table.items()))


@contextlib.contextmanager
def active(layout: Layout) -> Iterator[None]:
  """A context in which activations are constrained and jit runs over the mesh."""
  with jax.set_mesh(layout.mesh), nn.logical_axis_rules(layout.rules):
    yield


def check_fits(
  model: Any, batch_size: int, microbatches: int, length: int, layout: Layout
) -> None:
  """Raises UserError if the model or the batch does not divide over the mesh.

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
  # Twice, since a device holds an early and a late chunk of each row (`spread`).
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


def as_tuple(axes: Any) -> tuple[str, ...]:
  """Mesh axes as the rule tables write them: None, one, or several."""
  return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def product_of(sizes: dict[str, int]) -> str:
  """Sizes of axes, for a message."""
  return ' x '.join(f'{k}={v}' for k, v in sizes.items())
