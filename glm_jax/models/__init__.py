"""Models: their configurations, the layers they share, one file a family.

Shape letters are those of `glm_jax.batch`. Weights have natural shapes, with the
layers stacked first: q [L, D, N, H], k and v [L, D, K, H], out [L, N, H, D],
up [L, D, F], down [L, F, D]. Logical axes of weights: embed, heads, kv_heads,
head_dim, mlp, vocab, layers; those of activations begin with `act_`.
"""

from __future__ import annotations

from typing import Any

from glm_jax.models.config import GLMConfig

FAMILIES = {'glm': GLMConfig}


def build(config: Any):
  """The Flax module for a model configuration."""
  from glm_jax.models import glm  # Flax takes a second to import; a config does not.

  return {GLMConfig: glm.GLM}[type(config)](config)
