"""Lists the checkpoints of a run, and compares them with what was saved.

  python -m glm_jax.checkpoints runs/mine --verify

A line a step: its size, what is wrong with it, and its validation. `--verify` reads all
arrays; without it, what is cheap to look at is. It leaves with 65 if something is damaged.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from etils import epath

from glm_jax import cli, configs
from glm_jax.checkpoints import base, steps, verifying
from glm_jax.configs import UserError


def listed(path: str, verify: bool) -> bool:
  """Prints a line for each checkpoint.

  Args:
    path: a MODEL_DIR, its folder of checkpoints, or a checkpoint.
    verify: whether arrays are read.

  Returns:
    Whether all are undamaged.

  Raises:
    UserError: there is none.
  """
  configs.check_value('DIR', path, configs.READABLE)
  where = epath.Path(path) / steps.FOLDER
  where = where if where.is_dir() else epath.Path(path)
  folders = {str(step): where / str(step) for step in steps.complete(where)}
  folders = folders or {folder.name: folder for folder in steps.found(path)}
  partial = sorted(steps.partial(where), reverse=True)
  print(f'{"step":>10}  {"MB":>10}  state')
  damaged = len(partial)
  for name, folder in folders.items():
    scores, state = {}, ''
    try:
      look = steps.of_owner if folder.parent == where else steps.looked_at
      meta = look(folder)
      scores = meta.get('metrics') or {}
      compared = meta.digests('params') is not None
      if verify:
        compared = verifying.verify(folder)
      state = 'whole' if verify else 'complete'
      state = state if compared else 'not compared: saved without digests'
    except UserError as error:
      damaged += 1
      state = f'damaged: {getattr(error, "reason", error)}'
    size = sum(file.stat().length for file in base.files(folder)) / 1e6
    words = '  '.join(f'{k} {v:.4f}' for k, v in sorted(scores.items())[:4])
    print(f'{name:>10}  {size:>10,.1f}  {state}{"; " * bool(words)}{words}', flush=True)
  for step in partial:
    print(f'{step:>10}  {"":>10}  damaged: not all of a checkpoint is there')
  for name in steps.aside(where):
    print(f'{name} was set aside')
  return not damaged


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = _flags().parse_args(argv)
  if not listed(flags.dir, flags.verify):
    raise UserError(
      f'all checkpoints must be undamaged, got others in {flags.dir}; training and what '
      'reads them take the newest that is (--restore_step=N of train chooses).'
    )


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'checkpoints',
    'Lists the checkpoints of a run: size, whether they are undamaged, validation.',
    'python -m glm_jax.checkpoints runs/mine --verify',
  )
  flags.add_argument('dir', metavar='DIR', help='a MODEL_DIR, or one checkpoint folder')
  flags.add_argument(
    '--verify',
    action='store_true',
    help='read all arrays and compare them with the digests that they were saved with',
  )
  return flags


if __name__ == '__main__':
  cli.main(main)
