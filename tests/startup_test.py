"""What a process says while it starts."""

import ctypes
import subprocess
import sys
import threading
import time
import types

import pytest
from commands import environment

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


@pytest.mark.parametrize(
  'asked,devices,kept',
  [('cpu', True, True), ('', False, True), ('', True, False), ('cuda', False, False)],
)
def test_memory_is_kept_where_a_cpu_computes(monkeypatch, tmp_path, asked, devices, kept):
  calls = []
  libc = types.SimpleNamespace(mallopt=lambda *option: calls.append(option))
  monkeypatch.setattr(startup.ctypes, 'CDLL', lambda name: libc)
  found = (tmp_path / 'no', *[tmp_path] * devices)
  monkeypatch.setattr(startup, '_ACCELERATORS', found)
  monkeypatch.setenv('JAX_PLATFORMS', asked)
  startup.keep_memory()
  assert bool(calls) == kept


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='needs glibc')
def test_a_step_asks_the_system_for_no_page():
  """Once it has run: its arrays lie where those of the last one lay."""
  script = """
import resource
from glm_jax import startup
startup.keep_memory()
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.abs(x) + 1)
x = jnp.ones(12_000_000)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
  jax.block_until_ready(step(x))
before = faults()
for _ in range(20):
  jax.block_until_ready(step(x))
print(faults() - before)
"""
  done = subprocess.run(
    [sys.executable, '-c', script],
    env=environment(),
    capture_output=True,
    text=True,
    check=True,
    timeout=120,
  )
  # Those of one array are 12,000, and as it is, each step asks for them.
  assert int(done.stdout) < 12_000
