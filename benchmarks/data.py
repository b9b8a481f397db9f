"""The data layer beside its peers, in the same process, per core of CPU time.

python -m benchmarks.data

writes benchmarks/data_results.json and the README's section from it. Some minutes; other
work on the machine disturbs it little, since CPU time is counted, and peers take turns.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.readme import ROOT, write_section
from glm_jax import startup

RESULTS = Path(__file__).parent / 'data_results.json'
_LENGTHS = (512, 2048)
_TURNS = 5


def main() -> None:
  parts = {
    'throughput': throughput,
    'objective': objective,
    'padding': padding,
    'packing': packing,
    'making': making,
    'resume': resume,
    'stall': stall,
  }
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--only', choices=parts, help='one part alone')
  only = flags.parse_args().only
  startup.be_quiet()
  startup.import_tensorflow()
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  for name, measure in parts.items():
    if only in (None, name):
      results[name] = measure()
      print(f'{name}: {json.dumps(results[name])}', flush=True)
      RESULTS.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
  if len(results) == len(parts):
    write_section('data', section(results))


def _cpu() -> float:
  # Of all threads; what waits for another process costs nothing.
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


def _in_turns(runs: dict[str, Callable[[], float]]) -> dict[str, float]:
  """Median of units per CPU second of each, one after the other, several times."""
  speeds: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(_TURNS):
    for name, run in runs.items():
      began = _cpu()
      units = run()
      speeds[name].append(units / (_cpu() - began))
      # Outside of the measured time, in which the next run would pay for this one.
      gc.collect()
  return {name: statistics.median(values) for name, values in speeds.items()}


def _draws(dataset: Any, batches: int, units: int) -> Callable[[], float]:
  """A run that takes batches of `units` from a tf.data pipeline."""
  import tensorflow as tf

  # Few threads, so that CPU time is that of the work and not of waiting threads.
  options = tf.data.Options()
  options.threading.max_intra_op_parallelism = 1
  options.threading.private_threadpool_size = 2
  dataset = dataset.with_options(options).prefetch(2)

  def run() -> float:
    # An iterator of its own, which does not work on in another's turn.
    iterator = iter(dataset)
    for _ in range(batches):
      next(iterator)
    return float(batches * units)

  return run


def _corpus() -> Any:
  from glm_jax.data.corpora.config import CorpusConfig

  return CorpusConfig()


def _vocabulary() -> Any:
  from glm_jax.data.corpora import corpus
  from glm_jax.data.corpora.config import VocabularyConfig

  return corpus.load_or_train_vocabulary(VocabularyConfig(), [_corpus()])


def _shards(folder: str, length: int, config: Any) -> str:
  """Shards of the documentation for rows of `length` positions."""
  from etils import epath

  from glm_jax.data import prepare
  from glm_jax.data.corpora import parts
  from glm_jax.data.making import shard_job, shard_runner

  vocabulary = _vocabulary()
  plan = prepare.row_plan('glm_mixture', length, config, vocabulary, packed=False)
  job = shard_job.of_config(_corpus(), vocabulary, plan, count=16, seed=0, imports=())
  shard_runner.run(job, epath.Path(folder), parts.find(_corpus(), 64 * 10**6), 1)
  return folder


def throughput() -> dict[str, Any]:
  """Million input tokens a second and core, from shards to batches of the task."""
  import tensorflow as tf

  from benchmarks.data_peers import t5_span_corruption
  from glm_jax.data import pipeline, prepare
  from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
  from glm_jax.data.examples.objective_config import ObjectiveConfig

  results = {}
  for length in _LENGTHS:
    config = ObjectiveConfig(blank=0.5, document=0.3, sentence=0.2)
    with tempfile.TemporaryDirectory() as folder:
      source = CorpusConfig(corpus='shards:' + _shards(f'{folder}/s', length, config))
      data = prepare.prepare(
        'glm_mixture', {'tokens': length}, source, VocabularyConfig(), config
      )
      rows = data.corpora[0].rows['train']
      N, size = rows.plan.row_length, 256
      runs = {}
      for task in ('glm_mixture', 'glm_blank'):
        dataset = pipeline.dataset(task, {'tokens': length}, batch_size=size, seed=0)
        runs[task] = _draws(dataset, 2**26 // (size * length), size * N / 1e6)
      # Peers read the same rows from memory: the identity is the cost of tf.data itself.
      tokens = tf.constant(rows.read(0, 4096).tokens)
      single = tf.data.Dataset.from_tensor_slices(tokens).repeat()
      same = single.map(lambda x: x, num_parallel_calls=2).batch(size)
      runs['identity'] = _draws(same, 400, size * N / 1e6)
      seeds = (
        tf.data.Dataset.random(seed=0)
        .batch(4)
        .map(lambda x: tf.cast(tf.reshape(x % (2**31 - 1), [2, 2]), tf.int32))
      )

      def corrupt(x: Any, seeds: Any) -> Any:
        return t5_span_corruption(x, seeds, 8192)

      corrupted = tf.data.Dataset.zip((single, seeds)).map(corrupt, num_parallel_calls=2)
      shapes = {'inputs': [length], 'targets': [length // 2]}
      peer = corrupted.padded_batch(size, shapes)
      runs['t5'] = _draws(peer, 2**21 // (size * length), size * N / 1e6)
      speeds = _in_turns(runs)
      results[str(length)] = {name: round(value, 2) for name, value in speeds.items()}
  return results


def objective() -> dict[str, float]:
  """Thousand examples a second and core of 512 positions: the op alone."""
  import tensorflow as tf

  from benchmarks.data_peers import original_blank
  from glm_jax.data.examples import infilling
  from glm_jax.data.examples.objective_config import ObjectiveConfig
  from glm_jax.data.making import tokenized
  from glm_jax.data.rows.table import RowPlan
  from glm_jax.data.stream import stateless

  config, vocabulary = ObjectiveConfig(), _vocabulary()
  plan = RowPlan(config.row_length(512))
  rows = tokenized.cached_rows(_corpus(), vocabulary, 'train', plan).read(0, 512)
  specials = vocabulary.specials
  ids = {'mask': specials.mask, 'sop': specials.sop, 'eop': specials.eop}
  examples = [
    # As the original has a document: opened by [ENC] and closed by <eos>.
    np.concatenate([[specials.enc], row[1:-1], [specials.eos]]).astype(np.int64)
    for row in rows.tokens
  ]
  rng = random.Random(0)

  def original() -> float:
    for tokens in examples:
      original_blank(tokens, rng, ids, 600)
    return len(examples) / 1e3

  B = 256
  tokens, scored = tf.constant(rows.tokens[:B]), tf.constant(rows.scored[:B])
  lengths = tf.constant(rows.lengths[:B])

  def make(step: Any) -> Any:
    index = step * B + tf.range(B, dtype=tf.int64)
    keys = stateless.example_keys(0, index)
    source = infilling.TextRows(tokens, lengths, scored, keys, index)
    return infilling.make_examples(source, 512, config, vocabulary)

  dataset = tf.data.Dataset.range(10**9).map(make, num_parallel_calls=2)
  speeds = _in_turns({'op': _draws(dataset, 256, B / 1e3), 'original': original})
  return {name: round(value, 2) for name, value in speeds.items()}


def padding() -> dict[str, float]:
  """Share of positions that are padding, blanks of the documentation in one stream."""
  from glm_jax.data import pipeline, prepare
  from glm_jax.data.corpora.config import VocabularyConfig
  from glm_jax.data.examples.objective_config import ObjectiveConfig

  results = {}
  for length in _LENGTHS:
    lengths = {'tokens': length}
    config = ObjectiveConfig()
    prepare.prepare('glm_blank', lengths, _corpus(), VocabularyConfig(), config)
    stream = pipeline.batches('glm_blank', lengths, batch_size=64, seed=0)
    inside = [batch.key_end > 0 for batch in itertools.islice(stream, 32)]
    results[str(length)] = round(1 - float(np.mean(inside)), 4)
  return results


def packing() -> dict[str, float]:
  """How full rows of 2,048 positions are with documents of 30 to 600 tokens."""
  import tensorflow as tf

  from glm_jax.data.examples import infilling, packed
  from glm_jax.data.examples.objective_config import ObjectiveConfig, causal_packing
  from glm_jax.data.rows.table import make_rows
  from glm_jax.data.stream import stateless

  vocabulary, results = _vocabulary(), {}
  rng = np.random.default_rng(0)
  prefix, eos = vocabulary.prefix, vocabulary.specials.eos
  documents = [
    ([], rng.integers(0, 8000, n - 2, dtype=np.int32)) for n in rng.integers(30, 601, 20000)
  ]
  for length in _LENGTHS:
    table = make_rows(documents, prefix, eos, causal_packing(length))
    results[f'causal {length}'] = round(float(table.lengths.sum() / table.tokens.size), 4)
    for name, config in (
      ('blank', ObjectiveConfig()),
      ('mixture', ObjectiveConfig(blank=0.5, document=0.3, sentence=0.2)),
    ):
      plan = config.packing(length)
      table = make_rows(documents, prefix, eos, plan)
      inside = total = 0
      for first in range(0, 1024, 64):
        batch = {k: tf.constant(v[first : first + 64]) for k, v in table._asdict().items()}
        batch['step'] = tf.range(first, first + 64, dtype=tf.int64)
        batch['keys'] = stateless.example_keys(0, batch['step'])
        # Documents one by one, each with room for its spans, and back into the rows.
        source, places = packed.take_apart(batch, plan)
        size = source.tokens.shape[1] + 2 * packed.spans_of_longest(plan)
        examples = infilling.make_examples(source, size, config, vocabulary)
        examples = packed.put_together(examples, places, 64, length)
        # A position that sees no key is padding.
        inside += int((examples['key_end'].numpy() > 0).sum())
        total += 64 * length
      results[f'{name} {length}'] = round(inside / total, 4)
  return results


def making() -> dict[str, float]:
  """Million tokens a second and core: shards of a .jsonl file, and encoding alone."""
  from etils import epath

  from glm_jax.data.corpora import corpus, parts
  from glm_jax.data.corpora.config import CorpusConfig
  from glm_jax.data.making import shard_job, shard_runner
  from glm_jax.data.rows.table import RowPlan

  vocabulary = _vocabulary()
  texts = [document.text for document in corpus.documents(_corpus(), 'train')]
  texts = texts[: len(texts) // 4]
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / 'text.jsonl'
    lines = (json.dumps({'text': text}, ensure_ascii=False) + '\n' for text in texts)
    path.write_text(''.join(lines), encoding='utf-8')
    source = CorpusConfig(corpus=str(path), cache_dir=folder, validation_fraction=0.01)
    job = shard_job.of_config(
      source, vocabulary, RowPlan(458), count=16, seed=0, imports=()
    )
    count = 0

    def bare() -> float:
      nonlocal count
      # The processor below the vocabulary: encoding and nothing else.
      processor = vocabulary._processor
      count = sum(map(len, processor.encode(texts, num_threads=1)))
      return count / 1e6

    def whole() -> float:
      output = epath.Path(folder) / 'shards'
      shard_runner.run(job, output, parts.find(source, 64 * 10**6), 1)
      shutil.rmtree(output)
      return count / 1e6

    speeds = _in_turns({'sentencepiece': bare, 'make_shards': whole})
  return {name: round(value, 3) for name, value in speeds.items()}


def resume() -> dict[str, float]:
  """Seconds from nothing to the first batch at step 10^9, graph and checksums included."""
  from glm_jax.data import pipeline, prepare
  from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
  from glm_jax.data.examples.objective_config import ObjectiveConfig

  config = ObjectiveConfig(blank=0.5, document=0.3, sentence=0.2)
  with tempfile.TemporaryDirectory() as folder:
    source = CorpusConfig(corpus='shards:' + _shards(f'{folder}/s', 512, config))
    began = time.perf_counter()
    data = prepare.prepare(
      'glm_mixture', {'tokens': 512}, source, VocabularyConfig(), config
    )
    prepare.verify(data, source, 0, 1)
    stream = pipeline.Stream(
      'glm_mixture', {'tokens': 512}, batch_size=256, seed=0, start_step=10**9
    )
    first = next(stream)
    seconds = time.perf_counter() - began
  assert first.index[0] == 256 * 10**9
  return {'seconds': round(seconds, 2)}


def stall() -> dict[str, float]:
  """Share of the quickstart's steps in which the model waits for data."""
  with tempfile.TemporaryDirectory() as folder:
    command = [sys.executable, '-m', 'glm_jax.train']
    command += ['--gin_file=gin_configs/quickstart.gin', f"--gin.MODEL_DIR='{folder}/run'"]
    command += ['--gin.TRAIN_STEPS=1000', '--gin.EvaluationConfig.fill=0']
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    text = (Path(folder) / 'run' / 'metrics.jsonl').read_text(encoding='utf-8')
  stalls = [float(share) for share in re.findall(r'"input_stall": ([\d.e-]+)', text)]
  return {'share': round(statistics.mean(stalls), 4)}


def section(results: dict[str, Any]) -> list[str]:
  """The README's table."""
  flow, op, encoding = results['throughput'], results['objective'], results['making']
  lines = [
    '| data, a core of CPU time | 512 | 2,048 | peer in the same run |',
    '|---|---|---|---|',
  ]
  a, b = (flow[str(length)] for length in _LENGTHS)
  for task, label in (('glm_mixture', 'three objectives'), ('glm_blank', 'blanks alone')):
    lines.append(
      f'| shards to batches, {label}, Mtok/s | {a[task]:.1f} | {b[task]:.1f} | T5 span '
      f'corruption {a["t5"]:.1f} and {b["t5"]:.1f} ({a[task] / a["t5"]:.1f} x, '
      f'{b[task] / b["t5"]:.1f} x); tf.data identity {a["identity"]:.0f} and '
      f'{b["identity"]:.0f} |'
    )
  lines.append(
    f'| blank op alone, examples/s | {op["op"] * 1e3:,.0f} | | the original algorithm '
    f'{op["original"] * 1e3:,.0f} ({op["op"] / op["original"]:.1f} x) |'
  )
  pad, full = results['padding'], results['packing']
  lines.append(f'| padding, one stream | {pad["512"]:.1%} | {pad["2048"]:.1%} | |')
  cells = [
    ', '.join(
      f'{name} {full[f"{name} {n}"]:.1%}' for name in ('causal', 'blank', 'mixture')
    )
    for n in _LENGTHS
  ]
  lines.append(
    f'| packed rows are full, 30-600-token documents | {cells[0]} | {cells[1]} | |'
  )
  ratio = encoding['make_shards'] / encoding['sentencepiece']
  lines.append(
    f'| make_shards, Mtok/s | {encoding["make_shards"]:.2f} | | bare sentencepiece.encode '
    f'{encoding["sentencepiece"]:.2f} ({ratio:.2f} x) |'
  )
  return [
    *lines,
    '',
    f'First batch at step 10⁹ after {results["resume"]["seconds"]:.1f} s; the quickstart '
    f'waits {results["stall"]["share"]:.1%} of its time for data. (Written by '
    '`python -m benchmarks.data`.)',
  ]


if __name__ == '__main__':
  main()
