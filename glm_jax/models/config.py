"""Model configurations: what a model is, whatever computes it."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from glm_jax import configs
from glm_jax.configs import INT32, POSITIVE, at_least, at_most, one_of, within
from glm_jax.models.positions import PHASE_DTYPES

# A configuration comes with a checkpoint, too: layers are listed, heads have tables of
# phases, and sizes are int32, before anything is compared with the arrays that are there.
_Layers = Annotated[int, POSITIVE, at_most(10_000)]
_WIDTH = at_most(2**20)
_Width = Annotated[int, POSITIVE, _WIDTH]
_Size = Annotated[int, POSITIVE, INT32]
# 0.1 is the rate of THUDM/GLM's arguments.py.
_DROPOUT = within('[0, 1)').but('use 0.1 as the original, or 0 for none')


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLMConfig:
  """GLM (Du et al., ACL 2022; THUDM/GLM model/modeling_glm.py).

  Attributes:
    num_layers: layers, L.
    hidden_size: width of the model, D.
    num_heads: heads of attention, N; the head size H is D / N.
    mlp_size: width of the MLP, F; 0 means 4 D.
    vocab_size: V, rows of the embedding table: at least the vocabulary's pieces,
      usually rounded up to a multiple of 128.
    max_positions: largest position; both position tables have one row more.
    activation: 'gelu' (tanh), with which every released GLM was trained, or 'gelu_erf',
      which the Hugging Face code of glm-10b and its siblings computes instead.
    embedding_dropout: on the sum of the three embeddings.
    attention_dropout: on attention probabilities.
    output_dropout: on what attention and MLP add to the residual stream.
    init_std: of every weight matrix; `out` and `down` have it over sqrt(2 L).
  """

  num_layers: _Layers
  hidden_size: _Width
  num_heads: _Width
  mlp_size: Annotated[int, at_least(0).but('use 0 for 4 x hidden_size'), INT32] = 0
  vocab_size: _Size
  max_positions: _Size
  activation: Annotated[str, one_of('gelu', 'gelu_erf')] = 'gelu'
  embedding_dropout: Annotated[float, _DROPOUT] = 0.1
  attention_dropout: Annotated[float, _DROPOUT] = 0.1
  output_dropout: Annotated[float, _DROPOUT] = 0.1
  init_std: Annotated[float, POSITIVE] = 0.02

  def __post_init__(self):
    configs.check_fields(self)
    _check_divides(self, 'hidden_size', 'num_heads')

  causal = False
  two_positions = True
  gated = False

  @property
  def head_size(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def num_kv_heads(self) -> int:
    return self.num_heads

  @property
  def inner_size(self) -> int:
    return self.mlp_size or 4 * self.hidden_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatGLMConfig:
  """ChatGLM-6B and GLM-130B; see `glm_jax.models.chatglm`.

  Attributes:
    num_layers: layers, L.
    hidden_size: width of the model, D.
    num_heads: heads of attention, N; the head size H is D / N.
    mlp_size: width of the MLP, F.
    vocab_size: V, rows of the embedding table.
    max_positions: longest row that the model was trained on; no table depends on it.
    gated: the MLP is GEGLU (GLM-130B) instead of GELU.
    two_positions: the first half of a head is rotated by the first position, the second
      half by the block position (ChatGLM-6B); else all of it by the first (GLM-130B).
      Without block positions, text after [gMASK] goes on counting; a span of [MASK]
      keeps the position of its mask.
    deepnorm_layers: alpha is sqrt(2 x this). ChatGLM-6B's code has 28 whatever its depth;
      GLM-130B has its depth.
    tied_head: the head is the embedding table.
    norm_epsilon: of layer normalisation.
    rope_theta: base of the rotary frequencies.
    rope_frequency_dtype: the released code of ChatGLM-6B rounds frequencies to float16
      when it is loaded, whatever it computes in afterwards.
    rope_phase_dtype: of the angles, see `glm_jax.models.positions`.
    embedding_gradient: share of the embeddings' gradient that is kept; 0.1 in GLM-130B.
    embedding_dropout: on the embeddings.
    attention_dropout: on attention probabilities.
    output_dropout: on what attention and MLP add.
    init_std: of the embedding table; the other weights have DeepNorm's initialisation.
  """

  num_layers: _Layers
  hidden_size: _Width
  num_heads: _Width
  mlp_size: _Size
  vocab_size: _Size
  max_positions: _Size
  gated: bool = False
  two_positions: bool = True
  deepnorm_layers: _Size
  tied_head: bool = True
  norm_epsilon: Annotated[float, POSITIVE] = 1e-5
  rope_theta: Annotated[float, POSITIVE] = 10000.0
  rope_frequency_dtype: Annotated[str, one_of(*PHASE_DTYPES)] = 'float16'
  rope_phase_dtype: Annotated[str, one_of(*PHASE_DTYPES)] = 'float32'
  embedding_gradient: Annotated[
    float, within('(0, 1]').but('use 1 for all of the gradient, 0.1 as GLM-130B')
  ] = 1.0
  embedding_dropout: Annotated[float, _DROPOUT] = 0.0
  attention_dropout: Annotated[float, _DROPOUT] = 0.0
  output_dropout: Annotated[float, _DROPOUT] = 0.0
  init_std: Annotated[float, POSITIVE] = 0.02

  def __post_init__(self):
    configs.check_fields(self)
    _check_divides(self, 'hidden_size', 'num_heads')
    # Pairs of dimensions are rotated, in each half of a head if there are two positions.
    parts = 4 if self.two_positions else 2
    configs.check(
      self.head_size % parts == 0,
      f'ChatGLMConfig head size must be divisible by {parts} to be rotated',
      f'hidden_size={self.hidden_size}, num_heads={self.num_heads}',
      'choose another number of heads',
    )

  causal = False

  @property
  def head_size(self) -> int:
    return self.hidden_size // self.num_heads

  @property
  def num_kv_heads(self) -> int:
    return self.num_heads

  @property
  def inner_size(self) -> int:
    return self.mlp_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatGLM2Config:
  """ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B, GLM-4-0414; see `glm_jax.models.chatglm2`.

  Attributes:
    num_layers: layers, L.
    hidden_size: width of the model, D.
    num_heads: heads of attention, N.
    num_kv_heads: key heads, K, which divides N; query head n uses key head n // (N / K).
    head_size: width of a head, H.
    mlp_size: width of the MLP, F.
    vocab_size: V, rows of the embedding table.
    max_positions: longest row that the model was trained on; no table depends on it.
    norm_epsilon: of RMS normalisation: 1e-5, for GLM-4-9B 1.5625e-07.
    qkv_bias: whether q, k and v have biases.
    sandwich_norms: what attention and MLP add is normalised, too: GLM-4-0414 and Z1.
    tied_head: the head is the embedding table.
    rotated_size: leading dimensions of a head that are rotated; 0 for half of it.
    rope_theta: base of the rotary frequencies.
    rope_ratio: 50 in ChatGLM3-6B-32k, 500 in GLM-4-9B; it stands in a released
      checkpoint's config.json.
    rope_scaling: what the ratio does: multiply theta ('theta'), or divide positions
      ('positions', ChatGLM2-6B-32k).
    rope_phase_dtype: of the angles, see `glm_jax.models.positions`.
    init_std: of every weight matrix; `out` and `down` have it over sqrt(2 L).
  """

  num_layers: _Layers
  hidden_size: _Width
  num_heads: _Width
  num_kv_heads: _Width
  head_size: _Width
  mlp_size: _Size
  vocab_size: _Size
  max_positions: _Size
  norm_epsilon: Annotated[float, POSITIVE] = 1e-5
  qkv_bias: bool = True
  sandwich_norms: bool = False
  tied_head: bool = False
  rotated_size: Annotated[int, at_least(0), _WIDTH] = 0
  rope_theta: Annotated[float, POSITIVE] = 10000.0
  rope_ratio: Annotated[float, POSITIVE] = 1.0
  rope_scaling: Annotated[str, one_of('theta', 'positions')] = 'theta'
  rope_phase_dtype: Annotated[str, one_of(*PHASE_DTYPES)] = 'float32'
  init_std: Annotated[float, POSITIVE] = 0.02

  def __post_init__(self):
    configs.check_fields(self)
    _check_divides(self, 'num_heads', 'num_kv_heads')
    # The default is resolved once, so that configurations with 0 and with the number itself
    # are equal, in a checkpoint and out of it.
    if not self.rotated_size:
      object.__setattr__(self, 'rotated_size', self.head_size // 2)
    configs.check(
      self.rotated_size % 2 == 0 and 0 < self.rotated_size <= self.head_size,
      'ChatGLM2Config.rotated_size must be even and at most head_size',
      f'rotated_size={self.rotated_size}, head_size={self.head_size}',
      'use 0 for half of the head',
    )

  causal = True
  two_positions = False
  gated = True

  @property
  def inner_size(self) -> int:
    return self.mlp_size


ONCE_FIELDS = ('dtype', 'remat', 'attention', 'unroll')
"""Fields that model configurations once had; those of `ComputeConfig` today."""

# Fields of later versions, as models of before have them. They are written where they
# differ alone: a run of before stays the same run, and its checkpoints readable.
_LATER_FIELDS = {'sandwich_norms': False}


def to_dict(config: Any) -> dict[str, Any]:
  """A configuration as JSON, with its family, for a checkpoint to carry."""
  from glm_jax.models import FAMILIES

  family = next(name for name, kind in FAMILIES.items() if kind is type(config))
  fields = dataclasses.asdict(config).items()
  return {'family': family, **{k: v for k, v in fields if _LATER_FIELDS.get(k, ()) != v}}


def from_dict(fields: dict[str, Any]) -> Any:
  """The inverse of `to_dict`; raises UserError for an unknown family or field."""
  from glm_jax.models import FAMILIES

  # Checkpoints of before there was `ComputeConfig` also say how they were computed.
  fields = {k: v for k, v in fields.items() if k not in ONCE_FIELDS}
  family = fields.pop('family', None)
  configs.check(
    family in FAMILIES,
    f'model family must be one of {tuple(FAMILIES)}',
    repr(family),
    'use the version that wrote the checkpoint',
  )
  known = {field.name for field in dataclasses.fields(FAMILIES[family])}
  unknown = sorted(set(fields) - known)
  configs.check(
    not unknown,
    f'{FAMILIES[family].__name__} has the fields {sorted(known)}',
    str(unknown),
    'use the version that wrote the checkpoint',
  )
  return FAMILIES[family](**fields)


def _check_divides(config: Any, whole: str, part: str) -> None:
  values = {name: getattr(config, name) for name in (whole, part)}
  configs.check(
    values[whole] % values[part] == 0,
    f'{type(config).__name__}.{whole} must be divisible by {part}',
    ', '.join(f'{name}={value}' for name, value in values.items()),
    'choose a number that divides it',
  )
