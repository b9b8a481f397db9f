"""Making shards with the processes of one machine; interrupted, it goes on.

`unfinished/` in the output folder holds a file for each part that is done, and a note for
each shard; it is removed when the index is written.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from glm_jax import configs, storage
from glm_jax.configs import ResourceError
from glm_jax.data.corpora import parts
from glm_jax.data.making import shard_job
from glm_jax.data.making.shard_job import Bucket, Job
from glm_jax.data.rows import shards

_WORK = 'unfinished'
_JOB = 'job.json'


def run(job: Job, folder: epath.Path, todo: list[parts.CorpusPart], processes: int) -> None:
  """Makes the shards of a job.

  Args:
    job: what to make.
    folder: where to.
    todo: the parts of the corpus.
    processes: that work at a time; 1 for this one.

  Raises:
    UserError: a folder that holds something else; text that cannot be read.
  """
  # 1. Tokenise the parts that an earlier call has not: a file that has its final name is
  # complete.
  _begin(job, folder)
  work = folder / _WORK
  missing = [part for part in todo if not (work / _part_name(part.number)).exists()]
  total = sum(part.size for part in todo)
  done = total - sum(part.size for part in missing)
  of_text = any(part.ranges for part in todo)
  unit = dict(unit='B', unit_scale=True) if of_text else dict(unit=' examples')
  with _pool(processes) as each:
    bar = tqdm(
      total=total,
      initial=done,
      desc='tokenizing',
      leave=False,
      disable=None,
      **unit,
    )
    with bar:
      for part in each(_work, [(job, folder, part) for part in missing]):
        # Parts are numbered as they are listed.
        bar.update(todo[part].size)
    # 2. Gather each shard from the parts, when all of them are there.
    left = [name for name in job.names if not (work / _note_name(*name)).exists()]
    merged = each(_merge, [(job, folder, len(todo), name) for name in left])
    for _ in tqdm(merged, 'writing shards', len(left), leave=False, disable=None):
      pass
  # 3. Write the index of all of them, and only then remove what a next call would need.
  written = {}
  for name in job.names:
    file, counts = json.loads((work / _note_name(*name)).read_text())
    written[name] = shards.File(*file), counts
  shard_job.finish(job, folder, written)
  work.rmtree()
  for path in folder.iterdir():
    # What a killed process was writing.
    if path.name.startswith('.'):
      path.unlink()


def _begin(job: Job, folder: epath.Path) -> None:
  """Makes the folder, or checks that what is unfinished in it is of the same job."""
  shard_job.unfinished([folder])
  note = folder / _WORK / _JOB
  if note.exists():
    fingerprint = json.loads(note.read_text())['fingerprint']
    configs.check(
      fingerprint == job.fingerprint,
      'an unfinished folder is gone on with by the same job: corpus, vocabulary, rows, '
      'shards and seed',
      f'{folder} of another one',
      'set them back, or choose another folder',
    )
    return
  others = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  # `unfinished` alone is of a call that was killed before its note was there.
  configs.check(
    not [name for name in others if name != _WORK],
    'the output folder must be new or empty',
    f'{folder}, which holds {sorted(others)[:5]}',
    'choose another folder',
  )
  storage.make(folder / _WORK)
  content = json.dumps({'fingerprint': job.fingerprint})
  shards.write_atomically(note, content.encode('utf-8'))


def _work(job: Job, folder: epath.Path, part: parts.CorpusPart) -> int:
  """Writes the buckets of a part, one after the other behind their sizes."""
  # A part file is: the size of its head, 8 bytes little-endian; the head, JSON of where
  # each bucket begins behind it, its shape and counts; then each bucket's keys and records.
  # So a shard reads its bucket of every part without reading the others.
  buckets = shard_job.work(job, part)
  entries, blobs, at = {}, [], 0
  for name, bucket in buckets.items():
    blob = [bucket.keys.tobytes(), bucket.records.tobytes()]
    entries[_note_name(*name)] = {
      'at': at,
      'shape': bucket.records.shape,
      'counts': bucket.counts,
    }
    blobs += blob
    at += sum(map(len, blob))
  head = json.dumps(entries).encode('utf-8')
  content = b''.join([len(head).to_bytes(8, 'little'), head, *blobs])
  shards.write_atomically(folder / _WORK / _part_name(part.number), content)
  return part.number


def _merge(job: Job, folder: epath.Path, count: int, name: tuple[str, int]) -> None:
  """Writes a shard of what the parts have for it."""
  buckets = [
    bucket
    for number in range(count)
    for bucket in _read(folder / _WORK / _part_name(number), _note_name(*name))
  ]
  note = json.dumps(shard_job.write(job, folder, name, buckets))
  shards.write_atomically(folder / _WORK / _note_name(*name), note.encode('utf-8'))


def _read(path: epath.Path, name: str) -> Iterator[Bucket]:
  with path.open('rb') as file:
    size = int.from_bytes(file.read(8), 'little')
    entry = json.loads(file.read(size)).get(name)
    if entry is not None:
      n, record_bytes = entry['shape']
      file.seek(8 + size + entry['at'])
      # n keys of 8 bytes, then n records.
      data = np.frombuffer(file.read(n * (8 + record_bytes)), np.uint8)
      keys, records = data[: 8 * n].view(np.uint64), data[8 * n :]
      yield Bucket(keys, records.reshape(n, record_bytes), entry['counts'])


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[Callable[[Any, Iterable[tuple]], Iterable[Any]]]:
  """A function that maps one over tuples of arguments, in any order of results."""
  if processes == 1:
    yield lambda function, calls: (function(*call) for call in calls)
    return
  # Libraries have threads by now, and a forked child would inherit their locks.
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:

    def each(function: Any, calls: Iterable[tuple]) -> Iterator[Any]:
      futures = [pool.submit(function, *call) for call in calls]
      try:
        for future in concurrent.futures.as_completed(futures):
          yield future.result()
      except concurrent.futures.process.BrokenProcessPool as error:
        raise ResourceError(
          'a worker process was killed, for want of memory perhaps; what is done stays, '
          'and the same command with fewer --processes goes on'
        ) from error
      # Whatever ended the loop, the generator's closing included: begin no further part.
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise

    yield each


def _part_name(number: int) -> str:
  return f'part-{number:06}'


def _note_name(split: str, shard: int) -> str:
  return f'{split}-{shard:05}.json'
