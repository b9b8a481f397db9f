"""A released model's folder, read without writing anything."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from glm_jax.interop import files, leaves, recognise

# Megatron's parts have names of their own, and a file that names their folder.
_PARTS = ('mp_rank_*.pt', 'latest_checkpointed_iteration.txt', 'latest')


class OfOthers(NamedTuple):
  """A model in another program's files.

  Attributes:
    source: the files.
    recognised: what they hold.
    leaves: the parameters.
  """

  source: files.Source
  recognised: recognise.Recognised
  leaves: leaves.ForeignLeaves


def is_released(folder: Path) -> bool:
  """Whether a folder has weights as other programs write them, and not a run's."""
  if any((folder / name).exists() for name in files.FILES):
    return True
  # Beside a run's, folders may have any name.
  is_run = any((folder / name).exists() for name in ('checkpoints', 'params'))
  return not is_run and any(any(folder.glob(pattern)) for pattern in _PARTS)


def read(
  folder: Path,
  shapes: Callable[[Any, int], Mapping[tuple[str, ...], tuple[int, ...]]],
  overrides: Mapping[str, Any] = MappingProxyType({}),
) -> OfOthers:
  """What a folder holds; no tensor is read before it is asked for.

  Args:
    folder: of another program.
    shapes: of every leaf of a model, given its configuration and the bits of its integers.
    overrides: fields of the configuration that win over what the files say.

  Raises:
    UserError: files that are damaged, or of a model that this package does not compute.
  """
  source = files.open_source(folder)
  known = recognise.recognise(source, overrides)
  stored = leaves.ForeignLeaves(source, known, shapes(known.config, known.bits))
  return OfOthers(source, known, stored)


def fingerprint(folder: Path) -> str:
  """Tells other files from these: by names, sizes and times, as `convert` does."""
  known = sorted(
    [str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns]
    for path in folder.rglob('*')
    if path.is_file()
  )
  return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def whole(stored: leaves.Leaves, path: tuple[str, ...]) -> np.ndarray:
  """A parameter, all layers of it."""
  if path[0] != 'layers':
    return stored.read(path, None)
  layers = range(stored.specs[path].shape[0])
  return np.stack([stored.read(path, layer) for layer in layers])
