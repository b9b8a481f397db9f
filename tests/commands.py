"""Commands as users start them, and what one that refused its input must have done."""

import contextlib
import hashlib
import importlib
import io
import logging
import os
import pathlib
import subprocess
import sys
import threading
import warnings
from unittest import mock

import jax

from glm_jax import cli

ROOT = pathlib.Path(__file__).parent.parent
# A model for which a command needs seconds.
TINY = [
  "VocabularyConfig.path='bytes'",
  'GLMConfig.num_layers=1',
  'GLMConfig.hidden_size=32',
  'GLMConfig.num_heads=2',
  'GLMConfig.vocab_size=384',
  'GLMConfig.max_positions=64',
  "TASK_FEATURE_LENGTHS={'tokens':64}",
  'TRAIN_STEPS=2',
  'BATCH_SIZE=4',
  'EvaluationConfig.examples=8',
  'EvaluationConfig.fill=0',
  'OptimizerConfig.warmup_steps=1',
]

# Where a CUDA plugin of JAX is installed and no driver is, as with the compilers of
# launch/test.sh --all, importing jax says so before anyone could set up its logging.
_OF_JAX = ('All log messages before absl::InitializeLog()', 'Could not find cuda drivers')


def refused(done, *words, code=65):
  """One line on stderr that says all of `words`; the exit code; no traceback."""
  assert done.returncode == code, (done.stdout, done.stderr)
  assert 'Traceback' not in done.stdout + done.stderr
  lines = [
    line
    for line in done.stderr.strip().splitlines()
    if not any(noise in line for noise in _OF_JAX)
  ]
  assert len(lines) == 1 and lines[0].startswith('error: '), done.stderr
  for word in words:
    assert word in lines[0], (word, lines[0])


def environment(**more):
  """The environment of a user, but for the cache of what XLA compiled (conftest.py).

  On the CPU: a plugin of JAX may be installed as a compiler, where no accelerator is.
  """
  kept = {k: v for k, v in os.environ.items() if k not in ('NPROC', 'XLA_FLAGS')}
  return {**kept, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), **more}


def command(module, *arguments, cwd=ROOT, timeout=600, **more):
  """A command of the package that ended; `more` stands in its environment."""
  return subprocess.run(
    [sys.executable, '-m', f'glm_jax.{module}', *map(str, arguments)],
    cwd=cwd,
    env=environment(**more),
    capture_output=True,
    text=True,
    timeout=timeout,
  )


def in_process(module, *arguments, cwd=ROOT, **more):
  """The same, without the seconds that a process needs to import what is here already.

  What a command changes in its process is changed back, whether it ended well or not. It
  sees one device, or `--cpu_devices` of those that there are. C++ libraries, which write to
  file descriptor 2 itself, are heard by `command` alone.
  """
  import seqio  # which takes seconds, too

  run = importlib.import_module(f'glm_jax.{module}').main
  arguments = [*map(str, arguments)]
  out, err, code = io.StringIO(), io.StringIO(), 0
  with contextlib.ExitStack() as stack:
    for change in (
      contextlib.chdir(cwd),
      mock.patch.dict(os.environ, environment(**more), clear=True),
      mock.patch.object(sys, 'argv', [module, *arguments]),
      mock.patch.object(sys, 'path', [*more.get('PYTHONPATH', '').split(':'), *sys.path]),
      mock.patch.object(threading, 'excepthook', threading.excepthook),
      mock.patch.object(sys, 'unraisablehook', sys.unraisablehook),
      _devices(jax.devices(), jax.config.update),
      mock.patch.dict(seqio.TaskRegistry._REGISTRY),
      mock.patch.dict(seqio.MixtureRegistry._REGISTRY),
      warnings.catch_warnings(),
      _levels_of_logging(),
      contextlib.redirect_stdout(out),
      contextlib.redirect_stderr(err),
    ):
      stack.enter_context(change)
    try:
      cli.main(run)
    except SystemExit as stop:
      code = stop.code or 0
    finally:
      for argument in arguments:  # another test's module may have the name of this one's
        sys.modules.pop(argument.removeprefix('--import='), None)
  return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _devices(all_devices, update):
  """One device, or as many as a command asks JAX for, which has started with eight."""
  seen = all_devices[:1]

  def updated(name, value):
    if name == 'jax_num_cpu_devices':
      assert value <= len(all_devices)
      seen[:] = all_devices[:value]
    else:
      update(name, value)

  with (
    mock.patch.object(jax.config, 'update', updated),
    mock.patch.object(jax, 'devices', lambda: seen),
    mock.patch.object(jax, 'device_count', lambda: len(seen)),
  ):
    yield


@contextlib.contextmanager
def _levels_of_logging():
  before = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
  try:
    yield
  finally:
    for name in logging.root.manager.loggerDict:
      logging.getLogger(name).setLevel(before.get(name, logging.NOTSET))


def start(module, *arguments, **more):
  """The same, running, in a session of its own: whoever kills it kills its workers."""
  return subprocess.Popen(
    [sys.executable, '-m', f'glm_jax.{module}', *map(str, arguments)],
    cwd=ROOT,
    env=environment(**more),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )


def until(process, words):
  """Reads what a running command says until it has said that."""
  said = ''
  while words not in said:
    said += (line := process.stdout.readline())
    assert line, said
  return said


def gin(*bindings):
  """Flags of bindings."""
  return [f'--gin.{binding}' for binding in bindings]


def snapshot(folder):
  """Every file's content; caches, which belong to nobody, are left out."""
  return {
    str(path): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(pathlib.Path(folder).rglob('*'))
    if path.is_file() and 'cache' not in path.relative_to(folder).parts
  }
