"""What was trained beside a model, in an export: the score of a reward model has a place.

transformers has it as `GlmForSequenceClassification` and `Glm4ForSequenceClassification`: a
model without a head, and `score.weight` [1, D], whose product with what the model makes of
the last token that is no padding is the one number of its logits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from glm_jax import configs
from glm_jax.interop.formats import FORMATS, Entry, LeafView, Path, with_scales
from glm_jax.text.vocabulary import Vocabulary

FORMATS_WITH_SCORES = ('glm', 'glm4')
"""Formats of which transformers has such a class."""

# The leaf of `glm_jax.recipes.reward`.
_SCORE = ('value', 'weight')
CRITIC = ('critic', 'critic_factors')
"""Trees of PPO, which the policy that it has trained does not need."""

_Spec = TypeVar('_Spec')


def is_reward_model(paths: Collection[Path]) -> bool:
  """Whether leaves are a reward model's.

  Example:
    >>> is_reward_model([('words', 'weight'), ('value', 'weight')])
    True
    >>> is_reward_model([('words', 'weight'), ('critic', 'weight')])
    False
  """
  return _SCORE in paths


def entries(format: str, config: Any, parts: int, paths: Collection[Path]) -> list[Entry]:
  """The tensors of an export of these leaves, see `formats.Format`."""
  found = FORMATS[format].entries(config, parts)
  if is_reward_model(paths) and format in FORMATS_WITH_SCORES:
    found = [entry for entry in found if entry.parts[0].path[0] != 'head']
    row = LeafView(_SCORE, None, _only_row, None)
    shape, sizes = (1, config.hidden_size), ('num_labels', 'hidden_size')
    found.append(Entry('score.weight', shape, sizes, (row,)))
  return found


def exported(format: str, config: Any, specs: Mapping[Path, _Spec]) -> dict[Path, _Spec]:
  """Those of the leaves that an export holds.

  Left out are the head of a reward model, and PPO's critic, which only training needs.

  Raises:
    UserError: what was trained beside the model has no place in the format.
  """
  held = _paths(with_scales(entries(format, config, 1, specs)))
  model = _paths(with_scales(FORMATS[format].entries(config, 1)))
  beside = [path for path in specs if path not in held | model]
  # Layers that a format has otherwise are refused by its own check, which says why.
  beside = [path for path in beside if path[0] not in (*CRITIC, 'layers')]
  others = [name for name in FORMATS_WITH_SCORES if FORMATS[name].config is type(config)]
  configs.check(
    not beside,
    f'the format {format!r} holds a model alone',
    f'{", ".join(map("/".join, beside))} besides',
    f'use one of {others}, which hold the score of a reward model, or --to=checkpoint'
    if others and is_reward_model(specs)
    else 'use --to=checkpoint',
  )
  return {path: spec for path, spec in specs.items() if path in held}


def padding(vocabulary: Vocabulary) -> int:
  """What pads conversations: a piece that ends none, since the score stands at the end."""
  s = vocabulary.specials
  return next(token for token in (s.pad, s.eop, s.mask) if token not in vocabulary.stops)


def _paths(found: Iterable[Entry]) -> set[Path]:
  return {part.path for entry in found for part in entry.parts}


def _only_row(array: np.ndarray) -> np.ndarray:
  return array[0]
