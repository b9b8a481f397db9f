"""Vocabularies: text to token ids and back, with pieces that text cannot spell.

`[MASK] [gMASK] [sMASK] [sop] [eop] [ENC] [dBLOCK] <eos> <pad>` are added behind a
vocabulary's own pieces, whose ids stay as they are. They are control pieces: whatever a
text holds, `encode` never yields one of them.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as spm_pb2

NAMES = (
  '[MASK]',
  '[gMASK]',
  '[sMASK]',
  '[sop]',
  '[eop]',
  '[ENC]',
  '[dBLOCK]',
  '<eos>',
  '<pad>',
)

# Sentence-ending marks of THUDM/GLM blocklm_utils.py contains_sentence_end.
_ENDS = '.?!;:。？！；：…\n'

_SPACE = '\u2581'


@dataclasses.dataclass(frozen=True)
class Specials:
  """Ids of the control pieces, in the order of `NAMES`."""

  mask: int
  gmask: int
  smask: int
  sop: int
  eop: int
  enc: int
  dblock: int
  eos: int
  pad: int

  @classmethod
  def behind(cls, size: int) -> Specials:
    """The ids that follow `size` pieces."""
    return cls(*range(size, size + len(NAMES)))


class Vocabulary:
  """What every vocabulary can do.

  Attributes:
    size: pieces, control pieces included.
    specials: ids of the control pieces.
    fingerprint: 16 hexadecimal digits that tell vocabularies apart.
  """

  size: int
  specials: Specials
  fingerprint: str

  def encode(self, text: str) -> list[int]:
    """Token ids of a text, never a control piece."""
    raise NotImplementedError

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text, in parallel where that is possible."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of token ids; control pieces, and ids beyond `size`, say nothing."""
    raise NotImplementedError

  def piece(self, token: int) -> str:
    """One token for a reader: a control piece by its name, a byte as <0xE4>."""
    raise NotImplementedError

  def ends_sentence(self) -> np.ndarray:
    """[size] bool: the piece holds a sentence-ending mark or a line break."""
    pieces = [self.piece(token) for token in range(self.size - len(NAMES))]
    as_bytes = {f'<0x{ord(mark):02X}>' for mark in _ENDS if mark.isascii()}
    ends = [any(mark in piece for mark in _ENDS) or piece in as_bytes for piece in pieces]
    return np.array(ends + [False] * len(NAMES))

  def to_dict(self) -> dict[str, Any]:
    """As JSON, content included, so that a checkpoint carries its vocabulary."""
    raise NotImplementedError

  def _name(self, token: int) -> str | None:
    first = self.size - len(NAMES)
    return NAMES[token - first] if first <= token < self.size else None


class SentencePieceVocabulary(Vocabulary):
  """A sentencepiece model with the control pieces behind its own.

  Attributes:
    serialized: the model with the control pieces.
  """

  def __init__(self, model: bytes):
    """
    Args:
      model: content of a `.model` file.

    Raises:
      ValueError: it is none.
    """
    proto = spm_pb2.ModelProto()
    try:
      proto.ParseFromString(model)
      known = {piece.piece for piece in proto.pieces}
      base = len(proto.pieces)
      for name in NAMES:
        # A model may have a piece of that name already, which then remains its own.
        unique = name if name not in known else f'glm_jax:{name}'
        proto.pieces.add(
          piece=unique, score=0.0, type=spm_pb2.ModelProto.SentencePiece.CONTROL
        )
      self.serialized = proto.SerializeToString()
      self._processor = spm.SentencePieceProcessor(model_proto=self.serialized)
    except Exception as error:  # protobuf and sentencepiece have no common error
      raise ValueError(
        f'a vocabulary must be a sentencepiece model, got {len(model)} '
        f'bytes that are none ({type(error).__name__}); give a .model file.'
      ) from error
    if not base:
      raise ValueError(
        'a sentencepiece model must have pieces, got none; give another .model file.'
      )
    self._model = model
    pieces = [self._processor.piece_to_id(f'<0x{b:02X}>') for b in _SPACE.encode()]
    exact = all(self._processor.is_byte(piece) for piece in pieces)
    self._bytes_of_space = pieces if exact else []
    self.size = base + len(NAMES)
    self.specials = Specials.behind(base)
    self.fingerprint = hashlib.sha256(model).hexdigest()[:16]

  def encode(self, text: str) -> list[int]:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    ids = self._processor.encode(list(texts), num_threads=-1)
    for i, text in enumerate(texts):
      # sentencepiece writes a space as this mark; the mark itself goes as its bytes.
      if _SPACE in text and self._bytes_of_space:
        parts = self._processor.encode(text.split(_SPACE))
        ids[i] = parts[0]
        for part in parts[1:]:
          ids[i] = ids[i] + self._bytes_of_space + part
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    first = self.specials.mask
    return self._processor.decode([int(token) for token in ids if token < first])

  def piece(self, token: int) -> str:
    return self._name(token) or self._processor.id_to_piece(int(token))

  def to_dict(self) -> dict[str, Any]:
    return {'kind': 'sentencepiece', 'model': base64.b64encode(self._model).decode()}


class ByteVocabulary(Vocabulary):
  """The 256 bytes of UTF-8: nothing to train, every text exact."""

  def __init__(self):
    self.size = 256 + len(NAMES)
    self.specials = Specials.behind(256)
    self.fingerprint = 'bytes'

  def encode(self, text: str) -> list[int]:
    return list(text.encode('utf-8'))

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(int(token) for token in ids if token < 256).decode('utf-8', 'replace')

  def piece(self, token: int) -> str:
    character = chr(token) if 32 <= token < 127 else f'<0x{token:02X}>'
    return self._name(token) or character

  def to_dict(self) -> dict[str, Any]:
    return {'kind': 'bytes'}


def from_dict(fields: dict[str, Any]) -> Vocabulary:
  """The inverse of `Vocabulary.to_dict`."""
  if fields.get('kind') == 'bytes':
    return ByteVocabulary()
  if fields.get('kind') == 'sentencepiece':
    return SentencePieceVocabulary(base64.b64decode(fields['model']))
  raise ValueError(
    "a stored vocabulary must be of kind 'bytes' or 'sentencepiece', got "
    f'{fields.get("kind")!r}; use the version that wrote it.'
  )


def load(spec: str) -> Vocabulary:
  """'bytes', or the path of a sentencepiece `.model` file.

  Raises:
    ValueError: the file is missing or no such model.
  """
  if spec == 'bytes':
    return ByteVocabulary()
  path = Path(spec).expanduser()
  try:
    model = path.read_bytes()
  except OSError as error:
    raise ValueError(
      "VocabularyConfig.path must be 'bytes' or a readable .model file, "
      f'got {spec!r} ({error.strerror}); correct the path.'
    ) from error
  try:
    return SentencePieceVocabulary(model)
  except ValueError as error:
    raise ValueError(f'{spec}: {error}') from error


def train_sentencepiece(texts: Iterable[str], size: int, max_lines: int = 200_000) -> bytes:
  """Trains a unigram model in which every text, of any script, comes back exactly.

  No normalisation, no added or removed space, and unknown characters as bytes.

  Args:
    texts: documents; cut into lines here.
    size: of the finished vocabulary, control pieces included.
    max_lines: an even sample of so many lines is used.

  Returns:
    Content of a `.model` file.

  Raises:
    ValueError: no text, or a size that leaves no room beside the bytes.
  """
  if size < 512:
    raise ValueError(
      'VocabularyConfig.size must be 512 or more (256 bytes and 9 control '
      f"pieces are in it), got {size}; raise it, or use path='bytes'."
    )
  lines = [line for text in texts for line in _lines(text)]
  if not lines:
    raise ValueError(
      'a vocabulary must be trained on some text, got none; give a corpus '
      "with text, or use VocabularyConfig.path='bytes'."
    )
  lines = lines[:: -(-len(lines) // max_lines)]
  model = io.BytesIO()
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    model_type='unigram',
    vocab_size=size - len(NAMES),
    hard_vocab_limit=False,
    byte_fallback=True,
    character_coverage=0.9995,
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    split_digits=True,
    max_sentence_length=8192,
    num_threads=4,
    minloglevel=2,
    unk_id=0,
    bos_id=-1,
    eos_id=-1,
    pad_id=-1,
  )
  return model.getvalue()


def _lines(text: str) -> Iterable[str]:
  """Lines of at most 2,000 characters; sentencepiece reads no NUL."""
  for line in text.replace('\0', '').splitlines():
    for start in range(0, len(line), 2000):
      yield line[start : start + 2000]
