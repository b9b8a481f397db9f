"""Making shards as an Apache Beam pipeline, for corpora beyond one machine.

The work is `shard_job`'s; Dataflow, Flink or Spark, whichever the options name, only
bring the parts to the workers and the buckets of a shard together. Extra: beam.
"""

from __future__ import annotations

import logging
import re
import shlex
from typing import Any

from etils import epath

from glm_jax import storage
from glm_jax.configs import UserError
from glm_jax.data.corpora import parts
from glm_jax.data.making import shard_job
from glm_jax.data.making.shard_job import Bucket, Job
from glm_jax.data.rows import shards


def run(job: Job, folder: epath.Path, todo: list[parts.CorpusPart], options: str) -> None:
  """Makes the shards of a job.

  Args:
    job: what to make.
    folder: where to; it must be reachable for every worker.
    todo: the parts of the corpus.
    options: of Beam, such as '--runner=DataflowRunner --project=...'.

  Raises:
    UserError: Beam is not installed; text that cannot be read.
  """
  # Beam warns of clouds that are not used, and logs what it raises besides.
  logging.getLogger().setLevel(logging.CRITICAL)
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise UserError(
      '--runner=beam needs Apache Beam, got an environment without it; install the '
      "extra: pip install -e '.[beam]'."
    ) from error
  storage.make(folder)
  try:
    with beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
      # A shard that no row falls to is still written: GroupByKey yields only keys that it
      # has seen, so every shard is sent a None.
      empty = pipeline | 'shards' >> beam.Create([(name, None) for name in job.names])
      buckets = (
        pipeline
        | 'parts' >> beam.Create(todo)
        # Without it Beam fuses the steps, and one worker may tokenise everything.
        | beam.Reshuffle()
        | 'tokenise' >> beam.FlatMap(_work, job)
      )
      _ = (
        (buckets, empty)
        | beam.Flatten()
        | beam.GroupByKey()
        | 'write' >> beam.Map(_write, job, str(folder))
        | beam.combiners.ToList()
        | 'index' >> beam.Map(_index, job, str(folder))
      )
  # A runner raises a worker's error as one of its own, of any type: its text is searched.
  except Exception as error:
    message = _of_worker(f'{type(error).__name__}: {error}')
    if message is None:
      raise
    raise UserError(message) from error


def _of_worker(text: str) -> str | None:
  """The message of a UserError in what Beam raises, which is a worker's traceback as text.

  Example:
    >>> text = "glm_jax.configs.UserError: x [while running 'tokenise']"
    >>> _of_worker(f'Traceback ...\\n  File ...\\n{text}')
    'x'
  """
  messages = re.findall(
    r"^[\w.]*UserError: (.*?)(?: \[while running '.*)?$", text, re.MULTILINE
  )
  return messages[-1] if messages else None


def _work(part: parts.CorpusPart, job: Job) -> list[tuple[tuple[str, int], tuple]]:
  # Beam's default coder takes plain tuples apart; a NamedTuple it would pickle.
  return [(key, tuple(bucket)) for key, bucket in shard_job.work(job, part).items()]


def _write(item: tuple[tuple[str, int], Any], job: Job, folder: str) -> tuple:
  name, values = item
  buckets = [Bucket(*value) for value in values if value is not None]
  file, counts = shard_job.write(job, epath.Path(folder), name, buckets)
  return name, (tuple(file), counts)


def _index(files: list[Any], job: Job, folder: str) -> None:
  written = {name: (shards.File(*file), counts) for name, (file, counts) in files}
  shard_job.finish(job, epath.Path(folder), written)
