"""Bad input to every command, much of it made from the flags and fields that there are.

One line, its exit code, no traceback, and nothing on disk: see `commands.refused`. What is
refused before anything is read takes milliseconds, so each kind is one test.
"""

import argparse
import dataclasses
import importlib
import typing

import pytest
from commands import ROOT, gin, in_process, refused, snapshot

from glm_jax.configs import Rule
from glm_jax.recipes import CONFIGURABLES
from glm_jax.tune import TuneConfig

COMMANDS = ('train', 'preview', 'generate', 'convert', 'make_shards', 'plan', 'tune')
QUICKSTART = (f'--gin_file={ROOT}/gin_configs/quickstart.gin',)
# What a command needs besides; all of it can be read, or is refused later than flags are.
NEEDED = {
  'train': QUICKSTART,
  'preview': QUICKSTART,
  'generate': ('--checkpoint=nowhere', '--prompt=[MASK]'),
  'convert': ('nowhere', 'out'),
  'make_shards': (*QUICKSTART, '--output_dir=out'),
  'plan': (*QUICKSTART, '--platform=cpu'),
  'tune': (f'--gin_file={ROOT}/gin_configs/tune_quickstart.gin',),
}
# A run that uses each class.
OF_CLASS = {
  'ChatGLMConfig': (
    f'--gin_file={ROOT}/gin_configs/models/chatglm_6b.gin',
    f'--gin_file={ROOT}/gin_configs/runs/pretrain.gin',
    *gin("MODEL_DIR='x'", 'TRAIN_STEPS=1', 'BATCH_SIZE=1'),
    *gin("MIXTURE_OR_TASK_NAME='glm_blank'", "TASK_FEATURE_LENGTHS={'tokens':64}"),
  ),
  'ChatGLM2Config': (f'--gin_file={ROOT}/gin_configs/chatglm2_tiny.gin',),
  'CheckpointModel': (
    f'--gin_file={ROOT}/gin_configs/runs/continue.gin',
    *gin("MODEL_DIR='x'", "CORPUS='x'", "INIT_FROM='x'"),
  ),
  'TuneConfig': NEEDED['tune'],
}
FIELDS = [
  (kind, field, typing.get_type_hints(kind, include_extras=True)[field.name])
  for kind in (*CONFIGURABLES, TuneConfig)
  for field in dataclasses.fields(kind)
]
# Values of every type that gin can write.
VALUES = ('a text', True, 7, 0.5, (), {}, None)


def _refused(folder, module, *arguments, words, code=65):
  refused(in_process(module, *arguments, cwd=folder), *words, code=code)
  assert snapshot(folder) == {} and not list(folder.iterdir()), arguments


def _with(kind, binding):
  """The command and the flags of a run that uses a class, with a binding of it."""
  name = kind.__name__
  module = 'tune' if kind is TuneConfig else 'train'
  return module, (*OF_CLASS.get(name, QUICKSTART), *gin(binding))


def _of_wrong_type(hint):
  """The first value that a type does not take."""
  from glm_jax.configs import _matches

  hint = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
  return next(value for value in VALUES if not _matches(value, hint))


def _out_of_range(hint):
  """Values of the right type, each breaking one of the rules beside it."""
  for rule in typing.get_args(hint)[1:] if hasattr(hint, '__metadata__') else ():
    if isinstance(rule, Rule):
      for value in ('no such word', '', -1, 0, 0.0, 1.5, 1e9):
        try:
          wrong = not rule.holds(value)
        except TypeError:
          continue
        if wrong and isinstance(value, typing.get_args(hint)[0]):
          yield value
          break


def test_fields_of_a_wrong_type(tmp_path):
  for kind, field, hint in FIELDS:
    value, name = _of_wrong_type(hint), f'{kind.__name__}.{field.name}'
    module, arguments = _with(kind, f'{name}={value!r}')
    _refused(tmp_path, module, *arguments, words=[f'{name} must be', f'got {value!r}'])


def test_fields_out_of_range(tmp_path):
  tried = 0
  for kind, field, hint in FIELDS:
    for value in _out_of_range(hint):
      name = f'{kind.__name__}.{field.name}'
      module, arguments = _with(kind, f'{name}={value!r}')
      _refused(tmp_path, module, *arguments, words=[f'{name} must be', f'got {value!r}'])
      tried += 1
  assert tried > 60


def test_fields_that_are_nearly_right(tmp_path):
  for kind, field, _ in FIELDS:
    name = f'{kind.__name__}.{field.name}'
    module, arguments = _with(kind, f'{name}_=1')
    _refused(tmp_path, module, *arguments, words=[f'got {field.name}_;', f'mean {name}?'])


def _actions(module):
  flags = importlib.import_module(f'glm_jax.{module}')._flags()
  return [a for a in flags._actions if not isinstance(a, argparse._HelpAction)]


@pytest.mark.parametrize('module', COMMANDS)
def test_flags_that_cannot_be_read(module, tmp_path):
  """No number, no such choice, no value, or one too many."""
  for action in _actions(module):
    flag = next((s for s in action.option_strings if not s.startswith('--gin.')), None)
    if flag is None:
      continue
    cases = [([f'{flag}_=1'], 'unrecognized arguments')]
    if action.nargs == 0:
      cases.append(([f'{flag}=1'], 'ignored explicit argument'))
    else:
      cases.append(([flag], 'expected one argument'))
    if action.type in (int, float):
      cases.append(([f'{flag}=many'], f'invalid {action.type.__name__} value'))
    if action.choices:
      cases.append(([f'{flag}=nothing'], 'invalid choice'))
    for arguments, word in cases:
      _refused(tmp_path, module, *NEEDED[module], *arguments, words=[word])


@pytest.mark.parametrize('module', COMMANDS)
def test_what_a_command_must_be_given(module, tmp_path):
  required = [a for a in _actions(module) if a.required]
  assert required
  _refused(tmp_path, module, words=['required'])
