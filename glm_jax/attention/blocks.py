"""Which blocks of the score matrix a flash kernel visits, from intervals alone.

Queries and keys are cut into blocks; a block of scores is visited if a query of its rows
may see a key of its columns. For the layouts of this family the hull of a block's
intervals has no holes, so that nothing is visited in vain. All of it is traced and cheap
(tens of microseconds a row), and computed once a step, outside the layers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# A TPU's vector registers have 128 lanes: a kernel's blocks are multiples of it.
LANES = 128
# Scores of 1,024 x 1,024 in float32 are 4 MiB of a core's fast memory.
LARGEST_BLOCK = 1024


class Tiles(NamedTuple):
  """How an axis is cut: `size` = `count` x `block`, padding included."""

  block: int
  count: int

  @property
  def size(self) -> int:
    return self.block * self.count


def tiles(length: int, largest: int = LARGEST_BLOCK) -> Tiles:
  """Equal blocks, multiples of 128, with the least padding for their number.

  Example:
    >>> tiles(8192), tiles(568), tiles(2050).size
    (Tiles(block=1024, count=8), Tiles(block=640, count=1), 2304)
  """
  count = math.ceil(length / largest)
  return Tiles(math.ceil(math.ceil(length / count) / LANES) * LANES, count)


class Active(NamedTuple):
  """Two properties of a row's blocks, bool [query blocks, key blocks].

  Attributes:
    visited: some query may see some key.
    full: every query sees every key, so that no mask is needed.
  """

  visited: jax.Array
  full: jax.Array


def active(start_T: jax.Array, end_T: jax.Array, q: Tiles, k: Tiles) -> Active:
  """Classifies the blocks of one row.

  Args:
    start_T: [q.size] int32, first visible key.
    end_T: [q.size] int32, one past the last; an empty interval sees nothing.
    q: how queries are cut.
    k: how keys are cut.

  Example:
    >>> t = jnp.arange(256)
    >>> active(jnp.zeros_like(t), t + 1, Tiles(128, 2), Tiles(128, 2)).visited.tolist()
    [[True, False], [True, True]]
  """
  sees = end_T > start_T
  rows = lambda x: x.reshape(q.count, q.block)
  # The union of the intervals of a block's queries. A query that sees nothing is given
  # what is neutral in a minimum and a maximum, and widens it by nothing.
  lowest = rows(jnp.where(sees, start_T, k.size)).min(1)[:, None]
  highest = rows(jnp.where(sees, end_T, 0)).max(1)[:, None]
  # Their intersection. The same values make it empty: a block with such a query is masked.
  latest_start = rows(jnp.where(sees, start_T, k.size)).max(1)[:, None]
  earliest_end = rows(jnp.where(sees, end_T, 0)).min(1)[:, None]
  # Compared with the keys of each column, [1, key blocks] against [query blocks, 1].
  first = jnp.arange(k.count) * k.block
  last = first + k.block
  return Active(
    (first < highest) & (last > lowest), (latest_start <= first) & (last <= earliest_end)
  )


def one_a_row(visited: jax.Array) -> jax.Array:
  """Adds the first block to rows without any: a kernel must write all of its output."""
  return visited.at[:, 0].set(visited[:, 0] | ~visited.any(1))
