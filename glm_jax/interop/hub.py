"""What stands beside the weights of an export: config.json, generation, tokenizer.

A model of the format `glm` is complete for transformers and vLLM and needs no code of its
own: a fast tokenizer.json with the control pieces, a chat template, and the ids that end
an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glm_jax import configs
from glm_jax.interop import rotary
from glm_jax.interop.recognise import CHATGLM_DEEPNORM_LAYERS
from glm_jax.models import ChatGLM2Config, ChatGLMConfig, GLMConfig
from glm_jax.text.fast import fast_tokenizer
from glm_jax.text.loading import KIND_KEY
from glm_jax.text.vocabulary import Vocabulary

# The prompts that the chat models were trained on (PROMPT.md of ChatGLM3; the
# tokenization_chatglm.py of ChatGLM2, `build_prompt`).
CHAT_TEMPLATES = {
  'chatglm3': (
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{{ message.get('metadata', '') + '\\n ' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
  ),
  'chatglm2': (
    '[gMASK]<sop>{% set turn = namespace(n=0) %}{% for message in messages %}'
    "{% if message['role'] == 'user' %}{% set turn.n = turn.n + 1 %}"
    "{{ '[Round ' + turn.n|string + ']\\n\\n问：' + message['content'] + '\\n\\n答：' }}"
    "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
  ),
  'glm4': (
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{{ message.get('metadata', '') + '\\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
  ),
}

# Formats that transformers reads with code of their own, which is not ours to ship.
OWN_CODE = ('glm-10b', 'chatglm', 'chatglm2')


def check(format: str, config: Any, vocabulary: Vocabulary | None) -> None:
  """Raises UserError for what a format cannot say, before anything is written."""
  # The writer of the format raises for a model that its config.json cannot describe.
  config_json(format, config, {})
  if format == 'glm' and vocabulary is not None:
    configs.check(
      fast_tokenizer(vocabulary) is not None or 'tokenizer.json' in vocabulary.files(),
      "the format 'glm' holds vocabularies of sentencepiece or GLM-4",
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
) -> None:
  """Writes everything but the weights.

  Args:
    folder: of the export.
    format: a key of `glm_jax.interop.formats.FORMATS`.
    config: of the model.
    source: what the model was imported from: 'format' and 'config', its config.json.
    dtype: of the weights.
    vocabulary: None writes no tokenizer.
  """
  raw = source.get('config', {})
  # Written even if they are null: the defaults of transformers are ids of GLM-4, which a
  # smaller table does not have.
  ids = {name: raw.get(name) for name in ('eos_token_id', 'pad_token_id')}
  if vocabulary is not None:
    # GlmConfig takes several ids that end an answer; the released classes take one.
    stops = list(vocabulary.stops) if format == 'glm' else vocabulary.stops[0]
    ids = {'eos_token_id': stops, 'pad_token_id': vocabulary.specials.pad}
    write_vocabulary(folder, vocabulary)
  # Another format's fields would mean something else here.
  content = config_json(format, config, raw if source.get('format') == format else {})
  if format == 'glm':
    content |= ids
    _write_json(folder / 'generation_config.json', {'do_sample': False, **ids})
    if vocabulary is not None:
      _write_tokenizer(folder, vocabulary, config)
  else:
    content = {**{k: v for k, v in ids.items() if v is not None}, **content}
  _write_json(folder / 'config.json', {**content, 'torch_dtype': dtype})


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
  """Writes a vocabulary's files, and which one it is, for `glm_jax.text.loading.find`."""
  for name, data in vocabulary.files().items():
    (folder / name).write_bytes(data)
  _write_json(folder / 'tokenizer_config.json', {KIND_KEY: vocabulary.kind_in_files})


def _write_tokenizer(folder: Path, vocabulary: Vocabulary, config: Any) -> None:
  # None for GLM-4, whose own tokenizer.json `write_vocabulary` has written.
  fast = fast_tokenizer(vocabulary)
  if fast is not None:
    fast.save(str(folder / 'tokenizer.json'))
  names = vocabulary.names
  description = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'model_max_length': config.max_positions,
    # A batch of prompts continues at the right, so that padding goes to the left.
    'padding_side': 'left',
    # transformers needs some padding token; a sentencepiece model has <unk> as piece 0.
    'eos_token': names.get(vocabulary.stops[0]),
    'pad_token': names.get(vocabulary.specials.pad) or vocabulary.piece(0),
    'model_input_names': ['input_ids', 'attention_mask'],
    KIND_KEY: vocabulary.kind_in_files,
  }
  if vocabulary.kind in CHAT_TEMPLATES:
    description['chat_template'] = CHAT_TEMPLATES[vocabulary.kind]
  _write_json(folder / 'tokenizer_config.json', description)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
  text = json.dumps(content, indent=2, ensure_ascii=False) + '\n'
  path.write_text(text, encoding='utf-8')


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
    'attention_dropout_prob': 0.1,
    'attention_scale': 1.0,
    'block_position_encoding': True,
    'embedding_dropout_prob': 0.1,
    'initializer_range': 0.02,
    'model_type': 'glm',
    'output_dropout_prob': 0.1,
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
    'bos_token_id': 130004,
    'eos_token_id': 130005,
    'gmask_token_id': 130001,
    'mask_token_id': 130000,
    'model_type': 'chatglm',
    'pad_token_id': 3,
    'tie_word_embeddings': c.tied_head,
    'use_cache': True,
  }


def _write_chatglm2(c: ChatGLM2Config) -> tuple[dict, dict]:
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


def _write_hf_glm(c: ChatGLM2Config) -> tuple[dict, dict]:
  # A scaled base is only another base; scaled positions are transformers' linear scaling.
  theta = c.rope_theta * (c.rope_ratio if c.rope_scaling == 'theta' else 1)
  share = c.rotated_size / c.head_size
  rope = {'rope_type': 'default', 'rope_theta': theta, 'partial_rotary_factor': share}
  if c.rope_scaling == 'positions':
    rope |= {'rope_type': 'linear', 'factor': c.rope_ratio}
  return {
    'architectures': ['GlmForCausalLM'],
    'attention_bias': c.qkv_bias,
    'attention_dropout': 0.0,
    'head_dim': c.head_size,
    'hidden_act': 'silu',
    'hidden_size': c.hidden_size,
    'intermediate_size': c.mlp_size,
    'max_position_embeddings': c.max_positions,
    'model_type': 'glm',
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
  'glm': _write_hf_glm,
}
