"""Shards: what is written is what is read, by any runner, whole or not at all."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf
from etils import epath

from glm_jax.data import pipeline
from glm_jax.data.corpora import parts
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.making import beam, shard_job, shard_runner, tokenized
from glm_jax.data.making.order import Order
from glm_jax.data.rows import records, shards
from glm_jax.data.rows.table import RowPlan, RowTable, make_rows
from glm_jax.data.stream import hashing, stateless
from glm_jax.text.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary()
PLAN = RowPlan(33)


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
  """120 documents in two .jsonl files and some .txt files; prompts, Chinese, odd bytes."""
  folder = tmp_path_factory.mktemp('text')
  rng = np.random.default_rng(0)
  lines = []
  for number in range(100):
    text = f'第{number}篇。' + ' '.join(
      map(str, rng.integers(0, 10**6, rng.integers(1, 40)))
    )
    fields = {'text': text} if number % 3 else {'text': text, 'prompt': f'Q{number}'}
    lines.append(
      json.dumps(fields, ensure_ascii=bool(number % 2)) + '\n' * (1 + number % 2)
    )
  (folder / 'a.jsonl').write_text('\ufeff' + ''.join(lines[:60]), encoding='utf-8')
  (folder / 'b.jsonl').write_text(''.join(lines[60:]).rstrip('\n'), encoding='utf-8')
  for number in range(20):
    (folder / f'{number:02}.txt').write_text(f'Text {number}\0 with a NUL. ' * (1 + number))
  (folder / 'empty.txt').write_text('')
  return CorpusConfig(
    corpus=str(folder / '*.[tj]*'),
    cache_dir=str(folder / 'cache'),
    validation_fraction=0.2,
  )


def _job(corpus, count=5, plan=PLAN, part_bytes=700):
  todo = parts.find(corpus, part_bytes)
  return shard_job.of_config(corpus, VOCABULARY, plan, todo, count=count, imports=())


@pytest.fixture(scope='session')
def made(corpus, tmp_path_factory):
  folder = epath.Path(tmp_path_factory.mktemp('made') / 'shards')
  job = _job(corpus)
  shard_runner.run(job, folder, parts.find(corpus, 700), 1)
  return folder


def _documents(corpus, part_bytes):
  return [d for part in parts.find(corpus, part_bytes) for d in parts.read(corpus, part)]


def _content(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_parts_of_any_size_hold_the_same_documents(corpus):
  whole = _documents(corpus, 10**9)
  assert len(whole) == 121  # an empty file is an empty document
  for size in (1, 7, 100, 3000):
    assert _documents(corpus, size) == whole
    assert len(parts.find(corpus, size)) > 1


def test_a_document_is_held_out_by_its_text_alone(corpus):
  splits = {document.text: split for split, document in _documents(corpus, 500)}
  share = sum(split == 'validation' for split in splits.values()) / len(splits)
  assert 0.08 < share < 0.35
  fewer = dataclasses.replace(corpus, validation_fraction=0.05)
  for split, document in _documents(fewer, 500):
    assert split == 'train' or splits[document.text] == 'validation'


def test_shards_hold_every_token_once_in_the_order_of_the_text(made, corpus):
  for split, found in shards.load(str(made)).items():
    table = found.read()
    count, want = 0, []
    for part in parts.find(corpus, 700):
      chosen = [d for s, d in parts.read(corpus, part) if s == split]
      encoded = [
        (np.array(list(d.prompt.encode())), np.array(list(d.text.encode())))
        for d in chosen
        if d.text and len((d.prompt + d.text).encode()) > 1
      ]
      count += len(encoded)
      own = make_rows(encoded, VOCABULARY.prefix, VOCABULARY.specials.eos, PLAN)
      want += [own.tokens[i].tobytes() for i in range(len(own.lengths))]
    got = [row.tobytes() for row in table.tokens]
    assert got == want
    assert found.stats['documents'] == count
    inside = np.arange(33) < table.lengths[:, None]
    assert (table.tokens[~inside] == 0).all() and not table.scored[~inside].any()
    np.testing.assert_array_equal(
      table.starts, inside & (table.tokens == VOCABULARY.prefix)
    )


def test_processes_change_nothing_and_the_number_of_shards_no_order(made, corpus, tmp_path):
  todo = parts.find(corpus, 700)
  shard_runner.run(_job(corpus), epath.Path(tmp_path / 'two'), todo, 2)
  assert _content(epath.Path(tmp_path / 'two')) == _content(made)
  shard_runner.run(_job(corpus, count=3), epath.Path(tmp_path / 'three'), todo, 1)
  one, other = (shards.load(str(f))['train'].read() for f in (made, tmp_path / 'three'))
  np.testing.assert_array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize('count', [1, 2, 7, 16])
@pytest.mark.parametrize('small', [True, False])
def test_shards_are_cut_from_one_order(small, count):
  """A small corpus keeps that of its text; every shard has its share of a large one."""
  order, sizes = Order(small=small, parts=5), [40, 0, 7, 1, 300]
  keys = [order.keys(n, part, 0) for part, n in enumerate(sizes)]
  every = np.concatenate(keys)
  assert len({*every.tolist()}) == sum(sizes)
  ranks = np.argsort(np.argsort(every))
  assert (ranks == np.arange(sum(sizes))).all() == small
  shard = np.concatenate([order.shards(k, count) for k in keys])
  assert (np.diff(shard[np.argsort(every)]) >= 0).all()
  assert shard.min() >= 0 and shard.max() < count
  if not small and count <= 7:
    assert np.bincount(shard, minlength=count).min() > 0.5 * sum(sizes) / count
  other = Order(small=small, parts=5).keys(40, 0, 1)
  assert (other == keys[0]).all() == small


def test_the_rows_of_a_large_corpus_are_shuffled_when_they_are_written(
  corpus, made, tmp_path
):
  job = dataclasses.replace(_job(corpus), order=Order(small=False, parts=9))
  shard_runner.run(job, epath.Path(tmp_path), parts.find(corpus, 700), 1)
  one, other = (shards.load(str(f))['train'] for f in (made, tmp_path))
  assert (one.block, other.block) == (1, 32)
  rows = [[*map(bytes, found.read().tokens)] for found in (one, other)]
  assert rows[0] != rows[1] and sorted(rows[0]) == sorted(rows[1])


def test_a_runs_cache_has_the_rows_of_shards_in_their_order(corpus, tmp_path):
  todo = parts.find(corpus, parts.PART_BYTES)
  job = _job(corpus, part_bytes=parts.PART_BYTES)
  shard_runner.run(job, epath.Path(tmp_path), todo, 1)
  for split, stored in shards.load(str(tmp_path)).items():
    cached = tokenized.cached_rows(corpus, VOCABULARY, split, PLAN)
    for ours, theirs in zip(cached.read(), stored.read(), strict=True):
      np.testing.assert_array_equal(ours, theirs)
    assert cached.block == stored.block
    assert {k: cached.stats[k] for k in shards.COUNTS} == {
      k: stored.stats[k] for k in shards.COUNTS
    }


def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(
  made, corpus, tmp_path, monkeypatch
):
  """Dies at every write in turn: each call does one more thing."""
  folder = epath.Path(tmp_path / 'shards')
  todo, write = parts.find(corpus, 3000), shards.write_atomically
  budget = [0]

  def dies(path, data):
    budget[0] -= 1
    if budget[0] < 0:
      (path.parent / f'.{path.name}.1.dead').write_bytes(b'half of')
      raise KeyboardInterrupt
    write(path, data)

  monkeypatch.setattr(shards, 'write_atomically', dies)
  for _ in range(100):
    budget[0] = 2
    try:
      shard_runner.run(_job(corpus), folder, todo, 1)
      break
    except KeyboardInterrupt:
      assert not (folder / shards.INDEX).exists()
      with pytest.raises(ValueError, match='run make_shards again'):
        shards.load(str(folder))
  monkeypatch.undo()
  straight = epath.Path(tmp_path / 'straight')
  shard_runner.run(_job(corpus), straight, todo, 1)
  assert _content(folder) == _content(straight)
  assert sorted(p.name for p in folder.iterdir()) == sorted(
    p.name for p in straight.iterdir()
  )


def test_finished_and_foreign_folders_are_refused(made, corpus, tmp_path):
  todo = parts.find(corpus, 700)
  before = _content(made)
  with pytest.raises(ValueError, match='must not hold finished shards'):
    shard_runner.run(_job(corpus), made, todo, 1)
  assert _content(made) == before
  (tmp_path / 'thesis.txt').write_text('precious')
  with pytest.raises(ValueError, match=r'new or empty.*thesis\.txt'):
    shard_runner.run(_job(corpus), epath.Path(tmp_path), todo, 1)
  unfinished = epath.Path(tmp_path / 'unfinished')
  shard_runner._begin(_job(corpus), unfinished)
  with pytest.raises(ValueError, match='by the same job'):
    shard_runner.run(_job(corpus, count=6), unfinished, todo, 1)


@pytest.mark.parametrize(
  'spoil,message',
  [
    (
      lambda f: (f / 'train-00002-of-00005.tfrecord').write_bytes(b'short'),
      'train-00002.*bytes',
    ),
    (lambda f: (f / 'train-00001-of-00005.tfrecord').unlink(), 'train-00001.*no such file'),
    (lambda f: _edit(f, lambda i: i.pop('plan')), 'lacks or spoils'),
    (lambda f: _edit(f, lambda i: i.update(format=9)), 'format 9'),
    (lambda f: _edit(f, lambda i: i.update(block=0)), 'spoils a size, 0'),
    (lambda f: _edit(f, lambda i: i.update(block=10**30)), 'spoils a size'),
    (lambda f: _edit(f, lambda i: i['plan'].update(positions=-1)), 'spoils a size, -1'),
    (lambda f: _edit(f, lambda i: i.update(splits={})), "spoils 'splits'"),
    (lambda f: _name(f, 7), 'spoils a file'),
    (lambda f: _name(f, '../train-00000-of-00005.tfrecord'), 'of its own folder'),
    (lambda f: _name(f, '/etc/passwd'), 'of its own folder'),
    (lambda f: _name(f, '..'), 'of its own folder'),
    (lambda f: (f / 'index.json').write_text('{"form'), 'must be readable JSON'),
    (lambda f: (f / 'index.json').write_text('[]'), 'must be a JSON object'),
    (lambda f: _edit(f, lambda i: i['vocabulary'].update(fingerprint='x')), 'vocabulary'),
  ],
)
def test_damaged_and_strange_shards_are_named(made, tmp_path, spoil, message):
  folder = tmp_path / 'copy'
  shutil.copytree(made, folder)
  spoil(folder)
  with pytest.raises(ValueError, match=message):
    shards.load(str(folder), VOCABULARY)


def test_an_index_without_a_vocabulary_is_named(made, tmp_path):
  shutil.copytree(made, tmp_path / 'copy')
  _edit(tmp_path / 'copy', lambda index: index.update(vocabulary=[7]))
  with pytest.raises(ValueError, match='must be the vocabulary that index.json names'):
    shards.vocabulary_of(str(tmp_path / 'copy'))


def test_one_altered_byte_is_found_by_the_process_whose_part_it_is(made, tmp_path):
  folder = tmp_path / 'copy'
  shutil.copytree(made, folder)
  path = folder / 'train-00003-of-00005.tfrecord'
  data = bytearray(path.read_bytes())
  data[17] ^= 1
  path.write_bytes(data)
  found = shards.load(str(folder))['train']
  wrong = 0
  for part in range(2):
    try:
      shards.verify(found, part, 2)
    except ValueError as error:
      wrong += 1
      assert 'train-00003-of-00005.tfrecord' in str(error) and 'SHA-256' in str(error)
  assert wrong == 1
  whole = shards.load(str(made))['train']
  size = sum(len(v) for k, v in _content(made).items() if k.startswith('train'))
  assert sum(shards.verify(whole, part, 3) for part in range(3)) == size


def _edit(folder, change):
  index = json.loads((folder / 'index.json').read_text())
  change(index)
  (folder / 'index.json').write_text(json.dumps(index))


def _name(folder, name):
  def change(index):
    index['splits']['train']['files'][0]['name'] = name

  _edit(folder, change)


@pytest.mark.parametrize('token_bytes', [2, 4])
def test_records_come_back_in_numpy_and_tensorflow(token_bytes):
  rng = np.random.default_rng(0)
  for N in (8, 13, 64):
    layout = shards.RecordLayout(N, token_bytes)
    table = RowTable(
      tokens=rng.integers(0, 2**16 if token_bytes == 2 else 2**31 - 1, (20, N)).astype(
        'i4'
      ),
      scored=rng.random((20, N)) < 0.5,
      starts=rng.random((20, N)) < 0.1,
      lengths=rng.integers(0, N + 1, 20).astype('i4'),
    )
    encoded = layout.encode(table)
    assert encoded.shape == (20, layout.record_bytes)
    decoded = records.decode(tf.constant(encoded), layout)
    for name, value in layout.decode(encoded)._asdict().items():
      np.testing.assert_array_equal(value, getattr(table, name))
      np.testing.assert_array_equal(decoded[name].numpy(), value)


def test_runs_of_files_are_read_as_mapped_memory_is(made, monkeypatch):
  found = shards.load(str(made))['train']
  mapped = records.reader(found)
  monkeypatch.setattr(records, '_MOST_MAPPED', 0)
  runs = records.reader(found)
  all_rows = found.layout.encode(found.read())
  rng = np.random.default_rng(0)
  n = len(found)
  for numbers in (
    np.arange(n),
    np.arange(n)[::-1].copy(),
    rng.integers(0, n, 40),
    np.r_[5:9, 5:9, n - 1, 0, 1],
    np.zeros(0, np.int64),
  ):
    for read in (mapped, runs):
      got = read(tf.constant(numbers, tf.int64)).numpy()
      np.testing.assert_array_equal(got, all_rows[numbers])


def test_files_are_tfrecords_for_everyone(made):
  found = shards.load(str(made))['train']
  paths = [str(made / file.name) for file in found.files]
  stored = [*tf.data.TFRecordDataset(paths).as_numpy_iterator()]  # compares checksums
  assert stored == [row.tobytes() for row in found.layout.encode(found.read())]


def test_a_record_altered_after_the_start_is_not_trained_on(corpus, made, tmp_path):
  """Where files are not mapped, each record is compared with its checksum."""
  shutil.copytree(made, tmp_path / 'copy')
  path = tmp_path / 'copy' / 'train-00003-of-00005.tfrecord'
  data = bytearray(path.read_bytes())
  data[60] ^= 1
  path.write_bytes(data)
  found = shards.load(str(tmp_path / 'copy'))['train']
  read = records.reader(dataclasses.replace(found, folder=_Far(found.folder), block=32))
  dataset = tf.data.Dataset.range(len(found)).batch(len(found)).map(read)
  with pytest.raises(tf.errors.DataLossError):
    list(dataset)
  # A small corpus is fetched whole, and compared with its checksum then.
  with pytest.raises(ValueError, match='train-00003-of-00005.*SHA-256'):
    [records._fetched(found, file) for file in found.files]
  stream = object.__new__(pipeline.Stream)
  stream._iterator = iter(dataset)
  with pytest.raises(ValueError, match='shards must be whole.*corrupted record'):
    next(stream)


class _Far(str):
  """A folder that looks as if it were elsewhere."""

  def __truediv__(self, name):
    return f'file://{self}/{name}'

  def __str__(self):
    return f'file://{super().__str__()}'


def test_numpy_and_tensorflow_mix_alike():
  z = np.arange(1000, dtype=np.uint64) * np.uint64(0x123456789ABCDEF)
  np.testing.assert_array_equal(hashing.mix(z), stateless.mix(tf.constant(z)).numpy())


def test_without_beam_it_is_asked_for(corpus, tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'apache_beam', None)
  with pytest.raises(ValueError, match=r"pip install -e '\.\[beam\]'"):
    beam.run(_job(corpus), epath.Path(tmp_path / 'no'), [], '')
  assert not (tmp_path / 'no').exists()


@pytest.mark.slow
def test_beam_writes_the_same_bytes(made, corpus, tmp_path):
  folder = epath.Path(tmp_path / 'beam')
  todo = parts.find(corpus, 700)
  beam.run(_job(corpus), folder, todo, '--runner=DirectRunner')
  assert _content(folder) == _content(made)
