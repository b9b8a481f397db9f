"""The folder of a run: what makes it the same run, and what may change.

`run.json` is written before the first step and read by whoever comes back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from glm_jax import configs, ownership, storage
from glm_jax.configs import UserError

FILE = 'run.json'
OPTIMIZER_HOLDS = 'optimizer_holds'
"""The one of the settings that may not change: what checkpoints hold of the optimizer."""


def identity(
  model: dict[str, Any],
  vocabulary: str,
  *,
  batch_size: int,
  seed: int,
  recipe: str,
  data: Mapping[str, Any],
) -> dict[str, Any]:
  """What must stay equal for a resumed run to be the same run.

  Args:
    model: its configuration as a dict.
    vocabulary: its fingerprint.
    batch_size: global.
    seed: of data, initialisation and dropout.
    recipe: its name.
    data: what the recipe adds.
  """
  return {
    'model': model,
    'vocabulary': vocabulary,
    'batch_size': batch_size,
    'seed': seed,
    'recipe': recipe,
    **data,
  }


def check_same(model_dir: str, run: dict[str, Any], settings: dict[str, Any]) -> list[str]:
  """Whether the folder is new, or this run's.

  Args:
    model_dir: the folder.
    run: this run's `identity`.
    settings: what may change, but not without a word.

  Returns:
    A line for each setting that differs.

  Raises:
    UserError: it belongs to another run, or to something else.
  """
  folder = storage.Folder(model_dir)
  content = folder.read(FILE)
  if content is None:
    # A process killed in its first moment leaves the beginning of this file, or no more
    # than its name as the owner's.
    own = (f'.{FILE}.', ownership.FILE)
    others = [name for name in folder.names() if not name.startswith(own)]
    configs.check(
      not others,
      'MODEL_DIR must be a new or empty folder, or that of a run',
      f'{model_dir!r}, which holds {others[:5]}',
      'choose another folder',
    )
    return []
  try:
    stored = configs.parse_json(content)
    parts = stored['identity'], stored['settings'], stored.get('decided', {})
    if not all(isinstance(part, dict) for part in parts):
      raise ValueError('another kind of content')
  except (ValueError, TypeError, KeyError) as error:
    raise UserError(
      f'{model_dir}/{FILE} must be readable JSON, got {error!r:.200}; restore it or choose '
      'another MODEL_DIR.'
    ) from error
  # As it was written: JSON knows no tuples, and a list does not equal one.
  run, settings = json.loads(json.dumps([run, settings]))
  # Before there were recipes, every run was of this one.
  before = {'recipe': 'Pretraining', **stored['identity']}
  for name in ('base', 'reference'):
    # Before there were digests, a fingerprint said what a run rests on.
    here, there = run.get(name), before.get(name)
    if isinstance(there, dict) and here and 'digest' not in there and 'digest' in here:
      before[name] = {**there, 'digest': here['digest']}
  differences = _differences(before, run)
  configs.check(
    not differences,
    f'MODEL_DIR {model_dir!r} holds a run of another configuration; a resumed run keeps '
    'its model, recipe, vocabulary, data, batch size and seed',
    '; '.join(differences),
    'set them back, or choose another MODEL_DIR',
  )
  # Before there was a choice, it was this one.
  before = {OPTIMIZER_HOLDS: 'adamw', **stored['settings']}
  held, holds = before[OPTIMIZER_HOLDS], settings[OPTIMIZER_HOLDS]
  configs.check(
    held == holds,
    f'MODEL_DIR {model_dir!r} holds a run with {held}, from whose checkpoints no other '
    'optimizer can go on',
    holds,
    'set OptimizerConfig.algorithm (and beta1) back, or begin another MODEL_DIR with '
    "TrainConfig.init_from, which takes the run's parameters alone",
  )
  return _differences(before, settings)


def decided(model_dir: str) -> dict[str, Any]:
  """What a run found for itself when it began, and keeps; {} for a new folder."""
  content = storage.Folder(model_dir).read(FILE)
  try:
    stored = configs.parse_json(content or '')
  except ValueError:
    return {}  # a new folder; of a damaged file, `check_same` speaks
  # Before that was decided, rows were cut from a stream unless the user said otherwise.
  made = stored.get('decided', {'packed': False}) if isinstance(stored, dict) else {}
  return made if isinstance(made, dict) else {}


def write(
  model_dir: str,
  run: dict[str, Any],
  settings: dict[str, Any],
  config_text: str,
  decided: Mapping[str, Any],
) -> None:
  """Creates the folder with run.json and config.gin.

  Args:
    model_dir: the folder.
    run: this run's `identity`.
    settings: as `check_same` has them.
    config_text: its gin configuration.
    decided: what `decided` is to return.

  Raises:
    OSError: no permission, or a file in the way.
  """
  folder = storage.Folder(model_dir)
  # run.json first: a folder that holds anything else, and no run.json, is refused as
  # somebody else's, even if this run began it.
  content = {'identity': run, 'settings': settings, 'decided': dict(decided)}
  folder.write(FILE, (json.dumps(content, indent=2) + '\n').encode('utf-8'))
  folder.write('config.gin', config_text.encode('utf-8'))


def _differences(before: Any, now: Any, name: str = '') -> list[str]:
  """A line for each leaf of two nested dicts that differs."""
  if isinstance(before, dict) and isinstance(now, dict):
    return [
      line
      for key in sorted({*before, *now})
      for line in _differences(
        before.get(key), now.get(key), f'{name}.{key}' if name else key
      )
    ]
  return [] if before == now else [f'{name} was {before!r} and is now {now!r}']
