"""A model that is somewhere: what it is, and how its weights come onto a mesh."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import traverse_util

from glm_jax import checkpoints, configs, sharding
from glm_jax.checkpoints import variables
from glm_jax.interop import reading
from glm_jax.models import config as model_config
from glm_jax.text import loading
from glm_jax.text.vocabulary import Vocabulary
from glm_jax.training import start, state


class Stored(NamedTuple):
  """A model that is somewhere, its weights not read yet.

  Attributes:
    config: of the model.
    vocabulary: that it was trained with.
    read: the collections of the model on a mesh: {'params'}, and more.
    fingerprint: tells these weights from others.
  """

  config: Any
  vocabulary: Vocabulary
  read: Callable[[sharding.Layout], dict[str, Any]]
  fingerprint: Callable[[], str]


def find(path: str) -> Stored:
  """The model of a run, of a checkpoint, or of a folder as it was published.

  Args:
    path: a MODEL_DIR (its newest checkpoint), a checkpoint, or a released model's folder.

  Raises:
    UserError: there is none, or it has no vocabulary.
  """
  configs.check_value('a checkpoint', path, configs.READABLE)
  if Path(path).is_dir() and reading.is_released(Path(path)):
    return _released(Path(path))
  folder = checkpoints.find(path)
  meta = checkpoints.read_meta(folder)
  config = model_config.from_dict(meta['model'])

  read = lambda layout: variables.read(folder, state.abstract_params(config, layout))
  vocabulary = start.vocabulary_of(folder, meta)
  return Stored(
    config, vocabulary, read, lambda: checkpoints.describe(folder)['fingerprint']
  )


def foreign(folder: Path, overrides: Mapping[str, Any]) -> reading.OfOthers:
  """A model in another program's files; see `reading.read`."""
  shapes = lambda config, bits: {k: v.shape for k, v in _abstract(config, bits).items()}
  return reading.read(folder, shapes, overrides)


def _released(folder: Path) -> Stored:
  _, known, leaves = foreign(folder, {})
  for line in known.assumed:
    warnings.warn(f'{folder}: {line}', stacklevel=4)
  vocabulary = loading.find(folder, known.format, known.config.vocab_size)
  configs.check(
    vocabulary is not None,
    'a released model must have its vocabulary beside it',
    str(folder),
    f'python -m glm_jax.convert {folder} DST --vocabulary=KIND:PATH, and give DST',
  )

  def read(layout: sharding.Layout) -> dict[str, Any]:
    arrays = {}
    for path, leaf in _abstract(known.config, known.bits, layout).items():
      array = reading.whole(leaves, path)
      arrays[path] = jax.make_array_from_callback(
        array.shape, leaf.sharding, array.__getitem__
      )
    nested = traverse_util.unflatten_dict(arrays)
    return variables.split(nested, variables.of_channels(known.bits))

  return Stored(known.config, vocabulary, read, lambda: reading.fingerprint(folder))


def _abstract(
  config: Any, bits: int, layout: sharding.Layout | None = None
) -> dict[tuple[str, ...], Any]:
  """Leaves of a model with integers of so many bits, by path."""
  params = state.abstract_params(config, layout)
  leaves = variables.stored(params, variables.of_channels(bits))
  return traverse_util.flatten_dict(leaves)
