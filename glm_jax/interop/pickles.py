"""`.bin` and `.pt` files, which are pickles.

PyTorch reads them, and only as plain data (`weights_only`), so no code in them ever runs.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from glm_jax import configs
from glm_jax.configs import UserError


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


def check_archive(path: Path) -> None:
  """Raises UserError for a zip file with parts that PyTorch does not write.

  What is compressed may unpack to a thousand times its size before PyTorch looks at it.
  """
  if not zipfile.is_zipfile(path):
    return
  try:
    with zipfile.ZipFile(path) as archive:
      parts = archive.infolist()
  except (zipfile.BadZipFile, ValueError, NotImplementedError):
    return  # PyTorch will say so
  packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
  whole = sum(part.file_size for part in parts) <= path.stat().st_size
  configs.check(
    not packed and whole,
    f'{path} must hold its parts as they are, one behind the other',
    f'{packed[0]!r} compressed' if packed else 'parts that overlap',
    'do not use this file',
  )


def check_values(path: Path, tensors: Mapping[str, Any]) -> None:
  """Raises UserError for a tensor whose values are not all in the file.

  It repeats some by strides of 0, is sparse, or has none ('meta').
  """
  size = path.stat().st_size
  for name, tensor in tensors.items():
    dense = tensor.is_cpu and str(tensor.layout) == 'torch.strided'
    configs.check(
      dense and tensor.numel() * tensor.element_size() <= size,
      f'{name!r} in {path} must have all of its values there',
      f'the shape {tuple(tensor.shape)} in {size:,} bytes',
      'do not use this file',
    )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[dict[str, Any]]:
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


def dtype(path: Path, name: str, tensor: Any) -> str:
  known = {'torch.float64': 'F64', 'torch.float32': 'F32', 'torch.float16': 'F16'}
  known |= {'torch.bfloat16': 'BF16', 'torch.int8': 'I8'}
  kind = str(tensor.dtype)
  if kind not in known:
    raise UserError(
      f'{name!r} in {path} must be of {tuple(known)}, got {kind}; convert the checkpoint '
      'before it was quantised.'
    )
  return known[kind]


def to_numpy(tensor: Any) -> np.ndarray:
  import torch

  # NumPy has no bfloat16, so `Tensor.numpy` refuses one: its bits travel as int16.
  if tensor.dtype == torch.bfloat16:
    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.contiguous().numpy()
