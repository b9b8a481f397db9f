"""Configurations: every file parses to a model of its size; mistakes are named."""

import pathlib
import re

import pytest

from glm_jax import cli
from glm_jax.models import ChatGLMConfig
from glm_jax.recipes import CONFIGURABLES, MOVED, WIRED
from glm_jax.training import state
from glm_jax.training.config import TrainConfig
from glm_jax.tune import TuneConfig

ROOT = pathlib.Path(__file__).parent.parent
RUNS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'gin_configs').glob('*.gin'))
MODELS = sorted((ROOT / 'gin_configs/models').glob('*.gin'))
# Exact counts of the released checkpoints (the original's tables).
COUNTS = {
  'glm_base': 109_338_624,
  'glm_large': 334_688_256,
  'glm_large_chinese': 355_659_776,
  'glm_410m': 410_265_600,
  'glm_515m': 514_632_960,
  'glm_roberta': 354_873_344,
  'glm_2b': 1_920_122_880,
  'glm_10b': 9_880_682_496,
  'glm_10b_chinese': 9_879_633_920,
  'chatglm_6b': 6_173_286_400,
  'glm_130b': 128_697_794_560,
  'chatglm2_6b': 6_243_584_000,
  'chatglm3_6b': 6_243_584_000,
  'chatglm3_6b_32k': 6_243_584_000,
  'glm4_9b': 9_399_951_360,
  'glm4_9b_0414': 9_400_279_040,
}
QUICKSTART = 'gin_configs/quickstart.gin'


def _load(*bindings, files=(QUICKSTART,), search_paths=''):
  both = (*CONFIGURABLES, TuneConfig)  # a search is a run, too
  return cli.load_config(TrainConfig, both, files, search_paths, bindings)


def test_older_names_are_answered_with_todays(tmp_path):
  """On the command line and in a file, and what must be said once beside them."""
  for old, now in MOVED.items():
    wired = WIRED[now.split('.')[0]]
    message = re.escape(f'got {old}; write {now} (and {wired} once)')
    with pytest.raises(ValueError, match=message):
      _load(f'{old} = 1')
  (tmp_path / 'old.gin').write_text("ChatGLM2Config.dtype = 'bfloat16'\n")
  with pytest.raises(ValueError, match=r'old.gin; write ComputeConfig.dtype'):
    _load(files=(QUICKSTART, str(tmp_path / 'old.gin')))
  # As the files of this repository have it, the new name counts.
  assert _load("ComputeConfig.dtype = 'bfloat16'")[0].compute.dtype == 'bfloat16'
  for known in MOVED.values():
    kind, name = known.split('.')
    fields = next(c for c in CONFIGURABLES if c.__name__ == kind).__dataclass_fields__
    assert name in fields, known


@pytest.mark.parametrize('file', RUNS)
def test_every_run_configuration_is_complete(file):
  required = [
    f"{name} = 'x'"
    for name in ('MODEL_DIR', 'CORPUS', 'VOCABULARY', 'INIT_FROM')
    if f'%{name}' in (ROOT / file).read_text() or name == 'MODEL_DIR'
  ]
  config, text = _load(*required, files=(file,))
  assert config.model.vocab_size % 128 == 0
  row = config.recipe.objectives.row_length(config.recipe.length)
  assert row <= config.model.max_positions + 1
  assert config.optimizer.warmup_steps < (
    config.optimizer.decay_steps or config.train_steps
  )
  assert 'Pretraining.task' in text


@pytest.mark.parametrize('path', MODELS, ids=lambda path: path.stem)
def test_models_have_the_published_number_of_parameters(path):
  kind = re.search(r'^TrainConfig.model = @(\w+)\(\)$', path.read_text(), re.MULTILINE)[1]
  kind = next(k for k in CONFIGURABLES if k.__name__ == kind)
  config, _ = cli.load_config(kind, CONFIGURABLES, [str(path)], '', [])
  count = state.count(state.abstract_params(config))
  assert count == COUNTS.get(path.stem, count)
  assert f'{count:,}' in path.read_text() or 'tiny' in path.stem


def test_the_first_chatglm_has_image_tokens_besides():
  path = str(ROOT / 'gin_configs/models/chatglm_6b.gin')
  bindings = ['ChatGLMConfig.vocab_size = 150528']
  config, _ = cli.load_config(ChatGLMConfig, CONFIGURABLES, [path], '', bindings)
  assert state.count(state.abstract_params(config)) == 6_255_206_400


def test_the_operative_configuration_gives_the_same_run(tmp_path):
  config, text = _load('TRAIN_STEPS = 7', 'GLMConfig.num_layers = 3')
  (tmp_path / 'config.gin').write_text(text)
  again, _ = _load(files=(str(tmp_path / 'config.gin'),))
  assert again == config and again.train_steps == 7 and again.model.num_layers == 3


def test_later_files_and_bindings_win(tmp_path):
  (tmp_path / 'mine.gin').write_text(f"include '{QUICKSTART}'\nTRAIN_STEPS = 11\n")
  assert _load(files=(str(tmp_path / 'mine.gin'),))[0].train_steps == 11
  assert _load('TRAIN_STEPS = 12', files=(str(tmp_path / 'mine.gin'),))[0].train_steps == 12
  assert _load(files=('mine.gin',), search_paths=str(tmp_path))[0].train_steps == 11


@pytest.mark.parametrize(
  'binding,message',
  [
    ('TRAIN_STEP = 3', 'TRAIN_STEP.*did you mean TRAIN_STEPS'),
    ('SOMETHING = 3', 'nothing refers to'),
    ('GLMConfig.layers = 3', "parameter named 'layers'"),
    ('NoConfig.layers = 3', 'NoConfig'),
    ("BATCH_SIZE = '64'", 'TrainConfig.batch_size must be int'),
    ('TRAIN_STEPS = 1e6', 'TrainConfig.train_steps must be int'),
    ("GLMConfig.num_layers = '2'", 'GLMConfig.num_layers must be int'),
    ('GLMConfig.hidden_size = 101', 'divisible by num_heads'),
    ('ObjectiveConfig.mask_ratio = 1.5', r'must be in \(0, 1\)'),
    ("TASK_FEATURE_LENGTHS = {'tokens': '64'}", 'feature_lengths must be dict'),
    ("ComputeConfig.dtype = 'float16'", 'must be one of'),
    ('GLMConfig.attention_dropout = 1.0', r'in \[0, 1\)'),
    ("MODEL_DIR = ''", 'must name a folder'),
    ('TRAIN_STEPS = 0', 'must be positive'),
    ('TRAIN_STEPS == 3', "expected ':' or '='"),
  ],
)
def test_mistakes_are_named_in_one_line(binding, message):
  with pytest.raises(ValueError, match=message) as caught:
    _load(binding)
  assert '\n' not in cli._message(caught.value)


@pytest.mark.parametrize(
  'line',
  [
    'import os',
    'from os import system',
    'from __gin__ import dynamic_registration',
  ],
)
def test_a_gin_file_runs_no_code(tmp_path, line):
  (tmp_path / 'evil.gin').write_text(f'{line}\n')
  (tmp_path / 'outer.gin').write_text(f"include '{tmp_path}/evil.gin'\n")
  for name in ('evil.gin', 'outer.gin'):
    with pytest.raises(ValueError, match=r'must not import modules.*--import'):
      _load(files=(str(tmp_path / name),))


def test_missing_files_are_named(tmp_path):
  with pytest.raises(ValueError, match=r"got 'nowhere\.gin'"):
    _load(files=('nowhere.gin',))
  (tmp_path / 'a.gin').write_text("include 'gone.gin'\n")
  with pytest.raises(ValueError, match=r"got 'gone\.gin'"):
    _load(files=(str(tmp_path / 'a.gin'),))


def test_the_arguments_of_t5x_users():
  argv = ['--gin_file=a.gin', '--gin.MODEL_DIR="runs/x=1"', '--gin.A.b=[1, 2]', '--other']
  assert cli.split_bindings(argv) == (
    ['--gin_file=a.gin', '--other'],
    ['MODEL_DIR="runs/x=1"', 'A.b=[1, 2]'],
  )
