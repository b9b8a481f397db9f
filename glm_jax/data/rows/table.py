"""Documents to rows of tokens of one length: what the stream of examples indexes.

Every document becomes `prefix prompt text <eos>`, where the prefix is the vocabulary's:
[ENC], or [gMASK] sop, or nothing. There are two ways to make rows of them:

- one stream, cut into rows: documents follow each other, and a row that begins inside a
  document opens with a prefix of its own. Every token is in exactly one row, all are full.
- packed: a row holds whole documents, each to become an example of its own. What does
  not fit in a row at all is cut into parts that fill one, and a last one that is packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

_GROW = 1024  # rows
_LEAST_PART = 16  # of the longest part, the share that a document's last one has at least

Encoded = tuple[np.ndarray, np.ndarray]
"""Ids of a document's prompt, which carries no loss, and of its text."""


@dataclasses.dataclass(frozen=True)
class RowPlan:
  """How documents become rows.

  Attributes:
    row_length: N, the most tokens that a row holds.
    positions: of a packed row when its documents have become examples; 0 for a stream.
    room: of a packed row: positions that a document of n tokens is given, by n; its
      length is one more than the longest document that fits.
  """

  row_length: int
  positions: int = 0
  room: tuple[int, ...] = ()

  @property
  def packed(self) -> bool:
    return self.positions > 0

  @property
  def longest(self) -> int:
    """Tokens of the longest document in a packed row."""
    return len(self.room) - 1


class RowTable(NamedTuple):
  """Rows of N tokens in memory.

  Attributes:
    tokens: [n, N] int32.
    scored: [n, N] bool, tokens that may carry loss: text and <eos>, not prompts.
    starts: [n, N] bool, where a document, or a part of one, begins.
    lengths: [n] int32; what follows is padding.
  """

  tokens: np.ndarray
  scored: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray


def make_rows(
  documents: Iterable[Encoded], prefix: tuple[int, ...], eos: int, plan: RowPlan
) -> RowTable:
  """Rows of documents as planned.

  Args:
    documents: in order.
    prefix: opens every document.
    eos: ends it.
    plan: how.
  """
  if plan.packed:
    return packed_rows(documents, prefix, eos, plan)
  return stream_rows(documents, prefix, eos, plan.row_length)


def stream_rows(
  documents: Iterable[Encoded], prefix: tuple[int, ...], eos: int, row_length: int
) -> RowTable:
  """One stream of all documents, cut into rows.

  Example:
    >>> rows = stream_rows([([], [5, 6, 7, 8]), ([], [9])], (1,), 2, 4)
    >>> rows.tokens.tolist()
    [[1, 5, 6, 7], [1, 8, 2, 0], [1, 9, 2, 0]]
  """
  table = _Table(row_length)
  opening = np.array(prefix, np.int32)
  at = row_length  # of the row being filled; a full one is followed by the next
  for prompt, text in documents:
    tokens = np.concatenate([opening, prompt, text, [eos]]).astype(np.int32)
    unscored = len(opening) + len(prompt)
    # A row may not end with a prefix that has nothing behind it.
    if at >= row_length - len(opening):
      at = table.new()
    done = 0
    while done < len(tokens):
      if at == row_length:
        at = table.new()
        if done:
          at = table.add(at, opening, len(opening), starts=True)
      part = tokens[done : done + row_length - at]
      starts = done == 0 or at == 0
      at = table.add(at, part, max(0, unscored - done), starts=starts)
      done += len(part)
  return table.finish()


def packed_rows(
  documents: Iterable[Encoded], prefix: tuple[int, ...], eos: int, plan: RowPlan
) -> RowTable:
  """Whole documents, several a row, by best fit: the largest first.

  Example:
    >>> plan = RowPlan(row_length=6, positions=6, room=(0, 1, 2, 3, 4, 5, 6))
    >>> documents = [([], [5, 6]), ([], [7]), ([], [8, 9, 8, 9])]
    >>> packed_rows(documents, (), 2, plan).tokens.tolist()
    [[8, 9, 8, 9, 2, 0], [5, 6, 2, 7, 2, 0]]
  """
  pieces = [
    piece
    for prompt, text in documents
    for piece in _cut(np.asarray(prompt), np.asarray(text), prefix, eos, plan.longest)
  ]
  order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i][0]))
  table = _Table(plan.row_length)
  # Rows by the positions that they have left, and which such numbers there are, as bits.
  rows_with: dict[int, list[int]] = {}
  there = 0
  used: list[int] = []  # tokens of each row
  for i in order:
    tokens, unscored = pieces[i]
    need = plan.room[len(tokens)]
    fitting = there >> need
    if fitting:
      left = need + (fitting & -fitting).bit_length() - 1
      row = rows_with[left].pop()
      if not rows_with[left]:
        there &= ~(1 << left)
    else:
      left, row = plan.positions, len(used)
      used.append(table.new())
    used[row] = table.add(used[row], tokens, unscored, starts=True, row=row)
    left -= need
    if left:
      rows_with.setdefault(left, []).append(row)
      there |= 1 << left
  return table.finish()


def _cut(
  prompt: np.ndarray, text: np.ndarray, prefix: tuple[int, ...], eos: int, longest: int
) -> Iterator[tuple[np.ndarray, int]]:
  """Parts of a document, each with a prefix, and how many tokens carry no loss.

  All parts but the last are the longest, since equal parts of a little more than half a
  row leave room that few documents fit. A last part of some tokens would be hardly an
  example: it takes what it lacks from the one before.
  """
  body = np.concatenate([prompt, text, [eos]]).astype(np.int32)
  opening = np.array(prefix, np.int32)
  most = longest - len(opening)
  cuts = np.arange(most, len(body), most)
  cuts[-1:] = np.minimum(cuts[-1:], len(body) - most // _LEAST_PART)
  for first, part in zip([0, *cuts], np.split(body, cuts), strict=True):
    unscored = min(max(len(prompt) - first, 0), len(part))
    yield np.concatenate([opening, part]), len(opening) + unscored


class _Table:
  """Rows that grow."""

  def __init__(self, row_length: int):
    self._tokens = np.zeros((0, row_length), np.int32)
    self._scored = np.zeros((0, row_length), bool)
    self._starts = np.zeros((0, row_length), bool)
    self._lengths = np.zeros(0, np.int32)
    self._count = 0

  def new(self) -> int:
    """Begins a row."""
    if self._count == len(self._lengths):
      more = max(_GROW, self._count)
      for name in ('_tokens', '_scored', '_starts', '_lengths'):
        old = getattr(self, name)
        new = np.zeros((more, *old.shape[1:]), old.dtype)
        setattr(self, name, np.concatenate([old, new]))
    self._count += 1
    return 0

  def add(
    self, at: int, tokens: np.ndarray, unscored: int, *, starts: bool, row: int = -1
  ) -> int:
    """Writes tokens at a place of a row, by default the last; returns the place behind."""
    row = self._count - 1 if row < 0 else row
    end = at + len(tokens)
    self._tokens[row, at:end] = tokens
    self._scored[row, min(at + unscored, end) : end] = True
    if starts:
      self._starts[row, at] = True
    self._lengths[row] = end
    return end

  def finish(self) -> RowTable:
    return RowTable(
      self._tokens[: self._count],
      self._scored[: self._count],
      self._starts[: self._count],
      self._lengths[: self._count],
    )
