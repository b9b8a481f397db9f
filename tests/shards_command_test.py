"""make_shards, and training from shards, as users meet them: whole, killed, refused."""

import json
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from commands import ROOT, TINY, command, gin, in_process, refused, snapshot, start

from glm_jax.data.rows import shards

MAKE = ['--gin_file=gin_configs/glm_tiny.gin', '--shards=4']


def _text(folder, count=60):
  (folder / 'text').mkdir()
  for number in range(count):
    words = ' '.join(f'word{number * 7 % k}' for k in range(2, 40))
    (folder / 'text' / f'{number:02}.txt').write_text(f'Document {number}: {words}.\n')


def _places(folder, text='text/*.txt'):
  return gin(
    *TINY,
    f"CorpusConfig.corpus='{folder}/{text}'",
    f"CorpusConfig.cache_dir='{folder}/cache'",
    f"MODEL_DIR='{folder}/run'",
  )


def _make(folder, *arguments, text='text/*.txt', run=in_process, **more):
  flags = [*MAKE, f'--output_dir={folder}/shards', *_places(folder, text), *arguments]
  return run('make_shards', *flags, **more)


@pytest.fixture
def corpus(tmp_path):
  _text(tmp_path)
  return tmp_path


@pytest.fixture(scope='session')
def made(tmp_path_factory):
  """Shards that nobody may change."""
  folder = tmp_path_factory.mktemp('made')
  _text(folder)
  done = _make(folder, run=command)
  assert done.returncode == 0, done.stderr
  assert 'corpus="\'shards:' in done.stdout and 'rows of' in done.stdout
  return folder


def _train(made, *bindings, code=65, words=()):
  """Trains from shards; refused, it leaves everything as it was."""
  before = snapshot(made)
  places = [f"CorpusConfig.corpus='shards:{made}/shards'", f"MODEL_DIR='{made}/run'"]
  done = in_process(
    'train', '--gin_file=gin_configs/glm_tiny.gin', *gin(*TINY, *places, *bindings)
  )
  refused(done, *words, code=code)
  assert snapshot(made) == before


def _copy(made, tmp_path):
  shutil.copytree(made / 'shards', tmp_path / 'shards')
  return tmp_path


def _edit(path, change):
  index = json.loads(path.read_text())
  change(index)
  path.write_text(json.dumps(index))


def test_an_altered_shard_is_refused_by_name(made, tmp_path):
  folder = _copy(made, tmp_path)
  path = folder / 'shards' / 'train-00002-of-00004.tfrecord'
  data = bytearray(path.read_bytes())
  data[40] ^= 1
  path.write_bytes(data)
  _train(folder, words=('train-00002-of-00004.tfrecord', 'SHA-256', 'altered'))


@pytest.mark.slow
@pytest.mark.parametrize(
  'spoil,words',
  [
    (
      lambda f: os.truncate(f / 'train-00001-of-00004.tfrecord', 100),
      ('train-00001-of-00004.tfrecord', 'bytes', '100'),
    ),
    (
      lambda f: _edit(
        f / 'index.json',
        lambda i: i['splits']['train']['files'][0].update(name='../../etc/passwd'),
      ),
      ('of its own folder', '../../etc/passwd'),
    ),
    (
      lambda f: _edit(
        f / 'index.json', lambda i: i['vocabulary'].update(fingerprint='0123')
      ),
      ('of the vocabulary of the run', '0123 there'),
    ),
    (lambda f: (f / 'index.json').unlink(), ('must hold index.json', 'make_shards')),
  ],
)
def test_damaged_shards_are_refused(made, tmp_path, spoil, words):
  folder = _copy(made, tmp_path)
  spoil(folder / 'shards')
  _train(folder, words=words)


@pytest.mark.slow
@pytest.mark.parametrize(
  'bindings,words',
  [
    (["TASK_FEATURE_LENGTHS={'tokens':32}"], ('must fit the rows', 'rows of')),
    (['BATCH_SIZE=4096'], ('BATCH_SIZE=4096', 'rows')),
    (
      ["MixtureConfig.corpora={'a':'shards:x'}", "MixtureConfig.rates={'a':-1.0}"],
      ('rates', '-1.0'),
    ),
    (
      ["MixtureConfig.corpora={'a':'shards:x'}", "MixtureConfig.rates={'a':0.0}"],
      ('rates', '0.0'),
    ),
    (
      ['ObjectiveConfig.schedule=((0,1,1,0,0),(2,-1,1,1,1))'],
      ('ObjectiveConfig.schedule', '2'),
    ),
  ],
)
def test_what_does_not_fit_the_shards_is_refused(made, bindings, words):
  own = ['ObjectiveConfig.document=0.0', 'ObjectiveConfig.sentence=0.0']
  _train(made, *own, *bindings, words=words)


def test_finished_shards_are_not_written_over(made):
  before = snapshot(made)
  refused(_make(made), 'must not hold finished shards', 'choose another folder')
  assert snapshot(made) == before


@pytest.mark.slow
def test_killed_while_it_works_it_goes_on_to_the_same_bytes(tmp_path):
  folders = [tmp_path / name for name in ('killed', 'straight')]
  for folder in folders:
    folder.mkdir()
  lines = [
    json.dumps({'text': f'Text {n}. ' + 'many words of it ' * (n % 50 + 200)})
    for n in range(3000)
  ]
  (tmp_path / 'text.jsonl').write_text('\n'.join(lines))
  flags = ['--part_mb=1', '--processes=2']
  places = gin(
    *TINY,
    f"CorpusConfig.corpus='{tmp_path}/text.jsonl'",
    f"MODEL_DIR='{tmp_path}/run'",
  )

  def output(folder):
    return f'--output_dir={folder}/shards'

  def make(folder):
    output = f'--output_dir={folder}/shards'
    return start('make_shards', *MAKE, *flags, *places, output)

  kills, work = 0, folders[0] / 'shards' / 'unfinished'
  for wanted in (2, 6):
    process = make(folders[0])
    while process.poll() is None and len([*work.glob('part-*')]) < wanted:
      time.sleep(0.002)
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      kills += 1
    process.communicate()
  assert kills >= 2 and not (folders[0] / 'shards' / 'index.json').exists()
  times = {path.name: path.stat().st_mtime_ns for path in work.glob('part-*')}
  others = [*MAKE, '--shards=5', *flags, *places, output(folders[0])]
  other = in_process('make_shards', *others)
  refused(other, 'gone on with by the same job', 'set them back')
  # What was done is not done again.
  process = make(folders[0])
  while process.poll() is None:
    for path in work.glob('part-*'):
      try:
        assert times.get(path.name) in (None, path.stat().st_mtime_ns)
      except FileNotFoundError:
        pass
    time.sleep(0.05)
  output, _ = process.communicate()
  assert process.returncode == 0, output
  assert make(folders[1]).wait(300) == 0
  contents = [
    {path.name: path.read_bytes() for path in (folder / 'shards').iterdir()}
    for folder in folders
  ]
  assert contents[0] == contents[1] and len(contents[0]) == 4 + 1 + 2


def _lines(*texts):
  return ''.join(json.dumps({'text': text}) + '\n' for text in texts).encode()


MANY = [f'Document {n} says something that is long enough.' for n in range(40)]
BAD = [
  ('bytes.jsonl', _lines(*MANY) + b'{"text": "\xff"}\n', ('bytes.jsonl', '0xff')),
  ('line.jsonl', _lines(*MANY) + b'no json\n', ('line.jsonl line 41',)),
  (
    'surrogate.jsonl',
    _lines(*MANY[:8]) + b'{"text": "\\ud800"}\n' + _lines(*MANY[8:]),
    ('lone surrogate', 'surrogate.jsonl line 9'),
  ),
]
RUNNERS = (['--processes=1'], ['--processes=2'], ['--runner=beam'])


@pytest.mark.slow
@pytest.mark.parametrize('bad,runner', [*zip(BAD, RUNNERS, strict=True)])
def test_text_that_cannot_be_read_is_named_by_every_runner(tmp_path, bad, runner):
  name, content, words = bad
  (tmp_path / name).write_bytes(content)
  refused(_make(tmp_path, *runner, text=name), *words)
  assert not (tmp_path / 'shards' / 'index.json').exists()


@pytest.mark.slow
def test_odd_text_is_read_as_it_is(tmp_path):
  """A byte-order mark, NULs, empty lines, a line of 10 MB and Windows' line ends."""
  long = 'long line ' * 10**6
  odd = ['NUL \0 inside it', long, 'emoji 🙂 and 中文', '', '  ']
  content = b'\xef\xbb\xbf' + _lines(*odd, *MANY).replace(b'\n', b'\r\n\r\n')
  (tmp_path / 'odd.jsonl').write_bytes(content)
  held = gin('CorpusConfig.validation_fraction=0.02')
  done = _make(tmp_path, '--part_mb=1', *held, text='odd.jsonl')
  assert done.returncode == 0, done.stderr
  found = shards.load(str(tmp_path / 'shards'))
  vocabulary = shards.vocabulary_of(str(tmp_path / 'shards'))
  rows = [split.read() for split in found.values()]
  kept = [text for text in odd + MANY if len(text.encode()) > 1]
  # Rows only cut texts, whose bytes are the tokens below 256.
  spelled = sum(
    int((table.tokens[np.arange(54) < table.lengths[:, None]] < 256).sum())
    for table in rows
  )
  assert spelled == sum(len(text.encode()) for text in kept)
  text = ''.join(
    vocabulary.decode(row[:n].tolist())
    for table in rows
    for row, n in zip(table.tokens, table.lengths, strict=True)
  )
  assert '\0' in text
  assert '\ufeff' not in text
  assert text.count('long line ') > 800_000  # rows, which are shuffled, cut the others
  assert sum(split.stats['documents'] for split in found.values()) == len(kept)


@pytest.mark.slow
def test_wrong_flags_and_missing_extras_are_one_message(corpus, monkeypatch):
  before = snapshot(corpus)
  with monkeypatch.context() as without:
    without.setitem(sys.modules, 'apache_beam', None)
    refused(_make(corpus, '--runner=beam'), "pip install -e '.[beam]'")
  refused(_make(corpus, '--shards=0'), '--shards must be 1 or more', '0')
  refused(_make(corpus, text='nowhere/*.txt'), 'matches no file')
  refused(_make(corpus, *gin("CorpusConfig.corpus='shards:x'")), 'make_shards reads text')
  refused(_make(corpus, *gin("CorpusConfig.corpus='task:x'")), "'x'", '--import')
  (corpus / 'file').write_text('')
  in_a_file = _make(corpus, f'--output_dir={corpus}/file/shards')
  refused(in_a_file, 'file', code=74)
  (corpus / 'file').unlink()
  assert snapshot(corpus) == before


@pytest.mark.slow
def test_texts_of_a_task_of_ones_own_become_shards(tmp_path):
  (tmp_path / 'own.py').write_text("""
import seqio, tensorflow as tf

def source(split, shuffle_files, seed=None):
  texts = [f'Text number {n} of a task.' for n in range(64)]
  return tf.data.Dataset.from_tensor_slices({'body': texts})

seqio.TaskRegistry.add(
  'own_text', source=seqio.FunctionDataSource(source, splits=('train',)),
  preprocessors=[], output_features={})
""")
  arguments = ['--import=own', *gin("CorpusConfig.corpus='task:own_text'")]
  arguments += gin("CorpusConfig.text_key='body'")
  path = f'{tmp_path}:{ROOT}'
  done = _make(tmp_path, *arguments, '--processes=2', PYTHONPATH=path)
  assert done.returncode == 0, done.stderr
  assert 'cuInit' not in done.stderr  # a worker's TensorFlow looks for no GPU
  found = shards.load(str(tmp_path / 'shards'))
  assert sum(split.stats['documents'] for split in found.values()) == 64
  wrong = [a.replace("'body'", "'text'") for a in arguments]
  again = _make(tmp_path, *wrong, f'--output_dir={tmp_path}/again', PYTHONPATH=path)
  refused(again, 'CorpusConfig.text_key', "['body']")


@pytest.mark.slow
def test_stored_rows_are_those_of_the_text(made):
  """What a reader of the format alone, without this package, would find."""
  folder = made / 'shards'
  index = json.loads((folder / 'index.json').read_text())
  N, size = index['row_length'], index['token_bytes']
  record = 12 + 4 + N * size + 2 * -(-N // 8) + 4  # as TFRecord frames it
  text = b''
  for file in index['splits']['train']['files']:
    data = np.fromfile(folder / file['name'], np.uint8).reshape(file['rows'], record)
    tokens = data[:, 16 : 16 + N * size].copy().view('<u2')
    lengths = data[:, 12:16].copy().view('<i4')[:, 0]
    text += b''.join(
      bytes(t for t in row[:n] if t < 256)
      for row, n in zip(tokens.tolist(), lengths, strict=True)
    )
  assert text.count(b'Document ') > 40
