"""Shards: rows of tokens in files of fixed-size records, which any host reads anywhere.

A folder holds `index.json`, `vocabulary.json` and the files of each split: TFRecord files
whose records are all of one size, so that the place of each is known. A record is

  int32 length | N tokens (uint16, or int32 above 65,536 pieces) | bitmap | bitmap

all little-endian; the bitmaps say which tokens may carry loss and where a document, or
the part of one that a row begins with, starts. NumPy alone is needed to read them, and
`etils.epath` opens them, so that a folder may be `gs://bucket/name`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import operator
import os
import re
import struct
import uuid
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from etils import epath

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.data.rows.table import RowPlan, RowTable
from glm_jax.text import loading
from glm_jax.text.vocabulary import Vocabulary

FORMAT = 2
HEAD, TAIL = 12, 4
"""Bytes before and behind a record in a TFRecord file: its size and checksums."""
COUNTS = ('documents', 'tokens', 'skipped', 'shortened', 'dropped', 'unranked')
"""What is counted of a split: documents that became rows, their tokens; documents with
nothing to predict; pairs longer than a row that were shortened, or left out; pairs of
answers none of which is the better one. Two answers to be compared are one document."""
INDEX, VOCABULARY = 'index.json', 'vocabulary.json'
# Pieces of the largest vocabulary whose ids are written as uint16.
_LARGEST_NARROW = 2**16
SPLITS = ('train', 'validation')
_AGAIN = 'make the shards again'
# Bytes of a file that are hashed or written at a time.
_CHUNK = 2**24


class RecordLayout(NamedTuple):
  """Where things are in a record.

  Attributes:
    row_length: N, tokens of a row.
    token_bytes: 2 or 4.
  """

  row_length: int
  token_bytes: int

  @property
  def dtype(self) -> str:
    return '<u2' if self.token_bytes == 2 else '<i4'

  @property
  def stride(self) -> int:
    """Bytes from one record of a file to the next."""
    return HEAD + self.record_bytes + TAIL

  @property
  def bitmap_bytes(self) -> int:
    return -(-self.row_length // 8)

  @property
  def record_bytes(self) -> int:
    """Of a record's content."""
    return 4 + self.row_length * self.token_bytes + 2 * self.bitmap_bytes

  def encode(self, rows: RowTable) -> np.ndarray:
    """[n, record_bytes] uint8.

    Example:
      >>> from glm_jax.data.rows.table import stream_rows
      >>> rows = stream_rows([(np.array([], int), np.array([5, 6]))], (1,), 2, 8)
      >>> layout = RecordLayout(row_length=8, token_bytes=2)
      >>> records = layout.encode(rows)
      >>> records.shape
      (1, 22)
      >>> bool((layout.decode(records).tokens == rows.tokens).all())
      True
    """
    # Views of bytes, [n, ...] uint8 each: `view` needs the last axis contiguous, and the
    # dtype's '<' makes a record the same on any machine.
    parts = [
      np.ascontiguousarray(rows.lengths, '<i4').view(np.uint8).reshape(-1, 4),
      np.ascontiguousarray(rows.tokens, self.dtype).view(np.uint8),
      np.packbits(rows.scored, axis=1, bitorder='little'),
      np.packbits(rows.starts, axis=1, bitorder='little'),
    ]
    return np.concatenate(parts, axis=1)

  def decode(self, records: np.ndarray) -> RowTable:
    """The inverse of `encode`."""
    N, end = self.row_length, 4 + self.row_length * self.token_bytes
    # `count` drops the flags that fill up the last byte.
    bitmaps = [
      np.unpackbits(bitmap, axis=1, count=N, bitorder='little').astype(bool)
      for bitmap in (
        records[:, end : end + self.bitmap_bytes],
        records[:, end + self.bitmap_bytes :],
      )
    ]
    return RowTable(
      tokens=np.ascontiguousarray(records[:, 4:end]).view(self.dtype).astype(np.int32),
      scored=bitmaps[0],
      starts=bitmaps[1],
      lengths=np.ascontiguousarray(records[:, :4]).view('<i4')[:, 0].astype(np.int32),
    )


class File(NamedTuple):
  """One shard: its name in the folder, its records, and their SHA-256."""

  name: str
  rows: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class StoredRows:
  """A split of a folder of shards; rows are numbered through its files.

  Attributes:
    folder: where the files are.
    layout: of a record.
    files: in order.
    block: so many consecutive rows stay together when the stream is shuffled, so that
      storage is read in pieces of more than a row; 1 where rows are shuffled alone.
    plan: how documents became rows.
    stats: `COUNTS`; and `digest`, which tells contents apart.
  """

  folder: epath.Path
  layout: RecordLayout
  files: tuple[File, ...]
  block: int
  plan: RowPlan
  stats: dict[str, Any]

  def __len__(self) -> int:
    return sum(file.rows for file in self.files)

  def read(self, first: int = 0, count: int | None = None) -> RowTable:
    """Rows by number, for looking at them; training reads through `records`."""
    # `before` counts the rows of earlier files; low and high are numbers in this one.
    parts, before = [], 0
    stop = len(self) if count is None else first + count
    for file in self.files:
      low, high = max(first - before, 0), min(stop - before, file.rows)
      if low < high:
        with (self.folder / file.name).open('rb') as opened:
          opened.seek(low * self.layout.stride)
          data = opened.read((high - low) * self.layout.stride)
        framed = np.frombuffer(data, np.uint8).reshape(high - low, -1)
        parts.append(framed[:, HEAD:-TAIL])
      before += file.rows
    return self.layout.decode(np.concatenate(parts))


def layout_of(vocabulary: Vocabulary, row_length: int) -> RecordLayout:
  """The narrowest layout that holds a vocabulary."""
  return RecordLayout(row_length, 2 if vocabulary.size <= _LARGEST_NARROW else 4)


def file_name(split: str, number: int, count: int) -> str:
  """As T5X and TFDS name them.

  Example:
    >>> file_name('train', 3, 16)
    'train-00003-of-00016.tfrecord'
  """
  return f'{split}-{number:05}-of-{count:05}.tfrecord'


def write_file(path: epath.Path, records: np.ndarray) -> File:
  """Writes a shard: all of it or nothing, whenever the process dies.

  Args:
    path: of the file.
    records: [n, record_bytes] uint8.
  """
  # The hash is of the bytes in memory: a write that storage spoils is found by `verify`.
  data = _framed(records).reshape(-1).data
  write_atomically(path, data)
  return File(path.name, len(records), hashlib.sha256(data).hexdigest())


def _framed(records: np.ndarray) -> np.ndarray:
  """[n, stride] uint8: a size, its checksum, the record, its checksum (TFRecord)."""
  # TFRecord frames a record as: its size, uint64; the masked CRC-32C of these 8 bytes,
  # uint32; the record; the masked CRC-32C of the record, uint32. It is written by hand so
  # that workers need no TensorFlow, and all at once, since records are of one size.
  n, size = records.shape
  framed = np.empty((n, HEAD + size + TAIL), np.uint8)
  head = struct.pack('<Q', size)
  # One head serves all records.
  framed[:, :8] = np.frombuffer(head, np.uint8)
  sums = np.array([google_crc32c.value(head)], np.uint32)
  framed[:, 8:HEAD] = _masked(sums)
  framed[:, HEAD:-TAIL] = records
  sums = np.array([google_crc32c.value(record.tobytes()) for record in records], np.uint32)
  framed[:, -TAIL:] = _masked(sums)
  return framed


def _masked(sums: np.ndarray) -> np.ndarray:
  """[n, 4] uint8, as TFRecord keeps a CRC-32C: rotated, and a constant added."""
  # Mask and kMaskDelta of tensorflow/core/lib/hash/crc32c.h: the CRC of data that itself
  # holds CRCs is a poor check, so stored ones are disguised. uint32 wraps, as meant.
  rotated = (sums >> np.uint32(15)) | (sums << np.uint32(17))
  return (rotated + np.uint32(0xA282EAD8)).astype('<u4').view(np.uint8).reshape(-1, 4)


def write_atomically(path: epath.Path, data: bytes | memoryview) -> None:
  """Writes bytes under a temporary name, which readers ignore, then renames the file."""
  # A process id alone is not unique: workers of several machines share a folder.
  temporary = path.parent / f'.{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}'
  with temporary.open('wb') as file:
    for at in range(0, len(data), _CHUNK):
      file.write(bytes(data[at : at + _CHUNK]))  # storage takes no views
  temporary.replace(path)


def write_index(
  folder: epath.Path,
  vocabulary: Vocabulary,
  plan: RowPlan,
  block: int,
  splits: dict[str, dict[str, Any]],
  about: dict[str, Any],
) -> None:
  """Writes what makes a folder of shards: `index.json` comes last.

  Args:
    folder: that holds the shards.
    vocabulary: of the tokens.
    plan: how documents became rows.
    block: see `StoredRows`.
    splits: {'files': [File]} and `COUNTS` of each.
    about: where the text is from, for a reader.
  """
  layout = layout_of(vocabulary, plan.row_length)
  index = {
    'format': FORMAT,
    'vocabulary': {'fingerprint': vocabulary.fingerprint, 'size': vocabulary.size},
    'row_length': layout.row_length,
    'token_bytes': layout.token_bytes,
    'block': block,
    'plan': dataclasses.asdict(plan),
    'splits': {
      name: {**split, 'files': [file._asdict() for file in split['files']]}
      for name, split in splits.items()
    },
    'about': about,
  }
  # Whoever finds an index finds all that it names: the shards were written before, the
  # vocabulary is written now, the index last.
  text = json.dumps(vocabulary.to_dict())
  write_atomically(folder / VOCABULARY, text.encode('utf-8'))
  write_atomically(folder / INDEX, (json.dumps(index, indent=1) + '\n').encode('utf-8'))


def load(path: str, vocabulary: Vocabulary | None = None) -> dict[str, StoredRows]:
  """The splits of a folder of shards; sizes are checked, contents are not (`verify`).

  Args:
    path: the folder.
    vocabulary: that the run uses, if it has one.

  Raises:
    UserError: no such folder, one that is unfinished or damaged, or of another
      vocabulary.
  """
  folder = epath.Path(os.path.expanduser(path))
  index = _read_index(folder)
  # An index is read whole before any of it is used: a hand-edited or truncated one fails
  # here, in one sentence, and not later with a KeyError.
  try:
    fingerprint = index['vocabulary']['fingerprint']
    layout = RecordLayout(_size(index['row_length']), _size(index['token_bytes']))
    fields = index['plan']
    plan = RowPlan(
      row_length=_size(fields['row_length']),
      positions=_size(fields['positions'], 0),
      room=tuple(map(int, fields['room'])),
      # Older shards are of texts and pairs.
      template=str(fields.get('template', '')),
      blank=str(fields.get('blank', '')),
      ranked=bool(fields.get('ranked', False)),
    )
    splits = {
      name: (tuple(map(_file, split['files'])), split)
      for name, split in index['splits'].items()
    }
    block = _size(index['block'])
    if not splits:
      raise KeyError('splits')
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UserError(
      f'{folder / INDEX} must be an index of shards, got one that lacks or spoils '
      f'{error}; make the shards again.'
    ) from error
  if vocabulary is not None:
    configs.check(
      fingerprint == vocabulary.fingerprint,
      f'the shards in {folder} must be of the vocabulary of the run',
      f'{fingerprint} there, {vocabulary.fingerprint} here',
      'leave VocabularyConfig.path empty to use theirs, or make shards with this one',
    )
  rows = {}
  for name, (files, split) in splits.items():
    for file in files:
      # A name with a slash or of dots alone could read outside the folder.
      configs.check(
        re.fullmatch(r'[\w.-]+', file.name) is not None and file.name.strip('.') != '',
        f'an index of shards must name files of its own folder {folder}',
        repr(file.name),
        _AGAIN,
      )
    _check_sizes(folder, layout, files)
    # Contents are told apart by the checksums of the files, and how they are shuffled by
    # `block`: a run that goes on must find both as they were.
    digest = hashlib.sha256(json.dumps([*files, layout, block]).encode()).hexdigest()[:16]
    stats = {key: split.get(key, 0) for key in COUNTS}
    rows[name] = StoredRows(folder, layout, files, block, plan, {**stats, 'digest': digest})
  return rows


def vocabulary_of(path: str) -> Vocabulary:
  """The vocabulary that shards carry.

  Raises:
    UserError: they have none, or one that they were not made with.
  """
  folder = epath.Path(os.path.expanduser(path))
  index = _read_index(folder)
  vocabulary = loading.from_dict(configs.read_json(folder / VOCABULARY, _AGAIN))
  about = index.get('vocabulary')
  expected = about.get('fingerprint') if isinstance(about, dict) else None
  configs.check(
    vocabulary.fingerprint == expected,
    f'{folder / VOCABULARY} must be the vocabulary that {INDEX} names',
    f'{vocabulary.fingerprint} instead of {expected}',
    _AGAIN,
  )
  return vocabulary


def verify(rows: StoredRows, part: int = 0, parts: int = 1) -> int:
  """Compares files with their checksums, each process its own part of them.

  Args:
    rows: of a split.
    part: which.
    parts: of how many.

  Returns:
    Bytes that were read.

  Raises:
    UserError: a file that was altered, by name.
  """

  def check(file: File) -> int:
    sha, size = hashlib.sha256(), 0
    with (rows.folder / file.name).open('rb') as opened:
      while data := opened.read(_CHUNK):
        sha.update(data)
        size += len(data)
    check_content(rows.folder, file, sha.hexdigest())
    return size

  # Threads suffice: hashlib and file reads release the GIL.
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    return sum(pool.map(check, rows.files[part::parts]))


def check_content(folder: epath.Path, file: File, sha256: str) -> None:
  """Raises UserError for a file whose content is not that of the index."""
  configs.check(
    sha256 == file.sha256,
    f'the shard {folder / file.name} must have the SHA-256 of its index, '
    f'{file.sha256[:12]}...',
    f'{sha256[:12]}...: it was altered or damaged',
    'copy it again, or make the shards again',
  )


def _size(value: Any, least: int = 1) -> int:
  """A number of an index that is a size; ValueError or TypeError for another."""
  if not least <= operator.index(value) < 2**31:
    raise ValueError(f'a size, {value}')
  return value


def _file(fields: dict[str, Any]) -> File:
  file = File(**fields)
  words = isinstance(file.name, str) and isinstance(file.sha256, str)
  if not words or operator.index(file.rows) < 0:
    raise ValueError(f'a file, {fields}'[:80])
  return file


def _read_index(folder: epath.Path) -> dict[str, Any]:
  configs.check(
    (folder / INDEX).exists(),
    f'a folder of shards must hold {INDEX}',
    f'{folder}, which does not',
    'give a folder of shards, or run make_shards again, which goes on where it stopped',
  )
  index = configs.read_json(folder / INDEX, _AGAIN)
  configs.check(
    index.get('format') == FORMAT,
    f'shards of format {FORMAT} are read',
    f'format {index.get("format")!r} in {folder}',
    'make them again',
  )
  return index


def _check_sizes(folder: epath.Path, layout: RecordLayout, files: tuple[File, ...]) -> None:
  for file in files:
    # Records of one size: a file that was cut short shows by its length, without reading.
    path, expected = folder / file.name, file.rows * layout.stride
    size = path.stat().length if path.exists() else None
    configs.check(
      size == expected,
      f'the shard {path} must have {expected:,} bytes',
      'no such file' if size is None else f'{size:,}',
      'copy it again, or make the shards again',
    )
