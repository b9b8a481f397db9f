"""Shards in Google Cloud Storage: made, checked and trained from, as on a local disk."""

import json

import gcs
import pytest
from commands import TINY, command, gin, refused

pytestmark = pytest.mark.slow

MAKE = ['--gin_file=gin_configs/quickstart.gin', '--shards=4', '--part_mb=1']
TEXT = ''.join(
  json.dumps({'text': f'Document {n}: ' + 'some words of its own. ' * (n % 30 + 1)}) + '\n'
  for n in range(4000)
).encode()


@pytest.fixture(scope='module')
def storage(tmp_path_factory):
  """Text and the shards of it, in the cloud and on disk."""
  folder = tmp_path_factory.mktemp('storage')
  (folder / 'text.jsonl').write_bytes(TEXT)
  with gcs.serve(folder) as (objects, environment, requests):
    objects['bucket/text/a.jsonl'] = TEXT
    for place, corpus in (
      ('gs://bucket/made/shards', 'gs://bucket/text/*.jsonl'),
      (f'{folder}/shards', f'{folder}/text.jsonl'),
    ):
      flags = [*MAKE, f'--output_dir={place}', '--processes=2']
      corpora = gin(f"CorpusConfig.corpus='{corpus}'", "MODEL_DIR='x'")
      done = command('make_shards', *flags, *gin(*TINY), *corpora, **environment)
      assert done.returncode == 0, done.stderr
    yield folder, objects, environment, requests


def _train(storage, corpus, run, *bindings):
  folder, _, environment, _ = storage
  places = gin(f"CorpusConfig.corpus='{corpus}'", f"MODEL_DIR='{folder}/{run}'")
  steps = gin('TRAIN_STEPS=4', 'TrainConfig.log_every=1', 'BATCH_SIZE=32')
  flags = ['--gin_file=gin_configs/quickstart.gin', *gin(*TINY), *places, *steps]
  return command('train', *flags, *gin(*bindings), **environment)


def test_the_cloud_holds_the_bytes_that_the_disk_does(storage):
  folder, objects, _, _ = storage
  there = {
    name.removeprefix('bucket/made/shards/'): data
    for name, data in objects.items()
    if name.startswith('bucket/made/shards/') and not name.endswith('/')
  }
  here = {path.name: path.read_bytes() for path in (folder / 'shards').iterdir()}
  assert sorted(there) == sorted(here)
  for name in here:
    if name != 'index.json':  # it says where the text was
      assert there[name] == here[name], name


def test_training_reads_the_same_examples_in_few_requests(storage):
  folder, _, _, requests = storage
  losses = []
  for run, corpus in (
    ('cloud', 'shards:gs://bucket/made/shards'),
    ('disk', f'shards:{folder}/shards'),
  ):
    before = len(requests)
    off = 'CorpusConfig.verify=False'
    done = _train(storage, corpus, run, off)
    assert done.returncode == 0, done.stderr
    reads = [r for r in requests[before:] if '.rows' in r and r.startswith('GET /bucket/')]
    lines = (folder / run / 'metrics.jsonl').read_text().splitlines()
    losses.append([json.loads(line)['loss'] for line in lines])
    # Rows lie together in runs: there are far fewer requests than rows.
    assert (0 < len(reads) < 1000) if run == 'cloud' else not reads
  assert len(losses[0]) == 5 and losses[0] == losses[1]


def test_what_is_wrong_in_the_cloud_is_named(storage):
  folder, objects, environment, _ = storage
  name = 'bucket/made/shards/train-00001-of-00004.rows'
  whole = objects[name]
  corpus = 'shards:gs://bucket/made/shards'
  try:
    objects[name] = whole[:-5]
    refused(_train(storage, corpus, 'no'), f'gs://{name}', 'bytes')
    objects[name] = whole[:-5] + b'\0\1\2\3\4'
    refused(_train(storage, corpus, 'no'), f'gs://{name}', 'SHA-256')
    del objects[name]
    refused(_train(storage, corpus, 'no'), f'gs://{name}', 'no such file')
  finally:
    objects[name] = whole
  refused(_train(storage, 'shards:gs://bucket/none', 'no'), 'must hold index.json')
  refused(_train(storage, 'gs://bucket/none/*.txt', 'no'), 'matches no file')
  flags = [*MAKE, '--output_dir=gs://bucket/made/shards']
  corpora = gin("CorpusConfig.corpus='gs://bucket/text/*.jsonl'", "MODEL_DIR='x'")
  again = command('make_shards', *flags, *gin(*TINY), *corpora, **environment)
  refused(again, 'must not hold finished shards')
  nowhere = [*MAKE, '--output_dir=gs://no-such-bucket/shards']
  done = command('make_shards', *nowhere, *gin(*TINY), *corpora, **environment)
  refused(done, 'no-such-bucket', code=74)
  assert not (folder / 'no').exists()
