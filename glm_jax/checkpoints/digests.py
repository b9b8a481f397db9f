"""A digest of every array: what was saved is what is restored, on whatever mesh.

With b the bits of an element as an unsigned number of 32 bits, the halves of a digest are

  sum m(b) * (2 * place + 1) mod 2**32,  place = sum over axes of index * an odd constant,

of m(b) = b and of two xor-shifts of b (Marsaglia, 2003), each with its own constants. One
element that is another always shows: m is one to one, so m(b) changes by something that is
not 0 mod 2**32, and times an odd number it stays so. Sums do not depend on the order or on
the devices they are computed in, places need no index that overflows, and sums of parts,
such as layers, add up to those of the whole.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Digests = dict[str, str]
"""By path, 'layers/mlp/up/weight': 'float32[2,64,256] 0123456789abcdef'."""

# Odd, and unlike each other (the fractions of square roots of primes, as in SHA-512).
_ODD = (
  (0x6A09E667, 0xBB67AE85, 0x3C6EF373, 0xA54FF53B, 0x510E527F, 0x9B05688D, 0x1F83D9AB),
  (0xCBBB9D5D, 0x629A292B, 0x9159015B, 0x152FECD9, 0x67332667, 0x8EB44A87, 0xDB0C2E0D),
)
# Elements that the host looks at together: they and what is made of them stay in its cache.
_BLOCK = 2**16


def of_arrays(tree: Any) -> tuple[Digests, list[str]]:
  """Digests of arrays on their mesh, in one program; all processes get the same.

  Args:
    tree: dicts of arrays.

  Returns:
    The digests, and the paths of arrays with a number that is not finite.
  """
  leaves = flat(tree)
  if not leaves:
    return {}, []
  sums = np.asarray(program(leaves)([*leaves.values()]))
  digests = {
    path: _text(leaf.dtype, leaf.shape, own)
    for (path, leaf), own in zip(leaves.items(), sums, strict=True)
  }
  return digests, [p for p, own in zip(leaves, sums, strict=True) if own[2]]


def program(leaves: Mapping[str, Any]) -> Any:
  """What computes them, jitted: a list of arrays -> [len, 3] uint32, see `of_arrays`.

  Args:
    leaves: arrays, or their shapes, dtypes and shardings, by path.
  """
  mesh = next(
    (a.sharding.mesh for a in leaves.values() if isinstance(a.sharding, NamedSharding)),
    None,
  )
  return _program(None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def flat(tree: Any, path: str = '') -> dict[str, Any]:
  """Arrays of nested dicts by path, sorted.

  Example:
    >>> flat({'b': 1, 'a': {'c': 2}})
    {'a/c': 2, 'b': 1}
  """
  if tree is None:
    return {}
  if not isinstance(tree, Mapping):
    return {path: tree}
  nodes = [flat(tree[name], f'{path}/{name}' if path else name) for name in sorted(tree)]
  return {k: v for node in nodes for k, v in node.items()}


@functools.cache
def _program(out: Any) -> Any:
  def sums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sums(leaf) for leaf in leaves])

  return jax.jit(sums, out_shardings=out)


def _sums(array: jax.Array) -> jax.Array:
  """[3] uint32: both halves, and whether something is not finite."""
  bits = _bits(array, jnp)
  halves = [
    (mixed * place).sum(dtype=jnp.uint32)
    for mixed, place in zip((bits, _mixed(bits)), _places(bits.shape), strict=True)
  ]
  wrong = jnp.uint32(0)
  if jnp.issubdtype(array.dtype, jnp.floating):
    wrong = (~jnp.isfinite(array)).any().astype(jnp.uint32)
  return jnp.stack([*halves, wrong])


def _bits(array: Any, numpy: Any) -> Any:
  """As uint32; two of them, on one more axis, for an element of 64 bits."""
  if array.dtype in (ml_dtypes.int4, ml_dtypes.uint4):
    array = array.astype(numpy.int8)
  if array.dtype == bool:
    array = array.astype(numpy.uint8)
  width = min(array.dtype.itemsize, 4)
  unsigned = np.dtype(f'uint{8 * width}')
  if numpy is jnp:
    return lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
  words = [array.dtype.itemsize // 4] if array.dtype.itemsize > 4 else []
  return array.reshape(-1).view(unsigned).reshape((*array.shape, *words)).astype(np.uint32)


def _mixed(bits: Any) -> Any:
  """Other bits, one to one: places at a distance of 2**16 are told apart by it."""
  bits = bits ^ (bits << 13)
  return bits ^ (bits >> 17)


def _constant(half: int, axis: int) -> int:
  odd = _ODD[half]
  # Beyond seven axes, others of the same: times an odd number, they stay odd.
  return odd[axis % len(odd)] * (2 * (axis // len(odd)) + 1) % 2**32


def _places(shape: Sequence[int]) -> list[jax.Array]:
  """2 * place + 1 of each element, for both halves."""
  places = []
  for half in range(2):
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
      index = lax.broadcasted_iota(jnp.uint32, tuple(shape), axis)
      place += index * jnp.uint32(_constant(half, axis))
    places.append(2 * place + 1)
  return places


class OfParts:
  """The digest of an array that the host sees in parts; equals that of `of_arrays`."""

  def __init__(self, dtype: Any, shape: Sequence[int]):
    """
    Args:
      dtype: of the array.
      shape: of all of it.
    """
    self.dtype, self.shape = np.dtype(dtype), tuple(shape)
    self.sums = [0, 0]

  def add(self, part: np.ndarray, begin: Sequence[int] = ()) -> None:
    """Takes note of a part.

    Args:
      part: with the axes of the array.
      begin: where it begins on the first axes; at 0 on the others.
    """
    part = np.ascontiguousarray(part, self.dtype).reshape(part.shape)
    begin = (*begin, *[0] * (part.ndim - len(begin)))
    if part.size > _BLOCK and part.ndim:
      # In blocks along the first axis that is longer than 1.
      axis = next(i for i, size in enumerate(part.shape) if size > 1)
      rows = max(1, _BLOCK * part.shape[axis] // part.size)
      for row in range(0, part.shape[axis], rows):
        block = part[(*[slice(None)] * axis, slice(row, row + rows))]
        at = (*begin[:axis], begin[axis] + row, *begin[axis + 1 :])
        self._add(block, at) if block.size <= _BLOCK else self.add(block, at)
      return
    self._add(part, begin)

  def add_sums(self, sums: Sequence[int]) -> None:
    """Takes note of another's `sums`, of other parts."""
    self.sums = [(a + b) % 2**32 for a, b in zip(self.sums, sums, strict=True)]

  def _add(self, part: np.ndarray, begin: Sequence[int]) -> None:
    bits = _bits(part, np)
    begin = (*begin, *[0] * (bits.ndim - len(begin)))
    added = []
    for half, mixed in enumerate((bits, _mixed(bits))):
      place = np.ones((1,) * bits.ndim, np.uint32)
      for axis, (first, size) in enumerate(zip(begin, bits.shape, strict=True)):
        index = np.arange(first, first + size, dtype=np.uint64) % 2**32
        of_axis = (index * (2 * _constant(half, axis) % 2**32)).astype(np.uint32)
        place = place + of_axis.reshape(-1, *[1] * (bits.ndim - axis - 1))
      # Products and sums of unsigned integers wrap, which is mod 2**32.
      added.append(int(np.multiply(mixed, place).sum(dtype=np.uint32)))
    self.add_sums(added)

  def __str__(self) -> str:
    return _text(self.dtype, self.shape, self.sums)


def of_numpy(array: Any) -> str:
  """The digest of one array on the host.

  Example:
    >>> of_numpy(np.arange(3, dtype=np.int32))
    'int32[3] 246300097a08c5a5'
  """
  array = np.asarray(array)
  whole = OfParts(array.dtype, array.shape)
  whole.add(array)
  return str(whole)


def _text(dtype: Any, shape: Sequence[int], sums: Any) -> str:
  return f'{np.dtype(dtype)}[{",".join(map(str, shape))}] {sums[0]:08x}{sums[1]:08x}'


def of_json(content: Any) -> str:
  """SHA-256 of what JSON would make of something.

  Example:
    >>> of_json({'b': 1, 'a': (2,)}) == of_json({'a': [2], 'b': 1})
    True
  """
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def together(digests: Mapping[str, str]) -> str:
  """One short digest of several.

  Example:
    >>> together({'a': 'int8[1] 0000000000000000'})
    'ea85a6d5776f1523'
  """
  return of_json(dict(digests))[:16]


def difference(there: Mapping[str, str], here: Mapping[str, str]) -> str:
  """The first array that is not as it was saved, in words; '' if all are.

  Example:
    >>> difference({'a': 'int8[1] 00'}, {'a': 'int8[1] 01'})
    'a has other bits than were saved'
  """
  for path, digest in sorted(here.items()):
    if path not in there:
      return f'{path} was not saved with it'
    if there[path] != digest:
      what = [text.split()[0] for text in (there[path], digest)]
      if what[0] != what[1]:
        return f'{path} is {what[1]} and was saved as {what[0]}'
      return f'{path} has other bits than were saved'
  return ''
