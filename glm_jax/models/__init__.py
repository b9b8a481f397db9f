"""Models: their configurations, the layers they share, one file a family.

Shape letters are those of `glm_jax.batch`. Weights have natural shapes, with the
layers stacked first: q [L, D, N, H], k and v [L, D, K, H], out [L, N, H, D],
up [L, D, F], down [L, F, D]. Logical axes of weights: embed, heads, kv_heads,
head_dim, mlp, vocab, layers; those of activations begin with `act_`.
"""

from __future__ import annotations

from typing import Any

from glm_jax.models.compute import ComputeConfig
from glm_jax.models.config import ChatGLM2Config, ChatGLMConfig, GLMConfig

FAMILIES = {'glm': GLMConfig, 'chatglm': ChatGLMConfig, 'chatglm2': ChatGLM2Config}


def build(config: Any, compute: ComputeConfig = ComputeConfig()):
  """The Flax module of a model, and how it is computed."""
  from glm_jax.models import chatglm, chatglm2, glm  # Flax takes a second to import.

  modules = {
    GLMConfig: glm.GLM,
    ChatGLMConfig: chatglm.ChatGLM,
    ChatGLM2Config: chatglm2.ChatGLM2,
  }
  return modules[type(config)](config, compute)
