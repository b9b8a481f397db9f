"""The parameters of a checkpoint one slice at a time, for models larger than memory.

Orbax reads and writes whole trees. Here Orbax writes the frame of a checkpoint, and
TensorStore, the storage below it, the arrays, a layer after the other; what results is
a checkpoint like any other, stored in small chunks so that every mesh reads its own
slices alone.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from glm_jax import configs, storage
from glm_jax.checkpoints import base, description, digests, merging
from glm_jax.checkpoints.damage import unreadable
from glm_jax.models import low_rank, quantized

LeafPath = tuple[str, ...]

_CHUNK_BYTES = 2**26
# A chunk of a run's checkpoint can hold several layers: the next one finds it in the cache.
_CACHE_BYTES = 2**29
# On their way to the disk while the next arrays are read.
_WRITING_BYTES = 2**29
# An integer of 4 bits is a byte before it is compressed; more effort saves nothing more.
_ZSTD = {'id': 'zstd', 'level': 1}
# On disk, at most: evenly spread integers are half of their bytes, and a little.
_INT4_BYTES = 0.55


class LeafSpec(NamedTuple):
  """Shape and dtype of a parameter, all layers of it."""

  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def size(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64))

  @property
  def nbytes(self) -> int:
    """On disk, at most."""
    of_integers = self.dtype == quantized.DTYPES[4]
    return int(self.size * (_INT4_BYTES if of_integers else self.dtype.itemsize))


def cast(specs: Mapping[LeafPath, Any], dtype: np.dtype | None) -> dict[LeafPath, LeafSpec]:
  """Leaves in another dtype, but for integers; in their own for None."""
  return {
    path: LeafSpec(tuple(spec.shape), quantized.cast(spec.dtype, dtype))
    for path, spec in specs.items()
  }


def count(specs: Mapping[LeafPath, LeafSpec]) -> int:
  """Number of parameters; scales of integers are none."""
  return sum(spec.size for path, spec in specs.items() if path[-1] != quantized.SCALE)


class StoredLeaves:
  """Parameters of a checkpoint, read by layer; `Merged` puts adapters into them.

  Attributes:
    specs: shape and stored dtype of each leaf of the model, by path.
    adapted: whether the checkpoint, or one that it rests on, holds adapters.
  """

  def __init__(self, folder: Any):
    """
    Args:
      folder: a checkpoint, see `glm_jax.checkpoints.find`.
    """
    # Where each leaf is: what was not trained is in the checkpoint's base.
    self._params: dict[LeafPath, Path] = {}
    self.specs: dict[LeafPath, LeafSpec] = {}
    # Factors beside a weight as the scaling and the folder of each checkpoint above it.
    self._beside: dict[LeafPath, list[tuple[float, Path]]] = {}
    above: list[tuple[float, Path, set[LeafPath]]] = []
    self.adapted = False
    while folder is not None:
      params = Path(folder).absolute() / 'params'
      meta = description.read_meta(epath.Path(folder))
      with unreadable(folder, 'params'), ocp.StandardCheckpointer() as reader:
        held = flat(reader.metadata(params).item_metadata.tree)
      if adapters := meta.get('adapters'):
        merging.check(adapters, folder)
        self.adapted = True
        above.append((adapters['scaling'], params, {*held}))
      for path, leaf in held.items():
        if path not in self.specs and path[0] != 'adapters':
          self.specs[path] = LeafSpec(tuple(leaf.shape), np.dtype(leaf.dtype))
          self._params[path] = params
          self._beside[path] = [
            (scaling, where)
            for scaling, where, names in above
            if path[-1] == 'weight' and merging.factors_of(path)[0] in names
          ]
      folder = base.of(epath.Path(folder), meta)
    self._context = context()
    self._open: dict[tuple[LeafPath, Path], Any] = {}

  def read(self, path: LeafPath, layer: int | None) -> np.ndarray:
    """A leaf, or one layer of a stacked one, in its stored dtype."""
    return self._read(path, self._params[path], layer)

  def factors(
    self, path: LeafPath, layer: int | None
  ) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
    """(scaling, a, b) of the adapters beside a weight; see `low_rank.merged`."""
    for scaling, params in self._beside[path]:
      a, b = (self._read(name, params, layer) for name in merging.factors_of(path))
      yield scaling, a, b

  def _read(self, path: LeafPath, params: Path, layer: int | None) -> np.ndarray:
    with unreadable(params.parent, '.'.join(path)):
      if (path, params) not in self._open:
        self._open[path, params] = open_leaf(params, path, self._context)
      array = self._open[path, params]
      return np.asarray((array if layer is None else array[layer]).read().result())


def context() -> Any:
  """For `open_leaf`: what several leaves share."""
  return ts.Context({'cache_pool': {'total_bytes_limit': _CACHE_BYTES}})


def open_leaf(item: Any, path: LeafPath, shared: Any) -> Any:
  """An array of a checkpoint as TensorStore's.

  Args:
    item: a folder of arrays, such as `params`.
    path: of the array in it.
    shared: see `context`.
  """
  # Two layouts of Orbax's: a folder for each leaf, as `write` below makes them, or
  # OCDBT, a database in which the same files are keys, as a run saves it.
  name, item = '.'.join(path), storage.absolute(epath.Path(item))
  root = f'{item}/' if storage.is_remote(item) else f'file://{item}/'
  if (item / name).is_dir():
    store = f'{root}{name}/'
  else:
    store = {'driver': 'ocdbt', 'base': root, 'path': f'{name}/'}
  # A chunk that is missing is damage, not zeros.
  spec = {'driver': 'zarr', 'kvstore': store, 'fill_missing_data_reads': False}
  return ts.open(spec, context=shared).result()


class Merged:
  """Leaves with the adapters of their checkpoint in them.

  Attributes:
    specs: by path.
  """

  def __init__(self, leaves: Any, stored: StoredLeaves):
    """
    Args:
      leaves: plain weights; those of `stored`, or what was made of them.
      stored: the checkpoint.

    Raises:
      UserError: the weights are integers.
    """
    configs.check(
      not any(path[-1] == quantized.SCALE for path in leaves.specs),
      'adapters are merged into plain weights',
      'a checkpoint that has them beside integers',
      'merge with --dequantize, or export them alone with --peft',
    )
    self.specs, self._leaves, self._stored = leaves.specs, leaves, stored

  def read(self, path: LeafPath, layer: int | None) -> np.ndarray:
    """A leaf, or one layer of a stacked one."""
    values = self._leaves.read(path, layer)
    for scaling, a, b in self._stored.factors(path, layer):
      values = low_rank.merged(values, a, b, scaling)
    return values


def write(
  folder: Path,
  specs: dict[LeafPath, LeafSpec],
  read: Callable[[LeafPath, int | None], np.ndarray],
  meta: dict[str, Any],
  progress: Callable[[int], Any],
) -> None:
  """Writes a checkpoint slice by slice; called again, it goes on where it stopped.

  Args:
    folder: of the checkpoint; what an interrupted call left in it is kept.
    specs: of every leaf; those under 'layers' are stacked.
    read: gives a leaf, or one layer of it.
    meta: the description that the checkpoint carries.
    progress: told of bytes that are done.
  """
  # 1. The frame. Orbax writes `_METADATA`, which lists the paths of the tree, and a zarr
  # folder for each leaf, 'layers.mlp.up.weight', whose shape and dtype stand in its own
  # `.zarray`. So Orbax is given one byte a leaf, and its folders make room for arrays of
  # the true shapes. Folders rather than OCDBT's database: a second call finds them as the
  # first left them. The journal is made last: without it the frame may be half done, and is
  # begun again.
  params, journal = folder / 'params', folder / 'leaves.txt'
  if not journal.exists():
    shutil.rmtree(params, ignore_errors=True)
    tree: dict[str, Any] = {}
    for path in specs:
      node = tree
      for name in path[:-1]:
        node = node.setdefault(name, {})
      node[path[-1]] = np.zeros(1, np.int8)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
      writer.save(params.absolute(), args=ocp.args.PyTreeSave(tree))
    for path in specs:
      shutil.rmtree(params / '.'.join(path))
    journal.touch()
  # 2. The arrays. TensorStore writes `.zarray` when it opens them, and chunks as they come.
  # The journal has a line for each layer that is on the disk, and for the leaves outside
  # the layers ('rest'), with sums that add up to the digests of the leaves.
  done = dict(_lines(journal.read_text(encoding='utf-8')))
  stores = {k: _store(params / '.'.join(k), k, spec) for k, spec in specs.items()}
  stacked = [path for path in specs if path[0] == 'layers']
  # Adapters, which are small, are written whole.
  layers = specs[stacked[0]].shape[0] if stacked else 0
  # Layer by layer, so that parts of one tensor of another program are read together.
  todo = [('rest', None, [path for path in specs if path[0] != 'layers'])]
  todo += [(f'layer{i}', i, stacked) for i in range(layers)]
  with journal.open('a', encoding='utf-8') as finished:
    for name, layer, paths in todo:
      writing: list[tuple[Any, np.ndarray]] = []
      sums = {}
      for path in paths:
        spec = specs[path]
        if name not in done:
          store = stores[path] if layer is None else stores[path][layer]
          array = read(path, layer)
          writing.append((store.write(array), array))
          part = digests.OfParts(spec.dtype, spec.shape)
          part.add(
            array if layer is None else array[None], () if layer is None else (layer,)
          )
          sums['/'.join(path)] = part.sums
          # The oldest first: it has had the most time.
          while sum(array.nbytes for _, array in writing) > _WRITING_BYTES:
            writing.pop(0)[0].result()
        # Told of layers of an earlier call, too: a bar goes on from there.
        progress(spec.nbytes if layer is None else spec.nbytes // layers)
      # A line is written after the data that it vouches for.
      for future, _ in writing:
        future.result()
      if name not in done:
        finished.write(json.dumps([name, sums]) + '\n')
        finished.flush()
        done[name] = sums
  # 3. The description comes last: a folder is a checkpoint once it has `params` and `meta`.
  shutil.rmtree(folder / 'meta', ignore_errors=True)
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
    content = description.sealed(meta, {'params': _added_up(specs, done.values())})
    writer.save((folder / 'meta').absolute(), args=ocp.args.JsonSave(content))
  journal.unlink()


def _lines(journal: str) -> Iterator[tuple[str, dict[str, list[int]]]]:
  for line in journal.splitlines():
    # The last one may be half of one.
    with contextlib.suppress(ValueError):
      name, sums = configs.parse_json(line)
      yield name, sums


def _added_up(
  specs: Mapping[LeafPath, LeafSpec], parts: Iterable[Mapping[str, list[int]]]
) -> digests.Digests:
  wholes = {'/'.join(k): digests.OfParts(v.dtype, v.shape) for k, v in specs.items()}
  for sums in parts:
    for path, part in sums.items():
      wholes[path].add_sums(part)
  return {path: str(whole) for path, whole in wholes.items()}


def _store(folder: Path, path: LeafPath, spec: LeafSpec) -> Any:
  """An array on disk, opened where an interrupted call began it."""
  return ts.open(
    {
      'driver': 'zarr',
      'kvstore': {'driver': 'file', 'path': f'{folder}/'},
      'metadata': {
        'shape': list(spec.shape),
        'chunks': _chunks(path, spec),
        # NumPy knows these two as raw bytes.
        'dtype': spec.dtype.name
        if spec.dtype in (ml_dtypes.bfloat16, ml_dtypes.int4)
        else spec.dtype.str,
        # Floating-point weights hardly compress.
        'compressor': _ZSTD if spec.dtype in quantized.DTYPES.values() else None,
      },
      # Chunks of zeros are written, too, or readers could not tell them from missing ones.
      'store_data_equal_to_fill_value': True,
    },
    open=True,
    create=True,
  ).result()


def _chunks(path: LeafPath, spec: LeafSpec) -> list[int]:
  """One layer a chunk, halved along its longest axis until it is small."""
  chunks = list(spec.shape)
  if path[0] == 'layers':
    chunks[0] = 1
  while np.prod(chunks, dtype=np.int64) * spec.dtype.itemsize > _CHUNK_BYTES:
    longest = int(np.argmax(chunks))
    chunks[longest] = -(-chunks[longest] // 2)
  return chunks


def flat(tree: Any, path: LeafPath = ()) -> dict[LeafPath, Any]:
  """A tree of dicts as {path: leaf}, in the tree's order."""
  if not isinstance(tree, dict):
    return {path: tree}
  return {k: v for name, node in tree.items() for k, v in flat(node, (*path, name)).items()}
