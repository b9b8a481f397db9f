"""A sentencepiece vocabulary as a fast tokenizer.json, which transformers and vLLM read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as spm_pb2
from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  processors,
)

from glm_jax.configs import UserError
from glm_jax.text.vocabulary import MASKS, SentencePieceVocabulary, Vocabulary

HOLD = '\ufdd0'
"""Behind the first character of a control piece's name, it makes a text of the name.

Names are looked for before a text is normalised, and this character is dropped then. It is
one that Unicode keeps for a program's own use.
"""


def fast_tokenizer(vocabulary: Vocabulary) -> Tokenizer | None:
  """A tokenizer.json of the same ids; None where `files` has one already.

  Raises:
    UserError: a sentencepiece model that is neither byte pairs nor unigram.
  """
  if not isinstance(vocabulary, SentencePieceVocabulary):
    return None
  proto = spm_pb2.ModelProto()
  proto.ParseFromString(vocabulary.model)
  # The model as it was published: control pieces are added below, as added tokens.
  pieces = [(piece.piece, piece.score) for piece in proto.pieces]
  ids = {piece: i for i, (piece, _) in enumerate(pieces)}
  kind = proto.trainer_spec.model_type
  unknown = pieces[proto.trainer_spec.unk_id][0]
  if kind == proto.trainer_spec.BPE:
    model = models.BPE(
      ids,
      _merges(ids, pieces),
      unk_token=unknown,
      # As sentencepiece: a run of unknown characters is one <unk>.
      fuse_unk=True,
      byte_fallback=proto.trainer_spec.byte_fallback,
    )
  elif kind == proto.trainer_spec.UNIGRAM:
    model = models.Unigram(
      pieces, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback
    )
  else:
    raise UserError(
      'a sentencepiece model must be byte pairs or unigram to be exported, got another '
      'kind; export it without --to=glm.'
    )
  # Normalisation, in sentencepiece's order: the compiled table of characters, spaces, the
  # space before a text, and the mark for every space.
  fast = Tokenizer(model)
  spec = proto.normalizer_spec
  steps: list[Any] = [normalizers.Replace(Regex(rf'(?<=[<\[]){HOLD}'), '')]
  if spec.precompiled_charsmap:
    steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
  if spec.remove_extra_whitespaces:
    # Spaces alone: `normalizers.Strip` would take line breaks at the ends, too.
    steps.append(normalizers.Replace(Regex(r'\A +| +\z'), ''))
    steps.append(normalizers.Replace(Regex(' {2,}'), ' '))
  if spec.add_dummy_prefix:
    steps.append(normalizers.Prepend('▁'))
  steps.append(normalizers.Replace(' ', '▁'))
  fast.normalizer = normalizers.Sequence(steps)
  # The way back: marks to spaces, byte pieces to characters, then the space before a text.
  undo = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  if spec.add_dummy_prefix:
    undo.append(decoders.Strip(' ', 1, 0))
  fast.decoder = decoders.Sequence(undo)
  # Pieces such as <s> are added tokens, too, so that decoding can skip them.
  special = proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id
  names = [pieces[i][0] for i in special if i >= 0]
  added = sorted((token, _name(name)) for name, token in vocabulary.control.items())
  names += [name for token, name in added if token >= len(pieces)]
  fast.add_special_tokens(
    [
      # As `encode_marked`: a mask swallows the space before it.
      AddedToken(name, special=True, normalized=False, lstrip=name in MASKS)
      for name in names
    ]
  )
  # A tokenizer numbers added tokens itself, in order behind its model: an id that differs
  # means that a name was in the model already.
  wrong = [name for token, name in added if fast.token_to_id(name) != token]
  if wrong:
    raise UserError(
      f'the control pieces of a vocabulary must not be pieces of its model, got {wrong} '
      'twice; export it without --to=glm.'
    )
  prefix = [_name(vocabulary.names[token]) for token in vocabulary.prefix]
  if prefix:
    # What the model expects before every text, [gMASK] and <sop> for ChatGLM2.
    fast.post_processor = processors.TemplateProcessing(
      single=[*prefix, '$A'],
      pair=[*prefix, '$A', '$B'],
      special_tokens=list(zip(prefix, vocabulary.prefix, strict=True)),
    )
  return fast


def _name(name: str) -> str:
  """<sop> for sop: a fast tokenizer finds its added tokens inside words, too."""
  return f'<{name}>' if name.isalpha() else name


def _merges(
  ids: Mapping[str, int], pieces: list[tuple[str, float]]
) -> list[tuple[str, str]]:
  """The pairs that a piece can be merged from, best first: scores are merge ranks."""
  merges = []
  for piece, score in pieces:
    # sentencepiece keeps pieces and scores, not merges: any cut into two known pieces may
    # have been the merge.
    pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
    known = [(a, b) for a, b in pairs if a in ids and b in ids]
    merges += [
      (score, a, b) for a, b in sorted(known, key=lambda p: (ids[p[0]], ids[p[1]]))
    ]
  # The sort is stable: equal scores stay in the order of ids.
  return [(a, b) for _, a, b in sorted(merges, key=lambda m: -m[0])]
