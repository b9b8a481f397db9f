"""Foreign tensors as our leaves, and our leaves as foreign tensors.

Both directions go layer by layer through the views of `formats`, so that no more than a
few layers are ever in memory.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from glm_jax.checkpoints.slices import LeafSpec
from glm_jax.configs import UserError
from glm_jax.interop import files, integers, pickles, reward_models
from glm_jax.interop.files import Source
from glm_jax.interop.formats import FORMATS, HEADS, WORDS, Entry, with_scales
from glm_jax.interop.formats import Path as Tree
from glm_jax.interop.recognise import Recognised
from glm_jax.models import quantized

_WORKERS = 4


class Leaves(Protocol):
  """Parameters, wherever they are.

  Attributes:
    specs: shape and dtype of each leaf, by path.
  """

  specs: Mapping[Tree, Any]

  def read(self, path: Tree, layer: int | None) -> np.ndarray:
    """A leaf, or one layer of a stacked one."""


class ForeignLeaves:
  """The tensors of another program's checkpoint, as our leaves.

  Attributes:
    specs: see `Leaves`; dtypes are those of the files.
  """

  def __init__(
    self, source: Source, recognised: Recognised, shapes: Mapping[Tree, tuple[int, ...]]
  ):
    """
    Args:
      source: the files.
      recognised: what they are.
      shapes: of every leaf of the model, scales of integers among them.

    Raises:
      UserError: missing or unknown tensors, shapes that do not fit the config.
    """
    self._source, self._recognised = source, recognised
    # Every leaf, or layer of one, lies in exactly one foreign tensor.
    entries = FORMATS[recognised.format].entries(recognised.config, len(source.parts))
    if recognised.bits:
      entries = [*with_scales(entries)]
    self._where: dict[tuple[Tree, int | None], tuple[Entry, Any]] = {}
    for entry in entries:
      for part in entry.parts:
        self._where[part.path, part.layer] = (entry, part)
    for rank, tensors in enumerate(source.parts):
      _check_names(source, recognised, entries, set(tensors.specs), rank)
      for entry in entries:
        _check_shape(entry, tensors.specs[recognised.prefix + entry.name])
    # In the order of the files: what shares a tensor is read while that is at hand.
    ordered = dict.fromkeys(path for path, _ in self._where)
    self.specs = {path: LeafSpec(shapes[path], self._dtype(path)) for path in ordered}

  def read(self, path: Tree, layer: int | None) -> np.ndarray:
    """See `Leaves`.

    Raises:
      UserError: parts of a checkpoint that should hold the same do not.
    """
    # The source keeps the latest tensor, so that q, k and v of a fused one read it once.
    entry, part = self._where[path, layer]
    name = self._recognised.prefix + entry.name
    views = [part.view(tensors.read(name)) for tensors in self._source.parts]
    # Tensor parallelism divides this leaf: the parts follow each other along one axis.
    if part.axis is not None:
      return np.concatenate(views, axis=part.axis) if len(views) > 1 else views[0]
    # Each part has a copy: norms, and biases behind a sum over parts.
    for rank, view in enumerate(views):
      if not np.array_equal(view, views[0], equal_nan=True):
        raise UserError(
          f'{name!r} must be the same in every part of the checkpoint, but differs '
          f'between mp_rank_00 and mp_rank_{rank:02}; fetch both again.'
        )
    return views[0]

  def buffers(self) -> dict[str, list[Any]]:
    """Dtype and values of the tensors that are computed, as JSON, for an export."""
    prefix, tensors = self._recognised.prefix, self._source.parts[0]
    buffers = {name: tensors.read(prefix + name) for name in self._recognised.buffers}
    # A float64 holds each value exactly, and JSON writes it in full.
    return {
      name: [values.dtype.name, values.astype(float).tolist()]
      for name, values in buffers.items()
    }

  def _dtype(self, path: Tree) -> np.dtype:
    dtypes = {
      tensors.specs[self._recognised.prefix + entry.name].dtype
      for (where, _), (entry, _) in self._where.items()
      if where == path
      for tensors in self._source.parts
    }
    # A stacked leaf is one array: its layers cannot be of different dtypes.
    if len(dtypes) != 1:
      raise UserError(
        f'{".".join(path)} must have one dtype in all layers, got '
        f'{sorted(map(str, dtypes))}; convert the checkpoint to one first.'
      )
    return dtypes.pop()


def _check_names(source, recognised, entries, names: set[str], rank: int) -> None:
  expected = {recognised.prefix + entry.name for entry in entries}
  # What may be there besides: computed tensors, and a tied head that is stored twice.
  allowed = {recognised.prefix + name for name in recognised.buffers}
  if recognised.repeats_head:
    allowed.add(recognised.prefix + HEADS[recognised.format])
  missing, unknown = sorted(expected - names), sorted(names - expected - allowed)
  if not missing and not unknown:
    return
  where = f' (mp_rank_{rank:02})' if len(source.parts) > 1 else ''
  problems = [f'lacks {_shorten(missing)}'] if missing else []
  problems += [f'has {_shorten(unknown)} besides'] if unknown else []
  raise UserError(
    f"a checkpoint of format '{recognised.format}' with num_layers="
    f'{recognised.config.num_layers} must hold {len(expected)} tensors{where}, got one '
    f'that {" and ".join(problems)}; fetch the missing ones, or give the checkpoint of the '
    'plain model.'
  )


def _shorten(names: list[str]) -> str:
  rest = f' and {len(names) - 8} more' if len(names) > 8 else ''
  return ', '.join(names[:8]) + rest


def _check_shape(entry: Entry, spec: files.TensorSpec) -> None:
  if spec.shape == entry.shape:
    return
  if len(spec.shape) != len(entry.shape):
    fields = 'the number of dimensions disagrees'
  else:
    wrong = [
      fields
      for fields, a, b in zip(entry.sizes, spec.shape, entry.shape, strict=True)
      if a != b
    ]
    fields = f'{" and ".join(wrong)} of the config disagrees'
  raise UserError(
    f'{entry.name!r} in {spec.file} must have shape {entry.shape} by the config, got '
    f'{spec.shape}: {fields}; correct config.json, or use --set FIELD=VALUE.'
  )


class Foreign(NamedTuple):
  """A tensor to be written.

  Attributes:
    name: as the file has it.
    shape: as the file has it.
    dtype: as the file has it.
    make: gives the content; called when the tensor's turn comes, so that only a few are in
      memory.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def foreign_tensors(
  leaves: Leaves,
  format: str,
  config: Any,
  *,
  rank: int = 0,
  parts: int = 1,
  prefix: str = '',
  repeats_head: bool = False,
  dtype: np.dtype | None = None,
  buffers: Mapping[str, list[Any]] | None = None,
) -> Iterator[Foreign]:
  """Our leaves as the tensors of one part of a foreign checkpoint.

  Args:
    leaves: the parameters; of a reward model, see `reward_models`.
    format: a key of `FORMATS`.
    config: the model.
    rank: number of the part, from 0.
    parts: how many there are.
    prefix: before every name.
    repeats_head: store a tied head a second time, as some formats do.
    dtype: to cast to, but for integers; None keeps what is stored.
    buffers: those of the files that the model came from (`ForeignLeaves.buffers`); None
      computes those of the format.
  """
  entries = reward_models.entries(format, config, parts, leaves.specs)
  if any(path[-1] == quantized.SCALE for path in leaves.specs):
    entries = [*with_scales(entries)]
  for entry in entries:
    kinds = {np.dtype(leaves.specs[part.path].dtype) for part in entry.parts}
    # One foreign tensor may hold leaves of several dtypes: the widest loses nothing.
    kind = quantized.cast(np.result_type(*kinds), dtype)
    make = functools.partial(_make, leaves, entry, rank, parts, kind)
    if kind == quantized.DTYPES[4]:
      shape, packed = (
        (entry.shape[0], entry.shape[1] // 2),
        lambda m=make: integers.pack(m()),
      )
      yield Foreign(prefix + entry.name, shape, np.dtype(np.int8), packed)
      continue
    yield Foreign(prefix + entry.name, entry.shape, kind, make)
    if repeats_head and entry.name == WORDS.get(format):
      yield Foreign(prefix + HEADS[format], entry.shape, kind, make)
  kind = np.dtype(leaves.specs['words', 'weight'].dtype)
  computed = _buffers(format, config, kind)
  # Those of the original, if there are any, are bit for bit what was downloaded.
  if buffers is not None:
    computed = {k: np.array(values, stored) for k, (stored, values) in buffers.items()}
  for name, values in computed.items():
    values = values.astype(dtype or values.dtype)
    make = functools.partial(np.copy, values)
    yield Foreign(prefix + name, values.shape, values.dtype, make)


def _make(leaves, entry: Entry, rank: int, parts: int, dtype: np.dtype) -> np.ndarray:
  out = np.empty(entry.shape, dtype)
  for part in entry.parts:
    view, leaf = part.view(out), leaves.read(part.path, part.layer)
    if part.axis is not None:
      size = view.shape[part.axis]
      # Share number `rank` of the leaf; np.take copies, which one part does not need.
      if parts > 1:
        leaf = np.take(leaf, range(rank * size, (rank + 1) * size), part.axis)
    # A view that NumPy had to copy would take the values and leave `out` as it was.
    assert np.shares_memory(view, out), entry.name
    view[...] = leaf.astype(dtype, copy=False)
  return out


def _buffers(format: str, c: Any, dtype: np.dtype) -> dict[str, np.ndarray]:
  """Rotary frequencies, which the programs of these formats store, and do not read."""
  if format == 'chatglm':
    # modeling_chatglm.py, RotaryEmbedding: half of each head for either of two positions,
    # in float16, whatever the dtype of the weights.
    size = c.head_size // 2
    table = 1 / 10000 ** (np.arange(0, size, 2, dtype=np.float32) / size)
    table = table.astype(np.float16).astype(dtype)
    at = 'transformer.layers.{}.attention.rotary_emb.inv_freq'
    return {at.format(i): table for i in range(c.num_layers)}
  if format == 'chatglm2':
    # modeling_chatglm.py of ChatGLM2 computes in the dtype of the weights: every step is
    # rounded to it, so that the bits agree with released files.
    exponents = np.arange(0, c.rotated_size, 2).astype(dtype) / dtype.type(c.rotated_size)
    powers = (10000.0 ** exponents.astype(np.float64)).astype(dtype)
    return {'transformer.rotary_pos_emb.inv_freq': (1 / powers).astype(dtype)}
  return {}


def shards(tensors: list[Foreign], shard_bytes: int) -> dict[str, list[Foreign]]:
  """Tensors by the file that they go to, none much larger than `shard_bytes`."""
  # In the order of the tensors: a new file begins where the next one would overflow.
  groups: list[list[Foreign]] = [[]]
  size = 0
  for tensor in tensors:
    if groups[-1] and size + tensor.nbytes > shard_bytes:
      groups.append([])
      size = 0
    groups[-1].append(tensor)
    size += tensor.nbytes
  # transformers looks for this name first, and for shards only through an index.
  if len(groups) == 1:
    return {'model.safetensors': groups[0]}
  return {
    f'model-{number:05}-of-{len(groups):05}.safetensors': group
    for number, group in enumerate(groups, 1)
  }


def write_shards(
  folder: Path, groups: Mapping[str, list[Foreign]], progress: Callable[[int], Any]
) -> None:
  """safetensors files and, for several, their index; finished files are kept."""
  from safetensors.numpy import save_file

  workers = ThreadPoolExecutor(_WORKERS)  # most of the time goes into transposing
  for name, tensors in groups.items():
    if not (folder / name).exists():
      temporary = folder / f'.{name}'
      arrays = workers.map(lambda tensor: tensor.make(), tensors)
      content = {tensor.name: array for tensor, array in zip(tensors, arrays, strict=True)}
      save_file(content, temporary, metadata={'format': 'pt'})
      # One shard at a time in memory.
      del content
      # safetensors lets only the owner read its files.
      temporary.chmod(0o666 & ~_umask())
      # Only a complete file has its name: one that is there was written to its end.
      temporary.rename(folder / name)
    progress(sum(tensor.nbytes for tensor in tensors))
  if len(groups) > 1:
    index = {
      'metadata': {'total_size': sum(t.nbytes for g in groups.values() for t in g)},
      'weight_map': {t.name: name for name, g in groups.items() for t in g},
    }
    text = json.dumps(index, indent=2) + '\n'
    (folder / files.INDICES[0]).write_text(text, encoding='utf-8')


def _umask() -> int:
  # The system tells the mask only when another one is set.
  mask = os.umask(0)
  os.umask(mask)
  return mask


def write_megatron(
  folder: Path, tag: str, parts: list[list[Foreign]], progress: Callable[[int], Any]
) -> None:
  """`mp_rank_*` files of PyTorch, and the file that names their folder."""
  torch = pickles.require_torch(Path('mp_rank_00_model_states.pt'))
  (folder / tag).mkdir(exist_ok=True)
  for rank, tensors in enumerate(parts):
    path = folder / tag / f'mp_rank_{rank:02}_model_states.pt'
    temporary, scratch = path.with_suffix('.partial'), path.with_suffix('.scratch')
    if not path.exists():
      # Each tensor is written to a scratch file and mapped, so that torch.save reads them
      # from the disk one after the other.
      module = {
        t.name: _mapped(torch, scratch.with_suffix(f'.{i}'), t)
        for i, t in enumerate(tensors)
      }
      torch.save({'module': module}, temporary)
      del module
      # The scratch files of this part, or of a run that was interrupted in it.
      for scratch_file in folder.glob(f'{tag}/*.[0-9]*'):
        scratch_file.unlink()
      temporary.rename(path)
    progress(sum(tensor.nbytes for tensor in tensors))
  (folder / 'latest_checkpointed_iteration.txt').write_text(f'{tag}\n', encoding='utf-8')


def _mapped(torch: Any, path: Path, tensor: Foreign) -> Any:
  """A tensor in a file of its own: PyTorch writes a state dict only as a whole."""
  # As bytes: torch.from_numpy knows no bfloat16. An empty file could not be mapped.
  array = np.memmap(path, np.uint8, 'w+', shape=(max(tensor.nbytes, 1),))
  array[: tensor.nbytes] = tensor.make().reshape(-1).view(np.uint8)
  array.flush()
  kind = {'float16': torch.float16, 'bfloat16': torch.bfloat16, 'float32': torch.float32}
  kind['float64'] = torch.float64
  flat = torch.from_numpy(array[: tensor.nbytes]).view(kind[tensor.dtype.name])
  return flat.reshape(tensor.shape)
