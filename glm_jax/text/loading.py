"""Vocabularies from files, from checkpoints, and from the folders of released models."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.text import ranks, released
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


def from_dict(fields: Mapping[str, Any]) -> Vocabulary:
  """The inverse of `Vocabulary.to_dict`.

  Raises:
    UserError: of another kind, or damaged.
  """
  kind = fields.get('kind')
  if kind == 'bytes':
    return ByteVocabulary()
  try:
    if kind in SENTENCEPIECE:
      model = base64.b64decode(fields['model'])
      images = {'images': int(fields['images'])} if 'images' in fields else {}
      return SENTENCEPIECE[kind](model, **images)
    if kind in TOKENIZERS:
      return TOKENIZERS[kind](fields['tokenizer'])
  except UserError:
    raise
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(
      f'a stored vocabulary must be as it was written, got one of the kind {kind!r:.40} '
      f'that lacks or spoils {error}; use another copy.'
    ) from error
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
      if ranks.is_ranks(content):
        added = added_tokens(path.parent)
        return released.GLM4Vocabulary.from_ranks(content, added)
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
    with_images = load_kind('ice-130b')
    said = _json(folder / 'tokenizer_config.json').get('num_image_tokens')
    if said in (0, _IMAGES):
      return with_images if said else load_kind('ice')
    # Only the first ChatGLM-6B and GLM-130B, which do not say it, have room for images.
    return with_images if with_images.size <= table_rows else load_kind('ice')
  if 'cog-pretrain.model' in has:
    own = _own_gmask(folder)
    if own is None:
      model = folder / 'cog-pretrain.model'
      raise UserError(
        'a vocabulary must be that of GLM-10B-Chinese or that of GLM-Large-Chinese, whose '
        f'[gMASK] is a piece of its own, got {model}, which is the same in both, and no '
        'added_tokens.json that tells which; fetch it, or give '
        f'--vocabulary=cog:{model} or --vocabulary=cog-fixed:{model}.'
      )
    return load_kind('cog-fixed' if own else 'cog')
  if format in ('chatglm2', 'glm', 'glm4') and has & {'tokenizer.model', 'tokenizer.json'}:
    kind = kind_of_chatglm(folder)
    if kind is None:
      model = folder / 'tokenizer.model'
      raise UserError(
        'a vocabulary must be that of ChatGLM2 or that of ChatGLM3, which has roles, got '
        f'{model}, which is the same in both, and no file beside it that tells which; '
        'fetch the tokenization_chatglm.py of this model, or give '
        f'--vocabulary=chatglm2:{model} or --vocabulary=chatglm3:{model}.'
      )
    if kind == 'glm4' and 'tokenizer.json' not in has:
      return load(f'glm4:{folder / "tokenizer.model"}')
    return load_kind(kind)
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


def added_tokens(folder: Path) -> dict[str, int]:
  """Pieces that tokenizer files put behind those of the model, by name.

  Raises:
    UserError: the files hold something else.
  """
  path = folder / 'tokenizer_config.json'
  # Versions of transformers keep them in one file or in the other.
  decoder = _json(path).get('added_tokens_decoder') or {}
  try:
    decoded = {token['content']: int(number) for number, token in decoder.items()}
    return {**_json(folder / 'added_tokens.json'), **decoded}
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(
      f'added_tokens_decoder in {path} must be objects with a content by their number, got '
      f'{str(decoder)[:80]}; fetch it again.'
    ) from error


def _find_pair(folder: Path, names: tuple[tuple[str, str], ...]) -> list[Path]:
  for pair in names:
    if all((folder / name).is_file() for name in pair):
      return [folder / name for name in pair]
  raise FileNotFoundError(f'{folder} has not {" and ".join(names[0])}')


def kind_of_chatglm(folder: Path) -> str | None:
  """'chatglm2', 'chatglm3' or 'glm4', by the files of a folder; None if they do not tell.

  Names of folders and models are no evidence: whoever copies or tunes a model changes them.
  """
  said = _json(folder / 'tokenizer_config.json').get(KIND_KEY)
  if said in KINDS:
    return said
  if not (folder / 'tokenizer.model').is_file():
    return 'glm4' if (folder / 'tokenizer.json').is_file() else None
  # GLM-4-9B calls a file of tiktoken tokenizer.model, as sentencepiece's are called.
  with (folder / 'tokenizer.model').open('rb') as file:
    if ranks.is_ranks(file.read(200)):
      return 'glm4'
  # ChatGLM3's files name the roles. A file that lists all control pieces and has none of
  # them is ChatGLM2's; the other files may just leave them out.
  whole = ('tokenization_chatglm.py', 'tokenizer.json')
  texts = {
    name: (folder / name).read_text(encoding='utf-8', errors='replace')
    for name in (*whole, 'tokenizer_config.json', 'special_tokens_map.json')
    if (folder / name).is_file()
  }
  if any('<|user|>' in text for text in texts.values()):
    return 'chatglm3'
  # The ids of roles end an answer there, besides </s>.
  for name in ('generation_config.json', 'config.json'):
    stops = _json(folder / name).get('eos_token_id')
    if isinstance(stops, list) and len(stops) > 1:
      return 'chatglm3'
  # ChatGLM2's prompt counts its rounds.
  template = '[Round ' in texts.get('tokenizer_config.json', '')
  return 'chatglm2' if template or any(name in texts for name in whole) else None


def _own_gmask(folder: Path) -> bool | None:
  """GLM-Large-Chinese counts [gMASK] as 50009, GLM-10B-Chinese as its <|endofpiece|>.

  None where the files do not say.
  """
  added = added_tokens(folder)
  if '<|endofpiece|>' not in added:
    return None
  return added.get('[gMASK]', added['<|endofpiece|>']) != added['<|endofpiece|>']
