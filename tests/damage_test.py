"""Damaged checkpoints: found and named, and the one before is taken, or nothing changes."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import in_process, refused
from flax import traverse_util

from glm_jax import checkpoints, models, opening, sharding
from glm_jax.checkpoints import (
  CheckpointConfig,
  Checkpoints,
  damage,
  slices,
  steps,
  verifying,
)
from glm_jax.configs import UserError
from glm_jax.models import GLMConfig
from glm_jax.sharding import MeshConfig
from glm_jax.text.vocabulary import ByteVocabulary
from glm_jax.training import resume, state
from glm_jax.training.optimizer import OptimizerConfig, make_optimizer

OPTIMIZER = make_optimizer(OptimizerConfig(), 100)
MODEL = GLMConfig(
  num_layers=2, hidden_size=32, num_heads=2, vocab_size=384, max_positions=32
)
KINDS = ('truncated', 'one bit', 'missing', 'empty', 'swapped')


def _layout():
  return sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A run's folder with the steps 1 and 2, and the parameters of both."""
  folder, layout = tmp_path_factory.mktemp('saved') / 'run', _layout()
  current = state.init_state(MODEL, OPTIMIZER, layout, 0)
  written = Checkpoints(str(folder), CheckpointConfig())
  meta = {
    'model': models.config.to_dict(MODEL),
    'vocabulary': ByteVocabulary().to_dict(),
    'source': None,
  }
  arrays = {}
  for step in (1, 2):
    # Every array is another: moments of a fresh state would be zeros in both.
    current = jax.tree.map(lambda a: a + jnp.asarray(0.5, a.dtype), current)
    current['step'] = jnp.int32(step)
    written.save(current, {**meta, 'step': step}, {'loss': 3.0 - step})
    arrays[step] = jax.tree.map(np.asarray, (current['params'], current['opt_state']))
  written.close()
  return folder, arrays


@pytest.fixture
def copy(saved, tmp_path):
  """Gives a fresh copy of the run, each time."""
  damage.tell.cache_clear()

  def made():
    shutil.rmtree(tmp_path / 'run', ignore_errors=True)
    return shutil.copytree(saved[0], tmp_path / 'run')

  return made


def _classes(step):
  """The largest file of each class; data files have random names."""
  classes = {}
  for path in sorted(step.rglob('*')):
    if path.is_file():
      name = re.sub('[0-9a-f]{32}', '*', str(path.relative_to(step)))
      if name not in classes or path.stat().st_size > classes[name].stat().st_size:
        classes[name] = path
  return classes


def _damage(path, other, kind, rng):
  content = path.read_bytes()
  if kind == 'missing':
    path.unlink()
  elif kind == 'one bit':
    changed = bytearray(content)
    changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
    path.write_bytes(changed)
  else:
    new = {'truncated': content[: len(content) // 2], 'empty': b'', 'swapped': other}
    path.write_bytes(new[kind])


def _resume(run):
  layout = _layout()
  said, abstract = [], state.abstract_state(MODEL, OPTIMIZER, layout)
  step = resume.chosen(str(run))
  none = lambda step: None
  going = resume.restored(str(run), step, abstract, none, said.append)
  # What stands in the way of the steps to come is gone, for Orbax, too.
  assert [p.name for p in (run / 'checkpoints').iterdir() if p.name.isdigit()]
  Checkpoints(str(run), CheckpointConfig()).close()
  found = going.state['params'], going.state['opt_state']
  return going.step, jax.tree.map(np.asarray, found), ' '.join(said)


def _generate(run, capsys):
  source = opening.find(str(run))
  params = jax.tree.map(np.asarray, source.read(_layout())['params'])
  return None, (params, None), capsys.readouterr().err


def _convert(run, capsys):
  folder = verifying.find(str(run))
  leaves = slices.StoredLeaves(folder)
  flat = {path: leaves.read(path, None) for path in leaves.specs}
  params = traverse_util.unflatten_dict(flat)
  return int(folder.name), (params, None), capsys.readouterr().err


def _equal(found, wanted):
  pairs = [(f, w) for f, w in zip(found, wanted, strict=True) if f is not None]
  return all(
    jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), f, w)) for f, w in pairs
  )


def _check(way, saved, copy, capsys, cases):
  """Every outcome is right; gives the number of those that nothing was wrong with."""
  _, arrays = saved
  rng, same = np.random.default_rng(0), 0
  for name, kind, where in cases:
    run = copy()
    damage.tell.cache_clear()
    first, second = (_classes(run / 'checkpoints' / step) for step in '12')
    contents = [files[name].read_bytes() for files in (first, second)]
    _damage(second[name], contents[0], kind, rng)
    if where == 'both':
      _damage(first[name], contents[1], kind, rng)
    case = (name, kind, where)
    try:
      step, found, words = way(run) if way is _resume else way(run, capsys)
    except UserError as error:
      assert where == 'both', (case, error)
      assert str(run) in str(error) and len(str(error)) < 500, (case, error)
      capsys.readouterr()
      continue
    equal = [n for n in (1, 2) if _equal(found, arrays[n])]
    assert equal and step in (None, *equal), case
    if 1 in equal:
      assert 'damaged' in words or 'set aside' in words, (case, words)
    same += 2 in equal
  return same


WAYS = {'resume': _resume, 'generate': _generate, 'convert': _convert}


@pytest.mark.parametrize('way', WAYS)
def test_what_is_damaged_is_found_and_the_one_before_is_taken(way, saved, copy, capsys):
  names = ['params/ocdbt.process_0/d/*', 'meta/metadata', 'params/_METADATA']
  cases = [(name, kind, 'newest') for name in names for kind in ('one bit', 'missing')]
  assert _check(WAYS[way], saved, copy, capsys, cases) <= 1


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('way', WAYS)
def test_every_file_in_every_way(way, kind, saved, copy, capsys):
  names = _classes(saved[0] / 'checkpoints' / '2')
  cases = [(name, kind, where) for name in names for where in ('newest', 'both')]
  assert len(cases) > 30
  # Nothing may be left that all damage goes past. Of two steps, most files of the format
  # are the same, and who reads parameters alone is not concerned by the optimizer's.
  most = 0.8 if kind == 'swapped' else 0.7
  assert _check(WAYS[way], saved, copy, capsys, cases) <= len(cases) * most


def _flips(folder, arrays, count, seed):
  """How many of so many flipped bits were found; the others change nothing."""
  rng, found = np.random.default_rng(seed), 0
  files = sorted(path for path in folder.rglob('*') if path.stat().st_size)
  files = [path for path in files if path.is_file()]
  sizes = np.array([path.stat().st_size for path in files])
  for _ in range(count):
    path = files[rng.choice(len(files), p=sizes / sizes.sum())]
    content = path.read_bytes()
    _damage(path, b'', 'one bit', rng)
    try:
      assert verifying.verify(folder)
      leaves = slices.StoredLeaves(folder)
      flat = {path: leaves.read(path, None) for path in leaves.specs}
      assert _equal((traverse_util.unflatten_dict(flat),), (arrays,)), path
    except damage.Damaged as error:
      assert error.folder == folder
      found += 1
    finally:
      path.write_bytes(content)
  return found


@pytest.mark.parametrize('count', [10, pytest.param(100, marks=pytest.mark.slow)])
def test_flipped_bits_of_a_run_are_found(count, saved, copy):
  run = copy()
  step = run / 'checkpoints' / '2'
  assert verifying.verify(step)
  assert _flips(step, saved[1][2][0], count, count) > count / 2


@pytest.mark.parametrize('count', [10, pytest.param(100, marks=pytest.mark.slow)])
def test_flipped_bits_of_a_conversion_are_found(count, saved, tmp_path):
  dst = tmp_path / 'converted'
  done = in_process('convert', saved[0], dst, '--to=checkpoint')
  assert done.returncode == 0, done.stderr
  assert verifying.verify(dst)
  assert _flips(dst, saved[1][2][0], count, count) > count / 2


def test_a_step_is_chosen_and_newer_ones_stay_beside_it(saved, copy):
  run = copy()
  layout, said = _layout(), []
  abstract = state.abstract_state(MODEL, OPTIMIZER, layout)
  with pytest.raises(UserError, match=r'--restore_step must be .* got 3 .* \[1, 2\]'):
    resume.chosen(str(run), 3)
  none = lambda step: None
  going = resume.restored(
    str(run), resume.chosen(str(run), 1), abstract, none, said.append, 1
  )
  assert going.step == 1 and _equal((going.state['params'],), saved[1][1][:1])
  assert '--restore_step=1 goes back' in said[0]
  assert sorted(p.name for p in (run / 'checkpoints').iterdir()) == ['1', 'aside-2']
  assert verifying.verify(run / 'checkpoints' / 'aside-2')
  # The step is saved anew, and another aside finds a name.
  shutil.copytree(run / 'checkpoints' / '1', run / 'checkpoints' / '2')
  assert resume.chosen(str(run)) == 1  # it says of itself that it is step 1
  steps.set_aside(run / 'checkpoints', [1], {})
  assert (run / 'checkpoints' / 'aside-2-2').is_dir()
  run = copy()
  _damage(_classes(run / 'checkpoints' / '1')['meta/metadata'], b'', 'one bit', _Rng())
  with pytest.raises(UserError, match='undamaged, got .*checkpoints/1 '):
    resume.chosen(str(run), 1)


class _Rng:
  def integers(self, limit):
    return limit // 2


def test_stray_folders_stop_nobody_and_one_that_is_all_there_was_is_not_forgotten(
  copy, tmp_path
):
  run = copy()
  for name in ('310', '7', '08'):
    (run / 'checkpoints' / name).mkdir()
  assert _resume(run)[0] == 2
  shutil.rmtree(run / 'checkpoints' / '1')
  (run / 'checkpoints' / '2' / 'meta' / 'metadata').unlink()
  # Beginning anew would be silent, and is refused again and again.
  for _ in range(2):
    with pytest.raises(UserError, match='must hold an undamaged checkpoint, got 1 damaged'):
      resume.chosen(str(run))
  assert resume.chosen(str(tmp_path / 'new')) is None


def test_numbers_that_are_not_finite_are_not_gone_on_from(saved, copy):
  run = copy()
  written = Checkpoints(str(run), CheckpointConfig())
  current = state.init_state(MODEL, OPTIMIZER, _layout(), 0)
  current = {**current, 'step': jnp.int32(3)}
  current['params'] = jax.tree.map(lambda a: a * jnp.nan, current['params'])
  written.save(current, {'step': 3}, {})
  written.close()
  step, _, words = _resume(run)
  assert step == 2 and 'not finite' in words


def test_the_command_lists_and_verifies(saved, copy, tmp_path):
  done = in_process('checkpoints.__main__', saved[0], '--verify')
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('whole') == 2 and 'loss 1.0000' in done.stdout
  run = copy()
  path = _classes(run / 'checkpoints' / '2')['params/ocdbt.process_0/d/*']
  _damage(path, b'', 'truncated', None)
  assert in_process('checkpoints.__main__', run).returncode == 0
  done = in_process('checkpoints.__main__', run, '--verify')
  refused(done, 'must be undamaged', str(run))
  assert 'damaged: params' in done.stdout
  refused(in_process('checkpoints.__main__', tmp_path / 'none'), 'must be a folder with')


def test_a_checkpoint_from_before_is_read_and_it_is_said(saved, copy, capsys):
  run = copy()
  for step in '12':
    meta = dict(checkpoints.read_meta(run / 'checkpoints' / step))
    file = run / 'checkpoints' / step / 'meta' / 'metadata'
    before = {k: v for k, v in meta.items() if k not in ('digests', 'sha256', 'metrics')}

    file.write_text(json.dumps(before))
  step, found, _ = _resume(run)
  assert step == 2 and _equal(found, saved[1][2])
  assert capsys.readouterr().err.count('is not compared') == 1
