"""Metrics as (sum, count) pairs, which add up over micro-batches, devices and batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def averages(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
  """(sum, count) pairs to means, leaving out what was not counted.

  Example:
    >>> averages({'loss': (6.0, 2), 'loss/document': (0.0, 0)})
    {'loss': 3.0}
  """
  pairs = {k: (float(total), float(count)) for k, (total, count) in metrics.items()}
  return {k: total / count for k, (total, count) in pairs.items() if count > 0}


def add(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
  """Adds (sum, count) pairs by name."""
  # Python's floats are float64: sums over a long validation stay exact enough.
  return {
    k: tuple(
      float(x) + float(y) for x, y in zip(a.get(k, (0, 0)), b.get(k, (0, 0)), strict=True)
    )
    for k in {**a, **b}
  }
