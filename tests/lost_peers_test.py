"""One of two processes that fails, is killed, differs or does not come, ends both."""

import signal
import threading
import time

import jax
import pytest
import runs
from commands import command, until
from two_processes_test import _flags

from glm_jax import leaving, peers

ENDLESS = ('MeshConfig.fsdp=2', 'CheckpointConfig.every=4', 'TRAIN_STEPS=100000')


class _Client:
  """A coordinator's store of two processes, or one that is gone."""

  def __init__(self):
    self.told, self.gone = {}, False

  def key_value_set(self, key, value, allow_overwrite=False):
    self.told[key] = value

  def key_value_dir_get(self, folder):
    if self.gone:
      raise jax.errors.JaxRuntimeError('UNAVAILABLE: Socket closed')
    return [*self.told.items()]


@pytest.fixture
def two(monkeypatch):
  """Both processes of a run, in this one: [(Peers, what `leaving.now` was given)]."""
  client, made = _Client(), []
  for index in range(2):
    state = peers.jax_distributed.State()
    state.client, state.process_id, state.num_processes = client, index, 2
    monkeypatch.setattr(peers.jax_distributed, 'global_state', state)
    made.append(peers.Peers())
  monkeypatch.setattr(peers, '_POLL_SECONDS', 0.02)
  monkeypatch.setattr(peers, '_TOLD_SECONDS', 0.5)
  return client, made


def _explain(error):
  return (str(error), 65) if isinstance(error, KeyError) else None


def test_the_cause_in_one_is_said_by_the_other_with_its_code(two, monkeypatch):
  _, (zero, one) = two
  left = []
  monkeypatch.setattr(leaving, 'now', lambda *why: (left.append(why), zero.ended.set()))
  message, code = one.cause(KeyError('x'), _explain)
  assert code == 65 and message == "error: 'x'"
  watch = threading.Thread(target=zero.watch)
  watch.start()
  one.tell(message, code)
  watch.join()
  assert left == [("error: process 1 has ended the run: 'x'", 65)]


@pytest.mark.parametrize('words', [*peers._COLLECTIVES, *peers._LOST])
def test_what_a_collective_says_of_a_lost_process_is_no_defect(two, words, capsys):
  _, (zero, one) = two
  of_jax = words not in peers._COLLECTIVES
  error = (jax.errors.JaxRuntimeError if of_jax else ValueError)(
    f'INTERNAL: {words} and so on\nmore'
  )
  message, code = zero.cause(error, _explain)
  assert code == leaving.EXIT_AGAIN and 'another process was lost (INTERNAL: ' in message
  # Also behind an error that says something else of it.
  try:
    try:
      raise error
    except type(error) as cause:
      raise KeyError('a damaged file') from cause
  except KeyError as wrapped:
    assert zero.cause(wrapped, _explain) == (message, code)
  # And if it has told why it left, that is the cause.
  one.tell('error: no corpus', 65)
  told = zero.cause(error, _explain)
  assert told == ('error: process 1 has ended the run: no corpus', 65)
  assert capsys.readouterr().err == ''


def test_a_defect_keeps_its_traceback_and_is_told(two, capsys):
  _, (zero, _) = two
  for error in (
    ValueError('UNAVAILABLE'),
    jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED'),
  ):
    message, code = zero.cause(error, _explain)
    assert code == 1 and message == f'error: {type(error).__name__}: {error}'
    assert f'{type(error).__name__}: {error}' in capsys.readouterr().err


def test_process_0_waits_until_it_was_heard_and_the_others_do_not(two):
  _, (zero, one) = two
  began = time.monotonic()
  one.tell('gone', 1)
  assert time.monotonic() - began < 0.4
  zero.tell('gone', 1)
  assert time.monotonic() - began < 1.8
  two[0].told.clear()
  began = time.monotonic()
  zero.tell('gone', 1)
  assert time.monotonic() - began > 0.4


def test_a_coordinator_that_is_gone_is_a_lost_process(two, monkeypatch):
  client, (_, one) = two
  left = []
  monkeypatch.setattr(leaving, 'now', lambda *why: (left.append(why), one.ended.set()))
  client.gone = True
  one.watch()
  [(message, code)] = left
  assert code == leaving.EXIT_AGAIN and 'another process was lost (UNAVAILABLE' in message


def test_of_several_causes_the_first_failure_is_said():
  told = {0: ('another process was lost (x)', 42), 2: ('error: b', 65), 1: ('a', 42)}
  assert peers._said(told) == ('error: process 2 has ended the run: b', 65)
  again = {1: ('process 2 has ended the run: stopped', 42)}
  assert peers._said(again) == ('process 2 has ended the run: stopped', 42)


def _begin(text, run, *bindings, each=((), ()), **more):
  """Two processes; `each` has bindings of their own."""
  return [
    runs.begin(text, run, *bindings, *own, flags=flags, **more)
    for flags, own in zip(_flags(), each, strict=True)
  ]


def _begin_altered(text, folder, process, code):
  """Two processes, of which one runs some code as it waits for step 3."""
  (folder / 'altered.py').write_text(
    'import os, time\nfrom glm_jax.configs import ResourceError\n'
    'from glm_jax.training import metrics\nwait = metrics.Results.wait\n'
    'def waits(results, leave):\n'
    f"  if os.environ['ALTERED'] == '{process}' and results._step == 3:\n"
    f'    {code}\n'
    '  return wait(results, leave)\n'
    'metrics.Results.wait = waits\n'
  )
  return [
    runs.begin(
      text,
      folder / 'run',
      *ENDLESS,
      flags=['--import=altered', *flags],
      imports=folder,
      ALTERED=str(index),
    )
    for index, flags in enumerate(_flags())
  ]


def _ended(both, seconds=100):
  """[(code, what was said)] and how long it took."""
  began = time.perf_counter()
  outputs = [process.communicate(timeout=seconds)[0] for process in both]
  codes = [process.returncode for process in both]
  return list(zip(codes, outputs, strict=True)), time.perf_counter() - began


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_other_in_a_sentence(text, tmp_path):
  both = _begin(text, tmp_path / 'run', *ENDLESS)
  until(both[0], '\nstep     3/')
  both[1].kill()
  [(code, said), (killed, _)], seconds = _ended(both)
  assert (code, killed) == (leaving.EXIT_AGAIN, -signal.SIGKILL), said
  assert 'another process was lost (' in said and 'Traceback' not in said
  assert seconds < 60
  print(f'death of a worker to the exit of the other: {seconds:.1f} s')


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_a_leader_that_is_not_in_a_collective(text, tmp_path):
  """Nothing breaks there: heartbeats that are missing are all that tells it."""
  waits = "print('in Python', flush=True)\n    while True: time.sleep(0.1)"
  both = _begin_altered(text, tmp_path, process=0, code=waits)
  until(both[0], 'in Python')
  both[1].kill()
  [(code, said), _], seconds = _ended(both)
  assert code in (leaving.EXIT_AGAIN, -signal.SIGABRT) and seconds < 60, said
  assert 'stopped sending heartbeats):\n1\n' in said, said
  print(f'death of a worker to the exit of a leader in Python: {seconds:.1f} s')


@pytest.mark.slow
def test_when_process_0_is_killed_the_other_is_not_left(text, tmp_path):
  both = _begin(text, tmp_path / 'run', *ENDLESS)
  until(both[0], '\nstep     3/')
  both[0].kill()
  [_, (code, said)], seconds = _ended(both)
  assert code in (leaving.EXIT_AGAIN, -signal.SIGABRT) and seconds < 60, said


@pytest.mark.slow
def test_a_failure_in_one_is_said_by_both_with_its_code(text, tmp_path):
  """Of a process that cannot write, whose part of a save the other would wait for."""
  fails = "raise ResourceError('no room on the second disk')"
  both = _begin_altered(text, tmp_path, process=1, code=fails)
  until(both[0], '\nstep     1/')
  ended, seconds = _ended(both)
  assert [code for code, _ in ended] == [74, 74], ended
  assert all(
    'error: ' in said and 'no room on the second disk' in said for _, said in ended
  )
  assert 'process 1 has ended the run' in ended[0][1] and seconds < 60
  assert all('Traceback' not in said for _, said in ended)


@pytest.mark.slow
def test_another_seed_is_refused_by_both_and_nothing_is_written(text, tmp_path):
  each = (['TrainConfig.seed=0'], ['TrainConfig.seed=1'])
  ended, seconds = _ended(_begin(text, tmp_path / 'run', *ENDLESS, each=each))
  for code, said in ended:
    assert code == 65 and 'TrainConfig.seed: 0 in process 0, 1 in process 1' in said
    assert 'Traceback' not in said
  assert seconds < 60 and not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_who_is_missing_is_named_and_a_port_in_use_is_a_sentence(text, tmp_path):
  import socket

  arguments = runs.arguments(text, tmp_path / 'run', *ENDLESS)
  done = command('train', *_flags()[0], '--join_seconds=2', *arguments)
  assert done.returncode == leaving.EXIT_AGAIN, done.stderr
  assert 'of 2 processes, 1 did not come to localhost:' in done.stderr
  with socket.create_server(('localhost', 0)) as taken:
    address = f'--coordinator_address=localhost:{taken.getsockname()[1]}'
    flags = [address, '--process_count=2', '--process_index=0']
    done = command('train', *flags, *arguments)
  assert done.returncode == 65 and 'port that is free, got' in done.stderr
  assert 'Traceback' not in done.stderr


@pytest.mark.slow
def test_processes_of_slurm_find_each_other(text, tmp_path):
  """As srun starts them on one node."""
  place = {'SLURM_JOB_ID': '4123', 'SLURM_STEP_NODELIST': 'localhost'}
  place |= {'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_NODES': '1'}
  bindings = ('MeshConfig.fsdp=2', 'TRAIN_STEPS=2')
  both = [
    runs.begin(
      text,
      tmp_path / 'run',
      *bindings,
      flags=['--multiprocess'],
      **place,
      SLURM_PROCID=str(index),
      SLURM_LOCALID=str(index),
    )
    for index in range(2)
  ]
  ended, _ = _ended(both, 300)
  assert [code for code, _ in ended] == [0, 0], ended
  assert 'done: 2 steps' in ended[0][1] and 'step' not in ended[1][1]
