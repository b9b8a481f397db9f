"""Low-rank factors as a change of the weight that they stand beside (LoRA)."""

from __future__ import annotations

from typing import Any

import numpy as np


def merged(weight: Any, a: Any, b: Any, scaling: float, xp: Any = np) -> Any:
  """`weight + scaling a b`, summed in float32, in the weight's dtype.

  Args:
    weight: [*inputs, *outputs], of one layer.
    a: [*inputs, rank].
    b: [rank, *outputs].
    scaling: alpha / rank, or as `training.adapters.LoRAConfig` says.
    xp: numpy, or jax.numpy.

  Example:
    >>> merged(np.ones((2, 2)), np.array([[1.0], [0]]), np.array([[1.0, 2]]), 0.5).tolist()
    [[1.5, 2.0], [1.0, 1.0]]
  """
  product = xp.tensordot(a.astype(np.float32), b.astype(np.float32), 1)
  return (weight.astype(np.float32) + scaling * product).astype(weight.dtype)
