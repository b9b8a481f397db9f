"""Golden files as checkpoints of other programs, in memory and on disk."""

import json
import pathlib

import numpy as np

from glm_jax.checkpoints import variables
from glm_jax.checkpoints.slices import flat
from glm_jax.interop import files, integers, leaves, recognise
from glm_jax.training import state

GOLDEN = pathlib.Path(__file__).parent / 'golden'


def arrays_of(name):
  """Arrays of a golden file, and those of them that are the model's tensors."""
  arrays = dict(np.load(GOLDEN / f'{name}.npz'))
  return arrays, {k[6:]: v for k, v in arrays.items() if k.startswith('param/')}


def config_json(name, arrays):
  """config.json as the program that made a golden file would write it."""
  meta = {k[5:]: v.item() for k, v in arrays.items() if k.startswith('meta/')}
  if name == 'chatglm':
    return {
      'model_type': 'chatglm',
      'hidden_size': meta['hidden'],
      'inner_hidden_size': meta['ffn'],
      'layernorm_epsilon': 1e-5,
      'max_sequence_length': 64,
      'num_attention_heads': meta['heads'],
      'num_layers': meta['num_layers'],
      'position_encoding_2d': True,
      'vocab_size': meta['vocab'],
    }
  if name == 'chatglm2':
    return {
      'model_type': 'chatglm',
      'add_bias_linear': False,
      'add_qkv_bias': True,
      'ffn_hidden_size': meta['ffn'],
      'hidden_size': meta['hidden'],
      'kv_channels': meta['head_dim'],
      'layernorm_epsilon': meta['eps'],
      'multi_query_attention': True,
      'multi_query_group_num': meta['groups'],
      'num_attention_heads': meta['heads'],
      'num_layers': meta['num_layers'],
      'padded_vocab_size': meta['vocab'],
      'rmsnorm': True,
      'seq_length': 64,
    }
  if name in ('hf_glm', 'glm4_0414'):
    return {
      'model_type': 'glm' if name == 'hf_glm' else 'glm4',
      'attention_bias': True,
      'head_dim': meta['head_dim'],
      'hidden_act': 'silu',
      'hidden_size': meta['hidden'],
      'intermediate_size': meta['ffn'],
      'max_position_embeddings': 64,
      'num_attention_heads': meta['heads'],
      'num_hidden_layers': meta['num_layers'],
      'num_key_value_heads': meta['groups'],
      'rms_norm_eps': meta['eps'],
      'rope_parameters': {
        'rope_type': 'default',
        'rope_theta': 10000.0,
        'partial_rotary_factor': 0.5,
      },
      'vocab_size': meta['vocab'],
    }
  return {}


class InMemory:
  """`glm_jax.interop.files.Tensors` of arrays."""

  def __init__(self, tensors):
    self._tensors = tensors
    self.specs = {
      k: files.TensorSpec(v.shape, v.dtype, pathlib.Path('memory'))
      for k, v in tensors.items()
    }

  def read(self, name):
    return self._tensors[name]


class TreeLeaves:
  """`glm_jax.interop.leaves.Leaves` of a tree of arrays."""

  def __init__(self, tree):
    self._leaves = {k: np.asarray(v) for k, v in flat(tree).items()}
    self.specs = {k: leaves.LeafSpec(v.shape, v.dtype) for k, v in self._leaves.items()}

  def read(self, path, layer):
    array = self._leaves[path]
    return array if layer is None else array[layer]


def imported(tensors, config, container='huggingface', **overrides):
  """What `recognise` finds, and the parameter tree."""
  parts = tensors if isinstance(tensors, list) else [tensors]
  source = integers.unpacked(
    files.Source(pathlib.Path('memory'), container, tuple(map(InMemory, parts)), config)
  )
  found = recognise.recognise(source, overrides)
  quantized = {'bits': found.bits, 'group': 0} if found.bits else None
  whole = variables.stored(state.abstract_params(found.config), quantized)
  shapes = {k: v.shape for k, v in flat(whole).items()}
  read = leaves.ForeignLeaves(source, found, shapes)
  tree = {}
  for path, spec in read.specs.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    if path[0] == 'layers':
      value = np.stack([read.read(path, layer) for layer in range(spec.shape[0])])
    else:
      value = np.array(read.read(path, None))
    assert value.shape == spec.shape
    node[path[-1]] = value
  return found, tree


def exported(tree, format, config, **options):
  """A tree as the tensors of a format."""
  made = leaves.foreign_tensors(TreeLeaves(tree), format, config, **options)
  return {tensor.name: tensor.make() for tensor in made}


def write_safetensors(folder, tensors, config, shards=1):
  """A Hugging Face folder."""
  from safetensors.numpy import save_file

  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(config))
  if shards == 1:
    save_file(tensors, folder / 'model.safetensors')
    return
  where = {}
  for i in range(shards):
    name = f'model-{i + 1:05}-of-{shards:05}.safetensors'
    part = dict(list(tensors.items())[i::shards])
    save_file(part, folder / name)
    where |= dict.fromkeys(part, name)
  index = {'metadata': {}, 'weight_map': where}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
