"""What is kept of compilations: where, how much, and what happens if it cannot be."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from glm_jax import compiled, startup

_NAMES = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')


@pytest.fixture
def of_the_user(monkeypatch, tmp_path):
  """A user who has told JAX nothing; a folder for caches."""
  before = {name: getattr(jax.config, name) for name in _NAMES}
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  for name in _NAMES:
    monkeypatch.delenv(name.upper())
  jax.config.update('jax_compilation_cache_dir', None)
  compilation_cache.reset_cache()
  with warnings.catch_warnings():
    yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def _compute(factor):
  """A program that JAX has not compiled in this process, and its result."""
  x = jnp.arange(64.0).reshape(8, 8) / 7
  return np.asarray(jax.jit(lambda x: jnp.tanh(x @ x.T * factor).sum(0))(x))


def _entries(folder):
  return sorted(folder.rglob('jit__lambda*-cache'))


def test_a_program_is_kept_for_the_next_run_which_computes_the_same_bits(of_the_user):
  assert compiled.keep() == []
  before = _compute(0.5)
  (entry,) = _entries(of_the_user)
  assert entry.parent == compiled.folder()
  assert entry.parent.stat().st_mode & 0o077 == 0
  events = []
  jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
  try:
    jax.clear_caches()
    np.testing.assert_array_equal(_compute(0.5), before)
  finally:
    jax.monitoring.clear_event_listeners()
  assert '/jax/compilation_cache/cache_hits' in events
  assert '/jax/compilation_cache/cache_misses' not in events
  assert _entries(of_the_user) == [entry]


@pytest.mark.parametrize('size', [0, 100])
def test_a_damaged_entry_costs_a_compilation_and_a_line(of_the_user, size):
  compiled.keep()
  before = _compute(0.25)
  (entry,) = _entries(of_the_user)
  entry.write_bytes(entry.read_bytes()[:size])
  jax.clear_caches()
  with pytest.warns(UserWarning, match='Error reading persistent compilation cache'):
    np.testing.assert_array_equal(_compute(0.25), before)


def test_the_users_own_word_to_jax_holds(of_the_user):
  """A folder of theirs, or none: '' is what JAX takes from an empty variable."""
  for said in (str(of_the_user / 'mine'), ''):
    jax.config.update('jax_compilation_cache_dir', said)
    assert compiled.keep() == []
    assert jax.config.jax_compilation_cache_dir == said
  jax.config.update('jax_compilation_cache_dir', None)
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    assert compiled.keep() == [] and jax.config.jax_compilation_cache_dir is None
  finally:
    jax.config.update('jax_enable_compilation_cache', True)
  assert not [*of_the_user.iterdir()]


def test_an_empty_variable_of_jaxs_turns_it_off(tmp_path):
  """JAX reads the environment once, when it is imported."""
  code = 'import jax; from glm_jax import compiled; print(compiled.keep())'
  done = subprocess.run(
    [sys.executable, '-c', f'{code}; print(jax.config.jax_compilation_cache_dir)'],
    env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': '', 'XDG_CACHE_HOME': str(tmp_path)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.splitlines() == ['[]', ''] and not [*tmp_path.iterdir()]


def test_several_processes_are_left_to_the_user(of_the_user, monkeypatch):
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  assert compiled.keep() == [] and not [*of_the_user.iterdir()]
  assert jax.config.jax_compilation_cache_dir is None


def test_a_command_that_finds_its_devices_keeps_what_it_compiles(of_the_user, capsys):
  startup.find_devices()
  assert jax.config.jax_compilation_cache_dir == str(compiled.folder())
  assert capsys.readouterr().err == ''
  jax.config.update('jax_compilation_cache_dir', None)
  compiled.folder().rmdir()
  compiled.folder().touch()
  startup.find_devices()
  assert capsys.readouterr().err.startswith('warning: what XLA compiles is not kept: ')


def test_a_folder_that_cannot_be_written_is_a_line_and_no_more(of_the_user, monkeypatch):
  (of_the_user / 'glm_jax').write_text('a file in the way')
  (said,) = compiled.keep()
  assert said.startswith('what XLA compiles is not kept: ') and 'XDG_CACHE_HOME' in said
  assert jax.config.jax_compilation_cache_dir is None
  (of_the_user / 'glm_jax').unlink()
  monkeypatch.setattr(os, 'access', lambda path, mode: False)  # root may write anywhere
  (said,) = compiled.keep()
  assert f'no permission to write {compiled.folder()}' in said
  assert jax.config.jax_compilation_cache_dir is None


def test_another_processor_version_or_number_of_cores_has_a_folder_of_its_own(monkeypatch):
  """Code for other instructions dies of SIGILL, and machines share home folders."""
  text = 'processor: 0\nmodel name: A\ncpu MHz: {}\nflags: fpu {}\n'
  folders = set()

  def see(clock=1000, flags='sse', cores=2, version='0.10.2', machine='x86_64'):
    read = lambda path: text.format(clock, flags)
    monkeypatch.setattr(compiled.Path, 'read_text', read)
    monkeypatch.setattr(compiled.Path, 'exists', lambda path: True)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {*range(cores)})
    monkeypatch.setattr(compiled.metadata, 'version', lambda name: version)
    monkeypatch.setattr(os, 'uname', lambda: type('', (), {'machine': machine}))
    folders.add(compiled.folder())
    return len(folders)

  assert see() == 1 and see(clock=3000) == 1
  assert see(flags='sse avx512f') == 2 and see(cores=4) == 3
  assert see(version='0.10.3') == 4 and see(machine='aarch64') == 5


def test_what_was_not_used_for_longest_goes_first_whatever_its_version(tmp_path):
  sizes = {'old/a-cache': 100, 'new/b-cache': 100, 'old/c-cache': 100, 'new/d-cache': 100}
  for age, (name, size) in enumerate(sizes.items()):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b'x' * size)
    os.utime(path, (10**9 + age, 10**9))
  # Written first, and read last.
  os.utime(tmp_path / 'old' / 'a-cache', (10**9 + 9, 10**9 - 9))
  left = lambda: {str(p.relative_to(tmp_path)) for p in tmp_path.rglob('*-cache')}
  compiled.forget(tmp_path, 400)
  assert left() == {*sizes}
  compiled.forget(tmp_path, 399)
  assert left() == {*sizes} - {'new/b-cache'}
  compiled.forget(tmp_path, 100)
  assert left() == {'old/a-cache'}
  compiled.forget(tmp_path / 'nothing', 0)
