"""Which documents of a corpus are held out for validation, by one rule for whoever asks.

A document is held out if the hash of all of it is low. From 200 documents on, it stays on
its side when others come or go. Below, the lowest hash is held out as well, so that there
is something to validate on; below 20, the end of the text is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from glm_jax import configs
from glm_jax.data.corpora import text_files
from glm_jax.data.corpora.fields import Document

ENOUGH = 200
"""Documents from which on hashes alone decide."""
FEW = 20
"""Documents below which the end of the text is held out."""

_HASHES = 2**48
# A line break, and another one behind nothing but space: a new paragraph begins there.
_BLANK_LINE = re.compile(r'\n[ \t]*\r?\n\s*')


@dataclasses.dataclass(frozen=True)
class HoldOut:
  """What is held out of a corpus.

  Attributes:
    limit: documents with a lower hash are.
    tail: (number of a document, place in its text): what follows is, instead; None if
      hashes decide.
    words: what a person is told about it; '' if there is nothing to say.
  """

  limit: int
  tail: tuple[int, int] | None = None
  words: str = ''

  def split(self, documents: Iterable[Document]) -> Iterator[tuple[str, Document]]:
    """(split, document) of each; with a tail, all documents of the corpus in order."""
    for number, document in enumerate(documents):
      if self.tail is None:
        out = hash_of(document) < self.limit
        yield 'validation' if out else 'train', document
        continue
      last, place = self.tail
      if number == last and place:
        yield 'train', document._replace(text=document.text[:place])
        document = document._replace(text=document.text[place:])
      yield 'validation' if number >= last else 'train', document


def hash_of(document: Document) -> int:
  """48 bits of SHA-256 over all of a document: its prompt, if any, and text or tokens.

  Example:
    >>> one, other = Document('yes', 'Is it?'), Document('yes', 'Was it?')
    >>> hash_of(one) == hash_of(other)
    False
  """
  if document.ids is None:
    content = document.text.encode('utf-8')
  else:
    content = np.array(document.ids, '<i4').tobytes()
  if document.prompt:
    content = document.prompt.encode('utf-8') + b'\0' + content
  return int(hashlib.sha256(content).hexdigest()[:12], 16)


def by_hash(share: float) -> HoldOut:
  """The rule for `ENOUGH` documents or more.

  Args:
    share: of the documents that is to be held out.
  """
  return HoldOut(int(share * _HASHES))


def of_few(documents: Sequence[Document], share: float, name: str) -> HoldOut:
  """The rule for fewer.

  Args:
    documents: all of them, in order.
    share: of them, or of the text, that is to be held out.
    name: of the corpus, for messages.

  Raises:
    UserError: nothing could be held out, or nothing would be left.
  """
  text_files.check_some(any(d.text.strip() or d.ids for d in documents), name)
  count = f'{len(documents)} documents in {name!r}'
  if len(documents) < FEW:
    tail = _tail(documents, share)
    _check_both(tail not in (None, (0, 0)), count)
    return HoldOut(0, tail, f'{count}: the end of the text is held out')
  hashes = [hash_of(document) for document in documents]
  limit = max(by_hash(share).limit, min(hashes) + 1)
  _check_both(max(hashes) >= limit, count)
  words = f'{count}: {sum(h < limit for h in hashes)} are held out, as those of lowest hash'
  return HoldOut(limit, None, words)


def _check_both(holds: bool, count: str) -> None:
  configs.check(
    holds,
    'some documents must be held out for validation, and some remain',
    count,
    'give more text, or CorpusConfig.validation',
  )


def _tail(documents: Sequence[Document], share: float) -> tuple[int, int] | None:
  """Where the last `share` of a text begins, about; None if it has no such place.

  Between documents, or at a blank line of one without a prompt: no pair is cut.
  """
  sizes = [
    len(d.ids) if d.ids is not None else len(d.prompt) + len(d.text) for d in documents
  ]
  left, number = share * sum(sizes), len(documents)
  while number > 1 and sizes[number - 1] <= left:
    number -= 1
    left -= sizes[number]
  # The document that the share ends in, and where it may be cut.
  text = documents[number - 1].text
  places = []
  if not documents[number - 1].prompt and documents[number - 1].ids is None:
    places = [match.end() for match in _BLANK_LINE.finditer(text)]
    places = [p for p in places if text[:p].strip() and text[p:].strip()]
  none_yet = number == len(documents)
  if places:
    place = min(places, key=lambda p: abs(len(text) - p - left))
    if none_yet or abs(len(text) - place - left) < left:
      return number - 1, place
  if none_yet:
    return (number - 1, 0) if number > 1 else None
  return number, 0
