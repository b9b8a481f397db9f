"""Vocabularies: text to token ids and back, with pieces that text cannot spell.

Every vocabulary of the family has control pieces (masks, the ends of spans, roles of a
chat). Whatever a text holds, `encode` never yields one of them; a caller that means them
says so, with `encode_marked`. The released vocabularies stand in `glm_jax.text.released`;
here are the interface and the vocabularies that are trained or need no training, which
have `[MASK] [gMASK] [sMASK] [sop] [eop] [ENC] [dBLOCK] <eos> <pad>` behind their pieces.
"""

from __future__ import annotations

import base64
import codecs
import functools
import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as spm_pb2

from glm_jax.configs import UserError
from glm_jax.text.specials import Specials

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

# sentencepiece's mark for a space inside its pieces.
_SPACE = '\u2581'
# sentencepiece's kind of piece that no text is ever encoded to.
CONTROL = spm_pb2.ModelProto.SentencePiece.CONTROL

# Marks that fill in for text.
MASKS = ('[MASK]', '[gMASK]', '[sMASK]')


class Vocabulary:
  """What every vocabulary can do.

  Attributes:
    kind: its name in `to_dict` and in `load`.
    size: ids, control pieces included.
    specials: ids that the objectives use.
    control: id of every control piece by name; different names may share one.
    prefix: control pieces that open every document ([ENC]; ChatGLM2: [gMASK] sop).
    suffix: what follows a text with blanks (<eos>, or nothing).
    stops: ids that end a generated answer.
    fingerprint: 16 hexadecimal digits that tell vocabularies apart.
    threads: that `encode_batch` may use where it can; -1 for all cores.
    takes_space_before: a mask in a text swallows the space before it, which the span that
      fills it brings along (THUDM/GLM data_utils/tokenization.py, `lstrip=True`).
    takes_space_behind: and the space behind it.
    restarts: text behind a mask is encoded as if it began a text.
    decodes_whole: control pieces do not part a text when it is decoded.
    adds_space: `encode` puts a space in front of a text.
  """

  kind: str
  size: int
  specials: Specials
  control: dict[str, int]
  prefix: tuple[int, ...]
  suffix: tuple[int, ...]
  stops: tuple[int, ...]
  fingerprint: str
  threads: int = -1
  # The original tokenizers differ in these.
  takes_space_before = True
  takes_space_behind = False
  restarts = True
  decodes_whole = False
  adds_space = False

  def encode(self, text: str) -> list[int]:
    """Token ids of a text, never a control piece."""
    return self.encode_batch([text])[0].tolist()

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """`encode` of each text, [n] int32, in parallel where that is possible."""
    raise NotImplementedError

  def encode_marked(self, text: str, names: Sequence[str] = ()) -> list[int]:
    """As `encode`, but names of control pieces, such as '[MASK]', become their ids.

    Space around a mask is treated, and the text behind it begun, as the released tokenizer
    of the kind does it.

    Args:
      text: with names in it.
      names: those that are meant; by default all of `control`.
    """
    # Longest first: a name may begin with another one, and a regular expression takes the
    # first alternative that fits.
    names = sorted(names or self.control, key=len, reverse=True)
    # The group keeps the names that the text is split at, at every other place.
    parts = re.split('(' + '|'.join(map(re.escape, names)) + ')', text)
    ids: list[int] = []
    neighbours = ['', *parts[:-1]], parts, [*parts[1:], '']
    for before, part, behind in zip(*neighbours, strict=True):
      if part in names:
        ids.append(self.control[part])
        continue
      if behind in MASKS and self.takes_space_before:
        part = part.rstrip()
      if before in MASKS and self.takes_space_behind:
        part = part.lstrip()
      goes_on = before in MASKS and not self.restarts
      ids.extend(self.encode_inside(part) if goes_on else self.encode(part))
    return ids

  def decode(self, ids: Sequence[int], *, control: bool = False) -> str:
    """The text of token ids; ids that are no piece say nothing.

    Args:
      ids: of tokens.
      control: control pieces by their names, instead of nothing.
    """
    names, size = self.names, self.size
    # Runs of text are decoded together: a character's bytes may be several tokens. Ids
    # beyond `size` are rows of a model's table that the vocabulary has no pieces for.
    runs: list[list[int]] = [[]]
    between: list[str] = []
    for token in map(int, ids):
      if token not in names:
        runs[-1] += [token] if 0 <= token < size else []
      elif control:
        between.append(names[token])
        runs.append([])
    if self.decodes_whole and between:
      texts = self.decode_parts(runs)
    else:
      texts = [self._decode(run) for run in runs]
    parts = [texts[0], *itertools.chain(*zip(between, texts[1:], strict=True))]
    return self._join([part for part in parts if part])

  def decode_parts(self, parts: Sequence[Sequence[int]]) -> list[str]:
    """Texts of the parts of one text, which together are `decode` of it.

    A space that a piece brings along so remains, and a character whose bytes lie in
    several parts is the last one's.

    Args:
      parts: ids of tokens; control pieces say nothing.
    """
    whole = self.decode([*itertools.chain(*parts)])
    ids: list[int] = []
    # Where each part ends in the whole: as far as it and those before it spell it already.
    ends = [0]
    for part in parts:
      ids += part
      text = self.decode(ids)
      pairs = enumerate(zip(whole, text, strict=False))
      common = next((i for i, (a, b) in pairs if a != b), min(len(whole), len(text)))
      ends.append(max(ends[-1], common))
    return [whole[start:end] for start, end in itertools.pairwise(ends)]

  def ends_within_character(self, ids: Sequence[int]) -> bool:
    """Whether the last bytes of some tokens begin a character that they do not end."""
    # At most three bytes do, and no token is less than one.
    last = [t for t in map(int, ids[-3:]) if t < self.size and t not in self.names]
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    decoder.decode(b''.join(map(self._bytes, last)))
    return bool(decoder.getstate()[0])

  def piece(self, token: int) -> str:
    """One token for a reader: a control piece by its name, a byte as <0xE4>."""
    return self.names.get(token) or self._piece(token)

  @property
  def names(self) -> dict[int, str]:
    """Name of each control piece by id; the last one where several share an id."""
    return {token: name for name, token in self.control.items()}

  def ends_sentence(self) -> np.ndarray:
    """[size] bool: the piece holds a sentence-ending mark or a line break."""
    names = self.names
    pieces = ['' if i in names else self._piece(i) for i in range(self.size)]
    # With byte fallback, a line break is the piece that is called <0x0A>.
    as_bytes = {f'<0x{ord(mark):02X}>' for mark in _ENDS if mark.isascii()}
    return np.array(
      [any(mark in piece for mark in _ENDS) or piece in as_bytes for piece in pieces]
    )

  def to_dict(self) -> dict[str, Any]:
    """As JSON, content included, so that a checkpoint carries its vocabulary."""
    raise NotImplementedError

  @property
  def kind_in_files(self) -> str:
    """What stands before the colon of `load` for the files that `files` gives."""
    return self.kind

  def files(self) -> dict[str, bytes]:
    """The files that the program of a released model reads it from, by name."""
    return {}

  def encode_inside(self, text: str) -> list[int]:
    """Of text that others precede, where that makes a difference."""
    return self.encode(text)

  def _decode(self, ids: list[int]) -> str:
    """Text of ids that are no control pieces."""
    raise NotImplementedError

  def _piece(self, token: int) -> str:
    raise NotImplementedError

  def _bytes(self, token: int) -> bytes:
    """What a token adds, before bytes are read as characters."""
    return self._piece(token).encode()

  def _join(self, parts: Sequence[str]) -> str:
    return ''.join(parts)

  def _add_own_control(self, first: int) -> None:
    """The control pieces `NAMES` as the ids from `first` on."""
    self.size = first + len(NAMES)
    self.control = {name: first + i for i, name in enumerate(NAMES)}
    ids = self.control
    self.specials = Specials.of(
      ids,
      sop='[sop]',
      eop='[eop]',
      enc='[ENC]',
      dblock='[dBLOCK]',
      eos=ids['<eos>'],
      pad=ids['<pad>'],
    )
    self.prefix, self.suffix = (ids['[ENC]'],), (ids['<eos>'],)
    self.stops = (ids['[eop]'], ids['<eos>'])


class SentencePieceVocabulary(Vocabulary):
  """A sentencepiece model with control pieces behind those of its own.

  Attributes:
    model: content of the `.model` file.
    serialized: the same with the control pieces.
  """

  kind = 'sentencepiece'
  restarts = False
  decodes_whole = True

  def __init__(self, model: bytes):
    """
    Args:
      model: content of a `.model` file.

    Raises:
      UserError: it is none.
    """
    self._add_own_control(self._load(model, NAMES))

  def _load(self, model: bytes, names: Sequence[str]) -> int:
    """Reads a model and adds pieces that no text yields; returns the first one's id."""
    proto = spm_pb2.ModelProto()
    try:
      proto.ParseFromString(model)
      # Control pieces go to the end, so that the model's own ids stay as they are.
      known = {piece.piece for piece in proto.pieces}
      base = len(proto.pieces)
      for name in names:
        # A model may have a piece of that name already, which then remains its own.
        unique = name if name not in known else f'glm_jax:{name}'
        proto.pieces.add(piece=unique, score=0.0, type=CONTROL)
      self.serialized = proto.SerializeToString()
      self._processor = spm.SentencePieceProcessor(model_proto=self.serialized)
    except Exception as error:  # protobuf and sentencepiece have no common error
      raise UserError(
        f'a vocabulary must be a sentencepiece model, got {len(model)} '
        f'bytes that are none ({type(error).__name__}); give a .model file.'
      ) from error
    # An empty file is a valid message of protobuf, and has no pieces.
    if not base:
      raise UserError(
        'a sentencepiece model must have pieces, got none; give another .model file.'
      )
    self.model = model
    self._normalizer = proto.normalizer_spec
    self.adds_space = self._normalizer.add_dummy_prefix
    # A text may hold the mark itself, which must not come back as a space: it goes as its
    # three bytes, where the model has pieces for bytes.
    pieces = [self._processor.piece_to_id(f'<0x{b:02X}>') for b in _SPACE.encode()]
    # Only a model that adds no space of its own can be cut at the mark below.
    exact = not self.adds_space and all(map(self._processor.is_byte, pieces))
    self._bytes_of_space = pieces if exact else []
    # The kind, too: another one reads the same file with other control pieces.
    self.fingerprint = hashlib.sha256(model + self.kind.encode()).hexdigest()[:16]
    return base

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    if len(texts) > 1:
      ids = self._processor.encode(list(texts), num_threads=self.threads, out_type='numpy')
    else:  # threads cost forty times what they would share
      ids = [np.array(self._processor.encode(text), np.int32) for text in texts]
    for i, text in enumerate(texts):
      # sentencepiece writes a space as this mark; the mark itself goes as its bytes.
      if _SPACE in text and self._bytes_of_space:
        parts = self._processor.encode(text.split(_SPACE))
        joined = parts[0]
        for part in parts[1:]:
          joined += self._bytes_of_space + part
        ids[i] = np.array(joined, np.int32)
    return ids

  def encode_inside(self, text: str) -> list[int]:
    if not (self.adds_space or self._normalizer.remove_extra_whitespaces):
      return self.encode(text)
    return self._encode_inside(text)

  def _encode_inside(self, text: str) -> list[int]:
    if self._normalizer.remove_extra_whitespaces:
      text = re.sub(' {2,}', ' ', text.rstrip(' '))
    return self._inside.encode(text)

  @functools.cached_property
  def _inside(self) -> spm.SentencePieceProcessor:
    """The same model for text that goes on: nothing before it is added or dropped."""
    proto = spm_pb2.ModelProto.FromString(self.serialized)
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    return spm.SentencePieceProcessor(model_proto=proto.SerializeToString())

  def _decode(self, ids: list[int]) -> str:
    return self._processor.decode(ids)

  def _piece(self, token: int) -> str:
    return self._processor.id_to_piece(int(token))

  def _bytes(self, token: int) -> bytes:
    byte = re.fullmatch('<0x([0-9A-F]{2})>', self._piece(token))
    return bytes.fromhex(byte[1]) if byte else super()._bytes(token)

  def to_dict(self) -> dict[str, Any]:
    return {'kind': self.kind, 'model': base64.b64encode(self.model).decode()}

  def files(self) -> dict[str, bytes]:
    return {'tokenizer.model': self.model}


class ByteVocabulary(Vocabulary):
  """The 256 bytes of UTF-8: nothing to train, every text exact."""

  kind = 'bytes'

  def __init__(self):
    self._add_own_control(256)
    self.fingerprint = 'bytes'

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    encoded = [np.frombuffer(text.encode('utf-8'), np.uint8) for text in texts]
    return [ids.astype(np.int32) for ids in encoded]

  def _decode(self, ids: list[int]) -> str:
    return bytes(ids).decode('utf-8', 'replace')

  def _piece(self, token: int) -> str:
    return chr(token) if 32 <= token < 127 else f'<0x{token:02X}>'

  def _bytes(self, token: int) -> bytes:
    return bytes([token])

  def to_dict(self) -> dict[str, Any]:
    return {'kind': self.kind}


def train_sentencepiece(
  texts: Iterable[str], size: int, *, bpe: bool = False, max_lines: int = 200_000
) -> bytes:
  """Trains a model in which every text, of any script, comes back exactly.

  No normalisation, no added or removed space, and unknown characters as bytes.

  Args:
    texts: documents; cut into lines here.
    size: of the finished vocabulary, control pieces included.
    bpe: byte pairs, and <s> and </s>, as ChatGLM's; else a unigram model.
    max_lines: an even sample of so many lines is used.

  Returns:
    Content of a `.model` file.

  Raises:
    UserError: no text, or a size that leaves no room beside the bytes.
  """
  if size < 512:
    raise UserError(
      'VocabularyConfig.size must be 512 or more (256 bytes and 9 control '
      f"pieces are in it), got {size}; raise it, or use path='bytes'."
    )
  lines = [line for text in texts for line in _lines(text)]
  if not lines:
    raise UserError(
      'a vocabulary must be trained on some text, got none; give a corpus '
      "with text, or use VocabularyConfig.path='bytes'."
    )
  # Every n-th line: the sample covers all of the corpus, and is the same each time.
  lines = lines[:: -(-len(lines) // max_lines)]
  model = io.BytesIO()
  spm.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_writer=model,
    model_type='bpe' if bpe else 'unigram',
    vocab_size=size - len(NAMES),
    # A small corpus has too few candidates for the size that is asked for.
    hard_vocab_limit=False,
    byte_fallback=True,
    character_coverage=0.9995,
    # Exact: nothing of a text is normalised, added or dropped.
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    split_digits=True,
    max_sentence_length=8192,
    num_threads=4,
    minloglevel=2,
    # The trainer insists on an <unk>; -1 leaves a piece out.
    unk_id=0,
    bos_id=1 if bpe else -1,
    eos_id=2 if bpe else -1,
    pad_id=-1,
  )
  return model.getvalue()


def _lines(text: str) -> Iterable[str]:
  """Lines of at most 2,000 characters; sentencepiece reads no NUL."""
  # The trainer skips a line longer than `max_sentence_length` bytes: 8,192 hold 2,000
  # characters of up to four bytes.
  for line in text.replace('\0', '').splitlines():
    for start in range(0, len(line), 2000):
      yield line[start : start + 2000]
