"""Products of activations and weights: where dtype and sharding are decided, once for all
layers.

Weights are float32 arrays with a name for each axis; the mesh axes behind the names
stand in `glm_jax.sharding`. Flax's DenseGeneral cannot hold such weights under
`jax.set_mesh`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from glm_jax import sharding


class Einsum(nn.Module):
  """`einsum(equation, x, weight) + bias`, computed in `dtype`.

  Attributes:
    equation: such as 'BTD,DNH->BTNH'.
    shape: of the weight.
    axes: a logical axis name for each of its dimensions.
    bias_axes: how many of the last weight axes the bias has; 0 for none.
    init_std: standard deviation of the normal initialisation; the bias begins at 0.
  """

  equation: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  bias_axes: int
  init_std: float
  dtype: Any

  def setup(self):
    self.weight = self.param(
      'weight', partitioned(nn.initializers.normal(self.init_std), self.axes), self.shape
    )
    if self.bias_axes:
      self.bias = self.param(
        'bias',
        partitioned(nn.initializers.zeros, self.axes[-self.bias_axes :]),
        self.shape[-self.bias_axes :],
      )

  def __call__(self, x: jax.Array) -> jax.Array:
    return together(x, self)[0]

  def parameters(self) -> tuple[jax.Array, jax.Array | None]:
    """The weight in the computation's dtype; the bias as it is."""
    return self.weight.astype(self.dtype), self.bias if self.bias_axes else None


def together(x: jax.Array, *modules: Einsum) -> list[jax.Array]:
  """Several projections of the same activations, whose gradients are summed at once."""
  parameters = [module.parameters() for module in modules]
  products = einsum(
    modules[0].equation,
    x.astype(modules[0].dtype),
    [weight for weight, _ in parameters],
    [module.axes for module in modules],
  )
  # A bias is added in float32, so that its gradient, a sum over all tokens, is, too.
  return [
    product if bias is None else (product + bias).astype(product.dtype)
    for product, (_, bias) in zip(products, parameters, strict=True)
  ]


def einsum(
  equation: str,
  x: jax.Array,
  weights: list[jax.Array],
  axes: list[tuple[str, ...]],
  dtype: Any = None,
) -> list[jax.Array]:
  """`jnp.einsum` with each weight; each device gathers it over the width and no more.

  Left to itself, XLA sums some gradients over all devices before each takes its part of
  the sum; the transpose of a gather is to scatter first.

  Args:
    equation: of tokens [B, T, ...] and a weight.
    x: activations.
    weights: of the same dtype.
    axes: logical axes of each weight.
    dtype: of the sums and the results; None for that of `x`.
  """
  # The comments follow 'BTD,DNH->BTNH', the queries' projection, under the rules 'fsdp':
  # a device holds x [B/(data fsdp), T/sequence, D] and weight [D/fsdp, N/tensor, H].
  # 1. Letters: 'BTD' of the tokens, 'DNH' of the weight, 'BTNH' of the result.
  inputs, result = equation.split('->')
  tokens, letters = inputs.split(',')
  stored = [_stored(weight, a) for weight, a in zip(weights, axes, strict=True)]
  # 2. Each letter's logical axis in the product: B act_batch, T act_length, N heads,
  # H head_dim; and D none, since the width is whole where weights meet activations.
  by_letter = [
    {'B': 'act_batch', 'T': 'act_length'}
    | {k: None if n == 'embed' else n for k, n in zip(letters, names, strict=True)}
    for names in stored
  ]
  # 3. The width goes last, 'DNH' -> 'NHD': elsewhere, XLA makes a sum over all devices of a
  # large scatter.
  width = axes[0].index('embed')
  width_last = letters[:width] + letters[width + 1 :] + letters[width]
  of = lambda axes, letters: tuple(axes[letter] for letter in letters)
  mesh_axes = lambda names: {a for n in names if n for a in sharding.axes_of(n)}
  # Mesh axes that `x` is cut over: data, fsdp, sequence; for 'BTNH,NHD->BTD' also tensor.
  cut = mesh_axes(of(by_letter[0], tokens))

  def local_products(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    # 4. Each device along tensor has heads of its own but the same x, whose gradient is
    # thus a sum over tensor. `pcast` says so, and its transpose is that sum. Cast once, so
    # that the gradients of all products are summed together.
    uncut = {a for names in by_letter for a in mesh_axes(names.values())} - cut
    varying = jax.lax.pcast(x, tuple(uncut), to='varying') if uncut else x
    products = []
    for number, (weight, letter_axes) in enumerate(zip(weights, by_letter, strict=True)):
      with jax.named_scope(f'product_{number}'):
        # 5. [N/tensor, H, D/fsdp] -> [N/tensor, H, D].
        weight = gathered(jnp.moveaxis(weight, width, -1))
        # Key heads that are whole on every device take x uncast: JAX would not believe that
        # the product of a varying x is the same on all devices along tensor.
        local_x = varying if mesh_axes(letter_axes.values()) - cut else x
        y = jnp.einsum(
          f'{tokens},{width_last}->{result}', local_x, weight, preferred_element_type=dtype
        )
        # 6. A letter that ends in the product, D, is summed over the mesh axes it is cut
        # over: none. In 'BTNH,NHD->BTD' N ends, and each device has a part of the sum.
        summed = mesh_axes(letter_axes[i] for i in letters if i not in result)
        products.append(jax.lax.psum(y, tuple(summed)) if summed else y)
    return tuple(products)

  in_axes = (of(by_letter[0], tokens), *stored)
  run = sharding.per_device(local_products, in_axes, [of(a, result) for a in by_letter])
  return list(run(x, *weights))


def _stored(weight: jax.Array, axes: tuple[str, ...]) -> tuple[str | None, ...]:
  """Logical axes of a weight as it is stored: key heads may be whole on every device."""
  # As `sharding.shardings` placed it.
  return tuple(
    None if name == 'kv_heads' and size % sharding.axis_size(name) else name
    for name, size in zip(axes, weight.shape, strict=True)
  )


def gathered(weight: jax.Array) -> jax.Array:
  """Inside `per_device`: a weight [..., D] that is whole over its width.

  Its gradient is scattered over the width, and then summed over what holds copies.
  """
  width = sharding.axes_of('embed')
  tokens = (*sharding.axes_of('act_batch'), *sharding.axes_of('act_length'))
  # Devices along these axes hold the same part of the weight and see different tokens.
  copies = tuple(axis for axis in tokens if axis not in width)
  # Operations are transposed in reverse: the gather's reduce-scatter comes first, and what
  # `pcast` sums over the copies is a device's part of the gradient and no more.
  if copies:
    weight = jax.lax.pcast(weight, copies, to='varying')
  if width:
    weight = jax.lax.all_gather(weight, width, axis=weight.ndim - 1, tiled=True)
  return weight


def partitioned(init, axes):
  return nn.with_logical_partitioning(init, axes)
