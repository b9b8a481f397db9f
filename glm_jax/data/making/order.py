"""The order of the rows of a corpus in its files, the same for a cache and for shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from glm_jax.data.corpora import parts
from glm_jax.data.corpora.sources import CorpusPart
from glm_jax.data.stream import hashing

# Parts of a corpus whose rows are read one by one, however they lie: 256 MB of text.
_FEW = 4
# Rows of a large corpus that stay together when the stream is shuffled, so that storage is
# asked for tens of kilobytes at a time.
_BLOCK = 32
# Of the order of a large corpus; the stream shuffles its rows again, by the run's.
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Order:
  """How rows are sorted.

  A small corpus keeps the order of its text, and the stream shuffles every row alone. A
  large one is shuffled when it is written, and its stream shuffles blocks of rows.

  Attributes:
    small: whether the corpus is.
    parts: how many it is worked on in.
  """

  small: bool
  parts: int

  @classmethod
  def of(cls, todo: Sequence[CorpusPart]) -> Order:
    """Of a corpus in these parts, which may be smaller than `parts.PART_BYTES`."""
    total = sum(part.size for part in todo if part.ranges)
    few = len(todo) <= _FEW if not total else total <= _FEW * parts.PART_BYTES
    return cls(few, len(todo))

  @property
  def block(self) -> int:
    """Rows that stay together in the stream."""
    return 1 if self.small else _BLOCK

  def keys(self, rows: int, part: int, split: int) -> np.ndarray:
    """[rows] uint64, by which the rows of all parts are sorted.

    Args:
      rows: of the part.
      part: its number.
      split: its number.
    """
    if not self.small:
      return hashing.keys(_SEED, rows, part, split)
    # Evenly in [part, part + 1) / parts of 2^63, each in the middle of its share; in whole
    # numbers, since a float has fewer bits.
    width = 2**63 // self.parts
    step = width // max(rows, 1)
    first = np.uint64(part * width + step // 2)
    return first + np.arange(rows, dtype=np.uint64) * np.uint64(step)

  def shards(self, keys: np.ndarray, count: int) -> np.ndarray:
    """[n] int64, the shard of each row: laid end to end, shards are in the order of keys.

    Example:
      >>> order = Order(small=True, parts=1)
      >>> order.shards(order.keys(6, 0, 0), 3).tolist()
      [0, 0, 1, 1, 2, 2]
    """
    # Of the upper half of a key alone, so that the product fits; keys have 63 or 64 bits.
    upper = (keys >> np.uint64(32)) * np.uint64(count)
    return (upper >> np.uint64(31 if self.small else 32)).astype(np.int64)
