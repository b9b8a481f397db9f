"""Shards in Google Cloud Storage: made, checked and trained from, as on a local disk."""

import itertools
import json
import re
import subprocess
import sys

import gcs
import numpy as np
import pytest
import spy
from commands import ROOT, TINY, command, gin, in_process, refused
from commands import environment as command_environment
from etils import epath

from glm_jax.data import pipeline, prepare
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.rows import shards
from glm_jax.data.rows.table import RowPlan, make_rows
from glm_jax.text.vocabulary import ByteVocabulary

pytestmark = pytest.mark.slow

STEPS, ROWS = 4, 32
MAKE = ['--gin_file=gin_configs/glm_tiny.gin', '--shards=4', '--part_mb=1']
TEXT = ''.join(
  json.dumps({'text': f'Document {n}: ' + 'some words of its own. ' * (n % 30 + 1)}) + '\n'
  for n in range(4000)
).encode()


@pytest.fixture(scope='session')
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
    # As of a large corpus: a small one is fetched whole.
    name, path = 'bucket/made/shards/index.json', folder / 'shards' / 'index.json'
    objects[name] = objects[name].replace(b'"block": 1,', b'"block": 32,')
    path.write_text(path.read_text().replace('"block": 1,', '"block": 32,'))
    yield folder, objects, environment, requests


def _train(storage, corpus, name, *arguments, run=command, **more):
  folder, _, environment, _ = storage
  places = gin(f"CorpusConfig.corpus='{corpus}'", f"MODEL_DIR='{folder}/{name}'")
  steps = gin(f'TRAIN_STEPS={STEPS}', f'BATCH_SIZE={ROWS}')
  flags = ['--gin_file=gin_configs/glm_tiny.gin', *gin(*TINY), *places, *steps]
  return run('train', *flags, *arguments, **environment, **more)


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
  before = len(requests)
  flags = ['--import=spy', *gin('CorpusConfig.verify=False')]
  path = f'{ROOT}:{ROOT}/tests'
  seen = {'SEEN': f'{folder}/seen', 'PYTHONPATH': path}
  done = _train(storage, 'shards:gs://bucket/made/shards', 'cloud', *flags, **seen)
  assert done.returncode == 0, done.stderr
  reads = [r for r in requests[before:] if '.tfrecord bytes=' in r]
  # Rows lie together in runs: there are fewer requests than rows, none of them large.
  ranges = [re.search(r'bytes=(\d+)-(\d+)', read) for read in reads]
  assert max(int(r[2]) - int(r[1]) for r in ranges) < 2**18
  assert 0 < len(reads) < 350  # of some 2,700 rows
  # What is read from the disk, bit for bit.
  before, length = len(requests), {'tokens': 64}
  config = ObjectiveConfig(blank=0.5, document=0.3, sentence=0.2)
  corpus = CorpusConfig(corpus=f'shards:{folder}/shards')
  prepare.prepare('glm_mixture', length, corpus, VocabularyConfig(), config)
  stream = pipeline.Stream('glm_mixture', length, batch_size=ROWS, seed=0)
  batches = itertools.islice(stream, STEPS)
  wanted = [spy.line(batch, row) for batch in batches for row in range(ROWS)]
  assert (folder / 'seen').read_text().splitlines() == wanted
  assert len(requests) == before


_READ = """
import sys, numpy as np
from glm_jax.data.rows import records, shards
import tensorflow as tf
rows = shards.load(sys.argv[1])['train']
first = len(rows) - 64
read = records.reader(rows)(tf.range(first, first + 32, dtype=tf.int64)).numpy()
assert (read == rows.layout.encode(rows.read(first, 32))).all()
"""


def test_a_run_of_rows_is_one_request_wherever_it_lies(storage, tmp_path):
  """Reading from the beginning of a file would be quadratic, and 64 MB at once, wrong."""
  _, objects, environment, requests = storage
  vocabulary, plan = ByteVocabulary(), RowPlan(513)
  rng = np.random.default_rng(0)
  texts = [(np.zeros(0, int), rng.integers(0, 256, 510)) for _ in range(4000)]
  table = make_rows(texts, vocabulary.prefix, vocabulary.specials.eos, plan)
  layout = shards.layout_of(vocabulary, 513)
  folder = epath.Path(tmp_path)
  file = shards.write_file(folder / shards.file_name('train', 0, 1), layout.encode(table))
  shards.write_index(folder, vocabulary, plan, 32, {'train': {'files': [file]}}, {})
  for path in folder.iterdir():
    objects[f'bucket/large/{path.name}'] = path.read_bytes()
  before = len(requests)
  subprocess.run(
    [sys.executable, '-c', _READ, 'gs://bucket/large'],
    cwd=ROOT,
    env=command_environment(**environment),
    check=True,
    capture_output=True,
  )
  offsets = [
    int(found[1])
    for request in requests[before:]
    if (found := re.search(r'tfrecord bytes=(\d+)', request))
  ]
  wanted = (len(table.lengths) - 64) * layout.stride
  # The second is the comparison's.
  assert len(offsets) <= 3 and all(wanted - 2**19 < at <= wanted for at in offsets)


def test_what_is_wrong_in_the_cloud_is_named(storage):
  folder, objects, environment, _ = storage
  name = 'bucket/made/shards/train-00001-of-00004.tfrecord'
  whole = objects[name]
  corpus = 'shards:gs://bucket/made/shards'
  try:
    objects[name] = whole[:-5]
    refused(_train(storage, corpus, 'no'), f'gs://{name}', 'bytes')
    objects[name] = whole[:-5] + b'\0\1\2\3\4'
    refused(_train(storage, corpus, 'no'), f'gs://{name}', 'SHA-256')
  finally:
    objects[name] = whole
  none = _train(storage, 'shards:gs://bucket/none', 'no', run=in_process)
  refused(none, 'must hold index.json')
  flags = [*MAKE, '--output_dir=gs://bucket/made/shards']
  corpora = gin("CorpusConfig.corpus='gs://bucket/text/*.jsonl'", "MODEL_DIR='x'")
  again = in_process('make_shards', *flags, *gin(*TINY), *corpora, **environment)
  refused(again, 'must not hold finished shards')
  nowhere = [*MAKE, '--output_dir=gs://no-such-bucket/shards']
  done = in_process('make_shards', *nowhere, *gin(*TINY), *corpora, **environment)
  refused(done, 'a bucket that there is', 'gs://no-such-bucket')
  assert not (folder / 'no').exists()
