"""Policies in processes of their own: two of them, and one that is killed or stopped."""

import signal

import jax
import killer
import numpy as np
import policies
import pytest
import runs
from commands import ROOT, start
from two_processes_test import _flags

from glm_jax import checkpoints, leaving
from glm_jax.training import writer

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp('policies')
  policies.prepare(folder)
  return folder


def _begin(place, *bindings, stage, run, flags=(), **more):
  arguments = policies.arguments(place, *bindings, stage=stage, run=run, flags=flags)
  path = f'{ROOT}:{ROOT}/tests:{place}'
  return start('train', *arguments, PYTHONPATH=path, PYTHONUNBUFFERED='1', **more)


def test_two_processes_roll_out_and_learn_as_one_does(place):
  """Each judges its own answers: a reward of theirs is the same wherever it is given."""
  bindings = ('TRAIN_STEPS=5', 'PPO.epochs=2', 'PPO.show_every=1')
  alone = _begin(place, *bindings, stage='ppo', run='one')
  both = [
    _begin(place, *bindings, 'MeshConfig.fsdp=2', stage='ppo', run='two', flags=flags)
    for flags in _flags()
  ]
  for process in (alone, *both):
    runs.finish(process)
  one, two = (writer.read(str(place / run), 'train') for run in ('one', 'two'))
  assert len(one) == len(two) == 5
  for a, b in zip(one, two, strict=True):
    for name in ('loss', 'reward', 'kl', 'entropy', 'value_loss', 'explained_variance'):
      assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-4), name
  told = [policies.rolled(place / run) for run in ('one', 'two')]
  said = lambda rollouts: [[line['completion'] for line in r] for r in rollouts.values()]
  assert said(told[0]) == said(told[1]) and len(told[0]) == 2


def test_a_reward_that_fails_in_one_process_ends_both(place):
  """It is asked about its own half: the other process would wait for it."""
  reward = "PPO.rewards={'own_rewards.raises': 1.0}"
  both = [
    _begin(place, reward, stage='ppo', run='failing', flags=flags) for flags in _flags()
  ]
  outputs = [process.communicate(timeout=300)[0] for process in both]
  assert {process.returncode for process in both} == {65}, outputs
  assert any('ZeroDivisionError' in output for output in outputs)


@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_killed_or_stopped_a_run_continues_to_the_same_bits(place, stage, monkeypatch):
  """In a rollout, between the updates of one, and in a save; told to stop, in a rollout."""
  bindings = (
    'TRAIN_STEPS=10',
    f'{stage.upper()}.epochs=2',
    'CheckpointConfig.every=2',
    'EvaluationConfig.every=1000',
    "OptimizerConfig.schedule='constant'",
  )
  where = {'stage': stage, 'run': f'straight_{stage}'}
  runs.finish(_begin(place, *bindings, **where))
  where['run'] = f'killed_{stage}'
  for point in (killer.BETWEEN, killer.ROLLOUT, 'before step 6 is committed'):
    flags = ('--import=killer',)
    process = _begin(place, *bindings, **where, flags=flags, KILLED=point)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, (point, output)
  assert checkpoints.latest_step(str(place / where['run'])) == 4
  told = {'KILLED': killer.ROLLOUT, 'SIGNAL': 'SIGTERM'}
  process = _begin(place, *bindings, **where, flags=('--import=killer',), **told)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == leaving.EXIT_AGAIN, output
  step = checkpoints.latest_step(str(place / where['run']))
  assert 4 < step < 10 and f'by SIGTERM at step {step}, which is saved' in output, output
  runs.finish(_begin(place, *bindings, **where))
  monkeypatch.setattr('runs.STEPS', 10)
  found, wanted = (runs.params(place / f'{run}_{stage}') for run in ('killed', 'straight'))
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
