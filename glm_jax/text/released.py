"""The vocabularies of the released models, with the ids that their weights expect.

Ids of control pieces: THUDM/GLM data_utils/tokenization.py (GLM), the
tokenization_chatglm.py published with ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B, and
GLM-4-9B's tokenizer.json.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as spm_pb2
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from glm_jax.configs import UserError
from glm_jax.text import ranks
from glm_jax.text.specials import Specials
from glm_jax.text.vocabulary import CONTROL, SentencePieceVocabulary, Vocabulary

# Byte-level pairs spell a byte as the character of its number where that is to be seen, and
# the others in turn as those from 256 on.
_VISIBLE = pre_tokenizers.ByteLevel.alphabet()
_OTHERS = [byte for byte in range(256) if chr(byte) not in _VISIBLE]
_SOP, _EOP, _END = '<|startofpiece|>', '<|endofpiece|>', '<|endoftext|>'
ROLES = ('<|system|>', '<|user|>', '<|assistant|>', '<|observation|>')


class TokenizersVocabulary(Vocabulary):
  """A vocabulary that the tokenizers package computes."""

  def __init__(self, tokenizer: str):
    """
    Args:
      tokenizer: content of a tokenizer.json.
    """
    try:
      self._tokenizer = Tokenizer.from_str(tokenizer)
    except Exception as error:  # the package raises bare Exceptions
      raise UserError(
        f'a vocabulary must be a tokenizer.json, got one that cannot be read ({error}); '
        'fetch it again.'
      ) from error
    # A file may have been saved with a length, which belongs to somebody's batch.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    # Names of added pieces in a text are text.
    self._tokenizer.encode_special_tokens = True
    self._json = tokenizer
    self.fingerprint = hashlib.sha256((tokenizer + self.kind).encode()).hexdigest()[:16]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def _decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=False)

  def _piece(self, token: int) -> str:
    return self._tokenizer.decode([token], skip_special_tokens=False)

  def _bytes(self, token: int) -> bytes:
    codes = map(ord, self._tokenizer.id_to_token(token) or '')
    return bytes(code if code < 256 else _OTHERS[code - 256] for code in codes)

  def to_dict(self) -> dict[str, Any]:
    return {'kind': self.kind, 'tokenizer': self._json}

  def _set_glm_control(self, control: dict[str, int]) -> None:
    """Control pieces of THUDM/GLM, by their names there."""
    self.control = control
    # Control pieces lie behind those of the model, or share an id with one of them.
    self.size = max(self._tokenizer.get_vocab_size(), 1 + max(control.values()))
    # BERT's vocabulary has no end of text: GLM ends and pads with [PAD], which is piece 0.
    end = control.get(_END, 0)
    self.specials = Specials.of(
      control, sop=_SOP, eop=_EOP, enc='[CLS]', dblock='[dBLOCK]', eos=end, pad=end
    )
    self.prefix, self.suffix = (control['[CLS]'],), (self.specials.eos,)
    self.stops = (self.specials.eop, self.specials.eos)


class BertVocabulary(TokenizersVocabulary):
  """Uncased wordpieces: GLM-Base, Large, 410M and 515M."""

  kind = 'bert'

  def __init__(self, tokenizer: str):
    super().__init__(tokenizer)
    # In the order in which THUDM/GLM adds them (BertWordPieceTokenizer).
    names = (_SOP, _EOP, '[gMASK]', '[sMASK]', '[dBLOCK]')
    first = self._tokenizer.get_vocab_size()
    pieces = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
    control = {name: self._tokenizer.token_to_id(name) for name in pieces}
    missing = [name for name, token in control.items() if token is None]
    if missing:
      raise UserError(
        f'a BERT vocabulary must have the pieces {pieces}, got one without {missing}; give '
        'the vocab.txt of bert-base-uncased.'
      )
    self._set_glm_control({**control, **{n: first + i for i, n in enumerate(names)}})

  @classmethod
  def from_files(cls, vocab_txt: str) -> BertVocabulary:
    """From the lines of a vocab.txt."""
    # The id of a piece is the number of its line; the last line break makes an empty one.
    pieces = {piece: i for i, piece in enumerate(vocab_txt.split('\n')) if piece}
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token='[UNK]'))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return cls(tokenizer.to_str())

  def _piece(self, token: int) -> str:
    return self._tokenizer.id_to_token(token) or ''

  def _bytes(self, token: int) -> bytes:
    return self._piece(token).encode()

  # The decoder puts spaces between words; a control piece is set apart like one.
  def _join(self, parts: Sequence[str]) -> str:
    return ' '.join(parts)

  @property
  def names(self) -> dict[int, str]:
    # Unknown words are text, if of little worth.
    names = super().names
    del names[self.control['[UNK]']]
    return names

  def files(self) -> dict[str, bytes]:
    ordered = sorted(self._tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return {'vocab.txt': ''.join(f'{piece}\n' for piece, _ in ordered).encode()}


class BytePairVocabulary(TokenizersVocabulary):
  """Byte-level pairs as GPT-2's: GLM-2B and 10B."""

  kind = 'gpt2'

  def __init__(self, tokenizer: str):
    super().__init__(tokenizer)
    control = self._control(self._tokenizer.get_vocab_size())
    if None in control.values():
      raise UserError(
        f'a vocab.json must have the piece {_END}, got one without; fetch it again.'
      )
    self._set_glm_control(control)

  def _control(self, pieces: int) -> dict[str, int]:
    # In the order in which THUDM/GLM adds them (GPT2BPETokenizer).
    names = (_SOP, _EOP, '[CLS]', '[MASK]', '[SEP]', '[UNK]', '[gMASK]', '[sMASK]')
    end = {_END: self._tokenizer.token_to_id(_END)}
    return end | {n: pieces + i for i, n in enumerate((*names, '[dBLOCK]'))}

  @classmethod
  def from_files(cls, vocab_json: str, merges_txt: str) -> BytePairVocabulary:
    """From the content of a vocab.json and a merges.txt."""
    merges = [
      tuple(line.split(' '))
      for line in merges_txt.split('\n')
      if line and not line.startswith('#version')
    ]
    try:
      tokenizer = Tokenizer(models.BPE(json.loads(vocab_json), merges))
    except Exception as error:  # the package raises bare Exceptions
      raise UserError(
        f'vocab.json and merges.txt must be of one vocabulary, got {error}; fetch both '
        'again.'
      ) from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return cls(tokenizer.to_str())

  def files(self) -> dict[str, bytes]:
    model = json.loads(self._json)['model']
    # Versions of the package write a merge as a pair or as one text.
    merges = [' '.join(m) if isinstance(m, list) else m for m in model['merges']]
    return {
      'vocab.json': json.dumps(model['vocab'], ensure_ascii=False).encode(),
      'merges.txt': ('#version: 0.2\n' + ''.join(f'{m}\n' for m in merges)).encode(),
    }


class RobertaVocabulary(BytePairVocabulary):
  """GPT-2's pairs with RoBERTa's ids: GLM-RoBERTa."""

  kind = 'roberta'

  def _control(self, pieces: int) -> dict[str, int]:
    # Several names share RoBERTa's </s>. GLM's tokens lie behind RoBERTa's own, with [MASK]
    # in the place of <mask>.
    first = 50264 if pieces > 50000 else pieces
    names = ('[MASK]', _SOP, _EOP, '[gMASK]', '[sMASK]', '[dBLOCK]')
    shared = {_END: 2, '[SEP]': 2, '[CLS]': 0, '[UNK]': 3}
    return shared | {name: first + i for i, name in enumerate(names)}


class CogVocabulary(SentencePieceVocabulary):
  """cog-pretrain: GLM-10B-Chinese, whose [gMASK] is its <|endofpiece|>."""

  kind = 'cog'
  restarts, decodes_whole = True, False
  # In the order of THUDM/GLM's ChineseSPTokenizer; the ids are those behind the model's.
  _names = (_END, '[SEP]', '[CLS]', '[MASK]', '[UNK]', '[UNUSED1]', _SOP, _EOP, '[sMASK]')
  _more = ('[dBLOCK]',)

  def __init__(self, model: bytes):
    names = (*self._names, *self._more)
    first = self._load(model, names)
    self.size = first + len(names)
    ids = {name: first + i for i, name in enumerate(names)}
    self.control = ids if '[gMASK]' in ids else {**ids, '[gMASK]': ids[_EOP]}
    end = ids[_END]
    self.specials = Specials.of(
      self.control, sop=_SOP, eop=_EOP, enc='[CLS]', dblock='[dBLOCK]', eos=end, pad=end
    )
    self.prefix, self.suffix = (ids['[CLS]'],), (ids[_END],)
    self.stops = (ids[_EOP], ids[_END])

  def files(self) -> dict[str, bytes]:
    return {'cog-pretrain.model': self.model}


class FixedCogVocabulary(CogVocabulary):
  """The same with `--fix-command-token`, as GLM-Large-Chinese: [gMASK] is its own."""

  kind = 'cog-fixed'
  _more = ('[gMASK]', '[dBLOCK]')


class IceVocabulary(SentencePieceVocabulary):
  """ice_text.model: ChatGLM-6B, and GLM-130B behind 20,000 ids of images.

  Attributes:
    images: ids before the text's.
  """

  kind = 'ice'
  # transformers 4.27, which it was published for, strips both sides of a mask.
  takes_space_behind, restarts = True, True
  _names = ('[MASK]', '[gMASK]', '[sMASK]', '<unused_0>', '<sop>', '<eop>', '<ENC>')
  _longest_blank = 80

  def __init__(self, model: bytes, images: int = 0):
    """
    Args:
      model: content of ice_text.model.
      images: ids before the text's: 0, or 20000 in GLM-130B and the first ChatGLM-6B.
    """
    self._original, self.images = model, images
    proto = spm_pb2.ModelProto()
    names = (*self._names, '<dBLOCK>')
    try:
      proto.ParseFromString(model)
      for piece in proto.pieces:
        # The released file holds some of them as pieces that a text can spell.
        if piece.piece in names:
          piece.type = CONTROL
      known = {piece.piece for piece in proto.pieces}
      model = proto.SerializeToString()
    except Exception:  # said below, with what a model must be
      known = set()
    # Those that the file lacks are added at its end, so that the ids have gaps.
    first = self._load(model, [name for name in names if name not in known])
    self.size = images + self._processor.vocab_size()
    self.fingerprint += f'+{images}' if images else ''
    ids = {name: images + self._processor.piece_to_id(name) for name in names}
    assert first, 'checked by _load'
    self.control = ids
    self.specials = Specials.of(
      ids, sop='<sop>', eop='<eop>', dblock='<dBLOCK>', eos=ids['<eop>'], pad=images + 3
    )
    self.prefix, self.suffix = (), ()
    self.stops = (ids['<eop>'],)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    ids = super().encode_batch([self._spell(text) for text in texts])
    return [self.images + row for row in ids]

  def _encode_inside(self, text: str) -> list[int]:
    return [self.images + t for t in super()._encode_inside(self._spell(text))]

  def _spell(self, text: str) -> str:
    """Line breaks, tabs and runs of spaces as pieces (tokenization_chatglm.py)."""
    text = text.replace('\n', '<n>').replace('\t', '<|tab|>')
    # Longest first: the other way round, every run would become pieces of two spaces.
    for length in range(self._longest_blank, 1, -1):
      text = text.replace(' ' * length, f'<|blank_{length}|>')
    return text

  def _decode(self, ids: list[int]) -> str:
    # Ids of images have no text.
    text = super()._decode([t - self.images for t in ids if t >= self.images])
    text = text.replace('<n>', '\n').replace('<|tab|>', '\t')
    for length in range(2, self._longest_blank + 1):
      text = text.replace(f'<|blank_{length}|>', ' ' * length)
    return text

  def _piece(self, token: int) -> str:
    return super()._piece(token - self.images) if token >= self.images else ''

  def to_dict(self) -> dict[str, Any]:
    model = base64.b64encode(self._original).decode()
    return {'kind': self.kind, 'model': model, 'images': self.images}

  @property
  def kind_in_files(self) -> str:
    return 'ice-130b' if self.images else 'ice'

  def files(self) -> dict[str, bytes]:
    return {'ice_text.model': self._original}


class ChatGLM2Vocabulary(SentencePieceVocabulary):
  """tokenizer.model with five control pieces behind it: ChatGLM2-6B."""

  kind = 'chatglm2'
  restarts, decodes_whole = True, False
  roles: tuple[str, ...] = ()

  def __init__(self, model: bytes):
    names = ('[MASK]', '[gMASK]', '[sMASK]', 'sop', 'eop', *self.roles)
    first = self._load(model, names)
    self.size = first + len(names)
    ids = {name: first + i for i, name in enumerate(names)}
    pieces = {'<s>': self._processor.bos_id(), '</s>': self._processor.eos_id()}
    if min(pieces.values()) < 0:
      raise UserError(
        'a ChatGLM2 vocabulary must have the pieces <s> and </s>, got a model without; '
        'give the tokenizer.model of ChatGLM2-6B or ChatGLM3-6B.'
      )
    self.control = {**pieces, **ids}
    self.specials = Specials.of(ids, sop='sop', eop='eop', eos=pieces['</s>'], pad=0)
    self.prefix, self.suffix = (ids['[gMASK]'], ids['sop']), ()
    self.stops = (pieces['</s>'],)

  def encode_marked(self, text: str, names: Sequence[str] = ()) -> list[int]:
    # 'sop' and 'eop' are words of a text, too; nobody means the pieces by them.
    bracketed = [name for name in self.control if not name.isalpha()]
    return super().encode_marked(text, names or bracketed)


class ChatGLM3Vocabulary(ChatGLM2Vocabulary):
  """The same with the roles of a chat, two of which end an answer: ChatGLM3-6B."""

  kind = 'chatglm3'
  roles = ROLES

  def __init__(self, model: bytes):
    super().__init__(model)
    self.stops += (self.control['<|user|>'], self.control['<|observation|>'])


class GLM4Vocabulary(TokenizersVocabulary):
  """tokenizer.json of GLM-4, or the tokenizer.model that its first releases have."""

  kind = 'glm4'
  # Its added tokens have `lstrip: false`.
  takes_space_before = False

  def __init__(self, tokenizer: str):
    super().__init__(tokenizer)
    self.control = {
      token.content: number
      for number, token in sorted(self._tokenizer.get_added_tokens_decoder().items())
    }
    required = ('[MASK]', '[gMASK]', '[sMASK]', '<sop>', '<eop>', _END, *ROLES)
    missing = [name for name in required if name not in self.control]
    if missing:
      raise UserError(
        f'a GLM-4 tokenizer.json must have the added tokens {required}, got one without '
        f'{missing}; give that of GLM-4-9B.'
      )
    self.size = max(
      self._tokenizer.get_vocab_size(with_added_tokens=True), 1 + max(self.control.values())
    )
    ids = self.control
    self.specials = Specials.of(ids, sop='<sop>', eop='<eop>', eos=ids[_END], pad=ids[_END])
    self.prefix, self.suffix = (ids['[gMASK]'], ids['<sop>']), ()
    self.stops = (ids[_END], ids['<|user|>'], ids['<|observation|>'])

  @classmethod
  def from_ranks(cls, content: bytes, added: Mapping[str, int]) -> GLM4Vocabulary:
    """From a tokenizer.model of tiktoken, see `glm_jax.text.ranks`."""
    return cls(ranks.to_json(content, added))

  def files(self) -> dict[str, bytes]:
    files = {'tokenizer.json': self._json.encode()}
    # GLM-4's own code reads this one.
    model = ranks.from_json(self._json)
    return files if model is None else {**files, 'tokenizer.model': model}


SENTENCEPIECE = {
  kind.kind: kind
  for kind in (
    SentencePieceVocabulary,
    CogVocabulary,
    FixedCogVocabulary,
    IceVocabulary,
    ChatGLM2Vocabulary,
    ChatGLM3Vocabulary,
  )
}
TOKENIZERS = {
  kind.kind: kind
  for kind in (BertVocabulary, BytePairVocabulary, RobertaVocabulary, GLM4Vocabulary)
}
