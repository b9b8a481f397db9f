"""Several corpora in one stream, by rate: example g is of a corpus that g alone tells.

The stream is a pattern of a thousand examples or so, repeated. In it each corpus has its
exact quota, at places drawn once, and its examples follow each other in order: those
that stand together in a batch stand together in their corpus, and can be read so.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, NamedTuple

import numpy as np

from glm_jax import configs
from glm_jax.configs import at_least
from glm_jax.data.stream import hashing

# Examples of a pattern, at least.
_BLOCK = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureConfig:
  """Corpora beside or instead of `CorpusConfig.corpus`, which each may be what that may.

  Attributes:
    corpora: {name: corpus}; empty for `CorpusConfig.corpus` alone.
    rates: {name: share of the examples}, which need not sum to 1; empty for shares by
      number of rows.
    temperature: T of shares by number of rows, n^(1/T): 1 in proportion, larger ones
      bring small corpora up (mT5, section 3.1).
  """

  corpora: dict[str, str] = dataclasses.field(default_factory=dict)
  rates: dict[str, float] = dataclasses.field(default_factory=dict)
  temperature: Annotated[
    float, at_least(1).but('use 1 for shares in proportion to size')
  ] = 1.0

  def __post_init__(self):
    configs.check_fields(self)
    name = 'MixtureConfig'
    if self.rates:
      configs.check(
        set(self.rates) == set(self.corpora),
        f'{name}.rates must be of the names in {name}.corpora',
        f'rates of {sorted(self.rates)}, corpora {sorted(self.corpora)}',
        'give each corpus a rate, or none',
      )
      rates = list(self.rates.values())
      configs.check(
        min(rates) >= 0 and 0 < sum(rates) < math.inf,
        f'{name}.rates must be 0 or more, and one above 0',
        str(self.rates),
        'give each corpus its share, such as 0.7 and 0.3',
      )
      configs.check(
        self.temperature == 1,
        f'{name}.temperature is of shares by size, and must be 1 beside rates',
        str(self.temperature),
        'leave one of them out',
      )

  def shares(self, sizes: dict[str, int]) -> dict[str, float]:
    """Share of the examples of each corpus, given its rows; they sum to 1.

    Example:
      >>> config = MixtureConfig(corpora={'a': 'a.txt', 'b': 'b.txt'}, temperature=2)
      >>> config.shares({'a': 900, 'b': 100})
      {'a': 0.75, 'b': 0.25}
    """
    weights = self.rates or {k: n ** (1 / self.temperature) for k, n in sizes.items()}
    total = sum(weights.values())
    return {name: weights[name] / total for name in sizes}


class Pattern(NamedTuple):
  """Which corpus the examples of a block are of, and where in it.

  Attributes:
    corpus: [Q] int32, number of the corpus.
    rank: [Q] int64, how many of its examples stand before it in the block.
    quotas: [C] int64, examples of each corpus in a block; they sum to Q.
  """

  corpus: np.ndarray
  rank: np.ndarray
  quotas: np.ndarray


def pattern(shares: list[float], seed: int) -> Pattern:
  """The block of a mixture.

  Quotas are the shares of a thousand examples by largest remainder; a corpus whose share
  is above 0 has one at least, and the block grows until that is not too many.

  Args:
    shares: of each corpus, summing to 1.
    seed: of the order.

  Example:
    >>> pattern([0.75, 0.25], seed=0).quotas.tolist()
    [750, 250]
  """
  smallest = min(share for share in shares if share > 0)
  # The smallest share has ten examples or more: rounding changes it by a twentieth at most.
  size = max(_BLOCK, math.ceil(10 / smallest))
  # Largest remainder: every corpus gets the whole part of what is due to it, and those with
  # the largest fractions one each of the examples left. The 1e-9 is for whole numbers that
  # the product of floats falls short of.
  exact = np.array(shares) * size
  quotas = np.floor(exact + 1e-9).astype(np.int64)
  for i in np.argsort(quotas - exact, kind='stable')[: size - int(quotas.sum())]:
    quotas[i] += 1
  # The examples of the block, corpus after corpus, and then in random order.
  corpus = np.repeat(np.arange(len(shares), dtype=np.int32), quotas)
  corpus = corpus[np.argsort(hashing.keys(seed, size))]
  # Blocks before * quota + rank thus numbers the examples of a corpus without a gap, and
  # those that are near in the stream are near in the corpus.
  rank = np.zeros(size, np.int64)
  for i, quota in enumerate(quotas):
    rank[corpus == i] = np.arange(quota)
  return Pattern(corpus, rank, quotas)
