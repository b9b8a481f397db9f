"""ChatGLM2-6B, ChatGLM3-6B and GLM-4: causal, pre-RMSNorm, SwiGLU, few key heads.

The modeling_chatglm.py published with the weights of ChatGLM2-6B and ChatGLM3-6B, and
Hugging Face's models/glm and models/glm4. The first half of a head is rotated, in
neighbouring pairs.
"""

from __future__ import annotations

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.batch import Visibility
from glm_jax.models import layers, positions
from glm_jax.models.compute import ComputeConfig
from glm_jax.models.config import ChatGLM2Config
from glm_jax.models.stack import stack, virtual_tokens


class ChatGLM2Block(nn.Module):
  """`x + attention(norm(x))`, then `x + mlp(norm(x))`; biases on q, k and v alone.

  With `sandwich_norms`, `x + norm(attention(norm(x)))` and `x + norm(mlp(norm(x)))`.
  """

  config: ChatGLM2Config
  compute: ComputeConfig
  deterministic: bool

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    cache: Any,
    seen: Any,
    cache_start: Any,
    phases: positions.Phases,
    virtual: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    c = self.config
    dtype = jnp.dtype(self.compute.dtype)
    # The residual sum of 2 L terms keeps its size.
    out_std = c.init_std / (2 * c.num_layers) ** 0.5
    norm = functools.partial(layers.RMSNorm, dtype, c.norm_epsilon)
    with jax.named_scope('attention'):
      # No dropout of probabilities: the config.json of every released model has 0.0.
      h_BTD, cache = layers.Attention(
        c.num_heads,
        c.num_kv_heads,
        c.head_size,
        (c.init_std, c.init_std, out_std),
        0.0,
        dtype,
        qkv_bias=c.qkv_bias,
        out_bias=False,
        name='attention',
      )(
        norm(name='attention_norm')(x_BTD),
        seen,
        self.deterministic,
        cache,
        cache_start,
        functools.partial(_rotate, phases=phases),
        virtual,
      )
      if c.sandwich_norms:
        h_BTD = norm(name='attention_out_norm')(h_BTD)
      x_BTD = layers.constrain(x_BTD + h_BTD, 'act_length', 'act_embed')
    with jax.named_scope('mlp'):
      h_BTD = layers.MLP(
        c.inner_size, 'silu', True, (c.init_std, out_std), dtype, bias=False, name='mlp'
      )(norm(name='mlp_norm')(x_BTD))
      if c.sandwich_norms:
        h_BTD = norm(name='mlp_out_norm')(h_BTD)
      x_BTD = layers.constrain(x_BTD + h_BTD, 'act_length', 'act_embed')
    return x_BTD, cache


class ChatGLM2(nn.Module):
  """Tokens, positions and visibility to logits."""

  config: ChatGLM2Config
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
    """Computes logits; arguments and result as `glm_jax.models.glm.GLM`.

    `block_positions` is not used: a causal model has one position a token.
    """
    c = self.config
    chex.assert_equal_shape(
      [tokens, positions, block_positions, visibility.key_start, visibility.key_end]
    )
    dtype = jnp.dtype(self.compute.dtype)
    table = functools.partial(
      layers.Table, c.vocab_size, c.hidden_size, 'vocab', c.init_std, dtype
    )
    words = table(name='words')
    with jax.named_scope('embed'):
      x_BTD = layers.constrain(words(tokens), 'act_length', 'act_embed')
      phases = rotary_phases(c, positions)
    x_BTD, cache = stack(
      ChatGLM2Block,
      c,
      self.compute,
      deterministic,
      x_BTD,
      cache,
      visibility,
      cache_start,
      phases,
      *virtual_tokens(self, positions),
    )
    with jax.named_scope('head'):
      x_BTD = layers.RMSNorm(dtype, c.norm_epsilon, name='final_norm')(x_BTD)
      return head(x_BTD, (words if c.tied_head else table(name='head')).cast()), cache


def rotary_phases(c: ChatGLM2Config, positions_BT: jax.Array) -> positions.Phases:
  """Phases of the rotated dimensions; `rope_ratio` stretches them as the config says."""
  stretched = c.rope_scaling == 'theta'
  theta = c.rope_theta * (c.rope_ratio if stretched else 1)
  if c.rope_phase_dtype == 'float16':
    # As modeling_chatglm.py of ChatGLM2: every step is rounded to float16.
    exponents = np.arange(0, c.rotated_size, 2, dtype=np.float16)
    exponents = exponents / np.float16(c.rotated_size)
    powers = (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float16)
    frequencies = (1 / powers.astype(np.float32)).astype(np.float16)
    positions_BT = positions_BT.astype(jnp.float16)
  else:
    frequencies = positions.frequencies(c.rotated_size, theta)
  # Interpolated positions are fractions, hence floats.
  if not stretched:
    positions_BT = positions_BT.astype(frequencies.dtype) / c.rope_ratio
  return positions.phases(positions_BT, frequencies)


def _rotate(x_BTNH: jax.Array, phases: positions.Phases) -> jax.Array:
  # Phases are of pairs, two dimensions each; the rest of a head has no position.
  size = 2 * phases[0].shape[-1]
  rotated = positions.rotate_neighbours(x_BTNH[..., :size], phases)
  return jnp.concatenate([rotated, x_BTNH[..., size:]], axis=-1)
