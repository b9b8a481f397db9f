"""Documents, from wherever they are: the built-in set, files, or TFDS."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.data.corpora import text_files
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.data.corpora.text_files import Document
from glm_jax.text import loading
from glm_jax.text import vocabulary as vocabularies
from glm_jax.text.vocabulary import Vocabulary

# Rows of shards that are decoded at a time.
_AT_ONCE = 256

SHARDS, TASK = 'shards:', 'task:'
"""What a corpus that is made of shards, or a seqio task, begins with."""


def documents(config: CorpusConfig, split: str) -> Iterator[Document]:
  """The documents of 'train' or 'validation', in a fixed order.

  Raises:
    UserError: no such files, none left, or text that cannot be read: the file and
      the line or byte are named.
  """
  if config.corpus == 'documentation' or config.corpus.startswith('tfds:'):
    yield from _from_tfds(config, split)
  elif config.corpus.startswith(TASK):
    yield from _from_task(config, split)
  elif config.corpus.startswith(SHARDS):
    yield from _from_shards(config.corpus.removeprefix(SHARDS), split)
  elif config.validation:
    pattern = config.corpus if split == 'train' else config.validation
    yield from text_files.read(pattern, config)
  else:
    pieces = text_files.cut_if_few(list(text_files.read(config.corpus, config)))
    yield from _held_out(pieces, config, split)


def fingerprint(config: CorpusConfig) -> str:
  """Tells one state of a corpus from another, without reading all of it."""
  # Files are told apart by path, size and time, not by content. `documentation` has files
  # too, those that its builder wrote; of other data sets the name is all there is.
  if config.corpus == 'documentation':
    from glm_jax.data.corpora import documentation

    parts = [
      _stats(path)
      for path in sorted(Path(documentation.prepared(cache_dir(config)).data_dir).iterdir())
    ]
  elif config.corpus.startswith(('tfds:', TASK)):
    parts = [config.corpus, config.text_key, config.tfds_data_dir]
  else:
    patterns = [config.corpus] + [config.validation] * bool(config.validation)
    parts = [_stats(path) for pattern in patterns for path in text_files.find(pattern)]
  # And what decides which documents are held out, and how they are read.
  parts += [config.validation, config.validation_fraction, config.errors]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def cache_dir(config: CorpusConfig) -> Path:
  """Where this run keeps what it makes from its corpus."""
  return Path(config.cache_dir).expanduser()


def load_or_train_vocabulary(
  config: VocabularyConfig, corpora: Sequence[CorpusConfig]
) -> Vocabulary:
  """The vocabulary of a run: the one it names, that of its shards, or one trained on its
  text at first use, then cached."""
  if config.path:
    return loading.load(config.path)
  for corpus in corpora:
    if corpus.corpus.startswith(SHARDS):
      from glm_jax.data.rows import shards

      return shards.vocabulary_of(corpus.corpus.removeprefix(SHARDS))
  # A trained vocabulary is a .model file, whatever pieces stand behind it.
  kind = '' if config.kind == 'sentencepiece' else f'-{config.kind}'
  prints = '-'.join(map(fingerprint, corpora))
  name = f'{prints}-{config.size}{kind}.model'
  path = cache_dir(corpora[0]) / 'vocabularies' / name
  if not path.exists():
    began = time.perf_counter()
    # Trained on training documents alone: validation must not shape the vocabulary.
    texts = [d.text for corpus in corpora for d in documents(corpus, 'train')]
    _check_text(texts, corpora[0])
    model = vocabularies.train_sentencepiece(
      texts, config.size, bpe=config.kind == 'chatglm3'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written whole or not at all, since another run may be waiting for it.
    temporary = path.with_name(f'.{name}.{os.getpid()}')
    temporary.write_bytes(model)
    os.replace(temporary, path)
    vocab = loading.load(f'{config.kind}:{path}')
    print(
      f'vocabulary: {vocab.size:,} pieces in {time.perf_counter() - began:.0f} s ({path})',
      flush=True,
    )
    if vocab.size < config.size:
      print(f'  (the corpus has no more; {config.size:,} were asked for)', flush=True)
  return loading.load(f'{config.kind}:{path}')


def _check_text(texts: list[str], config: CorpusConfig) -> None:
  configs.check(
    any(text.strip() for text in texts),
    'the corpus must hold some text',
    f'none in {config.corpus!r}',
    'give other files',
  )


def _from_tfds(config: CorpusConfig, split: str) -> Iterator[Document]:
  if 'validation' in tfds_builder(config).info.splits:
    yield from read_tfds(config, split)
  else:
    yield from _held_out(list(read_tfds(config, 'train')), config, split)


def tfds_builder(config: CorpusConfig) -> Any:
  """The TFDS data set that a corpus names, `documentation` included.

  Raises:
    UserError: there is none that is prepared.
  """
  if config.corpus == 'documentation':
    from glm_jax.data.corpora import documentation

    return documentation.prepared(cache_dir(config))
  import tensorflow_datasets as tfds

  name = config.corpus.removeprefix('tfds:')
  # NAME:VERSION is ours; TFDS writes name/version, or name/config:version.
  name = name.replace(':', '/') if ':' in name and '/' not in name else name
  with _no_data_set(config):
    builder = tfds.builder(name, data_dir=config.tfds_data_dir or None)
    # A builder is made even if nothing is prepared; only reading tells.
    builder.as_dataset(split='train')
    return builder


def read_tfds(config: CorpusConfig, split: str) -> Iterator[Document]:
  """The documents of a split of a TFDS data set, or a range of them, 'train[10:20]'."""
  import tensorflow_datasets as tfds

  # Cached in memory, a data set that is read in part would be warned about.
  reading = tfds.ReadConfig(try_autocache=False)
  builder = tfds_builder(config)
  with _no_data_set(config):
    dataset = tfds.as_numpy(builder.as_dataset(split=split, read_config=reading))
  for example in dataset:
    yield _text_of(example, config)


@contextlib.contextmanager
def _no_data_set(config: CorpusConfig) -> Iterator[None]:
  try:
    yield
  # TFDS raises errors of many kinds, with no base class in common.
  except Exception as error:
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise UserError(
      f'{config.corpus!r} must be a TFDS data set that is prepared, got: '
      f'{message}; see CorpusConfig.tfds_data_dir.'
    ) from error


def _from_task(config: CorpusConfig, split: str) -> Iterator[Document]:
  task = find_task(config)
  if 'validation' in task.splits:
    yield from read_task(task, config, split)
  else:
    yield from _held_out(list(read_task(task, config, 'train')), config, split)


def find_task(config: CorpusConfig) -> Any:
  """The seqio task that a corpus names.

  Raises:
    UserError: it is not registered.
  """
  import seqio

  name = config.corpus.removeprefix(TASK)
  known = seqio.TaskRegistry.names()
  configs.check(
    name in known,
    "a corpus 'task:NAME' must name a registered seqio task",
    f'{name!r}; registered are {sorted(known)}',
    'register it in a module named by --import',
  )
  return seqio.TaskRegistry.get(name)


def read_task(
  task: Any, config: CorpusConfig, split: str, part: int = 0, parts: int = 1
) -> Iterator[Document]:
  """The documents of a seqio task, or a part of them: text, or the feature tokens."""
  import seqio

  # No feature lengths, and nothing trimmed: whole documents in a fixed order.
  dataset = task.get_dataset(
    None,
    split=split,
    shuffle=False,
    seed=0,
    shard_info=seqio.ShardInfo(part, parts),
    num_epochs=1,
    trim_output_features=False,
  )
  for example in dataset.as_numpy_iterator():
    if 'tokens' in example:
      yield Document('', ids=example['tokens'].tolist())
    else:
      yield _text_of(example, config)


def _from_shards(path: str, split: str) -> Iterator[Document]:
  """Rows as texts, for a reader: shards hold tokens, and no documents."""
  from glm_jax.data.rows import shards

  vocabulary, rows = shards.vocabulary_of(path), shards.load(path)[split]
  for first in range(0, len(rows), _AT_ONCE):
    table = rows.read(first, min(_AT_ONCE, len(rows) - first))
    for tokens, length in zip(table.tokens, table.lengths, strict=True):
      yield Document(vocabulary.decode(tokens[:length].tolist()))


def _text_of(example: dict, config: CorpusConfig) -> Document:
  value = example.get(config.text_key)
  configs.check(
    isinstance(value, bytes),
    'CorpusConfig.text_key must be a text feature',
    f'{config.text_key!r} of {sorted(example)}',
    'choose one of these',
  )
  return Document(value.decode('utf-8', config.errors))


def _held_out(docs: list[Document], config: CorpusConfig, split: str) -> list[Document]:
  """The documents of a split, told apart by a hash of their text."""
  _check_text([d.text for d in docs], config)
  # The lowest hashes are held out. A document keeps its side when others come or go, but
  # for those near the limit, and copies of one text are on the same side.
  ranks = [int(hashlib.sha256(d.text.encode('utf-8')).hexdigest()[:12], 16) for d in docs]
  count = max(1, round(config.validation_fraction * len(docs)))
  limit = sorted(ranks)[count - 1] if docs else 0
  held_out = [rank <= limit for rank in ranks]
  configs.check(
    0 < sum(held_out) < len(docs),
    'some documents must be held out for validation, and some remain',
    f'{len(docs)} documents in {config.corpus!r}',
    'give more text, or CorpusConfig.validation',
  )
  return [d for d, out in zip(docs, held_out, strict=True) if out == (split != 'train')]


def _stats(path: epath.Path) -> list:
  if '://' in str(path):
    stat = path.stat()
    return [str(path), stat.length, stat.mtime]
  # The times of os.stat are finer than those of epath.
  stat = os.stat(path)
  return [os.path.realpath(path), stat.st_size, stat.st_mtime_ns]
