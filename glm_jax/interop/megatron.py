"""THUDM/GLM checkpoints (Megatron names) <-> this package's parameters.

Linear weights there are [out, in]; `query_key_value` stacks all of Q, all of K, all
of V; heads are contiguous rows (THUDM/GLM mpu/transformer.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from glm_jax.models.config import GLMConfig


def params_from_megatron(
  tensors: Mapping[str, np.ndarray], config: GLMConfig
) -> dict[str, Any]:
  """A GLM state dict as a parameter tree.

  Args:
    tensors: name -> array; a `glm.` prefix, as in Hugging Face files, is dropped.
    config: sizes; a tensor of another shape raises ValueError.

  Returns:
    The tree of `glm_jax.models.glm.GLM`, numpy arrays in the stored dtype.
  """
  tensors = {name.removeprefix('glm.'): array for name, array in tensors.items()}
  c = config
  D, N, H, F = c.hidden_size, c.num_heads, c.head_size, c.inner_size

  def get(name: str, *shape: int) -> np.ndarray:
    if name not in tensors:
      raise ValueError(
        f'the checkpoint must hold {name!r}, got {len(tensors)} other '
        'tensors; is it a THUDM/GLM model?'
      )
    if tensors[name].shape != shape:
      raise ValueError(
        f'{name!r} must have shape {shape} by the model config, got '
        f'{tensors[name].shape}; correct the config.'
      )
    return tensors[name]

  def norm(name: str) -> dict[str, np.ndarray]:
    return {'scale': get(f'{name}.weight', D), 'bias': get(f'{name}.bias', D)}

  def layer(i: int) -> dict[str, Any]:
    at = f'transformer.layers.{i}'
    qkv = f'{at}.attention.query_key_value'
    weights = get(f'{qkv}.weight', 3 * D, D).reshape(3, N, H, D)
    biases = get(f'{qkv}.bias', 3 * D).reshape(3, N, H)
    attention = {
      name: {'weight': weights[j].transpose(2, 0, 1), 'bias': biases[j]}
      for j, name in enumerate('qkv')
    }
    attention['out'] = {
      'weight': get(f'{at}.attention.dense.weight', D, D).T.reshape(N, H, D),
      'bias': get(f'{at}.attention.dense.bias', D),
    }
    up, down = f'{at}.mlp.dense_h_to_4h', f'{at}.mlp.dense_4h_to_h'
    return {
      'attention_norm': norm(f'{at}.input_layernorm'),
      'attention': attention,
      'mlp_norm': norm(f'{at}.post_attention_layernorm'),
      'mlp': {
        'up': {'weight': get(f'{up}.weight', F, D).T, 'bias': get(f'{up}.bias', F)},
        'down': {'weight': get(f'{down}.weight', D, F).T, 'bias': get(f'{down}.bias', D)},
      },
    }

  rows = c.max_positions + 1
  at = 'transformer'
  return {
    'words': {'weight': get('word_embeddings.weight', c.vocab_size, D)},
    'positions': {'weight': get(f'{at}.position_embeddings.weight', rows, D)},
    'block_positions': {'weight': get(f'{at}.block_position_embeddings.weight', rows, D)},
    'layers': _stack([layer(i) for i in range(c.num_layers)]),
    'final_norm': norm(f'{at}.final_layernorm'),
  }


def _stack(trees: list[Any]) -> Any:
  if isinstance(trees[0], dict):
    return {key: _stack([tree[key] for tree in trees]) for key in trees[0]}
  return np.stack(trees)
