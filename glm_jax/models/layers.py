"""Layers that the families share: weights with logical axes, and nothing hidden.

Weights are float32 arrays with a name for each axis; the mesh axes behind the names
stand in `glm_jax.sharding`. Flax's DenseGeneral cannot hold such weights under
`jax.set_mesh`, and one `Einsum` keeps initialisation, dtype and sharding in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from glm_jax import attention, sharding
from glm_jax.batch import Visibility

Head = Callable[[jax.Array, jax.Array], Any]
"""(hidden states [B, T, D], weight [V, D]) -> whatever is made of them."""


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
      'weight', _partitioned(nn.initializers.normal(self.init_std), self.axes), self.shape
    )
    if self.bias_axes:
      self.bias = self.param(
        'bias',
        _partitioned(nn.initializers.zeros, self.axes[-self.bias_axes :]),
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


class LayerNorm(nn.Module):
  """Layer normalisation over D with scale and bias; statistics in float32."""

  dtype: Any
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    D = x_BTD.shape[-1]
    scale = self.param('scale', _partitioned(nn.initializers.ones, ('norm',)), (D,))
    bias = self.param('bias', _partitioned(nn.initializers.zeros, ('norm',)), (D,))
    x_BTD = x_BTD.astype(jnp.float32)
    mean = x_BTD.mean(-1, keepdims=True)
    variance = jnp.square(x_BTD - mean).mean(-1, keepdims=True)
    x_BTD = (x_BTD - mean) * jax.lax.rsqrt(variance + self.epsilon)
    return jax.lax.optimization_barrier((x_BTD * scale + bias).astype(self.dtype))


class RMSNorm(nn.Module):
  """Root-mean-square normalisation over D with scale; all of it in float32.

  The product with the scale, too, as in ChatGLM2's code; Hugging Face's GlmRMSNorm
  casts before it, which differs by a rounding in bfloat16.
  """

  dtype: Any
  epsilon: float

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    scale = self.param(
      'scale', _partitioned(nn.initializers.ones, ('norm',)), (x_BTD.shape[-1],)
    )
    x_BTD = x_BTD.astype(jnp.float32)
    x_BTD *= jax.lax.rsqrt(jnp.square(x_BTD).mean(-1, keepdims=True) + self.epsilon)
    return jax.lax.optimization_barrier((x_BTD * scale).astype(self.dtype))


class Table(nn.Module):
  """A table [rows, D]: look-up of embeddings, and a linear head, tied to it or its own."""

  rows: int
  size: int
  row_axis: str | None
  init_std: float
  dtype: Any

  def setup(self):
    self.weight = self.param(
      'weight',
      _partitioned(nn.initializers.normal(self.init_std), (self.row_axis, 'embed')),
      (self.rows, self.size),
    )

  def __call__(self, ids_BT: jax.Array) -> jax.Array:
    look_up = sharding.per_device(
      self._look_up,
      ((self.row_axis, 'embed'), ('act_batch', 'act_length')),
      ('act_batch', 'act_length', None),
    )
    return look_up(self.cast(), ids_BT)

  def cast(self) -> jax.Array:
    """The table in the computation's dtype, as a `head` takes it."""
    return self.weight.astype(self.dtype)

  def _look_up(self, weight: jax.Array, ids: jax.Array) -> jax.Array:
    """This device's rows of ids in its part of the table."""
    weight = _gathered(weight)
    rows = sharding.axes_of(self.row_axis) if self.row_axis else ()
    # A frequent token's gradient is a sum over all its places: in float32.
    weight = weight.astype(jnp.float32)
    if not rows:
      return weight[ids].astype(self.dtype)
    ids -= jax.lax.axis_index(rows) * weight.shape[0]
    inside = (0 <= ids) & (ids < weight.shape[0])
    found = weight[jnp.where(inside, ids, 0)].astype(self.dtype)
    return jax.lax.psum(jnp.where(inside[..., None], found, 0), rows)


def logits(x_BTD: jax.Array, weight_VD: jax.Array) -> jax.Array:
  """The linear head, [B, T, V] float32."""
  axes = ('vocab', 'embed')
  return einsum('BTD,VD->BTV', x_BTD, [weight_VD], [axes], jnp.float32)[0]


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
  inputs, result = equation.split('->')
  tokens, letters = inputs.split(',')
  names = [_held(weight, a) for weight, a in zip(weights, axes, strict=True)]
  # A weight's width is whole where it meets activations.
  whole = [
    {'B': 'act_batch', 'T': 'act_length'}
    | {k: None if n == 'embed' else n for k, n in zip(letters, held, strict=True)}
    for held in names
  ]
  # The width last: elsewhere XLA makes a sum over all devices of a large scatter.
  place = axes[0].index('embed')
  last = letters[:place] + letters[place + 1 :] + letters[place]
  of = lambda axes, letters: tuple(axes[letter] for letter in letters)
  mesh_axes = lambda names: {a for n in names if n for a in sharding.axes_of(n)}
  here_already = mesh_axes(of(whole[0], tokens))

  def here(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    # Cast once, so that there is one sum over devices of all gradients of `x`.
    spread = {a for w in whole for a in mesh_axes(w.values())} - here_already
    varying = jax.lax.pcast(x, tuple(spread), to='varying') if spread else x
    products = []
    for number, (weight, letter_axes) in enumerate(zip(weights, whole, strict=True)):
      with jax.named_scope(f'product_{number}'):
        weight = _gathered(jnp.moveaxis(weight, place, -1))
        used = varying if mesh_axes(letter_axes.values()) - here_already else x
        y = jnp.einsum(
          f'{tokens},{last}->{result}', used, weight, preferred_element_type=dtype
        )
        over = mesh_axes(letter_axes[i] for i in letters if i not in result)
        products.append(jax.lax.psum(y, tuple(over)) if over else y)
    return tuple(products)

  run = sharding.per_device(
    here, (of(whole[0], tokens), *names), [of(axes, result) for axes in whole]
  )
  return list(run(x, *weights))


def _held(weight: jax.Array, axes: tuple[str, ...]) -> tuple[str | None, ...]:
  """Logical axes of a weight as it is stored: key heads may be whole on every device."""
  return tuple(
    None if name == 'kv_heads' and size % sharding.axis_size(name) else name
    for name, size in zip(axes, weight.shape, strict=True)
  )


def _gathered(weight: jax.Array) -> jax.Array:
  """Inside `per_device`: a weight [..., D] that is whole over its width.

  Its gradient is scattered over the width, and then summed over what holds copies.
  """
  width = sharding.axes_of('embed')
  tokens = (*sharding.axes_of('act_batch'), *sharding.axes_of('act_length'))
  copies = tuple(axis for axis in tokens if axis not in width)
  if copies:
    weight = jax.lax.pcast(weight, copies, to='varying')
  if width:
    weight = jax.lax.all_gather(weight, width, axis=weight.ndim - 1, tiled=True)
  return weight


class Attention(nn.Module):
  """Attention over `Visibility`, with an optional key/value cache.

  Attributes:
    num_heads: N.
    num_kv_heads: K.
    head_size: H.
    init_stds: of the weights q (and k), v, out.
    dropout: on the attention probabilities.
    dtype: of the computation.
    qkv_bias: whether q, k and v have biases.
    out_bias: whether out has.
  """

  num_heads: int
  num_kv_heads: int
  head_size: int
  init_stds: tuple[float, float, float]
  dropout: float
  dtype: Any
  qkv_bias: bool = True
  out_bias: bool = True

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    seen: attention.Seen | Visibility,
    deterministic: bool,
    cache: dict[str, jax.Array] | None = None,
    cache_start: jax.Array | None = None,
    rotate: Callable[[jax.Array], jax.Array] = lambda x: x,
  ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    """Attends to `x_BTD` itself, or to a cache into which its keys are written.

    Args:
      x_BTD: input.
      seen: what `attention.prepare` made of intervals into the T keys; with a cache,
        intervals into its S slots.
      deterministic: no dropout.
      cache: {'k', 'v'}, each [B, S, K, H].
      cache_start: [B] int32, the slot of each row's first new key.
      rotate: rotary positions, applied to queries and keys [B, T, heads, H].

    Returns:
      The output [B, T, D] and the cache with the new keys.
    """
    D, N, K, H = x_BTD.shape[-1], self.num_heads, self.num_kv_heads, self.head_size
    qk_std, v_std, out_std = self.init_stds

    def projection(name: str, heads: int, axis: str, std: float) -> Einsum:
      return Einsum(
        'BTD,DNH->BTNH',
        (D, heads, H),
        ('embed', axis, 'head_dim'),
        2 if self.qkv_bias else 0,
        std,
        self.dtype,
        name=name,
      )

    q_BTNH, k_BSKH, v_BSKH = together(
      x_BTD,
      projection('q', N, 'heads', qk_std),
      projection('k', K, 'kv_heads', qk_std),
      projection('v', K, 'kv_heads', v_std),
    )
    name = lambda x: checkpoint_name(x, 'qkv')
    q_BTNH = name(rotate(constrain(q_BTNH, 'act_length', 'act_heads', None)))
    # Key heads, which may be fewer than devices, are spread by `attend`.
    k_BSKH, v_BSKH = name(rotate(k_BSKH)), name(v_BSKH)
    if cache is not None:
      write = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))
      cache = {
        'k': write(cache['k'], k_BSKH.astype(cache['k'].dtype), cache_start, 0),
        'v': write(cache['v'], v_BSKH.astype(cache['v'].dtype), cache_start, 0),
      }
      k_BSKH, v_BSKH = cache['k'], cache['v']
    drops = self.dropout > 0 and not deterministic
    out_BTNH = attention.attend(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      seen,
      dropout_rate=self.dropout,
      dropout_key=self.make_rng('dropout') if drops else None,
    )
    out_BTD = Einsum(
      'BTNH,NHD->BTD',
      (N, H, D),
      ('heads', 'head_dim', 'embed'),
      1 if self.out_bias else 0,
      out_std,
      self.dtype,
      name='out',
    )(out_BTNH)
    return checkpoint_name(out_BTD, 'out'), cache


ACTIVATIONS = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=True),
  'gelu_erf': lambda x: jax.nn.gelu(x, approximate=False),
  'silu': jax.nn.silu,
}


class MLP(nn.Module):
  """`down(act(up x))`, or gated, `down(act(gate x) * (up x))`.

  Attributes:
    size: F.
    activation: a key of `ACTIVATIONS`.
    gated: whether there is a gate.
    init_stds: of the weights up (and gate), down.
    dtype: of the computation.
    bias: whether the weights have biases.
  """

  size: int
  activation: str
  gated: bool
  init_stds: tuple[float, float]
  dtype: Any
  bias: bool = True

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    D, F = x_BTD.shape[-1], self.size
    bias_axes, act = int(self.bias), ACTIVATIONS[self.activation]

    def projection(name: str) -> Einsum:
      return Einsum(
        'BTD,DF->BTF',
        (D, F),
        ('embed', 'mlp'),
        bias_axes,
        self.init_stds[0],
        self.dtype,
        name=name,
      )

    names = ('gate', 'up') if self.gated else ('up',)
    parts = []
    for h_BTF in together(x_BTD, *map(projection, names)):
      h_BTF = checkpoint_name(constrain(h_BTF, 'act_length', 'act_mlp'), 'mlp')
      # Behind a barrier: activations inside a matmul's fusion slow the matmul down.
      parts.append(jax.lax.optimization_barrier(h_BTF))
    h_BTF = act(parts[0]) * parts[1] if self.gated else act(parts[0])
    h_BTF = jax.lax.optimization_barrier(h_BTF)
    return Einsum(
      'BTF,FD->BTD',
      (F, D),
      ('mlp', 'embed'),
      bias_axes,
      self.init_stds[1],
      self.dtype,
      name='down',
    )(h_BTF)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Shards an activation [B, ...] by logical axis names (batch is understood)."""
  return nn.with_logical_constraint(x, ('act_batch', *axes))


def _partitioned(init, axes):
  return nn.with_logical_partitioning(init, axes)
