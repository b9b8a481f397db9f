"""ChatGLM-6B and GLM-130B: rotary positions and DeepNorm blocks.

GLM-130B: Zeng et al., ICLR 2023, sections 2.1 and 2.2; SwissArmyTransformer's
glm130B_model.py. ChatGLM-6B: the modeling_chatglm.py published with its weights. Both
keep GLM's input: Part A seen bidirectionally, then spans from `<sop>` on. They differ
in the positions that rotate (ChatGLM-6B: the first position rotates the first half of a
head and the block position the second; GLM-130B: the first position rotates all of it)
and in the MLP (GLM-130B: gated).
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
from glm_jax.models.config import ChatGLMConfig
from glm_jax.models.stack import stack, virtual_tokens


class ChatGLMBlock(nn.Module):
  """`x = alpha norm(x) + attention(norm(x))`, then the same with the MLP.

  DeepNorm (Wang et al., 2022) is `norm(alpha x + f(x))`; the released code has each
  norm at the start of the next half, which is the same with one norm more on the
  embeddings.
  """

  config: ChatGLMConfig
  compute: ComputeConfig
  deterministic: bool

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    cache: Any,
    seen: Any,
    cache_start: Any,
    phases: tuple[positions.Phases, ...],
    virtual: jax.Array | None = None,
  ) -> tuple[jax.Array, Any]:
    c = self.config
    dtype = jnp.dtype(self.compute.dtype)
    alpha = (2 * c.deepnorm_layers) ** 0.5
    drop = nn.Dropout(c.output_dropout, deterministic=self.deterministic)

    # Xavier initialisation, with gain (2 layers) ** -0.5 on all but q and k (GLM-130B,
    # section 2.2, and its appendix on DeepNorm).
    def xavier(fan_in: int, fan_out: int, gain: float = 1 / alpha) -> float:
      return gain * (2 / (fan_in + fan_out)) ** 0.5

    D, F = c.hidden_size, c.inner_size
    # Unlike a pre-norm block's, the residual is what comes out of the norm.
    with jax.named_scope('attention'):
      x_BTD = layers.LayerNorm(dtype, c.norm_epsilon, name='attention_norm')(x_BTD)
      h_BTD, cache = layers.Attention(
        c.num_heads,
        c.num_kv_heads,
        c.head_size,
        (xavier(D, D, 1.0), xavier(D, D), xavier(D, D)),
        c.attention_dropout,
        dtype,
        name='attention',
      )(
        x_BTD,
        seen,
        self.deterministic,
        cache,
        cache_start,
        functools.partial(_rotate, phases=phases),
        virtual,
      )
      x_BTD = layers.constrain(alpha * x_BTD + drop(h_BTD), 'act_length', 'act_embed')
    with jax.named_scope('mlp'):
      x_BTD = layers.LayerNorm(dtype, c.norm_epsilon, name='mlp_norm')(x_BTD)
      h_BTD = layers.MLP(
        F,
        'gelu_erf' if c.gated else 'gelu',
        c.gated,
        (xavier(D, F), xavier(F, D)),
        dtype,
        name='mlp',
      )(x_BTD)
      x_BTD = layers.constrain(alpha * x_BTD + drop(h_BTD), 'act_length', 'act_embed')
    return x_BTD, cache


class ChatGLM(nn.Module):
  """Tokens, two positions and visibility to logits."""

  config: ChatGLMConfig
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

    Without `two_positions`, `block_positions` is not used.
    """
    c = self.config
    chex.assert_equal_shape(
      [tokens, positions, block_positions, visibility.key_start, visibility.key_end]
    )
    dtype = jnp.dtype(self.compute.dtype)
    words = layers.Table(
      c.vocab_size, c.hidden_size, 'vocab', c.init_std, dtype, name='words'
    )
    with jax.named_scope('embed'):
      x_BTD = words(tokens)
      if c.embedding_gradient < 1:
        # GLM-130B, section 3.3: a smaller gradient of the embeddings steadies training.
        share = c.embedding_gradient
        x_BTD = share * x_BTD + (1 - share) * jax.lax.stop_gradient(x_BTD)
      x_BTD = nn.Dropout(c.embedding_dropout, deterministic=deterministic)(x_BTD)
      x_BTD = layers.constrain(x_BTD, 'act_length', 'act_embed')
      phases = rotary_phases(c, positions, block_positions)
    x_BTD, cache = stack(
      ChatGLMBlock,
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
      x_BTD = layers.LayerNorm(dtype, c.norm_epsilon, name='final_norm')(x_BTD)
      table = words
      if not c.tied_head:
        table = layers.Table(
          c.vocab_size, c.hidden_size, 'vocab', c.init_std, dtype, name='head'
        )
      return head(x_BTD, table.cast()), cache


def rotary_phases(
  c: ChatGLMConfig, positions_BT: jax.Array, block_positions_BT: jax.Array
) -> tuple[positions.Phases, ...]:
  """Phases of each part of a head: two halves, or the whole."""
  size = c.head_size // 2 if c.two_positions else c.head_size
  table = positions.frequencies(size, c.rope_theta)
  # ChatGLM-6B's modeling_chatglm.py has `inv_freq = inv_freq.half()`: back in float32, the
  # digits are gone. `phases` computes angles in the dtype of the table.
  if c.rope_frequency_dtype == 'float16' or c.rope_phase_dtype == 'float16':
    table = table.astype(np.float16)
  if c.rope_phase_dtype == 'float32':
    table = table.astype(np.float32)
  kinds = (positions_BT, block_positions_BT) if c.two_positions else (positions_BT,)
  return tuple(positions.phases(kind, table) for kind in kinds)


def _rotate(x_BTNH: jax.Array, phases: tuple[positions.Phases, ...]) -> jax.Array:
  # [B, T, N, H] -> two of [B, T, N, H / 2], one for each kind of position; or one of H.
  parts = jnp.split(x_BTNH, len(phases), axis=-1)
  rotated = map(positions.rotate_halves, parts, phases)
  return jnp.concatenate(list(rotated), axis=-1)
