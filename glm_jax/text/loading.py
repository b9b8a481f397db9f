"""Vocabularies from files, from checkpoints, and from the folders of released models."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.text import released
from glm_jax.text.released import SENTENCEPIECE, TOKENIZERS
from glm_jax.text.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary

KINDS = ('bytes', *SENTENCEPIECE, 'ice-130b', *TOKENIZERS)
"""What may stand before the colon of a vocabulary's path."""

KIND_KEY = 'glm_jax_vocabulary'
"""Says in the tokenizer_config.json of an export which kind its files are."""

# The file that each kind is read from, in a released model's folder.
_FILES = {
  'sentencepiece': 'tokenizer.model',
  'chatglm2': 'tokenizer.model',
  'chatglm3': 'tokenizer.model',
  'cog': 'cog-pretrain.model',
  'cog-fixed': 'cog-pretrain.model',
  'ice': 'ice_text.model',
  'ice-130b': 'ice_text.model',
  'bert': 'vocab.txt',
  'glm4': 'tokenizer.json',
  # These two are pairs of files, under several names.
  'gpt2': '',
  'roberta': '',
}
# Names that GLM's repositories and Hugging Face use.
_PAIRS = (('vocab.json', 'merges.txt'), ('gpt2-vocab.json', 'gpt2-merges.txt'))
_ROBERTA = (('roberta-vocab.json', 'roberta-merges.txt'), ('vocab.json', 'merges.txt'))
# Ids of images before those of text in icetk, the tokenizer of GLM-130B.
_IMAGES = 20_000
# The first ChatGLM-6B and GLM-130B have tables of this many rows, images included.
_TABLE_WITH_IMAGES = 150_528


def from_dict(fields: Mapping[str, Any]) -> Vocabulary:
  """The inverse of `Vocabulary.to_dict`."""
  kind = fields.get('kind')
  if kind == 'bytes':
    return ByteVocabulary()
  if kind in SENTENCEPIECE:
    model = base64.b64decode(fields['model'])
    images = {'images': fields['images']} if 'images' in fields else {}
    return SENTENCEPIECE[kind](model, **images)
  if kind in TOKENIZERS:
    return TOKENIZERS[kind](fields['tokenizer'])
  raise UserError(
    f'a stored vocabulary must be of a kind in {KINDS}, got {kind!r}; use the version that '
    'wrote it.'
  )


def load(spec: str) -> Vocabulary:
  """A vocabulary by name.

  Args:
    spec: 'bytes', the path of a sentencepiece `.model` file, or 'KIND:PATH' for one of a
      released model, such as 'chatglm3:tokenizer.model', 'bert:vocab.txt', or
      'gpt2:FOLDER' with vocab.json and merges.txt.

  Raises:
    UserError: the file is missing or no such vocabulary.
  """
  if spec == 'bytes':
    return ByteVocabulary()
  kind, _, rest = spec.partition(':')
  # A plain path, or one with a colon in it, is that of a sentencepiece model.
  if not rest or kind not in _FILES:
    kind, rest = SentencePieceVocabulary.kind, spec
  path = Path(rest).expanduser()
  try:
    if kind in ('gpt2', 'roberta'):
      pair = _find_pair(path, _ROBERTA if kind == 'roberta' else _PAIRS)
      texts = [file.read_text(encoding='utf-8') for file in pair]
      return TOKENIZERS[kind].from_files(*texts)
    content = path.read_bytes()
  except OSError as error:
    raise UserError(
      "a vocabulary must be 'bytes', a readable .model file or KIND:PATH with KIND in "
      f'{KINDS[1:]}, got {spec!r} ({error.strerror or error}); give a file to read.'
    ) from error
  except UnicodeDecodeError as error:
    raise UserError(f'{spec}: must be UTF-8 text ({error}); fetch it again.') from error
  try:
    if kind == 'bert':
      return released.BertVocabulary.from_files(content.decode('utf-8'))
    if kind == 'glm4':
      return released.GLM4Vocabulary(content.decode('utf-8'))
    if kind == 'ice-130b':
      return released.IceVocabulary(content, _IMAGES)
    return SENTENCEPIECE[kind](content)
  except ValueError as error:
    raise UserError(f'{spec}: {error}') from error


def find(folder: Path, format: str, table_rows: int) -> Vocabulary | None:
  """The vocabulary in a released model's folder; None if there is none.

  Args:
    folder: of the model.
    format: of the weights, see `glm_jax.interop.formats.FORMATS`.
    table_rows: of the embedding table.

  Raises:
    UserError: a file that is no vocabulary.
  """
  # From the surest evidence to the weakest: what an export says of itself, file names that
  # only one model has, then names that several share, told apart by their contents.
  has = {path.name for path in folder.iterdir()}

  def load_kind(kind: str) -> Vocabulary:
    return load(kind if kind == 'bytes' else f'{kind}:{folder / _FILES[kind]}')

  exported_kind = _json(folder / 'tokenizer_config.json').get(KIND_KEY)
  if exported_kind in KINDS:
    return load_kind(exported_kind)
  if 'ice_text.model' in has:
    return load_kind('ice-130b' if table_rows == _TABLE_WITH_IMAGES else 'ice')
  if 'cog-pretrain.model' in has:
    return load_kind('cog-fixed' if _own_gmask(folder) else 'cog')
  if format in ('chatglm2', 'glm') and has & {'tokenizer.model', 'tokenizer.json'}:
    # GLM-4-9B calls a file of tiktoken tokenizer.model, as sentencepiece's are called.
    of_tiktoken = 'tokenizer.model' in has and _is_tiktoken(folder / 'tokenizer.model')
    if 'tokenizer.model' in has and not of_tiktoken:
      return load_kind('chatglm3' if _has_roles(folder) else 'chatglm2')
    if 'tokenizer.json' not in has:
      raise UserError(
        f"GLM-4's vocabulary must be a tokenizer.json, got {folder / 'tokenizer.model'} of "
        'tiktoken; fetch the tokenizer.json of glm-4-9b-chat-hf and give '
        '--vocabulary=glm4:PATH.'
      )
    return load_kind('glm4')
  if 'vocab.txt' in has:
    return load_kind('bert')
  if 'roberta-vocab.json' in has:
    return load_kind('roberta')
  for name, _ in _PAIRS:
    if name in has:
      # RoBERTa's <s> is id 0; GPT-2 has no such piece.
      return load_kind('roberta' if _json(folder / name).get('<s>') == 0 else 'gpt2')
  return None


def _json(path: Path) -> dict[str, Any]:
  """A JSON object; empty where there is no file."""
  return configs.read_json(path) if path.is_file() else {}


def _find_pair(folder: Path, names: tuple[tuple[str, str], ...]) -> list[Path]:
  for pair in names:
    if all((folder / name).is_file() for name in pair):
      return [folder / name for name in pair]
  raise FileNotFoundError(f'{folder} has not {" and ".join(names[0])}')


def _is_tiktoken(path: Path) -> bool:
  """Lines of a piece in base64 and its rank: GLM-4-9B's tokenizer.model."""
  with path.open('rb') as file:
    return re.fullmatch(rb'[A-Za-z0-9+/]+=* \d+\s*', file.readline(200)) is not None


def _has_roles(folder: Path) -> bool:
  """ChatGLM3's tokenizer files name the roles; ChatGLM2's do not."""
  names = ('tokenizer_config.json', 'tokenization_chatglm.py', 'special_tokens_map.json')
  # An export holds the roles in this one.
  names += ('tokenizer.json',)
  return any(
    '<|user|>' in (folder / name).read_text(encoding='utf-8', errors='replace')
    for name in names
    if (folder / name).is_file()
  )


def _own_gmask(folder: Path) -> bool:
  """GLM-Large-Chinese counts [gMASK] as 50009, GLM-10B-Chinese's own code does not."""
  # No file: two times None, which is GLM-10B-Chinese's way, too.
  added = _json(folder / 'added_tokens.json')
  return added.get('[gMASK]') != added.get('<|endofpiece|>')
