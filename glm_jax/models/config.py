"""Model configurations: sizes, and how they are computed."""

from __future__ import annotations

import dataclasses
from typing import Any

from glm_jax import configs
from glm_jax.attention import BACKENDS

REMAT_POLICIES = ('none', 'full', 'dots', 'dots_no_batch')

# What a run may change without becoming another model.
COMPUTE_FIELDS = ('dtype', 'remat', 'attention')


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLMConfig:
  """GLM (Du et al., ACL 2022; THUDM/GLM model/modeling_glm.py).

  Attributes:
    num_layers: L.
    hidden_size: D.
    num_heads: N; the head size H is D / N.
    mlp_size: F; 0 means 4 D.
    vocab_size: V, rows of the embedding table: at least the vocabulary's pieces,
      usually rounded up to a multiple of 128.
    max_positions: largest position; both position tables have one row more.
    embedding_dropout: on the sum of the three embeddings.
    attention_dropout: on attention probabilities.
    output_dropout: on what attention and MLP add to the residual stream.
    init_std: of every weight matrix; `out` and `down` have it over sqrt(2 L).
    dtype: of activations; parameters are float32.
    remat: what the backward pass recomputes: nothing ('none'), all of a layer
      ('full'), all but its matmuls ('dots'), all but its weight matmuls
      ('dots_no_batch').
    attention: backend, see `glm_jax.attention.attend`.
  """

  num_layers: int
  hidden_size: int
  num_heads: int
  mlp_size: int = 0
  vocab_size: int
  max_positions: int
  embedding_dropout: float = 0.1
  attention_dropout: float = 0.1
  output_dropout: float = 0.1
  init_std: float = 0.02
  dtype: str = 'float32'
  remat: str = 'none'
  attention: str = 'auto'

  def __post_init__(self):
    configs.check_types(self)
    for name in ('num_layers', 'hidden_size', 'num_heads', 'vocab_size', 'max_positions'):
      value = getattr(self, name)
      configs.check(
        value >= 1,
        f'GLMConfig.{name} must be positive',
        str(value),
        'give a size of 1 or more',
      )
    configs.check(
      self.hidden_size % self.num_heads == 0,
      'GLMConfig.hidden_size must be divisible by num_heads',
      f'hidden_size={self.hidden_size}, num_heads={self.num_heads}',
      'choose a number of heads that divides the hidden size',
    )
    configs.check(
      self.mlp_size >= 0,
      'GLMConfig.mlp_size must not be negative',
      str(self.mlp_size),
      'give a size, or 0 for 4 x hidden_size',
    )
    for name in ('embedding_dropout', 'attention_dropout', 'output_dropout'):
      value = getattr(self, name)
      configs.check(
        0 <= value < 1,
        f'GLMConfig.{name} must be in [0, 1)',
        str(value),
        'use 0.1 as the original, or 0 for none',
      )
    for name, choices in (
      ('dtype', ('float32', 'bfloat16')),
      ('remat', REMAT_POLICIES),
      ('attention', BACKENDS),
    ):
      value = getattr(self, name)
      configs.check(
        value in choices,
        f'GLMConfig.{name} must be one of {choices}',
        repr(value),
        'choose one of these',
      )

  @property
  def head_size(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def inner_size(self) -> int:
    return self.mlp_size or 4 * self.hidden_size


def to_dict(config: Any) -> dict[str, Any]:
  """A configuration as JSON, with its family, for a checkpoint to carry."""
  from glm_jax.models import FAMILIES

  family = next(name for name, kind in FAMILIES.items() if kind is type(config))
  return {'family': family, **dataclasses.asdict(config)}


def from_dict(fields: dict[str, Any]) -> Any:
  """The inverse of `to_dict`; raises ValueError for an unknown family or field."""
  from glm_jax.models import FAMILIES

  fields = dict(fields)
  family = fields.pop('family', None)
  configs.check(
    family in FAMILIES,
    f'model family must be one of {tuple(FAMILIES)}',
    repr(family),
    'the checkpoint was written by another version',
  )
  known = {field.name for field in dataclasses.fields(FAMILIES[family])}
  unknown = sorted(set(fields) - known)
  configs.check(
    not unknown,
    f'{FAMILIES[family].__name__} has the fields {sorted(known)}',
    str(unknown),
    'the checkpoint was written by another version',
  )
  return FAMILIES[family](**fields)
