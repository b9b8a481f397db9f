"""Who imports whom: the direction of the rooms, and what a command does not load."""

import ast
import graphlib
import itertools
import pathlib
import subprocess
import sys
import time

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'glm_jax'
COMMANDS = {
  p.stem for p in PACKAGE.glob('*.py') if "__name__ == '__main__'" in p.read_text()
}

# Libraries that a room does without, whoever it imports.
WITHOUT = {
  'text': ('tensorflow', 'seqio', 'jax', 'flax', 'gin'),
  'data': ('jax', 'flax', 'gin'),
}
WITHOUT |= dict.fromkeys(
  (
    *('attention', 'models', 'sharding', 'recipes', 'training', 'checkpoints'),
    *('inference', 'interop', 'evaluation'),
  ),
  ('tensorflow', 'seqio', 'gin'),
)
WITHOUT |= dict.fromkeys(('performance', 'planning'), ('tensorflow', 'seqio', 'gin'))
# Rooms that know nothing of each other; they meet in batch.py.
APART = [
  ('data', 'models'),
  ('data', 'training'),
  ('data', 'inference'),
  ('text', 'models'),
]
APART += [('attention', 'models'), ('models', 'training'), ('interop', 'training')]
APART += [('data', 'recipes'), ('training', 'recipes')]
APART += [('evaluation', 'data'), ('evaluation', 'training'), ('evaluation', 'recipes')]
APART += [('inference', 'training'), ('text', 'data'), ('attention', 'data')]


def _imports(path):
  """Names that a module imports, at the top or inside of functions."""
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _module(name):
  """The file of the package that an imported name is, or is in; None for a library's."""
  parts = name.split('.')
  while parts and parts[0] == 'glm_jax':
    path = PACKAGE.parent.joinpath(*parts)
    if path.with_suffix('.py').exists():
      return path.with_suffix('.py')
    if (path / '__init__.py').exists():
      return path / '__init__.py'
    parts.pop()
  return None


def _room(path):
  """The folder of a module, from the package on; a module beside the rooms is its own."""
  parts = path.relative_to(PACKAGE).with_suffix('').parts
  return '/'.join(parts[:-1]) or parts[0]


MODULES = sorted(PACKAGE.rglob('*.py'))
ROOMS = sorted({_room(path).split('/')[0] for path in MODULES if path.parent != PACKAGE})


def test_every_room_has_its_rules():
  assert {*WITHOUT} == {*ROOMS}


@pytest.mark.parametrize('room', ROOMS)
def test_a_room_does_without_the_libraries_of_others(room):
  for path in (PACKAGE / room).rglob('*.py'):
    libraries = {name.split('.')[0] for name in _imports(path)}
    assert not libraries & {*WITHOUT[room]}, path


@pytest.mark.parametrize('one,other', APART)
def test_rooms_that_know_nothing_of_each_other(one, other):
  for path in (PACKAGE / one).rglob('*.py'):
    rooms = {_room(m).split('/')[0] for name in _imports(path) if (m := _module(name))}
    assert other not in rooms, path


@pytest.mark.parametrize('depth', [1, 2], ids=['rooms', 'folders in rooms'])
def test_no_folder_imports_another_in_a_circle(depth):
  """Through imports inside of functions neither; a sorter raises for a circle."""
  cut = lambda room: '/'.join(room.split('/')[:depth])
  graph = {}
  # The `__main__` of a room is a command, which stands on top.
  for path in (path for path in MODULES if path.name != '__main__.py'):
    imported = {cut(_room(m)) for name in _imports(path) if (m := _module(name))}
    # The package's own __init__, which imports nothing, is behind every import.
    graph.setdefault(cut(_room(path)), set()).update(imported - {'__init__'})
  for room, imported in graph.items():
    imported.discard(room)
  assert not graph['__init__']
  assert [*graphlib.TopologicalSorter(graph).static_order()]


def test_nothing_imports_a_command():
  assert {
    'train',
    'plan',
    'generate',
    'evaluate',
    'chat',
    'convert',
    'quantize',
    'tune',
    'preview',
    'fields',
  } <= COMMANDS
  for path in MODULES:
    rooms = {_room(m) for name in _imports(path) if (m := _module(name))}
    assert not rooms & COMMANDS, path


def test_one_module_knows_gin():
  users = {
    path.name
    for path in MODULES
    if any(name.split('.')[0] == 'gin' for name in _imports(path))
  }
  assert users == {'bindings.py'}


def test_tensorflow_is_loaded_by_the_data_and_by_who_makes_it_ready():
  users = {
    _room(path).split('/')[0]
    for path in MODULES
    if any(
      name.split('.')[0] in ('tensorflow', 'seqio', 'tensorflow_datasets')
      for name in _imports(path)
    )
  }
  assert users == {'data', 'startup'}


def test_no_module_is_named_as_a_standard_one():
  assert not {path.stem for path in MODULES} & (sys.stdlib_module_names - {'__init__'})


def test_one_class_name_has_one_meaning():
  names = [
    node.name
    for path in MODULES
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
    if isinstance(node, ast.ClassDef)
  ]
  assert not [name for name, group in itertools.groupby(sorted(names)) if len([*group]) > 1]


def test_files_stay_short():
  lengths = {str(path): len(path.read_text().splitlines()) for path in MODULES}
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
    'glm_jax.checkpoints, glm_jax.convert, glm_jax.quantize'
  )
  assert 'jax' in loaded and not loaded & {'tensorflow', 'seqio', 'tensorflow_datasets'}


def test_making_shards_of_text_does_not_load_tensorflow(tmp_path):
  """Each worker would need seconds and a gigabyte for it."""
  for name in 'ab':
    (tmp_path / f'{name}.txt').write_text('Some text. ' * 50)
  loaded = _loaded(
    f"""
import glm_jax.make_shards
from etils import epath
from glm_jax.data.corpora import parts
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.making import shard_job, shard_runner
from glm_jax.data.rows.table import RowPlan
from glm_jax.text.vocabulary import ByteVocabulary
corpus = CorpusConfig(corpus={str(tmp_path / '*.txt')!r})
vocabulary, plan = ByteVocabulary(), RowPlan(33)
todo = parts.find(corpus, 10**6)
job = shard_job.of_config(corpus, vocabulary, plan, todo, count=1, imports=())
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
