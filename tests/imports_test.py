"""Who imports whom: the direction of the rooms, and what a command does not load."""

import ast
import pathlib
import subprocess
import sys
import time

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'glm_jax'
ROOMS = ('text', 'data', 'attention', 'models', 'training', 'inference', 'interop')

# Nothing on the left imports anything on the right.
FORBIDDEN = {
  'text': ('tensorflow', 'seqio', 'jax', 'glm_jax.data', 'glm_jax.models'),
  'data': ('glm_jax.models', 'glm_jax.training', 'glm_jax.inference', 'jax', 'flax'),
  'attention': ('tensorflow', 'seqio', 'glm_jax.data', 'glm_jax.models'),
  'models': ('tensorflow', 'seqio', 'gin', 'glm_jax.data', 'glm_jax.training'),
  'interop': ('tensorflow', 'seqio', 'gin', 'glm_jax.data', 'glm_jax.training'),
  'inference': ('tensorflow', 'seqio', 'gin', 'glm_jax.data', 'glm_jax.training'),
  'training': ('tensorflow', 'seqio', 'gin'),
}


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('room', ROOMS)
def test_rooms_import_in_one_direction(room):
  for path in (PACKAGE / room).glob('*.py'):
    for name in _imports(path):
      for forbidden in FORBIDDEN[room]:
        assert name != forbidden and not name.startswith(f'{forbidden}.'), (path.name, name)


def test_only_the_command_line_knows_gin():
  users = {
    path.name
    for path in PACKAGE.rglob('*.py')
    if any(name.split('.')[0] == 'gin' for name in _imports(path))
  }
  assert users == {'cli.py'}


def test_no_module_is_named_as_a_standard_one():
  assert not {path.stem for path in PACKAGE.rglob('*.py')} & (
    sys.stdlib_module_names - {'__init__'}
  )


def test_files_stay_short():
  lengths = {
    str(path): len(path.read_text().splitlines()) for path in PACKAGE.rglob('*.py')
  }
  assert max(lengths.values()) <= 450, max(lengths, key=lengths.get)


def _loaded(code):
  """Modules that are loaded after some code, in a fresh process."""
  done = subprocess.run(
    [sys.executable, '-c', f'{code}\nimport sys\nprint(*sys.modules)'],
    check=True,
    capture_output=True,
    text=True,
    cwd=PACKAGE.parent,
  )
  return {*done.stdout.split()}


def test_importing_the_package_is_quick_and_light():
  began = time.perf_counter()
  loaded = _loaded('import glm_jax')
  # Loading TensorFlow alone takes longer; the limit is generous for a busy machine.
  assert time.perf_counter() - began < 1.5
  assert not loaded & {'jax', 'tensorflow'}


def test_training_code_and_generation_do_not_load_tensorflow():
  loaded = _loaded(
    'import glm_jax.train, glm_jax.generate, glm_jax.inference.decode, '
    'glm_jax.checkpoints.manager, glm_jax.convert'
  )
  assert 'jax' in loaded and not loaded & {'tensorflow', 'seqio', 'tensorflow_datasets'}


def test_making_shards_of_text_does_not_load_tensorflow(tmp_path):
  """Each worker would need seconds and a gigabyte for it."""
  (tmp_path / 'a.txt').write_text('Some text. ' * 50)
  loaded = _loaded(
    f"""
import glm_jax.make_shards
from etils import epath
from glm_jax.data.corpora import parts
from glm_jax.data.making import shard_job, shard_runner
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.rows.table import RowPlan
from glm_jax.text.vocabulary import ByteVocabulary
corpus = CorpusConfig(corpus={str(tmp_path / 'a.txt')!r})
vocabulary, plan = ByteVocabulary(), RowPlan(33)
job = shard_job.of_config(corpus, vocabulary, plan, count=1, seed=0, imports=())
folder = epath.Path({str(tmp_path / 'shards')!r})
todo = parts.find(corpus, 10**6)
shard_runner._begin(job, folder)
for part in todo:
  shard_runner._work(job, folder, part)
for name in job.names:
  shard_runner._merge(job, folder, len(todo), name)
"""
  )
  assert 'numpy' in loaded and not loaded & {'tensorflow', 'seqio', 'apache_beam'}
  assert (tmp_path / 'shards' / 'train-00000-of-00001.tfrecord').stat().st_size > 500
