"""Checkpoint files of other programs: what is in them, read one tensor at a time.

Hugging Face folders hold `config.json` and `.safetensors` or `.bin` files, in shards
with an index; THUDM's hold `mp_rank_*` files, one a part of the model.
"""

from __future__ import annotations

import math
import operator
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.interop import integers, pickles

# Names of dtypes in safetensors headers; those that a weight of this family may have.
DTYPES = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  # ChatGLM's own integers, see `glm_jax.interop.integers`.
  'I8': np.dtype(np.int8),
}
# In bytes; safetensors' own limit (MAX_HEADER_SIZE).
_LARGEST_HEADER = 100_000_000
# Of an array of NumPy 1; weights have five at most.
_MOST_AXES = 32
INDICES = ('model.safetensors.index.json', 'pytorch_model.bin.index.json')
# The first of these that is there is read: a folder may hold its weights twice.
FILES = (INDICES[0], 'model.safetensors', INDICES[1], 'pytorch_model.bin')
# Megatron-LM and DeepSpeed name the folder of their latest iteration in these files.
_TAGS = ('latest_checkpointed_iteration.txt', 'latest')

# OWNER/MODEL of Hugging Face, which is no path of anything.
_HUB_NAME = r'\w[\w.-]*/\w[\w.-]*'
# What stands in folders of training that hold no model, and what makes one of them.
_OTHERS = {
  'adapter_config.json': 'these are adapters of PEFT: give the checkpoint that they are '
  'for with --base=DIR',
  'zero_to_fp32.py': 'this is a checkpoint of DeepSpeed: put its parts together first '
  '(python zero_to_fp32.py . .)',
}

# What PyTorch may unpickle is set for the process, not for a thread.
_LOCK = threading.Lock()


class TensorSpec(NamedTuple):
  """What a file says of a tensor.

  Attributes:
    shape: its dimensions, as stored.
    dtype: as stored.
    file: the file that holds it.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  file: Path


class Tensors:
  """The tensors of one or more files, by name; nothing is read until asked for."""

  def __init__(self, specs: dict[str, TensorSpec]):
    """
    Args:
      specs: by name.
    """
    self.specs = specs
    # One tensor, not a cache of several: a released embedding alone takes a gigabyte.
    self._last: tuple[str, np.ndarray] | None = None

  def read(self, name: str) -> np.ndarray:
    """A tensor in its stored dtype. The latest one is kept: fused ones are read thrice."""
    with _LOCK:
      if self._last is None or self._last[0] != name:
        self._last = None  # before another one is in memory
        self._last = (name, _read(name, self.specs[name]))
      return self._last[1]


def tensors(path: Path) -> Tensors:
  """Those of one file."""
  return Tensors(_specs(path))


class Source(NamedTuple):
  """A checkpoint of another program.

  Attributes:
    folder: where it is.
    container: 'huggingface' or 'megatron'.
    parts: its tensors; several for `mp_rank_*` files.
    config: content of config.json; empty where there is none.
  """

  folder: Path
  container: str
  parts: tuple[Tensors, ...]
  config: dict[str, Any]


def open_source(folder: Path) -> Source:
  """Finds out what a folder holds, without reading a tensor.

  Raises:
    UserError: no checkpoint, a damaged file, an index that does not fit its files.
  """
  if not folder.is_dir():
    name = folder.as_posix()
    remedy = 'give such a folder'
    if re.fullmatch(_HUB_NAME, name) and not folder.exists():
      remedy += f', or fetch the model: hf download {name} --local-dir {folder.name}'
    raise UserError(f'SRC must be a folder with a checkpoint, got {name!r}; {remedy}.')
  config = _config(folder)
  integers.check_program(folder, config)
  for name in FILES:
    if not (folder / name).exists():
      continue
    if name in INDICES:
      specs = _indexed(folder / name, configs.read_json(folder / name))
    else:
      specs = _specs(folder / name)
    return integers.unpacked(Source(folder, 'huggingface', (Tensors(specs),), config))
  # No Hugging Face name matched: the parts of a tensor-parallel checkpoint, or nothing.
  files = _parts(folder)
  if not files:
    names = sorted(_names(folder))
    remedies = [remedy for name, remedy in _OTHERS.items() if name in names]
    raise UserError(
      'SRC must hold model.safetensors, pytorch_model.bin, an index of their shards, or '
      f'mp_rank_* files, got {str(folder)!r} with {names[:8]}; '
      f'{(*remedies, "give the folder of a checkpoint")[0]}.'
    )
  parts = tuple(Tensors(_specs(file)) for file in files)
  return integers.unpacked(Source(folder, 'megatron', parts, config))


def _names(folder: Path) -> list[str]:
  return [path.name for path in folder.iterdir()]


def _config(folder: Path) -> dict[str, Any]:
  path = folder / 'config.json'
  return configs.read_json(path) if path.exists() else {}


def _indexed(path: Path, index: dict[str, Any]) -> dict[str, TensorSpec]:
  """The shards that an index names, checked against it."""
  file_of = index.get('weight_map')
  if not isinstance(file_of, dict) or not all(isinstance(v, str) for v in file_of.values()):
    raise UserError(
      f"{path} must have a 'weight_map' of names to files, got {str(file_of)[:80]}; fetch "
      'it again.'
    )
  specs: dict[str, TensorSpec] = {}
  for file in sorted(set(file_of.values())):
    # An index comes with the download: a path in it must not lead out of the folder.
    if Path(file).name != file or file in ('.', '..'):
      raise UserError(
        f'an index must name files of its own folder, got {file!r} in {path}; do not use '
        'this checkpoint.'
      )
    if not (path.parent / file).is_file():
      raise UserError(
        f'an index must name files that exist, got {file!r} in {path}; fetch the shard.'
      )
    shard = _specs(path.parent / file)
    # Both ways: a shard of an older download may lack tensors or have others beside them.
    missing = [name for name, at in file_of.items() if at == file and name not in shard]
    extra = [name for name in shard if file_of.get(name) != file]
    if missing or extra:
      raise UserError(
        f'{path.parent / file} must hold what {path.name} says; it lacks {missing[:5]} and '
        f'has {extra[:5]} besides; fetch both again.'
      )
    specs.update(shard)
  return {name: specs[name] for name in file_of}


def _parts(folder: Path) -> list[Path]:
  """`mp_rank_00...` files of the folder, or of the iteration that it calls its latest."""
  for tag in _TAGS:
    if (folder / tag).exists():
      name = (folder / tag).read_text(encoding='utf-8', errors='replace').strip()
      # As in an index: only the name of a folder beside the file.
      if not name or Path(name).name != name or not (folder / name).is_dir():
        raise UserError(
          f'{folder / tag} must name a folder beside it, got {name!r}; name '
          'the one with the mp_rank_* files.'
        )
      folder = folder / name
      break
  ranks = {}
  for path in folder.iterdir():
    match = re.fullmatch(r'mp_rank_(\d+)(_model_states)?\.pt', path.name)
    if match:
      ranks[int(match[1])] = path
  # A missing part in the middle would shift the heads of all that follow.
  if sorted(ranks) != list(range(len(ranks))):
    raise UserError(
      f'the parts of a checkpoint must be mp_rank_00, mp_rank_01, ..., got '
      f'{sorted(path.name for path in ranks.values())} in {folder}; fetch the others.'
    )
  return [ranks[rank] for rank in sorted(ranks)]


def _specs(path: Path) -> dict[str, TensorSpec]:
  with path.open('rb') as file:
    # A clone without git-lfs has text files of 130 bytes in place of the weights.
    if file.read(24) == b'version https://git-lfs.':
      raise UserError(
        f'{path} must be the weights, got a pointer of git-lfs to them; run git lfs pull.'
      )
  if path.suffix == '.safetensors':
    return {
      name: TensorSpec(shape, dtype, path)
      for name, (shape, dtype, _, _) in read_header(path).items()
    }
  pickles.check_archive(path)
  with pickles.opened(path) as tensors:
    integers.check_names(path, tensors)
    pickles.check_values(path, tensors)
    return {
      name: TensorSpec(tuple(tensor.shape), DTYPES[pickles.dtype(path, name, tensor)], path)
      for name, tensor in tensors.items()
    }


# safetensors.safe_open takes twice as long (0.7 s for 0.35 s, 537 MB) and 1.3 x the memory.
def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype, int, int]]:
  """{name: (shape, dtype, first byte, one past the last byte)} of a safetensors file.

  The format is 8 bytes with the header's length, a JSON header, and the tensors. The
  safetensors package says of a truncated file only that it is one; this names the tensor.

  Raises:
    UserError: no such file, a truncated one, or one whose parts overlap or leave gaps.
  """
  size = path.stat().st_size
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or not 0 < length <= min(_LARGEST_HEADER, size - 8):
      raise UserError(
        f'{path} must be a safetensors file, got {size} bytes whose header does not fit; '
        'fetch it again.'
      )
    try:
      # Whatever a damaged header holds fails somewhere in here, and is one message.
      header = configs.parse_json(file.read(length), once=True)
      # The one name in a header that is no tensor's.
      header.pop('__metadata__', None)
      entries = {}
      for name, entry in header.items():
        # Offsets count from the end of the header; as bytes of the file from here on.
        first, last = (8 + length + operator.index(n) for n in entry['data_offsets'])
        shape = tuple(map(operator.index, entry['shape']))
        if len(shape) > _MOST_AXES or not all(0 <= n < 2**63 for n in shape):
          raise ValueError('a shape of no array')
        entries[name] = (shape, str(entry['dtype']), first, last)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(
        f'{path} must be a safetensors file, got a header that is none '
        f'({type(error).__name__}: {error!s:.80}); fetch it again.'
      ) from error
  # All tensors are checked before any is read, so that nothing is converted by halves.
  integers.check_names(path, entries)
  for name, (shape, dtype, first, last) in entries.items():
    if dtype not in DTYPES:
      raise UserError(
        f'{name!r} in {path} must be of {tuple(DTYPES)}, got {dtype}; convert the '
        'checkpoint before it was quantised.'
      )
    bytes_needed = math.prod(shape) * DTYPES[dtype].itemsize
    if not 8 + length <= first <= last or last - first != bytes_needed:
      raise UserError(
        f'{name!r} in {path} must have {bytes_needed} bytes for its shape {shape}, got '
        f'{last - first}; fetch the file again.'
      )
    if last > size:
      raise UserError(
        f'{path} must hold all of its tensors, got a file of {size} bytes that ends '
        f'before the end of {name!r} ({last}); fetch it again.'
      )
  # One behind the other to the end of the file, as the format has it: nothing is read
  # twice, and nothing lies hidden between.
  end = 8 + length
  for name, (_, _, first, last) in sorted(entries.items(), key=lambda item: item[1][2:]):
    configs.check(
      first == end,
      f'the tensors of {path} must follow one another',
      f'{name!r} at {first}, {"behind a gap" if first > end else "in another one"}',
      'do not use this file',
    )
    end = last
  configs.check(
    end == size,
    f'{path} must end with its last tensor',
    f'{size - end} bytes more',
    'do not use this file',
  )
  return {k: (shape, DTYPES[d], a, b) for k, (shape, d, a, b) in entries.items()}


def _read(name: str, spec: TensorSpec) -> np.ndarray:
  if spec.file.suffix == '.safetensors':
    # Read, not mapped: mapped pages would count as memory until the file is closed. The
    # header is read anew, since it is small beside any tensor.
    shape, dtype, first, _ = read_header(spec.file)[name]
    count = int(np.prod(shape, dtype=np.int64))
    values = np.fromfile(spec.file, dtype, count, offset=first)
    # np.fromfile returns fewer values at the end of a file, without an error.
    if values.size != count:
      raise UserError(
        f'{spec.file} must hold all of {name!r}, got {values.size} of {count} values; '
        'fetch it again.'
      )
    return values.reshape(shape)
  with pickles.opened(spec.file) as tensors:
    # A copy, so that nothing keeps the mapping of the file alive.
    return np.array(pickles.to_numpy(tensors[name]))
