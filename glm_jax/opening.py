"""A model that is somewhere: what it is, and how its weights come onto a mesh."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import traverse_util

from glm_jax import checkpoints, configs, sharding
from glm_jax.checkpoints import variables
from glm_jax.interop import reading
from glm_jax.models import config as model_config
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


def _released(folder: Path) -> Stored:
  def abstract(config: Any, bits: int, layout: sharding.Layout | None = None) -> Any:
    params = state.abstract_params(config, layout)
    return traverse_util.flatten_dict(variables.stored(params, _quantized(bits)))

  shapes = lambda config, bits: {k: v.shape for k, v in abstract(config, bits).items()}
  config, bits, leaves, vocabulary, assumed = reading.read(folder, shapes)
  for line in assumed:
    warnings.warn(f'{folder}: {line}', stacklevel=4)
  configs.check(
    vocabulary is not None,
    'a released model must have its vocabulary beside it',
    str(folder),
    'convert it (python -m glm_jax.convert) with --vocabulary=KIND:PATH',
  )

  def read(layout: sharding.Layout) -> dict[str, Any]:
    arrays = {}
    for path, leaf in abstract(config, bits, layout).items():
      array = reading.whole(leaves, path)
      arrays[path] = jax.make_array_from_callback(
        array.shape, leaf.sharding, array.__getitem__
      )
    return variables.split(traverse_util.unflatten_dict(arrays), _quantized(bits))

  return Stored(config, vocabulary, read, lambda: reading.fingerprint(folder))


def _quantized(bits: int) -> dict[str, int] | None:
  """What a checkpoint would say of integers as ChatGLM's: a scale a channel."""
  return {'bits': bits, 'group': 0} if bits else None
