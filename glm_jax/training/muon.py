"""Muon: momenta of matrices made orthogonal, by optax; AdamW for all that is no matrix."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import optax
from optax import contrib

# The weights of layers, [L, ...], as matrices: axes that a product sums over, and axes that
# it makes. The heads of one projection are one matrix, each layer has its own.
_MATRICES = {
  'q': ((1,), (2, 3)),
  'k': ((1,), (2, 3)),
  'v': ((1,), (2, 3)),
  'out': ((1, 2), (3,)),
  'up': ((1,), (2,)),
  'gate': ((1,), (2,)),
  'down': ((1,), (2,)),
}
# The root mean square that AdamW's updates usually have, so that its rates and its decay
# suit matrices, too (Liu et al. 2025, Muon is Scalable for LLM Training, section 2.2).
_RMS = 0.2


def scale_by_muon(
  momentum: float, momentum_dtype: str, rest: optax.GradientTransformation
) -> optax.GradientTransformation:
  """The directions in which matrices of layers, and the other parameters, are updated.

  A matrix [A, B] goes along U V' of its momentum U S V' (Nesterov's, by five steps of
  Newton and Schulz), times 0.2 sqrt(max(A, B)).

  Args:
    momentum: decay of the momenta.
    momentum_dtype: of them, which are all that is kept of a matrix.
    rest: for embeddings, the head, biases, norms, and what an adapter adds.
  """
  muon = optax.chain(
    contrib.scale_by_muon(
      beta=momentum, mu_dtype=momentum_dtype, weight_dimension_numbers=_dimension_numbers
    ),
    optax.stateless(lambda updates, _: _by_path(_scaled, updates)),
  )
  label = lambda path, _: 'matrix' if _axes(path) else 'rest'
  return optax.partition({'matrix': muon, 'rest': rest}, lambda tree: _by_path(label, tree))


def _by_path(function: Any, tree: Any) -> Any:
  # A box is one parameter: what is left out of a part's state is the box, not its content.
  is_box = lambda node: isinstance(node, nn.meta.AxisMetadata)
  return jax.tree_util.tree_map_with_path(function, tree, is_leaf=is_box)


def _axes(path: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """What `_MATRICES` says of the parameter with that path."""
  names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
  if names[0] != 'layers' or names[-1] != 'weight':
    return None
  return _MATRICES.get(names[-2])


def _dimension_numbers(updates: Any) -> Any:
  return _by_path(lambda path, _: contrib.MuonDimensionNumbers(*_axes(path)), updates)


def _scaled(path: Any, update: jax.Array) -> jax.Array:
  sizes = (math.prod(update.shape[axis] for axis in axes) for axes in _axes(path))
  return update * (_RMS * math.sqrt(max(sizes)))
