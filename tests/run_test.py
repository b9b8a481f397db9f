"""The folder of a run: recognised, refused, or continued."""

import dataclasses
import json
import types

import pytest

from glm_jax.checkpoints import folder
from glm_jax.configs import UserError
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.training import resume, start
from glm_jax.training.config import EvaluationConfig
from glm_jax.training.optimizer import OptimizerConfig

IDENTITY = {'seed': 0, 'recipe': 'Pretraining', 'model': {'num_layers': 2}}
SETTINGS = {'optimizer': {'learning_rate': 1e-3}, 'optimizer_holds': 'adamw'}


def test_a_new_or_empty_folder_is_fine(tmp_path):
  assert folder.check_same(str(tmp_path / 'new'), IDENTITY, SETTINGS) == []
  assert folder.check_same(str(tmp_path), IDENTITY, SETTINGS) == []


def test_the_same_run_is_recognised_and_changed_settings_are_said(tmp_path):
  folder.write(str(tmp_path), IDENTITY, SETTINGS, 'text', {})
  assert folder.check_same(str(tmp_path), IDENTITY, SETTINGS) == []
  faster = {**SETTINGS, 'optimizer': {'learning_rate': 2e-3}}
  changed = folder.check_same(str(tmp_path), IDENTITY, faster)
  assert changed == ['optimizer.learning_rate was 0.001 and is now 0.002']
  with pytest.raises(ValueError, match='model.num_layers was 2 and is now 3'):
    folder.check_same(str(tmp_path), {**IDENTITY, 'model': {'num_layers': 3}}, SETTINGS)


def test_a_rate_that_follows_the_length_of_the_run_is_said(tmp_path):
  """Once: a field of the optimizer that changed says it already."""

  def run(train_steps, **fields):
    return types.SimpleNamespace(
      train_steps=train_steps, optimizer=OptimizerConfig(**fields)
    )

  def changes(before, now):
    folder.write(str(tmp_path), IDENTITY, before, 'text', {})
    return [*start.in_words(folder.check_same(str(tmp_path), IDENTITY, now))]

  settings = lambda *args, **fields: start.settings(run(*args, **fields))
  said = changes(settings(20, warmup_steps=100), settings(400, warmup_steps=100))
  assert [line.split(':')[0] for line in said] == [
    'from here on, schedule.decay_ends was 20 and is now 400',
    'from here on, schedule.warmup_ends was 2 and is now 100',
  ]
  for name in ('constant', 'rsqrt'):
    assert changes(settings(20, schedule=name), settings(40, schedule=name)) == []
  assert changes(settings(20, decay_steps=30), settings(40, decay_steps=30)) == []
  said = changes(settings(20), settings(20, decay_steps=30))
  assert said == ['from here on, optimizer.decay_steps was 0 and is now 30']
  said = changes(settings(20), settings(20, schedule='constant'))
  assert len(said) == 1 and 'optimizer.schedule was' in said[0]
  # A run that began before this was noted, and before there was a choice of optimizers.
  before = {'optimizer': settings(20)['optimizer']}
  del before['optimizer']['algorithm'], before['optimizer']['second_moment_dtype']
  assert changes(before, settings(40)) == []
  small = settings(40, second_moment_dtype='bfloat16')
  assert changes(before, small) == [
    "from here on, optimizer.second_moment_dtype was None and is now 'bfloat16'"
  ]
  with pytest.raises(UserError, match='holds a run with adamw, .* got adafactor;'):
    changes(before, settings(40, algorithm='adafactor'))


def test_every_configuration_is_recognised_after_json(tmp_path):
  fields = dict(batch_size=8, seed=0, recipe='Pretraining')
  of = lambda objectives: {'objectives': dataclasses.asdict(objectives), 'data': 'x'}
  steps = ObjectiveConfig(schedule=((0, 5, 1, 0, 0), (5, -1, 2, 1, 1)))
  wanted = folder.identity({'betas': (0.9,)}, 'x', data=of(steps), **fields)
  settings = {**SETTINGS, 'optimizer': dataclasses.asdict(OptimizerConfig())}
  folder.write(str(tmp_path), wanted, settings, 'text', {})
  assert folder.check_same(str(tmp_path), wanted, settings) == []
  other = folder.identity({'betas': (0.9,)}, 'x', data=of(ObjectiveConfig()), **fields)
  with pytest.raises(ValueError, match='objectives.schedule was'):
    folder.check_same(str(tmp_path), other, settings)


def test_a_run_of_before_there_were_recipes_is_one_of_pretraining(tmp_path):
  old = {k: v for k, v in IDENTITY.items() if k != 'recipe'}
  folder.write(str(tmp_path), old, SETTINGS, 'text', {})
  assert folder.check_same(str(tmp_path), IDENTITY, SETTINGS) == []
  with pytest.raises(ValueError, match="recipe was 'Pretraining' and is now 'Reward'"):
    folder.check_same(str(tmp_path), {**IDENTITY, 'recipe': 'Reward'}, SETTINGS)


def test_a_process_killed_while_it_wrote_the_folder_may_begin_again(tmp_path):
  (tmp_path / f'.{folder.FILE}.123').write_text('{"iden')
  assert folder.check_same(str(tmp_path), IDENTITY, SETTINGS) == []
  folder.write(str(tmp_path), IDENTITY, SETTINGS, 'text', {})
  (tmp_path / 'config.gin').unlink()  # killed between the two files
  assert folder.check_same(str(tmp_path), IDENTITY, SETTINGS) == []
  assert json.loads((tmp_path / folder.FILE).read_text())['identity'] == IDENTITY


def test_folders_of_others_are_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('')
  with pytest.raises(ValueError, match=r'thesis\.tex.*choose another folder'):
    folder.check_same(str(tmp_path), IDENTITY, SETTINGS)
  (tmp_path / folder.FILE).write_text('{')
  with pytest.raises(ValueError, match='readable JSON'):
    folder.check_same(str(tmp_path), IDENTITY, SETTINGS)


def test_what_is_left_of_a_run_that_is_started_again(tmp_path):
  """Nothing, once it has its report; a report alone, if it was killed before that."""
  stop = types.SimpleNamespace(over=False, in_words=lambda: 'why')
  config = types.SimpleNamespace(
    model_dir=str(tmp_path), train_steps=20, evaluation=EvaluationConfig(patience=3)
  )
  left = lambda step: resume.nothing_left(config, step, stop)
  assert [left(step) for step in (None, 10, 20)] == [''] * 3
  assert 'is at step 30, and TRAIN_STEPS=20: nothing is left' in left(30)
  stop.over = True
  assert [left(step) for step in (10, 20)] == [''] * 2
  for step in (10, 20):
    # A report of before it went on says nothing of where it is now.
    (tmp_path / 'summary.json').write_text(json.dumps({'steps': step}))
    assert left(30 - step) == ''
    early = 'has stopped early at step 10: why; raise EvaluationConfig.patience=3, or set'
    assert (early if step == 10 else 'is at step 20, and TRAIN_STEPS=20') in left(step)
  stop.over = False
  (tmp_path / 'summary.json').write_text('{"steps": 10}')
  assert left(10) == ''  # it has more patience now, or none
