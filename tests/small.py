"""Parameters and logits of small models; each program is compiled whole, and once."""

import functools

import flax.linen as nn
import jax

from benchmarks import step
from glm_jax import models
from glm_jax.training import state

CHATGLM2_6B = step.WIDE_CHATGLM2
"""Of the released size, for shapes and tables: nothing of it is computed."""


@functools.cache
def params(config, seed=0):
  """Fresh parameters, without their boxes."""
  init = jax.jit(lambda key: nn.unbox(state.init_params(config, key)))
  return init(jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=0, static_argnames='compute')
def logits(config, params, *inputs, compute=models.ComputeConfig()):
  """[B, T, vocab_size] of tokens, both positions and their visibility."""
  return models.build(config, compute).apply({'params': params}, *inputs)[0]


@functools.partial(jax.jit, static_argnums=0)
def apply(config, variables, *inputs):
  """The same, of a model with any collections."""
  return models.build(config).apply(variables, *inputs)[0]
