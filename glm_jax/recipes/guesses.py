"""How well held-out blanks are guessed, in numbers that a person understands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from glm_jax.batch import Batch
from glm_jax.data.baselines import NGrams, ranks_of
from glm_jax.inference.forward import Forward
from glm_jax.text.vocabulary import Vocabulary

CANDIDATES = 4
"""The blank's own words, and those of others."""
# Blanks of which words are told from others: the standard error of a share is 2 points.
CHOICES = 512
TOP = (1, 5)
"""Among how many of the likeliest tokens the first one of a blank is looked for."""


class Blank(NamedTuple):
  """A blank of a batch.

  Attributes:
    row: of the batch.
    start: position of its [sop] in Part B.
    ids: what was there, without [eop].
    left: token before its mask; padding if there is none.
    right: token behind it; -1 if there is none.
  """

  row: int
  start: int
  ids: tuple[int, ...]
  left: int
  right: int


def blanks(batch: Batch, specials: Any) -> list[Blank]:
  """The blanks of a batch that end in [eop], row by row, as they stand in Part B.

  Args:
    batch: numpy arrays [B, T].
    specials: of the vocabulary.
  """
  visible = part_a(batch)
  made = []
  for row, tokens in enumerate(batch.tokens):
    scored = batch.loss_weights[row] > 0
    starts = np.flatnonzero((tokens == specials.sop) & scored)
    ends = np.flatnonzero((batch.targets[row] == specials.eop) & scored)
    masks = np.flatnonzero((tokens == specials.mask) & visible[row])
    # Of a document's end no [eop] is predicted, and its rows are of another objective.
    if not len(starts) == len(ends) == len(masks):
      continue
    # Part B is shuffled: first positions say whose mask is whose, document by document.
    place = np.lexsort((batch.positions[row, starts], batch.key_start[row, starts]))
    mask_of = np.empty_like(masks)
    mask_of[place] = masks
    for start, end, mask in zip(starts, ends, mask_of, strict=True):
      behind = mask + 1 < len(tokens) and visible[row, mask + 1]
      right = int(tokens[mask + 1]) if behind else -1
      # No pair with padding is ever counted: at the beginning of a text, nothing is known.
      inside = mask > batch.key_start[row, mask]
      left = int(tokens[mask - 1]) if inside else specials.pad
      ids = tuple(batch.targets[row, start:end].tolist())
      made.append(Blank(row, int(start), ids, left, right))
  return made


def part_a(batch: Batch) -> np.ndarray:
  """[B, T] bool: the positions of Part A, whose every token sees all of it."""
  # What a document's first token sees is its Part A.
  opens = np.take_along_axis(batch.key_end, batch.key_start, axis=1)
  return np.arange(batch.tokens.shape[1]) < opens


def text_pairs(batches: Iterable[Batch], specials: Any) -> tuple[np.ndarray, np.ndarray]:
  """Neighbours in the text that is left in Part A, [n] int64 each."""
  parts = [np.zeros((2, 0), np.int64)]
  for batch in batches:
    text = part_a(batch) & (batch.tokens != specials.mask)
    both = text[:, :-1] & text[:, 1:]
    both &= batch.key_start[:, :-1] == batch.key_start[:, 1:]
    pairs = np.stack([batch.tokens[:, :-1][both], batch.tokens[:, 1:][both]])
    parts.append(pairs.astype(np.int64))
  before, behind = np.concatenate(parts, axis=1)
  return before, behind


def choices(
  blanks: Sequence[Blank], count: int, seed: int = 0
) -> list[tuple[int, list[tuple[int, ...]]]]:
  """Blanks that are asked for, and what is offered: its own words first, then others'.

  Args:
    blanks: to choose from, in any rows.
    count: most that are asked for.
    seed: of what is chosen.

  Returns:
    (number of a blank, `CANDIDATES` different sequences of as many tokens); blanks of a
    length that too few others have are left out.
  """
  rng = np.random.default_rng(seed)
  kinds: dict[int, list[tuple[int, ...]]] = {}
  for blank in blanks:
    kinds.setdefault(len(blank.ids), []).append(blank.ids)
  kinds = {size: sorted(set(ids)) for size, ids in kinds.items()}
  made = []
  for number in rng.permutation(len(blanks)):
    own = blanks[number].ids
    others = [ids for ids in kinds[len(own)] if ids != own]
    if len(others) < CANDIDATES - 1:
      continue
    drawn = rng.choice(len(others), CANDIDATES - 1, replace=False)
    made.append((int(number), [own, *(others[i] for i in drawn)]))
    if len(made) == count:
      break
  return made


def with_words(batch: Batch, blank: Blank, ids: Sequence[int]) -> Batch:
  """A row [1, T] of a batch, with other words, as many, in a blank."""
  row = Batch(*(None if x is None else x[blank.row : blank.row + 1].copy() for x in batch))
  row.tokens[0, blank.start + 1 : blank.start + 1 + len(ids)] = ids
  row.targets[0, blank.start : blank.start + len(ids)] = ids
  return row


def guesses(
  forward: Forward,
  validation: Sequence[Batch],
  train: Iterable[Batch],
  vocabulary: Vocabulary,
) -> dict[str, Any]:
  """What a model makes of held-out blanks, beside what pairs of tokens tell.

  A bigram guesses from left to right, from the token before the mask on. Which words were
  there, it also tells 'both ways', by the pair that the last of them makes with the token
  behind the mask, too. All is counted in the text that Part A of the training rows shows.

  Args:
    forward: the model.
    validation: batches of the blank objective.
    train: batches of it to count pairs in.
    vocabulary: of the tokens.

  Returns:
    {'blanks': how many, 'top 1', 'top 5' and 'of 4': {'model', 'bigram', 'unigram',
    'chance'} shares, of the last also 'both ways', 'loss': {'text', '[eop]'} in nats a
    token}; {} without blanks.
  """
  specials = vocabulary.specials
  found = [(batch, blanks(batch, specials)) for batch in validation]
  all_blanks = [(batch, blank) for batch, each in found for blank in each]
  before, behind = text_pairs(train, specials)
  if not all_blanks or not len(before):
    return {}
  counted = NGrams(before, behind, vocabulary.size)
  first = np.array([blank.ids[0] for _, blank in all_blanks])
  left = np.array([blank.left for _, blank in all_blanks])
  losses, model_ranks = _said(forward, found)
  ranks = {
    'model': np.array(model_ranks),
    'bigram': counted.ranks(left, first),
    'unigram': ranks_of(counted.unigram, first),
  }
  made: dict[str, Any] = {'blanks': len(first), 'loss': losses}
  for top in TOP:
    shares = {name: float(np.mean(rank < top)) for name, rank in ranks.items()}
    made[f'top {top}'] = {**shares, 'chance': top / vocabulary.size}

  asked = choices([blank for _, blank in all_blanks], CHOICES)
  offered = [(*all_blanks[number], ids) for number, each in asked for ids in each]
  scores = {
    'model': _span_scores(forward, offered),
    'bigram': [_pair_score(counted, blank.left, ids) for _, blank, ids in offered],
    'both ways': [
      _pair_score(counted, blank.left, ids, blank.right) for _, blank, ids in offered
    ],
    'unigram': [np.log(counted.unigram[[*ids]]).sum() for *_, ids in offered],
  }
  made['of 4'] = {name: _share_right(each) for name, each in scores.items()}
  made['of 4'] |= {'chance': 1 / CANDIDATES}
  return made


def _said(
  forward: Forward, found: Iterable[tuple[Batch, Sequence[Blank]]]
) -> tuple[dict[str, float], list[int]]:
  """Mean losses of blanks and of what ends them, and ranks of their first tokens."""
  text, ends, ranks = [], [], []
  for batch, blanks in found:
    log_probs, rank = forward.compared(batch)
    for row, start, ids, *_ in blanks:
      text.append(log_probs[row, start : start + len(ids)])
      ends.append(log_probs[row, start + len(ids)])
      ranks.append(int(rank[row, start]))
  return {
    'text': -float(np.concatenate(text).mean()),
    '[eop]': -float(np.mean(ends)),
  }, ranks


def _span_scores(
  forward: Forward, offered: Iterable[tuple[Batch, Blank, Sequence[int]]]
) -> list[float]:
  """The model's log-probability of each sequence as all that the blank hides."""
  rows = [with_words(*each) for each in offered]
  joined = Batch(
    *(None if x[0] is None else np.concatenate(x) for x in zip(*rows, strict=True))
  )
  log_probs, _ = forward.compared(joined)
  return [
    float(log_probs[i, blank.start : blank.start + len(ids) + 1].sum())
    for i, (_, blank, ids) in enumerate(offered)
  ]


def _pair_score(counted: NGrams, left: int, ids: Sequence[int], right: int = -1) -> float:
  """The bigram's log-probability of a sequence behind a token, and before one."""
  line = np.array([left, *ids] + [right] * (right >= 0))
  return float(np.log(counted.bigram(line[:-1], line[1:])).sum())


def _share_right(scores: Sequence[float]) -> float:
  """How often the first of `CANDIDATES` is the best; a tie is as good as a draw.

  Example:
    >>> _share_right([2.0, 1.0, 1.0, 0.0] + [1.0, 1.0, 0.0, 0.0])
    0.75
  """
  of_each = np.reshape(scores, (-1, CANDIDATES))
  best = of_each == of_each.max(1, keepdims=True)
  return float(np.mean(best[:, 0] / best.sum(1)))


def table(made: dict[str, Any]) -> list[str]:
  """The same for a person, a line each.

  Args:
    made: see `guesses`.

  Example:
    >>> shares = {'model': 0.5, 'bigram': 0.4, 'unigram': 0.3, 'chance': 0.25}
    >>> tops = {'top 1': shares, 'top 5': shares, 'of 4': shares | {'both ways': 0.45}}
    >>> lines = table({'blanks': 9, 'loss': {'text': 3.0, '[eop]': 1.0}, **tops})
    >>> print('\\n'.join(lines[1:3]))
    9 held-out blanks          model  bigram  unigram  chance
    the first token            50.0%   40.0%    30.0%  25.00%
  """
  if not made:
    return []
  columns = ('model', 'bigram', 'unigram', 'chance')
  named = {
    'top 1': 'the first token',
    'top 5': 'among the 5 likeliest',
    'of 4': f'which of {CANDIDATES} words',
  }
  head = f'{made["blanks"]:,} held-out blanks'
  lines = ['', f'{head:<24}{"model":>8}{"bigram":>8}{"unigram":>9}{"chance":>8}']
  for key, name in named.items():
    model, bigram, unigram, chance = (made[key][column] for column in columns)
    lines.append(f'{name:<24}{model:>8.1%}{bigram:>8.1%}{unigram:>9.1%}{chance:>8.2%}')
  lines.append(f'{"  by pairs on both sides":<24}{"":>8}{made["of 4"]["both ways"]:>8.1%}')
  losses = '  '.join(f'{name} {value:.3f}' for name, value in made['loss'].items())
  return [*lines, f'loss of their tokens: {losses}']
