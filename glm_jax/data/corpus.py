"""Documents, from wherever they are: the built-in set, files, or TFDS."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from glm_jax import configs
from glm_jax.data.config import CorpusConfig, VocabularyConfig
from glm_jax.text import loading
from glm_jax.text import vocabulary as vocabularies
from glm_jax.text.vocabulary import Vocabulary

# With fewer documents than this, long ones are cut so that some can be held out.
_FEW = 20
_PIECE = 2000  # characters, at least, of such a part
_AT_ONCE = 256  # rows


SHARDS, TASK = 'shards:', 'task:'
"""What a corpus that is made of shards, or a seqio task, begins with."""


class Document(NamedTuple):
  """A text, what precedes it without being learnt, and its tokens where it has them."""

  text: str
  prompt: str = ''
  ids: Sequence[int] | None = None


def documents(config: CorpusConfig, split: str) -> Iterator[Document]:
  """The documents of 'train' or 'validation', in a fixed order.

  Raises:
    ValueError: no such files, none left, or text that cannot be read: the file and
      the line or byte are named.
  """
  if config.corpus == 'documentation':
    from glm_jax.data import documentation

    builder = documentation.prepared(cache_dir(config))
    yield from map(Document, documentation.texts(builder, split))
  elif config.corpus.startswith('tfds:'):
    yield from _from_tfds(config, split)
  elif config.corpus.startswith(TASK):
    yield from _from_task(config, split)
  elif config.corpus.startswith(SHARDS):
    yield from _from_shards(config.corpus.removeprefix(SHARDS), split)
  elif config.validation:
    pattern = config.corpus if split == 'train' else config.validation
    yield from (d for path in _files(pattern) for d in _read(path, config))
  else:
    found = [d for path in _files(config.corpus) for d in _read(path, config)]
    yield from _held_out(_cut_if_few(found), config, split)


def fingerprint(config: CorpusConfig) -> str:
  """Tells one state of a corpus from another, without reading all of it."""
  if config.corpus == 'documentation':
    from glm_jax.data import documentation

    parts = [
      _stats(path)
      for path in sorted(Path(documentation.prepared(cache_dir(config)).data_dir).iterdir())
    ]
  elif config.corpus.startswith(('tfds:', TASK)):
    parts = [config.corpus, config.text_key, config.tfds_data_dir]
  else:
    patterns = [config.corpus] + [config.validation] * bool(config.validation)
    parts = [_stats(path) for pattern in patterns for path in _files(pattern)]
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
      from glm_jax.data import shards

      return shards.vocabulary_of(corpus.corpus.removeprefix(SHARDS))
  # A trained vocabulary is a .model file, whatever pieces stand behind it.
  kind = '' if config.kind == 'sentencepiece' else f'-{config.kind}'
  prints = '-'.join(map(fingerprint, corpora))
  name = f'{prints}-{config.size}{kind}.model'
  path = cache_dir(corpora[0]) / 'vocabularies' / name
  if not path.exists():
    began = time.perf_counter()
    texts = [d.text for corpus in corpora for d in documents(corpus, 'train')]
    _check_some(texts, corpora[0])
    model = vocabularies.train_sentencepiece(
      texts, config.size, bpe=config.kind == 'chatglm3'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{name}.{os.getpid()}')
    temporary.write_bytes(model)
    os.replace(temporary, path)
    found = loading.load(f'{config.kind}:{path}')
    print(
      f'vocabulary: {found.size:,} pieces in {time.perf_counter() - began:.0f} s ({path})',
      flush=True,
    )
    if found.size < config.size:
      print(f'  (the corpus has no more; {config.size:,} were asked for)', flush=True)
  return loading.load(f'{config.kind}:{path}')


def _check_some(texts: list[str], config: CorpusConfig) -> None:
  configs.check(
    any(text.strip() for text in texts),
    'the corpus must hold some text',
    f'none in {config.corpus!r}',
    'give other files',
  )


def _files(pattern: str) -> list[Path]:
  found = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
  paths = [Path(path) for path in found if not os.path.isdir(path)]
  configs.check(
    bool(paths),
    'CorpusConfig.corpus must be a glob of .txt or .jsonl files, '
    "'documentation' or 'tfds:NAME'",
    f'{pattern!r}, which matches no file',
    'correct it, or the permissions of its folder',
  )
  for path in paths:
    configs.check(
      path.suffix in ('.txt', '.jsonl'),
      'text files must end in .txt or .jsonl',
      str(path),
      'rename or convert it',
    )
  return paths


def _read(path: Path, config: CorpusConfig) -> Iterator[Document]:
  """The documents of one file."""
  try:
    content = path.read_bytes()
  except OSError as error:
    raise ValueError(
      f'text files must be readable, got {path} ({error.strerror}); correct '
      'its permissions.'
    ) from error
  content = content.removeprefix(b'\xef\xbb\xbf')  # a byte-order mark is no text
  try:
    text = content.decode('utf-8', config.errors)
  except UnicodeDecodeError as error:
    raise ValueError(
      f'text files must be UTF-8, got {path} with byte 0x{content[error.start]:02x} at '
      f"offset {error.start}; convert it, or set CorpusConfig.errors to 'replace' or "
      "'ignore'."
    ) from error
  if path.suffix == '.txt':
    yield Document(text)
    return
  for number, line in enumerate(text.split('\n'), 1):
    if line.strip():
      yield _parse(line, f'{path} line {number}')


def _parse(line: str, where: str) -> Document:
  try:
    fields = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(
      f'a .jsonl file must have a JSON object a line, got {where}: '
      f'{error.msg} (column {error.colno}); correct it.'
    ) from error
  ok = (
    isinstance(fields, dict)
    and isinstance(fields.get('text'), str)
    and isinstance(fields.get('prompt', ''), str)
  )
  configs.check(
    ok,
    "a .jsonl line must be an object with a string 'text' and, optionally, "
    "a string 'prompt'",
    f'{line[:80]!r} in {where}',
    'correct it',
  )
  # A lone surrogate can be written in JSON but is no character.
  for value in (fields['text'], fields.get('prompt', '')):
    try:
      value.encode('utf-8')
    except UnicodeEncodeError as error:
      raise ValueError(
        f'text must be Unicode characters, got a lone surrogate in {where}; correct it.'
      ) from error
  return Document(fields['text'], fields.get('prompt', ''))


def _from_tfds(config: CorpusConfig, split: str) -> Iterator[Document]:
  import tensorflow_datasets as tfds

  name = config.corpus.removeprefix('tfds:')
  name = name.replace(':', '/') if ':' in name and '/' not in name else name
  try:
    builder = tfds.builder(name, data_dir=config.tfds_data_dir or None)
    splits = set(builder.info.splits)
    own = split if split in splits else 'train'
    dataset = tfds.as_numpy(builder.as_dataset(split=own))
  except Exception as error:  # TFDS raises many kinds
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(
      f'{config.corpus!r} must be a TFDS data set that is prepared, got: '
      f'{message}; see CorpusConfig.tfds_data_dir.'
    ) from error
  found = (_tfds_text(example, config) for example in dataset)
  if 'validation' in splits:
    yield from found
  else:
    yield from _held_out(list(found), config, split)


def _from_task(config: CorpusConfig, split: str) -> Iterator[Document]:
  task = find_task(config)
  if 'validation' in task.splits:
    yield from read_task(task, config, split)
  else:
    yield from _held_out(list(read_task(task, config, 'train')), config, split)


def find_task(config: CorpusConfig) -> Any:
  """The seqio task that a corpus names.

  Raises:
    ValueError: it is not registered.
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
      yield _tfds_text(example, config)


def _from_shards(path: str, split: str) -> Iterator[Document]:
  """Rows as texts, for a reader: shards hold tokens, and no documents."""
  from glm_jax.data import shards

  vocabulary, rows = shards.vocabulary_of(path), shards.load(path)[split]
  for first in range(0, len(rows), _AT_ONCE):
    table = rows.read(first, min(_AT_ONCE, len(rows) - first))
    for tokens, length in zip(table.tokens, table.lengths, strict=True):
      yield Document(vocabulary.decode(tokens[:length].tolist()))


def _tfds_text(example: dict, config: CorpusConfig) -> Document:
  value = example.get(config.text_key)
  configs.check(
    isinstance(value, bytes),
    'CorpusConfig.text_key must be a text feature',
    f'{config.text_key!r} of {sorted(example)}',
    'choose one of these',
  )
  return Document(value.decode('utf-8', config.errors))


def _held_out(found: list[Document], config: CorpusConfig, split: str) -> list[Document]:
  """The documents of a split, told apart by a hash of their text."""
  _check_some([d.text for d in found], config)
  ranks = [int(hashlib.sha256(d.text.encode('utf-8')).hexdigest()[:12], 16) for d in found]
  count = max(1, round(config.validation_fraction * len(found)))
  limit = sorted(ranks)[count - 1] if found else 0
  held_out = [rank <= limit for rank in ranks]
  configs.check(
    0 < sum(held_out) < len(found),
    'some documents must be held out for validation, and some remain',
    f'{len(found)} documents in {config.corpus!r}',
    'give more text, or CorpusConfig.validation',
  )
  return [d for d, out in zip(found, held_out, strict=True) if out == (split != 'train')]


def _cut_if_few(found: list[Document]) -> list[Document]:
  """Few long documents become many, cut at blank lines."""
  if len(found) >= _FEW:
    return found
  parts = []
  for document in found:
    part = ''
    # Each paragraph keeps the blank lines behind it: joined, the parts are the text.
    for paragraph in document.text.replace('\r\n', '\n').split('\n\n'):
      part += paragraph + '\n\n'
      if len(part) >= _PIECE:
        parts.append(Document(part.strip('\n'), document.prompt))
        part = ''
    if part.strip():
      parts.append(Document(part.strip('\n'), document.prompt))
  return parts


def _stats(path: Path) -> list:
  stat = path.stat()
  return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
