"""Runs of released models, from their names alone: their sizes, and what a run assumes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from glm_jax import configs

_MODELS = Path(__file__).resolve().parents[2] / 'gin_configs' / 'models'
_NOT_RELEASED = ('tiny', 'chatglm2_tiny', 'glm_6b_seed')

STORED = 'bfloat16'
"""Of parameters that are not trained: what `convert --dtype=bfloat16` writes."""

FROZEN = (
  f'what is not trained is stored in {STORED} (convert --dtype={STORED}), '
  'or in the integers of --bits'
)
"""What a plan without a checkpoint assumes of it, for a person."""

ROWS, LENGTH = 8, 1024
"""Of the batch, as gin_configs/runs/continue.gin has them."""


def names() -> list[str]:
  """Of the models that `files` knows."""
  stems = sorted(path.stem for path in _MODELS.glob('*.gin'))
  return [stem.replace('_', '-') for stem in stems if stem not in _NOT_RELEASED]


def files(name: str) -> list[str]:
  """The gin files of a run that goes on from a released model.

  Args:
    name: as on Hugging Face, with or without its owner and in any case; a '-chat', '-base'
      or '-hf' behind it changes no size.

  Raises:
    UserError: an unknown one.

  Example:
    >>> files('THUDM/chatglm3-6b')
    ['gin_configs/runs/continue.gin', 'gin_configs/models/chatglm3_6b.gin']
    >>> files('glm-4-9b') == files('glm4-9b')
    True
  """
  plain = lambda text: re.sub(r'[-_.]', '', text)
  asked = name.rpartition('/')[2].lower()
  asked = {plain(asked), plain(re.sub(r'(-(chat|base|hf))+$', '', asked))}
  found = [known for known in names() if plain(known) in asked]
  configs.check(
    bool(found),
    '--released must be one of ' + ', '.join(names()),
    repr(name),
    'choose the one whose sizes it has, or write a --gin_file',
  )
  stem = found[0].replace('-', '_')
  return ['gin_configs/runs/continue.gin', f'gin_configs/models/{stem}.gin']


def bindings(model: Any, devices: int) -> list[str]:
  """What depends on the model and the devices: the state spread over all of these.

  Args:
    model: its configuration.
    devices: how many there are.
  """
  return [
    f"TASK_FEATURE_LENGTHS={{'tokens': {min(LENGTH, model.max_positions)}}}",
    f'BATCH_SIZE={max(ROWS, devices)}',
    f'MeshConfig.fsdp={devices}',
  ]


def assumed(config: Any) -> str:
  """What a plan of a released model assumes, for a person."""
  text = 'assumed, as in gin_configs/runs/continue.gin (--gin.NAME=value changes it): '
  text += 'TASK_FEATURE_LENGTHS, BATCH_SIZE, ComputeConfig.dtype and .remat as above'
  if config.in_part:
    text += f'; {FROZEN}'
  return text
