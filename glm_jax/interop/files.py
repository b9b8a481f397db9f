"""Checkpoint files of other programs: what is in them, read one tensor at a time.

Hugging Face folders hold `config.json` and `.safetensors` or `.bin` files, in shards
with an index; THUDM's hold `mp_rank_*` files, one a part of the model. `.bin` and `.pt`
files are pickles: PyTorch reads them, and only as plain data (`weights_only`), so no
code in them ever runs.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.interop import integers

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
  with _pickled(path) as tensors:
    integers.check_names(path, tensors)
    return {
      name: TensorSpec(tuple(tensor.shape), _torch_dtype(path, name, tensor), path)
      for name, tensor in tensors.items()
    }


# safetensors.safe_open takes twice as long (0.7 s for 0.35 s, 537 MB) and 1.3 x the memory.
def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype, int, int]]:
  """{name: (shape, dtype, first byte, one past the last byte)} of a safetensors file.

  The format is 8 bytes with the header's length, a JSON header, and the tensors. The
  safetensors package says of a truncated file only that it is one; this names the tensor.

  Raises:
    UserError: no such file, or a truncated one.
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
      header = json.loads(file.read(length))
      # The one name in a header that is no tensor's.
      header.pop('__metadata__', None)
      entries = {}
      for name, entry in header.items():
        # Offsets count from the end of the header; as bytes of the file from here on.
        first, last = (8 + length + int(offset) for offset in entry['data_offsets'])
        shape = tuple(int(n) for n in entry['shape'])
        entries[name] = (shape, entry['dtype'], first, last)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(
        f'{path} must be a safetensors file, got a header that is none '
        f'({type(error).__name__}); fetch it again.'
      ) from error
  # All tensors are checked before any is read, so that nothing is converted by halves.
  integers.check_names(path, entries)
  for name, (shape, dtype, first, last) in entries.items():
    if dtype not in DTYPES:
      raise UserError(
        f'{name!r} in {path} must be of {tuple(DTYPES)}, got {dtype}; convert the '
        'checkpoint before it was quantised.'
      )
    bytes_needed = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
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
  with _pickled(spec.file) as tensors:
    # A copy, so that nothing keeps the mapping of the file alive.
    return np.array(_to_numpy(tensors[name]))


def require_torch(path: Path) -> Any:
  """The torch package, for a file that only PyTorch reads or writes.

  Raises:
    UserError: it is not installed.
  """
  try:
    import torch
  except ImportError as error:
    raise UserError(
      f'PyTorch must be installed for .bin and .pt files, got {path.name} and no torch; '
      'pip install torch, or use a checkpoint in .safetensors.'
    ) from error
  return torch


@contextlib.contextmanager
def _pickled(path: Path) -> Iterator[dict[str, Any]]:
  """The state dict of a PyTorch file, mapped while inside."""
  torch = require_torch(path)
  try:
    # weights_only allows tensors and containers alone; these few more run no code.
    # What DeepSpeed keeps beside the weights: plain data, too.
    import argparse
    import collections

    safe = [argparse.Namespace, collections.OrderedDict, np.ndarray, np.dtype]
    safe += [type(np.dtype(t)) for t in (np.uint32, np.int64, np.float64)]
    # NumPy 1 and 2 pickle arrays and numbers through modules of different names.
    for function in (np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]):
      safe += [function, (function, f'numpy.core.multiarray.{function.__name__}')]
    with torch.serialization.safe_globals(safe):
      try:
        content = torch.load(path, map_location='cpu', mmap=True, weights_only=True)
      except RuntimeError as error:
        if 'mmap can only be used' not in str(error):
          raise
        # Files of PyTorch before 1.6 cannot be mapped.
        content = torch.load(path, map_location='cpu', weights_only=True)
  except Exception as error:  # PyTorch raises many kinds
    if re.search('Unsupported (global|operand|class)', str(error), re.IGNORECASE):
      raise UserError(
        f'{path} must hold plain tensors, got a pickle that would run code '
        f'({_first_line(error)}); nothing of it was run. Do not use this file.'
      ) from error
    raise UserError(
      f'{path} must be a complete PyTorch file, got one that cannot be read '
      f'({_first_line(error)}); fetch it again.'
    ) from error
  # DeepSpeed keeps the state dict under this name, beside counters and its own state.
  content = content.get('module', content) if isinstance(content, dict) else content
  if not isinstance(content, dict):
    raise UserError(
      f'{path} must hold tensors by name, got {type(content).__name__}; give the weights.'
    )
  tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
  others = sorted(set(content) - set(tensors), key=str)
  if others:
    raise UserError(
      f'{path} must hold tensors by name, got {others[:5]} besides; give the weights alone.'
    )
  yield tensors


def _first_line(error: Exception) -> str:
  text = re.sub(r'\s+', ' ', str(error))
  # PyTorch says which global it refused behind a paragraph of advice to allow it.
  refused = re.search(r'Unsupported [^:]*: (GLOBAL )?[\w.]+', text)
  return (refused[0] if refused else text)[:160].strip()


def _torch_dtype(path: Path, name: str, tensor: Any) -> np.dtype:
  known = {'torch.float64': 'F64', 'torch.float32': 'F32', 'torch.float16': 'F16'}
  known |= {'torch.bfloat16': 'BF16', 'torch.int8': 'I8'}
  kind = str(tensor.dtype)
  if kind not in known:
    raise UserError(
      f'{name!r} in {path} must be of {tuple(known)}, got {kind}; convert the checkpoint '
      'before it was quantised.'
    )
  return DTYPES[known[kind]]


def _to_numpy(tensor: Any) -> np.ndarray:
  import torch

  # NumPy has no bfloat16, so `Tensor.numpy` refuses one: its bits travel as int16.
  if tensor.dtype == torch.bfloat16:
    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.contiguous().numpy()
