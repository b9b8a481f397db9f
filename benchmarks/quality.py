"""What integers cost: perplexity, size and speed of trained models.

python -m benchmarks.quality [--only=TEXT] [--runs=DIR] [--table]

trains three models on the documentation of the installed packages, unless a call before
did, and makes integers of them by `python -m glm_jax.quantize`. Each is loaded by
`glm_jax.load` and asked for the tokens of its run's validation split, which no training
step saw, and for text, greedily, one row at a time. Half an hour to an hour on 2 CPU cores,
a second call minutes. Results are kept by device and date in benchmarks/quality/; --table
only writes the tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import glm_jax
from benchmarks import readme
from benchmarks.decode import timed
from benchmarks.step import about
from glm_jax import bindings, checkpoints, cli, quantize, sharding, startup
from glm_jax.batch import Batch
from glm_jax.checkpoints import slices
from glm_jax.models import quantized
from glm_jax.recipes import CONFIGURABLES
from glm_jax.training import start
from glm_jax.training.config import TrainConfig

RESULTS = Path(__file__).parent / 'quality'
# Arguments of `train`, by run.
RUNS: dict[str, tuple[str, ...]] = {
  'quickstart': ('--gin_file=gin_configs/quickstart.gin',),
  'chatglm2_tiny': ('--gin_file=gin_configs/chatglm2_tiny.gin',),
  'chatglm2_25m': (
    '--gin_file=gin_configs/chatglm2_tiny.gin',
    '--gin.ChatGLM2Config.num_layers=6',
    '--gin.ChatGLM2Config.hidden_size=512',
    '--gin.ChatGLM2Config.num_heads=8',
    '--gin.ChatGLM2Config.head_size=64',
    '--gin.ChatGLM2Config.mlp_size=2048',
    '--gin.ChatGLM2Config.init_std=0.03',
    # Few tokens a step, of which there are more: 20 minutes on 2 cores.
    '--gin.BATCH_SIZE=4',
    '--gin.TRAIN_STEPS=600',
    '--gin.OptimizerConfig.learning_rate=1e-3',
    '--gin.EvaluationConfig.every=600',
    '--gin.EvaluationConfig.examples=128',
    '--gin.CheckpointConfig.every=300',
  ),
}
GROUP = 64
# kind -> dtype of activations, and arguments of `quantize`.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
  'float32': ('float32', ()),
  'bfloat16': ('bfloat16', ()),
  'int8': ('float32', ('--bits=8',)),
  'int4': ('float32', ('--bits=4',)),
  f'int4, groups of {GROUP}': ('float32', ('--bits=4', f'--group={GROUP}')),
}
PROMPT, NEW = 'Return the length of the list that is given, or', 64


def trained(name: str, runs: Path, arguments: Sequence[str] | None = None) -> Path:
  """The run of that name, finished; killed, the same call goes on.

  Args:
    name: of the run, in `RUNS` if it is not finished and no arguments are given.
    runs: where it is, or will be.
    arguments: of `train`.
  """
  run = runs / name
  if not (run / 'summary.json').exists():
    arguments = RUNS[name] if arguments is None else arguments
    command = [sys.executable, '-m', 'glm_jax.train', *arguments]
    subprocess.run([*command, f"--gin.MODEL_DIR='{run}'"], check=True, cwd=readme.ROOT)
  return run


def held_out(run: Path) -> tuple[str, list[Batch]]:
  """A validation set of a finished run, by name, as it validated on it: numpy, [B, T]."""
  config, _ = bindings.load_config(
    TrainConfig, CONFIGURABLES, [str(run / 'config.gin')], '', ()
  )
  config, *_ = start.resolve(config)  # of a fine-tuned one, the model stands in its base
  layout = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  data = config.recipe.prepare(config, glm_jax.load(run).vocabulary, layout)
  name, batches = next(iter(data.validation.items()))
  return name, list(batches())


def told(model: Any, batches: Iterable[Batch]) -> dict[str, float]:
  """How well a model tells the tokens of given rows.

  Returns:
    loss: nats a token, the mean.
    perplexity: its exponential.
    top1: share of the tokens that the model takes to be the most probable.
  """
  losses, hits, count = 0.0, 0.0, 0.0
  for batch in batches:
    logits_BTV = model.logits(batch)
    at = batch.targets[..., None]
    of_targets_BT = np.take_along_axis(logits_BTV, at, -1)[..., 0]
    losses_BT = np.logaddexp.reduce(logits_BTV, axis=-1) - of_targets_BT
    hits_BT = logits_BTV.argmax(-1) == batch.targets
    losses += float((losses_BT * batch.loss_weights).sum())
    hits += float((hits_BT * batch.loss_weights).sum())
    count += float(batch.loss_weights.sum())
  loss = losses / count
  return {'loss': loss, 'perplexity': float(np.exp(loss)), 'top1': hits / count}


def on_disk(path: Path) -> dict[str, float]:
  """Size of a checkpoint's parameters.

  Returns:
    megabytes: of the files, 10**6 bytes each.
    bytes_a_weight: of all of them; and of those that are integers, scales included, if any.
  """
  folder = Path(checkpoints.find(str(path)))
  leaves = slices.StoredLeaves(folder)
  sizes = lambda path: sum(f.stat().st_size for f in path.rglob('*') if f.is_file())
  total, count = sizes(folder / 'params'), slices.count(leaves.specs)
  result = {'megabytes': total / 1e6, 'bytes_a_weight': total / count}
  scaled = [
    path
    for path, _ in quantized.products(leaves.specs)
    if quantized.scale_of(path) in leaves.specs
  ]
  if scaled:
    of_leaf = lambda path: sizes(folder / 'params' / '.'.join(path))
    stored = sum(of_leaf(path) + of_leaf(quantized.scale_of(path)) for path in scaled)
    weights = sum(leaves.specs[path].size for path in scaled)
    result['bytes_an_integer'] = stored / weights
  return result


def measure(name: str, run: Path, batches: Sequence[Batch], rounds: int) -> dict[str, Any]:
  """Rows of the table for a trained model: a result for each of `KINDS`.

  Args:
    name: of the model, in the table.
    run: a MODEL_DIR, or a checkpoint.
    batches: what it is asked for.
    rounds: turns of each kind at generating.
  """
  results: dict[str, Any] = {}
  models = {}
  with tempfile.TemporaryDirectory() as folder:
    for kind, (dtype, arguments) in KINDS.items():
      path = run
      if arguments:
        path = Path(folder) / kind
        quantize.main([str(run), str(path), *arguments])
      models[kind] = model = glm_jax.load(path, dtype=dtype, batch_size=1)
      results[kind] = {**told(model, batches), **on_disk(path)}
      print(name, kind, results[kind], flush=True)
  causal = next(iter(models.values())).config.causal
  prompt = PROMPT if causal else f'{PROMPT} [gMASK]'
  how = {'max_new_tokens': NEW, 'min_new_tokens': NEW}
  runs = {kind: lambda m=m: m.generate([prompt], **how) for kind, m in models.items()}
  for kind, seconds in timed(runs, rounds).items():
    results[kind]['tokens_per_second'] = NEW / statistics.median(seconds)
  return {'model': name, 'kinds': results}


def table(results: dict[str, Any]) -> list[str]:
  """Markdown lines of a device's results."""
  lines = [
    f'{results["device"]}, {results["date"]}; jax {results["jax"]}:',
    '',
    '| model | weights | perplexity | beside float32 | top-1 | MB | bytes a weight | '
    'of integers | tokens/s |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for row in results['rows']:
    plain = row['kinds']['float32']['perplexity']
    for kind, r in row['kinds'].items():
      integers = f'{r["bytes_an_integer"]:.3f}' if 'bytes_an_integer' in r else ''
      lines.append(
        f'| {row["model"]} | {kind} | {r["perplexity"]:.3f} | '
        f'{r["perplexity"] / plain - 1:+.2%} | {r["top1"]:.2%} | {r["megabytes"]:.2f} | '
        f'{r["bytes_a_weight"]:.2f} | {integers} | {r["tokens_per_second"]:.0f} |'
      )
  return [
    *lines,
    '',
    'Perplexity and top-1 on the validation split of each run (quickstart: its blanks). '
    '`bfloat16` are activations, of the same files; integers are computed in float32. '
    'Layers alone become integers: bytes of their weights, scales included, stand beside '
    f'those of all weights. {NEW} tokens of one row, greedily, medians.',
  ]


def write_tables() -> None:
  """The section of benchmarks/README.md, from the newest results of each device."""
  readme.write_results('quality', RESULTS, table, 'benchmarks.quality')


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = argparse.ArgumentParser(
    prog='python -m benchmarks.quality', description=__doc__.splitlines()[0]
  )
  flags.add_argument('--only', default='', metavar='TEXT', help='runs with it in the name')
  flags.add_argument(
    '--runs',
    type=Path,
    default=readme.ROOT / 'runs',
    metavar='DIR',
    help='where the runs are, or become (runs)',
  )
  flags.add_argument('--rounds', type=int, default=5, help='turns of each kind')
  flags.add_argument('--folder', type=Path, default=RESULTS, help='of the results')
  flags.add_argument('--table', action='store_true', help='only write the tables')
  flags = flags.parse_args(argv)
  if flags.table:
    return write_tables()
  rows = []
  for name in RUNS:
    if flags.only in name:
      run = trained(name, flags.runs.resolve())
      objective, batches = held_out(run)
      rows.append(measure(name, run, batches, flags.rounds) | {'objective': objective})
  results = {
    **about(),
    'rows': rows,
  }
  path = readme.path_of(flags.folder, results)
  if path.exists():
    # Of today, and of the runs that were not asked for.
    before = json.loads(path.read_text(encoding='utf-8'))['rows']
    by_name = {row['model']: row for row in [*before, *rows]}
    results['rows'] = [by_name[name] for name in RUNS if name in by_name]
  path.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
  print('\n'.join(table(results)))
  if flags.folder == RESULTS:
    write_tables()


if __name__ == '__main__':
  startup.keep_memory()
  cli.main(main)
