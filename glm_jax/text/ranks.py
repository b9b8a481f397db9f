"""GLM-4's tokenizer.model as a tokenizer.json, and back.

The file is tiktoken's: a line for each piece, its bytes in base64 and its rank, which is
its id. tiktoken joins the neighbours whose joined bytes have the lowest rank, until none
have one; a tokenizer.json lists such pairs, best first.
"""

from __future__ import annotations

import base64
import functools
import json
import re
from collections.abc import Mapping

from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  pre_tokenizers,
  processors,
)

from glm_jax.configs import UserError

# tokenization_chatglm.py of GLM-4-9B: words, at most three digits, marks, line breaks and
# spaces are pieces on their own, and merged inside alone.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
# The control pieces that it puts behind the ranks, in this order.
_CONTROL = (
  '<|endoftext|>',
  *('[MASK]', '[gMASK]', '[sMASK]', '<sop>', '<eop>'),
  *('<|system|>', '<|user|>', '<|assistant|>', '<|observation|>'),
  *('<|begin_of_image|>', '<|end_of_image|>', '<|begin_of_video|>', '<|end_of_video|>'),
)
_LINE = re.compile(rb'([A-Za-z0-9+/]+=*) (\d{1,9})')


def is_ranks(content: bytes) -> bool:
  """Whether a file begins as one of these; sentencepiece's have the same name."""
  return _LINE.fullmatch(content[:200].split(b'\n')[0].strip()) is not None


def to_json(content: bytes, added: Mapping[str, int]) -> str:
  """A tokenizer.json that gives tiktoken's ids.

  Args:
    content: of a tokenizer.model of tiktoken.
    added: ids of control pieces by name; none of them are those of GLM-4-9B.

  Raises:
    UserError: lines that are no ranks, or ids that do not follow them.
  """
  ranks: dict[bytes, int] = {}
  for number, line in enumerate(content.splitlines(), 1):
    found = _LINE.fullmatch(line.strip())
    if line.strip() and found is None:
      raise UserError(
        "a line of tiktoken's tokenizer.model must be a piece in base64 and its rank, got "
        f'{line[:40]!r} in line {number}; fetch the file again.'
      )
    if found:
      ranks[base64.b64decode(found[1] + b'==')] = int(found[2])
  if sorted(ranks.values()) != [*range(len(ranks))] or any(
    bytes([byte]) not in ranks for byte in range(256)
  ):
    raise UserError(
      "tiktoken's tokenizer.model must rank every byte, and its pieces 0, 1, 2, ..., got "
      f'{len(ranks)} pieces that are not so; fetch the file again.'
    )
  names = {piece: ''.join(_names()[byte] for byte in piece) for piece in ranks}
  merges = []
  for piece, rank in ranks.items():
    # Every cut into two pieces may be how its bytes meet; commoner halves come first.
    cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
    pairs = [(ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
    merges += [(rank, names[a], names[b]) for *_, a, b in sorted(pairs)]
  merges.sort(key=lambda merge: merge[0])
  ids = {names[piece]: rank for piece, rank in ranks.items()}
  # A word that is a piece is that piece, even where no merges lead to it.
  model = models.BPE(ids, [(a, b) for _, a, b in merges], ignore_merges=True)
  tokenizer = Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_WORDS), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  added = added or {name: len(ranks) + i for i, name in enumerate(_CONTROL)}
  tokenizer.add_special_tokens(
    [
      AddedToken(name, special=True, normalized=False)
      for name in sorted(added, key=added.get)
    ]
  )
  # A tokenizer numbers added pieces itself, in order behind its ranks.
  wrong = [name for name, token in added.items() if tokenizer.token_to_id(name) != token]
  if wrong:
    raise UserError(
      f'added tokens must be numbered from {len(ranks)} on, behind the ranks, got '
      f'{ {name: added[name] for name in wrong[:3]} }; fetch tokenizer_config.json again.'
    )
  if '[gMASK]' in added and '<sop>' in added:
    tokenizer.post_processor = processors.TemplateProcessing(
      single=['[gMASK]', '<sop>', '$A'],
      pair=['[gMASK]', '<sop>', '$A', '$B'],
      special_tokens=[(name, added[name]) for name in ('[gMASK]', '<sop>')],
    )
  return tokenizer.to_str()


def from_json(tokenizer: str) -> bytes | None:
  """The tokenizer.model of a tokenizer.json; None for one that ranks could not give."""
  content = json.loads(tokenizer)
  model = content['model']
  if model['type'] != 'BPE' or model.get('continuing_subword_prefix'):
    return None
  ids, bytes_of = model['vocab'], {name: byte for byte, name in _names().items()}
  pieces = sorted(ids, key=ids.get)
  merges = [m if isinstance(m, list) else m.split(' ') for m in model['merges']]
  order = [ids[''.join(merge)] for merge in merges]
  if (
    order != sorted(order)
    or [ids[piece] for piece in pieces] != [*range(len(ids))]
    or any(token['content'] in ids for token in content['added_tokens'])
    or not all({*piece} <= {*bytes_of} for piece in pieces)
  ):
    return None
  lines = [
    b'%s %d\n' % (base64.b64encode(bytes(bytes_of[char] for char in piece)), rank)
    for rank, piece in enumerate(pieces)
  ]
  return b''.join(lines)


@functools.cache
def _names() -> dict[int, str]:
  """The character that a tokenizer.json has for each byte, as GPT-2's encoder.py."""
  # Those that can be seen stand for themselves, the others follow behind the first 256.
  seen = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), 173), *range(ord('®'), 256)]
  others = [byte for byte in range(256) if byte not in seen]
  return {**{b: chr(b) for b in seen}, **{b: chr(256 + i) for i, b in enumerate(others)}}
