"""Checkpoints that describe themselves: the one module that knows Orbax.

`MODEL_DIR/checkpoints/STEP/` holds `params` (alone), `optimizer`, and `meta`: format
version, model configuration, the vocabulary itself, what identifies the run, the gin
configuration; of a stream that needs them, `place` (`glm_jax.checkpoints.place`) and the
arrays that it keeps between steps, `stream`.
Arrays are restored onto whatever mesh asks for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization, traverse_util
from orbax.checkpoint import checkpoint_managers

from glm_jax import configs, storage
from glm_jax.checkpoints import base, merging
from glm_jax.checkpoints.place import ITEM, RestorePlace, SavePlace
from glm_jax.configs import ResourceError, UserError, at_least, one_of
from glm_jax.models import quantized

FORMAT = 1
FOLDER = 'checkpoints'
_ITEMS = ('params', 'optimizer', 'meta', 'stream', ITEM)
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
# Large enough that a file system is not flooded with files, small enough that a device
# reads little more than its part.
_CHUNK_BYTES = 2**26


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When to save, and what to keep.

  Attributes:
    every: steps between checkpoints; the last step always has one.
    keep: newest checkpoints to keep.
    keep_best: checkpoints of the best `best_metric` to keep besides.
    best_metric: a validation metric: 'loss', 'loss/blank', or of a mixture's corpus
      'corpus/web/loss', and 'corpus/web/accuracy' where accuracy is measured.
    best_mode: whether its least ('min') or its largest ('max') value is best.
  """

  every: Annotated[int, at_least(1)] = 1000
  keep: Annotated[int, at_least(1)] = 3
  keep_best: Annotated[int, at_least(0)] = 1
  best_metric: str = 'loss'
  best_mode: Annotated[str, one_of('min', 'max')] = 'min'

  def __post_init__(self):
    configs.check_fields(self)


class Checkpoints:
  """The checkpoints of one run, written asynchronously."""

  def __init__(self, model_dir: str, config: CheckpointConfig):
    """
    Args:
      model_dir: of the run.
      config: what to keep.
    """
    self.folder = epath.Path(model_dir) / FOLDER
    policies = [checkpoint_managers.LatestN(config.keep)]
    # BestN keeps the end of its sorted list: of descending losses, the lowest. Checkpoints
    # between validations have no metrics and are not kept for it.
    least = config.best_mode == 'min'
    worst = math.inf if least else -math.inf
    if config.keep_best:
      policies.append(
        checkpoint_managers.BestN(
          get_metric_fn=lambda metrics: metrics.get(config.best_metric, worst),
          reverse=least,
          n=config.keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    self._manager = ocp.CheckpointManager(
      storage.absolute(self.folder),
      item_names=_ITEMS,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        create=True,
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(timeout_secs=300),
      ),
    )

  def save(
    self,
    state: dict[str, Any],
    meta: dict[str, Any],
    metrics: dict[str, float],
    stream: Any = None,
  ) -> None:
    """Begins to write the state; returns before it is on disk.

    Args:
      state: of training.
      meta: the description that the checkpoint carries.
      metrics: of validation, which say what is best.
      stream: of the run, with `place` and `kept`; None for a function of the step.

    Raises:
      ResourceError: an earlier save failed, such as on a full disk.
    """
    place, kept = _memory(stream)
    with _storage_errors():
      self._manager.save(
        int(state['step']),
        args=ocp.args.Composite(
          params=_save_args(state['params']),
          optimizer=_save_args(_optimizer_dict(state)),
          meta=ocp.args.JsonSave({'format': FORMAT, **meta}),
          **({} if place is None else {ITEM: SavePlace(place)}),
          **({} if kept is None else {'stream': _save_args(kept)}),
        ),
        metrics=metrics or None,
        # The run decides which steps are saved, not Orbax's own interval.
        force=True,
      )

  def restore(
    self, step: int, abstract: dict[str, Any], stream: Any = None
  ) -> dict[str, Any]:
    """The state of a step, on the shardings of `abstract`; `stream` is as it was then.

    What a checkpoint lacks beside `params`, `step` and `opt_state` is not in it.
    """
    # `params` lies apart, so that inference and `init_from` read nothing else.
    optimizer = _optimizer_dict(abstract)
    place, kept = _memory(stream)
    folder = self.folder / str(step)
    with _unreadable(folder):
      # A run that began before updates were guarded has no history of them.
      lacking = {*optimizer} - _names(folder / 'optimizer')
      optimizer = {name: tree for name, tree in optimizer.items() if name not in lacking}
      items = self._manager.restore(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardRestore(abstract['params']),
          optimizer=ocp.args.StandardRestore(optimizer),
          **({} if place is None else {ITEM: RestorePlace(place)}),
          **({} if kept is None else {'stream': ocp.args.StandardRestore(kept)}),
        ),
      )
    if kept is not None:
      stream.kept = items['stream']
    opt_state = serialization.from_state_dict(
      abstract['opt_state'], items['optimizer']['opt_state']
    )
    rest = {name: tree for name, tree in items['optimizer'].items() if name in abstract}
    return {'params': items['params'], **rest, 'opt_state': opt_state}

  def close(self) -> None:
    """Waits until everything is on disk."""
    with _storage_errors():
      self._manager.wait_until_finished()
      self._manager.close()


def latest_step(model_dir: str) -> int | None:
  """The newest complete checkpoint of a run; None if there is none.

  A folder without its items (a stray one, or what a killed process left) is no
  checkpoint, whatever its name.
  """
  steps = _complete_steps(epath.Path(model_dir) / FOLDER)
  return max(steps, default=None)


def find(path: str) -> epath.Path:
  """The checkpoint folder meant by a path: itself, or the newest of a run's.

  Raises:
    UserError: there is none.
  """
  path = epath.Path(path)
  # A MODEL_DIR, its folder of checkpoints, or else one checkpoint.
  for folder in (path / FOLDER, path):
    steps = _complete_steps(folder)
    if steps:
      return folder / str(max(steps))
  if _complete(path):
    return path
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


def read_meta(folder: epath.Path) -> dict[str, Any]:
  """The description that a checkpoint carries.

  Raises:
    UserError: unreadable, or of another format version.
  """
  with _unreadable(folder), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
    meta = reader.restore(storage.absolute(folder) / 'meta')
  configs.check(
    meta.get('format') == FORMAT,
    f'checkpoints of format {FORMAT} are read',
    f'format {meta.get("format")!r} in {folder}',
    'use the version that wrote it',
  )
  return meta


def read_params(
  folder: epath.Path,
  abstract: Any,
  *,
  as_stored: bool = False,
  some: bool = False,
  merge: bool = True,
) -> Any:
  """The parameters of a checkpoint, on the shardings of `abstract`.

  Those that it does not hold, since they were not trained, are read from its base. Its
  adapters are merged into them.

  Args:
    folder: the checkpoint.
    abstract: shapes, dtypes and shardings.
    as_stored: keep the dtypes of the files, which may be half as large, instead.
    some: `abstract` may lack parameters that the checkpoint has.
    merge: whether its own adapters are merged; those of its base always are.

  Raises:
    UserError: they do not have the shapes of `abstract`, or are damaged; the base is gone
      or has changed; adapters that cannot be merged.
  """
  meta = read_meta(folder)
  flat = traverse_util.flatten_dict(abstract)
  # Integers that were cast without their scales would be other weights.
  configs.check(
    as_stored or not meta.get('quantized') or not any(quantized.products(flat)),
    'training must begin with plain weights',
    f'{folder}, which is quantised',
    'give the checkpoint that it was made from, or make them plain: python -m '
    f'glm_jax.convert {folder} DST --to=checkpoint --dequantize',
  )
  whole, held = base.of(folder, meta), stored_leaves(folder)
  elsewhere = {k: v for k, v in flat.items() if whole and k not in held}
  own = {k: v for k, v in flat.items() if k not in elsewhere}
  found = _read(folder, own, held, as_stored, some or whole is not None) if own else {}
  if elsewhere:
    rest = traverse_util.unflatten_dict(elsewhere)
    rest = read_params(whole, rest, as_stored=as_stored, some=True)
    found |= traverse_util.flatten_dict(rest)
  if merge and meta.get('adapters'):
    read = lambda wanted: _read(folder, wanted, held, True, True)
    found = merging.merge(found, meta['adapters'], folder, held, read)
  return traverse_util.unflatten_dict(found)


def stored_leaves(folder: epath.Path) -> dict[tuple[str, ...], Any]:
  """Shape and dtype of each array that a checkpoint holds itself, by path."""
  with _unreadable(folder), ocp.StandardCheckpointer() as reader:
    tree = reader.metadata(storage.absolute(folder) / 'params').item_metadata.tree
  return traverse_util.flatten_dict(tree)


def _read(
  folder: epath.Path, flat: Any, held: Any, as_stored: bool, some: bool
) -> dict[Any, Any]:
  """Parameters that a checkpoint holds itself, by path."""
  if some:
    held = {k: v for k, v in held.items() if k in flat}
  abstract, stored = traverse_util.unflatten_dict(flat), traverse_util.unflatten_dict(held)
  shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), abstract)
  with _unreadable(folder), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    stored_shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), stored)
    # Orbax would give arrays of the stored shapes without a word, whatever was asked for.
    if stored_shapes != shapes:
      raise UserError(
        f'the parameters in {folder} must have the shapes of the model, but differ in '
        f'{_first_difference(stored_shapes, shapes)}; use the model configuration it was '
        'trained with.'
      )
    if as_stored:
      abstract = jax.tree.map(
        lambda a, b: jax.ShapeDtypeStruct(a.shape, b.dtype, sharding=a.sharding),
        abstract,
        stored,
      )
    arrays = lambda a: ocp.ArrayRestoreArgs(
      sharding=a.sharding, global_shape=a.shape, dtype=a.dtype
    )
    wanted = ocp.args.PyTreeRestore(
      abstract, restore_args=jax.tree.map(arrays, abstract), partial_restore=some
    )
    found = reader.restore(storage.absolute(folder) / 'params', args=wanted)
  return traverse_util.flatten_dict(found)


def _memory(stream: Any) -> tuple[Any, Any]:
  return (None, None) if stream is None else (stream.place, stream.kept)


def _save_args(tree: Any) -> ocp.args.StandardSave:
  """In small chunks, so that other meshes, and exports, read no more than they need."""
  args = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
  return ocp.args.StandardSave(tree, save_args=jax.tree.map(lambda _: args, tree))


def _optimizer_dict(state: dict[str, Any]) -> dict[str, Any]:
  # As plain dicts: files that spelt optax's classes could not be read once these change.
  rest = {name: tree for name, tree in state.items() if name != 'params'}
  return {**rest, 'opt_state': serialization.to_state_dict(state['opt_state'])}


def _names(item: epath.Path) -> set[str]:
  """Of what an item of a checkpoint holds."""
  with ocp.StandardCheckpointer() as reader:
    return {*reader.metadata(storage.absolute(item)).item_metadata.tree}


def _complete_steps(folder: epath.Path) -> list[int]:
  if not folder.is_dir():
    return []
  return [
    int(path.name) for path in folder.iterdir() if path.name.isdigit() and _complete(path)
  ]


def _complete(path: epath.Path) -> bool:
  # Orbax's files: `_METADATA` of arrays and `metadata` of JSON. A run saves a step under a
  # temporary name, a conversion writes `meta` last: a folder with both is whole. A bucket
  # renames nothing, and Orbax's last file there says so.
  if storage.is_remote(path) and not (path / 'commit_success.txt').exists():
    return False
  return all(
    (path / item / '_METADATA').exists() or (path / item / 'metadata').exists()
    for item in ('params', 'meta')
  )


def _first_difference(stored_shapes: Any, shapes: Any) -> str:
  # A shape is a leaf, though JAX would walk into a tuple.
  stored = {
    jax.tree_util.keystr(path): shape
    for path, shape in jax.tree_util.tree_leaves_with_path(
      stored_shapes, is_leaf=lambda node: isinstance(node, tuple)
    )
  }
  for path, shape in jax.tree_util.tree_leaves_with_path(
    shapes, is_leaf=lambda node: isinstance(node, tuple)
  ):
    name = jax.tree_util.keystr(path)
    if stored.get(name) != shape:
      return f'{name}: {stored.get(name)} there, {shape} here'
  # All of the model's parameters agree: the checkpoint has others besides.
  return f'names: {sorted(stored)[:3]} ... there'


@contextlib.contextmanager
def _unreadable(folder: epath.Path) -> Iterator[None]:
  """Names the checkpoint; Orbax raises many kinds of errors for a damaged one."""
  try:
    yield
  except Exception as error:
    # A refusal that names the checkpoint says more than this one would.
    if isinstance(error, UserError) and str(folder) in str(error):
      raise
    raise UserError(
      f'a checkpoint must be complete and undamaged, got {folder} '
      f'({type(error).__name__}); use another one.'
    ) from error


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
  """Storage failures of TensorStore as ResourceError, which commands report in one line."""
  try:
    yield
  # TensorStore raises RuntimeError, ValueError and others, with the errno in the text.
  except Exception as error:
    number = re.search(r"\[os_error_code='?(\d+)", str(error))
    if number is None:
      raise
    raise ResourceError(
      f'writing a checkpoint failed ({os.strerror(int(number[1]))}); the one before it '
      'is intact; make room and run the same command again.'
    ) from error
