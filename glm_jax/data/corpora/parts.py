"""A corpus in parts that are worked on apart from each other, on any machine.

Parts do not depend on how many processes work on them. Text files are cut by bytes, at
lines or blank lines, and read without TensorFlow; TFDS data sets and seqio tasks by
examples.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from glm_jax.data.corpora import corpus as corpora
from glm_jax.data.corpora import text_files
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.text_files import Document

# Bytes that are read at a time to find where a line ends.
_SEARCH = 2**20
# Of a TFDS data set in a part.
_EXAMPLES = 100_000


class ByteRange(NamedTuple):
  """Bytes of a text file: documents that begin in [start, end)."""

  path: str
  start: int
  end: int


@dataclasses.dataclass(frozen=True)
class CorpusPart:
  """What one worker reads.

  Attributes:
    number: of the part; its order in the corpus.
    size: bytes of text, or examples, for a progress bar.
    split: 'train' or 'validation'; '' if some of its documents are held out.
    ranges: of text files.
    cut: files of text are cut at blank lines, because they are few.
    source: split and range of a TFDS data set; split, part and parts of a seqio task.
  """

  number: int
  size: int
  split: str = ''
  ranges: tuple[ByteRange, ...] = ()
  cut: bool = False
  source: tuple[Any, ...] = ()


def find(config: CorpusConfig, part_bytes: int) -> list[CorpusPart]:
  """The parts of a corpus.

  Args:
    config: the corpus.
    part_bytes: of text in a part, about.

  Raises:
    UserError: no such files, data set or task.
  """
  if config.corpus == 'documentation' or config.corpus.startswith('tfds:'):
    builder = corpora.tfds_builder(config)
    counts = {name: info.num_examples for name, info in builder.info.splits.items()}
    # Without a validation split, documents are held out from training by their hash.
    both = 'validation' in counts
    corpus_parts = [
      CorpusPart(0, min(_EXAMPLES, n - first), name if both else '', source=(name, first))
      for name, n in counts.items()
      if name in ('train', 'validation')
      for first in range(0, n, _EXAMPLES)
    ]
  elif config.corpus.startswith(corpora.TASK):
    task = corpora.find_task(config)
    both = 'validation' in task.splits
    # The shards of a task's source are its parts: seqio cuts no finer.
    corpus_parts = []
    for split in ('train', 'validation')[: 1 + both]:
      n = len(task.source.list_shards(split))
      corpus_parts += [
        CorpusPart(0, 1, split if both else '', source=(split, i, n)) for i in range(n)
      ]
  elif config.validation:
    corpus_parts = _file_parts(config.corpus, 'train', part_bytes)
    corpus_parts += _file_parts(config.validation, 'validation', part_bytes)
  else:
    corpus_parts = _file_parts(config.corpus, '', part_bytes)
  return [dataclasses.replace(part, number=i) for i, part in enumerate(corpus_parts)]


def read(config: CorpusConfig, part: CorpusPart) -> Iterator[tuple[str, Document]]:
  """(split, document) of a part, in order.

  A document is held out if the hash of its text is in the lowest `validation_fraction`.

  Raises:
    UserError: text that cannot be read: the file and the line or byte are named.
  """
  # By a threshold, not by rank as in `corpus`: no part knows the documents of the others.
  limit = int(config.validation_fraction * 2**48)
  for document in _documents(config, part):
    if part.split:
      yield part.split, document
      continue
    if document.ids is None:
      content = document.text.encode('utf-8')
    else:
      content = np.array(document.ids, '<i4').tobytes()
    held_out = int(hashlib.sha256(content).hexdigest()[:12], 16) < limit
    yield 'validation' if held_out else 'train', document


def _documents(config: CorpusConfig, part: CorpusPart) -> Iterator[Document]:
  if config.corpus.startswith(corpora.TASK):
    split, number, count = part.source
    yield from corpora.read_task(corpora.find_task(config), config, split, number, count)
  elif part.source:
    split, first = part.source
    yield from corpora.read_tfds(config, f'{split}[{first}:{first + part.size}]')
  for piece in part.ranges:
    path = epath.Path(piece.path)
    start, end = _borders(path, piece, part.cut)
    content = text_files.read_bytes(path, start, end)
    if content:
      for document in text_files.parse(content, path, config, start):
        yield from text_files.cut(document) if part.cut else [document]


def _file_parts(pattern: str, split: str, part_bytes: int) -> list[CorpusPart]:
  paths = text_files.find(pattern)
  # 1. Ranges of at most part_bytes; a .txt file that is one document is never divided.
  cut = text_files.are_few(paths)
  ranges = []
  for path in paths:
    size = path.stat().length
    step = part_bytes if cut or path.suffix == '.jsonl' else max(size, 1)
    ranges += [
      ByteRange(str(path), at, min(at + step, size)) for at in range(0, size, step)
    ]
  # 2. Consecutive ranges together, until they are a part: files may be small and many.
  parts, group, total = [], [], 0
  for piece in ranges:
    group.append(piece)
    total += piece.end - piece.start
    if total >= part_bytes:
      parts.append(CorpusPart(0, total, split, tuple(group), cut))
      group, total = [], 0
  if group:
    parts.append(CorpusPart(0, total, split, tuple(group), cut))
  return parts


def _borders(path: epath.Path, piece: ByteRange, cut: bool) -> tuple[int, int]:
  """Where the first document that begins in a piece does, and where the last one ends."""
  # The end of a part and the start of the next are found by the same search from the same
  # offset, so each document is read exactly once however the file is divided.
  if path.suffix == '.txt' and not cut:
    return piece.start, piece.end
  separator = b'\n\n' if path.suffix == '.txt' else b'\n'
  with path.open('rb') as file:
    return _next(file, piece.start, separator), _next(file, piece.end, separator)


def _next(file: Any, offset: int, separator: bytes) -> int:
  """The first place from `offset` on that is behind a separator, or the start or end."""
  if offset == 0:
    return 0
  # From a separator's length before: a document may begin at `offset` itself. `at` is the
  # place in the file behind what was read, and `tail` the end of it that may hold the first
  # byte of a separator.
  at, tail = max(offset - len(separator), 0), b''
  file.seek(at)
  while data := file.read(_SEARCH):
    index = (tail + data).find(separator)
    if index >= 0:
      return at - len(tail) + index + len(separator)
    at += len(data)
    tail = data[len(data) - len(separator) + 1 :]
  return at
