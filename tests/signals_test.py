"""Signals: what is saved and said, when a run leaves at once, and that it goes on alike."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import killer
import numpy as np
import pytest
import runs
from commands import ROOT, environment, snapshot, until
from two_processes_test import _flags

from glm_jax import checkpoints, leaving
from glm_jax.training import signals

# What a run does with its signals, without a model: `LEFT` steps of 20 ms.
_SCRIPT = """
import sys, time
from glm_jax import leaving
from glm_jax.training import signals
with signals.Signals({grace}) as stops:
  print('begun', flush=True)
  {start}
  stops.holding = True
  print('holding', flush=True)
  for step in range(1, 500):
    time.sleep(0.02)
    if stops.agreed(step):
      break
  {save}
  try:
    stops.release(step)
  except leaving.Again as error:
    sys.exit(f'again: {{error}}')
"""


def _run(words, numbers, start='pass', save='pass', grace=30.0, between=0.6):
  """(exit code, what was said, seconds) of a process that is sent signals."""
  code = textwrap.dedent(_SCRIPT).format(grace=grace, start=start, save=save)
  process = subprocess.Popen(
    [sys.executable, '-c', code],
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  said = until(process, words)
  began = time.perf_counter()
  for place, number in enumerate(numbers):
    time.sleep(between if place else 0)
    process.send_signal(number)
  said += process.communicate(timeout=60)[0]
  return process.returncode, said, time.perf_counter() - began


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_lets_the_run_save_and_says_so(number):
  code, said, _ = _run('holding', [number], save="print('saved')")
  assert code == 1 and 'saved' in said, said
  assert f'{number.name}: saving and leaving, in 30 s at most' in said
  assert f'again: stopped by {number.name} at step' in said


def test_before_there_is_anything_to_save_it_leaves_at_once():
  """Also inside of C, where Python's handlers wait: a lock stands for a compiler."""
  start = 'import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()'
  code, said, seconds = _run('begun', [signal.SIGTERM], start=start)
  assert code == leaving.EXIT_AGAIN and seconds < 5
  assert 'stopped by SIGTERM; the same command goes on from the last checkpoint' in said


def test_a_second_signal_leaves_at_once_and_an_echo_of_the_first_is_none():
  save = "time.sleep(30); print('saved')"
  for second in (signal.SIGTERM, signal.SIGINT):
    code, said, seconds = _run('holding', [signal.SIGTERM, second], save=save)
    assert code == leaving.EXIT_AGAIN and seconds < 10, said
    assert f'{second.name} again: ended at once' in said and 'saved' not in said
  save = "time.sleep(0.5); print('saved')"
  code, said, _ = _run('holding', [signal.SIGTERM] * 2, save=save, between=0.02)
  assert code == 1 and 'saved' in said and 'again: ended' not in said


def test_what_cannot_be_saved_in_time_is_left():
  code, said, seconds = _run('holding', [signal.SIGTERM], save='time.sleep(30)', grace=1.0)
  assert code == leaving.EXIT_AGAIN and 1 < seconds < 10
  assert 'nothing could be saved in 1 s; the same command goes on from the last' in said


def test_one_that_is_ignored_stays_ignored():
  """As nohup has it; and whoever is done hears as before."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  here = signal.getsignal(signal.SIGTERM)
  try:
    with signals.Signals() as stops:
      os.kill(os.getpid(), signal.SIGHUP)
      time.sleep(0.1)
      assert stops.received == '' and signal.getsignal(signal.SIGTERM) is not here
    assert signal.getsignal(signal.SIGTERM) is here
  finally:
    signal.signal(signal.SIGHUP, before)


def _equal(run, straight):
  found, wanted = runs.params(run), runs.params(straight)
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.slow
def test_a_run_that_is_stopped_saves_and_goes_on_to_the_same_bits(text, straight, tmp_path):
  """Between the steps that it would save at; in a validation and in a save; twice."""
  run, every = tmp_path / 'run', 'CheckpointConfig.every=100'
  process = runs.begin(text, run, every)
  until(process, '\nstep     3/')
  began = time.perf_counter()
  process.send_signal(signal.SIGTERM)
  said = process.communicate(timeout=300)[0]
  print(f'SIGTERM to the last byte: {time.perf_counter() - began:.1f} s')
  assert process.returncode == leaving.EXIT_AGAIN, said
  step = checkpoints.latest_step(str(run))
  assert 3 < step < runs.STEPS and f'stopped by SIGTERM at step {step}, which' in said
  for point in (killer.VALIDATION, 'before step 10 is committed'):
    flags = ('--import=killer',)
    process = runs.begin(text, run, flags=flags, KILLED=point, SIGNAL='SIGTERM')
    said = process.communicate(timeout=300)[0]
    step = checkpoints.latest_step(str(run))
    assert process.returncode == leaving.EXIT_AGAIN, said
    assert f'at step {step}, which is saved' in said
  said = runs.finish(runs.begin(text, run))
  assert f'resumed {run} at step {step}' in said
  _equal(run, straight)
  kinds = [json.loads(s)['kind'] for s in (run / 'metrics.jsonl').read_text().splitlines()]
  assert kinds.count('train') == runs.STEPS  # none was lost, none was done twice
  before = snapshot(run)
  process = runs.begin(text, run, 'TRAIN_STEPS=50')
  process.stdout.readline()
  process.send_signal(signal.SIGTERM)  # still reads its configuration
  said = process.communicate(timeout=300)[0]
  assert process.returncode in (leaving.EXIT_AGAIN, -signal.SIGTERM), said
  assert snapshot(run) == before


@pytest.mark.slow
@pytest.mark.parametrize('told', [[0], [1], [0, 1]])
def test_two_processes_stop_at_one_step_whoever_is_told(text, tmp_path, told):
  run = tmp_path / 'run'
  bindings = ('MeshConfig.fsdp=2', 'CheckpointConfig.every=1000', 'TRAIN_STEPS=500')
  both = [runs.begin(text, run, *bindings, flags=flags) for flags in _flags()]
  until(both[0], '\nstep     3/')
  began = time.perf_counter()
  for index in told:
    both[index].send_signal(signal.SIGTERM)
  outputs = [process.communicate(timeout=100)[0] for process in both]
  seconds = time.perf_counter() - began
  assert [process.returncode for process in both] == [leaving.EXIT_AGAIN] * 2, outputs
  step = checkpoints.latest_step(str(run))
  assert all(f'at step {step}, which is saved' in output for output in outputs), outputs
  assert 3 < step < 500 and seconds < 30
  print(f'SIGTERM to the last byte of two processes: {seconds:.1f} s')
