"""Runs as users start them: finished, begun from another, with own tasks, in trouble."""

import json
import shlex
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs
from commands import ROOT, environment, in_process, refused
from runs import STEPS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from glm_jax import checkpoints

pytestmark = pytest.mark.slow


def _train(text, run, *bindings, flags=(), **more):
  return in_process('train', *flags, *runs.arguments(text, run, *bindings), **more)


def test_a_finished_run_says_so_and_changes_nothing(text, straight):
  before = {path: path.stat().st_mtime_ns for path in straight.rglob('*')}
  for bindings in ((), ('TRAIN_STEPS=5',)):
    done = _train(text, straight, *bindings)
    assert done.returncode == 0, done.stderr
    assert f'{straight} is at step {STEPS}, and TRAIN_STEPS=' in done.stdout
    assert 'step  ' not in done.stdout and 'done: ' not in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in straight.rglob('*')}


def test_the_folder_holds_what_a_person_looks_for(straight):
  names = {path.name for path in straight.iterdir()}
  assert {
    'config.gin',
    'run.json',
    'metrics.jsonl',
    'tensorboard',
    'checkpoints',
    'summary.json',
    'loss.png',
  } <= names
  summary = json.loads((straight / 'summary.json').read_text())
  assert len(summary['filled']) == 1
  for name in ('blank', 'document', 'sentence'):
    assert summary['baselines'][name]['bigram'] < summary['baselines'][name]['unigram']
    assert f'loss/{name}' in summary['validation']
  board = EventAccumulator(str(straight / 'tensorboard'), {'tensors': 0}).Reload()
  assert [event.step for event in board.Tensors('train/loss')] == [*range(1, STEPS + 1)]


def test_a_new_run_begins_from_anothers_parameters(text, straight, tmp_path):
  """Longer position tables keep the old rows; the step and the optimizer are new."""
  run, init_from = tmp_path / 'next', f"TrainConfig.init_from='{straight}'"
  done = _train(
    text,
    run,
    init_from,
    'TRAIN_STEPS=1',
    'GLMConfig.max_positions=100',
    'OptimizerConfig.learning_rate=1e-9',
    'OptimizerConfig.schedule="constant"',
    'OptimizerConfig.warmup_steps=0',
  )
  assert 'parameters from' in done.stdout, done.stderr
  with ocp.StandardCheckpointer() as reader:
    new = reader.restore(checkpoints.find(str(run)) / 'params')
  old = runs.params(straight)[0]
  assert new['positions']['weight'].shape[0] == 101
  np.testing.assert_allclose(
    new['positions']['weight'][:65], old['positions']['weight'], atol=1e-6
  )
  np.testing.assert_allclose(new['words']['weight'], old['words']['weight'], atol=1e-6)
  other = _train(text, tmp_path / 'bad', init_from, 'GLMConfig.num_layers=3')
  refused(other, 'init_from must hold the same model')
  assert not (tmp_path / 'bad').exists()


def test_a_task_of_ones_own_trains_through_the_command(text, tmp_path):
  (tmp_path / 'own_tasks.py').write_text("""
import functools
import seqio, tensorflow as tf
from glm_jax.data import preprocessors
from glm_jax.text.vocabulary import ByteVocabulary

vocabulary = ByteVocabulary()
def source(split, shuffle_files, seed=None):
  return tf.data.Dataset.from_tensor_slices({'text': ['A sentence of my own. ' * 5] * 64})
steps = (preprocessors.tokenize, preprocessors.to_rows, preprocessors.blank_infilling)
seqio.TaskRegistry.add(
  'my_task', source=seqio.FunctionDataSource(source, splits=('train', 'validation')),
  preprocessors=[functools.partial(step, vocabulary=vocabulary) for step in steps],
  output_features=preprocessors.output_features(vocabulary), shuffle_buffer_size=8)
""")
  done = _train(
    text,
    tmp_path / 'run',
    'MIXTURE_OR_TASK_NAME="my_task"',
    'TRAIN_STEPS=4',
    flags=['--import=own_tasks'],
    PYTHONPATH=f'{ROOT}:{tmp_path}',
  )
  assert 'validation loss  blank ' in done.stdout, done.stderr
  # Its own name, and the objective whose loss that is.
  assert '\nmy_task (blank) ' in done.stdout and 'done: 4 steps' in done.stdout


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(text, tmp_path):
  """A limit on the size of a file stands for a full disk: writing fails alike."""
  run = tmp_path / 'full'
  done = _train(text, run, 'TRAIN_STEPS=2')
  assert done.returncode == 0, done.stderr
  arguments = shlex.join(runs.arguments(text, run, 'TRAIN_STEPS=6'))
  done = subprocess.run(
    [
      'bash',
      '-c',
      f'ulimit -f 64; trap "" XFSZ; exec {sys.executable} -m glm_jax.train {arguments}',
    ],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 74, done.stdout + done.stderr
  assert 'error: ' in done.stderr and 'Traceback' not in done.stderr
  assert checkpoints.latest_step(str(run)) == 2


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path):
  done = _train(
    text,
    tmp_path / 'run',
    'OptimizerConfig.learning_rate=1e30',
    'OptimizerConfig.clip_norm=1e30',
    'OptimizerConfig.schedule="constant"',
    'CheckpointConfig.every=100',
  )
  refused(done, 'left out 10 times in a row', 'the loss was nan', code=70)
  assert checkpoints.latest_step(str(tmp_path / 'run')) is None
