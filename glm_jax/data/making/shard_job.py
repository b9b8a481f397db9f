"""Making shards: what is done to a part of a corpus, and to a shard, by any runner.

Each part of the corpus is tokenised into rows; each has its place in one order of all of
them, and shards are cut from that. The result depends neither on the runner nor on how many
processes it has.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from glm_jax import configs, startup
from glm_jax.data.corpora import corpus as corpora
from glm_jax.data.corpora import parts
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.making import tokenized
from glm_jax.data.making.order import Order
from glm_jax.data.rows import shards
from glm_jax.data.rows.table import RowPlan
from glm_jax.text import loading
from glm_jax.text.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """All that decides what is in the shards.

  Attributes:
    corpus: the text.
    corpus_fingerprint: of its files, so that a job does not go on with others.
    vocabulary: as `Vocabulary.to_dict`.
    plan: how documents become rows.
    order: of the rows.
    shards: of each split.
    imports: modules that register a seqio task.
  """

  corpus: CorpusConfig
  corpus_fingerprint: str
  vocabulary: dict[str, Any]
  plan: RowPlan
  order: Order
  shards: dict[str, int]
  imports: tuple[str, ...] = ()

  @property
  def names(self) -> list[tuple[str, int]]:
    """(split, number) of every shard, in order."""
    return [(split, i) for split in shards.SPLITS for i in range(self.shards[split])]

  @property
  def fingerprint(self) -> str:
    fields = json.dumps(dataclasses.asdict(self), sort_keys=True)
    return hashlib.sha256(fields.encode()).hexdigest()[:16]


class Bucket(NamedTuple):
  """Rows of one part that fell to one shard.

  Attributes:
    keys: [n] uint64, their order in the shard.
    records: [n, record_bytes] uint8.
    counts: `shards.COUNTS` of the part; in one bucket of it, so that the
      sums over shards are those over parts.
  """

  keys: np.ndarray
  records: np.ndarray
  counts: dict[str, int]


def of_config(
  corpus: CorpusConfig,
  vocabulary: Vocabulary,
  plan: RowPlan,
  todo: Sequence[parts.CorpusPart],
  *,
  count: int,
  imports: tuple[str, ...],
) -> Job:
  """The job of a configuration.

  Args:
    corpus: the text.
    vocabulary: of the tokens.
    plan: how documents become rows.
    todo: the parts of the corpus.
    count: shards of the training split.
    imports: modules that register a seqio task.
  """
  held_out = max(1, round(count * corpus.validation_fraction))
  return Job(
    # Spelled out, so that a folder below ~ has one fingerprint however it was written.
    corpus=dataclasses.replace(corpus, cache_dir=os.path.expanduser(corpus.cache_dir)),
    corpus_fingerprint=corpora.fingerprint(corpus),
    vocabulary=vocabulary.to_dict(),
    plan=plan,
    order=Order.of(todo),
    shards=dict(zip(shards.SPLITS, (count, held_out), strict=True)),
    imports=imports,
  )


def work(job: Job, part: parts.CorpusPart) -> dict[tuple[str, int], Bucket]:
  """Tokenises a part; a bucket for each (split, shard) that gets something.

  Raises:
    UserError: text that cannot be read.
  """
  vocabulary = _vocabulary(job)
  # Text files need no TensorFlow, which costs every worker seconds and memory.
  if part.source:
    startup.import_tensorflow()
    startup.import_modules(job.imports)
  documents: dict[str, list[Any]] = {split: [] for split in shards.SPLITS}
  for split, document in parts.read(job.corpus, part):
    documents[split].append(document)
  buckets = {}
  for split in shards.SPLITS:
    if not documents[split]:
      continue
    counts = tokenized.new_counts()
    keys, records = tokenized.part_rows(
      documents[split],
      part,
      split,
      job.order,
      job.corpus,
      vocabulary,
      job.plan,
      counts,
    )
    # `write` sorts by key, too: whatever the number of shards, the rows of all of them one
    # after the other are in one order.
    count = job.shards[split]
    shard_of = job.order.shards(keys, count)
    # The counts of the part go with one bucket, even an empty one: a part whose documents
    # were all skipped is still counted.
    counting = part.number % count
    for shard in sorted({counting, *np.unique(shard_of).tolist()}):
      in_shard = shard_of == shard
      bucket_counts = counts if shard == counting else tokenized.new_counts()
      buckets[split, shard] = Bucket(keys[in_shard], records[in_shard], bucket_counts)
  return buckets


def write(
  job: Job, folder: epath.Path, name: tuple[str, int], buckets: list[Bucket]
) -> tuple[shards.File, dict[str, int]]:
  """Writes a shard, its records in their order; its file, and the sums of the counts.

  Args:
    job: of the shard.
    folder: that holds it.
    name: its split and number.
    buckets: of all parts, in any order; none for an empty shard.
  """
  # Sorted by key, rows are in an order that depends neither on their part nor on when it
  # came. Keys have 64 bits, so two of a shard are hardly ever equal.
  records = np.zeros((0, 0), np.uint8)
  if buckets:
    keys = np.concatenate([bucket.keys for bucket in buckets])
    records = np.concatenate([bucket.records for bucket in buckets])[np.argsort(keys)]
  split, number = name
  path = folder / shards.file_name(split, number, job.shards[split])
  return shards.write_file(path, records), _sum([bucket.counts for bucket in buckets])


def finish(
  job: Job,
  folder: epath.Path,
  written: dict[tuple[str, int], tuple[shards.File, dict[str, int]]],
) -> None:
  """Writes the index of a job whose shards are all there.

  Args:
    job: of them.
    folder: that holds them.
    written: what `write` returned, by split and number.

  Raises:
    UserError: a split without rows.
  """
  splits = {}
  for split in shards.SPLITS:
    results = [written[name] for name in job.names if name[0] == split]
    files, counts = [file for file, _ in results], _sum([counts for _, counts in results])
    total = sum(file.rows for file in files)
    tokenized.check_not_empty(total, counts, split, job.corpus)
    splits[split] = {**counts, 'files': files}
  about = {'corpus': job.corpus.corpus}
  shards.write_index(folder, _vocabulary(job), job.plan, job.order.block, splits, about)


def unfinished(folders: Sequence[epath.Path]) -> list[epath.Path]:
  """Those of the folders that hold no finished shards.

  Raises:
    UserError: all do; or a bucket that is not there.
  """
  # Asked before any work: making a folder in a bucket that is not there is retried for
  # minutes.
  scheme, separator, rest = str(folders[0]).partition('://')
  if separator:
    bucket = f'{scheme}://{rest.split("/")[0]}'
    configs.check(
      epath.Path(bucket).exists(),
      'the output folder must be in a bucket that there is, and that you may read',
      bucket,
      'give --output_dir a bucket that exists, or ask for permission to read this one',
    )
  left = [folder for folder in folders if not (folder / shards.INDEX).exists()]
  configs.check(
    bool(left),
    'the output folder must not hold finished shards',
    f'{", ".join(map(str, folders))}, which does',
    'train from them, or choose another folder',
  )
  return left


def check_same(folder: epath.Path, vocabulary: Vocabulary, plan: RowPlan) -> None:
  """Raises UserError for finished shards of another vocabulary or plan."""
  for rows in shards.load(str(folder), vocabulary).values():
    configs.check(
      rows.plan == plan,
      f'the shards in {folder} must have the rows of this mixture',
      f'rows of {rows.plan.row_length} tokens',
      'choose another --output_dir, or delete them to have them made again',
    )


def _sum(counts: list[dict[str, int]]) -> dict[str, int]:
  return {name: sum(c[name] for c in counts) for name in tokenized.new_counts()}


def _vocabulary(job: Job) -> Vocabulary:
  # As text, since a dict cannot be the key of a cache. A worker loads it once, not for each
  # part.
  return _load_vocabulary(json.dumps(job.vocabulary))


@functools.lru_cache(maxsize=2)
def _load_vocabulary(fields: str) -> Vocabulary:
  # There is a process for each core: threads in it would only compete.
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
  vocabulary = loading.from_dict(json.loads(fields))
  vocabulary.threads = 1
  return vocabulary
