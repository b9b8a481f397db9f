"""What stands beside the weights of an export: config.json, and how to generate.

A model of the formats `glm` and `glm4` is complete for transformers and vLLM and needs no
code of its own; `tokenizer_files` writes its tokenizer. The other formats are complete
once the .py files of the released model are beside them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glm_jax import configs
from glm_jax.interop import integers, reward_models, rotary, tokenizer_files
from glm_jax.interop.recognise import CHATGLM_DEEPNORM_LAYERS
from glm_jax.models import ChatGLM2Config, ChatGLMConfig, GLMConfig
from glm_jax.text.fast import fast_tokenizer
from glm_jax.text.vocabulary import Vocabulary

# Formats that transformers reads itself.
NATIVE = ('glm', 'glm4')
# Formats that transformers reads with code of their own, which is not ours to ship.
OWN_CODE = ('glm-10b', 'chatglm', 'chatglm2')

_IDS = ('eos_token_id', 'pad_token_id')
# ChatGLM-6B's code finds the context and the mask in a row by these, besides.
_CHATGLM_IDS = ('bos_token_id', 'mask_token_id', 'gmask_token_id')


def check(
  format: str, config: Any, source: Mapping[str, Any], vocabulary: Vocabulary | None
) -> None:
  """Raises UserError for what a format cannot say, before anything is written."""
  # The writer of the format raises for a model that its config.json cannot describe.
  content = config_json(format, config, _raw(format, source))
  # Its code finds the context by these ids, and has those of one release as defaults.
  missing = [name for name in _CHATGLM_IDS if content.get(name) is None]
  configs.check(
    format != 'chatglm' or vocabulary is not None or not missing,
    "a config.json of the format 'chatglm' says the ids of control pieces",
    f'a model without a vocabulary, and no {missing}',
    'give --vocabulary=ice:PATH, or ice-130b:PATH for a table with images',
  )
  if format in NATIVE and vocabulary is not None:
    configs.check(
      fast_tokenizer(vocabulary) is not None or 'tokenizer.json' in vocabulary.files(),
      f'the format {format!r} holds vocabularies of sentencepiece or GLM-4',
      vocabulary.kind,
      'use another format',
    )


def write_config(
  folder: Path,
  format: str,
  config: Any,
  source: Mapping[str, Any],
  dtype: str,
  vocabulary: Vocabulary | None,
  bits: int = 0,
  scores: bool = False,
) -> None:
  """Writes everything but the weights.

  Args:
    folder: of the export.
    format: a key of `glm_jax.interop.formats.FORMATS`.
    config: of the model.
    source: what the model was imported from: 'format' and 'config', its config.json.
    dtype: of the weights.
    vocabulary: None writes no tokenizer.
    bits: of integers that the weights of layers are; 0 for plain weights.
    scores: of a reward model, in a format of `reward_models.FORMATS_WITH_SCORES`.
  """
  raw = _raw(format, source)
  content = config_json(format, config, raw)
  if vocabulary is not None:
    ids = _token_ids(format, vocabulary, raw)
    template = source.get('chat_template')
    tokenizer_files.write(
      folder, vocabulary, config if format in NATIVE else None, template, scores
    )
    if format == 'glm-10b':
      tokenizer_files.write_added(folder, vocabulary)
  else:
    # Ids of the same table, whatever the format that they were written in.
    ids = {name: source.get('config', {}).get(name) for name in _IDS}
  if scores:
    content |= _scoring(content)
    # Without a vocabulary there is none, and a row of its own is read to its end.
    ids['pad_token_id'] = None if vocabulary is None else reward_models.padding(vocabulary)
  elif format in NATIVE:
    # Written even if they are null: the defaults of transformers are ids of GLM-4, which a
    # smaller table does not have.
    tokenizer_files.write_json(
      folder / 'generation_config.json', {'do_sample': False, **ids}
    )
  else:
    ids = {name: token for name, token in ids.items() if token is not None}
  content = {**content, **integers.fields(raw, bits), **ids, 'torch_dtype': dtype}
  tokenizer_files.write_json(folder / 'config.json', content)


def _scoring(content: Mapping[str, Any]) -> dict[str, Any]:
  """What config.json says of a reward model: its class, and one number for a row."""
  [name] = content['architectures']
  return {
    'architectures': [name.replace('ForCausalLM', 'ForSequenceClassification')],
    'id2label': {'0': 'score'},
    'label2id': {'score': 0},
  }


def _raw(format: str, source: Mapping[str, Any]) -> Mapping[str, Any]:
  """config.json of the source; another format's fields would mean something else here."""
  return source.get('config', {}) if source.get('format') == format else {}


def _token_ids(
  format: str, vocabulary: Vocabulary, raw: Mapping[str, Any]
) -> dict[str, Any]:
  """What config.json says of control pieces: as the vocabulary counts them."""
  specials, stops = vocabulary.specials, list(vocabulary.stops)
  # GlmConfig and GLM-4's code take several ids that end an answer; the others take one.
  ids = {
    'eos_token_id': stops if format in NATIVE or vocabulary.kind == 'glm4' else stops[0],
    'pad_token_id': specials.pad,
  }
  # Whoever added ends of an answer to the original meant them.
  kept = raw.get('eos_token_id')
  if isinstance(kept, list) and stops[0] in kept:
    ids['eos_token_id'] = kept
  if format == 'chatglm':
    ours = (specials.sop, specials.mask, specials.gmask)
    ids |= dict(zip(_CHATGLM_IDS, ours, strict=True))
  return ids


def config_json(format: str, config: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
  """config.json of an export.

  Args:
    format: a key of `FORMATS`.
    config: the model.
    raw: config.json of the checkpoint that the model came from, where that was of the
      same format; fields that are nothing of ours are kept.

  Raises:
    UserError: the format has no way to say what the model computes.
  """
  fields, defaults = _WRITERS[format](config)
  # `dtype` is a newer name of torch_dtype, which the caller writes.
  kept = {k: v for k, v in raw.items() if k != 'dtype'}
  # Later ones win: what we compute must be what the file says.
  return {**defaults, **kept, **fields}


# A writer returns two dictionaries: fields that say what the model computes, and defaults
# for those that the code of the format reads besides, which the original may override.


def _write_glm(c: GLMConfig) -> tuple[dict, dict]:
  # The published code has the other GeLU, with which no released model was trained.
  _check_code('glm-10b', c, 'use --to=megatron', activation='gelu')
  return {
    'hidden_size': c.hidden_size,
    'max_sequence_length': c.max_positions,
    'num_attention_heads': c.num_heads,
    'num_layers': c.num_layers,
    'vocab_size': c.vocab_size,
  }, {
    'architectures': ['GLMModel'],
    'attention_dropout_prob': c.attention_dropout,
    'attention_scale': 1.0,
    'auto_map': {
      'AutoConfig': 'configuration_glm.GLMConfig',
      'AutoModel': 'modeling_glm.GLMModel',
      'AutoModelForMultipleChoice': 'modeling_glm.GLMForMultipleChoice',
      'AutoModelForSeq2SeqLM': 'modeling_glm.GLMForConditionalGeneration',
    },
    'block_position_encoding': True,
    'embedding_dropout_prob': c.embedding_dropout,
    'initializer_range': c.init_std,
    'model_type': 'glm',
    'output_dropout_prob': c.output_dropout,
    'output_predict': True,
    'relative_encoding': False,
  }


def _write_chatglm(c: ChatGLMConfig) -> tuple[dict, dict]:
  _check_code(
    'chatglm',
    c,
    'use --to=glm-130b, which keeps the weights alone',
    two_positions=True,
    gated=False,
    deepnorm_layers=CHATGLM_DEEPNORM_LAYERS,
    rope_theta=10000,
    rope_frequency_dtype='float16',
  )
  return {
    'hidden_size': c.hidden_size,
    'inner_hidden_size': c.mlp_size,
    'layernorm_epsilon': c.norm_epsilon,
    'max_sequence_length': c.max_positions,
    'num_attention_heads': c.num_heads,
    'num_layers': c.num_layers,
    'position_encoding_2d': c.two_positions,
    'vocab_size': c.vocab_size,
  }, {
    'architectures': ['ChatGLMModel'],
    'auto_map': {
      'AutoConfig': 'configuration_chatglm.ChatGLMConfig',
      'AutoModel': 'modeling_chatglm.ChatGLMForConditionalGeneration',
    },
    'model_type': 'chatglm',
    'tie_word_embeddings': c.tied_head,
    'use_cache': True,
  }


def _write_chatglm2(c: ChatGLM2Config) -> tuple[dict, dict]:
  _check_code('chatglm2', c, 'use --to=glm4', sandwich_norms=False)
  configs.check(
    2 * c.rotated_size == c.head_size,
    "the format 'chatglm2' holds models that rotate half of each head",
    f'{c.rotated_size} of {c.head_size}',
    'use --to=glm',
  )
  # The released code has no field for the base: 10000 times the ratio is the base it uses.
  ratio = c.rope_ratio
  if c.rope_scaling == 'theta':
    ratio *= c.rope_theta / 10000
  else:  # the ratio divides positions
    _check_code('chatglm2', c, 'use --to=glm', rope_theta=10000)
  return {
    'add_qkv_bias': c.qkv_bias,
    'ffn_hidden_size': c.mlp_size,
    'hidden_size': c.hidden_size,
    'kv_channels': c.head_size,
    'layernorm_epsilon': c.norm_epsilon,
    'multi_query_attention': c.num_kv_heads != c.num_heads,
    'multi_query_group_num': c.num_kv_heads,
    'num_attention_heads': c.num_heads,
    'num_layers': c.num_layers,
    'padded_vocab_size': c.vocab_size,
    'seq_length': c.max_positions,
    'tie_word_embeddings': c.tied_head,
    **(_ratio(c, ratio) if ratio != 1 else {}),
  }, {
    'add_bias_linear': False,
    'apply_query_key_layer_scaling': True,
    'apply_residual_connection_post_layernorm': False,
    'architectures': ['ChatGLMModel'],
    'attention_dropout': 0.0,
    'attention_softmax_in_fp32': True,
    'auto_map': {
      'AutoConfig': 'configuration_chatglm.ChatGLMConfig',
      'AutoModel': 'modeling_chatglm.ChatGLMForConditionalGeneration',
      'AutoModelForCausalLM': 'modeling_chatglm.ChatGLMForConditionalGeneration',
    },
    'bias_dropout_fusion': True,
    'fp32_residual_connection': False,
    'hidden_dropout': 0.0,
    'model_type': 'chatglm',
    'original_rope': True,
    'post_layer_norm': True,
    'rmsnorm': True,
    'use_cache': True,
  }


def _ratio(c: ChatGLM2Config, ratio: float) -> dict[str, Any]:
  whole = int(ratio) if ratio == int(ratio) else ratio
  return {'rope_ratio': whole, rotary.KEY: c.rope_scaling}


def _check_code(format: str, config: Any, remedy: str, **fields: Any) -> None:
  """Raises UserError unless the model has what a format's code computes regardless."""
  for name, value in fields.items():
    configs.check(
      getattr(config, name) == value,
      f'the format {format!r} holds models of {name}={value!r}, which its code has',
      repr(getattr(config, name)),
      remedy,
    )


def _write_hf_glm(c: ChatGLM2Config, sandwich_norms: bool) -> tuple[dict, dict]:
  kind, other = ('glm4', 'glm') if sandwich_norms else ('glm', 'glm4')
  _check_code(kind, c, f'use --to={other}', sandwich_norms=sandwich_norms)
  # A scaled base is only another base; scaled positions are transformers' linear scaling.
  theta = c.rope_theta * (c.rope_ratio if c.rope_scaling == 'theta' else 1)
  share = c.rotated_size / c.head_size
  rope = {'rope_type': 'default', 'rope_theta': theta, 'partial_rotary_factor': share}
  if c.rope_scaling == 'positions':
    rope |= {'rope_type': 'linear', 'factor': c.rope_ratio}
  return {
    'architectures': ['Glm4ForCausalLM' if sandwich_norms else 'GlmForCausalLM'],
    'attention_bias': c.qkv_bias,
    'attention_dropout': 0.0,
    'head_dim': c.head_size,
    'hidden_act': 'silu',
    'hidden_size': c.hidden_size,
    'intermediate_size': c.mlp_size,
    'max_position_embeddings': c.max_positions,
    'model_type': kind,
    'num_attention_heads': c.num_heads,
    'num_hidden_layers': c.num_layers,
    'num_key_value_heads': c.num_kv_heads,
    # Again, at the top level: where transformers before 5 looks.
    'partial_rotary_factor': share,
    'rms_norm_eps': c.norm_epsilon,
    'rope_parameters': rope,
    'rope_theta': theta,
    'tie_word_embeddings': c.tied_head,
    'vocab_size': c.vocab_size,
    **({'rope_scaling': rope} if c.rope_scaling == 'positions' else {}),
  }, {'initializer_range': c.init_std, 'use_cache': True}


_WRITERS: dict[str, Callable[[Any], tuple[dict, dict]]] = {
  'glm-10b': _write_glm,
  'chatglm': _write_chatglm,
  'chatglm2': _write_chatglm2,
  'glm': functools.partial(_write_hf_glm, sandwich_norms=False),
  'glm4': functools.partial(_write_hf_glm, sandwich_norms=True),
}
