"""Documents to token ids, and the rows of a corpus of one process, kept in a cache."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.data.corpora import corpus as corpora
from glm_jax.data.corpora import parts, sources
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.fields import Document
from glm_jax.data.corpora.sources import CorpusPart
from glm_jax.data.making import rendered
from glm_jax.data.making.order import Order
from glm_jax.data.rows import pairs, shards
from glm_jax.data.rows.table import Encoded, RowPlan, grouped_rows, make_rows, pack
from glm_jax.text.vocabulary import Vocabulary

# Counts up when the same text and plan would make other rows: caches are made again.
_FORMAT = 5
# Documents that are encoded together, which the vocabulary does in threads.
_AT_ONCE = 256


def encode(
  documents: Iterable[Document], vocabulary: Vocabulary, counts: dict[str, int]
) -> Iterator[Encoded]:
  """(prompt ids, text ids) of each document with something to see and to predict.

  Args:
    documents: of a corpus; those that hold token ids already are taken as they are.
    vocabulary: of the tokens.
    counts: 'documents', 'tokens' and 'skipped' are added to.
  """
  documents = iter(documents)
  while group := list(itertools.islice(documents, _AT_ONCE)):
    # Only what needs encoding goes in; the loop below takes the results in the same order.
    texts = vocabulary.encode_batch([d.text for d in group if d.ids is None])
    prompts = vocabulary.encode_batch([d.prompt for d in group if d.prompt])
    texts, prompts = iter(texts), iter(prompts)
    for document in group:
      text = next(texts) if document.ids is None else document.ids
      prompt = next(prompts) if document.prompt else []
      # A single token leaves nothing to see or nothing to predict, unless a prompt is seen.
      if not len(text) or len(prompt) + len(text) < 2:
        counts['skipped'] += 1
        continue
      counts['documents'] += 1
      counts['tokens'] += len(prompt) + len(text)
      yield np.asarray(prompt, np.int32), np.asarray(text, np.int32)


def new_counts() -> dict[str, int]:
  """For `encode` to add to."""
  return dict.fromkeys(shards.COUNTS, 0)


def part_rows(
  documents: Iterable[Document],
  part: CorpusPart,
  split: str,
  order: Order,
  config: CorpusConfig,
  vocabulary: Vocabulary,
  plan: RowPlan,
  counts: dict[str, int],
) -> tuple[np.ndarray, np.ndarray]:
  """The rows of a split of a part of a corpus, by whoever makes them.

  Args:
    documents: of them, in order.
    part: of the corpus.
    split: 'train' or 'validation'.
    order: of the rows of all parts.
    config: of the corpus.
    vocabulary: of the tokens.
    plan: how documents become rows.
    counts: `shards.COUNTS`, which are added to.

  Returns:
    [n] uint64 keys, see `Order`; and [n, record_bytes] uint8 records.
  """
  if plan.ranked:
    found = rendered.ranked(documents, vocabulary, plan, config.too_long, counts)
    table = grouped_rows(found, plan.row_length)
  elif plan.template or plan.blank:
    table = pack(
      [*rendered.pieces(documents, vocabulary, plan, config.too_long, counts)], plan
    )
  else:
    opening, eos = vocabulary.prefix, vocabulary.specials.eos
    encoded = encode(documents, vocabulary, counts)
    fitting = pairs.fit(encoded, opening, plan, config.too_long, counts)
    table = make_rows(fitting, opening, eos, plan)
  records = shards.layout_of(vocabulary, plan.row_length).encode(table)
  return order.keys(len(records), part.number, shards.SPLITS.index(split)), records


def in_words(counts: Mapping[str, int]) -> str:
  """Documents and tokens, and what became of some, for a person."""
  words = {
    'skipped': 'with nothing to predict skipped',
    'shortened': 'longer than a row shortened',
    'dropped': 'longer than a row left out',
    'unranked': 'with tied, equal or empty answers or different questions left out',
  }
  some = [f'{counts[name]:,} {what}' for name, what in words.items() if counts[name]]
  text = f'{counts["documents"]:,} documents, {counts["tokens"]:,} tokens'
  return text + (f' ({", ".join(some)})' if some else '')


def cached_rows(
  config: CorpusConfig, vocabulary: Vocabulary, split: str, plan: RowPlan
) -> shards.StoredRows:
  """The rows of a split, tokenised into one file of the cache at first use.

  Args:
    config: the corpus.
    vocabulary: of the tokens.
    split: 'train' or 'validation'.
    plan: how documents become rows.

  Raises:
    UserError: nothing to learn from; a cache that is damaged.
  """
  # All that decides what is in the rows is in the name of their folder.
  key = [_FORMAT, corpora.fingerprint(config), vocabulary.fingerprint, split]
  key += [plan.row_length, plan.positions, plan.room, config.too_long]
  key += [plan.template, plan.blank] + ['ranked'] * plan.ranked
  name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
  folder = sources.cache_dir(config) / 'rows' / name
  if not (folder / shards.INDEX).exists():
    _write(config, vocabulary, split, plan, folder)
  try:
    return shards.load(str(folder), vocabulary)[split]
  except (UserError, KeyError) as error:
    raise UserError(
      f'cached rows must be readable, got {folder} ({error}); delete that '
      'folder, and they are made again.'
    ) from error


def _write(config, vocabulary, split, plan, folder) -> None:
  began = time.perf_counter()
  counts = new_counts()
  rows, todo = [], parts.find(config, parts.PART_BYTES)
  order = Order.of(todo)
  with tqdm(
    desc=f'tokenizing {split}', unit=' documents', leave=False, disable=None
  ) as bar:
    for part in todo:
      documents = (d for name, d in parts.read(config, part) if name == split)
      seen = (d for d in documents if bar.update() or True)
      rows.append(part_rows(seen, part, split, order, config, vocabulary, plan, counts))
  keys, records = map(np.concatenate, zip(*rows, strict=True))
  count = len(keys)
  check_not_empty(count, counts, split, config)
  about = {'corpus': config.corpus}
  records = records[np.argsort(keys)]
  store(folder, split, records, counts, vocabulary, plan, order.block, about)
  if split == 'validation' and (words := parts.held_out_in_words(todo)):
    print(words, flush=True)
  print(
    f'{split}: {in_words(counts)} in {count:,} rows of {plan.row_length} in '
    f'{time.perf_counter() - began:.0f} s',
    flush=True,
  )


def store(
  folder: Path,
  split: str,
  records: np.ndarray,
  counts: Mapping[str, int],
  vocabulary: Vocabulary,
  plan: RowPlan,
  block: int,
  about: dict[str, Any],
) -> None:
  """Makes a folder with the rows of one split.

  Args:
    folder: whose name says all that decides what is in them.
    split: 'train' or 'validation'.
    records: [n, record_bytes] uint8, in their order.
    counts: `shards.COUNTS` of them.
    vocabulary: of the tokens.
    plan: how documents became rows.
    block: see `StoredRows`.
    about: where the text is from, for a reader.
  """
  # Runs that begin at the same time each write a folder of their own; the first to be done
  # gives it the name that all look for.
  temporary = folder.with_name(f'.{folder.name}.{os.getpid()}')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  try:
    path = epath.Path(temporary) / shards.file_name(split, 0, 1)
    file = shards.write_file(path, records)
    splits: dict[str, dict[str, Any]] = {split: {**counts, 'files': [file]}}
    shards.write_index(epath.Path(temporary), vocabulary, plan, block, splits, about)
    # What stands there has no index, or is the same rows by another process.
    shutil.rmtree(folder, ignore_errors=True)
    try:
      os.replace(temporary, folder)
    except OSError:
      # A folder that is not empty is not replaced: another process was first.
      if not (folder / shards.INDEX).exists():
        raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def check_not_empty(
  count: int, counts: dict[str, int], split: str, config: CorpusConfig
) -> None:
  """Raises UserError if a split has no rows."""
  configs.check(
    count > 0,
    f'the {split} split must hold a document with something to see and to predict',
    f'{in_words(counts)} in {config.corpus!r}',
    {
      'train': 'give more text',
      'validation': 'give more text, raise CorpusConfig.validation_fraction, or give '
      'CorpusConfig.validation',
    }[split],
  )
