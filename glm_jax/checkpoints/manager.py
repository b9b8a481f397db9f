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
import functools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization, traverse_util
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from glm_jax import configs, storage
from glm_jax.checkpoints import base, damage, description, digests, merging, steps
from glm_jax.checkpoints.damage import Damaged, unreadable
from glm_jax.checkpoints.description import read_meta
from glm_jax.checkpoints.place import ITEM, PlaceHandler, RestorePlace, SavePlace
from glm_jax.checkpoints.steps import FOLDER
from glm_jax.configs import ResourceError, UserError, at_least, one_of
from glm_jax.models import quantized

_ITEMS = ('params', 'optimizer', 'meta', 'stream', ITEM)
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


class _Best(checkpoint_managers.PreservationPolicy):
  """Keeps the steps whose validation was best, whichever process had it.

  Orbax's own policy knows the metrics of what its process has saved: in a run that was
  started again, it would remove the best checkpoint of all before.
  """

  def __init__(self, config: CheckpointConfig, folder: epath.Path):
    self._config, self._scores = config, dict[int, float]()
    for step in steps.complete(folder):
      with contextlib.suppress(Damaged):
        self.see(step, read_meta(folder / str(step)).get('metrics') or {})

  def see(self, step: int, metrics: Mapping[str, float]) -> None:
    """Takes note of a step; without the metric, such as between validations, of nothing."""
    self._scores.pop(step, None)  # of an earlier try at it
    value = metrics.get(self._config.best_metric, math.nan)
    if math.isfinite(value):
      self._scores[step] = value if self._config.best_mode == 'min' else -value

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Of each checkpoint that there is."""
    # Of equal ones the earlier, on which the others did not improve.
    there = [(self._scores[c.step], c.step) for c in checkpoints if c.step in self._scores]
    best = {step for _, step in sorted(there)[: self._config.keep_best]}
    return [c.step in best for c in checkpoints]


class Checkpoints:
  """The checkpoints of one run, written asynchronously."""

  def __init__(self, model_dir: str, config: CheckpointConfig):
    """
    Args:
      model_dir: of the run.
      config: what to keep.
    """
    self.folder = epath.Path(model_dir) / FOLDER
    self._best = _Best(config, self.folder)
    policies = [checkpoint_managers.LatestN(config.keep), self._best]
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
    self._best.see(int(state['step']), metrics)
    place, kept = _memory(stream)
    optimizer = _optimizer_dict(state)
    items = {'params': state['params'], 'optimizer': optimizer}
    items |= {} if kept is None else {'stream': kept}
    # Of the arrays as they are now: the next step takes their memory.
    sums, _ = _digests_of(items)
    with _storage_errors():
      self._manager.save(
        int(state['step']),
        args=ocp.args.Composite(
          params=_save_args(state['params']),
          optimizer=_save_args(optimizer),
          meta=ocp.args.JsonSave(description.sealed({**meta, 'metrics': metrics}, sums)),
          **({} if place is None else {ITEM: SavePlace(place)}),
          **({} if kept is None else {'stream': _save_args(kept)}),
        ),
        # The run decides which steps are saved, not Orbax's own interval.
        force=True,
      )

  def restore(
    self, step: int, abstract: dict[str, Any], stream: Any = None
  ) -> dict[str, Any]:
    """See `restore`."""
    return restore(self.folder / str(step), abstract, stream)

  def close(self) -> None:
    """Waits until everything is on disk."""
    with _storage_errors():
      self._manager.wait_until_finished()
      self._manager.close()


def restore(
  folder: epath.Path, abstract: dict[str, Any], stream: Any = None
) -> dict[str, Any]:
  """The state of a checkpoint, compared with what was saved.

  Without a manager, whose restoring has barriers that a process which fails does not reach.
  What a checkpoint lacks beside `params`, `step` and `opt_state` is not in the state.

  Args:
    folder: the checkpoint.
    abstract: shapes, dtypes and shardings.
    stream: of the run; it is as it was then.

  Raises:
    Damaged: on all processes alike.
    UserError: the stream cannot go on from there.
  """
  # `params` lies apart, so that inference and `init_from` read nothing else.
  optimizer = _optimizer_dict(abstract)
  wanted = {'params': abstract['params'], 'optimizer': optimizer}
  place, kept = _memory(stream)
  wanted |= {} if kept is None else {'stream': kept}
  items, failed = {}, None
  try:
    meta = read_meta(folder)
    with unreadable(folder, 'optimizer'):
      held = _names(folder / 'optimizer') | {'step', 'opt_state'}
    # A run that began before updates were guarded has no history of them.
    wanted['optimizer'] = {name: tree for name, tree in optimizer.items() if name in held}
    for item, tree in wanted.items():
      with unreadable(folder, item):
        items[item] = ocp.StandardCheckpointHandler().restore(
          storage.absolute(folder) / item, args=ocp.args.StandardRestore(tree)
        )
    if place is not None:
      with unreadable(folder, ITEM):
        PlaceHandler().restore(storage.absolute(folder) / ITEM, RestorePlace(place))
  except Damaged as error:
    failed = error
  if jax.process_count() > 1:
    others = multihost_utils.process_allgather(jnp.int32(failed is not None))
    if others.any() and failed is None:
      failed = Damaged(folder, 'another process cannot read it')
  if failed is not None:
    raise failed
  sums, infinite = _digests_of(items)
  for item, own in sums.items():
    _compare(folder, meta, item, own)
  if wrong := [path for path in infinite if not path.startswith('stream/')]:
    raise Damaged(folder, f'{wrong[0]} has numbers that are not finite')
  if kept is not None:
    stream.kept = items['stream']
  opt_state = serialization.from_state_dict(
    abstract['opt_state'], items['optimizer']['opt_state']
  )
  return {'params': items['params'], **items['optimizer'], 'opt_state': opt_state}


def _digests_of(items: dict[str, Any]) -> tuple[dict[str, digests.Digests], list[str]]:
  """Digests of each item, by one program, and paths of what is not finite."""
  sums, infinite = digests.of_arrays(items)
  return {
    item: {
      path.removeprefix(f'{item}/'): digest
      for path, digest in sums.items()
      if path.startswith(f'{item}/')
    }
    for item in items
  }, infinite


def _compare(folder: epath.Path, meta: Any, item: str, sums: digests.Digests) -> None:
  """Raises Damaged for arrays that are not as they were saved."""
  saved = meta.digests(item)
  if saved is None:
    return damage.tell(damage.not_compared(folder))
  if words := digests.difference(saved, sums):
    raise Damaged(folder, f'{item}: {words}')


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
  found = {}
  if own:
    found = _read(folder, meta, own, held, as_stored, some or whole is not None)
  if elsewhere:
    rest = traverse_util.unflatten_dict(elsewhere)
    rest = read_params(whole, rest, as_stored=as_stored, some=True)
    found |= traverse_util.flatten_dict(rest)
  if merge and meta.get('adapters'):
    read = lambda wanted: _read(folder, meta, wanted, held, True, True)
    found = merging.merge(found, meta['adapters'], folder, held, read)
  return traverse_util.unflatten_dict(found)


def stored_leaves(folder: epath.Path) -> dict[tuple[str, ...], Any]:
  """Shape and dtype of each array that a checkpoint holds itself, by path."""
  with unreadable(folder, 'params'), ocp.StandardCheckpointer() as reader:
    tree = reader.metadata(storage.absolute(folder) / 'params').item_metadata.tree
  return traverse_util.flatten_dict(tree)


def _read(
  folder: epath.Path, meta: Any, flat: Any, held: Any, as_stored: bool, some: bool
) -> dict[Any, Any]:
  """Parameters that a checkpoint holds itself, by path."""
  if some:
    held = {k: v for k, v in held.items() if k in flat}
  abstract, stored = traverse_util.unflatten_dict(flat), traverse_util.unflatten_dict(held)
  shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), abstract)
  stored_shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), stored)
  # Orbax would give arrays of the stored shapes without a word, whatever was asked for.
  if stored_shapes != shapes:
    raise UserError(
      f'the parameters in {folder} must have the shapes of the model, but differ in '
      f'{_first_difference(stored_shapes, shapes)}; use the model configuration it was '
      'trained with.'
    )
  # Compared in the dtypes that they were saved in, and cast after that.
  as_saved = jax.tree.map(
    lambda a, b: jax.ShapeDtypeStruct(a.shape, b.dtype, sharding=a.sharding),
    abstract,
    stored,
  )
  arrays = lambda a: ocp.ArrayRestoreArgs(
    sharding=a.sharding, global_shape=a.shape, dtype=a.dtype
  )
  wanted = ocp.args.PyTreeRestore(
    as_saved, restore_args=jax.tree.map(arrays, as_saved), partial_restore=some
  )
  with (
    unreadable(folder, 'params'),
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader,
  ):
    found = reader.restore(storage.absolute(folder) / 'params', args=wanted)
  _compare(folder, meta, 'params', digests.of_arrays(found)[0])
  result = traverse_util.flatten_dict(found)
  if not as_stored:
    del found  # one after the other, so that not all are there twice
    for path, leaf in flat.items():
      if result[path].dtype != leaf.dtype:
        result[path] = _cast(leaf.dtype, leaf.sharding)(result[path])
  return result


@functools.cache
def _cast(dtype: Any, sharding: Any) -> Any:
  return jax.jit(lambda array: array.astype(dtype), out_shardings=sharding)


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
