"""Checkpoints of small models on disk."""

import numpy as np
import small

from glm_jax import models
from glm_jax.checkpoints import slices
from glm_jax.models import ChatGLM2Config, GLMConfig
from glm_jax.text.vocabulary import ByteVocabulary

_SIZES = dict(num_layers=2, hidden_size=32, num_heads=4, vocab_size=384, max_positions=80)
FAMILIES = {
  'glm': GLMConfig(**_SIZES, init_std=0.3),
  'chatglm2': ChatGLM2Config(
    **_SIZES, mlp_size=48, num_kv_heads=2, head_size=8, init_std=0.3
  ),
}


def checkpoint(folder, config, seed=0):
  """One of fresh parameters and of bytes."""
  params = slices.flat(small.params(config, seed))
  leaves = {k: np.asarray(v) for k, v in params.items()}
  specs = {k: slices.LeafSpec(v.shape, v.dtype) for k, v in leaves.items()}
  read = lambda path, layer: leaves[path] if layer is None else leaves[path][layer]
  meta = {
    'model': models.config.to_dict(config),
    'vocabulary': ByteVocabulary().to_dict(),
  }
  slices.write(folder, specs, read, meta, lambda _: None)
  return folder
