"""A model that is somewhere: what it is, and how its weights come onto a mesh."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import traverse_util

from glm_jax import checkpoints, configs, sharding
from glm_jax.checkpoints import base, steps, variables
from glm_jax.interop import reading, reward_models
from glm_jax.models import config as model_config
from glm_jax.text import loading
from glm_jax.text.vocabulary import Vocabulary
from glm_jax.training import adapters, start, state


class Stored(NamedTuple):
  """A model that is somewhere, its weights not read yet.

  Attributes:
    config: of the model.
    vocabulary: that it was trained with.
    read: the collections of the model on a mesh: {'params'}, and more, those of adapters
      among them.
    fingerprint: tells these weights from others.
    value: [D] float32, which scores answers, of a reward model; None of any other.
  """

  config: Any
  vocabulary: Vocabulary
  read: Callable[[sharding.Layout], dict[str, Any]]
  fingerprint: Callable[[], str]
  value: Callable[[], jax.Array | None] = lambda: None


def find(path: str, beside: str = '') -> Stored:
  """The model of a run, of a checkpoint, or of a folder as it was published.

  Args:
    path: a MODEL_DIR (its newest checkpoint), a checkpoint, or a released model's folder.
    beside: a MODEL_DIR or a checkpoint of adapters for that model; '' for those that `path`
      itself has, if any.

  Raises:
    UserError: there is none, or it has no vocabulary; the adapters are another model's.
  """
  configs.check_value('a checkpoint', path, configs.READABLE)
  if Path(path).is_dir() and reading.is_released(Path(path)):
    configs.check(
      not beside,
      'adapters must be of a checkpoint',
      f'{path}, a released model',
      f'python -m glm_jax.convert {path} DST, and give the DST that they were trained on',
    )
    return _released(Path(path))
  newest = steps.Newest(path)
  folder = newest.folder
  meta = checkpoints.read_meta(folder)
  fingerprint = lambda folder: checkpoints.describe(folder)['fingerprint']
  config = model_config.from_dict(meta['model'])
  vocabulary = start.vocabulary_of(folder, meta)
  if not beside:
    read = lambda layout: newest.read(
      lambda own: _read(own, own, meta.get('adapters'), config, layout)
    )
    value = lambda: _value(newest.folder)
    return Stored(config, vocabulary, read, lambda: fingerprint(newest.folder), value)
  own, trained = _adapters_for(folder, beside)
  return Stored(
    config,
    vocabulary,
    lambda layout: _read(folder, own, trained, config, layout),
    lambda: f'{fingerprint(folder)} {fingerprint(own)}',
  )


def _value(folder: Any) -> jax.Array | None:
  """The leaf of `glm_jax.recipes.reward` that a checkpoint holds, if it does."""
  held = checkpoints.stored_leaves(folder).get(('value', 'weight'))
  if held is None:
    return None
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shape = jax.ShapeDtypeStruct(held.shape, held.dtype, sharding=here)
  shapes = {'value': {'weight': shape}}
  params = checkpoints.read_params(folder, shapes, some=True, merge=False)
  return params['value']['weight']


def _adapters_for(folder: Any, beside: str) -> tuple[Any, dict[str, Any]]:
  """The checkpoint with adapters for another one, and what it says of them."""
  configs.check_value('adapters', beside, configs.READABLE)
  own = checkpoints.find(beside)
  meta = checkpoints.read_meta(own)
  configs.check(
    bool(meta.get('adapters')),
    'adapters must be a checkpoint that holds some',
    str(own),
    'leave them out, or give the MODEL_DIR of a run with TrainConfig.adapters',
  )
  there, here = meta['base'], checkpoints.describe(folder)
  configs.check(
    base.is_same(there, here),
    f'adapters must be for the checkpoint that they were trained on, {there["folder"]}',
    f'{own} for {folder}, whose parameters are others',
    'give that one, or a copy of it',
  )
  held = checkpoints.stored_leaves(own)
  others = [
    path
    for path in held
    if path[0] not in adapters.NAMES and path[0] not in reward_models.CRITIC
  ]
  configs.check(
    not others,
    'what was trained beside adapters must be read with them',
    f'{own}, which holds {"/".join(min(others, default=()))}, too',
    'give it as the checkpoint, without a base',
  )
  return own, meta['adapters']


def _read(
  folder: Any, own: Any, trained: Mapping[str, Any] | None, config: Any, layout: Any
) -> dict[str, Any]:
  """The collections of a checkpoint, with adapters from another, or its own."""
  abstract = state.abstract_params(config, layout)
  # Those of the base of a base are part of its weights.
  result = variables.read(folder, abstract, merge=own != folder or not trained)
  if not trained:
    return result
  held = checkpoints.stored_leaves(own)
  leaves = adapters.stored(trained, config, held)
  shapes = state.abstract_params(config, layout, leaves)
  shapes = {name: tree for name, tree in shapes.items() if name in leaves}
  params = checkpoints.read_params(own, shapes, some=True, merge=False)
  return result | adapters.beside(adapters.from_dict(trained), config, params)


def foreign(folder: Path, overrides: Mapping[str, Any]) -> reading.OfOthers:
  """A model in another program's files; see `reading.read`."""
  shapes = lambda config, bits: {k: v.shape for k, v in _abstract(config, bits).items()}
  return reading.read(folder, shapes, overrides)


def check_shapes(config: Any, stored: Mapping[tuple[str, ...], Any], folder: Any) -> None:
  """Raises UserError unless leaves have the shapes of a model, before any is read."""
  for path, leaf in _abstract(config, 0).items():
    held = stored[path].shape if path in stored else None
    configs.check(
      held == leaf.shape,
      f'{"/".join(path)} in {folder} must have the shape of its model, {leaf.shape}',
      'none' if held is None else str(held),
      'use another checkpoint',
    )


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
