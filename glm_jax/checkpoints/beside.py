"""A folder that is written beside its name, and bears it once it is whole.

On the same disk, so that renaming it copies nothing. Whoever is interrupted, and is called
with the same files and flags again, goes on where the other stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from glm_jax import configs
from glm_jax.configs import ResourceError

# In the folder while it is written: what it is made of.
_PROGRESS = 'conversion.json'


def check_free(dst: Path) -> None:
  """Raises UserError for a folder that exists."""
  configs.check(
    not dst.exists(),
    'DST must not exist',
    repr(str(dst)),
    'choose another folder, or remove it',
  )


def files_of(src: Path) -> list[Any]:
  """Names, sizes and times: hashing contents would take as long as converting them."""
  return sorted(
    [str(path.relative_to(src)), path.stat().st_size, path.stat().st_mtime_ns]
    for path in src.rglob('*')
    if path.is_file()
  )


@contextlib.contextmanager
def written(
  dst: Path, identity: dict[str, Any], *, room: int, total: int, doing: str
) -> Iterator[tuple[Path, Callable[[int], Any]]]:
  """Gives the folder to write into, and what is told of bytes that are done.

  Args:
    dst: its name, in the end.
    identity: what must be the same for an interrupted call to go on; without paths, since
      it lies beside DST.
    room: bytes that are needed on the disk.
    total: bytes of the bar.
    doing: its words, such as 'converting'.

  Raises:
    ResourceError: no room.
  """
  from tqdm import tqdm

  partial = dst.with_name(f'.{dst.name}.partial')
  progress, text = partial / _PROGRESS, json.dumps(identity, sort_keys=True)
  resumes = progress.exists() and progress.read_text(encoding='utf-8') == text
  done = sum(f.stat().st_size for f in partial.rglob('*')) if resumes else 0
  _check_room(dst, room - done)
  if resumes:
    print(f'going on with {partial}')
  else:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # Before anything else, so that an interruption at any later point can be resumed.
    progress.write_text(text, encoding='utf-8')
  with tqdm(
    total=total, unit='B', unit_scale=True, desc=doing, leave=False, disable=None
  ) as bar:
    yield partial, bar.update
  # It is complete and may bear its name, without the mark of one that goes on.
  progress.unlink()
  os.replace(partial, dst)


def _check_room(dst: Path, size: int) -> None:
  # DST and some of its parents need not exist yet: ask the disk of one that does.
  parent = dst.absolute().parent
  while not parent.exists():
    parent = parent.parent
  free = shutil.disk_usage(parent).free
  if size > free:
    raise ResourceError(
      f'DST needs {size / 1e9:.1f} GB, got {free / 1e9:.1f} GB free in {parent}; nothing '
      'was written. Make room or choose another disk.'
    )
