"""The files of a run, in a folder of this machine or in a bucket.

TensorStore's key-value stores serve a bucket, so that nothing here needs TensorFlow. A
bucket has no folders and no file that can be appended to: names have slashes in them, and
what grows is written in parts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glm_jax import configs
from glm_jax.configs import ResourceError

_SCHEME = 'gs://'
# Attempts that TensorStore makes at a request, each later than the one before: a minute.
_ATTEMPTS = 8


def is_remote(path: Any) -> bool:
  """Whether a path is in a bucket."""
  return str(path).startswith(_SCHEME)


def check_can_save(path: str) -> None:
  """Raises UserError for a run in a bucket where Orbax lacks what it asks of one."""
  configs.check(
    not is_remote(path) or _has('google.cloud.storage'),
    'a run in a bucket must have google-cloud-storage',
    repr(path),
    "pip install 'glm_jax[gcs]', or choose a folder of this machine",
  )


def _has(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # of what it is in
    return False


def absolute(path: Any) -> Any:
  """A path of `etils.epath` that does not depend on where a process stands."""
  return path if is_remote(path) else path.absolute()


def make(folder: Any) -> None:
  """Makes a folder of pathlib or of `etils.epath`, and those that it is in.

  Raises:
    OSError: it cannot be there.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
  # Below /proc and the like, a folder cannot be made and is said to be missing.
  except FileNotFoundError as error:
    raise ResourceError(f'{folder} must be where a folder can be made') from error


class Folder:
  """The files below a folder, by name."""

  def __init__(self, path: str):
    """
    Args:
      path: of this machine, or gs://BUCKET/NAME.
    """
    self.path = str(path)
    self._here = None if is_remote(self.path) else Path(path)

  def names(self) -> list[str]:
    """Of files and folders in it, sorted; [] for a folder that is not there."""
    if self._here is not None:
      return sorted(os.listdir(self._here)) if self._here.is_dir() else []
    with _refusals(self.path):
      keys = self._store.list().result()
    return sorted({key.decode().split('/')[0] for key in keys} - {''})

  def below(self, name: str) -> list[str]:
    """Names of the files in a folder of it, with the folder's."""
    return [f'{name}/{own}' for own in Folder(f'{self.path}/{name}').names()]

  def read(self, name: str) -> bytes | None:
    """The content of a file; None if there is none."""
    if self._here is not None:
      path = self._here / name
      return path.read_bytes() if path.is_file() else None
    with _refusals(self.path):
      found = self._store.read(name).result()
    return None if found.state == 'missing' else found.value

  def read_all(self, names: list[str]) -> list[bytes]:
    """The contents of files that are there, asked for at once."""
    if self._here is not None:
      return [(self._here / name).read_bytes() for name in names]
    with _refusals(self.path):
      asked = [self._store.read(name) for name in names]
      return [answer.result().value for answer in asked]

  def write(self, name: str, content: bytes) -> None:
    """All of a file or nothing of it, whenever the process dies; the folder is made.

    Raises:
      OSError: no permission, no room, or a file in the way.
    """
    if self._here is None:
      with _refusals(self.path):
        self._store.write(name, content).result()
      return
    path = self._here / name
    make(path.parent)
    # In the same folder, since a rename is atomic within one file system alone.
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    temporary.write_bytes(content)
    os.replace(temporary, path)

  def read_version(self, name: str) -> tuple[bytes | None, bytes]:
    """The content of a file, None if there is none, and which version of it that is."""
    with _refusals(self.path):
      found = self._store.read(name).result()
    # Of a missing file, too: TensorStore's own word for 'none' is a version, b'' is not.
    return None if found.state == 'missing' else found.value, found.stamp.generation

  def replace(self, name: str, content: bytes | None, version: bytes) -> bytes | None:
    """Writes a file, if it is as it was: of several who try, one succeeds.

    Args:
      name: of the file.
      content: all of it; None removes it.
      version: that `read_version` or `replace` gave.

    Returns:
      The version that it now is; None if somebody else has written it meanwhile.

    Raises:
      OSError: no permission, no room, or no network.
    """
    with _refusals(self.path):
      written = self._store.write(name, content, if_equal=version).result()
    return written.generation or None

  @functools.cached_property
  def _store(self) -> Any:
    import tensorstore as ts

    if self._here is not None:
      spec = {'driver': 'file', 'path': f'{self._here.absolute()}/'}
      with _refusals(self.path):
        return ts.KvStore.open(spec).result()
    bucket, _, name = self.path.removeprefix(_SCHEME).partition('/')
    configs.check(
      bool(bucket and name.strip('/')),
      'a folder in a bucket must have a name',
      repr(self.path),
      'write gs://BUCKET/NAME',
    )
    spec = {'driver': 'gcs', 'bucket': bucket, 'path': name.rstrip('/') + '/'}
    context = ts.Context({'gcs_request_retries': {'max_retries': _ATTEMPTS}})
    with _refusals(self.path):
      return ts.KvStore.open(spec, context=context).result()


@contextlib.contextmanager
def _refusals(path: str) -> Iterator[None]:
  """What a store refuses, as an error of the system."""
  try:
    yield
  # TensorStore raises errors of Python's own types, with the answer of the server in them.
  except (ValueError, RuntimeError, OSError) as error:
    if isinstance(error, (configs.UserError, ResourceError)):
      raise
    raise ResourceError(f'{path}: {str(error).splitlines()[0][:300]}') from error
