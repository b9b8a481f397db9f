"""The files that text comes in: what each ending means, and how it is read.

.txt is a document; .jsonl has an object a line, .json a list of objects, .csv a table with
a line of names, .parquet a table. All but .parquet may be compressed, .gz or .zst, and the
case of an ending does not matter.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
from collections.abc import Iterator
from typing import Any

from etils import epath

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.data.corpora import objects
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.fields import Document

FORMATS = ('.txt', '.jsonl', '.json', '.csv', '.parquet')
_COMPRESSIONS = {'.gz': 'gzip', '.zst': 'zstd'}
# Of a table in memory at a time.
_ROWS = 1024
# Of a file that is decompressed at a time.
_CHUNK = 2**20
# In characters; objects of Python take several times the room of their text.
_LARGEST_LIST = 2**31
# With `errors`, so many bytes that are no UTF-8, and such a share of them, are no slips but
# another encoding: Chinese in GB18030 has 76 %.
_MANY_INVALID, _MUCH_INVALID = 20, 0.1
# Some editors begin UTF-8 with one, and `cat` brings it into the midst; it is no text.
_BYTE_ORDER_MARK = '\ufeff'
# Encodings that texts have where they are not UTF-8, the likeliest first.
_OTHERS = ('utf-16', 'gb18030', 'big5', 'shift_jis', 'cp1252')

csv.field_size_limit(2**31 - 1)  # a field may be a book; the default is 128 KiB


def split(path: epath.Path) -> tuple[str, str]:
  """(format, compression) of a file by its name; '' for one without.

  Example:
    >>> split(epath.Path('a.JSONL.gz')), split(epath.Path('b.Txt'))
    (('.jsonl', 'gzip'), ('.txt', ''))
  """
  name = path.name.lower()
  ending = '.' + name.rpartition('.')[2]
  compression = _COMPRESSIONS.get(ending, '')
  if compression:
    name = name.removesuffix(ending)
    ending = '.' + name.rpartition('.')[2]
  return (ending if '.' in name else ''), compression


def check(path: epath.Path) -> None:
  """Raises UserError for a file of another format."""
  kind, compression = split(path)
  configs.check(
    kind in FORMATS and not (compression and kind == '.parquet'),
    f'text files must end in {", ".join(FORMATS)}, all but the last also with .gz or .zst',
    str(path),
    'rename or convert it',
  )


def divisible(path: epath.Path) -> bool:
  """Whether a reader may begin at any line."""
  return split(path) == ('.jsonl', '')


def documents(path: epath.Path, config: CorpusConfig) -> Iterator[Document]:
  """The documents of a whole file, in order.

  Raises:
    UserError: it cannot be read; the file and the line or byte are named.
  """
  kind, compression = split(path)
  if kind == '.parquet':
    yield from _of_table(path, config)
    return
  with _opened(path, compression) as file:
    if kind == '.jsonl':
      yield from _of_lines(_lines(file, path), path, config)
      return
    text = decode(file.read(), path, config)
  if kind == '.txt':
    yield Document(text)
  elif kind == '.json':
    yield from _of_list(text, path, config)
  else:
    yield from _of_csv(text, path, config)


def lines(
  content: bytes, path: epath.Path, config: CorpusConfig, start: int
) -> Iterator[Document]:
  """The documents of whole lines of an uncompressed .jsonl file.

  Args:
    content: the lines.
    path: of the file.
    config: names of fields, and what becomes of invalid UTF-8.
    start: byte of the file that they begin with.
  """

  # Called for a message alone: it reads the file again, to count the lines before.
  def before() -> int:
    return read_bytes(path, 0, start).count(b'\n')

  # Not splitlines(): JSON strings may hold U+2028 and the like as they are.
  yield from _of_lines(content.split(b'\n'), path, config, start, before)


def read_bytes(path: epath.Path, start: int, end: int | None) -> bytes:
  """A part of a file, to its end for None."""
  with readable(path), path.open('rb') as file:
    file.seek(start)
    return file.read() if end is None else file.read(max(end - start, 0))


def decode(content: bytes, path: epath.Path, config: CorpusConfig, start: int = 0) -> str:
  """Bytes of a file as text, without byte order marks.

  Raises:
    UserError: invalid UTF-8, or with `errors` more of it than a slip would leave.
  """
  try:
    text = content.decode('utf-8')
  except UnicodeDecodeError as error:
    likely = _likely_encoding(content)
    count = content.decode('utf-8', 'replace').count('\ufffd')
    invalid = count / len(content)
    another = count >= _MANY_INVALID and invalid > _MUCH_INVALID
    if config.errors == 'strict' or another:
      convert = f'convert it (iconv -f {likely} -t UTF-8)' if likely else 'convert it'
      slip = '' if another else ", or set CorpusConfig.errors to 'replace' or 'ignore'"
      raise UserError(
        f'text files must be UTF-8, got {path} with byte 0x{content[error.start]:02x} at '
        f'offset {start + error.start}, one of {invalid:.1%} that are not; {convert}{slip}.'
      ) from error
    text = content.decode('utf-8', config.errors)
  return text.replace(_BYTE_ORDER_MARK, '')


def _likely_encoding(content: bytes) -> str:
  sample = content[: 2**16 // 2 * 2]
  for name in _OTHERS:
    # Without its mark, any text of even length would be UTF-16.
    if name == 'utf-16' and sample[:2] not in (b'\xff\xfe', b'\xfe\xff'):
      continue
    with contextlib.suppress(UnicodeDecodeError):
      # The sample may end inside a character.
      sample[:-4].decode(name)
      return name.upper()
  return ''


def _line_in_words(path: epath.Path, number: int, before: Any) -> str:
  """Where a line stands: `number` from 0, behind as many as `before` counts."""
  return f' in {path} line {(before() if before else 0) + number + 1}'


def _of_lines(
  content: Any, path: epath.Path, config: CorpusConfig, start: int = 0, before: Any = None
) -> Iterator[Document]:
  at = start
  for number, line in enumerate(content):
    text = decode(line, path, config, at)
    at += len(line) + 1
    if not text.strip():
      continue
    where = functools.partial(_line_in_words, path, number, before)
    yield objects.read(
      _loads(text, where, 'a .jsonl file must have a JSON object a line'), config, where
    )


def _of_list(text: str, path: epath.Path, config: CorpusConfig) -> Iterator[Document]:
  whole = lambda: f' in {path}'
  rule = 'a .json file must be a JSON list of objects'
  content = _loads(text, whole, rule, _LARGEST_LIST)
  # {"data": [...]}, as some data sets have it.
  if isinstance(content, dict) and len(content) == 1:
    content = next(iter(content.values()))
  configs.check(
    isinstance(content, list),
    'a .json file must be a list of objects',
    f'{type(content).__name__} in {path}',
    'write it as a list, or one object a line in a .jsonl file',
  )
  for number, item in enumerate(content):
    where = functools.partial(' in {}, item {}'.format, path, number + 1)
    yield objects.read(item, config, where)


def _of_csv(text: str, path: epath.Path, config: CorpusConfig) -> Iterator[Document]:
  # newline='': a quoted field keeps its line breaks.
  reader = csv.reader(io.StringIO(text, newline=''), strict=True)
  names: list[str] | None = None
  while True:
    where = lambda: f' in {path} line {reader.line_num}'
    try:
      row = next(reader, None)
    except csv.Error as error:
      raise UserError(
        f'a .csv file must be of quoted, comma-separated fields, got {error}{where()}; '
        'mend it there.'
      ) from error
    if row is None:
      return
    if not row:  # an empty line
      continue
    if names is None:
      names = row
      configs.check(
        len(set(names)) == len(names),
        'a .csv file must begin with the names of its fields',
        f'{names[:8]} in {path}, of which some are equal',
        'write a first line of names',
      )
      continue
    configs.check(
      len(row) == len(names),
      f'a line of a .csv file must have its {len(names)} fields',
      f'{len(row)}{where()}',
      'put fields that hold a comma in quotes',
    )
    last = functools.partial(_line_in_words, path, reader.line_num - 1, None)
    yield objects.read(dict(zip(names, row, strict=True)), config, last)


def _of_table(path: epath.Path, config: CorpusConfig) -> Iterator[Document]:
  import pyarrow as pa
  import pyarrow.parquet as pq

  number = 0
  with readable(path), path.open('rb') as file:
    try:
      table = pq.ParquetFile(file)
      for batch in table.iter_batches(_ROWS):
        for row in batch.to_pylist():
          number += 1
          where = functools.partial(' in {}, row {}'.format, path, number)
          yield objects.read(row, config, where)
    except (pa.ArrowException, OSError) as error:
      raise UserError(
        f'a .parquet file must be readable, got {path} '
        f'({str(error).splitlines()[0]}); write it again.'
      ) from error


def _loads(text: str, where: Any, rule: str, most: int = configs.LARGEST_JSON) -> Any:
  try:
    return configs.parse_json(text, most=most)
  # Also a number of more digits than Python converts.
  except ValueError as error:
    said = f'{error.msg} (column {error.colno})' if hasattr(error, 'colno') else str(error)
    raise UserError(f'{rule}, got{where()}: {said}; mend it there.') from error


def _lines(file: Any, path: epath.Path) -> Iterator[bytes]:
  rest = b''
  while data := file.read(_CHUNK):
    *whole, rest = (rest + data).split(b'\n')
    yield from whole
    # What was compressed may be a thousand times as large as its file.
    configs.check(
      len(rest) <= configs.LARGEST_JSON,
      f'a line must have at most {configs.LARGEST_JSON:,} bytes',
      f'a longer one in {path}',
      'divide it',
    )
  yield rest


@contextlib.contextmanager
def _opened(path: epath.Path, compression: str) -> Iterator[Any]:
  with readable(path), path.open('rb') as file:
    if not compression:
      yield file
      return
    import pyarrow as pa

    with pa.CompressedInputStream(pa.PythonFile(file, 'r'), compression) as stream:
      yield stream


@contextlib.contextmanager
def readable(path: Any) -> Iterator[None]:
  """What the system says of a file, as a UserError that names it."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'text files must be readable and whole, got {path} ({error.strerror or error}); '
      'give this user permission to read it, or another copy.'
    ) from error
