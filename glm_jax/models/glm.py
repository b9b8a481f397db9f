"""GLM: pre-norm blocks, two learned position tables, one tied linear head.

Du et al., "GLM: General Language Model Pretraining with Autoregressive Blank
Infilling", ACL 2022; the numerics follow THUDM/GLM model/modeling_glm.py and
mpu/transformer.py, except that attention's softmax is in float32 whatever the dtype.
"""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from glm_jax.batch import Visibility
from glm_jax.models import layers
from glm_jax.models.compute import ComputeConfig
from glm_jax.models.config import GLMConfig
from glm_jax.models.stack import stack, virtual_tokens


class GLMBlock(nn.Module):
  """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

  config: GLMConfig
  compute: ComputeConfig
  deterministic: bool

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    cache: Any,
    seen: Any,
    cache_start: Any,
    virtual: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    c = self.config
    dtype = jnp.dtype(self.compute.dtype)
    # mpu/transformer.py scaled_init_method: the residual sum of 2 L terms keeps its size.
    out_std = c.init_std / (2 * c.num_layers) ** 0.5
    drop = nn.Dropout(c.output_dropout, deterministic=self.deterministic)

    with jax.named_scope('attention'):
      h_BTD, cache = layers.Attention(
        c.num_heads,
        c.num_heads,
        c.head_size,
        (c.init_std, c.init_std, out_std),
        c.attention_dropout,
        dtype,
        name='attention',
      )(
        layers.LayerNorm(dtype, name='attention_norm')(x_BTD),
        seen,
        self.deterministic,
        cache,
        cache_start,
        virtual_BT=virtual,
      )
      x_BTD = layers.constrain(x_BTD + drop(h_BTD), 'act_length', 'act_embed')
    with jax.named_scope('mlp'):
      h_BTD = layers.MLP(
        c.inner_size, c.activation, False, (c.init_std, out_std), dtype, name='mlp'
      )(layers.LayerNorm(dtype, name='mlp_norm')(x_BTD))
      x_BTD = layers.constrain(x_BTD + drop(h_BTD), 'act_length', 'act_embed')
    return x_BTD, cache


class GLM(nn.Module):
  """Tokens, two positions and visibility to logits."""

  config: GLMConfig
  compute: ComputeConfig

  @nn.compact
  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    block_positions: jax.Array,
    visibility: Visibility,
    *,
    deterministic: bool = True,
    cache: dict[str, jax.Array] | None = None,
    cache_start: jax.Array | None = None,
    head: layers.Head = layers.logits,
  ) -> tuple[Any, dict[str, jax.Array] | None]:
    """Computes logits.

    Args:
      tokens: [B, T] int32.
      positions: [B, T] int32, at most `max_positions`.
      block_positions: [B, T] int32, likewise.
      visibility: intervals into the T tokens; with `cache_start`, into the S slots of the
        cache.
      deterministic: no dropout; otherwise apply with `rngs={'dropout': key}`.
      cache: see `glm_jax.models.cache`.
      cache_start: [B] int32, the slot of each row's first new token; None for contexts
        that begin at slot 0 and attend to themselves.
      head: what is made of the last hidden state [B, T, D] and the head's weight [V, D].

    Returns:
      logits [B, T, V] float32, or what `head` returns; and the cache with the new
      tokens' keys and values.
    """
    c = self.config
    chex.assert_equal_shape(
      [tokens, positions, block_positions, visibility.key_start, visibility.key_end]
    )
    dtype = jnp.dtype(self.compute.dtype)
    words = layers.Table(
      c.vocab_size, c.hidden_size, 'vocab', c.init_std, dtype, name='words'
    )

    def positional(name: str, ids: jax.Array) -> jax.Array:
      # Without a row axis: these tables are small, and only their width is cut.
      rows = c.max_positions + 1
      return layers.Table(rows, c.hidden_size, None, c.init_std, dtype, name=name)(ids)

    with jax.named_scope('embed'):
      x_BTD = words(tokens) + positional('positions', positions)
      x_BTD += positional('block_positions', block_positions)
      # mpu/transformer.py drops the sum, not each table.
      x_BTD = nn.Dropout(c.embedding_dropout, deterministic=deterministic)(x_BTD)
      x_BTD = layers.constrain(x_BTD, 'act_length', 'act_embed')

    x_BTD, cache = stack(
      GLMBlock,
      c,
      self.compute,
      deterministic,
      x_BTD,
      cache,
      visibility,
      cache_start,
      *virtual_tokens(self, positions),
    )
    with jax.named_scope('head'):
      x_BTD = layers.LayerNorm(dtype, name='final_norm')(x_BTD)
      return head(x_BTD, words.cast()), cache
