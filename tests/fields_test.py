"""What `fields` lists: everything that gin may bind, with what is said of it."""

import dataclasses
import re
import subprocess
import sys

import pytest
from commands import ROOT, environment, in_process

from glm_jax import fields, gin_files
from glm_jax.recipes import CONFIGURABLES
from glm_jax.training.optimizer import OptimizerConfig
from glm_jax.training.search import TuneConfig

KINDS = (*CONFIGURABLES, TuneConfig)


def _listed(*names, **more):
  done = in_process('fields', *names, **more)
  assert done.returncode == 0, done.stderr
  return [line for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)
def test_every_field_has_a_doc_and_every_doc_a_field(kind):
  named = {field.name for field in dataclasses.fields(kind)}
  assert fields.docs(kind).keys() == named
  assert fields.of_class(kind).doc.endswith('.')
  for line in fields.of_class(kind).lines:
    # A sentence that a blank line or an indent cut off would not end as sentences do.
    assert re.search(r'[.?)]$', line.doc), line


def test_all_fields_are_listed_a_line_each():
  listed = [line.split('  ')[0] for line in _listed()]
  every = [f'{k.__name__}.{f.name}' for k in KINDS for f in dataclasses.fields(k)]
  assert [name for name in listed if name in every] == every


def test_a_line_says_type_rules_default_and_doc():
  said = {line.split('  ')[0]: line for line in _listed('OptimizerConfig', 'TrainConfig')}
  assert said['OptimizerConfig.beta2'].startswith(
    'OptimizerConfig.beta2  float, in [0, 1) = 0.98  decay of the second; '
  )
  assert (
    '  int, positive, 2147483647 or less, required  rows' in said['TrainConfig.batch_size']
  )
  assert ' = @OptimizerConfig()  ' in said['TrainConfig.optimizer']
  assert (
    "one of ('adamw', 'adafactor', 'muon') = 'adamw'" in said['OptimizerConfig.algorithm']
  )


def test_what_is_listed_as_default_is_what_a_field_is():
  """Read back as gin would read it."""
  config = OptimizerConfig()
  for line in fields.of_class(OptimizerConfig).lines:
    default = line.value.rpartition(' = ')[2]
    field = getattr(config, line.name.partition('.')[2])
    assert default == repr(field) and type(field)(default.strip("'")) == field


@pytest.mark.parametrize('name', ['CorpusConfig', 'LoRAConfig'])
def test_a_class_is_listed_alone(name):
  head, *lines = _listed(name)
  assert head.startswith(f'{name}: ')
  assert lines and all(line.startswith(f'{name}.') for line in lines)


def test_a_field_a_macro_or_a_file_is_listed_alone():
  names = ['MeshConfig.fsdp', 'TRAIN_STEPS', 'gin_configs/runs/sft.gin']
  for name in names:
    _, line = _listed(name)
    assert line.startswith(f'{name}  ')
  assert [line.split('  ')[0] for line in _listed(*reversed(names))][1::2] == names


def test_a_word_finds_names_types_and_docs_at_the_beginning_of_words():
  lines = [line for line in _listed('RATE') if '  ' in line]
  names = {line.split('  ')[0] for line in lines}
  assert {'OptimizerConfig.learning_rate', 'MixtureConfig.rates'} <= names
  assert not {'LoRAConfig.rank_stabilized', 'AnswerConfig.examples'} & names
  assert all(re.search(r'(?<![a-z])rate', line.lower()) for line in lines)


def test_macros_are_those_of_the_files_and_say_what_they_set():
  lines = _listed('macros')[1:]
  used = {
    macro
    for name in gin_files.packaged()
    for macro in re.findall(r'%(\w+)', (ROOT / name).read_text())
  }
  assert {line.split('  ')[0] for line in lines} == used >= {'MODEL_DIR', 'INIT_FROM'}
  assert any('  sets TrainConfig.train_steps: ' in line for line in lines)


def test_every_file_says_what_it_is():
  lines = fields.files().lines
  assert [line.name for line in lines] == gin_files.packaged()
  assert {'gin_configs/quickstart.gin', 'gin_configs/models/tiny.gin'} <= {
    line.name for line in lines
  }
  for line in lines:
    assert re.search(r'[.?]"?$', line.doc) and 'Command' not in line.doc, line


def test_a_module_of_ones_own_is_listed(tmp_path):
  (tmp_path / 'listed_recipe.py').write_text(
    'import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass Mine:\n'
    '  """My own.\n\n  Attributes:\n    depth: of it.\n  """\n\n  depth: int = 3\n'
    'CONFIGURABLES = (Mine,)\n'
  )
  lines = _listed('--import=listed_recipe', 'Mine', cwd=tmp_path)
  assert lines == ['Mine: My own.', 'Mine.depth  int = 3  of it.']


def test_on_a_terminal_lines_are_broken_between_words():
  section = fields.of_class(OptimizerConfig)
  text = fields._text(section, 60)
  assert max(map(len, text.splitlines())) <= 60
  assert text.split() == fields._text(section, 0).split()


def test_it_starts_without_tensorflow():
  """Which takes seconds; nor does it need gin."""
  code = 'from glm_jax import fields; fields.main(["MODEL_DIR"])'
  done = subprocess.run(
    [sys.executable, '-c', f'{code}; import sys; print(*sys.modules)'],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    check=True,
  )
  listed, loaded = done.stdout.rsplit('\n', 2)[0], {*done.stdout.split()}
  assert 'MODEL_DIR  str, here or in gs://  sets TrainConfig.model_dir: ' in listed
  assert 'jax' in loaded and not loaded & {'tensorflow', 'seqio', 'gin'}
