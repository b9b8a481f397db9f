"""A user's mistake is one line; a defect of the program keeps its traceback."""

import dataclasses
import errno
import subprocess
import sys
import threading
import types
from typing import Annotated

import pytest
import tensorflow as tf
from commands import environment

from glm_jax import cli, configs, startup
from glm_jax.configs import ResourceError, UserError


def _raises(error):
  def run(argv):
    raise error

  return run


@pytest.mark.parametrize(
  'error,code,said',
  [
    (UserError('a rule, got 3; a remedy.'), cli.EXIT_DATA, 'a rule, got 3; a remedy.'),
    (ResourceError('no room'), cli.EXIT_IO, 'no room'),
    (
      PermissionError(errno.EACCES, 'Permission denied', 'run.json'),
      cli.EXIT_IO,
      'run.json: Permission denied',
    ),
    (OSError(errno.ENOSPC, 'No space left on device'), cli.EXIT_IO, 'No space left'),
    (FloatingPointError('the loss'), cli.EXIT_NUMERICS, 'the loss'),
    (KeyboardInterrupt(), 130, 'interrupted'),
    (
      tf.errors.PermissionDeniedError(
        None, None, '403\nwhen reading gs://bucket/a' + 'x' * 999
      ),
      cli.EXIT_IO,
      '403 when reading gs://bucket/a',
    ),
  ],
)
def test_what_a_user_can_mend_is_one_line_and_a_code(error, code, said, capsys):
  assert cli.exit_code(_raises(error), []) == code
  line, end = capsys.readouterr().err.split('\n')
  assert line.startswith('error: ') and said in line and end == ''


def test_a_reader_that_has_enough_hears_nothing(capsys):
  assert cli.exit_code(_raises(BrokenPipeError(errno.EPIPE, 'Broken pipe')), []) == 141
  assert capsys.readouterr().err == ''


@pytest.mark.parametrize(
  'error',
  [
    ValueError("invalid literal for int() with base 10: 'seven'"),
    UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'invalid start byte'),
    NotImplementedError(),
    KeyError('loss'),
    FileNotFoundError(errno.ENOENT, 'No such file or directory', 'lost.json'),
    ZeroDivisionError(),
    tf.errors.InvalidArgumentError(None, None, 'shapes differ'),
  ],
)
def test_a_defect_of_the_program_passes(error, capsys):
  with pytest.raises(type(error)):
    cli.exit_code(_raises(error), [])
  assert capsys.readouterr().err == ''


def test_a_command_with_a_defect_ends_with_its_traceback():
  code = "from glm_jax import cli; cli.main(lambda argv: int('seven'))"
  done = subprocess.run(
    [sys.executable, '-c', code], env=environment(), capture_output=True, text=True
  )
  assert done.returncode == 1
  assert 'Traceback' in done.stderr and "int('seven')" not in done.stdout
  assert "ValueError: invalid literal for int() with base 10: 'seven'" in done.stderr


def _thread_of(module):
  """A thread whose target fails in a module of that name."""
  namespace = {'__name__': module}
  exec('def fail():\n  raise RuntimeError("in a thread")', namespace)
  return threading.Thread(target=namespace['fail'])


@pytest.mark.parametrize('module,heard', [('glm_jax.data', True), ('orbax.x', False)])
def test_threads_are_heard_unless_a_library_raises_again(
  module, heard, monkeypatch, capsys
):
  monkeypatch.setattr(threading, 'excepthook', startup._of_thread)
  thread = _thread_of(module)
  thread.start()
  thread.join()
  assert ('RuntimeError: in a thread' in capsys.readouterr().err) == heard


@pytest.mark.parametrize('module,heard', [('glm_jax.data', True), ('asyncio.x', False)])
def test_what_nobody_can_catch_is_heard_unless_it_is_asyncios_alone(
  module, heard, monkeypatch, capsys
):
  monkeypatch.setattr(sys, 'unraisablehook', startup._unraisable)
  namespace = {'__name__': module}
  exec('def fail(self):\n  raise RuntimeError("in a finalizer")', namespace)
  type('Object', (), {'__del__': namespace['fail']})()
  assert ('RuntimeError: in a finalizer' in capsys.readouterr().err) == heard


@dataclasses.dataclass(frozen=True)
class _Config:
  count: Annotated[int, configs.at_least(1)] = 1
  share: Annotated[float, configs.within('[0, 1)')] = 0.0
  rate: Annotated[float, configs.POSITIVE] = 1.0
  kind: Annotated[str, configs.one_of('a', 'b')] = 'a'
  name: Annotated[str, configs.NOT_EMPTY] = 'x'


@pytest.mark.parametrize(
  'fields,message',
  [
    (dict(count=0), r'_Config\.count must be 1 or more, got 0; give 1 or more'),
    (dict(count=1.0), r'_Config\.count must be int, got 1\.0 \(float\)'),
    (dict(count=True), r'_Config\.count must be int'),
    (dict(share=1), r'must be in \[0, 1\), got 1; give a number in \[0, 1\)'),
    (dict(share=-0.1), r'must be in \[0, 1\)'),
    (dict(share=float('nan')), r'must be in \[0, 1\)'),
    (dict(rate=0.0), r'must be positive, got 0\.0; give a number above 0'),
    (dict(rate=float('inf')), 'must be positive'),
    (dict(kind='c'), r"must be one of \('a', 'b'\), got 'c'; choose one of these"),
    (dict(name=''), r"must be some text, got ''"),
  ],
)
def test_a_field_says_in_its_type_what_it_may_be(fields, message):
  configs.check_fields(_Config())
  with pytest.raises(UserError, match=message):
    configs.check_fields(_Config(**fields))


@pytest.mark.parametrize(
  'interval,inside,outside',
  [
    ('(0, 1]', (0.1, 1), (0, 1.1)),
    ('[0, 20)', (0, 19.9), (-1, 20)),
    ('(0, 1)', (0.5,), (0, 1)),
  ],
)
def test_intervals_hold_the_bounds_that_they_say(interval, inside, outside):
  rule = configs.within(interval)
  assert all(map(rule.holds, inside)) and not any(map(rule.holds, outside))


def test_a_defect_in_a_configuration_is_none_of_the_users(monkeypatch):
  """gin's own errors are the user's; what is raised below our code is not."""
  flags = types.SimpleNamespace(
    gin_file=['gin_configs/glm_tiny.gin'],
    gin_search_paths='',
    imports=[],
    bindings=["MODEL_DIR='x'"],
  )
  assert cli.configuration(flags)[0].model_dir == 'x'

  def broken(config):
    raise TypeError('a defect')

  monkeypatch.setattr(configs, 'check_fields', broken)
  with pytest.raises(TypeError, match='a defect'):
    cli.configuration(flags)
  monkeypatch.undo()
  flags.bindings.append('TrainConfig.no_such_field=3')
  with pytest.raises(UserError, match='no_such_field'):
    cli.configuration(flags)
