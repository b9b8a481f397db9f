"""What a prefix model is asked: a text with a blank, and the answer that fills it.

GLM and ChatGLM-6B read a prompt with a mask in it, Part A, and write behind `[sop]` what
belongs in its place, Part B (GLM paper, section 2.1; THUDM/GLM tasks/seq2seq/dataset.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from glm_jax.configs import check
from glm_jax.text.vocabulary import MASKS, Vocabulary

PROMPT = '{prompt}'
"""The prompt in a pattern such as '{prompt}[gMASK]' or '[sMASK] Content: {prompt}'."""


def masks(vocabulary: Vocabulary) -> list[str]:
  """Names of the masks that a vocabulary has."""
  return [name for name in MASKS if vocabulary.control.get(name) is not None]


def around(vocabulary: Vocabulary, ids: Sequence[int]) -> list[int]:
  """Part A of the ids of a text with masks: with what opens it, and what follows it.

  Nothing follows a [gMASK] at the end, which is a text to be continued.
  """
  ids = [*vocabulary.prefix, *ids]
  return ids if ids[-1] == vocabulary.specials.gmask else [*ids, *vocabulary.suffix]


def encode_answer(
  vocabulary: Vocabulary, answer: str, before: str, *, inside: bool
) -> list[int]:
  """Ids of what fills a blank, as text in its place.

  The space that a mask has swallowed is the answer's, unless it brings its own.

  Args:
    vocabulary: of the tokens.
    answer: the text.
    before: the text before the blank.
    inside: something stands before the answer.
  """
  own_space = answer[0].isspace() or not vocabulary.takes_space_before
  space = '' if own_space else before[len(before.rstrip()) :]
  return (vocabulary.encode_inside if inside else vocabulary.encode)(space + answer)


def check_pattern(pattern: str) -> None:
  """Raises UserError for what is no pattern of a prompt, with at most one blank in it."""
  check(
    pattern.count(PROMPT) == 1 and sum(pattern.count(name) for name in MASKS) <= 1,
    f'a prompt must be written as {PROMPT}, with one of {(*MASKS,)} or, where prompts have '
    'a blank of their own, with none',
    repr(pattern),
    "write such as '{prompt}[gMASK]'",
  )


def encode_pair(
  vocabulary: Vocabulary, pattern: str, prompt: str, answer: str, longest: int
) -> tuple[list[int], int, int]:
  """A pair as a document: Part A, `[sop]`, the answer, `[eop]`.

  Of a prompt that makes it longer than `longest`, what is farthest from the mask is left
  out: its beginning before a mask, its end behind one.

  Args:
    vocabulary: of the tokens.
    pattern: see `check_pattern`.
    prompt: of the pair.
    answer: of the pair.
    longest: tokens that there is room for.

  Returns:
    Ids, how many of them carry no loss, and how many of the prompt were left out.

  Raises:
    UserError: not one blank.
  """
  names = masks(vocabulary)
  front, rear = pattern.split(PROMPT)
  text = front + prompt + rear
  found = [name for name in names for _ in range(text.count(name))]
  check(
    len(found) == 1,
    f'a prompt must have one blank, of {names}, where it is written as {pattern!r}',
    f'{len(found)} in {text!r:.80}',
    'mark one, or leave names of masks out of the prompts',
  )
  body = vocabulary.encode_marked(text, names)
  [place] = [i for i, token in enumerate(body) if token == vocabulary.control[found[0]]]
  before = text.partition(found[0])[0]
  ids = encode_answer(vocabulary, answer, before, inside=bool(before.strip()))
  part_b = [vocabulary.specials.sop, *ids, vocabulary.specials.eop]
  excess = max(0, len(around(vocabulary, body)) + len(part_b) - longest)
  if found[0] in front:
    first = len(body) - len(vocabulary.encode_inside(rear)) * bool(rear) - excess
    fits = first > place + 1
  else:
    first = len(vocabulary.encode_marked(front, names)) * bool(front)
    fits = first + excess < place
  if excess and fits:
    del body[first : first + excess]
  part_a = around(vocabulary, body)
  return [*part_a, *part_b], len(part_a) + 1, excess if fits else 0
