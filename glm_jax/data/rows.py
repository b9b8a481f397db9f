"""The corpus as rows of tokens of one length: what the stream of examples indexes.

Every document becomes `prefix prompt text <eos>`, where the prefix is the vocabulary's:
[ENC], or [gMASK] sop, or nothing. Documents follow each other in one stream that is cut
into rows. A row that begins inside a document opens with a prefix of its own, so each
row does. Every token of every document is in exactly one row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from glm_jax import configs
from glm_jax.data import corpus as corpora
from glm_jax.data.config import CorpusConfig
from glm_jax.text.vocabulary import Vocabulary

_FORMAT = 1
TOKENS_FILE, SCORED_FILE = 'tokens.bin', 'scored.bin'
_FILES = (TOKENS_FILE, SCORED_FILE, 'lengths.bin')
_AT_ONCE = 256  # documents


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows of N tokens.

  Attributes:
    tokens: [n, N] int32, memory-mapped.
    scored: [n, N] bool, tokens that may carry loss: text and <eos>, not prompts.
    lengths: [n] int32; what follows is padding (the last row, and rows that would
      else end with a lone prefix).
    stats: documents, skipped, tokens, rows, and a digest of the content.
  """

  tokens: np.ndarray
  scored: np.ndarray
  lengths: np.ndarray
  stats: dict[str, Any]


def build_rows(
  config: CorpusConfig, vocabulary: Vocabulary, split: str, row_length: int
) -> Rows:
  """Tokenises a split of the corpus, or finds it done.

  Args:
    config: the corpus.
    vocabulary: of the tokens.
    split: 'train' or 'validation'.
    row_length: N.

  Raises:
    ValueError: no document of two tokens or more.
  """
  key = [_FORMAT, corpora.fingerprint(config), vocabulary.fingerprint, split, row_length]
  name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
  folder = corpora.cache_dir(config) / 'rows' / name
  if not (folder / 'index.json').exists():
    _write(config, vocabulary, split, row_length, folder)
  return _load(folder)


def pack(
  documents: Iterator[tuple[list[int], list[int]]],
  prefix: tuple[int, ...],
  eos: int,
  row_length: int,
) -> Iterator[tuple[list[int], list[bool]]]:
  """Rows of at most `row_length` tokens from (prompt ids, text ids) pairs.

  Yields:
    Tokens and whether each may carry loss.
  """
  row, scored = [], []
  for prompt, text in documents:
    tokens = [*prompt, *text, eos]
    flags = [False] * len(prompt) + [True] * (len(text) + 1)
    # A row may not end with a prefix that has nothing behind it.
    if len(row) >= row_length - len(prefix):
      yield row, scored
      row, scored = [], []
    row += prefix
    scored += [False] * len(prefix)
    at = 0
    while at < len(tokens):
      if len(row) == row_length:
        yield row, scored
        row, scored = [*prefix], [False] * len(prefix)
      room = row_length - len(row)
      row += tokens[at : at + room]
      scored += flags[at : at + room]
      at += room
  if row:
    yield row, scored


def _write(config, vocabulary, split, row_length, folder: Path) -> None:
  began = time.perf_counter()
  counts = {'documents': 0, 'skipped': 0, 'tokens': 0}
  temporary = folder.with_name(f'.{folder.name}.{os.getpid()}')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    encoded = _encode(corpora.documents(config, split), vocabulary, counts, split)
    eos = vocabulary.specials.eos
    rows = list(pack(encoded, vocabulary.prefix, eos, row_length))
    configs.check(
      bool(rows),
      f'the {split} split must hold a document of two tokens or more',
      f'none in {config.corpus!r} ({counts["skipped"]} skipped)',
      'give more text',
    )
    tokens = np.full((len(rows), row_length), vocabulary.specials.pad, np.int32)
    scored = np.zeros((len(rows), row_length), bool)
    for number, (ids, flags) in enumerate(rows):
      tokens[number, : len(ids)] = ids
      scored[number, : len(ids)] = flags
    lengths = np.array([len(ids) for ids, _ in rows], np.int32)
    sha = hashlib.sha256(tokens.tobytes() + scored.tobytes())
    stats = {
      **counts,
      'rows': len(rows),
      'row_length': row_length,
      'digest': sha.hexdigest()[:16],
    }
    for name, array in zip(_FILES, (tokens, scored, lengths), strict=True):
      array.tofile(temporary / name)
    (temporary / 'index.json').write_text(json.dumps(stats), encoding='utf-8')
    shutil.rmtree(folder, ignore_errors=True)
    try:
      os.replace(temporary, folder)
    except OSError:
      if not (folder / 'index.json').exists():  # else another process was first
        raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  print(
    f'{split}: {counts["documents"]:,} documents, {counts["tokens"]:,} tokens in '
    f'{len(rows):,} rows of {row_length} ({counts["skipped"]} documents under two '
    f'tokens skipped) in {time.perf_counter() - began:.0f} s',
    flush=True,
  )


def _encode(documents, vocabulary, counts, split) -> Iterator[tuple[list[int], list[int]]]:
  bar = iter(
    tqdm(
      documents, desc=f'tokenizing {split}', unit=' documents', leave=False, disable=None
    )
  )
  while group := list(itertools.islice(bar, _AT_ONCE)):
    prompts = vocabulary.encode_batch([d.prompt for d in group])
    for prompt, text in zip(
      prompts, vocabulary.encode_batch([d.text for d in group]), strict=True
    ):
      if len(text) < 2:
        counts['skipped'] += 1
        continue
      counts['documents'] += 1
      counts['tokens'] += len(prompt) + len(text)
      yield prompt, text


def _load(folder: Path) -> Rows:
  try:
    stats = json.loads((folder / 'index.json').read_text(encoding='utf-8'))
    shape = (stats['rows'], stats['row_length'])
    # A file shorter than its shape is refused by memmap.
    tokens, scored, lengths = (
      np.memmap(folder / name, dtype, 'r', shape=size)
      for name, dtype, size in zip(
        _FILES, (np.int32, np.bool_, np.int32), (shape, shape, shape[:1]), strict=True
      )
    )
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(
      f'cached rows must be readable, got {folder} ({error}); delete that '
      'folder, and they are made again.'
    ) from error
  return Rows(tokens, scored, np.array(lengths), stats)
