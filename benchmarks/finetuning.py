"""What pretraining is worth to fine-tuning, and what fine-tuning forgets.

python -m benchmarks.finetuning [--runs=DIR] [--seeds=3] [--table]

begins with `runs/chatglm2_tiny`, which has read the documentation of the installed packages
and is trained if it is not there, and with the same model untrained. Both learn to say what
functions do ("What does get(key) do?", a docstring to its first line) from 100 to 3,000
pairs, until the loss on pairs of other packages has not improved in three validations: the
best checkpoint counts. Then what the fine-tuned model still knows of the documentation,
with and without text of it between the pairs. About 20 minutes on 2 CPU cores; a run that
is there is not trained again. Results are kept by device and date, in
benchmarks/finetuning/; --table only writes the table.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import glm_jax
from benchmarks import quality, readme
from benchmarks.step import about
from glm_jax import checkpoints, cli, configs, startup
from glm_jax.data.corpora import corpus as corpora
from glm_jax.data.corpora.config import CorpusConfig

RESULTS = Path(__file__).parent / 'finetuning'
SIZES = (100, 300, 1000, 3000)
HELD_OUT = 600
BASES = {'pretrained': 'chatglm2_tiny', 'untrained': 'untrained'}
# A step that changes nothing: what a run begins with, as a checkpoint.
UNTRAINED = (
  '--gin_file=gin_configs/chatglm2_tiny.gin',
  '--gin.TRAIN_STEPS=1',
  '--gin.OptimizerConfig.learning_rate=1e-12',
  '--gin.EvaluationConfig.fill=0',
)
FINETUNING = (
  '--gin_file=gin_configs/runs/sft.gin',
  "--gin.TASK_FEATURE_LENGTHS={'tokens': 128}",
  '--gin.BATCH_SIZE=16',
  '--gin.TRAIN_STEPS=600',
  '--gin.OptimizerConfig.learning_rate=1e-3',
  "--gin.OptimizerConfig.schedule='constant'",
  "--gin.ComputeConfig.dtype='float32'",
  "--gin.ComputeConfig.remat='none'",
  '--gin.LossConfig.vocab_chunks=0',
  '--gin.EvaluationConfig.every=20',
  '--gin.EvaluationConfig.patience=3',
  '--gin.CheckpointConfig.every=20',
  '--gin.CheckpointConfig.keep=1',
)
# Of the rows, where text of pretraining stands between the pairs.
SHARES = (0.25, 0.5)


def best(run: Path) -> Path:
  """The checkpoint that its validations found best."""
  meta = checkpoints.read_meta(checkpoints.find(str(run)))
  return run / 'checkpoints' / str(meta['stopping']['step'])


def write_pairs(folder: Path) -> None:
  """Questions and answers, in an order of their own, as .jsonl."""
  folder.mkdir(parents=True, exist_ok=True)
  config = CorpusConfig(corpus='documentation:summaries', conversations='chatglm3')
  for split, count in {'train': max(SIZES), 'validation': HELD_OUT}.items():
    pairs = [[m.content for m in d.messages] for d in corpora.documents(config, split)]
    random.Random(0).shuffle(pairs)
    lines = [json.dumps({'prompt': q, 'response': a}) + '\n' for q, a in pairs[:count]]
    (folder / f'{split}.jsonl').write_text(''.join(lines), encoding='utf-8')


def finetuned(folder: Path, base: str, size: int, seed: int, share: float = 0.0) -> Path:
  """A run on some of the pairs.

  Args:
    folder: of all runs.
    base: of `BASES`.
    size: pairs.
    seed: of which pairs, and of the run.
    share: of text.
  """
  name = f'{base}_{size}_{seed}' + f'_text{share:g}' * bool(share)
  pairs = folder / 'pairs'
  lines = (pairs / 'train.jsonl').read_text(encoding='utf-8').splitlines(keepends=True)
  some = pairs / f'train_{size}_{seed}.jsonl'
  some.write_text(''.join(random.Random(seed).sample(lines, size)), encoding='utf-8')
  text = [f'--gin.Finetuning.text_share={share}', "--gin.Finetuning.text='documentation'"]
  own = (
    f"--gin.INIT_FROM='{folder / BASES[base]}'",
    f"--gin.CORPUS='{some}'",
    f"--gin.CorpusConfig.validation='{pairs / 'validation.jsonl'}'",
    f'--gin.TrainConfig.seed={seed}',
  )
  return quality.trained(name, folder, [*FINETUNING, *(text if share else ()), *own])


def measure(folder: Path, sizes: Sequence[int], seeds: int) -> dict[str, Any]:
  """What the table is made of, as JSON: token accuracies and losses, by size and seed."""
  bases = {'pretrained': quality.RUNS['chatglm2_tiny'], 'untrained': UNTRAINED}
  runs = {base: quality.trained(BASES[base], folder, bases[base]) for base in BASES}
  vocabularies = {glm_jax.load(run).vocabulary.fingerprint for run in runs.values()}
  configs.check(
    len(vocabularies) == 1,
    'both models must have one vocabulary',
    f'{len(vocabularies)} in {folder}',
    'remove both runs: they are trained again on what is installed now',
  )
  if not (folder / 'pairs' / 'validation.jsonl').exists():
    write_pairs(folder / 'pairs')
  _, text = quality.held_out(runs['pretrained'])
  results: dict[str, Any] = {'sizes': {}, 'forgetting': {}}
  answers: Any = None
  for size in sizes:
    results['sizes'][str(size)] = {base: [] for base in BASES}
    for seed in range(seeds):
      for base in BASES:
        run = finetuned(folder, base, size, seed)
        answers = answers or quality.held_out(run)[1]
        told = quality.told(glm_jax.load(best(run)), answers)
        results['sizes'][str(size)][base].append(told)
        print(size, seed, base, told, flush=True)
  before = glm_jax.load(runs['pretrained'])
  results['zero_shot'] = quality.told(before, answers)
  mixed = {share: finetuned(folder, 'pretrained', sizes[-1], 0, share) for share in SHARES}
  models = {'before': runs['pretrained']}
  models |= {'pairs alone': best(finetuned(folder, 'pretrained', sizes[-1], 0))}
  models |= {f'{share:.0%} text': best(run) for share, run in mixed.items()}
  for name, path in models.items():
    model = glm_jax.load(path)
    both = {'text': quality.told(model, text), 'answers': quality.told(model, answers)}
    results['forgetting'][name] = both
    print(name, both, flush=True)
  return results


def table(results: dict[str, Any]) -> list[str]:
  """Markdown lines of a device's results."""

  def cell(values: Sequence[float]) -> str:
    spread = f' ±{statistics.stdev(values):.1%}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.1%}{spread}'

  lines = [
    f'{results["device"]}, {results["date"]}; jax {results["jax"]}: a ChatGLM3 of 0.8 M '
    f'parameters; how many tokens of {HELD_OUT} first lines of docstrings, of other '
    'packages, it tells from what is before them (the mean of '
    f'{results["seeds"]} sets of pairs and its standard deviation), and the loss.',
    '',
    '| pairs | pretrained | loss | from scratch | loss | gain, points |',
    '|---|---|---|---|---|---|',
    f'| none | {results["zero_shot"]["top1"]:.1%} | {results["zero_shot"]["loss"]:.2f} '
    '| | | |',
  ]
  for size, of_size in results['sizes'].items():
    tops = {base: [told['top1'] for told in of_size[base]] for base in BASES}
    losses = {base: statistics.mean(t['loss'] for t in of_size[base]) for base in BASES}
    gain = statistics.mean(tops['pretrained']) - statistics.mean(tops['untrained'])
    lines.append(
      f'| {int(size):,} | {cell(tops["pretrained"])} | {losses["pretrained"]:.2f} | '
      f'{cell(tops["untrained"])} | {losses["untrained"]:.2f} | {100 * gain:+.1f} |'
    )
  lines += [
    '',
    'What it forgets of the documentation that it was pretrained on, by held-out text:',
    '',
    f'| after {int([*results["sizes"]][-1]):,} pairs | loss of text | loss of answers |',
    '|---|---|---|',
  ]
  for name, both in results['forgetting'].items():
    lines.append(f'| {name} | {both["text"]["loss"]:.2f} | {both["answers"]["loss"]:.2f} |')
  return lines


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = argparse.ArgumentParser(
    prog='python -m benchmarks.finetuning', description=__doc__.splitlines()[0]
  )
  flags.add_argument('--runs', default='runs', help='where runs are, and are looked for')
  flags.add_argument('--seeds', type=int, default=3, help='sets of pairs')
  flags.add_argument('--table', action='store_true', help='only write the table')
  given = flags.parse_args(argv)
  if not given.table:
    made = measure(Path(given.runs).absolute(), SIZES, given.seeds)
    results = {**about(), 'seeds': given.seeds, **made}
    path = readme.path_of(RESULTS, results)
    path.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
  readme.write_results('finetuning', RESULTS, table, 'benchmarks.finetuning')


if __name__ == '__main__':
  startup.keep_memory()
  cli.main(main)
