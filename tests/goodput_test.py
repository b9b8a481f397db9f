"""Where the time of a run went: one cause at each moment, and all of them together."""

import json

import pytest
import runs
from commands import in_process

from glm_jax import configs, storage
from glm_jax.training import goodput
from glm_jax.training.goodput import Clock


class _Time:
  """A clock that goes on when it is told to."""

  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now

  def wait(self, seconds):
    self.now += seconds


@pytest.fixture
def time():
  return _Time()


def _seconds(clock, step, time, began):
  return {k: v * (time.now - began) for k, v in clock.shares(step).items()}


def test_each_moment_has_one_cause(time):
  clock = Clock(None, began=time.now - 5, now=time)  # imports took 5 seconds
  time.wait(3)
  clock.to('compile')
  time.wait(20)
  clock.to('steps')
  time.wait(60)
  clock.waited(6)
  with clock.doing('save'):
    time.wait(1)
    with clock.doing('evaluate'):
      time.wait(10)
    time.wait(1)
  time.wait(4)
  found = _seconds(clock, 10, time, 995)
  assert found == pytest.approx(
    {'start': 8, 'compile': 20, 'steps': 58, 'data': 6, 'save': 2, 'evaluate': 10}
  )
  assert sum(clock.shares(10).values()) == pytest.approx(1)


def test_killed_and_started_again(tmp_path, time):
  """Repeated steps are lost, and the time between is nobody's; nothing counts twice."""
  folder = storage.Folder(str(tmp_path))
  first = Clock(folder, began=time.now, now=time)
  first.to('steps')
  time.wait(100)
  first.write(50)
  time.wait(7)  # never written: the process is killed
  time.wait(3)
  second = Clock(folder, began=time.now, now=time)
  second.begins(40)
  assert second.restarts == 1
  time.wait(5)
  second.to('steps')
  time.wait(40)
  found = _seconds(second, 60, time, 1000)
  assert found == pytest.approx({'steps': 80 + 40, 'lost': 20, 'down': 10, 'start': 5})
  second.write(60)
  # Once more, from further back than the attempt before had begun.
  third = Clock(folder, began=time.now, now=time)
  third.begins(30)
  third.to('steps')
  time.wait(60)
  found = _seconds(third, 60, time, 1000)
  assert found == pytest.approx(
    {'steps': 60 + 60, 'lost': 20 + 20 + 40, 'down': 10, 'start': 5}
  )
  assert len(json.loads((tmp_path / goodput.FILE).read_text())) == 2


def test_steps_of_an_attempt_that_completed_none_are_lost(tmp_path, time):
  folder = storage.Folder(str(tmp_path))
  clock = Clock(folder, began=time.now, now=time)
  clock.begins(7)
  clock.to('steps')
  time.wait(3)
  assert clock.write(7) == {'lost': 1.0}


@pytest.mark.parametrize(
  'content', ['', '{', '[1]', '{"a": 1}', '[{"began": 1}]', '[' * 100_000]
)
def test_another_file_in_its_place_is_one_sentence(content, tmp_path):
  (tmp_path / goodput.FILE).write_text(content)
  with pytest.raises(configs.UserError, match='must be the record of a run'):
    Clock(storage.Folder(str(tmp_path)), began=0)
  assert (tmp_path / goodput.FILE).read_text() == content


@pytest.mark.slow
def test_an_attempt_that_ends_before_its_first_step_is_one(text, tmp_path, monkeypatch):
  """Its time is the run's, and the next one is a restart."""

  def ends(*_):
    raise configs.ResourceError('no room')

  arguments = runs.arguments(text, tmp_path / 'run', 'TRAIN_STEPS=2')
  with monkeypatch.context() as patch:
    patch.setattr('glm_jax.train.Meter', ends)
    assert in_process('train', *arguments).returncode == 74
  done = in_process('train', *arguments)
  assert done.returncode == 0 and ', 1 restart\n' in done.stdout, done.stderr
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['restarts'] == 1 and sum(summary['goodput'].values()) == pytest.approx(1)
