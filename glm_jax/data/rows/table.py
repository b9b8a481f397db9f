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
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Rows that a table grows by at first; later it doubles, so adding one costs O(1).
_GROW = 1024
# The last part of a cut document has at least one such share of the longest part.
_LEAST_PART = 16

Encoded = tuple[np.ndarray, np.ndarray]
"""Ids of a document's prompt, which carries no loss, and of its text."""

Piece = tuple[np.ndarray, np.ndarray]
"""Ids of what stands whole in a packed row, [n] int32, and which carry loss, [n] bool."""


@dataclasses.dataclass(frozen=True)
class RowPlan:
  """How documents become rows.

  Attributes:
    row_length: N, the most tokens that a row holds.
    positions: of a packed row when its documents have become examples; 0 for a stream.
    room: of a packed row: positions that a document of n tokens is given, by n; its
      length is one more than the longest document that fits.
    template: family whose conversations the documents are; '' for texts and pairs.
    blank: how a prompt becomes Part A, see `glm_jax.text.asking`; '' where prompt and
      answer are one text.
    ranked: each row is two documents, of which the first was preferred.
  """

  row_length: int
  positions: int = 0
  room: tuple[int, ...] = ()
  template: str = ''
  blank: str = ''
  ranked: bool = False

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
  # Place in the row being filled; at first as if that were full, so that the first
  # document opens one.
  at = row_length
  for prompt, text in documents:
    tokens = np.concatenate([opening, prompt, text, [eos]]).astype(np.int32)
    unscored = len(opening) + len(prompt)
    # A row may not end with a prefix that has nothing behind it: its next row would open
    # with the prefix again, and this one would teach nothing.
    if at >= row_length - len(opening):
      at = table.new()
    done = 0
    while done < len(tokens):
      if at == row_length:
        at = table.new()
        # Inside a document: the row opens as one does, and starts a part of it.
        if done:
          at = table.add(at, opening, _all_behind(len(opening), opening), starts=True)
      part = tokens[done : done + row_length - at]
      # With no prefix, a part begins at place 0 of its row; with one, it was marked above.
      starts = done == 0 or at == 0
      at = table.add(at, part, _all_behind(unscored - done, part), starts=starts)
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
  # What is longer than a row is cut.
  pieces = [
    piece
    for prompt, text in documents
    for piece in _cut(np.asarray(prompt), np.asarray(text), prefix, eos, plan.longest)
  ]
  return pack(pieces, plan)


def pack(pieces: Sequence[Piece], plan: RowPlan) -> RowTable:
  """Pieces that each fit a row, several a row, by best fit: the largest first."""
  # `sorted` is stable, so the rows depend on the pieces' order alone.
  order = sorted(range(len(pieces)), key=lambda i: -len(pieces[i][0]))
  table = _Table(plan.row_length)
  # Rows by the positions that they have left. Bit p of `sizes_left` is set exactly where
  # rows_by_left[p] holds a row: a shift and a lowest bit then find the best fit without a
  # search through the sizes.
  rows_by_left: dict[int, list[int]] = {}
  sizes_left = 0
  # Tokens of each row; never more than positions, since `room` counts a document's tokens
  # and, where spans are masked, what these add.
  used: list[int] = []
  for i in order:
    tokens, scored = pieces[i]
    need = plan.room[len(tokens)]
    # Bit i: some row has need + i positions left. x & -x is the lowest bit of x, hence the
    # row that wastes the least.
    fitting = sizes_left >> need
    if fitting:
      left = need + (fitting & -fitting).bit_length() - 1
      row = rows_by_left[left].pop()
      if not rows_by_left[left]:
        sizes_left &= ~(1 << left)
    else:
      left, row = plan.positions, len(used)
      used.append(table.new())
    used[row] = table.add(used[row], tokens, scored, starts=True, row=row)
    left -= need
    # A full row is not kept: nothing needs 0 positions.
    if left:
      rows_by_left.setdefault(left, []).append(row)
      sizes_left |= 1 << left
  return table.finish()


def grouped_rows(rows: Iterable[Sequence[Piece]], row_length: int) -> RowTable:
  """A row for each sequence of pieces, which nothing parts and whose order stays.

  Example:
    >>> piece = lambda *ids: (np.array(ids), np.array(ids) > 6)
    >>> made = grouped_rows([[piece(5, 7), piece(5, 8)], [piece(5, 9)]], 5)
    >>> made.tokens.tolist(), made.starts[0].tolist()
    ([[5, 7, 5, 8, 0], [5, 9, 0, 0, 0]], [True, False, True, False, False])
  """
  table = _Table(row_length)
  for pieces in rows:
    at = table.new()
    for tokens, scored in pieces:
      at = table.add(at, tokens, scored, starts=True)
  return table.finish()


def _cut(
  prompt: np.ndarray, text: np.ndarray, prefix: tuple[int, ...], eos: int, longest: int
) -> Iterator[Piece]:
  """Parts of a document, each with a prefix.

  All parts but the last are the longest, since equal parts of a little more than half a
  row leave room that few documents fit. A last part of a few tokens would hardly be an
  example: it takes what it lacks from the one before.
  """
  body = np.concatenate([prompt, text, [eos]]).astype(np.int32)
  opening = np.array(prefix, np.int32)
  most = longest - len(opening)
  cuts = np.arange(most, len(body), most)
  # `-1:` leaves a document that is not cut alone, where `-1` would raise.
  cuts[-1:] = np.minimum(cuts[-1:], len(body) - most // _LEAST_PART)
  for first, part in zip([0, *cuts], np.split(body, cuts), strict=True):
    # A long prompt may reach into several parts.
    tokens = np.concatenate([opening, part])
    yield tokens, _all_behind(len(opening) + max(len(prompt) - first, 0), tokens)


def _all_behind(unscored: int, tokens: np.ndarray) -> np.ndarray:
  """[n] bool: all tokens carry loss but the first so many."""
  return np.arange(len(tokens)) >= unscored


class _Table:
  """A `RowTable` that grows by a row at a time."""

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
    self, at: int, tokens: np.ndarray, scored: np.ndarray, *, starts: bool, row: int = -1
  ) -> int:
    """Writes tokens at a place in a row, by default the last; returns the place behind."""
    row = self._count - 1 if row < 0 else row
    end = at + len(tokens)
    self._tokens[row, at:end] = tokens
    self._scored[row, at:end] = scored
    if starts:
      self._starts[row, at] = True
    self._lengths[row] = end
    return end

  def finish(self) -> RowTable:
    # Without the rows that were allocated but never begun.
    return RowTable(
      self._tokens[: self._count],
      self._scored[: self._count],
      self._starts[: self._count],
      self._lengths[: self._count],
    )
