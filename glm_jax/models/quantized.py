"""Weights as integers: symmetric, a scale for each output, or for each group of inputs.

As ChatGLM's own quantization.py: scale = max |w| / (2 ** (bits - 1) - 1), integers
round(w / scale). What is quantised are the weights of a layer's products; embeddings, the
head, norms and biases stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from glm_jax import configs

BITS = (8, 4)
DTYPES = {8: np.dtype(np.int8), 4: np.dtype(ml_dtypes.int4)}
SCALE = 'weight_scale'
"""The leaf of a checkpoint that holds the scales of the `weight` beside it."""
# Logical axes of a weight that end in its product, by the module's name.
_INPUTS = dict.fromkeys(('q', 'k', 'v', 'up', 'gate'), ('embed',))
_INPUTS |= {'out': ('heads', 'head_dim'), 'down': ('mlp',)}


def inputs_of(path: tuple[str, ...]) -> int:
  """Axes of a layer's weight that end in its product; 0 for what is not quantised.

  Example:
    >>> inputs_of(('layers', 'attention', 'out', 'weight'))
    2
    >>> inputs_of(('words', 'weight')), inputs_of(('layers', 'attention', 'q', 'bias'))
    (0, 0)
  """
  quantised = path[0] == 'layers' and path[-1] == 'weight'
  return len(_INPUTS.get(path[-2], ())) if quantised else 0


def products(paths: Iterable[tuple[str, ...]]) -> Iterator[tuple[tuple[str, ...], int]]:
  """Those that are quantised, and how many of their axes end in the product."""
  return ((path, inputs) for path in paths if (inputs := inputs_of(path)))


def reads_the_width(path: tuple[str, ...]) -> bool:
  """Whether a product is over the width of the model, which is whole on every device."""
  return _INPUTS[path[-2]] == ('embed',)


def cast(stored: np.dtype, dtype: np.dtype | None) -> np.dtype:
  """What a leaf becomes where weights are cast: integers stay; so does all for None."""
  return stored if dtype is None or stored in DTYPES.values() else dtype


def scale_of(path: tuple[str, ...]) -> tuple[str, ...]:
  """The path of a weight's scales in a checkpoint.

  Example:
    >>> scale_of(('layers', 'mlp', 'up', 'weight'))
    ('layers', 'mlp', 'up', 'weight_scale')
  """
  return (*path[:-1], SCALE)


def quantize(
  weight: np.ndarray, inputs: int, bits: int, group: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Integers and their scales.

  Args:
    weight: [*inputs, *outputs], of one layer.
    inputs: how many of its axes end in the product.
    bits: 8 or 4.
    group: neighbouring inputs that share a scale; 0 for all of them.

  Returns:
    integers of the weight's shape, int8 or int4, and scales, float32: [*outputs], or
    [inputs / group, *outputs].

  Raises:
    UserError: the group does not divide the inputs.

  Example:
    >>> integers, scales = quantize(np.array([[1.0, -14.0], [3.5, 7.0]]), 1, 4)
    >>> integers.tolist(), scales.tolist()
    ([[2, -7], [7, 4]], [0.5, 2.0])
  """
  outputs = weight.shape[inputs:]
  rows = int(np.prod(weight.shape[:inputs]))
  check_group(group, rows)
  grouped = weight.astype(np.float32).reshape(-1, group or rows, *outputs)
  scales = np.abs(grouped).max(1) / np.float32(2 ** (bits - 1) - 1)
  # A row of zeros has no scale.
  scales = np.where(scales > 0, scales, np.float32(1)).astype(np.float32)
  integers = np.rint(grouped / scales[:, None]).reshape(weight.shape).astype(DTYPES[bits])
  return integers, scales if group else scales[0]


def dequantize(integers: np.ndarray, scales: np.ndarray, inputs: int) -> np.ndarray:
  """float32: the inverse of `quantize`, but for what was rounded.

  Example:
    >>> dequantize(np.array([[2, -7], [7, 4]], np.int8), np.array([0.5, 2.0]), 1).tolist()
    [[1.0, -14.0], [3.5, 8.0]]
  """
  outputs = integers.shape[inputs:]
  groups = scales.shape[0] if scales.ndim > len(outputs) else 1
  values = integers.astype(np.float32).reshape(groups, -1, *outputs)
  return (values * scales.reshape(groups, 1, *outputs)).reshape(integers.shape)


def check_group(group: int, rows: int) -> None:
  """Raises UserError for a group that does not divide the inputs of a product."""
  configs.check(
    group == 0 or (group > 0 and rows % group == 0),
    'a group must divide the inputs of every product',
    f'--group={group}, and a product with {rows} inputs',
    'give a divisor, such as 128 or 64, or 0 for a scale for each output',
  )


def scales_shape(shape: tuple[int, ...], inputs: int, group: int) -> tuple[int, ...]:
  """Of a weight's scales.

  Args:
    shape: of the weight, [*inputs, *outputs].
    inputs: how many of its axes end in the product.
    group: see `quantize`.

  Example:
    >>> scales_shape((4, 32, 64), 2, 16), scales_shape((4, 32, 64), 2, 0)
    ((8, 64), (64,))
  """
  outputs = shape[inputs:]
  return (int(np.prod(shape[:inputs])) // group, *outputs) if group else outputs


def of_tree(params: Any, bits: int, group: int = 0) -> dict[str, Any]:
  """The variables of a model whose layers' weights are integers.

  Args:
    params: a nested dict of arrays, layers stacked.
    bits: see `quantize`.
    group: likewise.

  Returns:
    {'params', 'scales'}.
  """
  from flax import traverse_util

  flat = dict(traverse_util.flatten_dict(params))
  scales = {}
  for path, inputs in products(flat):
    pairs = [quantize(np.asarray(layer), inputs, bits, group) for layer in flat[path]]
    flat[path], scales[path] = (np.stack(part) for part in zip(*pairs, strict=True))
  nested = traverse_util.unflatten_dict
  return {'params': nested(flat), 'scales': nested(scales)}
