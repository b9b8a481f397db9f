"""What a run begins from: the model, vocabulary and parameters of another checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from flax import traverse_util

from glm_jax import checkpoints, configs, sharding
from glm_jax.checkpoints import base
from glm_jax.checkpoints.folder import OPTIMIZER_HOLDS
from glm_jax.models import config as model_config
from glm_jax.text import loading
from glm_jax.text.vocabulary import Vocabulary
from glm_jax.training import adapters, optimizer, program, state
from glm_jax.training.config import CheckpointModel, TrainConfig
from glm_jax.training.recipe import REFERENCE

# Fields that two models may differ in and still share their parameters' meaning.
_FREE = {
  'max_positions',
  'embedding_dropout',
  'attention_dropout',
  'output_dropout',
  'embedding_gradient',
  'init_std',
}


def resolve(
  config: TrainConfig,
) -> tuple[TrainConfig, Vocabulary | None, dict[str, Any] | None]:
  """A run's configuration with the model itself in place of a `CheckpointModel`.

  Args:
    config: of a run.

  Returns:
    The configuration, the vocabulary of the checkpoint where the run takes it from
    there, and what the checkpoint says of the files it was converted from.

  Raises:
    UserError: no such checkpoint, or one without the vocabulary that is needed.
  """
  if not isinstance(config.model, CheckpointModel):
    return config, None, None
  folder = checkpoints.find(config.model.path)
  meta = checkpoints.read_meta(folder)
  model = model_config.from_dict(meta['model'])
  vocabulary = None if config.recipe.has_vocabulary else vocabulary_of(folder, meta)
  return dataclasses.replace(config, model=model), vocabulary, meta.get('source')


def in_steps(config: TrainConfig, data: Any, say: Callable[..., None]) -> TrainConfig:
  """A run of epochs as one of steps.

  Args:
    config: of the run, with `train_epochs`.
    data: its `recipe.Data`.
    say: tells how many they are.

  Raises:
    UserError: nobody counts the rows of an epoch.
  """
  configs.check(
    data.rows is not None,
    'TRAIN_EPOCHS must be of rows that are counted',
    'a task of your own, which does not say how many it has',
    "give TRAIN_STEPS, or make shards of it (make_shards, CorpusConfig.corpus='task:NAME')",
  )
  epochs = config.train_epochs
  steps = max(1, round(epochs * data.rows / config.batch_size))
  unit = 'epoch' if epochs == 1 else 'epochs'
  say(f'{epochs:g} {unit} of {data.rows:,} rows: {steps:,} steps')
  return dataclasses.replace(config, train_steps=steps, train_epochs=None)


def settings(config: TrainConfig) -> dict[str, Any]:
  """What a resumed run may change, but not without a word (`folder.check_same`)."""
  result = {
    'optimizer': dataclasses.asdict(config.optimizer),
    OPTIMIZER_HOLDS: optimizer.holds(config.optimizer),
  }
  if config.optimizer.schedule in optimizer.ENDING:
    # Without decay_steps they follow TRAIN_STEPS, and no field of the optimizer shows it.
    warmup_ends, decay_ends = optimizer.ends(config.optimizer, config.train_steps)
    result['schedule'] = {'warmup_ends': warmup_ends, 'decay_ends': decay_ends}
  return result


def in_words(changes: Sequence[str]) -> Iterator[str]:
  """Lines for settings that `folder.check_same` has found changed."""
  own = ('optimizer.schedule', 'optimizer.warmup_steps', 'optimizer.decay_steps')
  defaults = dataclasses.asdict(optimizer.OptimizerConfig())
  explained = any(change.startswith(own) for change in changes)
  for change in changes:
    field, _, now = change.removeprefix('optimizer.').partition(' was None and is now ')
    if now and now == repr(defaults.get(field)):
      # The run began before there was that field, and was as if it had had its default.
      continue
    if change.startswith('schedule'):
      # A field says it already; or the run began before this was noted.
      if explained or ' was None ' in change:
        continue
      change += ': the rate follows TRAIN_STEPS; OptimizerConfig.decay_steps holds it'
    yield f'from here on, {change}'


def vocabulary_of(folder: Any, meta: dict[str, Any]) -> Vocabulary:
  """The vocabulary that a checkpoint carries.

  Raises:
    UserError: it was converted without one.
  """
  configs.check(
    meta['vocabulary'] is not None,
    'the checkpoint must carry its vocabulary',
    f'{folder} without one',
    'convert it again with --vocabulary=KIND:PATH',
  )
  return loading.from_dict(meta['vocabulary'])


def params_from(path: str, config: Any, vocabulary: str, fresh: Any) -> Any:
  """Parameters of another checkpoint, for a new run to begin with.

  They become float32, whatever they are stored in. A position table that is longer here
  keeps its fresh rows behind the others, as THUDM/GLM train_utils.py does.

  Args:
    path: a checkpoint or a MODEL_DIR.
    config: of the new model.
    vocabulary: fingerprint of the new run's.
    fresh: the new run's parameters, on their shardings.

  Raises:
    UserError: another vocabulary, or a model that is not the same function.
  """
  folder = checkpoints.find(path)
  stored_config = _same_model(folder, config, vocabulary)
  # Shapes of the checkpoint, float32 and on the shardings of the new run: Orbax casts and
  # spreads while it reads.
  old_sizes = dataclasses.replace(config, max_positions=stored_config.max_positions)
  shapes = state.abstract_params(old_sizes)
  # Leaves of the recipe are in no checkpoint of the model: they stay fresh.
  own = {name: fresh[name] for name in shapes}
  abstract = jax.tree.map(
    lambda a, new: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=new.sharding),
    shapes,
    own,
  )
  params = checkpoints.read_params(folder, abstract)

  def extend(old: jax.Array, new: jax.Array) -> jax.Array:
    if old.shape == new.shape:
      return old
    # Only a position table is longer. Under jit, so that the result is born sharded.
    merge = jax.jit(
      lambda old, new: new.at[: old.shape[0]].set(old), out_shardings=new.sharding
    )
    return merge(old, new)

  return {**fresh, **jax.tree.map(extend, params, own)}


def _same_model(folder: Any, config: Any, vocabulary: str) -> Any:
  """The model's configuration in a checkpoint; UserError for that of another function."""
  meta = checkpoints.read_meta(folder)
  stored_config = model_config.from_dict(meta['model'])
  # A checkpoint may be converted without a vocabulary: then it is the user's word.
  fingerprint = meta['vocabulary'] and loading.from_dict(meta['vocabulary']).fingerprint
  configs.check(
    fingerprint in (None, vocabulary),
    'init_from must be a checkpoint of the same vocabulary',
    f'{fingerprint} there, {vocabulary} here',
    'set VocabularyConfig.path to the one it was trained with',
  )
  configs.check(
    type(stored_config) is type(config),
    'init_from must be a checkpoint of the same model family',
    f'{type(stored_config).__name__} there, {type(config).__name__} here',
    'use TrainConfig.model = @CheckpointModel()',
  )
  old_fields, new_fields = dataclasses.asdict(stored_config), dataclasses.asdict(config)
  differences = [
    f'{k}: {old_fields[k]} there, {new_fields[k]} here'
    for k in old_fields
    if k not in _FREE and old_fields[k] != new_fields[k]
  ]
  configs.check(
    not differences,
    'init_from must hold the same model',
    '; '.join(differences),
    'set them as they are there, or use TrainConfig.model = @CheckpointModel()',
  )
  configs.check(
    stored_config.max_positions <= config.max_positions,
    'init_from must not have more positions than the model',
    f'{stored_config.max_positions} there, {config.max_positions} here',
    f'raise {type(config).__name__}.max_positions',
  )
  return stored_config


class Base(NamedTuple):
  """The checkpoint that holds what a run does not train.

  Attributes:
    folder: of it.
    quantized: bits and group of its integers; None for plain weights.
    continued: the checkpoint whose adapters are trained on; None for fresh ones.
  """

  folder: epath.Path
  quantized: dict[str, int] | None
  continued: epath.Path | None

  def describe(self) -> dict[str, str]:
    """As run.json and the run's checkpoints name it."""
    return checkpoints.describe(self.folder)


def find_base(config: TrainConfig) -> Base | None:
  """Where a run begins; None for one that trains all parameters.

  Raises:
    UserError: see `_checked`; a base that is gone, or has changed.
  """
  if not config.in_part:
    return None
  folder, meta = _checked(config)
  if config.init_adapters != 'continue':
    return Base(folder, meta.get('quantized'), None)
  return Base(base.of(folder, meta), meta.get('quantized'), folder)


def _checked(config: TrainConfig) -> tuple[epath.Path, dict[str, Any]]:
  """`init_from` and its description.

  Raises:
    UserError: it holds adapters, and the run does not say what becomes of them, or the
      other way round.
  """
  folder = checkpoints.find(config.init_from)
  meta = checkpoints.read_meta(folder)
  if meta.get('adapters'):
    configs.check(
      bool(config.init_adapters),
      'TrainConfig.init_adapters must say what becomes of adapters in init_from',
      f"'' for {folder}",
      "set it to 'continue' or 'merge'",
    )
  else:
    configs.check(
      not config.init_adapters,
      'TrainConfig.init_adapters must be of an init_from with adapters',
      f'{config.init_adapters!r} for {folder}',
      'leave it out',
    )
  return folder, meta


def begin(
  config: TrainConfig,
  built: Any,
  layout: sharding.Layout,
  vocabulary: str,
  base: Base | None,
) -> state.State:
  """The state that a new run begins with: of what it trains, fresh or from `init_from`.

  Args:
    config: of the run.
    built: its `program.Program`.
    layout: of the devices.
    vocabulary: fingerprint of the run's.
    base: see `find_base`.

  Raises:
    UserError: see `params_from`.
  """
  leaves = program.all_leaves(config)
  if base is not None:
    params = _trained_params(config, built.state['params'], leaves, vocabulary, base)
    return state.begin(params, built.optimizer, built.state)
  current = state.init_state(config.model, built.optimizer, layout, config.seed, leaves)
  if not config.init_from:
    return current
  _checked(config)
  params = params_from(config.init_from, config.model, vocabulary, current['params'])
  return state.with_params(current, params)


def _trained_params(
  config: TrainConfig, abstract: Any, leaves: state.Leaves, vocabulary: str, base: Base
) -> Any:
  """What is trained of a model, float32; nothing of the model itself is initialised."""
  stored_config = _same_model(base.folder, config.model, vocabulary)
  configs.check(
    stored_config.max_positions == config.model.max_positions,
    'a model that is trained in part must have the positions of init_from',
    f'{stored_config.max_positions} there, {config.model.max_positions} here',
    f'set {type(config.model).__name__}.max_positions={stored_config.max_positions}',
  )
  continued = {}
  if base.continued is not None:
    continued = {k: v for k, v in abstract.items() if k in adapters.NAMES}
    _check_continues(config, abstract, base.continued)
  fresh = {name: init for name, init in leaves.items() if name not in continued}
  of_model = {k: v for k, v in abstract.items() if k not in fresh}
  # What else the run before has trained is trained on with its adapters.
  source = base.folder if base.continued is None else base.continued
  params = checkpoints.read_params(source, of_model, some=True, merge=not continued)
  return {**params, **(state.init_leaves(fresh, abstract, config.seed) if fresh else {})}


def _check_continues(config: TrainConfig, abstract: Any, folder: epath.Path) -> None:
  """Raises UserError unless a run can train on what another one has trained."""
  before = checkpoints.read_meta(folder)['adapters']
  now = adapters.to_dict(config.adapters)
  configs.check(
    before['kind'] == now['kind'] and before.get('scaling') == now.get('scaling'),
    'adapters that are trained on must be of one kind and scaling',
    f'{before} there, {now} here',
    f'set TrainConfig.adapters as in {folder}',
  )
  there = {*checkpoints.stored_leaves(folder)}
  here = {*traverse_util.flatten_dict(abstract)}
  of_adapters = lambda paths: {path for path in paths if path[0] in adapters.NAMES}
  lacking = there - here | of_adapters(here) - there
  configs.check(
    not lacking,
    'a run that trains on must train what the one before it did',
    f'{"/".join(min(lacking, default=()))}, which only one of them does',
    f'set TrainConfig.adapters and TrainConfig.trained as in {folder}',
  )


def frozen(
  config: TrainConfig,
  built: Any,
  layout: sharding.Layout,
  vocabulary: str,
  base: Base | None,
  current: state.State | None,
) -> Any:
  """What a run does not change: parameters as its base stores them, and its reference.

  Args:
    config: of the run.
    built: its `program.Program`.
    layout: of the devices.
    vocabulary: fingerprint of the run's.
    base: see `find_base`.
    current: the state that a new run begins with; None for one that goes on, which looks
      for its reference where it began.
  """
  abstract = {name: tree for name, tree in built.frozen.items() if name != REFERENCE}
  result = {}
  if base is not None:
    result = checkpoints.read_params(base.folder, abstract, as_stored=True, some=True)
  if REFERENCE in built.frozen:
    kept = built.frozen[REFERENCE]
    began = current or begin(config, built, layout, vocabulary, base)
    # The state is donated to its first step: a copy stays.
    copy = jax.jit(
      lambda tree: jax.tree.map(lambda a, like: jnp.copy(a.astype(like.dtype)), tree, kept),
      out_shardings=jax.tree.map(lambda a: a.sharding, kept),
    )
    result[REFERENCE] = copy({name: began['params'][name] for name in kept})
  return result
