"""Small models of each family, with every kind of weights."""

import functools

import numpy as np
import small
from flax import traverse_util

from glm_jax.models import ChatGLM2Config, ChatGLMConfig, GLMConfig, quantized, virtual

SIZES = dict(num_layers=2, hidden_size=32, num_heads=4, vocab_size=64, max_positions=64)
FAMILIES = {
  'glm': GLMConfig(**SIZES, init_std=0.2),
  'chatglm': ChatGLMConfig(**SIZES, mlp_size=64, deepnorm_layers=2, init_std=0.2),
  'chatglm2': ChatGLM2Config(
    **SIZES, num_kv_heads=2, head_size=8, mlp_size=48, init_std=0.2
  ),
}
KINDS = ('plain', 'int8', 'int4', 'groups', 'adapters', 'prefix')


def adapters(config, rank=3):
  """Random factors beside every product, and the parameters with them merged."""
  rng = np.random.default_rng(1)
  flat = dict(traverse_util.flatten_dict(small.params(config)))
  factors = {}
  for path, leaf in flat.items():
    if count := quantized.inputs_of(path):
      inputs, outputs = leaf.shape[1 : 1 + count], leaf.shape[1 + count :]
      a = rng.normal(0, 0.1, (len(leaf), *inputs, rank)).astype(np.float32)
      b = rng.normal(0, 0.1, (len(leaf), rank, *outputs)).astype(np.float32)
      factors[(*path[:-1], 'a')], factors[(*path[:-1], 'b')] = a, b
      flat_a, flat_b = a.reshape(len(a), -1, rank), b.reshape(len(b), rank, -1)
      flat[path] = leaf + np.einsum('lir,lro->lio', flat_a, flat_b).reshape(leaf.shape)
  nested = traverse_util.unflatten_dict
  return nested(factors), nested(flat)


def encoder(config, P=3):
  """Embeddings of P virtual tokens."""
  width = 2 * config.num_layers * config.num_kv_heads * config.head_size
  return {'embedding': np.random.default_rng(2).normal(size=(P, width)).astype('f4')}


@functools.cache
def variables_of(family, kind):
  """The collections of a small model."""
  config = FAMILIES[family]
  params = small.params(config)
  if kind == 'adapters':
    return {'params': params, 'adapters': adapters(config)[0]}
  if kind == 'prefix':
    return {'params': params, 'prefix': virtual.prefix(config, encoder(config))}
  if kind == 'plain':
    return {'params': params}
  return quantized.of_tree(params, 8 if kind == 'int8' else 4, 8 * (kind == 'groups'))
