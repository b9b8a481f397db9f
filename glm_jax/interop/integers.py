"""Integers in the files of other programs: ChatGLM's own, both ways; others are refused.

ChatGLM's quantization.py stores a linear weight [n, m] as int8 [n, m * bits / 8] with a
`weight_scale` [n] beside it. Of 4 bits, a byte has two columns, the even one in its high
half (kernels of quantization.py, and GLM-130B's cuda/quantization.cu).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from glm_jax import configs
from glm_jax.models import quantized

FIELD = 'quantization_bit'
"""Of config.json: 4 or 8; 0 or missing for plain weights."""
_EMBEDDINGS = 'quantization_embeddings'
_SUFFIX = '_scale'
_REMEDY = (
  "give the plain model: quantize makes integers of it here, and ChatGLM's own int4 and "
  'int8 are read as they are'
)
# Files and tensors that another program's integers are told by.
_FILES = {'quantize_config.json': 'GPTQ', 'quant_config.json': 'AWQ'}
_OTHERS = {
  '.qweight': 'GPTQ or AWQ',
  '.SCB': 'bitsandbytes',
  '.absmax': 'bitsandbytes',
  '.weight_packed': 'compressed-tensors',
}


def check_program(where: Path, config: Mapping[str, Any]) -> None:
  """Raises UserError for a folder of another program's integers, by its name."""
  for name, program in _FILES.items():
    _check_own(not (where / name).exists(), f'{program} ({name} in {where})')
  found = config.get('quantization_config')
  named = found if isinstance(found, dict) else {}
  of_bits = any(key.startswith('load_in_') for key in named)
  program = named.get('quant_method') or ('bitsandbytes' if of_bits else str(found)[:40])
  _check_own(not found, f'{program} (quantization_config in {where / "config.json"})')


def check_names(path: Path, names: Iterable[str]) -> None:
  """Raises UserError for tensors of another program's integers."""
  for name in names:
    for ending, program in _OTHERS.items():
      _check_own(not name.endswith(ending), f'{program} ({name!r} in {path})')


def _check_own(ok: bool, received: str) -> None:
  rule = "a quantised checkpoint must be one of ChatGLM's own"
  configs.check(ok, rule, received, _REMEDY)


def unpack(packed: np.ndarray) -> np.ndarray:
  """Bytes [n, m / 2] as integers of 4 bits [n, m].

  Example:
    >>> unpack(np.array([[0x1F, -0x80]], np.int8)).tolist()
    [[1, -1, -8, 0]]
  """
  packed = packed.view(np.int8)
  values = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
  # A shift of int8 to the right keeps the sign.
  values[:, 0::2], values[:, 1::2] = packed >> 4, (packed << 4) >> 4
  return values.astype(ml_dtypes.int4)


def pack(values: np.ndarray) -> np.ndarray:
  """The inverse of `unpack`.

  Example:
    >>> pack(np.array([[1, -1, -8, 0]])).tolist()
    [[31, -128]]
  """
  values = values.astype(np.int8)
  return (values[:, 0::2] << 4) | (values[:, 1::2] & 15)


def unpacked(source: Any) -> Any:
  """A `glm_jax.interop.files.Source` whose weights have the shapes of the model.

  Raises:
    UserError: integers without their scales, or of bits that config.json does not say.
  """
  stored = [
    name
    for part in source.parts
    for name, spec in part.specs.items()
    if spec.dtype == np.int8
  ]
  if not stored:
    return source
  bits, where = source.config.get(FIELD), source.folder / 'config.json'
  configs.check(
    bits in quantized.BITS,
    f'{FIELD} in {where} must be 4 or 8 for the integers of this checkpoint',
    f'{bits!r}, and int8 in {stored[0]!r}',
    'fetch the config.json that came with them, or the checkpoint before it was quantised',
  )
  return source._replace(parts=tuple(Unpacked(part, bits) for part in source.parts))


class Unpacked:
  """Tensors of a checkpoint of ChatGLM's own integers; see `glm_jax.interop.files.Tensors`.

  A weight of a layer is int4 or int8 of its own shape. A quantised embedding is what its
  own code computes of it, in the dtype of its scales: here no embedding is of integers.

  Attributes:
    specs: by name.
  """

  def __init__(self, tensors: Any, bits: int):
    """
    Args:
      tensors: of the files.
      bits: 4 or 8.

    Raises:
      UserError: integers without scales, or scales of no integers.
    """
    self._tensors, self._bits = tensors, bits
    self._last: tuple[str, np.ndarray] | None = None
    self.specs, specs = {}, tensors.specs
    packed = {name for name, spec in specs.items() if spec.dtype == np.int8}
    scales = {name for name in specs if name.endswith(f'.weight{_SUFFIX}')}
    odd = sorted({f'{name}{_SUFFIX}' for name in packed} ^ scales)
    configs.check(
      not odd,
      "a checkpoint of ChatGLM's integers must have a scale beside each of its int8 "
      'weights, and beside nothing else',
      f'one that differs in {odd[:5]}',
      'fetch its files again',
    )
    for name, spec in specs.items():
      if name in packed:
        shape = (*spec.shape[:-1], spec.shape[-1] * 8 // bits)
        kind = quantized.DTYPES[bits]
        if _is_table(name):
          kind = specs[f'{name}{_SUFFIX}'].dtype
        self.specs[name] = spec._replace(shape=shape, dtype=kind)
      elif name not in scales or not _is_table(name):
        self.specs[name] = spec

  def read(self, name: str) -> np.ndarray:
    """A tensor; the latest one is kept, as that of the files is."""
    if self._tensors.specs[name].dtype != np.int8:
      return self._tensors.read(name)
    # Several threads write an export: what one returns is what it has read itself.
    last = self._last
    if last is None or last[0] != name:
      last = self._last = (name, self._integers(name))
    return last[1]

  def _integers(self, name: str) -> np.ndarray:
    packed = self._tensors.read(name)
    values = unpack(packed) if self._bits == 4 else packed
    if not _is_table(name):
      return values
    scales = self._tensors.read(f'{name}{_SUFFIX}')
    # Rounded once, as a product of numbers of half precision is.
    return (values.astype(np.float32) * scales.astype(np.float32)[:, None]).astype(
      scales.dtype
    )


def _is_table(name: str) -> bool:
  """Whether it is an embedding or a head."""
  return '.layers.' not in name


class Dequantized:
  """Leaves of integers and scales as plain weights; see `glm_jax.interop.leaves.Leaves`.

  Attributes:
    specs: by path.
  """

  def __init__(self, leaves: Any, dtype: np.dtype | None):
    """
    Args:
      leaves: of a quantised model.
      dtype: of the plain weights; None for the embedding's.
    """
    self._leaves = leaves
    kind = dtype or leaves.specs['words', 'weight'].dtype
    self.specs = {
      path: spec._replace(dtype=kind) if self._scaled(path) else spec
      for path, spec in leaves.specs.items()
      if path[-1] != quantized.SCALE
    }

  def _scaled(self, path: tuple[str, ...]) -> bool:
    return (
      bool(quantized.inputs_of(path)) and quantized.scale_of(path) in self._leaves.specs
    )

  def read(self, path: tuple[str, ...], layer: int | None) -> np.ndarray:
    """A leaf, or one layer of a stacked one."""
    values = self._leaves.read(path, layer)
    if not self._scaled(path):
      return values
    scales = self._leaves.read(quantized.scale_of(path), layer).astype(np.float32)
    plain = quantized.dequantize(values, scales, quantized.inputs_of(path))
    return plain.astype(self.specs[path].dtype)


def fields(raw: Mapping[str, Any], bits: int) -> dict[str, Any]:
  """What config.json of an export says of integers.

  Args:
    raw: config.json that the model came with.
    bits: 4 or 8; 0 for plain weights.
  """
  result: dict[str, Any] = {}
  if bits or raw.get(FIELD):
    result[FIELD] = bits
  if raw.get(_EMBEDDINGS):
    result[_EMBEDDINGS] = False
  return result
