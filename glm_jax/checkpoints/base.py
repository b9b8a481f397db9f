"""Where parameters are that a checkpoint does not hold: in the one its run began with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from glm_jax import configs, storage
from glm_jax.checkpoints import digests
from glm_jax.checkpoints.description import read_meta

# Of the beginning and of the end of each file.
_SAMPLE = 2**16


def describe(folder: epath.Path) -> dict[str, str]:
  """A checkpoint as run.json and the checkpoints of a run name it.

  Its digest is that of its parameters' digests, which are compared when they are read; one
  from before has none.
  """
  result = {'folder': str(storage.absolute(folder)), 'fingerprint': fingerprint(folder)}
  if sums := read_meta(folder).digests('params'):
    result['digest'] = digests.together(sums)
  return result


def is_same(there: Mapping[str, str], here: Mapping[str, str]) -> bool:
  """Whether two of `describe` are of the same parameters, wherever they are."""
  # What was described before there were digests has none.
  names = {'fingerprint', 'digest'} & {*there} & {*here}
  return all(there[name] == here[name] for name in names)


def fingerprint(folder: epath.Path) -> str:
  """Tells other parameters from these: names, sizes and both ends of all files.

  Args:
    folder: a checkpoint.
  """
  digest, params = hashlib.sha256(), folder / 'params'
  for path in sorted(files(params)):
    size = path.stat().length
    digest.update(f'{path.relative_to(params)} {size}\n'.encode())
    with path.open('rb') as file:
      digest.update(file.read(_SAMPLE))
      file.seek(max(size - _SAMPLE, 0))
      digest.update(file.read(_SAMPLE))
  return digest.hexdigest()[:16]


def files(folder: epath.Path) -> Iterator[epath.Path]:
  """All files below a folder."""
  for path in folder.iterdir():
    if path.is_dir():
      yield from files(path)
    else:
      yield path


def of(folder: epath.Path, meta: dict[str, Any]) -> epath.Path | None:
  """The base of a checkpoint; None if the checkpoint holds all parameters.

  Args:
    folder: the checkpoint.
    meta: its description.

  Raises:
    UserError: the base is gone, or has changed.
  """
  base = meta.get('base')
  if not base:
    return None
  found = epath.Path(base['folder'])
  exists = (found / 'params').is_dir()
  configs.check(
    exists and is_same(base, describe(found)),
    f'{folder} holds what was trained alone, and the checkpoint it began with must be as '
    'it was',
    f'{found}, which {"has changed" if exists else "is gone"}',
    'put it back',
  )
  return found
