"""Second moments of gradients in less memory than float32 numbers: rounded, or factored."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

# Of Adafactor (Shazeer and Stern 2018): the moment's decay is 1 - t ** -_DECAY.
_DECAY = 0.8


def rounded(adam: optax.GradientTransformation) -> optax.GradientTransformation:
  """Adam whose second moment is kept in bfloat16, rounded at random.

  With beta2 near 1 a step changes the moment by less than half of what bfloat16 resolves
  (1/256): rounded to the nearest, it would never shrink. Rounded up as often as the
  remainder says, it is right on average.

  The numbers drawn depend on the step and the parameter alone: they are the same on every
  mesh, and after a run was resumed.

  Args:
    adam: an `optax.scale_by_adam`.
  """

  def init(params: Any) -> Any:
    state = adam.init(params)
    return state._replace(nu=jax.tree.map(lambda v: v.astype(jnp.bfloat16), state.nu))

  def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    nu = jax.tree.map(lambda v: v.astype(jnp.float32), state.nu)
    updates, state = adam.update(gradients, state._replace(nu=nu), params)
    # By name: of JAX's generators, this one draws the same on every mesh.
    key = jax.random.fold_in(jax.random.key(0, impl='threefry2x32'), state.count)
    leaves, tree = jax.tree.flatten(state.nu)
    leaves = [_at_random(v, jax.random.fold_in(key, i)) for i, v in enumerate(leaves)]
    return updates, state._replace(nu=jax.tree.unflatten(tree, leaves))

  return optax.GradientTransformation(init, update)


def _at_random(x: jax.Array, key: jax.Array) -> jax.Array:
  """float32 numbers as bfloat16, one of the two neighbours; on average they are equal."""
  # bfloat16 is the upper half of float32. What is added to the lower one carries into it
  # with a probability of what is dropped.
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  upper = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
  # To what is no number, nothing may be added.
  return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))


def is_weight(path: Any) -> bool:
  """Whether a parameter, by its path, is none of the biases and scales of norms."""
  # Paths also hold the keys of Flax's boxes, which are no dictionary keys.
  names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
  return names[-1] not in ('bias', 'scale')


class FactoredState(NamedTuple):
  """Of `scale_by_factored_moment`.

  Attributes:
    count: of updates, int32.
    moments: in place of each parameter, float32: {'row', 'column'}, the means of its
      squared gradients over all axes but the row's, and over the row's; of a bias or a
      norm's scale, all of them.
  """

  count: jax.Array
  moments: Any


def scale_by_factored_moment(beta2: float, epsilon: float) -> optax.GradientTransformation:
  """Adafactor's scaling: g / sqrt(row x column / mean(row)), of root mean square <= 1.

  The rows of a matrix are its longest axis, which in this family is the model's width or
  the vocabulary, or in an MLP the inner size; the columns are all others together, so that
  heads and their sizes [N, H] are one axis, as they are in the product. Layers are stacked
  [L, ...] and know nothing of each other: the result is that of a loop over them.
  (optax's `scale_by_factored_rms` takes the two longest axes, L among them.)

  Args:
    beta2: the decay is `min(1 - t ** -0.8, beta2)` at step t = 1, 2, ...; without the
      bound the moment would in the end hardly move (Zhai et al. 2022).
    epsilon: its square is added to the squared gradient.
  """

  def init(params: Any) -> FactoredState:
    is_box = lambda node: isinstance(node, nn.meta.AxisMetadata)
    moments = jax.tree_util.tree_map_with_path(_zeros, params, is_leaf=is_box)
    return FactoredState(jnp.zeros((), jnp.int32), moments)

  def update(
    gradients: Any, state: FactoredState, params: Any = None
  ) -> tuple[Any, FactoredState]:
    count = state.count + 1
    decay = jnp.minimum(1 - count.astype(jnp.float32) ** -_DECAY, beta2)

    def moment_of(path: Any, gradient: jax.Array, moment: Any) -> Any:
      square = jnp.square(gradient) + epsilon**2
      if isinstance(moment, dict):
        means = {k: square.mean(axes) for k, axes in _axes(path, gradient.shape).items()}
      else:
        means = square
      return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, moment, means)

    def scaled(path: Any, gradient: jax.Array, moment: Any) -> jax.Array:
      own = _own(path, gradient.shape)
      if isinstance(moment, dict):
        axes = _axes(path, gradient.shape)
        row, column = (jnp.expand_dims(moment[k], axes[k]) for k in ('row', 'column'))
        row /= row.mean(own, keepdims=True)
        result = gradient * jax.lax.rsqrt(row) * jax.lax.rsqrt(column)
      else:
        result = gradient * jax.lax.rsqrt(moment)
      size = jnp.sqrt(jnp.square(result).mean(own, keepdims=True))
      return result / jnp.maximum(size, 1)

    with_path = jax.tree_util.tree_map_with_path
    moments = with_path(moment_of, gradients, state.moments)
    return with_path(scaled, gradients, moments), FactoredState(count, moments)

  return optax.GradientTransformation(init, update)


def _own(path: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Axes of a parameter's own: all but that of the layers."""
  stacked = getattr(path[0], 'key', None) == 'layers'
  return tuple(range(stacked, len(shape)))


def _axes(path: Any, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
  """Axes over which the means are; {} for what is no matrix."""
  own = _own(path, shape)
  if len(own) < 2 or not is_weight(path):
    return {}
  longest = own[int(np.argmax([shape[axis] for axis in own]))]
  return {'row': tuple(axis for axis in own if axis != longest), 'column': (longest,)}


def _zeros(path: Any, param: Any) -> Any:
  """The moments of a parameter, in boxes if it is in one: with the axes that they keep."""
  boxed = isinstance(param, nn.meta.AxisMetadata)
  shape = (param.unbox(apply_constraint=False) if boxed else param).shape

  def zeros(over: tuple[int, ...] = ()) -> Any:
    kept = [axis for axis in range(len(shape)) if axis not in over]
    values = jnp.zeros([shape[axis] for axis in kept], jnp.float32)
    if not boxed:
      return values
    return param.replace(value=values, names=tuple(param.names[axis] for axis in kept))

  axes = _axes(path, shape)
  return {name: zeros(over) for name, over in axes.items()} if axes else zeros()
