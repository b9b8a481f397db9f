"""Searches settings of a run, such as alpha, beta and gamma, by its validation loss.

Every trial is a run of `train` in a process and a folder of its own, which goes on where
it stopped if the search is interrupted. What is compared is the loss on one validation
set, the same masks for every trial, whatever is searched. The search is Optuna's: a study
in SQLite, to which several of these commands may contribute at a time.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import functools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_jax import cli, configs
from glm_jax.configs import UserError
from glm_jax.training import writer
from glm_jax.training.search import TuneConfig

_POLL_SECONDS = 0.5


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = cli.parse(_flags(), argv)
  for name in ('trials', 'workers'):
    value = getattr(flags, name)
    configs.check(value >= 1, f'--{name} must be 1 or more', str(value), 'give 1 or more')
  load = functools.partial(cli.configuration, flags, more=(TuneConfig,))
  # Every trial has a MODEL_DIR of its own.
  bindings = ["MODEL_DIR='trial'"]
  config, _ = load(kind=TuneConfig, bindings=bindings)
  run, base = load(bindings=bindings)
  fixed = run.recipe.fixed_validation()
  try:
    # Bindings that do not exist, or take no such value, are refused before anything runs.
    for number in range(max(len(d) for d in config.search.values())):
      example = _bindings(config, lambda name, dimension: _example(dimension, number))
      load(bindings=[*bindings, *fixed, *example])
  except UserError as error:
    raise UserError(f'TuneConfig.search must be bindings of the run: {error}') from error
  folder = Path(config.study_dir)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'base.gin').write_text(base, encoding='utf-8')
  study = _study(config)
  objective = functools.partial(_trial, config=config, fixed=fixed, imports=flags.imports)
  _search(study, objective, flags.trials, flags.workers)
  _report(study, config)


def _study(config: TuneConfig) -> Any:
  """The study in the folder: a new one, or the one that is there."""
  import optuna

  optuna.logging.set_verbosity(optuna.logging.ERROR)
  storage = optuna.storages.RDBStorage(
    f'sqlite:///{Path(config.study_dir).absolute()}/study.db',
    # Trials of a command that was killed are run again, where they stopped.
    heartbeat_interval=10,
    grace_period=30,
    failed_trial_callback=optuna.storages.RetryFailedTrialCallback(),
  )
  pruner = optuna.pruners.MedianPruner(n_startup_trials=config.startup_trials)
  study = optuna.create_study(
    study_name='glm_jax',
    storage=storage,
    load_if_exists=True,
    sampler=optuna.samplers.TPESampler(
      seed=config.seed, n_startup_trials=config.startup_trials
    ),
    pruner=pruner if config.prune else optuna.pruners.NopPruner(),
  )
  searched = {name: list(dimension) for name, dimension in config.search.items()}
  search = {'search': searched, 'metric': config.metric}
  stored = study.user_attrs.get('config')
  configs.check(
    stored in (None, search),
    'a study goes on with the search that it began with',
    f'{stored} there, {search} here',
    'choose another TuneConfig.study_dir',
  )
  study.set_user_attr('config', search)
  return study


def _search(study: Any, objective: Any, trials: int, workers: int) -> None:
  """Runs trials until the study has so many that ended."""
  import optuna

  states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
  ended = len(study.get_trials(states=states))
  if ended >= trials:
    print(f'the study has {ended} trials already')
    return
  # Trials of all commands that share the study count, not only those of this one.
  enough = optuna.study.MaxTrialsCallback(trials, states=states)

  def hopeless(study: Any, trial: Any) -> None:
    # Two failures and no success: a mistake in the run, not bad luck with its settings.
    if trial.number and not study.get_trials(states=states):
      study.stop()

  say = functools.partial(_say, trials=trials)
  # Trials that fail do not count; a search in which they all do must end.
  study.optimize(
    objective,
    n_trials=2 * (trials - ended) + 2,
    n_jobs=workers,
    callbacks=[enough, say, hopeless],
    catch=(UserError,),
  )
  configs.check(
    bool(study.get_trials(states=states[:1])),
    'a search needs a trial that succeeds',
    'none; the last one said: ' + str(study.trials[-1].user_attrs.get('error', 'nothing')),
    'see the .log of a trial, and change the search or the run',
  )


def _trial(trial: Any, config: TuneConfig, fixed: list[str], imports: list[str]) -> float:
  """Trains with the settings of a trial; its metric after the last step."""
  chosen = _bindings(config, functools.partial(_suggest, trial))
  trial.set_user_attr('bindings', chosen)
  # A trial that is run again has what it had noted.
  name = trial.user_attrs.get('folder', f'trial-{trial.number:04}')
  trial.set_user_attr('folder', name)
  folder = Path(config.study_dir) / name
  # A process, not a call: a trial may crash, and must give its memory back.
  command = [sys.executable, '-m', 'glm_jax.train']
  command += [f'--gin_file={config.study_dir}/base.gin']
  command += [f'--import={name}' for name in imports]
  command += [f'--gin.{binding}' for binding in [*fixed, *chosen]]
  command += [f"--gin.MODEL_DIR='{folder}'"]
  log = folder.with_suffix('.log')
  with log.open('w', encoding='utf-8') as output:
    process = subprocess.Popen(
      command,
      stdout=output,
      stderr=output,
      preexec_fn=_die_with_parent,
    )
    try:
      value = _watch(process, trial, folder, config.metric)
    finally:
      # Whatever ends the watch, pruning or an interrupt, ends the run.
      process.kill()
      process.wait()
  message = ''
  # -SIGKILL is that of `process.kill`, after a metric that is no number.
  if process.returncode not in (0, -signal.SIGKILL):
    lines = [s for s in log.read_text(encoding='utf-8').splitlines() if 'error: ' in s]
    message = lines[-1].removeprefix('error: ') if lines else f'see {log}'
  elif not math.isfinite(value):
    message = f'a run must validate {config.metric!r}, got no such number; see {log}'
  if message:
    trial.set_user_attr('error', message)
    raise UserError(message)
  return value


def _watch(process: Any, trial: Any, folder: Path, metric: str) -> float:
  """The last value of the metric; stops a trial that does worse than others did."""
  import optuna

  value, seen = math.nan, 0
  while True:
    # Asked before the file is read: a run that ended in between is read once more.
    running = process.poll() is None
    if (folder / 'metrics.jsonl').exists():
      for record in writer.read(str(folder), 'validation')[seen:]:
        seen, value = seen + 1, record.get(metric, math.nan)
        if math.isnan(value):
          return value
        trial.report(value, record['step'])
        if running and trial.should_prune():
          raise optuna.TrialPruned
    if not running:
      return value
    time.sleep(_POLL_SECONDS)


def _suggest(trial: Any, name: str, dimension: tuple[Any, ...]) -> Any:
  kind, *bounds = dimension
  if kind == 'choice':
    return trial.suggest_categorical(name, bounds)
  if kind == 'int':
    return trial.suggest_int(name, *bounds)
  if kind == 'share':
    # Exponential numbers, divided by their sum, are even on the simplex.
    return -math.log(1 - trial.suggest_float(name, 0, 1 - 1e-9))
  return trial.suggest_float(name, *bounds, log=kind == 'log')


def _bindings(config: TuneConfig, choose: Any) -> list[str]:
  """'NAME=value' for each dimension, shares divided by their sum."""
  values = {name: choose(name, dimension) for name, dimension in config.search.items()}
  shares = [name for name, dimension in config.search.items() if dimension[0] == 'share']
  total = sum(values[name] for name in shares)
  for name in shares:
    values[name] = round(values[name] / total, 4) if total else 1.0
  return [f'{name}={value!r}' for name, value in values.items()]


def _example(dimension: tuple[Any, ...], number: int) -> Any:
  """One of the bounds or choices; the last of them for a number beyond."""
  kind, *values = dimension
  if not values:
    return 1.0
  value = values[min(number, len(values) - 1)]
  return float(value) if kind in ('float', 'log') else value


def _say(study: Any, trial: Any, trials: int) -> None:
  del study
  settings = '  '.join(trial.user_attrs.get('bindings', []))
  if trial.state.name == 'COMPLETE':
    what = f'{trial.value:.4f}'
  elif trial.state.name == 'PRUNED':
    what = f'stopped at step {trial.last_step}'
  else:
    what = trial.user_attrs.get('error', 'failed')
  print(f'trial {trial.number + 1:>3}/{trials}  {what}  {settings}', flush=True)


def _report(study: Any, config: TuneConfig) -> None:
  """Prints the best settings as gin lines; saves them and the plots."""
  best, folder = study.best_trial, Path(config.study_dir)
  lines = [line.replace('=', ' = ', 1) for line in best.user_attrs['bindings']]
  print(f'\nbest {config.metric} {best.value:.4f}, trial {best.number + 1}:')
  print('\n'.join(f'  {line}' for line in lines))
  (folder / 'best.gin').write_text('\n'.join(lines) + '\n', encoding='utf-8')
  names = _plots(study, config)
  print(f'\nalso in {folder}/best.gin; plots: {", ".join(names)}')


def _plots(study: Any, config: TuneConfig) -> list[str]:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot
  from optuna.visualization import matplotlib as draw

  plots = {
    'history': lambda: draw.plot_optimization_history(study).figure,
    'steps': lambda: draw.plot_intermediate_values(study).figure,
    'slices': lambda: _slices(study, config),
  }
  names = []
  for name, plot in plots.items():
    plot().savefig(Path(config.study_dir) / f'{name}.png', dpi=120, bbox_inches='tight')
    pyplot.close('all')
    names.append(f'{name}.png')
  return names


def _slices(study: Any, config: TuneConfig) -> Any:
  """A figure of the metric over each dimension: the values that runs were given.

  Optuna's own has what was drawn, and shares are something else: see `_suggest`.
  """
  from matplotlib import pyplot

  trials = [trial for trial in study.trials if trial.state.name == 'COMPLETE']
  given = [
    dict(line.split('=', 1) for line in trial.user_attrs['bindings']) for trial in trials
  ]
  figure, axes = pyplot.subplots(
    1,
    len(config.search),
    sharey=True,
    squeeze=False,
    figsize=(2 + 2.5 * len(config.search), 4),
    layout='constrained',
  )
  for axis, (name, (kind, *choices)) in zip(axes[0], config.search.items(), strict=True):
    values = [ast.literal_eval(bindings[name]) for bindings in given]
    if kind == 'choice':
      axis.set_xticks(range(len(choices)), map(str, choices), rotation=45, ha='right')
      values = [choices.index(value) for value in values]
    elif kind == 'log':
      axis.set_xscale('log')
    points = axis.scatter(
      values, [t.value for t in trials], c=[t.number + 1 for t in trials], edgecolors='grey'
    )
    # On two lines, since neighbours are close.
    axis.set_xlabel(name.replace('.', '.\n'))
  axes[0, 0].set_ylabel(config.metric)
  figure.colorbar(points, ax=axes, label='trial')
  return figure


def _die_with_parent() -> None:
  """A run must not go on, in its folder, after its search was killed (Linux)."""
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'tune',
    'Searches settings of a run by its validation loss; run again, it goes on.',
    'python -m glm_jax.tune --gin_file=gin_configs/tune_quickstart.gin --trials=8',
  )
  cli.add_gin_flags(flags)
  flags.add_argument(
    '--trials', type=int, default=20, metavar='N', help='of the whole study (20)'
  )
  flags.add_argument(
    '--workers',
    type=int,
    default=1,
    metavar='N',
    help='trials at a time, all on the devices of this machine (1)',
  )
  return flags


if __name__ == '__main__':
  os.environ.setdefault('PYTHONWARNINGS', 'ignore')
  cli.main(main)
