"""Where text comes from: files, TFDS data sets, seqio tasks, shards. One class each.

A source is in parts that are read apart from each other, on any machine, and do not depend
on how many processes read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.data.corpora import formats, objects, text_files
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.fields import Document
from glm_jax.data.corpora.held_out import HoldOut
from glm_jax.data.corpora.text_files import ByteRange

# Of a TFDS data set in a part.
_EXAMPLES = 100_000
# Bytes of files that are read to know whether they are the same.
_READ_WHOLE = 2**31
# Documents of a corpus that say whether it has prompts.
_FIRST = 1000
# Rows of shards that are decoded at a time.
_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class CorpusPart:
  """What one worker reads.

  Attributes:
    number: of the part; its order in the corpus.
    size: bytes of text, or examples, for a progress bar.
    split: 'train' or 'validation'; '' if `held_out` says which of its documents.
    ranges: of text files.
    source: split and range of a TFDS data set; split, part and parts of a seqio task.
    held_out: of all parts alike.
  """

  number: int
  size: int
  split: str = ''
  ranges: tuple[ByteRange, ...] = ()
  source: tuple[Any, ...] = ()
  held_out: HoldOut | None = None


class TextSource:
  """The text that a `CorpusConfig` names; a kind of text is a subclass."""

  prefix = ''
  """What `CorpusConfig.corpus` begins with."""

  def __init__(self, config: CorpusConfig):
    self.config, self.name = config, config.corpus.removeprefix(self.prefix)

  def has_validation(self) -> bool:
    """Whether what is held out is a split of its own."""
    raise NotImplementedError

  def parts(self, size: float) -> list[CorpusPart]:
    """Of about so many bytes of text, or of one for `math.inf`; all have number 0."""
    raise NotImplementedError

  def read(self, part: CorpusPart) -> Iterator[Document]:
    """The documents of a part, in order."""
    raise NotImplementedError

  def fingerprint(self) -> list[Any]:
    """What tells one state of the text from another."""
    return [self.config.corpus, self.config.tfds_data_dir]

  def has_prompts(self) -> bool:
    """Whether documents are pairs: of the first so many, any is."""
    return any(d.prompt for d in itertools.islice(self.training(), _FIRST))

  def holds(self, count: int) -> bool:
    """Whether there are so many documents to train on, held-out ones included."""
    return len(list(itertools.islice(self.training(), count))) == count

  def training(self) -> Iterator[Document]:
    """All that is not a validation split, in order."""
    for part in self.parts(math.inf):
      if part.split != 'validation':
        yield from self.read(part)

  def vocabulary(self) -> Any:
    """That of the text's tokens; None for text that has none."""
    return None

  def _where(self) -> str:
    return f' in {self.config.corpus!r}'


class TextFiles(TextSource):
  """Files of the formats of `glm_jax.data.corpora.formats`, here or in a bucket."""

  def has_validation(self) -> bool:
    return bool(self.config.validation)

  def parts(self, size: float) -> list[CorpusPart]:
    if not self.has_validation():
      return self._parts(self.name, '', size)
    held_out = self._parts(self.config.validation, 'validation', size)
    return [*self._parts(self.name, 'train', size), *held_out]

  def _parts(self, pattern: str, split: str, size: float) -> list[CorpusPart]:
    groups = text_files.groups(text_files.find(pattern), size)
    total = lambda group: sum(piece.end - piece.start for piece in group)
    return [CorpusPart(0, total(group), split, tuple(group)) for group in groups]

  def read(self, part: CorpusPart) -> Iterator[Document]:
    for piece in part.ranges:
      yield from text_files.documents(piece, self.config)

  def holds(self, count: int) -> bool:
    # Files are read only until it is clear that there are enough.
    seen = 0
    for path in text_files.find(self.name):
      seen += text_files.count(path, count, self.config)
      if seen >= count:
        return True
    return False

  def fingerprint(self) -> list[Any]:
    patterns = [self.name] + [self.config.validation] * self.has_validation()
    return [_state_of(text_files.find(pattern)) for pattern in patterns]


class DataSet(TextSource):
  """A data set of TFDS that is prepared."""

  prefix = 'tfds:'

  def builder(self) -> Any:
    """Of TFDS; raises UserError if there is none that is prepared."""
    import tensorflow_datasets as tfds

    # NAME:VERSION is ours; TFDS writes name/version, or name/config:version.
    name = self.name
    name = name.replace(':', '/') if ':' in name and '/' not in name else name
    with self._prepared():
      builder = tfds.builder(name, data_dir=self.config.tfds_data_dir or None)
      # A builder is made even if nothing is prepared; only reading tells.
      builder.as_dataset(split='train')
      return builder

  @contextlib.contextmanager
  def _prepared(self) -> Iterator[None]:
    try:
      yield
    # TFDS raises errors of many kinds, with no base class in common.
    except Exception as error:
      message = str(error).splitlines()[0] if str(error) else type(error).__name__
      raise UserError(
        f'{self.config.corpus!r} must be a TFDS data set that is prepared, got: '
        f'{message}; run tfds build, or set CorpusConfig.tfds_data_dir to where it is.'
      ) from error

  def has_validation(self) -> bool:
    return 'validation' in self.builder().info.splits

  def parts(self, size: float) -> list[CorpusPart]:
    splits = self.builder().info.splits
    counts = {name: info.num_examples for name, info in splits.items()}
    both = 'validation' in counts
    most = _EXAMPLES if size < math.inf else max(counts.values())
    return [
      CorpusPart(0, min(most, n - first), name if both else '', source=(name, first))
      for name, n in counts.items()
      if name in ('train', 'validation')
      for first in range(0, n, most)
    ]

  def read(self, part: CorpusPart) -> Iterator[Document]:
    split, first = part.source
    yield from self._read(f'{split}[{first}:{first + part.size}]')

  def holds(self, count: int) -> bool:
    return self.builder().info.splits['train'].num_examples >= count

  def _read(self, split: str) -> Iterator[Document]:
    import tensorflow_datasets as tfds

    # Cached in memory, a data set that is read in part would be warned about.
    reading = tfds.ReadConfig(try_autocache=False)
    builder = self.builder()
    with self._prepared():
      dataset = tfds.as_numpy(builder.as_dataset(split=split, read_config=reading))
    for example in dataset:
      yield objects.read(example, self.config, self._where)


class InstalledDocs(DataSet):
  """The documentation of the Python that runs this, and of its packages."""

  prefix = 'documentation'

  def builder(self) -> Any:
    from glm_jax.data.corpora import documentation

    return documentation.prepared(cache_dir(self.config))

  def has_prompts(self) -> bool:
    return False

  def fingerprint(self) -> list[Any]:
    # Files that the builder wrote.
    return _state_of(sorted(epath.Path(self.builder().data_dir).iterdir()))


class Questions(InstalledDocs):
  """Questions about its functions: what they do, see `summaries`."""

  prefix = 'documentation:summaries'

  def builder(self) -> Any:
    from glm_jax.data.corpora import summaries

    return summaries.prepared(cache_dir(self.config))

  def has_prompts(self) -> bool:
    return True


class SeqioTask(TextSource):
  """A registered seqio task: of text, or of the feature tokens."""

  prefix = 'task:'

  def task(self) -> Any:
    """Raises UserError if it is not registered."""
    import seqio

    known = seqio.TaskRegistry.names()
    configs.check(
      self.name in known,
      "a corpus 'task:NAME' must name a registered seqio task",
      f'{self.name!r}; registered are {sorted(known)}',
      'register it in a module named by --import',
    )
    return seqio.TaskRegistry.get(self.name)

  def has_validation(self) -> bool:
    return 'validation' in self.task().splits

  def parts(self, size: float) -> list[CorpusPart]:
    task, both = self.task(), self.has_validation()
    found = []
    for split in ('train', 'validation')[: 1 + both]:
      # The shards of a task's source are its parts: seqio cuts no finer.
      n = len(task.source.list_shards(split)) if size < math.inf else 1
      found += [
        CorpusPart(0, 1, split if both else '', source=(split, i, n)) for i in range(n)
      ]
    return found

  def read(self, part: CorpusPart) -> Iterator[Document]:
    import seqio

    split, number, count = part.source
    # No feature lengths, and nothing trimmed: whole documents in a fixed order.
    dataset = self.task().get_dataset(
      None,
      split=split,
      shuffle=False,
      seed=0,
      shard_info=seqio.ShardInfo(number, count),
      num_epochs=1,
      trim_output_features=False,
    )
    for example in dataset.as_numpy_iterator():
      if 'tokens' in example:
        yield Document('', ids=example['tokens'].tolist())
      else:
        yield objects.read(example, self.config, self._where)


class Shards(TextSource):
  """What `make_shards` wrote: rows as texts, for a reader."""

  prefix = 'shards:'

  def has_validation(self) -> bool:
    return True

  def parts(self, size: float) -> list[CorpusPart]:
    from glm_jax.data.rows import shards

    return [
      CorpusPart(0, len(rows), split, source=(split,))
      for split, rows in shards.load(self.name).items()
    ]

  def read(self, part: CorpusPart) -> Iterator[Document]:
    from glm_jax.data.rows import shards

    vocabulary, rows = self.vocabulary(), shards.load(self.name)[part.split]
    for first in range(0, len(rows), _AT_ONCE):
      table = rows.read(first, min(_AT_ONCE, len(rows) - first))
      for tokens, length in zip(table.tokens, table.lengths, strict=True):
        yield Document(vocabulary.decode(tokens[:length].tolist()))

  def vocabulary(self) -> Any:
    from glm_jax.data.rows import shards

    return shards.vocabulary_of(self.name)


KINDS: tuple[type[TextSource], ...] = (
  InstalledDocs,
  Questions,
  DataSet,
  SeqioTask,
  Shards,
)
"""By their prefixes; whatever has none of them is a glob of files."""


def of(config: CorpusConfig) -> TextSource:
  """The source that a corpus names.

  Example:
    >>> type(of(CorpusConfig(corpus='tfds:lm1b'))).__name__
    'DataSet'
    >>> type(of(CorpusConfig(corpus='documentation/*.txt'))).__name__
    'TextFiles'
  """
  for kind in KINDS:
    whole_name = not kind.prefix.endswith(':')
    if (
      config.corpus == kind.prefix if whole_name else config.corpus.startswith(kind.prefix)
    ):
      return kind(config)
  return TextFiles(config)


def cache_dir(config: CorpusConfig) -> Path:
  """Where a run keeps what it makes from its corpus."""
  return Path(config.cache_dir).expanduser()


def _state_of(paths: Sequence[epath.Path]) -> list[Any]:
  """Tells files from others: by content, or by path, size and time if they are large."""
  here = [path for path in paths if '://' not in str(path)]
  small = sum(os.path.getsize(path) for path in here) <= _READ_WHOLE
  return [_digest(path) if small and path in here else _stats(path) for path in paths]


def _digest(path: epath.Path) -> list[Any]:
  # The ending says how the file is read.
  return [path.suffix, _sha256(*_stats(path))]


@functools.cache
def _sha256(path: str, size: int, modified: int) -> str:
  # A process asks more than once; a file that changes meanwhile has another time.
  del size, modified
  with formats.readable(path), open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _stats(path: epath.Path) -> list[Any]:
  if '://' in str(path):
    stat = path.stat()
    return [str(path), stat.length, stat.mtime]
  # The times of os.stat are finer than those of epath.
  stat = os.stat(path)
  return [os.path.realpath(path), stat.st_size, stat.st_mtime_ns]
