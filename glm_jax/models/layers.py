"""Layers that the families share: weights with logical axes, and nothing hidden.

Weights are float32 arrays with a name for each axis; the mesh axes behind the names
stand in `glm_jax.sharding`. Flax's DenseGeneral cannot hold such weights under
`jax.set_mesh`, and one `Einsum` keeps initialisation, dtype and sharding in one place.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from glm_jax.attention import attend
from glm_jax.batch import Visibility


class Einsum(nn.Module):
  """`einsum(equation, x, weight) + bias`, computed in `dtype`.

  Attributes:
    equation: such as 'BTD,DNH->BTNH'.
    shape: of the weight.
    axes: a logical axis name for each of its dimensions.
    bias_axes: how many of the last weight axes the bias has.
    init_std: standard deviation of the normal initialisation; the bias begins at 0.
  """

  equation: str
  shape: tuple[int, ...]
  axes: tuple[str, ...]
  bias_axes: int
  init_std: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    weight = self.param(
      'weight', _partitioned(nn.initializers.normal(self.init_std), self.axes), self.shape
    )
    bias = self.param(
      'bias',
      _partitioned(nn.initializers.zeros, self.axes[-self.bias_axes :]),
      self.shape[-self.bias_axes :],
    )
    x, weight, bias = (a.astype(self.dtype) for a in (x, weight, bias))
    return jnp.einsum(self.equation, x, weight) + bias


class LayerNorm(nn.Module):
  """Layer normalisation over D with scale and bias; statistics in float32."""

  dtype: Any
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    D = x_BTD.shape[-1]
    scale = self.param('scale', _partitioned(nn.initializers.ones, ('embed',)), (D,))
    bias = self.param('bias', _partitioned(nn.initializers.zeros, ('embed',)), (D,))
    x_BTD = x_BTD.astype(jnp.float32)
    mean = x_BTD.mean(-1, keepdims=True)
    variance = jnp.square(x_BTD - mean).mean(-1, keepdims=True)
    x_BTD = (x_BTD - mean) * jax.lax.rsqrt(variance + self.epsilon)
    return (x_BTD * scale + bias).astype(self.dtype)


class Table(nn.Module):
  """An embedding table [rows, D]: look-up, and as the tied linear head."""

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
    # Gathered over the width first, as FSDP does: rows looked up in a table that is
    # spread over D would be moved to their devices the expensive way.
    weight = nn.with_logical_constraint(
      self.weight.astype(self.dtype), (self.row_axis, None)
    )
    return weight[ids_BT]

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """[B, T, V] float32."""
    weight_VD = self.weight.astype(self.dtype)
    return jnp.einsum('BTD,VD->BTV', x_BTD, weight_VD, preferred_element_type=jnp.float32)


class Attention(nn.Module):
  """Multi-head attention over `Visibility`, with an optional key/value cache."""

  num_heads: int
  num_kv_heads: int
  head_size: int
  init_std: float
  out_init_std: float
  dropout: float
  backend: str
  dtype: Any

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    visibility: Visibility,
    deterministic: bool,
    cache: dict[str, jax.Array] | None = None,
    cache_start: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    """Attends to `x_BTD` itself, or to a cache into which its keys are written.

    Args:
      x_BTD: input.
      visibility: intervals into the T keys, or into the S slots of the cache.
      deterministic: no dropout.
      cache: {'k', 'v'}, each [B, S, K, H].
      cache_start: [B] int32, the slot of each row's first new key.

    Returns:
      The output [B, T, D] and the cache with the new keys.
    """
    D, N, K, H = x_BTD.shape[-1], self.num_heads, self.num_kv_heads, self.head_size

    def project(name: str, heads: int, axis: str) -> jax.Array:
      return Einsum(
        'BTD,DNH->BTNH',
        (D, heads, H),
        ('embed', axis, 'head_dim'),
        2,
        self.init_std,
        self.dtype,
        name=name,
      )(x_BTD)

    q_BTNH = constrain(project('q', N, 'heads'), 'act_length', 'act_heads', None)
    k_BSKH = constrain(project('k', K, 'kv_heads'), 'act_length', 'act_kv_heads', None)
    v_BSKH = constrain(project('v', K, 'kv_heads'), 'act_length', 'act_kv_heads', None)
    if cache is not None:
      write = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))
      cache = {
        'k': write(cache['k'], k_BSKH.astype(cache['k'].dtype), cache_start, 0),
        'v': write(cache['v'], v_BSKH.astype(cache['v'].dtype), cache_start, 0),
      }
      k_BSKH, v_BSKH = cache['k'], cache['v']
    drops = self.dropout > 0 and not deterministic
    out_BTNH = attend(
      q_BTNH,
      k_BSKH,
      v_BSKH,
      visibility,
      backend=self.backend,
      dropout_rate=self.dropout,
      dropout_key=self.make_rng('dropout') if drops else None,
    )
    out_BTD = Einsum(
      'BTNH,NHD->BTD',
      (N, H, D),
      ('heads', 'head_dim', 'embed'),
      1,
      self.out_init_std,
      self.dtype,
      name='out',
    )(out_BTNH)
    return out_BTD, cache


class MLP(nn.Module):
  """up, tanh-GELU, down."""

  size: int
  init_std: float
  out_init_std: float
  dtype: Any

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    D, F = x_BTD.shape[-1], self.size
    h_BTF = Einsum(
      'BTD,DF->BTF', (D, F), ('embed', 'mlp'), 1, self.init_std, self.dtype, name='up'
    )(x_BTD)
    h_BTF = constrain(h_BTF, 'act_length', 'act_mlp')
    return Einsum(
      'BTF,FD->BTD',
      (F, D),
      ('mlp', 'embed'),
      1,
      self.out_init_std,
      self.dtype,
      name='down',
    )(jax.nn.gelu(h_BTF, approximate=True))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Shards an activation [B, ...] by logical axis names (batch is understood)."""
  return nn.with_logical_constraint(x, ('act_batch', *axes))


def _partitioned(init, axes):
  return nn.with_logical_partitioning(init, axes)
