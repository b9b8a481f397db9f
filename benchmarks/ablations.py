"""Does GLM's method matter at this size? Mask ratio, span order, positions, objectives.

python -m benchmarks.ablations [--seeds 3] [--steps 1000] [--only NAME]

trains the model of glm_tiny.gin once for each setting and seed, and validates each on the
same masks; run again, it goes on. Results and plot stand in benchmarks/ablations_results/,
and the README's section is written from them. About a minute a run on 2 cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.readme import write_section
from glm_jax import cli, startup

FOLDER = Path(__file__).parent / 'ablations_results'
RESULTS = FOLDER / 'results.json'
# Of each validation set.
_ROWS, _BATCH = 512, 64
RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)

BASE = dict(blank=1.0, document=0.0, sentence=0.0)
SETTINGS: dict[str, dict[str, Any]] = {
  **{f'mask {ratio:.0%}': dict(BASE, mask_ratio=ratio) for ratio in RATIOS},
  'in order': dict(BASE, shuffle_spans=False),
  '1-D positions': dict(BASE, one_dimensional=True),
  'mix .5 .3 .2': dict(blank=0.5, document=0.3, sentence=0.2),
  'mix 1/3 each': dict(blank=1.0, document=1.0, sentence=1.0),
  'document alone': dict(blank=0.0, document=1.0, sentence=0.0),
}
"""What each run trains on; 'mask 15%', all blanks, is the method as published."""

SETS: dict[str, dict[str, Any]] = {
  **{f'blank {r:.0%}': dict(BASE, mask_ratio=r) for r in (0.05, 0.15, 0.3, 0.5)},
  'blank 15%, in order': dict(BASE, shuffle_spans=False),
  'document': dict(blank=0.0, document=1.0, sentence=0.0),
  'sentence': dict(blank=0.0, document=0.0, sentence=1.0),
}
"""What each run is validated on."""


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--seeds', type=int, default=3)
  flags.add_argument('--steps', type=int, default=1000)
  flags.add_argument('--only', choices=SETTINGS, help='one setting alone')
  options = flags.parse_args()
  FOLDER.mkdir(exist_ok=True)
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {'runs': {}}
  if results['runs'] and results['steps'] != options.steps:
    raise SystemExit(
      f'error: results of {results["steps"]} steps are not mixed with others; move '
      f'{RESULTS} away, or use --steps {results["steps"]}'
    )
  results['steps'] = options.steps
  # Seed after seed, so that an interrupted benchmark has a row for every setting early.
  runs = [
    (name, seed)
    for seed in range(options.seeds)
    for name in SETTINGS
    if options.only in (None, name)
  ]
  missing = [r for r in runs if str(r[1]) not in results['runs'].get(r[0], {})]
  if missing:
    bench = Bench(options.steps)
    for number, (name, seed) in enumerate(missing, 1):
      began = time.perf_counter()
      losses = bench.run(SETTINGS[name], seed)
      results['runs'].setdefault(name, {})[str(seed)] = losses
      RESULTS.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
      seconds = time.perf_counter() - began
      print(
        f'{number}/{len(missing)}  {name}, seed {seed}: blank 15% '
        f'{losses["blank 15%"]:.3f}  ({seconds:.0f} s)',
        flush=True,
      )
  plot(results)
  lines = section(results)
  write_section('ablations', lines)
  print('\n'.join(lines))


class Bench:
  """The run, compiled once, and the validation sets."""

  def __init__(self, steps: int):
    from glm_jax import sharding
    from glm_jax.recipes import CONFIGURABLES
    from glm_jax.training import program
    from glm_jax.training.config import TrainConfig

    config, _ = cli.load_config(
      TrainConfig,
      CONFIGURABLES,
      ['gin_configs/glm_tiny.gin'],
      '',
      [f'TRAIN_STEPS={steps}', 'OptimizerConfig.warmup_steps=50'],
    )
    import jax

    startup.find_devices()
    self.config, self.layout = config, sharding.make_mesh(config.mesh)
    self.built = program.build(config, self.layout)
    self.evaluate = jax.jit(self.built.eval_step)
    # Validation follows the run's positions: a model of 1-D positions has to be fed those.
    self.sets = {
      flat: {name: self._batches(fields, flat) for name, fields in SETS.items()}
      for flat in (False, True)
    }

  def _prepare(self, task: str, objectives: Any) -> Any:
    from glm_jax.data import prepare

    c = self.config.recipe
    return prepare.prepare(task, c.feature_lengths, c.corpus, c.vocabulary, objectives)

  def _objectives(self, fields: Mapping[str, Any]) -> Any:
    return dataclasses.replace(self.config.recipe.objectives, **fields)

  def _batches(self, fields: Mapping[str, Any], flat: bool) -> list[Any]:
    from glm_jax.data import pipeline

    objectives = self._objectives({**fields, 'one_dimensional': flat})
    (task,) = self._prepare('glm_mixture', objectives).evaluation_tasks.values()
    return list(
      pipeline.batches(
        task,
        self.config.recipe.feature_lengths,
        batch_size=_BATCH,
        seed=0,
        split='validation',
        train=False,
        max_rows=_ROWS,
      )
    )

  def run(self, fields: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Loss on each validation set after training."""
    import jax

    from glm_jax import sharding
    from glm_jax.data import pipeline
    from glm_jax.training import metrics, state

    objectives = self._objectives(fields)
    self._prepare('glm_mixture', objectives)
    stream = pipeline.batches(
      'glm_mixture',
      self.config.recipe.feature_lengths,
      batch_size=self.config.batch_size,
      seed=seed,
    )
    current = state.init_state(self.config.model, self.built.optimizer, self.layout, seed)
    with sharding.active(self.layout):
      to_devices = lambda batch: sharding.place(batch._replace(index=None), self.layout)
      for batch in itertools.islice(stream, self.config.train_steps):
        current, outputs = self.built.train_step(current, {}, to_devices(batch))
      jax.block_until_ready(outputs)
      losses = {}
      for name, batches in self.sets[objectives.one_dimensional].items():
        total: dict[str, Any] = {}
        for batch in batches:
          scores = self.evaluate({'params': current['params']}, to_devices(batch))
          total = metrics.add(total, jax.device_get(scores))
        losses[name] = round(metrics.averages(total)['loss'], 5)
    return losses


def mean_and_spread(results: Mapping[str, Any], setting: str, name: str) -> Any:
  """Mean and standard deviation over seeds; None where there are no runs."""
  values = [losses[name] for losses in results['runs'].get(setting, {}).values()]
  if not values:
    return None
  return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def section(results: Mapping[str, Any]) -> list[str]:
  """The README's table."""
  settings = [name for name in SETTINGS if name in results['runs']]
  lines = [
    '| validated on | ' + ' | '.join(settings) + ' |',
    '|---' * (len(settings) + 1) + '|',
  ]
  for name in SETS:
    cells = [mean_and_spread(results, setting, name) for setting in settings]
    cells = [f'{mean:.2f} ±{spread:.2f}' for mean, spread in cells]
    lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
  seeds = max(len(runs) for runs in results['runs'].values())
  return [
    '![Ablations](ablations_results/ablations.png)',
    '',
    *lines,
    '',
    'Columns: what was trained on, the paper\'s method is "mask 15%". Validation loss of '
    f'the model of glm_tiny.gin (0.7 M parameters) after {results["steps"]:,} steps, mean '
    f'and standard deviation of {seeds} seed(s). '
    + verdict(results)
    + '(Written by `python -m benchmarks.ablations`.)',
  ]


def verdict(results: Mapping[str, Any]) -> str:
  """What the numbers say of two claims of the paper, at this size."""
  at = '15 % blanks'
  by_ratio = {
    ratio: score
    for ratio in RATIOS
    if (score := mean_and_spread(results, f'mask {ratio:.0%}', 'blank 15%'))
  }
  # No verdict from a part of the ratios, with --only or before the end.
  if len(by_ratio) < len(RATIOS):
    return ''
  best = min(by_ratio, key=lambda ratio: by_ratio[ratio][0])
  # The paper claims a range, of which the best member counts.
  claimed = min(by_ratio[r][0] for r in (0.1, 0.15, 0.2))
  lines = [
    f'"10-20 % is best": on {at}, training with {best:.0%} is '
    + ('best' if 0.1 <= best <= 0.2 else f'{claimed - by_ratio[best][0]:.2f} nats better')
    + '.'
  ]
  shuffled, ordered = (
    mean_and_spread(results, name, 'blank 15%') for name in ('mask 15%', 'in order')
  )
  # A spread of 0 is that of a single seed, against which nothing can be compared.
  if shuffled and ordered and shuffled[1]:
    difference = ordered[0] - shuffled[0]
    spread = max(shuffled[1], ordered[1])
    says = 'more' if abs(difference) > spread else 'not more'
    lines.append(
      f'"Shuffling matters": trained in order, {at} in random order cost '
      f'{difference:+.3f} nats, {says} than the spread of seeds.'
    )
  return ''.join(line + ' ' for line in lines)


def plot(results: Mapping[str, Any]) -> None:
  """Four panels with error bars."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  # Without pyplot, which would look for a display.
  figure = Figure(figsize=(12, 3.4), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots(1, 4)
  for name in ('blank 5%', 'blank 15%', 'blank 30%', 'blank 50%'):
    points = [
      (ratio, *score)
      for ratio in RATIOS
      if (score := mean_and_spread(results, f'mask {ratio:.0%}', name))
    ]
    if points:
      ratios, means, spreads = zip(*points, strict=True)
      axes[0].errorbar(ratios, means, spreads, marker='o', capsize=3, label=name)
  axes[0].set(xlabel='mask ratio in training', ylabel='validation loss (nats)')
  axes[0].legend(frameon=False, fontsize=8, title='validated on', title_fontsize=8)
  groups = (
    ('span order', ('mask 15%', 'in order'), ('blank 15%', 'blank 15%, in order')),
    ('positions', ('mask 15%', '1-D positions'), ('blank 15%', 'document', 'sentence')),
    (
      'objectives',
      ('mask 15%', 'mix .5 .3 .2', 'mix 1/3 each', 'document alone'),
      ('blank 15%', 'document', 'sentence'),
    ),
  )
  labels = {'mask 15%': 'blank alone'}
  for axis, (title, settings, names) in zip(axes[1:], groups, strict=True):
    for i, name in enumerate(names):
      points = [
        # Sets side by side at each tick, so that error bars do not cover each other.
        (j + (i - (len(names) - 1) / 2) * 0.2, *score)
        for j, setting in enumerate(settings)
        if (score := mean_and_spread(results, setting, name))
      ]
      if points:
        x, means, spreads = zip(*points, strict=True)
        axis.errorbar(x, means, spreads, marker='o', ls='', capsize=3, label=name)
    first = {'span order': 'shuffled', 'positions': '2-D'}.get(title, labels['mask 15%'])
    ticks = [first, *settings[1:]]
    axis.set_xticks(range(len(ticks)), ticks, rotation=20, ha='right', fontsize=8)
    axis.set_title(title, fontsize=10)
    axis.legend(frameon=False, fontsize=8)
  figure.savefig(FOLDER / 'ablations.png', dpi=110)


if __name__ == '__main__':
  main()
