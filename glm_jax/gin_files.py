"""Where gin files are found: in search paths, here, or beside the package.

The package brings gin_configs/ along, so that an empty folder needs no copy of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glm_jax import slips
from glm_jax.configs import UserError, check

PACKAGED = Path(__file__).resolve().parent.parent
"""The folder of gin_configs/ and glm_jax/: a clone, or where packages are installed."""


def find(name: str, search_paths: str) -> Path:
  """The file that --gin_file or include names: in a search path, here, or of `PACKAGED`.

  Raises:
    UserError: there is none, or a search path is no folder.
  """
  folders = [path for path in search_paths.split(',') if path]
  for folder in folders:  # without one, another file of the same name would be taken
    check(
      Path(folder).is_dir(),
      '--gin_search_paths must name folders, with commas between them',
      repr(folder),
      'make the folder, or leave it out',
    )
  for folder in (*folders, '', PACKAGED):
    path = Path(folder) / name
    if path.is_file():
      return path
  near = slips.nearest(name, packaged())
  raise UserError(
    f'--gin_file and include must name a gin file, got {name!r}, which is in none of '
    f'{[*folders, ".", str(PACKAGED)]}; '
    + (slips.meant(near, ()) if near else 'see --gin_search_paths.')
  )


def told(names: Sequence[str], search_paths: str) -> list[str]:
  """What a person is told of files that the folder lacks and the package has."""
  paths = {name: find(name, search_paths) for name in names if not Path(name).is_absolute()}
  return [
    f"{name}: the package's own, {path}"
    for name, path in paths.items()
    if path == PACKAGED / name
  ]


def packaged() -> list[str]:
  """Names of the gin files that come with the package, such as gin_configs/x.gin."""
  paths = PACKAGED.glob('gin_configs/**/*.gin')
  return sorted(path.relative_to(PACKAGED).as_posix() for path in paths)
