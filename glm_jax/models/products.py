"""Products of activations and weights: where dtype and sharding are decided, once for all
layers.

Weights are float32 arrays with a name for each axis; the mesh axes behind the names
stand in `glm_jax.sharding`. Flax's DenseGeneral cannot hold such weights under
`jax.set_mesh`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import sharding

# Tokens up to which a CPU multiplies integers as integers: by digits, three times the work
# of a product of floats, but for those that it would first have to cast.
_FEW = 128

_DIGITS = 3
_TURNED = 'turned'


class Einsum(nn.Module):
  """`einsum(equation, x, weight) + bias`, computed in `dtype`.

  What the weight is, is said by the collections that the module is given, with no argument
  here:

  - `params` alone: an array.
  - `scales`: integers, in `params`, that are multiplied by their scales: one for each
    output, of the shape of the product's own axes, or one for each group of neighbouring
    inputs besides, [groups, ...] (`glm_jax.models.quantized`).
  - `adapters`: low-rank factors a [inputs, rank] and b [rank, outputs] beside it, whose
    product `(x a) b` is added (LoRA, Hu et al., 2021, section 4.1; alpha / rank is in b).
    With `rate` [], that share of x is dropped before a where there is a key for dropout,
    which each module and layer has for itself.

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
    self.is_turned = self.has_variable('params', _TURNED)
    if self.is_turned:
      self.weight = self.get_variable('params', _TURNED)
    else:
      init = partitioned(nn.initializers.normal(self.init_std), self.axes)
      self.weight = self.param('weight', init, self.shape)
    if self.bias_axes:
      self.bias = self.param(
        'bias',
        partitioned(nn.initializers.zeros, self.axes[-self.bias_axes :]),
        self.shape[-self.bias_axes :],
      )

  def __call__(self, x: jax.Array) -> jax.Array:
    return together(x, self)[0]

  def factor(self) -> Factor:
    """The weight: in the computation's dtype, or integers and their scales."""
    if not self.has_variable('scales', 'weight'):
      if not jnp.issubdtype(self.weight.dtype, jnp.floating):
        raise TypeError(f'{self.weight.dtype} without scales in {"/".join(self.path)}')
      return Factor(self.weight.astype(self.dtype), self.axes)
    scales, axes = self.get_variable('scales', 'weight'), self.axes
    if self.is_turned:
      axes = (*axes[-scales.ndim :], *axes[: -scales.ndim])
    return Factor(self.weight, axes, scales, self.is_turned)

  def low_rank(self, x: jax.Array) -> jax.Array | None:
    """What adapters add to the product; None without any."""
    if not self.has_variable('adapters', 'a'):
      return None
    a, b = (self.get_variable('adapters', name).astype(self.dtype) for name in 'ab')
    if self.has_variable('adapters', 'rate') and self.has_rng('dropout'):
      keep = 1 - self.get_variable('adapters', 'rate')
      kept = jax.random.bernoulli(self.make_rng('dropout'), keep, x.shape)
      x = jnp.where(kept, x / keep.astype(x.dtype), 0)
    tokens, letters, result = letters_of(self.equation)
    inputs = [letter for letter in letters if letter not in result]
    # 'BTD,DNH->BTNH' by way of 'BTD,Dr->BTr' and 'BTr,rNH->BTNH'.
    middle = ''.join(letter for letter in tokens if letter in result) + 'r'
    into, out_of = ''.join(inputs) + 'r', 'r' + ''.join(letters[len(inputs) :])
    axes_a, axes_b = (*self.axes[: len(inputs)], None), (None, *self.axes[len(inputs) :])
    low = einsum(f'{tokens},{into}->{middle}', x, [Factor(a, axes_a)])[0]
    return einsum(f'{middle},{out_of}->{result}', low, [Factor(b, axes_b)])[0]


class Factor(NamedTuple):
  """A weight in a product.

  Attributes:
    weight: an array, or integers.
    axes: logical axes of it.
    scales: of integers, float32, see `Einsum`; None for an array.
    turned: whether its outputs come first, as the function of that name stores them.
  """

  weight: jax.Array
  axes: tuple[str | None, ...]
  scales: jax.Array | None = None
  turned: bool = False


def turned(params: dict[str, Any], scales: dict[str, Any]) -> dict[str, Any]:
  """Params for one CPU: int8 weights are stored outputs first, and under another name.

  So a CPU multiplies one token with them as they lie (`_multiply`); inputs first, it would
  bring them into an order of its own each time.

  Args:
    params: of any part of a model.
    scales: of the same; a weight with groups of them stays as it is.
  """
  result = {}
  for name, value in params.items():
    scale = scales.get(name)
    if isinstance(value, dict):
      result[name] = turned(value, scale or {})
    elif value.dtype != jnp.int8 or value.shape[-scale.ndim :] != scale.shape:
      result[name] = value
    else:
      outputs = range(value.ndim - scale.ndim, value.ndim)
      moved = np.moveaxis(np.asarray(value), outputs, range(scale.ndim))
      result[_TURNED] = jnp.asarray(np.ascontiguousarray(moved))
  return result


def letters_of(equation: str) -> tuple[str, str, str]:
  """Letters of the tokens, the weight and the result.

  Example:
    >>> letters_of('BTD,DNH->BTNH')
    ('BTD', 'DNH', 'BTNH')
  """
  inputs, result = equation.split('->')
  tokens, letters = inputs.split(',')
  return tokens, letters, result


def together(x: jax.Array, *modules: Einsum) -> list[jax.Array]:
  """Several projections of the same activations, whose gradients are summed at once."""
  x = x.astype(modules[0].dtype)
  factors = [module.factor() for module in modules]
  products = einsum(modules[0].equation, x, factors)
  results = []
  for module, product in zip(modules, products, strict=True):
    added = module.low_rank(x)
    if added is not None:
      product += added
    if module.bias_axes:
      # A bias is added in float32, so that its gradient, a sum over all tokens, is, too.
      product = (product + module.bias).astype(product.dtype)
    results.append(product)
  return results


def einsum(
  equation: str, x: jax.Array, factors: list[Factor], dtype: Any = None
) -> list[jax.Array]:
  """`jnp.einsum` with each weight; each device gathers it over the width and no more.

  Left to itself, XLA sums some gradients over all devices before each takes its part of
  the sum; the transpose of a gather is to scatter first.

  Args:
    equation: of tokens [B, T, ...] and a weight.
    x: activations.
    factors: weights of the same dtype, or integers.
    dtype: of the sums and the results; None for that of `x`.
  """
  # The comments follow 'BTD,DNH->BTNH', the queries' projection, under the rules 'fsdp':
  # a device holds x [B/(data fsdp), T/sequence, D] and weight [D/fsdp, N/tensor, H].
  # 1. Letters: 'BTD' of the tokens, 'DNH' of the weight, 'BTNH' of the result.
  tokens, letters, result = letters_of(equation)
  ended = ''.join(letter for letter in letters if letter not in result)
  left = ''.join(letter for letter in letters if letter in result)
  orders = [left + ended if factor.turned else letters for factor in factors]
  stored = [_stored(factor.weight, factor.axes) for factor in factors]
  # 2. Each letter's logical axis in the product: B act_batch, T act_length, N heads,
  # H head_dim; and D none, since the width is whole where weights meet activations.
  by_letter = [
    {'B': 'act_batch', 'T': 'act_length'}
    | {k: None if n == 'embed' else n for k, n in zip(order, names, strict=True)}
    for order, names in zip(orders, stored, strict=True)
  ]
  # 3. The width goes last, 'DNH' -> 'NHD': elsewhere, XLA makes a sum over all devices of a
  # large scatter. One device would only copy for it.
  axes = factors[0].axes
  gathers = 'embed' in axes and not sharding.alone()
  width = axes.index('embed') if gathers else None
  if width is not None:
    orders = [letters[:width] + letters[width + 1 :] + letters[width]] * len(factors)
  of = lambda axes, letters: tuple(axes[letter] for letter in letters)
  mesh_axes = lambda names: {a for n in names if n for a in sharding.axes_of(n)}
  # Mesh axes that `x` is cut over: data, fsdp, sequence; for 'BTNH,NHD->BTD' also tensor.
  cut = mesh_axes(of(by_letter[0], tokens))

  def local_products(x: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    # 4. Each device along tensor has heads of its own but the same x, whose gradient is
    # thus a sum over tensor. `pcast` says so, and its transpose is that sum. Cast once, so
    # that the gradients of all products are summed together.
    uncut = {a for names in by_letter for a in mesh_axes(names.values())} - cut
    varying = jax.lax.pcast(x, tuple(uncut), to='varying') if uncut else x
    scales = iter(arrays[len(factors) :])
    products = []
    for number, (weight, letter_axes) in enumerate(zip(arrays, by_letter, strict=False)):
      with jax.named_scope(f'product_{number}'):
        if width is not None:
          # 5. [N/tensor, H, D/fsdp] -> [N/tensor, H, D].
          weight = gathered(jnp.moveaxis(weight, width, -1))
        # Key heads that are whole on every device take x uncast: JAX would not believe that
        # the product of a varying x is the same on all devices along tensor.
        local_x = varying if mesh_axes(letter_axes.values()) - cut else x
        local = f'{tokens},{orders[number]}->{result}'
        if factors[number].scales is None:
          y = _multiply(local, local_x, weight, preferred_element_type=dtype)
        else:
          y = _of_integers(local, local_x, weight, next(scales), ended + left)
        # 6. A letter that ends in the product, D, is summed over the mesh axes it is cut
        # over: none. In 'BTNH,NHD->BTD' N ends, and each device has a part of the sum.
        summed = mesh_axes(letter_axes[i] for i in ended)
        products.append(jax.lax.psum(y, tuple(summed)) if summed else y)
    return tuple(products)

  # Groups of scales lie along the first letter that ends: N, or D, which is whole.
  of_scales = {
    number: (
      factor.scales,
      [by_letter[number][ended[0]]] * (factor.scales.ndim > len(left)),
    )
    for number, factor in enumerate(factors)
    if factor.scales is not None
  }
  in_axes = (
    of(by_letter[0], tokens),
    *stored,
    *((*groups, *of(by_letter[k], left)) for k, (_, groups) in of_scales.items()),
  )
  run = sharding.per_device(local_products, in_axes, [of(a, result) for a in by_letter])
  weights = [factor.weight for factor in factors]
  return list(run(x, *weights, *(scales for scales, _ in of_scales.values())))


def _multiply(equation: str, x: jax.Array, weight: jax.Array, **how: Any) -> jax.Array:
  """`jnp.einsum`; on one device, as a product of matrices whose axes keep their order.

  Otherwise XLA's CPU backend would copy 'NHD' as 'HND' each time, since einsum sorts axes
  that end by letter; and multiply with the vector of a single token on one core.
  """
  if not sharding.alone():
    return jnp.einsum(equation, x, weight, **how)
  tokens, letters, _ = letters_of(equation)
  ended = [letter for letter in tokens if letter in letters]
  sizes = dict(zip(letters, weight.shape, strict=True))
  size = math.prod(sizes.pop(letter) for letter in ended)
  last = letters[-1] in ended
  x_TK = x.reshape(-1, size)
  weight = weight.reshape((-1, size) if last else (size, -1))
  if last and len(x_TK) == _DIGITS and not jnp.issubdtype(weight.dtype, jnp.floating):
    # The digits of one token. XLA's CPU backend reads the matrix on the left as it lies and
    # packs the one on the right, which pays with more tokens. Transposed at once, it would
    # put the weight on the right again.
    product = jax.lax.dot_general(weight, x_TK, (((1,), (1,)), ((), ())), **how)
    product = product.astype(jnp.float32).T
  else:
    product = jax.lax.dot_general(x_TK, weight, (((1,), (int(last),)), ((), ())), **how)
  return product.reshape(*x.shape[: -len(ended)], *sizes.values())


def _of_integers(
  equation: str, x: jax.Array, weight: jax.Array, scales: jax.Array, letters: str
) -> jax.Array:
  """The product with integers, as a device computes it, in the dtype of `x`.

  Args:
    equation: of its part of the tokens and the weight.
    x: activations.
    weight: int4 or int8.
    scales: [outputs], or [groups, outputs].
    letters: of the weight: those that end in the product, then the others.
  """
  tokens, stored, result = letters_of(equation)
  outputs = [letter for letter in stored if letter in result]
  ended = len(letters) - len(outputs)
  kept = ''.join(letter for letter in tokens if letter in result)
  few = math.prod(x.shape[: len(kept)]) <= _FEW
  if scales.ndim == len(outputs):
    multiply = functools.partial(_multiply, equation)
    return (_times_integers(multiply, x, weight, ended, few) * scales).astype(x.dtype)
  # Partial sums by group: 'BTD,DNH->BTNH' is 'BTgi,giNH->BTgNH', times [g, N, H], summed.
  weight = jnp.einsum(f'{stored}->{letters}', weight)
  groups = scales.shape[0]
  weight = weight.reshape(groups, -1, *weight.shape[ended:])
  x_groups = x.reshape(*x.shape[: len(kept)], groups, -1)
  left = ''.join(outputs)
  by_group = f'...{kept}gi,gi{left}->...{kept}g{left}'
  multiply = functools.partial(jnp.einsum, by_group)
  partial = _times_integers(multiply, x_groups, weight, 1, few)
  return jnp.einsum(f'{kept}g{left},g{left}->{result}', partial, scales).astype(x.dtype)


def _times_integers(
  multiply: Callable[..., jax.Array],
  x: jax.Array,
  weight: jax.Array,
  ended: int,
  few: bool,
) -> jax.Array:
  """`multiply(x, weight)`, float32; `x` may have an axis before the others.

  Integers are cast within the product's fusion: there is no copy of them as floats in
  memory, which scales that came before the product would ask for. Not so on a CPU, where a
  few tokens are multiplied as integers instead.
  """
  floats = lambda x, weight: multiply(
    x, weight.astype(x.dtype), preferred_element_type=jnp.float32
  )
  if not (few and sharding.alone()):
    return floats(x, weight)
  digits = functools.partial(_of_digits, multiply, ended=ended)
  return jax.lax.platform_dependent(x, weight, cpu=digits, default=floats)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def _of_digits(
  multiply: Callable[..., jax.Array], x: jax.Array, weight: jax.Array, ended: int
) -> jax.Array:
  """The same by integers alone: of `x`, three digits of -127 to 127.

  What is left of a number is about 2 ** -24 of the largest of its token, less than what
  float32 loses in such a sum.
  """
  x = x.astype(jnp.float32)
  largest = jnp.abs(x).max(range(x.ndim - ended, x.ndim), keepdims=True)
  rest = x / jnp.where(largest > 0, largest, 1) * 127
  digits = []
  for _ in range(_DIGITS):
    digits.append(jnp.rint(rest))
    rest = (rest - digits[-1]) * 254
  products = multiply(
    jnp.stack(digits).astype(jnp.int8),
    weight.astype(jnp.int8),
    preferred_element_type=jnp.int32,
  )
  first, second, third = products.astype(jnp.float32)
  scale = largest.reshape(x.shape[:-ended] + (1,) * (first.ndim - x.ndim + ended)) / 127
  return (first + (second + third / 254) / 254) * scale


@_of_digits.defjvp
def _of_digits_jvp(multiply, ended, primals, tangents):
  """Digits have no slope; the product that they stand for has one."""
  x, weight = primals
  slope = tangents[0].astype(jnp.float32)
  change = multiply(slope, weight.astype(jnp.float32), preferred_element_type=jnp.float32)
  return _of_digits(multiply, x, weight, ended), change


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
