"""`stateless.mix` in NumPy, for what is decided where TensorFlow is not loaded."""

from __future__ import annotations

import numpy as np

# 2^64 over the golden ratio: multiples of it are spread evenly over the uint64s.
GOLDEN = 0x9E3779B97F4A7C15
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
"""Shifts and factors of SplitMix64's finaliser."""


def mix(z: np.ndarray) -> np.ndarray:
  """SplitMix64's finaliser of [n] uint64; see `glm_jax.data.stream.stateless`."""
  for shift, factor in ROUNDS:
    z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
  return z ^ (z >> np.uint64(31))


def keys(seed: int, count: int, *more: int) -> np.ndarray:
  """[count] uint64, random numbers of (seed, *more, i).

  Example:
    >>> a, b = keys(0, 1000), keys(1, 1000)
    >>> len({*a.tolist(), *b.tolist()})
    2000
  """
  # Each number is absorbed in turn; `view` takes negative seeds, too.
  state = np.zeros(1, np.uint64)
  for number in (seed, *more):
    state = mix(state + np.uint64(GOLDEN) + np.array([number], np.int64).view(np.uint64))
  return mix(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN) ^ state)
