"""Which format a foreign checkpoint is of, and what model it holds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.interop import integers, rotary
from glm_jax.interop.files import Source, TensorSpec
from glm_jax.interop.formats import FORMATS, HEADS, WITH_INTEGERS, WORDS
from glm_jax.models import ChatGLM2Config, ChatGLMConfig, GLMConfig, quantized

# ChatGLM-6B's code has this depth in its scale, whatever the depth (modeling_chatglm.py,
# a default argument that is never given).
CHATGLM_DEEPNORM_LAYERS = 28
# Head sizes of every released model whose checkpoint does not say its number of heads.
_HEAD_SIZES = {'megatron': 64, 'glm-130b': 128}
# Formats whose tensors say everything else.
_SAYS_ALL = ('megatron', 'glm-130b', 'glm-10b')
# Names that a model has inside another program's module, which was saved in its place.
_WRAPPERS = {
  'module.': 'a model inside DistributedDataParallel or DeepSpeed: save model.module, or '
  "take 'module.' off every name",
  '_orig_mod.': "a model inside torch.compile: take '_orig_mod.' off every name",
  'base_model.model.': 'a model with adapters of PEFT: merge them first '
  '(merge_and_unload, save_pretrained)',
}


@dataclasses.dataclass(frozen=True)
class Recognised:
  """What a foreign checkpoint is.

  Attributes:
    format: a key of `FORMATS`.
    config: its model.
    prefix: before every tensor's name ('glm.' or nothing).
    repeats_head: the head is stored although it is the embedding table.
    buffers: names of tensors that are computed, not learned.
    assumed: what the files do not say, a line each, with the flag that says otherwise.
    bits: of the integers that weights of layers are; 0 for plain weights.
  """

  format: str
  config: Any
  prefix: str
  repeats_head: bool
  buffers: tuple[str, ...]
  assumed: tuple[str, ...]
  bits: int


def recognise(source: Source, overrides: Mapping[str, Any]) -> Recognised:
  """Tells the format from the names, and the model from config.json and the shapes.

  Args:
    source: a foreign checkpoint.
    overrides: config fields that win over what the files say.

  Raises:
    UserError: an unknown format, or a model that this package does not compute.
  """
  # The names of the tensors tell the format; where two programs use the same names, the
  # container does. THUDM's classes for tasks hold the plain model as an attribute `glm`.
  names = list(source.parts[0].specs)
  prefix = 'glm.' if names and all(name.startswith('glm.') for name in names) else ''
  specs = {k.removeprefix(prefix): v for k, v in source.parts[0].specs.items()}
  # Rotary frequencies: stored by the released code, but computed here.
  buffers = tuple(name for name in specs if name.endswith('inv_freq'))

  def holds(start: str) -> bool:
    return any(name.startswith(start) for name in specs)

  # The order matters: GLM has 'transformer.layers.', too, and is told from ChatGLM-6B by
  # its tables of learned positions.
  if holds('transformer.encoder.layers.'):
    kind = 'chatglm2'
  elif holds('model.layers.'):
    kind = 'glm4' if 'model.layers.0.post_mlp_layernorm.weight' in specs else 'glm'
  elif holds('transformer.position_embeddings.'):
    kind = 'megatron' if source.container == 'megatron' else 'glm-10b'
  elif holds('transformer.layers.'):
    kind = 'glm-130b' if source.container == 'megatron' else 'chatglm'
  else:
    remedy = 'give a checkpoint of the GLM family'
    for start, hint in _WRAPPERS.items():
      if names and all(name.startswith(start) for name in names):
        remedy = f'these are of {hint}'
    if names and all('prefix_encoder.' in name for name in names):
      remedy = 'this is the prefix of P-tuning alone: give the model that it was tuned on'
    raise UserError(
      f'the tensors must be named as one of {tuple(FORMATS)} names them, got '
      f'{names[:5]}; {remedy}.'
    )
  configs.check(
    bool(source.config) or kind in _SAYS_ALL,
    f"a checkpoint of format '{kind}' must have a config.json, which says its "
    'num_attention_heads and more',
    f'{source.folder} without one',
    'fetch it, too',
  )
  bits = _bits(kind, source, specs)
  # A head is tied if the config says so, or if the files hold the embedding table twice; a
  # head of other values wins over what the config says.
  head_file = HEADS.get(kind)
  tied, repeats = False, False
  if head_file:
    stored = head_file in specs
    # ChatGLM-6B and GLM-130B tie without saying so.
    ties = source.config.get('tie_word_embeddings')
    ties = kind in ('chatglm', 'glm-130b') if ties is None else ties is True
    repeats = stored and ties and _equal(source, prefix, WORDS[kind], head_file)
    tied = repeats or (ties and not stored)
  reader = {'megatron': _read_glm, 'glm-10b': _read_glm, 'glm-130b': _read_chatglm}
  reader |= {'chatglm': _read_chatglm, 'chatglm2': _read_chatglm2}
  reader |= {'glm': _read_hf_glm, 'glm4': _read_hf_glm}
  config = reader[kind](kind, source, specs, tied, dict(overrides))
  assumed = _assumed(config, source, overrides)
  return Recognised(kind, config, prefix, repeats, buffers, assumed, bits)


def _bits(kind: str, source: Source, specs: Mapping[str, TensorSpec]) -> int:
  """Of the integers that the weights of layers are, all of them or none."""
  of_integers = [k for k, v in specs.items() if v.dtype in quantized.DTYPES.values()]
  bits = source.config.get(integers.FIELD) or 0
  configs.check(
    not of_integers or kind in WITH_INTEGERS,
    f'integers are read of the formats {WITH_INTEGERS}',
    f'{of_integers[:1]} of the format {kind!r} in {source.folder}',
    'give the checkpoint before it was quantised',
  )
  configs.check(
    not bits or bool(of_integers),
    f'{integers.FIELD} in {source.folder / "config.json"} must be 0 for plain weights',
    repr(bits),
    'write 0, or fetch the weights that it is of',
  )
  # Of the same bits: `integers.unpacked` has read them by this field.
  return bits if of_integers else 0


def _assumed(config: Any, source: Source, overrides: Mapping[str, Any]) -> tuple[str, ...]:
  # Every line names the flag that overrules it: guesses are made, but never in silence.
  lines = []
  if not source.config and 'num_heads' not in overrides:
    lines.append(
      f'no config.json: {config.num_heads} heads of {config.head_size} (--set num_heads=N)'
    )
  # Two programs use the field `rope_ratio` for different formulas.
  ratio, scaling = getattr(config, 'rope_ratio', 1), getattr(config, 'rope_scaling', '')
  if ratio != 1 and 'rope_scaling' not in overrides:
    does = 'multiplies the rotary base' if scaling == 'theta' else 'divides positions'
    other = 'positions' if scaling == 'theta' else 'theta'
    lines.append(f'rope_ratio {ratio:g} {does} (--set rope_scaling={other})')
  return tuple(lines)


def _equal(source: Source, prefix: str, a: str, b: str) -> bool:
  """Whether two tensors are the same, bit for bit, in every part."""
  return all(
    # Shapes and dtypes first: tensors of different ones need not be read. The defaults
    # differ, so that a tensor that is missing equals nothing.
    part.specs.get(prefix + a, (0,))[:2] == part.specs.get(prefix + b, (1,))[:2]
    # As bytes: a NaN equals itself there, and -0.0 does not equal 0.0.
    and np.array_equal(
      part.read(prefix + a).view(np.uint8), part.read(prefix + b).view(np.uint8)
    )
    for part in source.parts
  )


class _Fields:
  """config.json of a source: its fields, checked for type and for what we compute."""

  def __init__(self, source: Source):
    self._raw, self._where = source.config, source.folder / 'config.json'

  def __bool__(self) -> bool:
    return bool(self._raw)

  def get(self, *names: str, kind: type = int, default: Any = None) -> Any:
    """The first of the fields that is there, as a number of a kind.

    Raises:
      UserError: it is missing without a default, or of another kind.
    """
    for name in names:
      value = self._raw.get(name)
      if value is None:
        continue
      # A bool is an int to Python: `true` for a number is refused, as is 1 for a flag.
      right = isinstance(value, bool) == (kind is bool)
      right = right and isinstance(value, (int, float) if kind is float else kind)
      # Neither infinity nor NaN, which are no JSON, nor an integer beyond both.
      if not right or not abs(value) < 1e300:
        raise UserError(
          f'{name} in {self._where} must be {kind.__name__}, got {value!r}; write '
          'the value that the model was trained with.'
        )
      return kind(value)
    if default is None:
      raise UserError(
        f'{self._where} must have {" or ".join(names)}, got {sorted(self._raw)[:8]}; fetch '
        'the config.json of this checkpoint.'
      )
    return default

  def expect(self, **required: Any) -> None:
    """Raises UserError for a field with a value that our models do not compute."""
    for name, value in required.items():
      # A field that is missing or null has the default of the released code.
      if name in self._raw and self._raw[name] not in (value, None):
        raise UserError(
          f'{name} in {self._where} must be {value!r} for the tensors of this checkpoint '
          f'to be computed here, got {self._raw[name]!r}; such a model is not supported.'
        )


def _build(kind: type, values: dict[str, Any], overrides: dict[str, Any]) -> Any:
  known = {field.name for field in dataclasses.fields(kind)}
  unknown = sorted(set(overrides) - known)
  configs.check(
    not unknown,
    f'--set must name fields of {kind.__name__}',
    str(unknown),
    f'they are {sorted(known)}',
  )
  # The dataclass checks the values and their relations.
  return kind(**{**values, **overrides})


def _shape(specs: Mapping[str, TensorSpec], name: str) -> tuple[int, ...]:
  if name not in specs:
    raise UserError(
      f'the checkpoint must hold {name!r}, got {len(specs)} other tensors; fetch the '
      'missing shard.'
    )
  shape = specs[name].shape
  configs.check(
    len(shape) == 2, f'{name!r} must have two dimensions', str(shape), 'fetch it again'
  )
  return shape


def _layers(specs: Mapping[str, TensorSpec], start: str) -> int:
  # 'transformer.layers.' has two dots: the number is the third part of each name.
  numbers = {name.split('.')[start.count('.')] for name in specs if name.startswith(start)}
  # Of any others, the tensors are listed that no model of this family has.
  return 1 + max((int(n) for n in numbers if re.fullmatch('[0-9]{1,4}', n)), default=0)


def _heads(kind: str, D: int, fields: _Fields, overrides: Mapping[str, Any]) -> int:
  # In the order of trust: the user, config.json, the head size of the released models.
  if 'num_heads' in overrides:
    return overrides['num_heads']
  if fields:
    return fields.get('num_attention_heads')
  size = _HEAD_SIZES.get(kind, 64)
  configs.check(
    D % size == 0,
    f'without a config.json, heads are taken to be of {size}, which must divide the width',
    str(D),
    'give --set num_heads=N',
  )
  return D // size


# Sizes that a config.json leaves out are those of the tensors; where it has them, the
# tensors are held against them afterwards, so that a disagreement is named.


def _read_glm(kind, source, specs, tied, overrides) -> GLMConfig:
  fields, parts = _Fields(source), len(source.parts)
  fields.expect(block_position_encoding=True, relative_encoding=False)
  V, D = _shape(specs, 'word_embeddings.weight')
  up = 'transformer.layers.0.mlp.dense_h_to_4h.weight'
  rows = _shape(specs, 'transformer.position_embeddings.weight')[0]
  values = {
    'num_layers': _layers(specs, 'transformer.layers.'),
    'hidden_size': D,
    'num_heads': _heads(kind, D, fields, overrides),
    # Weights are [out, in], and parts hold a share of the rows.
    'mlp_size': parts * _shape(specs, up)[0],
    'vocab_size': parts * V,
    # GLM's tables have one row more than the positions of a text.
    'max_positions': rows - 1,
  }
  for name in ('num_layers', 'hidden_size', 'vocab_size'):
    values[name] = fields.get(name, default=values[name])
  # 0 means four times the width: the config is then equal to one that leaves it out.
  if values['mlp_size'] == 4 * D:
    values['mlp_size'] = 0
  return _build(GLMConfig, values, overrides)


def _read_chatglm(kind, source, specs, tied, overrides) -> ChatGLMConfig:
  fields, parts = _Fields(source), len(source.parts)
  fields.expect(pre_seq_len=None, prefix_projection=False)
  V, D = _shape(specs, 'transformer.word_embeddings.weight')
  at = 'transformer.layers.0.mlp'
  inner = _shape(specs, f'{at}.dense_4h_to_h.weight')[1]
  # GEGLU fuses two weights into one of twice as many rows; GPT's MLP has one.
  # Gated means GLM-130B, whose positions are of one axis; otherwise ChatGLM-6B.
  gated = _shape(specs, f'{at}.dense_h_to_4h.weight')[0] == 2 * inner
  L = _layers(specs, 'transformer.layers.')
  values = {
    'num_layers': L,
    'hidden_size': D,
    'num_heads': _heads(kind, D, fields, overrides),
    'mlp_size': parts * inner,
    'vocab_size': parts * V,
    'max_positions': 2048,
    'gated': gated,
    'two_positions': not gated,
    'deepnorm_layers': L if gated else CHATGLM_DEEPNORM_LAYERS,
    'tied_head': tied,
    # ChatGLM-6B computes its frequencies in half precision, and was trained so.
    'rope_frequency_dtype': 'float32' if gated else 'float16',
  }
  for field, name in (
    ('num_layers', 'num_layers'),
    ('hidden_size', 'hidden_size'),
    ('mlp_size', 'inner_hidden_size'),
    ('vocab_size', 'vocab_size'),
    ('max_positions', 'max_sequence_length'),
  ):
    values[field] = fields.get(name, default=values[field])
  values['norm_epsilon'] = fields.get('layernorm_epsilon', kind=float, default=1e-5)
  values['two_positions'] = fields.get('position_encoding_2d', kind=bool, default=not gated)
  return _build(ChatGLMConfig, values, overrides)


def _read_chatglm2(kind, source, specs, tied, overrides) -> ChatGLM2Config:
  fields = _Fields(source)
  fields.expect(
    add_bias_linear=False,
    apply_residual_connection_post_layernorm=False,
    attention_softmax_in_fp32=True,
    fp32_residual_connection=False,
    original_rope=True,
    post_layer_norm=True,
    pre_seq_len=None,
    rmsnorm=True,
  )
  V, D = _shape(specs, WORDS[kind])
  at = 'transformer.encoder.layers.0'
  N = fields.get('num_attention_heads')
  remedy = 'write the value that the model was trained with'
  configs.check(N >= 1, 'num_attention_heads must be positive', str(N), remedy)
  grouped = fields.get('multi_query_attention', kind=bool, default=False)
  bias = f'{at}.self_attention.query_key_value.bias' in specs
  ratio = fields.get('rope_ratio', kind=float, default=1.0)
  values = {
    'num_layers': fields.get(
      'num_layers',
      'num_hidden_layers',
      default=_layers(specs, 'transformer.encoder.layers.'),
    ),
    'hidden_size': fields.get('hidden_size', default=D),
    'num_heads': N,
    'num_kv_heads': fields.get('multi_query_group_num') if grouped else N,
    'head_size': fields.get('kv_channels', default=D // N),
    'mlp_size': fields.get(
      'ffn_hidden_size', default=_shape(specs, f'{at}.mlp.dense_4h_to_h.weight')[1]
    ),
    'vocab_size': fields.get('padded_vocab_size', 'vocab_size', default=V),
    'max_positions': fields.get('seq_length', default=32768),
    'norm_epsilon': fields.get('layernorm_epsilon', kind=float, default=1e-5),
    'qkv_bias': fields.get('add_qkv_bias', kind=bool, default=bias),
    'tied_head': tied,
    'rope_ratio': ratio,
  }
  # With a ratio of 1 both scalings are the same: equal models get equal configs.
  if overrides.get('rope_ratio', ratio) != 1 and 'rope_scaling' not in overrides:
    values['rope_scaling'] = rotary.scaling(source)
  return _build(ChatGLM2Config, values, overrides)


def _read_hf_glm(kind, source, specs, tied, overrides) -> ChatGLM2Config:
  fields = _Fields(source)
  fields.expect(model_type=kind, hidden_act='silu', attention_dropout=0.0)
  # transformers 5 nests the rotary fields; before, `rope_scaling` held some of them.
  rope = source.config.get('rope_parameters') or source.config.get('rope_scaling') or {}
  configs.check(
    isinstance(rope, dict),
    f'the rotary parameters in {source.folder / "config.json"} must be an object',
    repr(rope),
    'fetch it again',
  )
  # What is not nested is looked up at the top level.
  rope = _Fields(source._replace(config={**source.config, **rope}))
  known = 'linear' if 'factor' in rope._raw else 'default'
  # `type` is the name of older versions.
  rope.expect(rope_type=known, type=known)
  V, D = _shape(specs, WORDS[kind])
  at = 'model.layers.0'
  # Defaults of GlmConfig: transformers does not write a field that has its default.
  H = fields.get('head_dim', default=128)
  share = rope.get('partial_rotary_factor', kind=float, default=0.5)
  values = {
    'num_layers': fields.get('num_hidden_layers', default=_layers(specs, 'model.layers.')),
    'hidden_size': fields.get('hidden_size', default=D),
    'num_heads': fields.get('num_attention_heads', default=32),
    'num_kv_heads': fields.get('num_key_value_heads', default=2),
    'head_size': H,
    'mlp_size': fields.get(
      'intermediate_size', default=_shape(specs, f'{at}.mlp.down_proj.weight')[1]
    ),
    'vocab_size': fields.get('vocab_size', default=V),
    'max_positions': fields.get('max_position_embeddings', default=131072),
    'norm_epsilon': fields.get('rms_norm_eps', kind=float, default=1.5625e-07),
    'qkv_bias': fields.get(
      'attention_bias', kind=bool, default=f'{at}.self_attn.q_proj.bias' in specs
    ),
    'sandwich_norms': kind == 'glm4',
    'tied_head': tied,
    'rotated_size': int(H * share),
    'rope_theta': rope.get('rope_theta', kind=float, default=10000.0),
  }
  if 'factor' in rope._raw:
    values |= {'rope_ratio': rope.get('factor', kind=float), 'rope_scaling': 'positions'}
  return _build(ChatGLM2Config, values, overrides)
