"""SuperGLUE of TFDS beside the folders that the benchmark publishes."""

import copy
import dataclasses
import json
import socket
from unittest import mock

import pytest
import stored
import tensorflow_datasets as tfds
from commands import gin, in_process, refused
from published import LINES

from glm_jax.data.corpora import super_glue
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.evaluation import cloze as clozes
from glm_jax.evaluation.patterns import PATTERNS
from glm_jax.models import GLMConfig

# Data set: the benchmark that it is read as, and the folder as it is published.
SETS = {
  'boolq': ('boolq', 'BoolQ'),
  'cb': ('cb', 'CB'),
  'copa': ('copa', 'COPA'),
  'multirc': ('multirc', 'MultiRC'),
  'record': ('record', 'ReCoRD'),
  'rte': ('rte', 'RTE'),
  'wic': ('wic', 'WiC'),
  'wsc.fixed': ('wsc_words', 'WSC'),
}
# Fields that the builder asks for and no pattern reads.
MORE = {
  'wic': dict.fromkeys(('start1', 'start2', 'end1', 'end2'), 0),
}


def _numbered(line, number):
  """A line with the numbers that the benchmark gives its questions and answers."""
  line = copy.deepcopy(line)
  line['idx'] = number
  if 'questions' in (passage := line.get('passage', {})):
    for i, question in enumerate(passage['questions']):
      question['idx'] = i
      for j, answer in enumerate(question['answers']):
        answer['idx'] = 10 * number + j
  for i, asked in enumerate(line.get('qas', [])):
    asked['idx'] = 10 * number + i
  return line


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp('super_glue')
  for name, (benchmark, published) in SETS.items():
    line = copy.deepcopy(LINES[benchmark][0]) | MORE.get(name, {})
    if name == 'multirc':
      line['passage']['questions'][0]['answers'].append({'text': 'blue', 'label': 0})
    lines = [_numbered(line, number) for number in range(8)]
    (folder / published).mkdir()
    for split in ('train', 'val', 'test'):
      if (name, split) == ('boolq', 'test'):
        # As the benchmark has it.
        [line.pop('label') for line in lines]
      text = ''.join(json.dumps(line) + '\n' for line in lines)
      (folder / published / f'{split}.jsonl').write_text(text)
    with mock.patch.object(
      tfds.download.DownloadManager,
      'download_and_extract',
      lambda self, url: folder,
    ):
      builder = tfds.builder(f'super_glue/{name}', data_dir=folder / 'tfds')
      builder.download_and_prepare()
  sizes = dict(num_layers=1, hidden_size=32, num_heads=4, vocab_size=384)
  stored.checkpoint(folder / 'base', GLMConfig(**sizes, max_positions=160))
  return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  def refuse(*_):
    raise AssertionError('a test asked the network')

  monkeypatch.setattr(socket.socket, 'connect', refuse)


def _config(place, name):
  return CorpusConfig(corpus=f'tfds:super_glue/{name}', tfds_data_dir=str(place / 'tfds'))


@pytest.mark.parametrize('name', SETS)
@pytest.mark.parametrize('split', ['train', 'val'])
def test_examples_are_those_of_the_folder(place, name, split):
  benchmark, published = SETS[name]
  pattern = PATTERNS[benchmark]
  lines = super_glue.lines(_config(place, name))
  # Only what a place is called differs; TFDS shuffles what it stores.
  plain = lambda source: sorted(
    str(dataclasses.replace(example, group=''))
    for _, example in clozes.examples(source, pattern, split)
  )
  assert plain(lines) == plain(place / published)


def test_answers_of_a_question_stay_one_question(place):
  lines = super_glue.lines(_config(place, 'multirc'))
  found = [e for _, e in clozes.examples(lines, PATTERNS['multirc'], 'val')]
  groups = [example.group for example in found]
  assert len(found) == 16 and len({*groups}) == 8
  assert all(groups.count(group) == 2 for group in groups)


def _train(place, data, benchmark, *more):
  places = [
    f"MODEL_DIR='{place}/run'",
    f"INIT_FROM='{place}/base'",
    f"CORPUS='{data}'",
    f"BENCHMARK='{benchmark}'",
    f"CorpusConfig.cache_dir='{place}/cache'",
    f"CorpusConfig.tfds_data_dir='{place}/tfds'",
    "TASK_FEATURE_LENGTHS={'tokens': 320}",
    "ComputeConfig.dtype='float32'",
    'BATCH_SIZE=4',
    'TRAIN_STEPS=2',
    'EvaluationConfig.every=2',
    'OptimizerConfig.warmup_steps=1',
  ]
  return in_process('train', '--gin_file=gin_configs/runs/cloze.gin', *gin(*places, *more))


@pytest.mark.slow
def test_a_data_set_is_learnt_and_judged(place):
  done = _train(place, 'tfds:super_glue/boolq', 'boolq')
  assert done.returncode == 0, done.stderr
  tables = []
  for number, source in enumerate(('tfds:super_glue/boolq', place / 'BoolQ')):
    done = in_process(
      'evaluate',
      f'--checkpoint={place}/run',
      '--task=boolq',
      f'--input={source}',
      f'--output={place}/said{number}.jsonl',
      f'--tfds_data_dir={place}/tfds',
    )
    assert done.returncode == 0, done.stderr
    tables.append(json.loads((place / f'said{number}.json').read_text())['table'])
  assert tables[0] == tables[1] and tables[0][0]['examples'] == 8


REFUSED = [
  ('tfds:super_glue/axb', 'rte', ['must be a TFDS data set that is prepared']),
  ('tfds:super_glue/boolq', 'rte', ['must have the fields', 'the data set of rte']),
  ('tfds:super_glue/wsc.fixed', 'wsc', ['its field "candidates"', 'wsc_words']),
]


@pytest.mark.parametrize('data,benchmark,words', REFUSED)
def test_what_is_not_there_is_refused(place, data, benchmark, words):
  refused(_train(place, data, benchmark), *words)


def test_examples_without_labels_are_refused(place):
  lines = super_glue.lines(_config(place, 'boolq'))
  with pytest.raises(ValueError, match='an example must have a label'):
    [*lines('test')]
  with pytest.raises(ValueError, match="must have the split 'dev'"):
    [*lines('dev')]
  done = in_process(
    'evaluate',
    f'--checkpoint={place}/base',
    '--task=perplexity',
    '--input=tfds:super_glue/boolq',
  )
  refused(done, 'must be asked as a cloze')
