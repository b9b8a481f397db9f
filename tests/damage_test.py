"""Damaged checkpoints: found and named, and the one before is taken, or nothing changes."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import in_process, refused

from benchmarks import damage as measured
from benchmarks.damage import KINDS, MODEL, OPTIMIZER, WAYS, WHERE
from glm_jax import checkpoints
from glm_jax.checkpoints import (
  CheckpointConfig,
  Checkpoints,
  damage,
  steps,
  verifying,
)
from glm_jax.configs import UserError
from glm_jax.training import resume, state


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A run's folder with the steps 1 and 2, and the parameters of both."""
  folder = tmp_path_factory.mktemp('saved') / 'run'
  return folder, measured.write(folder)


@pytest.fixture
def copy(saved, tmp_path):
  """Gives a fresh copy of the run, each time."""
  damage.tell.cache_clear()

  def made():
    shutil.rmtree(tmp_path / 'run', ignore_errors=True)
    return shutil.copytree(saved[0], tmp_path / 'run')

  return made


def _check(way, saved, folder, capsys, cases):
  """Every outcome is right; gives the number of those that nothing was wrong with."""
  run, arrays = saved
  same = 0
  for case, outcome, found in measured.outcomes(run, arrays, way, cases, folder):
    _, _, where = case
    words = capsys.readouterr().err
    if outcome == 'refused':
      assert where == 'both', (case, found)
      assert str(folder) in str(found) and len(str(found)) < 500, (case, found)
      continue
    assert outcome in ('equal', 'before'), case
    if outcome == 'before':
      words += found.said
      assert 'damaged' in words or 'set aside' in words, (case, words)
    same += outcome == 'equal'
  return same


@pytest.mark.parametrize('way', WAYS)
def test_what_is_damaged_is_found_and_the_one_before_is_taken(way, saved, tmp_path, capsys):
  names = ['params/ocdbt.process_0/d/*', 'meta/metadata', 'params/_METADATA']
  cases = [(name, kind, 'newest') for name in names for kind in ('one bit', 'missing')]
  assert _check(way, saved, tmp_path, capsys, cases) <= 1


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('way', WAYS)
def test_every_file_in_every_way(way, kind, saved, tmp_path, capsys):
  names = measured.classes(saved[0] / 'checkpoints' / '2')
  cases = [(name, kind, where) for name in names for where in WHERE]
  assert len(cases) > 30
  # Nothing may be left that all damage goes past. Of two steps, most files of the format
  # are the same, and who reads parameters alone is not concerned by the optimizer's.
  most = 0.8 if kind == 'swapped' else 0.7
  assert _check(way, saved, tmp_path, capsys, cases) <= len(cases) * most


def _flips(folder, arrays, count, seed):
  """How many of so many flipped bits were found; the others change nothing."""
  rng, found = np.random.default_rng(seed), 0
  files = sorted(path for path in folder.rglob('*') if path.stat().st_size)
  files = [path for path in files if path.is_file()]
  sizes = np.array([path.stat().st_size for path in files])
  for _ in range(count):
    path = files[rng.choice(len(files), p=sizes / sizes.sum())]
    content = path.read_bytes()
    measured.spoil(path, b'', 'one bit', rng)
    try:
      assert verifying.verify(folder)
      assert measured.are_equal([measured.streamed(folder)], [arrays]), path
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
  layout, said = measured.layout(), []
  abstract = state.abstract_state(MODEL, OPTIMIZER, layout)
  with pytest.raises(UserError, match=r'--restore_step must be .* got 3 .* \[1, 2\]'):
    resume.chosen(str(run), 3)
  none = lambda step: None
  going = resume.restored(
    str(run), resume.chosen(str(run), 1), abstract, none, said.append, 1
  )
  assert going.step == 1 and measured.are_equal((going.state['params'],), saved[1][1][:1])
  assert '--restore_step=1 goes back' in said[0]
  assert sorted(p.name for p in (run / 'checkpoints').iterdir()) == ['1', 'aside-2']
  assert verifying.verify(run / 'checkpoints' / 'aside-2')
  # The step is saved anew, and another aside finds a name.
  shutil.copytree(run / 'checkpoints' / '1', run / 'checkpoints' / '2')
  assert resume.chosen(str(run)) == 1  # it says of itself that it is step 1
  steps.set_aside(run / 'checkpoints', [1], {})
  assert (run / 'checkpoints' / 'aside-2-2').is_dir()
  run = copy()
  measured.spoil(
    measured.classes(run / 'checkpoints' / '1')['meta/metadata'], b'', 'one bit', _Rng()
  )
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
  assert measured.resumed(run)[0] == 2
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
  current = state.init_state(MODEL, OPTIMIZER, measured.layout(), 0)
  current = {**current, 'step': jnp.int32(3)}
  current['params'] = jax.tree.map(lambda a: a * jnp.nan, current['params'])
  written.save(current, {'step': 3}, {})
  written.close()
  step, _, words = measured.resumed(run)
  assert step == 2 and 'not finite' in words


def test_the_command_lists_and_verifies(saved, copy, tmp_path):
  done = in_process('checkpoints.__main__', saved[0], '--verify')
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('whole') == 2 and 'loss 1.0000' in done.stdout
  run = copy()
  path = measured.classes(run / 'checkpoints' / '2')['params/ocdbt.process_0/d/*']
  measured.spoil(path, b'', 'truncated', None)
  assert in_process('checkpoints.__main__', run).returncode == 0
  done = in_process('checkpoints.__main__', run, '--verify')
  refused(done, 'must be undamaged', str(run))
  assert 'damaged: a file of params cannot be read' in done.stdout
  refused(in_process('checkpoints.__main__', tmp_path / 'none'), 'must be a folder with')


def test_a_checkpoint_from_before_is_read_and_it_is_said(saved, copy, capsys):
  run = copy()
  for step in '12':
    meta = dict(checkpoints.read_meta(run / 'checkpoints' / step))
    file = run / 'checkpoints' / step / 'meta' / 'metadata'
    before = {k: v for k, v in meta.items() if k not in ('digests', 'sha256', 'metrics')}

    file.write_text(json.dumps(before))
  step, found, _ = measured.resumed(run)
  assert step == 2 and measured.are_equal(found, saved[1][2])
  assert capsys.readouterr().err.count('is not compared') == 1
