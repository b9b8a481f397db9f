"""Searches: what is drawn, what is compared, what is stopped, and what goes on."""

import functools
import itertools
import json
import os
import signal
import time

import numpy as np
import optuna
import pytest
from commands import TINY, gin, in_process, refused, snapshot, start

from glm_jax import cli, tune
from glm_jax.recipes import CONFIGURABLES
from glm_jax.training.config import TrainConfig
from glm_jax.training.search import TuneConfig

NAMES = ('blank', 'document', 'sentence')
SHARES = {f'ObjectiveConfig.{name}': ('share',) for name in NAMES}
SEARCH = {
  **SHARES,
  'OptimizerConfig.learning_rate': ('log', 1e-4, 1e-2),
  'OptimizerConfig.weight_decay': ('float', 0.0, 0.2),
  'OptimizerConfig.warmup_steps': ('int', 1, 3),
  'OptimizerConfig.schedule': ('choice', 'cosine', 'constant'),
}


def _drawn(search, count=400):
  config = TuneConfig(study_dir='x', search=search)
  study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
  for _ in range(count):
    suggest = functools.partial(tune._suggest, study.ask())
    lines = tune._bindings(config, suggest)
    yield dict(line.split('=', 1) for line in lines)


def test_every_kind_of_dimension_is_drawn_within_its_bounds():
  drawn = [{k: eval(v) for k, v in d.items()} for d in _drawn(SEARCH)]
  column = lambda name: np.array([d[f'OptimizerConfig.{name}'] for d in drawn])
  rates = column('learning_rate')
  assert 1e-4 <= rates.min() < 2e-4 and 5e-3 < rates.max() <= 1e-2
  assert 0.4 < (rates < 1e-3).mean() < 0.6  # even in the logarithm
  assert 0 <= column('weight_decay').min() < 0.01 < 0.19 < column('weight_decay').max()
  assert {*column('warmup_steps')} == {1, 2, 3}
  assert {*column('schedule')} == {'cosine', 'constant'}


def test_shares_are_even_on_the_simplex_and_sum_to_one():
  shares = np.array([[float(d[name]) for name in SHARES] for d in _drawn(SHARES, 2000)])
  np.testing.assert_allclose(shares.sum(1), 1, atol=2e-4)
  np.testing.assert_allclose(shares.mean(0), 1 / 3, atol=0.02)
  # A uniform point of the triangle has a coordinate above 1/2 with probability 1/4.
  np.testing.assert_allclose((shares > 0.5).mean(0), 0.25, atol=0.035)


@pytest.mark.parametrize(
  'search',
  [
    {},
    {'X.y': ()},
    {'X.y': ('between', 1, 2)},
    {'X.y': ('float', 1)},
    {'X.y': ('float', 2.0, 1.0)},
    {'X.y': ('log', 0.0, 1.0)},
    {'X.y': ('int', 'a', 'b')},
    {'X.y': ('int', 1.5, 3)},
    {'X.y': (['int'], 1, 3)},
    {'X.y': ('choice',)},
    {'X.y': ('share', 1)},
  ],
)
def test_dimensions_that_mean_nothing_are_refused(search):
  with pytest.raises(ValueError, match=r'TuneConfig\.search must'):
    TuneConfig(study_dir='x', search=search)


def _load(*bindings, kind=TrainConfig):
  both = (*CONFIGURABLES, TuneConfig)
  files = ['gin_configs/tune_quickstart.gin']
  return cli.load_config(kind, both, files, '', ["MODEL_DIR='x'", *bindings])[0]


def test_what_is_compared_does_not_depend_on_what_is_searched():
  fixed = _load().recipe.fixed_validation()
  runs = [
    _load(*fixed, 'ObjectiveConfig.blank=1.0', 'ObjectiveConfig.document=0.0'),
    _load(*fixed, 'ObjectiveConfig.mask_ratio=0.5', 'ObjectiveConfig.sentence=3.0'),
  ]
  assert runs[0].recipe.objectives != runs[1].recipe.objectives
  assert runs[0].recipe.validated == runs[1].recipe.validated
  validated = runs[0].recipe.validated
  assert validated.objectives == NAMES
  assert validated.mask_ratio == _load().recipe.objectives.mask_ratio


def test_slices_show_what_runs_were_given_and_labels_that_do_not_overlap():
  config = TuneConfig(study_dir='x', search=SEARCH)
  study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
  for number in range(5):
    trial = study.ask()
    chosen = tune._bindings(config, functools.partial(tune._suggest, trial))
    trial.set_user_attr('bindings', chosen)
    if number:
      study.tell(trial, float(number))
    else:
      study.tell(trial, state=optuna.trial.TrialState.FAIL)
  figure = tune._slices(study, config)
  *axes, _ = figure.axes  # the last is the bar of colors
  points = np.array([axis.collections[0].get_offsets() for axis in axes])
  assert points.shape == (len(SEARCH), 4, 2)
  np.testing.assert_array_equal(points[..., 1], [[1, 2, 3, 4]] * len(SEARCH))
  np.testing.assert_allclose(points[: len(SHARES), :, 0].sum(0), 1, atol=2e-4)
  given = [trial.user_attrs['bindings'] for trial in study.trials[1:]]
  for name, column in zip(SEARCH, points[..., 0], strict=True):
    values = [eval(dict(line.split('=', 1) for line in lines)[name]) for lines in given]
    if name.endswith('schedule'):
      values = [('cosine', 'constant').index(value) for value in values]
    np.testing.assert_allclose(column, values)
  figure.canvas.draw()
  boxes = [axis.xaxis.label.get_window_extent() for axis in axes]
  assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
  assert boxes[0].x0 > 0 and boxes[-1].x1 < figure.bbox.x1


class _Running:
  """A process that never ends of itself."""

  returncode = None

  def poll(self):
    return None


def _report(folder, values):
  lines = [
    json.dumps({'kind': 'validation', 'step': 10 * (i + 1), 'loss': value})
    for i, value in enumerate(values)
  ]
  (folder / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')


def test_a_trial_worse_than_the_median_at_its_step_is_stopped(tmp_path):
  study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=2))
  for losses in ((3.0, 2.0), (3.2, 2.2)):
    trial = study.ask()
    for i, loss in enumerate(losses):
      trial.report(loss, 10 * (i + 1))
    study.tell(trial, losses[-1])
  _report(tmp_path, (3.05, 2.5))  # good at first, bad then
  trial = study.ask()
  with pytest.raises(optuna.TrialPruned):
    tune._watch(_Running(), trial, tmp_path, 'loss')
  assert study.trials[-1].intermediate_values == {10: 3.05, 20: 2.5}


def _text(folder):
  (folder / 'text').mkdir()
  for number in range(40):
    (folder / 'text' / f'{number:02}.txt').write_text(f'Text {number} says words. ' * 9)


def _arguments(folder, *bindings):
  (folder / 'tune.gin').write_text(
    "include 'gin_configs/glm_tiny.gin'\n"
    f"TuneConfig.study_dir = '{folder}/study'\n"
    'TuneConfig.search = {\n'
    "  'ObjectiveConfig.blank': ('share',), 'ObjectiveConfig.sentence': ('share',),\n"
    "  'OptimizerConfig.learning_rate': ('log', 1e-4, 1e-2)}\n"
    'TuneConfig.startup_trials = 2\n'
    'EvaluationConfig.every = 2\nCheckpointConfig.every = 2\n'
  )
  places = [
    f"CorpusConfig.corpus='{folder}/text/*.txt'",
    f"CorpusConfig.cache_dir='{folder}/cache'",
  ]
  return [f'--gin_file={folder}/tune.gin', *gin(*TINY, *places, *bindings)]


@pytest.mark.slow
def test_a_search_killed_goes_on_and_says_what_is_best(tmp_path):
  _text(tmp_path)
  arguments = _arguments(tmp_path, 'TRAIN_STEPS=6')
  process = start('tune', *arguments, '--trials=2')
  first = tmp_path / 'study' / 'trial-0000'
  while process.poll() is None and not (first / 'metrics.jsonl').exists():
    time.sleep(0.05)
  os.killpg(process.pid, signal.SIGKILL)
  process.communicate()
  done = in_process('tune', *arguments, '--trials=2', '--workers=2')
  assert done.returncode == 0, done.stdout + done.stderr
  again = in_process('tune', *arguments, '--trials=3')
  assert again.returncode == 0, again.stdout + again.stderr
  study = optuna.load_study(
    study_name='glm_jax', storage=f'sqlite:///{tmp_path}/study/study.db'
  )
  states = optuna.trial.TrialState
  ended = study.get_trials(states=(states.COMPLETE, states.PRUNED))
  assert len(ended) == 3 and again.stdout.count('trial ') >= 1
  best = study.best_trial
  assert f'best loss {best.value:.4f}' in again.stdout
  lines = (tmp_path / 'study' / 'best.gin').read_text().splitlines()
  assert [line.replace(' = ', '=') for line in lines] == best.user_attrs['bindings']
  assert all(f'  {line}' in again.stdout for line in lines)
  for name in ('history', 'steps', 'slices'):
    assert (tmp_path / 'study' / f'{name}.png').stat().st_size > 5000
  # All three objectives are validated, though only two are trained on.
  folder = tmp_path / 'study' / best.user_attrs['folder']
  records = [json.loads(x) for x in (folder / 'metrics.jsonl').read_text().splitlines()]
  last = [record for record in records if record['kind'] == 'validation'][-1]
  losses = [last[f'loss/{name}'] for name in NAMES]
  assert best.value == last['loss'] and last['loss'] == pytest.approx(np.mean(losses))
  enough = in_process('tune', *arguments, '--trials=3')
  assert 'has 3 trials already' in enough.stdout and enough.returncode == 0
  other = in_process('tune', *arguments, *gin("TuneConfig.metric='loss/blank'"))
  refused(other, 'goes on with the search that it began with', 'study_dir')


@pytest.mark.slow
@pytest.mark.parametrize(
  'bindings,flags,words',
  [
    (["TuneConfig.search={'GLMConfig.depth':('int',1,2)}"], [], ('depth', 'search')),
    (["TuneConfig.search={'X':('range',1,2)}"], [], ("('range', 1, 2)",)),
    ([], ['--trials=0'], ('--trials must be 1 or more',)),
    ([], ['--workers=0'], ('--workers',)),
    (["TuneConfig.metric='bleu'"], ['--trials=1'], ('bleu',)),
    (["CorpusConfig.corpus='nowhere/*.txt'"], ['--trials=1'], ('matches no file',)),
  ],
)
def test_searches_that_cannot_succeed_are_one_message(tmp_path, bindings, flags, words):
  _text(tmp_path)
  arguments = _arguments(tmp_path, *bindings)
  before = snapshot(tmp_path)
  refused(in_process('tune', *arguments, *flags), *words)
  if '--trials=1' not in flags:  # refused before any trial
    assert snapshot(tmp_path) == before
