"""Shared word 13-grams: near-duplicates, and what validation shares with training."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

# Words of a run, as in the decontamination of GPT-3 (appendix C) and others.
WORDS = 13


def grams(texts: Sequence[str]) -> list[np.ndarray]:
  """A uint64 hash for each run of 13 words of each text.

  A text of fewer words has one hash, of all of them.

  Example:
    >>> a, b = grams(['to be or not to be', 'to be or not to be'])
    >>> len(a), bool((a == b).all())
    (1, True)
  """
  # A word is hashed once, however often it comes up. The hash of a run is a polynomial in
  # an odd factor, modulo 2^64: uint64 wraps, as meant.
  number = functools.lru_cache(maxsize=None)(_hash)
  factors = np.array(
    [pow(0x9E3779B97F4A7C15, i + 1, 1 << 64) for i in range(WORDS)], np.uint64
  )
  hashes = []
  for text in texts:
    words = np.array([number(word) for word in text.split()], np.uint64)
    count = max(len(words) - WORDS + 1, 1)
    total = np.zeros(count, np.uint64)
    # Thirteen vector sums instead of a loop over runs.
    for i in range(min(WORDS, len(words))):
      total += words[i : i + count] * factors[i]
    hashes.append(total)
  return hashes


def near_duplicates(hashes: Sequence[np.ndarray]) -> np.ndarray:
  """[documents] bool: more than half of its 13-grams stand in documents before it."""
  # The document of each hash. np.unique tells where a hash is first, and documents are in
  # order, so owner[first] is the first document that has it.
  owner = np.repeat(np.arange(len(hashes)), [len(h) for h in hashes])
  _, first, inverse = np.unique(
    np.concatenate(hashes), return_index=True, return_inverse=True
  )
  seen_before = owner[first][inverse] < owner
  return np.bincount(owner, seen_before) > 0.5 * np.bincount(owner)


def shared(hashes: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
  """[documents] share of each one's 13-grams that stand in any of `others`."""
  known = np.unique(np.concatenate(others))
  is_known = np.isin(np.concatenate(hashes), known)
  owner = np.repeat(np.arange(len(hashes)), [len(h) for h in hashes])
  return np.bincount(owner, is_known) / np.bincount(owner)


def _hash(word: str) -> int:
  # Python's own hash of a string differs from process to process.
  return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), 'little')
