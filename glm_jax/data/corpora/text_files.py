"""Files of text: which they are, and how they are divided among workers."""

from __future__ import annotations

import glob
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from glm_jax import configs
from glm_jax.data.corpora import formats
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.fields import Document

# Bytes that are read at a time to find where a line ends.
_SEARCH = 2**20


class ByteRange(NamedTuple):
  """Bytes of a text file: documents that begin in [start, end)."""

  path: str
  start: int
  end: int


def find(pattern: str) -> list[epath.Path]:
  """The files of a glob, in order of their names; `gs://` patterns are understood.

  Raises:
    UserError: there are none, or some of no format that is read.
  """
  if '://' in pattern:
    folder, _, last = pattern.rpartition('/')
    paths = sorted(epath.Path(folder).glob(last))
  else:
    whole = os.path.expanduser(pattern)
    # A file may have brackets in its name.
    names = [whole] if os.path.isfile(whole) else sorted(glob.glob(whole, recursive=True))
    paths = [epath.Path(name) for name in names if not os.path.isdir(name)]
  configs.check(
    bool(paths),
    f'CorpusConfig.corpus must be a glob of files ({", ".join(formats.FORMATS)}), '
    "'documentation', 'shards:DIR', 'tfds:NAME' or 'task:NAME'",
    f'{pattern!r}, which matches no file',
    'give a pattern that matches files, or make their folder readable',
  )
  for path in paths:
    formats.check(path)
  return paths


def check_some(there_is: bool, name: str) -> None:
  """Raises UserError for a corpus, by its name, without any text."""
  configs.check(
    there_is, 'the corpus must hold some text', f'none in {name!r}', 'give other files'
  )


def count(path: epath.Path, most: int, config: CorpusConfig) -> int:
  """Documents in a file, or `most` if there are more."""
  if not formats.divisible(path):
    return sum(1 for _ in itertools.islice(formats.documents(path, config), most))
  with path.open('rb') as file:
    lines = (line for line in file if line.strip())
    return sum(1 for _ in itertools.islice(lines, most))


def groups(paths: Sequence[epath.Path], size: float) -> list[list[ByteRange]]:
  """Ranges of files together, of about `size` bytes a group; of all of them for infinity.

  A file that is not read by its lines is never divided.
  """
  ranges = []
  for path in paths:
    length = path.stat().length
    divided = formats.divisible(path) and size < math.inf
    step = int(size) if divided else max(length, 1)
    ranges += [
      ByteRange(str(path), at, min(at + step, length))
      for at in range(0, max(length, 1), step)
    ]
  # Files may be small and many.
  found, group, total = [], [], 0
  for piece in ranges:
    group.append(piece)
    total += piece.end - piece.start
    if total >= size:
      found.append(group)
      group, total = [], 0
  return [*found, group] if group else found


def documents(piece: ByteRange, config: CorpusConfig) -> Iterator[Document]:
  """The documents that begin in a range, in order."""
  path = epath.Path(piece.path)
  if not formats.divisible(path):
    yield from formats.documents(path, config)
    return
  # The end of a range and the start of the next are found by the same search from the
  # same offset, so each line is read exactly once however the file is divided.
  with path.open('rb') as file:
    start, end = _next(file, piece.start), _next(file, piece.end)
  yield from formats.lines(formats.read_bytes(path, start, end), path, config, start)


def _next(file: Any, offset: int) -> int:
  """The first place from `offset` on where a line begins, or the end of the file."""
  if offset == 0:
    return 0
  # From one byte before: a line may begin at `offset` itself.
  file.seek(offset - 1)
  at = offset - 1
  while data := file.read(_SEARCH):
    index = data.find(b'\n')
    if index >= 0:
      return at + index + 1
    at += len(data)
  return at
