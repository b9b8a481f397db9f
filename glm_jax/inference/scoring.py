"""Given texts as rows, for one forward: what a model would say at each place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from glm_jax import configs
from glm_jax.batch import DTYPES, OBJECTIVES, Batch
from glm_jax.inference import prompts
from glm_jax.inference.request import Request, check_context
from glm_jax.text.vocabulary import Vocabulary


class Row(NamedTuple):
  """A context and spans behind it, as in training; lists of as many numbers as tokens.

  Attributes:
    tokens: the model's input.
    targets: what each position predicts: behind a span's last token, that it ends.
    scored: whether a position predicts a token of a span, or its end.
    positions: first positions.
    blocks: second positions.
    context: tokens that all see each other (Part A); 0 for a causal model.
  """

  tokens: list[int]
  targets: list[int]
  scored: list[bool]
  positions: list[int]
  blocks: list[int]
  context: int


def lay_out(
  config: Any, vocabulary: Vocabulary, request: Request, spans: Sequence[Sequence[int]]
) -> Row:
  """A request with its spans as they might be generated.

  Args:
    config: of the model.
    vocabulary: that it was trained with.
    request: see `prompts.request`.
    spans: token ids of the first of its spans; the others are left out.
  """
  n, s = len(request.context), vocabulary.specials
  end = s.eos if config.causal else s.eop
  tokens, targets = [*request.context], [s.pad] * n
  if config.causal:
    targets = [*tokens, request.spans[0].first][1:]
  scored, positions, blocks = [False] * n, [*range(n)], [0] * n
  for span, ids in zip(request.spans, spans, strict=False):
    first = len(tokens) if span.position is None else span.position
    count = len(ids) + 1
    tokens += [span.first, *ids]
    targets += [*ids, end]
    scored += [True] * count
    positions += [first + span.stride * i for i in range(count)]
    blocks += [0] * count if config.causal else range(1, count + 1)
  return Row(tokens, targets, scored, positions, blocks, 0 if config.causal else n)


def of_texts(
  config: Any,
  vocabulary: Vocabulary,
  texts: Sequence[str],
  answers: Sequence[Sequence[str]] | None,
) -> Batch:
  """Texts and what fills their blanks; without it, the first blank alone is opened.

  Args:
    config: of the model.
    vocabulary: that it was trained with.
    texts: at least one, with or without blanks.
    answers: of each text, a text a blank.
  """
  made = []
  for i, text in enumerate(texts):
    ids = prompts.encode(config, vocabulary, text, bare=answers is None)
    spans = [[]]
    if answers is not None:
      spans = prompts.encode_answers(config, vocabulary, text, answers[i])
    request = prompts.request(config, vocabulary, 0, ids)
    made.append(lay_out(config, vocabulary, request, spans))
    check_context(config, len(made[-1].tokens) * config.causal)
  objective = 'causal' if config.causal else 'blank'
  return batch(made, objective, vocabulary.specials.pad)


def document(config: Any, vocabulary: Vocabulary, text: str) -> list[int]:
  """Token ids of a text as it is trained on, where names of masks are text."""
  configs.check(bool(text), 'a document must hold some text', repr(text), 'give a text')
  ids = [*vocabulary.prefix, *vocabulary.encode(text), vocabulary.specials.eos]
  check_context(config, len(ids) - config.causal)
  return ids


def documents(config: Any, vocabulary: Vocabulary, texts: Sequence[str]) -> Batch:
  """Texts of a causal model: all of each is scored, and its end."""
  opens, made = max(1, len(vocabulary.prefix)), []
  for text in texts:
    *ids, _ = document(config, vocabulary, text)
    begins = prompts.request(config, vocabulary, 0, ids[:opens])
    made.append(lay_out(config, vocabulary, begins, [ids[opens:]]))
  return batch(made, 'causal', vocabulary.specials.pad)


def batch(rows: Sequence[Row], objective: str, pad: int) -> Batch:
  """Rows as a batch of arrays, as long as the longest.

  Args:
    rows: at least one.
    objective: of `glm_jax.batch.OBJECTIVES`.
    pad: id of the token that fills rows up.
  """
  T = max(len(row.tokens) for row in rows)
  t = np.arange(T)
  length = np.array([len(row.tokens) for row in rows])[:, None]
  context = np.array([row.context for row in rows])[:, None]

  def filled(lists: Sequence[Sequence[Any]], fill: int = 0) -> np.ndarray:
    return np.array([[*x, *[fill] * (T - len(x))] for x in lists])

  made = Batch(
    tokens=filled([row.tokens for row in rows], pad),
    targets=filled([row.targets for row in rows], pad),
    loss_weights=filled([row.scored for row in rows]),
    positions=filled([row.positions for row in rows]),
    block_positions=filled([row.blocks for row in rows]),
    key_start=np.zeros((len(rows), T)),
    key_end=np.where(t < length, np.maximum(context, t + 1), 0),
    objective=np.full((len(rows), T), OBJECTIVES.index(objective)),
    index=np.arange(len(rows)),
  )
  return Batch(*(x.astype(dtype) for x, dtype in zip(made, DTYPES, strict=True)))


def padded(rows: Batch, count: int, length: int) -> Batch:
  """A batch of more rows, or longer ones, which see nothing and count for nothing."""
  B, T = rows.tokens.shape
  arrays = [np.pad(x, [(0, count - B), (0, length - T)]) for x in rows[:-1]]
  return Batch(*arrays)
