"""Virtual tokens as THUDM's ptuning/main.py saves them: `transformer.prefix_encoder.*`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from glm_jax import configs
from glm_jax.interop import files

_AT = 'transformer.prefix_encoder.'
_EMBEDDING = 'embedding.weight'
_LAYERS = {'hidden': 'trans.0', 'out': 'trans.2'}


def find(folder: Path) -> Path | None:
  """The file with virtual tokens; None if the folder has none."""
  path = folder / 'pytorch_model.bin'
  if not path.exists() or f'{_AT}{_EMBEDDING}' not in files.tensors(path).specs:
    return None
  return path


def read(
  path: Path, model: Any
) -> tuple[dict[tuple[str, ...], np.ndarray], dict[str, Any]]:
  """The encoder of virtual tokens, see `glm_jax.models.virtual`.

  Args:
    path: of `find`.
    model: configuration of what they are for.

  Returns:
    Its arrays by path in `prefix`, float32, and what a checkpoint says of them.

  Raises:
    UserError: they are of another model.
  """
  tensors = files.tensors(path)
  get = lambda name: tensors.read(_AT + name).astype(np.float32)
  arrays: dict[tuple[str, ...], np.ndarray] = {('embedding',): get(_EMBEDDING)}
  projection = f'{_AT}trans.0.weight' in tensors.specs
  for name, module in _LAYERS.items() if projection else ():
    arrays[name, 'weight'] = np.ascontiguousarray(get(f'{module}.weight').T)
    arrays[name, 'bias'] = get(f'{module}.bias')
  last = ('out', 'bias') if projection else ('embedding',)
  width = arrays[last].shape[-1]
  needed = 2 * model.num_layers * model.num_kv_heads * model.head_size
  configs.check(
    width == needed,
    f'virtual tokens must have keys and values of {needed} numbers for the base',
    f'{width} in {path}',
    'give the base that they were trained on',
  )
  tokens = len(arrays[('embedding',)])
  return arrays, {'kind': 'ptuning', 'tokens': tokens, 'projection': projection}
