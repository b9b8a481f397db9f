"""Configurations: every file parses to a model of its size; mistakes are named."""

import pathlib
import re
import sys

import pytest

from glm_jax import cli, configs, train
from glm_jax.configs import UserError
from glm_jax.models import ChatGLMConfig
from glm_jax.recipes import CONFIGURABLES, MOVED, WIRED
from glm_jax.training import state
from glm_jax.training.config import CheckpointModel, TrainConfig
from glm_jax.training.search import TuneConfig

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
QUICKSTART = 'gin_configs/glm_tiny.gin'


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
  with pytest.raises(ValueError, match=r'old.gin line 1\); write ComputeConfig.dtype'):
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
  if isinstance(config.model, CheckpointModel):
    assert 'Finetuning.task' in text and config.init_from == config.model.path
    return
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
    ('GLMConfig.layers = 3', 'got layers; did you mean GLMConfig.num_layers'),
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
  assert '\n' not in configs.one_line(caught.value)


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


def test_the_file_that_is_looked_at_is_the_file_that_counts(tmp_path, monkeypatch):
  """Found in a search path, where another of that name, with code in it, lies at hand."""
  good, here = tmp_path / 'good', tmp_path / 'here'
  for folder in (good, here):
    folder.mkdir()
  (good / 'x.gin').write_text(f"include '{ROOT / QUICKSTART}'\ninclude 'y.gin'\n")
  (good / 'y.gin').write_text('TRAIN_STEPS = 11\n')
  for name in ('x.gin', 'y.gin'):
    (here / name).write_text('import no_such_module\n')
  monkeypatch.chdir(here)
  assert _load(files=('x.gin',), search_paths=str(good))[0].train_steps == 11
  # What is written between two looks is not read: gin gets the text.
  changed = []
  read = pathlib.Path.read_text

  def once(path, **more):
    text = read(path, **more)
    if path.parent == good:
      changed.append(path.name)
      path.write_text('import no_such_module\n')
    return text

  monkeypatch.setattr(pathlib.Path, 'read_text', once)
  assert _load(files=('x.gin',), search_paths=str(good))[0].train_steps == 11
  assert changed == ['x.gin', 'y.gin']


@pytest.mark.parametrize(
  'binding,message',
  [
    ('TRAIN_STEPS=3\nimport this', "must not import modules.*'this'"),
    ('TRAIN_STEPS=3\nfrom __gin__ import dynamic_registration', 'must not import'),
    (f"TRAIN_STEPS=3\ninclude '{QUICKSTART}'", 'not include files'),
    ('TRAIN_STEPS=3\nBATCH_SIZE=4', 'must hold one binding'),
    ('import this', 'must not import'),
    ('# TRAIN_STEPS=3', 'must hold one binding'),
  ],
)
def test_a_flag_is_one_binding_and_runs_no_code(binding, message):
  with pytest.raises(UserError, match=message):
    _load(binding)
  assert 'this' not in sys.modules


def test_a_value_may_have_several_lines():
  config, _ = _load("TASK_FEATURE_LENGTHS={\n  'tokens':\n  48}")
  assert config.recipe.length == 48


def test_files_that_include_each_other_are_refused(tmp_path):
  (tmp_path / 'a.gin').write_text("include 'b.gin'\n")
  (tmp_path / 'b.gin').write_text("include 'a.gin'\n")
  with pytest.raises(UserError, match=r'include itself, got .*a\.gin -> .*b\.gin -> '):
    _load(files=('a.gin',), search_paths=str(tmp_path))


def test_a_folder_without_gin_files_has_the_packages_own(tmp_path, monkeypatch, capsys):
  """Which a line says, once for all processes; a file of the folder's own comes first."""
  parse = lambda *more: cli.parse(train._flags(), [f'--gin_file={QUICKSTART}', *more])
  parse()
  assert capsys.readouterr().out == ''  # in the repository, it is the file at hand
  here = _load()
  monkeypatch.chdir(tmp_path)
  parse()
  said = f"{QUICKSTART}: the package's own, {ROOT / QUICKSTART}\n"
  assert capsys.readouterr().out == said and _load() == here
  parse('--process_count=2', '--process_index=1')
  parse('--multiprocess')
  cli.parse(train._flags(), [f'--gin_file={ROOT / QUICKSTART}'])
  assert capsys.readouterr().out == ''
  pathlib.Path('gin_configs').mkdir()
  pathlib.Path(QUICKSTART).write_text(f"include '{ROOT / QUICKSTART}'\nTRAIN_STEPS = 11\n")
  parse()
  assert capsys.readouterr().out == '' and _load()[0].train_steps == 11
  # What the folder lacks still is the package's.
  pathlib.Path('mine.gin').write_text("include 'gin_configs/runs/pretrain.gin'\n")
  with pytest.raises(UserError, match='got no '):
    _load(files=('mine.gin',))


def test_the_gin_files_that_the_pages_show_are_whole_runs(tmp_path, monkeypatch):
  """As they stand there, in a folder that has nothing else; all that they bind counts."""
  pages = [(ROOT / page).read_text() for page in ('README.md', 'launch/README.md')]
  shown = [block for page in pages for block in re.findall(r'```gin\n(.*?)```', page, re.S)]
  assert shown
  monkeypatch.chdir(tmp_path)
  for block in shown:
    pathlib.Path('mine.gin').write_text(block)
    _, text = _load(files=('mine.gin',))
    bound = re.findall(r'^(\w+\.\w+) =', block, re.MULTILINE)
    assert bound and {*bound} <= {*re.findall(r'^(\w+\.\w+) =', text, re.MULTILINE)}


def test_missing_files_are_named(tmp_path):
  with pytest.raises(ValueError, match=r"got 'nowhere\.gin'.*see --gin_search_paths"):
    _load(files=('nowhere.gin',))
  for name in ('glm_tiny.gin', 'gin_configs/glm_tny.gin'):
    with pytest.raises(UserError, match=f'mean {QUICKSTART}'):
      _load(files=(name,))
  (tmp_path / 'a.gin').write_text("include 'gone.gin'\n")
  with pytest.raises(ValueError, match=r"got 'gone\.gin'"):
    _load(files=(str(tmp_path / 'a.gin'),))


@pytest.mark.parametrize(
  'binding,rule,remedy',
  [
    # The shell has taken the quotes.
    ('MODEL_DIR=runs/a', 'a text must stand in quotes', """--gin.MODEL_DIR="'runs/a'"."""),
    ('MODEL_DIR=gs://b/a', 'must stand in quotes', """--gin.MODEL_DIR="'gs://b/a'"."""),
    ("MODEL_DIR='a", 'one pair of quotes', """--gin.MODEL_DIR="'a'"."""),
    ('TASK_FEATURE_LENGTHS={tokens:64}', 'texts in brackets', "{'tokens': 64}"),
    ('TRAIN_STEPS=10**3', 'computes nothing', 'write the number itself'),
    ('OptimizerConfig.learning_rate=1/1000', 'computes nothing', 'the number itself'),
    ('TRAIN_STEPS=1,000', 'one number', '--gin.TRAIN_STEPS=1000.'),
    ('TRAIN_STEPS=1k', 'written out', '--gin.TRAIN_STEPS=1000.'),
    ('TRAIN_STEPS=1e3', 'must be int or None, got 1000.0 (float)', 'write 1000.'),
    ("TRAIN_STEPS='100'", "must be int or None, got '100'", 'write 100, without quotes.'),
    ("TRAIN_EPOCHS='2'", "float or None, got '2'", 'write 2.0, without quotes.'),
    ('EPOCHS=2', 'got EPOCHS, which nothing', 'did you mean TRAIN_EPOCHS?'),
    ('TrainConfig.num_epochs=2', 'got num_epochs', 'mean TrainConfig.train_epochs?'),
    ("OptimizerConfig.learning_rate='1e-3'", 'must be float', 'write 0.001, without'),
    ('TRAIN_STEPS=', 'must have a value', '--gin.TRAIN_STEPS=1000.'),
    ('ObjectiveConfig.shuffle_spans=true', 'values of Python', 'shuffle_spans=True.'),
    ('ObjectiveConfig.loss_weights=[1, 1, 1]', 'must be tuple', 'write (1, 1, 1).'),
    ('TrainConfig.optimizer=3', 'must be OptimizerConfig, got 3', '@OptimizerConfig()'),
    ("TrainConfig.model='glm'", 'GLMConfig or ChatGLMConfig', 'write @GLMConfig()'),
    ('TrainConfig.model=@GLMConfig', 'must have brackets', 'write @GLMConfig().'),
    ('TrainConfig.model=@GLMConfig(num_layers=2)', 'empty brackets', '@GLMConfig(), and'),
    ('TrainConfig.model=@GlmConfig()', 'got GlmConfig', 'did you mean GLMConfig?'),
    ('TrainConfig.model=%MODEL', 'must be set, got no MODEL', 'add --gin.MODEL='),
    ('OptimizerConfig.lr=1e-3', 'got lr', 'mean OptimizerConfig.learning_rate?'),
    (
      'TrainConfig.learning_rate=1.0',
      'field of TrainConfig',
      'OptimizerConfig.learning_rate',
    ),
    ('lr=1e-3', 'got lr, which nothing', 'mean OptimizerConfig.learning_rate?'),
    ('LEARNING_RATE=1e-3', 'nothing refers to', 'mean OptimizerConfig.learning_rate?'),
    ('batch_size=8', 'nothing refers to', 'did you mean BATCH_SIZE?'),
    ('TrainConfig.steps=8', 'got steps', 'did you mean TrainConfig.train_steps?'),
    ('TrainConfig.batch=8', 'got batch', 'did you mean TrainConfig.batch_size?'),
    ('GLMConfig.n_layer=2', 'got n_layer', 'did you mean GLMConfig.num_layers?'),
    ('GLMConfig.layrs=2', 'got layrs', 'did you mean GLMConfig.num_layers?'),
    ('GLMConfig.foo=2', 'got foo', 'known are num_layers, hidden_size'),
    ('ModelConfig.num_layers=2', 'got ModelConfig', 'did you mean GLMConfig.num_layers'),
    ('ChatGLMConfig.num_layers=2', 'what the run uses', 'no @ChatGLMConfig(), but'),
    ('validaton/ObjectiveConfig.blank=1.0', 'of a scope', 'there are none'),
  ],
)
def test_common_slips_are_answered_with_what_to_write(binding, rule, remedy):
  with pytest.raises(UserError) as caught:
    _load(binding)
  message = str(caught.value)
  before, _, after = message.partition('; ')
  assert rule in before and remedy in after and '\n' not in message


def test_a_slip_in_a_file_is_shown_with_its_place(tmp_path):
  (tmp_path / 'a.gin').write_text(f"include '{QUICKSTART}'\n\nMODEL_DIR = runs/a\n")
  with pytest.raises(UserError) as caught:
    _load(files=(str(tmp_path / 'a.gin'),))
  assert str(caught.value) == (
    f'a text must stand in quotes, got MODEL_DIR = runs/a ({tmp_path}/a.gin line 3); '
    "write MODEL_DIR = 'runs/a'."
  )
  (tmp_path / 'a.gin').write_text(f"include '{QUICKSTART}'\nGLMConfig:\n  layers = 3\n")
  with pytest.raises(UserError, match=r'got layers \(.*a\.gin line 3\); did you mean'):
    _load(files=(str(tmp_path / 'a.gin'),))


def test_files_that_are_no_run_say_what_they_lack():
  with pytest.raises(UserError, match='recipe, batch_size.*sizes alone.*quickstart.gin'):
    _load(files=('gin_configs/models/tiny.gin',))
  with pytest.raises(UserError) as caught:
    _load(files=('gin_configs/runs/continue.gin',))
  assert 'got no CORPUS, INIT_FROM, MODEL_DIR; add --gin.CORPUS="' in str(caught.value)
  assert '@' not in str(caught.value)  # the whole configuration is not shown


def test_what_a_later_binding_replaced_is_not_missed():
  """Neither the macro that a file uses there, nor the use of one that a file sets."""
  file = ('gin_configs/runs/continue.gin',)
  places = ("MODEL_DIR='x'", "INIT_FROM='y'", "CorpusConfig.corpus='50%CORPUS'")
  assert _load(*places, files=file)[0].recipe.corpus.corpus == '50%CORPUS'
  assert _load('TrainConfig.train_steps=7')[0].train_steps == 7
  # A flag of what a later flag has replaced was meant as well.
  other = ('TrainConfig.model=@ChatGLMConfig()', 'ChatGLMConfig.num_layers=2')
  again = ('TrainConfig.model=@GLMConfig()', 'GLMConfig.num_layers=3')
  assert _load(*other, *again)[0].model.num_layers == 3


def test_what_a_file_requires_is_asked_for(tmp_path):
  """gin's own word for it, as files of T5X have it."""
  file = tmp_path / 'a.gin'
  file.write_text(f"include '{QUICKSTART}'\nTRAIN_STEPS = %gin.REQUIRED\n")
  assert _load('TRAIN_STEPS=7', files=(str(file),))[0].train_steps == 7
  with pytest.raises(UserError, match='TRAIN_STEPS.*REQUIRED'):
    _load(files=(str(file),))


def test_flags_are_answered_in_a_line():
  parser = train._flags()
  for arguments, words in (
    ([], 'required: --gin_file; see --help'),
    (['--gin_file=a', '--cpu_device=2'], 'did you mean --cpu_devices?'),
    (['--gin_file=a', '--cpu_devices=two'], "invalid int value: 'two'"),
    (['--gin_file=a', '--gin.TRAIN_STEPS', '3'], 'as one argument, --gin.NAME=value'),
  ):
    with pytest.raises(UserError, match=re.escape(words)):
      cli.parse(parser, arguments)


def test_the_arguments_of_t5x_users():
  argv = ['--gin_file=a.gin', '--gin.MODEL_DIR="runs/x=1"', '--gin.A.b=[1, 2]', '--other']
  assert cli.split_bindings(argv) == (
    ['--gin_file=a.gin', '--other'],
    ['MODEL_DIR="runs/x=1"', 'A.b=[1, 2]'],
  )


def _length(*bindings, files=(QUICKSTART,)):
  config, text = _load(*bindings, files=files)
  return (config.train_steps, config.train_epochs), text


def test_epochs_or_steps_whichever_is_given_later(tmp_path):
  """A flag wins over all files, and a file over what it includes, for both alike."""
  assert _length('TRAIN_EPOCHS = 2')[0] == (None, 2)
  assert _length()[0] == (4500, None)
  mine = tmp_path / 'mine.gin'
  mine.write_text(f"include '{QUICKSTART}'\nTRAIN_EPOCHS = 0.5\n")
  files = (str(mine),)
  assert _length(files=files)[0] == (None, 0.5)
  assert _length('TRAIN_STEPS = 7', files=files)[0] == (7, None)
  assert _length('TRAIN_EPOCHS = 3', files=files)[0] == (None, 3)
  assert _length(files=(str(mine), QUICKSTART))[0] == (4500, None)
  assert _length(files=(QUICKSTART, str(mine)))[0] == (None, 0.5)
  # What is kept beside the checkpoints says the same, and can be changed like any file.
  for bindings in ((), ('TRAIN_EPOCHS = 2',)):
    length, text = _length(*bindings)
    (tmp_path / 'config.gin').write_text(text)
    files = (str(tmp_path / 'config.gin'),)
    assert _length(files=files)[0] == length
    assert _length('TRAIN_STEPS = 9', files=files)[0] == (9, None)
    assert _length('TRAIN_EPOCHS = 9', files=files)[0] == (None, 9)


def test_epochs_and_steps_in_one_place_are_refused(tmp_path):
  both = 'of TRAIN_STEPS and TRAIN_EPOCHS one must be given, not both, got '
  with pytest.raises(UserError, match=f'{both}TRAIN_STEPS=3 and TRAIN_EPOCHS=2; leave'):
    _load('TRAIN_STEPS = 3', 'TRAIN_EPOCHS = 2')
  with pytest.raises(UserError, match=f'{both}TRAIN_EPOCHS=2 and TRAIN_STEPS=3; leave'):
    _load('TRAIN_EPOCHS = 2', 'TRAIN_STEPS = 3')
  mine = tmp_path / 'mine.gin'
  mine.write_text(f"include '{QUICKSTART}'\nTRAIN_EPOCHS = 2\nTRAIN_STEPS = 3\n")
  with pytest.raises(UserError, match=r'=2 \(.*mine.gin line 2\) and .*=3 \(.*line 3\)'):
    _load(files=(str(mine),))
  # A flag is later than both.
  assert _length('TRAIN_EPOCHS = 4', files=(str(mine),))[0] == (None, 4)


def test_a_run_without_a_length_is_asked_for_one(tmp_path):
  mine = tmp_path / 'mine.gin'
  text = (ROOT / QUICKSTART).read_text().replace('TRAIN_STEPS = 4500\n', '')
  mine.write_text(text)
  with pytest.raises(UserError, match='got no TRAIN_STEPS; add --gin.TRAIN_STEPS=1000'):
    _load(files=(str(mine),))
  assert _length('TRAIN_EPOCHS = 1', files=(str(mine),))[0] == (None, 1)
  assert _length('TRAIN_STEPS = 1', files=(str(mine),))[0] == (1, None)
