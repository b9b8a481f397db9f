"""Attempts at a run: what is started again, what is not, and what is passed on."""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest
import runs
from commands import ROOT, start, until

from glm_jax import checkpoints, supervise
from glm_jax.configs import UserError

# A stand-in for train: what it does in each attempt stands in a file, a line for each; of
# several processes, that of their number behind a '|'.
_TRAIN = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[-1])
index = next((int(a[16:]) for a in sys.argv if a.startswith('--process_index=')), 0)
port = next((a for a in sys.argv if a.startswith('--coordinator')), '')
attempt = len(list(folder.glob(f'{index}-*')))
told = []
signal.signal(signal.SIGTERM, lambda *_: (told.append(15), sys.exit(42)))
(folder / f'{index}-{attempt}').write_text(json.dumps(
  [port, os.environ['GLM_JAX_ATTEMPT'], os.getpid()]))
script = (folder / 'script').read_text().splitlines()
actions = script[min(attempt, len(script) - 1)].split('|')[index].split()
for action in actions:
  kind, _, value = action.partition('=')
  if kind == 'step':
    pathlib.Path(os.environ['GLM_JAX_PROGRESS']).write_text(value + chr(10))
  elif kind == 'say':
    print(value, flush=True)
    print('error', value, file=sys.stderr, flush=True)
  elif kind == 'sleep':
    time.sleep(float(value))
  elif kind == 'kill':
    os.kill(os.getpid(), int(value))
  elif kind == 'exit':
    os._exit(int(value))
"""


@pytest.fixture
def attempts(tmp_path, monkeypatch):
  """attempts(lines, flags): the exit code, and how many attempts there were."""
  (tmp_path / 'train.py').write_text(_TRAIN)
  monkeypatch.setattr(supervise, '_TRAIN', (sys.executable, str(tmp_path / 'train.py')))
  monkeypatch.setattr(supervise, '_LONGEST_PAUSE', 0.05)
  monkeypatch.setattr(supervise, '_OTHERS_SECONDS', 1.0)

  def run(*lines, flags=()):
    folder = tmp_path / f'{len(list(tmp_path.iterdir()))}'
    folder.mkdir()
    (folder / 'script').write_text('\n'.join(lines))
    with pytest.raises(SystemExit) as ended:
      supervise.main([*flags, '--', 'train', str(folder)])
    return ended.value.code, len(list(folder.glob('0-*'))), folder

  return run


@pytest.mark.parametrize('code', [0, 64, 65, 70, 74, 78])
def test_what_is_final_is_not_started_again(attempts, code):
  assert attempts(f'step=3 exit={code}', 'exit=0')[:2] == (code, 1)


@pytest.mark.parametrize(
  'end',
  ['exit=42', 'kill=9', 'kill=6', 'exit=137', 'exit=1', 'kill=11', 'exit=63', 'kill=1'],
)
def test_what_is_not_is_started_again_until_it_is_done(attempts, end):
  lines = [f'step={step} {end}' for step in (3, 4, 5)]
  assert attempts(*lines, 'step=9 exit=0')[:2] == (0, 4)


def test_the_same_step_fails_once_and_another_one_may_fail(attempts, capfd):
  assert attempts('step=3 exit=1', 'step=3 exit=1', 'exit=0')[:2] == (1, 2)
  assert 'ended with 1 at step 3, as it did before: not started' in capfd.readouterr().err
  # What is killed or stopped between has not failed.
  lines = ('step=3 exit=1', 'step=2 exit=42', 'step=2 kill=9', 'step=3 kill=11', 'exit=0')
  assert attempts(*lines)[:2] == (139, 4)
  assert attempts('step=3 kill=9', 'step=3 kill=9', 'exit=42', 'exit=42', 'exit=0')[1] == 5
  assert attempts('exit=3', 'exit=3', 'exit=0')[:2] == (3, 2)
  assert 'before its first step, as it did before' in capfd.readouterr().err


@pytest.mark.parametrize(
  'kind,end,code', [('preemptions', 'exit=42', 42), ('kills', 'kill=9', 137)]
)
def test_each_kind_has_a_number_of_its_own(attempts, kind, end, code, capfd):
  lines = ['step=1 exit=1', 'step=2 exit=42', 'step=3 kill=9']
  more = [f'step={step} {end}' for step in range(4, 9)]
  flags = ['--preemptions=9', '--kills=9', '--failures=9', f'--{kind}=3']
  assert attempts(*lines, *more, 'exit=0', flags=flags)[:2] == (code, 6)
  assert f'allowed (--{kind})' in capfd.readouterr().err
  assert attempts(*lines, 'exit=1', flags=['--failures=1'])[:2] == (1, 4)


def test_a_hang_is_ended_and_started_again_and_not_twice_at_one_step(attempts, capfd):
  flags = ['--hang_seconds=3']
  began = time.perf_counter()
  hangs = 'step=0 sleep=1 step=1 sleep=1 step=2 sleep=1 step=3 sleep=60'
  code, count, _ = attempts(hangs, 'step=4 exit=0', flags=flags)
  assert (code, count) == (0, 2) and time.perf_counter() - began < 30
  assert 'hung at step 3: started again' in capfd.readouterr().err
  assert attempts('step=3 sleep=60', 'step=3 sleep=60', flags=flags)[:2] == (137, 2)


def test_when_one_of_several_ends_the_others_are_ended(attempts, capfd):
  """Their own words come with their number; the port is another one each time."""
  began = time.perf_counter()
  lines = ('step=1 say=a sleep=60|step=1 say=b kill=9', 'say=c exit=0|sleep=0.3 exit=0')
  code, count, folder = attempts(*lines, flags=['--processes=2'])
  assert (code, count) == (0, 2) and time.perf_counter() - began < 20
  out, err = capfd.readouterr()
  assert sorted(out.splitlines()) == ['[0] a', '[0] c', '[1] b']
  assert '[1] error b' in err.splitlines() and 'ended with 137 at step 1' in err
  told = [[json.loads((folder / f'{i}-{n}').read_text()) for n in (0, 1)] for i in (0, 1)]
  ports = [{told[i][n][0] for i in (0, 1)} for n in (0, 1)]
  assert len(ports[0]) == len(ports[1]) == 1 and ports[0] != ports[1]
  assert len({told[i][n][1] for i in (0, 1) for n in (0, 1)}) == 1  # one start of many
  for number in (told[0][0][2], told[1][0][2]):
    with pytest.raises(ProcessLookupError):
      os.kill(number, 0)


def test_what_was_wrong_counts_and_not_what_came_of_it(attempts):
  for line, wanted in (
    ('exit=42|exit=65', 65),
    ('sleep=0.3 exit=1|exit=42', 1),
    ('kill=6|kill=9', 134),
    ('exit=74|exit=0', 74),
  ):
    flags = ['--processes=2', '--kills=0', '--failures=0', '--preemptions=0']
    assert attempts(line, flags=flags)[:2] == (wanted, 1), line


def test_a_signal_is_passed_on_and_nothing_is_started_again(attempts):
  def tell():
    time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)

  handler = signal.getsignal(signal.SIGTERM)
  threading.Thread(target=tell).start()
  code, count, _ = attempts('step=1 sleep=60', 'exit=0')
  assert (code, count) == (42, 1) and signal.getsignal(signal.SIGTERM) is handler


def test_slips_are_refused():
  for arguments, words in (
    ([], 'a command of train behind --'),
    (['--', 'plan'], 'must be given a command of train behind --, got plan'),
    (['--processes=0', '--', 'train'], '--processes must be 1 or more'),
    (['--hang_seconds=0', '--', 'train'], '--hang_seconds must be positive'),
    (['--kills=-1', '--', 'train'], '--kills must be 0 or more'),
    (['--processes=2', '--', 'train', '--process_index=1'], 'their numbers itself, got'),
    (['--proceses=2', '--', 'train'], 'did you mean --processes?'),
  ):
    with pytest.raises(UserError, match=re.escape(words)):
      supervise.main(arguments)


def _children(number):
  path = f'/proc/{number}/task/{number}/children'
  return [int(child) for child in open(path).read().split()]


def _equal(run, straight):
  found, wanted = runs.params(run), runs.params(straight)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.slow
def test_killed_and_supervised_a_run_ends_with_the_same_bits(text, straight, tmp_path):
  """Once in the middle, and once as it starts again; in one process, as `straight` is."""
  run = tmp_path / 'run'
  process = start(
    'supervise', '--', 'train', *runs.arguments(text, run), PYTHONPATH=str(ROOT)
  )
  killed = []
  while process.poll() is None and len(killed) < 2:
    time.sleep(0.05)
    step = checkpoints.latest_step(str(run))
    children = [child for child in _children(process.pid) if child not in killed]
    if step and children:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(children[0], signal.SIGKILL)
      killed.append(children[0])
  said = process.communicate(timeout=300)[0]
  assert process.returncode == 0 and len(killed) == 2, said
  assert said.count('ended with 137') == 2 and 'taken over' in said, said
  _equal(run, straight)


@pytest.mark.slow
def test_two_processes_one_killed_end_as_two_that_were_not(text, tmp_path):
  bindings = ('MeshConfig.fsdp=2',)
  ended = {}
  for name in ('straight', 'killed'):
    arguments = runs.arguments(text, tmp_path / name, *bindings)
    process = start('supervise', '--processes=2', '--', 'train', *arguments)
    while name == 'killed' and process.poll() is None:
      time.sleep(0.05)
      if checkpoints.latest_step(str(tmp_path / name)):
        os.kill(_children(process.pid)[1], signal.SIGKILL)
        break
    ended[name] = process.communicate(timeout=400)[0]
    assert process.returncode == 0, ended[name]
  assert 'ended with 137' in ended['killed'] and '[1] ' in ended['killed']
  assert 'ended with' not in ended['straight']
  _equal(tmp_path / 'killed', tmp_path / 'straight')


@pytest.mark.slow
def test_a_supervised_run_that_is_stopped_leaves_with_42(text, tmp_path):
  arguments = runs.arguments(text, tmp_path / 'run', 'TRAIN_STEPS=100000')
  process = start('supervise', '--', 'train', *arguments, PYTHONUNBUFFERED='1')
  until(process, '\nstep     3/')
  process.send_signal(signal.SIGTERM)
  said = process.communicate(timeout=100)[0]
  step = checkpoints.latest_step(str(tmp_path / 'run'))
  assert process.returncode == 42 and f'at step {step}, which is saved' in said, said
