"""Arrays on the mesh: parameters by their logical axes, batches by their rows."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax import configs
from glm_jax.sharding.mesh import Layout, product_of


def shardings(logical: Any, shapes: Any, layout: Layout) -> Any:
  """Turns trees of logical PartitionSpecs and of shapes into one of NamedShardings.

  Key heads that do not divide over their devices are whole on each.
  """

  def sharding_of(spec: PartitionSpec, shape: Any) -> NamedSharding:
    names = [
      None if name == 'kv_heads' and shape.shape[i] % layout.count(name) else name
      for i, name in enumerate(spec)
    ]
    return NamedSharding(layout.mesh, layout.spec(*names))

  return jax.tree.map(
    sharding_of, logical, shapes, is_leaf=lambda node: isinstance(node, PartitionSpec)
  )


def batch_sharding(layout: Layout, rank: int = 2) -> NamedSharding:
  """The sharding of arrays [B, T], or [B]."""
  return NamedSharding(layout.mesh, layout.spec(*('act_batch', 'act_length')[:rank]))


def replicated(layout: Layout) -> NamedSharding:
  return NamedSharding(layout.mesh, PartitionSpec())


def row_share(layout: Layout) -> tuple[int, int]:
  """Which part of every batch's rows this process reads: (number, of how many).

  Processes that share rows, since a tensor or sequence axis spans them, read the same.

  Raises:
    UserError: the rows of a process are no even share.
  """
  # The smallest batch that can be cut stands for all: one row for each part of the rows.
  rows = layout.count('act_batch')
  indices = batch_sharding(layout).devices_indices_map((rows, layout.count('act_length')))
  # Rows by process, read off the devices: a process's devices need not be neighbours along
  # an axis of the mesh.
  rows_of: dict[int, set[int]] = {}
  for device, (row, _) in indices.items():
    rows_of.setdefault(device.process_index, set()).update(range(*row.indices(rows)))
  shares = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
  # Sets that overlap without being equal would be counted twice: the sum is too large.
  configs.check(
    sum(map(len, shares)) == rows and len({*map(len, shares)}) == 1,
    'each process must hold an even share of the rows',
    f'{len(rows_of)} processes and {product_of(layout.shape)}',
    'let tensor x sequence divide or be divided by the devices of a process',
  )
  return shares.index(tuple(sorted(rows_of[jax.process_index()]))), len(shares)


def place_whole(batch: Any, layout: Layout) -> Any:
  """A numpy batch that every process has whole, as arrays of that global batch."""
  return jax.tree.map(
    lambda rows: jax.make_array_from_callback(
      rows.shape, batch_sharding(layout, rows.ndim), lambda index: rows[index]
    ),
    batch,
  )


def place(batch: Any, layout: Layout) -> Any:
  """This process's rows of a numpy batch as arrays of the global batch."""
  _, shares = row_share(layout)

  def put(rows: np.ndarray) -> jax.Array:
    shape = (rows.shape[0] * shares, *rows.shape[1:])
    return jax.make_array_from_process_local_data(
      batch_sharding(layout, rows.ndim), rows, shape
    )

  # A process has all tokens of its rows, whichever part its devices need.
  return jax.tree.map(put, batch)
