"""One run at a time in a MODEL_DIR, whoever died, wherever it ran."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from unittest import mock

import gcs
import pytest
import runs
from commands import in_process, refused, snapshot

from glm_jax import checkpoints, leaving, ownership, storage
from glm_jax.configs import ResourceError, UserError


@pytest.fixture
def quick(monkeypatch):
  """Heartbeats of a fifth of a second."""
  monkeypatch.setattr(ownership, 'HEARTBEAT_SECONDS', 0.2)


@pytest.fixture
def living():
  """A process that is there, and is none of ours."""
  process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
  yield process.pid
  process.kill()
  process.wait()


def _dead():
  process = subprocess.Popen([sys.executable, '-c', ''])
  began = ownership._process(process.pid)
  process.wait()
  return began


def _write(folder, record, **changed):
  path = folder / ownership.FILE
  path.write_text(json.dumps({**record, 'id': 'other', 'beat': 0, **changed}))
  return path


def _elsewhere(record):
  return {**record, 'host': 'far', 'place': ['far', 'b', 'c']}


def _taken(folder):
  """(whether it could be taken, what was said)."""
  said = []
  with ownership.Owner(str(folder), said.append) as owner:
    owner.take()
    assert json.loads((folder / ownership.FILE).read_text())['pid'] == os.getpid()
  assert not (folder / ownership.FILE).exists()
  return '\n'.join(said)


def test_a_file_is_replaced_by_who_has_read_it_and_by_nobody_else(tmp_path):
  folder = storage.Folder(str(tmp_path / 'new'))
  content, none = folder.read_version('a')
  assert content is None and not (tmp_path / 'new').exists()
  first = folder.replace('a', b'1', none)
  assert folder.replace('a', b'2', none) is None and folder.read('a') == b'1'
  second = folder.replace('a', b'2', first)
  assert folder.replace('a', b'3', first) is None
  assert folder.replace('a', None, first) is None and folder.read('a') == b'2'
  assert folder.replace('a', None, second) and folder.names() == []


def test_a_new_folder_is_taken_and_left_without_a_word(tmp_path):
  assert _taken(tmp_path) == ''
  _write(tmp_path, _dead())
  os.remove(tmp_path / ownership.FILE)
  assert _taken(tmp_path) == ''


def test_an_owner_that_is_dead_is_followed_at_once_and_named(tmp_path, living):
  """No such process; a zombie; another process under its number."""
  dead = _dead()
  zombie = subprocess.Popen([sys.executable, '-c', ''])
  record = ownership._process(zombie.pid)
  os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
  for owner in (dead, record, {**ownership._process(living), 'began': '1'}):
    _write(tmp_path, owner)
    began = time.perf_counter()
    said = _taken(tmp_path)
    assert f'taken over from process {owner["pid"]} on' in said
    assert 'has ended without a word' in said and time.perf_counter() - began < 2
  zombie.wait()


def test_an_owner_that_lives_refuses_and_keeps_its_file(tmp_path, living):
  path = _write(tmp_path, ownership._process(living))
  before, began = path.read_bytes(), time.perf_counter()
  with ownership.Owner(str(tmp_path)) as owner:
    for call in (owner.look, owner.take):
      with pytest.raises(UserError, match=f'process {living} on .* is training; stop that'):
        call()
  assert time.perf_counter() - began < 2 and path.read_bytes() == before


def test_the_next_attempt_of_one_start_follows_even_a_living_one(
  tmp_path, living, monkeypatch
):
  record = {**ownership._process(living), 'attempt': 'a7'}
  _write(tmp_path, record)
  monkeypatch.setenv(ownership.ATTEMPT, 'a8')
  with ownership.Owner(str(tmp_path)) as owner, pytest.raises(UserError):
    owner.look()
  monkeypatch.setenv(ownership.ATTEMPT, 'a7')
  assert 'an attempt of the same start' in _taken(tmp_path)


def test_an_owner_elsewhere_is_known_by_its_heartbeats(tmp_path, living, quick):
  """By changes, not by clocks; a number of there says nothing here."""
  record = _elsewhere(ownership._process(living))
  _write(tmp_path, record)
  ended = threading.Event()

  def beat():
    number = 0
    while not ended.wait(0.2):
      _write(tmp_path, record, beat=(number := number + 1))

  thread = threading.Thread(target=beat)
  thread.start()
  said = []
  with ownership.Owner(str(tmp_path), said.append) as owner:
    with pytest.raises(UserError, match='on far is training'):
      owner.look()
  ended.set()
  thread.join()
  assert 'waiting for a sign of life' in said[0]
  began = time.perf_counter()
  assert 'not heard of for 0.6 s' in _taken(tmp_path)
  assert time.perf_counter() - began > 0.6


@pytest.mark.parametrize('content', [b'', b'[]', b'{"pid": "x"', b'[' * 10**5])
def test_a_damaged_file_is_followed_once_it_is_silent(tmp_path, quick, content):
  (tmp_path / ownership.FILE).write_bytes(content)
  assert 'from process ? on an unknown host: not heard of' in _taken(tmp_path)


def test_of_many_that_see_a_dead_owner_one_is_first(tmp_path, quick):
  _write(tmp_path, _dead())
  together, found = threading.Barrier(8), []
  ended = threading.Event()

  def run():
    with ownership.Owner(str(tmp_path), lambda _: None) as owner:
      owner.look()
      together.wait()
      try:
        owner.take()
      except UserError:
        found.append('refused')
      else:
        found.append('taken')
        ended.wait()

  threads = [threading.Thread(target=run) for _ in range(8)]
  for thread in threads:
    thread.start()
  while len(found) < 8:
    time.sleep(0.01)
  ended.set()
  for thread in threads:
    thread.join()
  assert sorted(found) == ['refused'] * 7 + ['taken']


def test_an_owner_beats_and_leaves_when_its_folder_is_taken(tmp_path, quick, monkeypatch):
  """A store that fails for a moment, or an answer that is lost, is no other owner."""
  left, path = [], tmp_path / ownership.FILE
  monkeypatch.setattr(leaving, 'now', lambda *why: left.append(why))
  replace, failing = storage.Folder.replace, [ResourceError('no network')] * 3

  def flaky(folder, name, content, version):
    if content and failing:
      raise failing.pop()
    written = replace(folder, name, content, version)
    lost = content and not failing and flaky.lose
    flaky.lose = flaky.lose and not lost
    return None if lost else written

  flaky.lose = False
  with ownership.Owner(str(tmp_path)) as owner:
    failing.clear()
    owner.take()
    failing += [ResourceError('no network')] * 3
    flaky.lose = True
    with mock.patch.object(storage.Folder, 'replace', flaky):
      until = time.monotonic() + 20
      while json.loads(path.read_text())['beat'] < 6 and time.monotonic() < until:
        time.sleep(0.05)
    assert json.loads(path.read_text())['beat'] >= 6 and not flaky.lose and not left
    record = {**_dead(), 'host': 'far'}
    _write(tmp_path, record)
    while not left and time.monotonic() < until:
      time.sleep(0.05)
  [(message, code)] = left
  assert code == 65 and f'taken over by process {record["pid"]} on far' in message
  assert json.loads(path.read_text())['host'] == 'far'  # it is not ours to remove


def test_who_leaves_at_once_leaves_the_folder_to_nobody(tmp_path):
  code = (
    'import sys; from glm_jax import leaving, ownership\n'
    'with ownership.Owner(sys.argv[1]) as owner:\n'
    "  owner.take(); leaving.now('gone', 42)"
  )
  done = subprocess.run(
    [sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True
  )
  assert done.returncode == 42 and done.stderr == 'gone\n'
  assert list(tmp_path.iterdir()) == []


def test_a_bucket_has_one_owner_too(tmp_path, quick):
  with gcs.serve(tmp_path) as (objects, environment, _):
    code = (
      'from glm_jax import ownership\n'
      'ownership.HEARTBEAT_SECONDS = 0.2\n'
      "with ownership.Owner('gs://bucket/run') as one:\n"
      '  one.take()\n'
      "  with ownership.Owner('gs://bucket/run') as two:\n"
      '    try:\n'
      '      two.take()\n'
      '    except ValueError as error:\n'
      '      print(error)\n'
    )
    done = subprocess.run(
      [sys.executable, '-c', code],
      env={**os.environ, **environment},
      capture_output=True,
      text=True,
      timeout=100,
    )
  assert 'must belong to one run at a time' in done.stdout, done.stderr
  assert not objects


@pytest.mark.slow
def test_a_second_run_is_refused_and_changes_nothing(text, straight, tmp_path, living):
  run = tmp_path / 'run'
  done = in_process('train', *runs.arguments(text, run, 'TRAIN_STEPS=2'))
  assert done.returncode == 0 and not (run / ownership.FILE).exists(), done.stderr
  _write(run, ownership._process(living))
  before, began = snapshot(run), time.perf_counter()
  longer = runs.arguments(text, run, 'TRAIN_STEPS=4')
  refused(in_process('train', *longer), 'one run at a time', f'process {living} on')
  assert time.perf_counter() - began < 10 and snapshot(run) == before
  _write(run, _dead())
  done = in_process('train', *longer)
  assert done.returncode == 0 and 'is taken over from process' in done.stdout, done.stderr
  assert checkpoints.latest_step(str(run)) == 4
  assert not (run / ownership.FILE).exists()
  # Not even its name on a folder of one's own.
  lonely = tmp_path / 'lonely'
  lonely.mkdir()
  _write(lonely, _dead())
  done = in_process('train', *runs.arguments(text, lonely, 'TRAIN_STEPS=2'))
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_another_run_has_trained_meanwhile_is_not_written_over(
  text, tmp_path, monkeypatch
):
  """Its owner was gone when this one could take the folder, and its steps are there."""
  run = tmp_path / 'run'
  done = in_process('train', *runs.arguments(text, run, 'TRAIN_STEPS=2'))
  assert done.returncode == 0, done.stderr
  before = snapshot(run)
  other = tmp_path / 'other'
  shutil.copytree(run, other)
  done = in_process('train', *runs.arguments(text, other, 'TRAIN_STEPS=4'))
  assert done.returncode == 0, done.stderr
  take = ownership.Owner.take

  def late(owner):
    shutil.copytree(other / 'checkpoints' / '4', run / 'checkpoints' / '4')
    take(owner)

  monkeypatch.setattr(ownership.Owner, 'take', late)
  done = in_process('train', *runs.arguments(text, run, 'TRAIN_STEPS=6'))
  assert done.returncode == leaving.EXIT_AGAIN and 'from step 2 to 4' in done.stderr
  shutil.rmtree(run / 'checkpoints' / '4')
  assert snapshot(run) == before
