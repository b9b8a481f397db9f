"""Low-rank factors as peft keeps them: adapter_config.json and adapter_model.safetensors.

There, a fused projection (`query_key_value`, `gate_up_proj`) is one module with one pair of
factors. Going out, the a of its parts stand side by side and their b along a diagonal of
blocks, with so many times the rank. Coming in, each part takes all of the a that its own
rows of b use.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glm_jax import configs
from glm_jax.interop import files
from glm_jax.interop.formats import FORMATS, Entry, LeafView
from glm_jax.models import quantized

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_ROOT = 'base_model.model.'
_Path = tuple[str, ...]
# Fields of adapter_config.json and the values of them that are plain LoRA.
_PLAIN = {
  'peft_type': ('LORA',),
  'use_dora': (False, None),
  'lora_bias': (False, None),
  'bias': ('none', None),
  'fan_in_fan_out': (False, None),
  'modules_to_save': (None, []),
  'trainable_token_indices': (None,),
}


def export(
  folder: Path,
  factors: Mapping[_Path, np.ndarray],
  content: Mapping[str, Any],
  model: Any,
  format: str,
  prefix: str,
  base: str,
) -> None:
  """Writes both files.

  Args:
    folder: for them.
    factors: a [L, *inputs, rank] and b [L, rank, *outputs], by path in `adapters`.
    content: what the checkpoint says of its adapters.
    model: its configuration.
    format: of the model that peft puts them on, a key of `FORMATS`.
    prefix: before the names of that model.
    base: the checkpoint that they were trained on.
  """
  from safetensors.numpy import save_file

  tensors, ranks = {}, {}
  for entry in FORMATS[format].entries(model, 1):
    own = [part for part in entry.parts if (*part.path[:-1], 'a') in factors]
    own = [part for part in own if part.path[-1] == 'weight']
    if not own:
      continue
    pairs = [_foreign(part, factors, entry.shape[0]) for part in own]
    module = prefix + entry.name.removesuffix('.weight')
    for name, parts, axis in zip('AB', zip(*pairs, strict=True), (0, 1), strict=True):
      tensors[f'{_ROOT}{module}.lora_{name}.weight'] = np.concatenate(parts, axis)
    ranks[module.rpartition('.')[2]] = sum(len(a) for a, _ in pairs)
  rank, stabilized = content['rank'], content['rank_stabilized']
  alpha = lambda rank: content['scaling'] * (math.sqrt(rank) if stabilized else rank)
  others = {name: own for name, own in ranks.items() if own != rank}
  config = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'r': rank,
    'lora_alpha': alpha(rank),
    'lora_dropout': content['dropout'],
    'use_rslora': stabilized,
    'target_modules': sorted(ranks),
    'rank_pattern': others,
    'alpha_pattern': {name: alpha(own) for name, own in others.items()},
    'bias': 'none',
    'inference_mode': True,
  }
  save_file(tensors, folder / WEIGHTS, metadata={'format': 'pt'})
  text = json.dumps(config, indent=2) + '\n'
  (folder / CONFIG).write_text(text, encoding='utf-8')


def _foreign(
  part: LeafView, factors: Mapping[_Path, np.ndarray], rows: int
) -> tuple[np.ndarray, np.ndarray]:
  """A [rank, in] and B [out, rank] of a module, of one of its parts alone."""
  a, b = (factors[*part.path[:-1], name][part.layer] for name in 'ab')
  rank = len(b)
  B = np.zeros((rows, rank), np.float32)
  view = _view(part, B)
  assert np.shares_memory(view, B)
  view[...] = b
  return np.ascontiguousarray(a.reshape(-1, rank).T), B


def _view(part: LeafView, B: np.ndarray) -> np.ndarray:
  """B [out, rank] of a module in the shape of b [rank, *outputs] of one of its parts."""
  # A view takes the inputs for one axis, of any size, but for those of attention's output.
  return part.view(B) if quantized.inputs_of(part.path) == 1 else B.T


def read(folder: Path, model: Any) -> tuple[dict[_Path, np.ndarray], dict[str, Any]]:
  """Adapters for a model.

  Args:
    folder: of peft.
    model: configuration of what they are for.

  Returns:
    Factors by path in `adapters`, float32, and what a checkpoint says of them.

  Raises:
    UserError: adapters of another kind, damaged ones, or of another model.
  """
  config = configs.read_json(folder / CONFIG)
  for name, values in _PLAIN.items():
    configs.check(
      config.get(name) in values,
      f'adapters of peft must be LoRA with {name}={values[0]!r}',
      f'{config.get(name)!r} in {folder / CONFIG}',
      'merge them into their model there (merge_and_unload, save_pretrained)',
    )
  path = folder / WEIGHTS
  path = path if path.exists() else folder / 'adapter_model.bin'
  configs.check(path.exists(), f'{folder} must hold {WEIGHTS}', 'none', 'fetch it')
  tensors = files.tensors(path)
  names = {name.removeprefix(_ROOT) for name in tensors.specs}
  modules = {re.sub(r'\.lora_[AB]\.weight$', '', name) for name in names}
  known = _entries(model, modules, names, folder)

  default = _scaling(config, config['r'], config['lora_alpha'])
  found: dict[_Path, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
  for module, entry in known.items():
    A, B = (
      tensors.read(f'{_ROOT}{module}.lora_{name}.weight').astype(np.float32)
      for name in 'AB'
    )
    configs.check(
      A.shape[1:] == entry.shape[1:] and B.shape == (entry.shape[0], len(A)),
      f'factors of {module} must be of a matrix {entry.shape}',
      f'{A.shape} and {B.shape}',
      'give the base that they were trained on',
    )
    alpha = _pattern(config.get('alpha_pattern'), module, config['lora_alpha'])
    B = B * np.float32(_scaling(config, len(A), alpha) / default)
    # Of a diagonal of blocks, those of the other parts are 0: each part takes what is its.
    own = [(part, _view(part, B)) for part in entry.parts]
    used = [np.any(b.reshape(len(A), -1), axis=1) for _, b in own]
    fused = len(own) > 1 and np.any(used)
    for (part, b), rows in zip(own, used, strict=True):
      keeps = rows if fused else slice(None)
      if not fused or rows.any():
        a = A[keeps].T.reshape(*_inputs(part, model, A), -1)
        found.setdefault(part.path, {})[part.layer] = (a, b[keeps])
  factors, ranks = {}, {}
  for weight, by_layer in found.items():
    a, b = _stacked(by_layer, model.num_layers)
    factors[(*weight[:-1], 'a')], factors[(*weight[:-1], 'b')] = a, b
    ranks[weight] = a.shape[-1]
  rank = max(ranks.values())
  stabilized = bool(config.get('use_rslora'))
  content = {
    'kind': 'lora',
    'rank': rank,
    'alpha': default * (math.sqrt(rank) if stabilized else rank),
    'dropout': float(config.get('lora_dropout', 0.0)),
    'targets': '|'.join('/'.join(weight) for weight in ranks),
    'rank_stabilized': stabilized,
    'scaling': default,
  }
  return factors, content


def _entries(
  model: Any, modules: set[str], names: set[str], folder: Path
) -> dict[str, Entry]:
  """The tensors of the model that adapters stand beside, by module."""
  closest: set[str] = modules
  for form in FORMATS.values():
    if not isinstance(model, form.config) or form.container != 'huggingface':
      continue
    for prefix in ('', 'glm.'):
      entries = {
        prefix + entry.name.removesuffix('.weight'): entry
        for entry in form.entries(model, 1)
        if all(quantized.inputs_of(part.path) for part in entry.parts)
      }
      closest = min(closest, modules - {*entries}, key=len)
      if modules <= {*entries}:
        both = {f'{module}.lora_{name}.weight' for module in modules for name in 'AB'}
        configs.check(
          bool(modules) and names == both,
          'adapters of peft must have an A and a B for each module, and nothing else',
          f'{sorted(names ^ both)[:3]} in {folder}',
          'fetch them again',
        )
        return {module: entries[module] for module in sorted(modules)}
  raise configs.UserError(
    "adapters of peft must stand beside weights of the base's layers, got "
    f'{sorted(closest)[:3]} in {folder}; give the base that they were trained on.'
  )


def _inputs(part: LeafView, model: Any, A: np.ndarray) -> tuple[int, ...]:
  two = quantized.inputs_of(part.path) == 2
  return (model.num_heads, model.head_size) if two else A.shape[1:]


def _scaling(config: Mapping[str, Any], rank: int, alpha: float) -> float:
  return alpha / (math.sqrt(rank) if config.get('use_rslora') else rank)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
  """As peft finds a module's own (utils/other.py, get_pattern_key)."""
  for key, value in (patterns or {}).items():
    if re.match(rf'(.*\.)?({key})$', module):
      return value
  return default


def _stacked(
  by_layer: Mapping[int, tuple[np.ndarray, np.ndarray]], layers: int
) -> tuple[np.ndarray, np.ndarray]:
  """Factors of all layers; 0 where one has none, or a lower rank."""
  rank = max(len(b) for _, b in by_layer.values())
  one_a, one_b = next(iter(by_layer.values()))
  a = np.zeros((layers, *one_a.shape[:-1], rank), np.float32)
  b = np.zeros((layers, rank, *one_b.shape[1:]), np.float32)
  for layer, (own_a, own_b) in by_layer.items():
    a[layer, ..., : len(own_b)] = own_a
    b[layer, : len(own_b)] = own_b
  return a, b
