"""The mesh, and the one table that maps logical axis names to its axes.

A mesh always exists; one device is a mesh of one. Everything runs under
`jax.set_mesh` (under the older `with mesh:` Flax drops activation constraints without
a word) and `nn.logical_axis_rules(RULES)`; `active(mesh)` is both.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from glm_jax import configs

AXES = ('data', 'fsdp', 'tensor')

RULES = (
  # Activations: rows over data and fsdp, heads and MLP over tensor.
  ('act_batch', ('data', 'fsdp')),
  ('act_length', None),
  ('act_embed', None),
  ('act_heads', 'tensor'),
  ('act_kv_heads', 'tensor'),
  ('act_mlp', 'tensor'),
  ('act_vocab', 'tensor'),
  # Weights: the model width over fsdp, the other axis over tensor.
  ('embed', 'fsdp'),
  ('heads', 'tensor'),
  ('kv_heads', 'tensor'),
  ('mlp', 'tensor'),
  ('vocab', 'tensor'),
  ('head_dim', None),
  ('layers', None),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each axis; -1 (at most one) takes what is left.

  Attributes:
    data: copies of the model, each with rows of its own.
    fsdp: rows of its own, too, but parameters and optimizer are spread over it.
    tensor: heads, MLP and vocabulary are spread over it.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1

  def __post_init__(self):
    configs.check_types(self)
    sizes = dataclasses.astuple(self)
    configs.check(
      all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
      'MeshConfig axes must be 1 or more, and one of them may be -1 (the rest)',
      f'data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}',
      'correct them',
    )


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
  """The mesh over all devices of all processes.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dataclasses.asdict(config)
  known = int(np.prod([size for size in sizes.values() if size != -1]))
  sizes = {k: len(devices) // known if v == -1 else v for k, v in sizes.items()}
  configs.check(
    int(np.prod(list(sizes.values()))) == len(devices),
    f'the mesh must multiply to the {len(devices)} devices',
    ' x '.join(f'{k}={v}' for k, v in dataclasses.asdict(config).items()),
    'change MeshConfig (data=-1 takes what is left)',
  )
  return jax.make_mesh(
    tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
  )


@contextlib.contextmanager
def active(mesh: Mesh) -> Iterator[None]:
  """Inside, activations are constrained and jit runs over `mesh`."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def check_fits(model: Any, batch_size: int, microbatches: int, mesh: Mesh) -> None:
  """Raises ValueError if the model or the batch does not divide over the mesh.

  Args:
    model: a model configuration.
    batch_size: rows of the global batch.
    microbatches: parts of it that are worked on one after the other.
    mesh: see `make_mesh`.
  """
  rows = mesh.shape['data'] * mesh.shape['fsdp']
  configs.check(
    batch_size % (rows * microbatches) == 0,
    'BATCH_SIZE must divide by data x fsdp x microbatches',
    f'BATCH_SIZE={batch_size}, data x fsdp={rows}, microbatches={microbatches}',
    'change one of them',
  )
  for name, axis in (
    ('num_heads', 'tensor'),
    ('num_kv_heads', 'tensor'),
    ('inner_size', 'tensor'),
    ('vocab_size', 'tensor'),
    ('hidden_size', 'fsdp'),
  ):
    size = getattr(model, name)
    configs.check(
      size % mesh.shape[axis] == 0,
      f"the model's {name} must divide by the mesh axis {axis}",
      f'{name}={size}, {axis}={mesh.shape[axis]}',
      'change one of them',
    )


def shardings(logical: Any, mesh: Mesh) -> Any:
  """Trees of logical PartitionSpecs to NamedShardings."""
  return nn.logical_to_mesh_sharding(logical, mesh, RULES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over data and fsdp."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def place(batch: Any, mesh: Mesh) -> Any:
  """This process's rows of a numpy batch as arrays of the global batch."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch
  )
