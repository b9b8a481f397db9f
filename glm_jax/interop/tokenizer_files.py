"""What transformers reads a vocabulary by: tokenizer_config.json, and tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_jax import configs
from glm_jax.interop import reward_models
from glm_jax.text import chat
from glm_jax.text.chat_jinja import jinja
from glm_jax.text.fast import fast_tokenizer
from glm_jax.text.loading import KIND_KEY
from glm_jax.text.vocabulary import Vocabulary

_END = '<|endoftext|>'

# Kinds of vocabularies of models that chat and that transformers has a class for.
_CHATS = ('chatglm2', 'chatglm3', 'glm4')

# The published class that reads each kind of vocabulary, in the module beside it.
CLASSES = {
  'bert': 'tokenization_glm.GLMBertTokenizer',
  'gpt2': 'tokenization_glm.GLMGPT2Tokenizer',
  'roberta': 'tokenization_glm.GLMRobertaTokenizer',
  'cog': 'tokenization_glm.GLMChineseTokenizer',
  'cog-fixed': 'tokenization_glm.GLMChineseTokenizer',
  'ice': 'tokenization_chatglm.ChatGLMTokenizer',
  'chatglm2': 'tokenization_chatglm.ChatGLMTokenizer',
  'chatglm3': 'tokenization_chatglm.ChatGLMTokenizer',
  'glm4': 'tokenization_chatglm.ChatGLM4Tokenizer',
}


def read_template(folder: Path) -> Any:
  """The chat template of a released model; None where there is none."""
  path = folder / 'chat_template.jinja'
  if path.is_file():
    return path.read_text(encoding='utf-8', errors='replace')
  path = folder / 'tokenizer_config.json'
  return configs.read_json(path).get('chat_template') if path.is_file() else None


def write(
  folder: Path,
  vocabulary: Vocabulary,
  config: Any,
  template: Any = None,
  scores: bool = False,
) -> None:
  """Writes a vocabulary for transformers.

  Args:
    folder: of the export.
    vocabulary: of the model.
    config: of the model; None where the code of the released model reads the files.
    template: of the model that was imported, see `read_template`.
    scores: of a reward model, which reads what ends an answer.
  """
  description = _of_code(vocabulary) if config is None else _of_fast(vocabulary, config)
  # None for GLM-4, whose own tokenizer.json is among its files.
  fast = fast_tokenizer(vocabulary) if config is not None else None
  if fast is not None:
    fast.save(str(folder / 'tokenizer.json'))
  # That of ChatGLM3 is for its own class, which puts a space before every text.
  if template and vocabulary.kind == 'glm4' and not scores:
    description['chat_template'] = template
  elif config is not None and vocabulary.kind in _CHATS:
    own = chat.template_for(vocabulary, chat.family_of(config))
    description['chat_template'] = jinja(own, fast, ends=scores)
  if scores:
    description['pad_token'] = vocabulary.piece(reward_models.padding(vocabulary))
  write_vocabulary(folder, vocabulary, description)


def write_added(folder: Path, vocabulary: Vocabulary) -> None:
  """Writes added_tokens.json, which transformers before 4.34 reads, and glm-10b's code."""
  write_json(folder / 'added_tokens.json', _added(vocabulary))


def write_vocabulary(
  folder: Path, vocabulary: Vocabulary, description: Mapping[str, Any] | None = None
) -> None:
  """Writes a vocabulary's files, and which one it is, for `glm_jax.text.loading.find`."""
  for name, data in vocabulary.files().items():
    (folder / name).write_bytes(data)
  content = {**(description or {}), KIND_KEY: vocabulary.kind_in_files}
  write_json(folder / 'tokenizer_config.json', content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
  """Writes a JSON object for people to read, too."""
  text = json.dumps(content, indent=2, ensure_ascii=False) + '\n'
  path.write_text(text, encoding='utf-8')


def _of_fast(vocabulary: Vocabulary, config: Any) -> dict[str, Any]:
  return {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'model_max_length': config.max_positions,
    # A batch of prompts continues at the right, so that padding goes to the left.
    'padding_side': 'left',
    # transformers needs some padding token; a sentencepiece model has <unk> as piece 0.
    'eos_token': vocabulary.piece(vocabulary.stops[0]),
    'pad_token': vocabulary.piece(vocabulary.specials.pad),
    'model_input_names': ['input_ids', 'attention_mask'],
  }


def _of_code(vocabulary: Vocabulary) -> dict[str, Any]:
  """For the published class of a vocabulary; empty where there is none."""
  if vocabulary.kind not in CLASSES:
    return {}
  # Without these two AutoTokenizer takes a generic class, and other ids, in silence.
  path = CLASSES[vocabulary.kind]
  description = {
    'tokenizer_class': path.split('.')[1],
    'auto_map': {'AutoTokenizer': [path, None]},
    'clean_up_tokenization_spaces': False,
  }
  if vocabulary.kind in ('chatglm2', 'chatglm3'):
    # No names of tokens: in this class they are properties that cannot be set.
    return {**description, 'remove_space': False, 'do_lower_case': False}
  if vocabulary.kind == 'ice':
    return {
      **description,
      'bos_token': '<sop>',
      'eos_token': '<eop>',
      'end_token': '</s>',
      'gmask_token': '[gMASK]',
      'mask_token': '[MASK]',
      'pad_token': '<pad>',
      'unk_token': '<unk>',
      'remove_space': False,
      'do_lower_case': False,
      # The class counts 20,000 images before the text unless it is told.
      'num_image_tokens': vocabulary.images,
    }
  added = _added(vocabulary)
  # Of two names of one id, the first: the other is its alias.
  by_id = {str(token): name for name, token in reversed(added.items())}
  flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
  description |= {
    'added_tokens_decoder': {
      token: {'content': by_id[token], **flags, 'special': True}
      for token in sorted(by_id, key=int)
    },
    'additional_special_tokens': list(added),
    'padding_side': 'left',
  }
  own = {
    'eos_token': _END,
    'pad_token': _END,
    'cls_token': '[CLS]',
    'mask_token': '[MASK]',
    'sep_token': '[SEP]',
    'unk_token': '[UNK]',
  }
  if vocabulary.kind == 'bert':  # which ends and pads alike, with its own piece
    own |= {'eos_token': '[PAD]', 'pad_token': '[PAD]'}
  elif vocabulary.kind == 'roberta':  # whose own names are the defaults of its class
    own = {'pad_token': '</s>', 'mask_token': '[MASK]'}
  elif vocabulary.kind == 'glm4':
    own = {'eos_token': _END, 'pad_token': _END}
  return {**description, **own}


def _added(vocabulary: Vocabulary) -> dict[str, int]:
  """Control pieces behind those of the model, which its files do not hold."""
  taken, first = {*vocabulary.control.values()}, vocabulary.size
  while first - 1 in taken:
    first -= 1
  return {name: token for name, token in vocabulary.control.items() if token >= first}
