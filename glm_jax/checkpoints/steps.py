"""Which checkpoints a folder holds, which of them can be read, and what is set aside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from glm_jax import configs, storage
from glm_jax.checkpoints import damage
from glm_jax.checkpoints.damage import Damaged
from glm_jax.checkpoints.description import Description, read_meta
from glm_jax.configs import UserError

FOLDER = 'checkpoints'
# Neither Orbax nor anything here takes such a name for a step.
_ASIDE = 'aside-'
# Files of other programs' checkpoints, one for each kind of them.
_RELEASED = (
  'config.json',
  'model.safetensors',
  'model.safetensors.index.json',
  'pytorch_model.bin',
  'pytorch_model.bin.index.json',
  'latest_checkpointed_iteration.txt',
  'mp_rank_00_model_states.pt',
)


def latest_step(model_dir: str) -> int | None:
  """The newest complete checkpoint of a run; None if there is none.

  A folder without its items (a stray one, or what a killed process left) is no
  checkpoint, whatever its name.
  """
  return next(iter(complete(epath.Path(model_dir) / FOLDER)), None)


def complete(folder: epath.Path) -> list[int]:
  """Steps with all of a checkpoint's items, the newest first."""
  steps = [step for step in _numbered(folder) if is_complete(folder / str(step))]
  return sorted(steps, reverse=True)


def is_complete(path: epath.Path) -> bool:
  """Whether a folder has what makes it a checkpoint."""
  # Orbax's files: `_METADATA` of arrays and `metadata` of JSON. A run saves a step under a
  # temporary name, a conversion writes `meta` last: a folder with both is whole. A bucket
  # renames nothing, and Orbax's last file there says so.
  if storage.is_remote(path) and not (path / 'commit_success.txt').exists():
    return False
  return all(
    (path / item / '_METADATA').exists() or (path / item / 'metadata').exists()
    for item in ('params', 'meta')
  )


class Newest:
  """The newest checkpoint of a run that turns out to be undamaged.

  Attributes:
    folder: of it, as far as is known.
  """

  def __init__(self, path: str):
    """
    Args:
      path: as `find` has it.
    """
    self.folder = find(path)
    folders = found(path)
    self._older = folders[folders.index(self.folder) + 1 :]

  def read(self, reader: Callable[[epath.Path], Any]) -> Any:
    """What `reader` makes of the folder, or of one before it if this one is damaged."""
    while True:
      try:
        return reader(self.folder)
      except Damaged as error:
        if not self._older or error.folder != self.folder:
          raise
        damage.tell(
          f'{self.folder} is damaged ({error.reason}); {self._older[0]} is read instead'
        )
        self.folder = self._older.pop(0)


def find(path: str) -> epath.Path:
  """The checkpoint folder meant by a path: itself, or the newest of a run's.

  Of a run, one whose description is damaged is left out, and it is said.

  Raises:
    UserError: there is none, or none that is undamaged.
  """
  folders = found(path)
  *newer, oldest = folders
  if folders[0] != epath.Path(path):
    for step in partial(folders[0].parent):
      if step > int(folders[0].name):
        damage.tell(f'{folders[0].parent / str(step)} is damaged: not all of it is there')
  for folder in newer:
    try:
      looked_at(folder)
      return folder
    except Damaged as error:
      damage.tell(f'{folder} is damaged ({error.reason}); the one before it is read')
  looked_at(oldest)
  return oldest


def found(path: str) -> list[epath.Path]:
  """Complete checkpoints that a path means, the newest first; see `find`.

  Raises:
    UserError: there is none.
  """
  path = epath.Path(path)
  # A MODEL_DIR, its folder of checkpoints, or else one checkpoint.
  for folder in (path / FOLDER, path):
    if steps := complete(folder):
      return [folder / str(step) for step in steps]
  if is_complete(path):
    return [path]
  remedy = (
    'give the folder of a checkpoint, or the MODEL_DIR of a run that has saved one; '
    'released weights are converted first (python -m glm_jax.convert)'
  )
  # The commonest slip: weights as they were published are converted once, and then read.
  if any((path / name).exists() for name in _RELEASED):
    remedy = f'this is a released model: python -m glm_jax.convert {path} DST, and give DST'
  raise UserError(
    'a checkpoint must be a folder with params and meta, or a MODEL_DIR that holds some, '
    f'got {path}; {remedy}.'
  )


def looked_at(folder: epath.Path) -> Description:
  """The description of a checkpoint, once all that is cheap to look at is as it was saved.

  Raises:
    Damaged: it is not; arrays are not read.
  """
  meta = read_meta(folder)
  for item in meta.items_with_digests:
    if not (folder / item / '_METADATA').exists():
      raise Damaged(folder, f'{item}/_METADATA is missing')
  # Another step's, put here, would be whole.
  if folder.parent.name == FOLDER and folder.name.isdigit() and meta.items_with_digests:
    step = meta.get('step', int(folder.name))
    if step != int(folder.name):
      raise Damaged(folder, f'meta is of step {step}')
  return meta


def of_owner(folder: epath.Path) -> Description:
  """The same, for the run whose it is, which goes on with its optimizer.

  Raises:
    Damaged: it is not.
  """
  meta = looked_at(folder)
  if meta.items_with_digests:
    for item in ('params', 'optimizer'):
      if item not in meta.items_with_digests:
        raise Damaged(folder, f'it has no {item}')
  return meta


def read(model_dir: str, step: int) -> Description:
  """The description of a run's checkpoint."""
  return read_meta(epath.Path(model_dir) / FOLDER / str(step))


def readable(folder: epath.Path) -> Iterator[tuple[int, str]]:
  """Complete steps of a run, the newest first, and why one cannot be read ('': it can)."""
  for step in complete(folder):
    try:
      of_owner(folder / str(step))
    except UserError as error:
      yield step, error.reason if isinstance(error, Damaged) else str(error)
    else:
      yield step, ''


def chosen(model_dir: str, wanted: int | None = None) -> int | None:
  """The step that a run goes on from, as far as can be told without reading its arrays.

  Args:
    model_dir: of the run.
    wanted: a step to go back to; None for the newest.

  Returns:
    None if there is no checkpoint.

  Raises:
    UserError: there are some, and none of them is undamaged; or `wanted` is none of them.
  """
  folder = epath.Path(model_dir) / FOLDER
  steps = dict(readable(folder))
  if wanted is not None:
    configs.check(
      wanted in steps,
      '--restore_step must be a step that the run has saved',
      f'{wanted} for {folder}',
      f'choose among {sorted(steps)}' if steps else 'leave it out',
    )
    if steps[wanted]:
      raise Damaged(folder / str(wanted), steps[wanted])
    return wanted
  for step, reason in steps.items():
    if not reason:
      return step
  damaged = {**steps, **dict.fromkeys(partial(folder), 'incomplete')}
  if damaged:
    raise none_left(folder, damaged)
  return None


def none_left(folder: epath.Path, reasons: dict[int, str]) -> UserError:
  """Of a run whose checkpoints are all damaged."""
  newest = max(reasons)
  return UserError(
    f'MODEL_DIR must hold an undamaged checkpoint, got {len(reasons)} damaged in {folder} '
    f'(step {newest}: {reasons[newest]}); put back a copy, or begin another MODEL_DIR.'
  )


def partial(folder: epath.Path) -> list[int]:
  """Steps that are here in part: saved under a name of their own, they were whole once."""
  if storage.is_remote(folder):
    return []  # a save that was interrupted, which Orbax takes up again
  return [
    step
    for step in _numbered(folder)
    if not is_complete(folder / str(step)) and any((folder / str(step)).iterdir())
  ]


def set_aside(
  folder: epath.Path, kept: Iterable[int], reasons: dict[int, str]
) -> list[str]:
  """Renames all steps but some, so that nothing stands in the way of those that will come.

  Args:
    folder: of a run's checkpoints.
    kept: steps that stay.
    reasons: why the others do not, where it is known.

  Returns:
    A line for each.
  """
  lines, kept = [], {*kept}
  for step in sorted({*_numbered(folder)} - kept):
    path = folder / str(step)
    if storage.is_remote(folder) and not (path / 'commit_success.txt').exists():
      continue
    names = {other.name for other in folder.iterdir()}
    name, number = f'{_ASIDE}{step}', 2
    while name in names:
      name, number = f'{_ASIDE}{step}-{number}', number + 1
    path.rename(folder / name)
    why = reasons.get(step) or 'not all of a checkpoint is there'
    lines.append(f'step {step} is set aside as {folder / name}: {why}')
  return lines


def _numbered(folder: epath.Path) -> list[int]:
  if not folder.is_dir():
    return []
  # Orbax reads 007 as 7, and here no step is written so.
  names = [path.name for path in folder.iterdir() if path.name.isdigit()]
  return [int(name) for name in names if name == str(int(name))]


def aside(folder: epath.Path) -> list[str]:
  """Names of what was set aside."""
  if not folder.is_dir():
    return []
  return sorted(path.name for path in folder.iterdir() if path.name.startswith(_ASIDE))
