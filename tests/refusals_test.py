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
from glm_jax.training.search import TuneConfig

COMMANDS = (
  *(
    'train',
    'preview',
    'generate',
    'evaluate',
    'chat',
    'convert',
    'quantize',
    'make_shards',
    'plan',
    'tune',
    'fields',
  ),
)
QUICKSTART = (f'--gin_file={ROOT}/gin_configs/glm_tiny.gin',)
# What a command needs besides; all of it can be read, or is refused later than flags are.
NEEDED = {
  'train': QUICKSTART,
  'preview': QUICKSTART,
  'generate': ('--checkpoint=nowhere', '--prompt=[MASK]'),
  'evaluate': ('--checkpoint=nowhere', '--task=lambada', '--input=nowhere.txt'),
  'chat': ('--checkpoint=nowhere',),
  'convert': ('nowhere', 'out'),
  'quantize': ('nowhere', 'out', '--bits=4'),
  'make_shards': (*QUICKSTART, '--output_dir=out'),
  'plan': (*QUICKSTART, '--platform=cpu'),
  'tune': (f'--gin_file={ROOT}/gin_configs/tune_quickstart.gin',),
  'fields': (),
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
  **{
    kind: (
      f'--gin_file={ROOT}/gin_configs/runs/{name}.gin',
      *gin("MODEL_DIR='x'", "CORPUS='x'", "INIT_FROM='x'"),
    )
    for kind, name in (
      ('Finetuning', 'sft'),
      ('AnswerConfig', 'sft'),
      ('Preference', 'dpo'),
      ('Reward', 'reward'),
    )
  },
  **{
    kind: (
      f'--gin_file={ROOT}/gin_configs/runs/{kind.lower()}.gin',
      *gin("MODEL_DIR='x'", "CORPUS='x'", "INIT_FROM='x'", f"{kind}.reward_model='x'"),
    )
    for kind in ('PPO', 'GRPO')
  },
  'Cloze': (
    f'--gin_file={ROOT}/gin_configs/runs/cloze.gin',
    *gin("MODEL_DIR='x'", "CORPUS='x'", "INIT_FROM='x'", "BENCHMARK='boolq'"),
  ),
  **{
    kind: (
      f'--gin_file={ROOT}/gin_configs/runs/continue.gin',
      f'--gin_file={ROOT}/gin_configs/runs/{name}.gin',
      *gin("MODEL_DIR='x'", "CORPUS='x'", "INIT_FROM='x'"),
    )
    for kind, name in (('LoRAConfig', 'lora'), ('PTuningConfig', 'ptuning'))
  },
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
        except (TypeError, AttributeError):  # a rule of another type's
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
      wrong = 0 if action.type is int else 'nothing'
      cases.append(([f'{flag}={wrong}'], 'invalid choice'))
    for arguments, word in cases:
      _refused(tmp_path, module, *NEEDED[module], *arguments, words=[word])


PROCESSES = '--process_count={} --process_index={} --coordinator_address=x:1'
SEARCH = '--gin.TuneConfig.search={}'
# (what is given besides, what is said) by command.
GIVEN = {
  'train': [
    ('--cpu_devices=-1', '--cpu_devices must be in 1 .. 1024, got -1'),
    ('--cpu_devices=100000', '--cpu_devices must be in 1 .. 1024'),
    ('--process_count=2', 'go together'),
    *(
      (PROCESSES.format(1, 0).replace('x:1', address), f'HOST:PORT, got {address!r}')
      for address in ('nohost', ':1234', 'host:', 'host:0', 'host:99999', 'http://host:1')
    ),
    (PROCESSES.format(10**19, 0), '--process_count must be 1048576 or less'),
    ('--join_seconds=nan', '--join_seconds must be positive'),
    ('--grace_seconds=nan', '--grace_seconds must be 0 or more'),
    (PROCESSES.format(2, 2), 'index 2 of 2'),
    (PROCESSES.format(0, 0), 'index 0 of 0'),
    ('--import=no_such_module', "got 'no_such_module'; run from its folder"),
    ('--import=./mine.py', "--import must name a module, got './mine.py'"),
    ('--import=', "--import must name a module, got ''"),
    ('--import=json.', "must name a module, got 'json.'"),
    ('--gin_file=nowhere.gin', "got 'nowhere.gin'"),
    ('--gin_file=', "must name a gin file, got ''"),
    ('--gin_file=.', "must name a gin file, got '.'"),
    ('--gin_search_paths=nowhere', "must name folders, with commas between them, got 'no"),
    ('--gin.TRAIN_STEPS 3', 'write a binding as one argument'),
    ('more', 'unrecognized arguments: more'),
    ("--gin.MODEL_DIR=''", 'MODEL_DIR must name a folder'),
    ('--gin.MeshConfig.fsdp=0', 'MeshConfig axes must be 1 or more'),
    ('--gin.MeshConfig.sequence=7', 'must multiply to the 1 devices'),
    ('--gin.BATCH_SIZE=3 --gin.TrainConfig.microbatches=2', 'BATCH_SIZE must divide'),
    ('--gin.GLMConfig.num_heads=7', 'must be divisible by num_heads'),
    ('--gin.ObjectiveConfig.blank=-1.0', 'must be 0 or more, and one above 0'),
    ('--gin.ObjectiveConfig.mask_ratio=0.9', 'must leave a token between spans'),
    ('--gin.ObjectiveConfig.schedule=((0,5),)', 'must hold phases of'),
    ("--gin.TASK_FEATURE_LENGTHS={'tokens':0}", 'must leave 8 tokens of text'),
    ("--gin.TASK_FEATURE_LENGTHS={'inputs':64}", "must have the one key 'tokens'"),
    ("--gin.MixtureConfig.rates={'a':1.0}", 'of the names in MixtureConfig.corpora'),
    ("--gin.TrainConfig.trained='x'", 'must have a checkpoint that holds the other'),
    ("--gin.TrainConfig.trained='(' --gin.TrainConfig.init_from='x'", 'regular expression'),
    ("--gin.CorpusConfig.corpus=''", 'CorpusConfig.corpus must be some text'),
    ('--gin.OptimizerConfig.decay_steps=100', 'warmup_steps must be below decay_steps'),
    ('--gin.TRAIN_STEPS=5 --gin.TRAIN_EPOCHS=1', 'one must be given, not both'),
    ('--gin.TRAIN_EPOCHS=0', 'TrainConfig.train_epochs must be positive, got 0'),
    ('--gin.TrainConfig.train_epochs=1', 'TRAIN_STEPS or TRAIN_EPOCHS, and not both'),
    *(
      (
        f'--profile={given}',
        f'--profile must be START:STOP, the first and the last step, '
        f'from 1 on, got {given!r}',
      )
      for given in ('5', '3:2', '0:2', 'a:b', '5:', '-2:3')
    ),
    ('--profile=4500:4501', 'which has 4500, got 4500:4501'),
    (
      "--profile=1:2 --gin.MODEL_DIR='gs://b/run'",
      '--profile must be of a run in a folder',
    ),
  ],
  'preview': [
    ('--examples=0', '--examples must be in 1 .. 512'),
    ('--examples=513', 'got 513'),
    ('--output=nowhere/mask.png', '--output must be a file in a folder that exists'),
    ('--output=.', "in a folder that exists, got '.'"),
    ('--output=', "in a folder that exists, got ''"),
    ('--output=mask', "must end as a picture does, got 'mask'"),
    ('--output=mask.txt', "must end as a picture does, got 'mask.txt'"),
  ],
  'generate': [
    ('', 'a checkpoint must be a folder with params and meta'),
    ('--checkpoint=', 'a checkpoint must be a folder'),
    ('--temperature=-1', 'Sampling.temperature must be 0, or in [1e-30, 1e30], got -1.0'),
    ('--temperature=nan', 'Sampling.temperature must be 0, or in [1e-30, 1e30], got nan'),
    ('--samples=12345678901234567890', 'Generation.samples must be 65536 or less'),
    ('--top_k=-1', 'Sampling.top_k must be 0 or more'),
    ('--top_p=0', 'Sampling.top_p must be in (0, 1]'),
    ('--top_p=1.5', 'Sampling.top_p must be in (0, 1]'),
  ],
  'evaluate': [
    ('', 'a checkpoint must be a folder with params and meta'),
    ('--task=', '--task must be one of'),
    ('--shots=-1', 'Options.shots must be 0 or more'),
    ('--stride=-1', 'Options.stride must be 0 or more'),
    ('--limit=-1', 'Options.limit must be 0 or more'),
    ('--mask=[X]', 'Options.mask must be one of'),
    ('--blank=x', 'a prompt must be written as {prompt}'),
    ('--batch_size=0', '--batch_size must be 1 or more'),
    ('--cpu_devices=-1', '--cpu_devices must be in'),
    ('--output=nowhere/a.jsonl', '--output must be a file in a folder that exists'),
  ],
  'convert': [
    ('', "SRC must be a folder with a checkpoint, got 'nowhere'"),
    ('--shard_size=nan', '--shard_size must be in (0, 1e6]'),
    ('third', 'unrecognized arguments: third'),
  ],
  'chat': [
    ('', 'must be a folder'),
    ('--seed=-1', '32 bits, got -1'),
    ('--temperature=-1', 'Sampling.temperature must be'),
    ('--max_new_tokens=0', '--max_new_tokens must be'),
    ('--window=0', '--window must be'),
  ],
  'quantize': [
    ('', 'a checkpoint must be a folder with params and meta'),
    ('--bits=3', 'argument --bits: invalid choice: 3'),
    ('third', 'unrecognized arguments: third'),
  ],
  'make_shards': [
    ('--shards=10000000000', '--shards must be 100000 or less'),
    ('--shards=0', '--shards must be 1 or more'),
    ('--processes=0', '--processes must be 1 or more'),
    ('--part_mb=-1', '--part_mb must be 1 or more'),
    ("--gin.CorpusConfig.corpus='shards:x'", 'make_shards reads text'),
  ],
  'plan': [
    ('--topology=v5e:2x4', '--topology, or --platform=cpu'),
    ('--slices=2', '--slices are of a TPU'),
    ('--cpu_devices=-1', '--cpu_devices must be in'),
    ('--json=nowhere/plan.json', '--json must be a file in a folder that exists'),
    ('--json=', '--json must be a file'),
    ('--suggest', '--suggest must know the memory and speed of the chip'),
  ],
  'tune': [
    ('--trials=0', '--trials must be 1 or more'),
    ('--workers=0', '--workers must be 1 or more'),
    ("--gin.STUDY_DIR=''", 'TuneConfig.study_dir must be some text'),
    (SEARCH.format("{'A':('int',1,2)}"), 'nothing refers to'),
    (
      SEARCH.format("{'GLMConfig.depth':('int',1,2)}"),
      'did you mean GLMConfig.num_layers?',
    ),
    (SEARCH.format("{'BATCH_SIZE':3}"), 'TuneConfig.search must be dict'),
    (SEARCH.format("{'BATCH_SIZE':('int',1.5,3)}"), 'TuneConfig.search must hold'),
    # Neither the lower bound nor the first choice alone tells.
    (SEARCH.format("{'BATCH_SIZE':('float',1,2)}"), 'batch_size must be int, got 1.0'),
    (SEARCH.format("{'BATCH_SIZE':('choice',8,0)}"), 'batch_size must be positive, got 0'),
    (SEARCH.format("{'OptimizerConfig.beta2':('float',0.9,1.5)}"), 'in [0, 1), got 1.5'),
  ],
  'fields': [
    ('OptimizerConfig.lr', 'did you mean OptimizerConfig.learning_rate?'),
    ('lr', 'did you mean OptimizerConfig.learning_rate?'),
    ('dropout TRAINSTEPS', "got 'TRAINSTEPS'; did you mean TRAIN_STEPS?"),
    ('MeshConfg', 'did you mean MeshConfig?'),
    ('quickstrt.gin', 'did you mean gin_configs/quickstart.gin?'),
    ('zzzz', 'known are TrainConfig, GLMConfig, '),
    ('--import=no.such.module', '--import must name a module'),
  ],
}


@pytest.mark.parametrize('module', COMMANDS)
def test_what_is_given_and_cannot_be(module, tmp_path):
  for given, word in GIVEN[module]:
    arguments = [*NEEDED[module], *given.split()]
    _refused(tmp_path, module, *arguments, words=[word])


@pytest.mark.parametrize('module', [m for m in COMMANDS if m != 'fields'])
def test_what_a_command_must_be_given(module, tmp_path):
  required = [a for a in _actions(module) if a.required]
  assert required or module == 'plan'  # one of two flags
  _refused(tmp_path, module, words=['required' if required else 'must be given'])
