"""Layers that the families share: weights with logical axes, and nothing hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from glm_jax import attention, sharding
from glm_jax.batch import Visibility
from glm_jax.models import cache as kv_cache
from glm_jax.models.products import Einsum, Factor, einsum, gathered, partitioned, together

Head = Callable[[jax.Array, jax.Array], Any]
"""(hidden states [B, T, D], weight [V, D]) -> whatever is made of them."""


class LayerNorm(nn.Module):
  """Layer normalisation over D with scale and bias; statistics in float32."""

  dtype: Any
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    D = x_BTD.shape[-1]
    scale = self.param('scale', partitioned(nn.initializers.ones, ('norm',)), (D,))
    bias = self.param('bias', partitioned(nn.initializers.zeros, ('norm',)), (D,))
    x_BTD = x_BTD.astype(jnp.float32)
    # Not E[x^2] - E[x]^2, which cancels where the mean is large beside the deviation.
    mean = x_BTD.mean(-1, keepdims=True)
    variance = jnp.square(x_BTD - mean).mean(-1, keepdims=True)
    x_BTD = (x_BTD - mean) * jax.lax.rsqrt(variance + self.epsilon)
    # The barrier keeps float32 normalisation out of the fusion of the matmul behind it.
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
      'scale', partitioned(nn.initializers.ones, ('norm',)), (x_BTD.shape[-1],)
    )
    x_BTD = x_BTD.astype(jnp.float32)
    x_BTD *= jax.lax.rsqrt(jnp.square(x_BTD).mean(-1, keepdims=True) + self.epsilon)
    return jax.lax.optimization_barrier((x_BTD * scale).astype(self.dtype))


class Table(nn.Module):
  """A table [rows, D], in which embeddings are looked up or which is a linear head."""

  rows: int
  size: int
  row_axis: str | None
  init_std: float
  dtype: Any

  def setup(self):
    self.weight = self.param(
      'weight',
      partitioned(nn.initializers.normal(self.init_std), (self.row_axis, 'embed')),
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
    weight = gathered(weight)
    rows = sharding.axes_of(self.row_axis) if self.row_axis else ()
    # A frequent token's gradient is a sum over all its places: in float32.
    weight = weight.astype(jnp.float32)
    if not rows:
      return weight[ids].astype(self.dtype)
    # Each device looks up the ids of its own rows of the table and has zeros for the rest,
    # so that the sum over devices has one term: [B, T, D].
    ids -= jax.lax.axis_index(rows) * weight.shape[0]
    inside = (0 <= ids) & (ids < weight.shape[0])
    vectors = weight[jnp.where(inside, ids, 0)].astype(self.dtype)
    return jax.lax.psum(jnp.where(inside[..., None], vectors, 0), rows)


@jax.custom_vjp
def logits(x_BTD: jax.Array, weight_VD: jax.Array) -> jax.Array:
  """The linear head, [B, T, V] float32."""
  # Summed and kept in float32: logits rounded to bfloat16 would cost the loss its digits.
  return _head(x_BTD, weight_VD, jnp.float32)


def _head(x_BTD: jax.Array, weight_VD: jax.Array, dtype: Any) -> jax.Array:
  return einsum('BTD,VD->BTV', x_BTD, [Factor(weight_VD, ('vocab', 'embed'))], dtype)[0]


def _logits_forward(x_BTD, weight_VD):
  return logits(x_BTD, weight_VD), (x_BTD, weight_VD)


def _logits_backward(saved, d_BTV):
  # Left to JAX, two of the three products with the head would multiply float32 numbers,
  # which takes a GPU four times as long. Rounded, their gradient, a probability or one
  # less, keeps its sign and scale; `chunked_cross_entropy` does the same.
  x_BTD, weight_VD = saved
  d_BTV = d_BTV.astype(x_BTD.dtype)
  of_x = jax.linear_transpose(lambda x: _head(x, weight_VD, None), x_BTD)
  of_weight = jax.linear_transpose(lambda weight: _head(x_BTD, weight, None), weight_VD)
  return *of_x(d_BTV), *of_weight(d_BTV)


logits.defvjp(_logits_forward, _logits_backward)


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
    virtual_BT: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    """Attends to `x_BTD` itself, or to a cache into which its keys are written.

    With a collection `prefix`, {'k', 'v'} of [P, K, H] each, the keys and values of virtual
    tokens are learnt, and not computed from `x_BTD` (P-tuning v2, Liu et al., 2022).

    Args:
      x_BTD: input.
      seen: what `attention.prepare` made of intervals into the T keys; with `cache_start`,
        intervals into the S slots of the cache.
      deterministic: no dropout.
      cache: of the layer, see `glm_jax.models.cache`.
      cache_start: [B] int32, the slot of each row's first new key; None for a context that
        begins at slot 0 and attends to itself.
      rotate: rotary positions, applied to queries and keys [B, T, heads, H].
      virtual_BT: int32, -P .. -1 for the virtual tokens, which open a document, and 0 or
        more for others; None without any.

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
    # After the rotation, so that a policy that saves 'qkv' need not rotate again.
    name = lambda x: checkpoint_name(x, 'qkv')
    q_BTNH = name(rotate(constrain(q_BTNH, 'act_length', 'act_heads', None)))
    # Key heads, which may be fewer than devices, are spread by `attend`.
    k_BSKH, v_BSKH = name(rotate(k_BSKH)), name(v_BSKH)
    if virtual_BT is not None:
      # Behind the rotation: ChatGLM's prefix keys are not rotated.
      k_BSKH = self._learnt('k', k_BSKH, virtual_BT)
      v_BSKH = self._learnt('v', v_BSKH, virtual_BT)
    if cache is not None:
      cache = kv_cache.write(cache, k_BSKH, v_BSKH, cache_start)
      # A context that begins at slot 0 attends to itself, by the kernel of training.
      if cache_start is not None:
        k_BSKH, v_BSKH = kv_cache.read(cache, self.dtype)
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

  def _learnt(self, name: str, x_BTKH: jax.Array, virtual_BT: jax.Array) -> jax.Array:
    """Keys or values, with those of virtual tokens from the collection `prefix`."""
    prefix_PKH = self.get_variable('prefix', name).astype(x_BTKH.dtype)
    number = jnp.maximum(virtual_BT + len(prefix_PKH), 0)
    return jnp.where(virtual_BT[..., None, None] < 0, prefix_PKH[number], x_BTKH)


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
