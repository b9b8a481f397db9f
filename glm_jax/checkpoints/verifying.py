"""Compares what a checkpoint holds with what was saved, a part at a time, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from glm_jax import storage
from glm_jax.checkpoints import base, damage, digests, slices, steps
from glm_jax.checkpoints.damage import Damaged, unreadable

# Read at a time, while the part before is looked at.
_PART_BYTES = 2**26


def find(path: str, *, alone: bool = False) -> epath.Path:
  """As `steps.find`, for whoever reads parameters slice by slice: all of them are compared.

  Args:
    path: a MODEL_DIR (its newest undamaged checkpoint), or a checkpoint.
    alone: whether what it rests on is not read.

  Raises:
    UserError: there is none, or none that is undamaged.
  """
  newest = steps.Newest(path)

  def read(folder: epath.Path) -> epath.Path:
    verify(folder, ('params',), alone=alone)
    return folder

  return newest.read(read)


def verify(
  folder: epath.Path, items: Sequence[str] | None = None, *, alone: bool = False
) -> bool:
  """Reads all arrays of a checkpoint, and of those that it rests on.

  Args:
    folder: the checkpoint.
    items: some of its items; None for all.
    alone: whether what it rests on is left out.

  Returns:
    Whether there was something to compare with: a checkpoint from before has no digests.

  Raises:
    Damaged: something is not as it was saved.
    UserError: what it rests on is gone, or has changed.
  """
  meta = steps.looked_at(folder)
  if not alone and (whole := base.of(folder, meta)):
    verify(whole, ('params',))
  if meta.digests('params') is None:
    damage.tell(damage.not_compared(folder))
    return False
  for item in items or meta.items_with_digests:
    saved = meta.digests(item)
    with unreadable(folder, item):
      sums = _digests_of(folder / item, saved)
    missing = {*saved} - {*sums}
    words = digests.difference(saved, sums)
    if words or missing:
      raise Damaged(folder, f'{item}: {words or f"{min(missing)} is missing"}')
  return True


def _digests_of(folder: epath.Path, saved: digests.Digests) -> digests.Digests:
  with ocp.StandardCheckpointer() as reader:
    tree = reader.metadata(storage.absolute(folder)).item_metadata.tree
  context = slices.context()
  return {
    path: _digest(
      slices.open_leaf(folder, tuple(path.split('/')), context), str(saved.get(path))
    )
    for path in digests.flat(tree)
  }


def _digest(store: Any, saved: str) -> str:
  whole = digests.OfParts(store.dtype.numpy_dtype, store.shape)
  if str(whole).split()[0] != saved.split()[0]:
    return str(whole)  # of another shape, which may be any: nothing of it is read
  if not store.rank:
    whole.add(np.asarray(store.read().result()))
    return str(whole)
  size = max(1, int(np.prod(store.shape[1:], dtype=np.int64)) * whole.dtype.itemsize)
  rows = max(1, _PART_BYTES // size)
  reading = None
  for row in range(0, store.shape[0], rows):
    following = row, store[row : min(row + rows, store.shape[0])].read()
    if reading is not None:
      whole.add(reading[1].result(), (reading[0],))
    reading = following
  if reading is not None:
    whole.add(reading[1].result(), (reading[0],))
  return str(whole)
