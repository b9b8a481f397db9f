"""Files of text: .txt, a document each, and .jsonl, a document a line."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.data.corpora.config import CorpusConfig

# With fewer documents than this, long ones are cut so that some can be held out.
_FEW = 20
# Characters, at least, of such a part.
_PIECE = 2000
_BYTE_ORDER_MARK = b'\xef\xbb\xbf'


class Document(NamedTuple):
  """A text, what precedes it without being learnt, and its tokens where it has them."""

  text: str
  prompt: str = ''
  ids: Sequence[int] | None = None


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


def read(pattern: str, config: CorpusConfig) -> Iterator[Document]:
  """The documents of the files of a glob, in order.

  Raises:
    UserError: no files, or what cannot be read, with its line or byte.
  """
  for path in find(pattern):
    yield from parse(read_bytes(path, 0, None), path, config)


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


def are_few(paths: Sequence[epath.Path]) -> bool:
  """Whether there are so few documents that they are cut."""
  # Files are read only until it is clear that there are enough.
  count = 0
  for path in paths:
    if path.suffix == '.txt':
      count += 1
    else:
      with path.open('rb') as file:
        for line in file:
          count += bool(line.strip())
          if count >= _FEW:
            break
    if count >= _FEW:
      return False
  return True


def cut_if_few(documents: list[Document]) -> list[Document]:
  """The documents, cut at blank lines if they are too few to hold some out."""
  return documents if len(documents) >= _FEW else [p for d in documents for p in cut(d)]


def cut(document: Document) -> list[Document]:
  """Parts of a document, cut at blank lines."""
  parts, part = [], ''
  # Each paragraph keeps the blank lines behind it: joined, the parts are the text.
  for paragraph in document.text.replace('\r\n', '\n').split('\n\n'):
    part += paragraph + '\n\n'
    if len(part) >= _PIECE:
      parts.append(Document(part.strip('\n'), document.prompt))
      part = ''
  if part.strip():
    parts.append(Document(part.strip('\n'), document.prompt))
  return parts


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
