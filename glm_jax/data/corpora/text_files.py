"""Files of text: .txt, a document each, and .jsonl, a document a line."""

from __future__ import annotations

import glob
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.data.corpora.config import CorpusConfig

# Bytes that are read at a time to find where a line ends.
_SEARCH = 2**20
_BYTE_ORDER_MARK = b'\xef\xbb\xbf'


class Document(NamedTuple):
  """A text, what precedes it without being learnt, and its tokens where it has them."""

  text: str
  prompt: str = ''
  ids: Sequence[int] | None = None


class ByteRange(NamedTuple):
  """Bytes of a text file: documents that begin in [start, end)."""

  path: str
  start: int
  end: int


def find(pattern: str) -> list[epath.Path]:
  """The files of a glob, in order of their names; `gs://` patterns are understood.

  Raises:
    UserError: there are none, or others than .txt and .jsonl among them.
  """
  if '://' in pattern:
    folder, _, last = pattern.rpartition('/')
    paths = sorted(epath.Path(folder).glob(last))
  else:
    names = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    paths = [epath.Path(name) for name in names if not os.path.isdir(name)]
  configs.check(
    bool(paths),
    'CorpusConfig.corpus must be a glob of .txt or .jsonl files, '
    "'documentation', 'shards:DIR', 'tfds:NAME' or 'task:NAME'",
    f'{pattern!r}, which matches no file',
    'give a pattern that matches files, or make their folder readable',
  )
  for path in paths:
    configs.check(
      path.suffix in ('.txt', '.jsonl'),
      'text files must end in .txt or .jsonl',
      str(path),
      'rename or convert it',
    )
  return paths


def check_some(there_is: bool, name: str) -> None:
  """Raises UserError for a corpus, by its name, without any text."""
  configs.check(
    there_is, 'the corpus must hold some text', f'none in {name!r}', 'give other files'
  )


def read_bytes(path: epath.Path, start: int, end: int | None) -> bytes:
  """A part of a file, to its end for None."""
  try:
    with path.open('rb') as file:
      file.seek(start)
      return file.read() if end is None else file.read(max(end - start, 0))
  except OSError as error:
    raise UserError(
      f'text files must be readable, got {path} ({error.strerror or error}); give this '
      'user permission to read it.'
    ) from error


def parse(
  content: bytes, path: epath.Path, config: CorpusConfig, start: int = 0
) -> Iterator[Document]:
  """The documents in a part of a file.

  Args:
    content: of the part.
    path: of the file.
    config: what becomes of invalid UTF-8.
    start: byte of the file that the part begins with.
  """
  if start == 0:
    # Some editors begin UTF-8 with one; it is no text.
    content = content.removeprefix(_BYTE_ORDER_MARK)
  try:
    text = content.decode('utf-8', config.errors)
  except UnicodeDecodeError as error:
    raise UserError(
      f'text files must be UTF-8, got {path} with byte 0x{content[error.start]:02x} at '
      f"offset {start + error.start}; convert it, or set CorpusConfig.errors to 'replace' "
      "or 'ignore'."
    ) from error
  if path.suffix == '.txt':
    yield Document(text)
    return
  # Not splitlines(): JSON strings may hold U+2028 and the like as they are.
  for number, line in enumerate(text.split('\n')):
    if line.strip():
      yield _parse_line(line, path, start, number)


def count(path: epath.Path, most: int) -> int:
  """Documents in a file, or `most` if there are more."""
  if path.suffix == '.txt':
    return 1
  with path.open('rb') as file:
    lines = (line for line in file if line.strip())
    return sum(1 for _ in itertools.islice(lines, most))


def groups(paths: Sequence[epath.Path], size: float) -> list[list[ByteRange]]:
  """Ranges of files together, of about `size` bytes a group; of all of them for infinity.

  A .txt file, which is one document, is never divided.
  """
  ranges = []
  for path in paths:
    length = path.stat().length
    step = max(length, 1) if path.suffix == '.txt' or size == math.inf else int(size)
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
  start, end = piece.start, piece.end
  if path.suffix != '.txt':
    # The end of a range and the start of the next are found by the same search from the
    # same offset, so each line is read exactly once however the file is divided.
    with path.open('rb') as file:
      start, end = _next(file, start), _next(file, end)
  # An empty .txt file is an empty document.
  yield from parse(read_bytes(path, start, end), path, config, start)


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


def _parse_line(line: str, path: epath.Path, start: int, number: int) -> Document:
  # Called for an error alone: it reads the file again, to count the lines before the part.
  def where() -> str:
    before = read_bytes(path, 0, start).count(b'\n')
    return f'{path} line {before + number + 1}'

  try:
    fields = json.loads(line)
  except json.JSONDecodeError as error:
    raise UserError(
      f'a .jsonl file must have a JSON object a line, got {where()}: '
      f'{error.msg} (column {error.colno}); write {{"text": "..."}} there.'
    ) from error
  if not (
    isinstance(fields, dict)
    and isinstance(fields.get('text'), str)
    and isinstance(fields.get('prompt', ''), str)
  ):
    raise UserError(
      "a .jsonl line must be an object with a string 'text' and, optionally, a string "
      f"'prompt', got {line[:80]!r} in {where()}; make it one."
    )
  # A lone surrogate can be written in JSON but is no character.
  for value in (fields['text'], fields.get('prompt', '')):
    try:
      value.encode('utf-8')
    except UnicodeEncodeError as error:
      raise UserError(
        f'text must be Unicode characters, got a lone surrogate in {where()}; remove it.'
      ) from error
  return Document(fields['text'], fields.get('prompt', ''))
