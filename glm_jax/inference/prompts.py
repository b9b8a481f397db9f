"""From a prompt's text to what a model reads, and where it generates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from glm_jax import configs
from glm_jax.inference.request import Request, Span, check_context
from glm_jax.text import asking
from glm_jax.text.vocabulary import Vocabulary


def encode(
  config: Any, vocabulary: Vocabulary, prompt: str, gmask: bool = False, bare: bool = False
) -> list[int]:
  """`[ENC] text <eos>`, with '[MASK]', '[sMASK]' and '[gMASK]' spelt out.

  Space around a mask is the vocabulary's (see `Vocabulary.encode_marked`). What stands
  around the text is the vocabulary's `prefix` and `suffix`. A causal model always goes on
  with a text, and a mask is text to it.

  Args:
    config: of the model.
    vocabulary: that it was trained with.
    prompt: the text.
    gmask: it is to be continued: `[gMASK]` follows it and there is no <eos>.
    bare: a text without a blank is fine.

  Raises:
    UserError: nothing to fill, an empty text, one that is not UTF-8, or one that the model
      has no positions for.
  """
  # An argument that is not UTF-8 reaches Python with its bytes as lone surrogates.
  configs.check(
    not any('\ud800' <= c <= '\udfff' for c in prompt),
    'the prompt must be UTF-8 text',
    repr(prompt),
    'save or type it as UTF-8',
  )
  v, s = vocabulary, vocabulary.specials
  goes_on = gmask and not config.causal
  configs.check(
    not goes_on or s.gmask is not None,
    'the vocabulary must have [gMASK] to continue a text',
    v.kind,
    'mark a blank with [MASK]',
  )
  known = _masks(config, v)
  ids = v.encode_marked(prompt, [*known]) if known else v.encode(prompt)
  configs.check(bool(ids), 'the prompt must hold some text', repr(prompt), 'give a text')
  if goes_on:
    # Encoded with its mask: the space before one is not always the text's.
    ids = v.encode_marked(prompt + '[gMASK]', [*known])
  configs.check(
    bare or config.causal or bool(blanks(v, ids)),
    'the prompt must hold a blank: [MASK], [sMASK] or [gMASK]',
    repr(prompt),
    'mark one, or continue the text with --gmask',
  )
  ids = [*v.prefix, *ids] if config.causal else asking.around(v, ids)
  check_context(config, len(ids) - config.causal)
  return ids


def encode_answers(
  config: Any, vocabulary: Vocabulary, prompt: str, answers: Sequence[str]
) -> list[list[int]]:
  """Token ids of texts for a prompt's blanks, or of the one that goes on with it.

  They are encoded as text in their place: the space that a mask has swallowed is the
  answer's, unless it brings its own. What goes on with a text is taken as it stands.

  Args:
    config: of the model.
    vocabulary: that it was trained with.
    prompt: the text.
    answers: one a blank, in their order; of a causal model, one.

  Raises:
    UserError: not as many as there are blanks, or an empty one.
  """
  v, known = vocabulary, _masks(config, vocabulary)
  places = '|'.join(map(re.escape, known))
  before = re.split(places, prompt)[:-1] if known else [prompt]
  configs.check(
    len(answers) == len(before),
    f'a prompt of {len(before)} blank(s) must have as many answers',
    str(len(answers)),
    'give a text for each blank',
  )
  encoded = []
  for i, (text, answer) in enumerate(zip(before, answers, strict=True)):
    configs.check(bool(answer), 'an answer must hold some text', repr(answer), 'give one')
    # Without a mask, the space before an answer stays in the text.
    before = text if known else text.rstrip()
    inside = i > 0 or bool(text.strip())
    encoded.append(asking.encode_answer(v, answer, before, inside=inside))
  return encoded


def request(
  config: Any, vocabulary: Vocabulary, number: int, ids: Sequence[int]
) -> Request:
  """What the engine is asked for the ids of a prompt.

  Args:
    config: of the model.
    vocabulary: that it was trained with.
    number: of the request.
    ids: as `encode` gives them.
  """
  s = vocabulary.specials
  if config.causal:
    # It generates from the last token of its prompt.
    spans = [Span(first=ids[-1], position=None, stride=1)]
    return Request(number=number, context=ids[:-1], spans=spans)
  spans = []
  for position in blanks(vocabulary, ids):
    # Without block positions, positions go on after [gMASK].
    goes_on = not config.two_positions and ids[position] == s.gmask
    spans.append(
      Span(first=s.sop, position=None if goes_on else position, stride=int(goes_on))
    )
  return Request(number=number, context=ids, spans=spans)


def allowed(config: Any, vocabulary: Vocabulary, barred: str = '') -> np.ndarray:
  """[V] bool: tokens that a model may generate.

  Args:
    config: of the model.
    vocabulary: that it was trained with.
    barred: a text that no token may hold; '' for none.
  """
  # Rows of the table behind the vocabulary's pieces are never trained on. Of the special
  # pieces, a span of GLM has none but a stop token.
  can = np.arange(config.vocab_size) < vocabulary.size
  if not config.causal:
    can[list(vocabulary.names)] = False
    can[list(vocabulary.stops)] = True
  if barred:
    can[[i for i in np.flatnonzero(can) if barred in vocabulary.decode([int(i)])]] = False
  return can


def blanks(vocabulary: Vocabulary, ids: Sequence[int]) -> list[int]:
  """Positions of the masks."""
  s = vocabulary.specials
  return [i for i, t in enumerate(ids) if t in (s.mask, s.gmask, s.smask)]


def _masks(config: Any, vocabulary: Vocabulary) -> dict[str, int]:
  """The masks that a prompt may hold, by name."""
  s = vocabulary.specials
  masks = {'[MASK]': s.mask, '[sMASK]': s.smask, '[gMASK]': s.gmask}
  return {} if config.causal else {k: t for k, t in masks.items() if t is not None}
