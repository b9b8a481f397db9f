"""What a process says while it starts."""

import threading
import time

import pytest

from glm_jax import distributed, startup
from glm_jax.configs import UserError


def _threads():
  return {thread for thread in threading.enumerate() if thread.is_alive()}


def test_a_slow_start_is_told_phase_by_phase_and_nothing_runs_on(capsys):
  before = _threads()
  with startup.Telling('first', seconds=0.05) as telling:
    time.sleep(0.13)
    telling('second')
    time.sleep(0.1)
    telling.stop()
    told = capsys.readouterr().out.splitlines()
    time.sleep(0.1)
  assert [line.partition(': ')[2] for line in told] == ['first'] * 2 + ['second'] * 2
  assert capsys.readouterr().out == '' and _threads() == before


def test_a_quick_start_and_a_follower_are_silent(capsys):
  with startup.Telling('first'):
    pass
  with startup.Telling('first', quiet=True, seconds=0.01):
    time.sleep(0.05)
  assert capsys.readouterr().out == ''


def test_an_error_ends_the_telling():
  before = _threads()
  try:
    with startup.Telling('first', seconds=0.01):
      raise ValueError
  except ValueError:
    assert _threads() == before


def test_processes_that_jax_does_not_detect_are_asked_for():
  with pytest.raises(UserError, match=r'got none \(no cluster\); give --co'):
    distributed.initialize(distributed.Processes(multiprocess=True), {})
