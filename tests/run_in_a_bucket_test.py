"""A run whose MODEL_DIR is in a bucket: the same run, killed, resumed and used."""

import json
import os
import subprocess
import sys
import time

import gcs
import pytest
from commands import ROOT, TINY, command, gin, in_process, refused
from commands import environment as command_environment

from glm_jax import storage
from glm_jax.training import writer

QUICKSTART = '--gin_file=gin_configs/glm_tiny.gin'


@pytest.fixture(scope='module')
def bucket(tmp_path_factory):
  with gcs.serve(tmp_path_factory.mktemp('bucket')) as (objects, environment, _):
    yield objects, environment


@pytest.fixture
def reached(bucket, monkeypatch):
  """This process finds the bucket, too."""
  objects, environment = bucket
  for name, value in environment.items():
    if name != 'https_proxy':
      monkeypatch.setenv(name, value)
  return objects


def test_files_are_the_same_here_and_in_a_bucket(reached, tmp_path):
  for place in (str(tmp_path / 'run'), 'gs://bucket/files/run'):
    folder = storage.Folder(place)
    assert folder.names() == [] and folder.read('a.json') is None
    folder.write('a.json', b'{}')
    folder.write('parts/2', b'two')
    folder.write('parts/1', b'one')
    folder.write('a.json', b'')
    assert folder.names() == ['a.json', 'parts'] and folder.read('a.json') == b''
    assert folder.below('parts') == ['parts/1', 'parts/2']
    assert folder.read_all(folder.below('parts')) == [b'one', b'two']
    # Names that begin alike are another folder's.
    storage.Folder(place + '2').write('b', b'')
    assert folder.names() == ['a.json', 'parts']


def test_what_a_bucket_refuses_is_an_error_of_the_system(reached):
  with pytest.raises(OSError, match=r'gs://none/run: NOT_FOUND'):
    storage.Folder('gs://none/run').write('a', b'')
  for path in ('gs://bucket', 'gs://bucket/', 'gs://'):
    with pytest.raises(ValueError, match=r'must have a name, got .gs://'):
      storage.Folder(path).read('a')


def test_metrics_are_parts_that_a_repeated_step_replaces(reached):
  run = 'gs://bucket/metrics/run'
  for losses in ((3.0, 2.0), (1.0,)):
    written = writer.Writer(run, enabled=False)
    written._board = _Board()
    for step, loss in enumerate(losses, 2):
      written.write(step, 'train', {'loss': loss})
    written.write(2, 'validation', {'loss': 9.0})
    written.close()
  found = writer.read(run, 'train')
  assert [(r['step'], r['loss']) for r in found] == [(2, 1.0), (3, 2.0)]
  assert [r['loss'] for r in writer.read(run, 'validation')] == [9.0]


class _Board:
  def add_scalar(self, *_):
    """Keeps nothing."""

  def flush(self):
    """Has nothing to write."""

  def close(self):
    """Has nothing to close."""


def _flags(folder, run, *more):
  return [
    QUICKSTART,
    *gin(*TINY, f"CorpusConfig.corpus='{folder}/text/*.txt'"),
    *gin(f"CorpusConfig.cache_dir='{folder}/cache'", f"MODEL_DIR='{run}'"),
    *gin('CheckpointConfig.every=2', 'TrainConfig.log_every=1', 'TRAIN_STEPS=6'),
    *gin("OptimizerConfig.schedule='constant'", *more),
  ]


def _write_text(folder):
  (folder / 'text').mkdir()
  for number in range(60):
    text = f'Document {number} says some words of its own. ' * (number % 9 + 2)
    (folder / 'text' / f'{number}.txt').write_text(text)


@pytest.mark.slow
def test_it_is_killed_goes_on_and_fills_as_one_that_is_here(bucket, reached, tmp_path):
  objects, environment = bucket
  _write_text(tmp_path)
  here, there = str(tmp_path / 'run'), 'gs://bucket/runs/mine'
  done = command('train', *_flags(tmp_path, here), cwd=ROOT)
  assert done.returncode == 0, done.stderr
  # Killed once a step is saved, it leaves the next one without Orbax's last file.
  process = subprocess.Popen(
    [sys.executable, '-m', 'glm_jax.train', *_flags(tmp_path, there)],
    cwd=ROOT,
    env=command_environment(**environment),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
  )
  saved = 'bucket/runs/mine/checkpoints/2/commit_success.txt'
  while saved not in objects and process.poll() is None:
    time.sleep(0.05)
  process.kill()
  _, errors = process.communicate()
  assert saved in objects, errors.decode()
  done = command('train', *_flags(tmp_path, there), **environment)
  assert done.returncode == 0 and f'resumed {there} at step' in done.stdout, done.stderr
  for kind in ('train', 'validation'):
    records = [
      [(r['step'], r['loss']) for r in writer.read(run, kind)] for run in (here, there)
    ]
    assert records[0] == records[1] and records[0][-1][0] == 6
  names = {name.removeprefix('bucket/runs/mine/').split('/')[0] for name in objects}
  assert {'run.json', 'config.gin', 'summary.json', 'loss.png', 'tensorboard'} <= names
  summary = json.loads(objects['bucket/runs/mine/summary.json'])
  assert summary['steps'] == 6 and summary['validation']['step'] == 6
  assert not [f for f in os.listdir(ROOT) if f.startswith('gs:')]
  # What is used of it.
  prompt = ['--prompt=Document 5 says [MASK] words.', '--max_new_tokens=4']
  filled = [
    command('generate', f'--checkpoint={run}', *prompt, **environment)
    for run in (here, there)
  ]
  assert filled[1].returncode == 0, filled[1].stderr
  assert filled[0].stdout == filled[1].stdout
  other = _flags(tmp_path, 'gs://bucket/runs/mine', 'TrainConfig.seed=1')
  refused(command('train', *other, **environment), 'seed was 0 and is now 1')
  more = _flags(tmp_path, tmp_path / 'next', f"TrainConfig.init_from='{there}'")
  begun = command('train', *more, **environment)
  assert begun.returncode == 0 and f'parameters from {there}' in begun.stdout, begun.stderr
  missing = _flags(tmp_path, 'gs://none/run')
  refused(command('train', *missing, **environment), 'gs://none/run', code=74)


@pytest.mark.slow
def test_a_damaged_step_in_a_bucket_is_set_aside_there(bucket, tmp_path):
  """One bit of its largest object; nothing of it is removed, and the run ends as before."""
  objects, environment = bucket
  _write_text(tmp_path)
  run = 'gs://bucket/damaged/run'
  steps = 'bucket/damaged/run/checkpoints'
  ended = command('train', *_flags(tmp_path, run), **environment)
  assert ended.returncode == 0, ended.stderr
  of_step = lambda name: {
    path.removeprefix(f'{steps}/{name}/'): content
    for path, content in objects.items()
    if path.startswith(f'{steps}/{name}/')
  }
  whole = of_step(6)
  largest = max(whole, key=lambda path: len(whole[path]) * path.startswith('params/'))
  damaged = bytearray(whole[largest])
  damaged[len(damaged) // 2] ^= 1
  objects[f'{steps}/6/{largest}'] = bytes(damaged)
  again = command('train', *_flags(tmp_path, run, 'TRAIN_STEPS=8'), **environment)
  assert again.returncode == 0, again.stderr
  assert f'step 6 is set aside as {run}/checkpoints/aside-6: params' in again.stdout
  assert f'resumed {run} at step 4' in again.stdout
  assert of_step('aside-6') == {**whole, largest: bytes(damaged)}
  # The step is saved once more, with the bits that it had.
  meta = [json.loads(found['meta/metadata']) for found in (whole, of_step(6))]
  assert meta[0]['digests'] == meta[1]['digests']
  assert 'whole' in command('checkpoints', run, '--verify', **environment).stdout


def test_a_bucket_without_a_name_is_refused(tmp_path):
  done = in_process('train', *_flags(tmp_path, 'gs://'), cwd=tmp_path)
  refused(done, "a folder in a bucket must have a name, got 'gs://'")


def test_a_run_in_a_bucket_without_its_package_is_refused_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(storage, '_has', lambda module: False)
  done = in_process('train', *_flags(tmp_path, 'gs://bucket/run'), cwd=tmp_path)
  refused(done, 'google-cloud-storage', "pip install 'glm_jax[gcs]'")
  assert not [*tmp_path.iterdir()]
