"""A corpus in parts, and its documents by split."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from glm_jax.data.corpora import held_out, sources
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.fields import Document
from glm_jax.data.corpora.sources import CorpusPart

PART_BYTES = 64 * 10**6
"""Of text that is in memory at a time, where nobody says otherwise."""


def find(config: CorpusConfig, part_bytes: float) -> list[CorpusPart]:
  """The parts of a corpus; they do not depend on who works on them.

  Args:
    config: the corpus.
    part_bytes: of text in a part, about.

  Raises:
    UserError: no such files, data set or task; nothing that could be held out.
  """
  source = sources.of(config)
  rule = None
  if not source.has_validation():
    share = config.validation_fraction
    if source.holds(held_out.ENOUGH):
      rule = held_out.by_hash(share)
    else:
      rule = held_out.of_few(list(source.training()), share, config.corpus)
  # Where the text is cut, documents are counted: one part holds them all.
  found = source.parts(math.inf if rule and rule.tail else part_bytes)
  return [
    dataclasses.replace(part, number=number, held_out=None if part.split else rule)
    for number, part in enumerate(found)
  ]


def read(config: CorpusConfig, part: CorpusPart) -> Iterator[tuple[str, Document]]:
  """(split, document) of a part, in order.

  Raises:
    UserError: text that cannot be read: the file and the line or byte are named.
  """
  documents = sources.of(config).read(part)
  if part.held_out is None:
    return ((part.split, document) for document in documents)
  return part.held_out.split(documents)


def held_out_in_words(found: Sequence[CorpusPart]) -> str:
  """What a person is told of what is held out of these; '' if there is nothing to say."""
  rule = found[0].held_out
  return rule.words if rule else ''
