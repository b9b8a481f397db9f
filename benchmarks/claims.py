"""Do GLM's claims hold at this size? Cloze, pretraining, span order, masks.

python -m benchmarks.claims [--seeds=3] [--steps=3000] [--runs=DIR] [--table]

pretrains the quickstart's size with 2-D rotary positions on the documentation, once for
each way of masking; then learns from a few sentences which package a function is from, by
cloze and by a classifier, from each of these and from fresh parameters, at two learning
rates. The packages are among those whose documentation is held out: pretraining saw none
of them. Killed, the same command goes on. Half an hour on 2 CPU cores. Results are kept by
device and date in benchmarks/claims/; --table only writes the table.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import statistics
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import readme
from benchmarks.step import about
from glm_jax import cli, startup
from glm_jax.evaluation.patterns import (
  BLANK,
  PATTERNS,
  ClozePattern,
  Example,
  Short,
  chosen,
)

RESULTS = Path(__file__).parent / 'claims'
BENCHMARK = 'packages'
# What a package is about, in a word that is a token.
WORDS = {
  'asyncio': ' event',
  'chex': ' array',
  'grpc': ' server',
  'huggingface_hub': ' model',
  'pyglove': ' object',
  'tensorboard': ' data',
}
# Sentences of a package: as many for each, of which half are held out.
EACH = 120
SHOTS = 48
MODEL = (
  'TrainConfig.model=@ChatGLMConfig()',
  'ChatGLMConfig.num_layers=2',
  'ChatGLMConfig.hidden_size=128',
  'ChatGLMConfig.num_heads=2',
  'ChatGLMConfig.mlp_size=512',
  'ChatGLMConfig.vocab_size=2048',
  'ChatGLMConfig.max_positions=128',
  'ChatGLMConfig.deepnorm_layers=2',
  "ChatGLMConfig.rope_frequency_dtype='float32'",
  'ChatGLMConfig.init_std=0.06',
  'VocabularyConfig.size=2048',
)
PRETRAINING = (
  "MIXTURE_OR_TASK_NAME='glm_blank'",
  "TASK_FEATURE_LENGTHS={'tokens':64}",
  'BATCH_SIZE=16',
  'OptimizerConfig.warmup_steps=100',
  'OptimizerConfig.learning_rate=2e-3',
  'OptimizerConfig.final_ratio=0.01',
  'EvaluationConfig.examples=256',
  'TrainConfig.log_every=100',
)
FINETUNING = (
  "ComputeConfig.dtype='float32'",
  'BATCH_SIZE=16',
  'OptimizerConfig.warmup_steps=20',
  f'Cloze.shots={SHOTS}',
)
# Of a row: all candidates, or one document.
LENGTHS = {'cloze': 200, 'classifier': 40}
RATES = ('1e-3', '3e-3')
# How each was masked; 15 % in random order is the paper's.
PRETRAINED: dict[str, tuple[str, ...]] = {
  'masked 15%': (),
  'in order': ('ObjectiveConfig.shuffle_spans=False',),
  'masked 10%': ('ObjectiveConfig.mask_ratio=0.1',),
  'masked 20%': ('ObjectiveConfig.mask_ratio=0.2',),
}
FRESH = 'from scratch'
# (pretraining, head); the first is the method.
ARMS = (
  ('masked 15%', 'cloze'),
  ('masked 15%', 'classifier'),
  (FRESH, 'cloze'),
  (FRESH, 'classifier'),
  ('in order', 'cloze'),
  ('masked 10%', 'cloze'),
  ('masked 20%', 'cloze'),
)


def read(line: Mapping[str, Any], where: str) -> Iterator[Example]:
  """A sentence as a cloze, see `glm_jax.evaluation.patterns`."""
  parts = [Short(line['text']), ' It is about the', BLANK, '.']
  yield chosen(parts, WORDS, line['package'], where)


def sentences() -> list[tuple[str, str]]:
  """(package, first sentence of a docstring) of the packages that are held out."""
  import tensorflow_datasets as tfds

  from glm_jax.data.corpora import sources, summaries
  from glm_jax.data.corpora.config import CorpusConfig

  builder = summaries.prepared(sources.cache_dir(CorpusConfig()))
  reading = tfds.ReadConfig(try_autocache=False)
  split = builder.as_dataset(split='validation', read_config=reading)
  return [(e['package'].decode(), e['response'].decode()) for e in tfds.as_numpy(split)]


def write_task(folder: Path, found: Iterable[tuple[str, str]]) -> int:
  """The folder of the benchmark: as many sentences of each package; how many there are.

  Raises:
    SystemExit: this Python has too few of the packages.
  """
  kept = collections.defaultdict(list)
  # By a hash: the same for everyone, and of all files of a package.
  for package, text in sorted(found, key=lambda pair: zlib.crc32(pair[1].encode())):
    if package in WORDS and len(kept[package]) < EACH:
      kept[package].append({'text': text, 'package': package})
  least = min(map(len, kept.values()), default=0)
  if len(kept) < len(WORDS) or least < 2:
    raise SystemExit(f'error: sentences of {[*WORDS]} are asked for, got {[*kept]}')
  folder.mkdir(parents=True, exist_ok=True)
  for split, first in (('train', 0), ('val', 1)):
    lines = [json.dumps(line) for group in kept.values() for line in group[first::2]]
    (folder / f'{split}.jsonl').write_text('\n'.join(lines) + '\n')
  return sum(map(len, kept.values()))


def train(model_dir: Path, gin_file: str, bindings: Sequence[str]) -> dict[str, Any]:
  """The summary of a run, which is trained unless it has been."""
  from glm_jax import train as command

  summary = model_dir / 'summary.json'
  if not summary.exists():
    given = [f"MODEL_DIR='{model_dir}'", *bindings]
    with contextlib.redirect_stdout(io.StringIO()):
      command.main([f'--gin_file={gin_file}', *(f'--gin.{b}' for b in given)])
  return json.loads(summary.read_text())


def pretrained(name: str, seed: int, steps: int, runs: Path) -> Path:
  """The run that a fine-tuning begins with: one for all seeds, but where it is fresh."""
  run, how = runs / name.replace(' ', '_').replace('%', ''), ()
  if name == FRESH:
    # A step without a change makes a checkpoint of parameters as they are drawn.
    run = run.with_name(f'{run.name}_{seed}')
    how, steps = ('OptimizerConfig.learning_rate=1e-12', f'TrainConfig.seed={seed}'), 1
  when = [f'{name}.every={steps}' for name in ('EvaluationConfig', 'CheckpointConfig')]
  warmup = () if steps > 100 else ('OptimizerConfig.warmup_steps=1',)
  bindings = (*MODEL, *PRETRAINING, *PRETRAINED.get(name, ()), *when, *warmup, *how)
  train(run, 'gin_configs/runs/pretrain.gin', (*bindings, f'TRAIN_STEPS={steps}'))
  return run


def finetuned(base: Path, head: str, seed: int, rate: str, steps: int, task: Path) -> float:
  """Accuracy on what is held out, in percent, after the last step."""
  run = base.parent / f'{base.name}-{head}-{rate}-{seed}'
  bindings = (
    *FINETUNING,
    f"INIT_FROM='{base}'",
    f"CORPUS='{task}'",
    f"BENCHMARK='{BENCHMARK}'",
    f"TASK_FEATURE_LENGTHS={{'tokens':{LENGTHS[head]}}}",
    f'Cloze.classifier={head == "classifier"}',
    f'OptimizerConfig.learning_rate={rate}',
    f'TrainConfig.seed={seed}',
    f'TRAIN_STEPS={steps}',
    f'EvaluationConfig.every={steps}',
    f'CheckpointConfig.every={steps}',
  )
  return train(run, 'gin_configs/runs/cloze.gin', bindings)['validation']['accuracy']


def table(results: dict[str, Any]) -> list[str]:
  """Markdown lines of a device's results."""
  rows = {(row['pretraining'], row['head']): best(row) for row in results['rows']}
  lines = [
    f'{results["device"]}, {results["date"]}; jax {results["jax"]}:',
    '',
    '| pretraining | fine-tuning | accuracy | ± | beside the method | learning rate |',
    '|---|---|---|---|---|---|',
  ]
  method = rows[ARMS[0]][0] if ARMS[0] in rows else None
  for (name, head), (mean, spread, rate) in rows.items():
    beside = '' if method is None else f'{mean - method:+.1f}'
    lines.append(f'| {name} | {head} | {mean:.1f}% | {spread:.1f} | {beside} | {rate} |')
  seeds = max(len(scores) for row in results['rows'] for scores in row['rates'].values())
  held_out, steps = results['held_out'], results['finetuning_steps']
  return [
    *lines,
    '',
    f'Which of {len(WORDS)} packages a function is from, told by the first sentence of its '
    f'docstring; learnt from {SHOTS} in {steps} steps, asked of {held_out} others; '
    f'chance is {100 / len(WORDS):.0f}%. Pretraining ({results["steps"]:,} steps of 1,024 '
    'tokens, 0.7 M parameters) saw none of the packages. Mean and standard deviation of '
    f'{seeds} seed(s), each with sentences and an order of its own, at the better of two '
    'learning rates. What this can say: whether cloze and pretraining pay where labels are '
    'few. What it cannot: each way of masking was pretrained once, so that between those '
    'rows a difference of a few points may be chance; and 3 M tokens and six words say '
    "nothing of the paper's models and tasks.",
  ]


def best(row: Mapping[str, Any]) -> tuple[float, float, str]:
  """(mean, standard deviation, learning rate) at the rate whose mean is the higher."""
  means = {rate: statistics.mean(by.values()) for rate, by in row['rates'].items()}
  rate = max(means, key=means.__getitem__)
  scores = [*row['rates'][rate].values()]
  return means[rate], statistics.stdev(scores) if len(scores) > 1 else 0.0, rate


def main(argv: Sequence[str]) -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.claims', description=__doc__.splitlines()[0]
  )
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=3000, help='of pretraining (3000)')
  parser.add_argument('--finetuning_steps', type=int, default=80, help='(80)')
  parser.add_argument(
    '--runs', type=Path, default=readme.ROOT / 'runs' / 'claims', metavar='DIR'
  )
  parser.add_argument('--folder', type=Path, default=RESULTS, help='of the results')
  parser.add_argument('--table', action='store_true', help='only write the table')
  flags = parser.parse_args(argv)
  if flags.table:
    return readme.write_results('claims', RESULTS, table, 'benchmarks.claims')
  startup.find_devices()
  PATTERNS[BENCHMARK] = ClozePattern(name=BENCHMARK, fields=('text', 'package'), read=read)
  runs = flags.runs.resolve()
  task = runs / BENCHMARK
  count = write_task(task, sentences())
  results = {
    **about(),
    'steps': flags.steps,
    'finetuning_steps': flags.finetuning_steps,
    'held_out': count // 2,
    'rows': [],
  }
  rows = {
    arm: {'pretraining': arm[0], 'head': arm[1], 'rates': {rate: {} for rate in RATES}}
    for arm in ARMS
  }
  path = readme.path_of(flags.folder, results)
  # Seed after seed, so that an interrupted benchmark has all rows early.
  for seed in range(flags.seeds):
    for arm, row in rows.items():
      began = time.perf_counter()
      base = pretrained(arm[0], seed, flags.steps, runs)
      for rate in RATES:
        score = finetuned(base, arm[1], seed, rate, flags.finetuning_steps, task)
        row['rates'][rate][str(seed)] = score
      shown = ', '.join(
        f'{by[str(seed)]:.1f}% at {rate}' for rate, by in row['rates'].items()
      )
      seconds = time.perf_counter() - began
      print(f'seed {seed}: {arm[1]}, {arm[0]}: {shown} ({seconds:.0f} s)', flush=True)
      results['rows'] = [row for row in rows.values() if all(row['rates'].values())]
      path.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
  print('\n'.join(table(results)))
  if flags.folder == RESULTS:
    readme.write_results('claims', RESULTS, table, 'benchmarks.claims')


if __name__ == '__main__':
  cli.main(main)
