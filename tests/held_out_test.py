"""What is held out, by one rule; it is read once, by every process its part."""

import collections
import dataclasses
import json

import numpy as np
import pytest
import seqio

from glm_jax.configs import UserError
from glm_jax.data.corpora import corpus, held_out, parts
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.fields import Document
from glm_jax.data.making import tokenized
from glm_jax.data.rows.table import RowPlan
from glm_jax.data.stream.source import Corpus, IndexedRows, Reading
from glm_jax.text.vocabulary import ByteVocabulary

SIZES = {'a': 9, 'b': 5, 'c': 1}
SHARES = {'a': 0.3, 'b': 0.6, 'c': 0.1}


@pytest.fixture(scope='session')
def corpora(tmp_path_factory):
  """Three corpora, each of whose rows is a document that says which it is."""
  folder, found = tmp_path_factory.mktemp('held_out'), []
  for name, size in SIZES.items():
    (folder / name).mkdir()
    for split, count in (('train', 3), ('held', size)):
      text = '\n'.join(f'{{"text": "{name}{i:02}{split[0]}567"}}' for i in range(count))
      (folder / name / f'{split}.jsonl').write_text(text)
    config = CorpusConfig(
      corpus=str(folder / name / 'train.jsonl'),
      validation=str(folder / name / 'held.jsonl'),
      cache_dir=str(folder / 'cache'),
    )
    plan = RowPlan(9)
    made = {
      split: tokenized.cached_rows(config, ByteVocabulary(), split, plan)
      for split in ('train', 'validation')
    }
    found.append(Corpus(name, made, SHARES[name]))
  return found


def _read(corpora, batch_size, processes=1, **reading):
  """[(index, key, corpus, the name in the row)] of every row with tokens, in order."""
  source, parts = IndexedRows(corpora, Reading(batch_size, **reading)), []
  for i in range(processes):
    dataset = source.get_dataset(
      'validation', shuffle=False, seed=0, shard_info=seqio.ShardInfo(i, processes)
    )
    parts.append([*dataset.as_numpy_iterator()])
  assert len({*map(len, parts)}) == 1  # every process as many batches
  found = []
  for batches in zip(*parts, strict=True):
    batch = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
    assert len(batch['index']) == batch_size
    for row in range(batch_size):
      if batch['index'][row] < 0:
        assert batch['lengths'][row] == 0
        continue
      n = batch['lengths'][row]
      name = bytes(batch['tokens'][row, 1 : n - 1].astype(np.uint8).tolist()).decode()
      found.append((batch['index'][row], batch['keys'][row], batch['corpus'][row], name))
  return found


def test_every_row_of_every_corpus_is_read_once_in_order(corpora):
  found = _read(corpora, 4)
  assert [index for index, *_ in found] == [*range(sum(SIZES.values()))]
  assert len({key for _, key, *_ in found}) == len(found)
  wanted = [(c, f'{k}{i:02}h567') for c, k in enumerate('abc') for i in range(SIZES[k])]
  assert [(source, name) for _, _, source, name in found] == wanted


@pytest.mark.parametrize('batch_size,processes', [(1, 1), (3, 1), (6, 2), (6, 3), (32, 4)])
def test_neither_batches_nor_processes_change_what_is_read(corpora, batch_size, processes):
  assert _read(corpora, batch_size, processes) == _read(corpora, 4)


@pytest.mark.parametrize('most', [1, 5, 10])
def test_of_some_rows_each_corpus_has_its_share_as_far_as_it_goes(corpora, most):
  found = _read(corpora, 4, max_rows=most)
  for number, (name, size) in enumerate(SIZES.items()):
    own = [row for _, _, source, row in found if source == number]
    count = min(size, max(1, round(most * SHARES[name])))
    assert own == [f'{name}{i:02}h567' for i in range(count)]


def _documents(config, part_bytes=None):
  """{split: documents}, as a run reads them, or as `make_shards` does in small parts."""
  if part_bytes is None:
    return {s: [*corpus.documents(config, s)] for s in ('train', 'validation')}
  both = {'train': [], 'validation': []}
  for part in parts.find(config, part_bytes):
    for split, document in parts.read(config, part):
      both[split].append(document)
  return both


def _pairs(folder, count, name='a.jsonl'):
  lines = [
    {'prompt': f'Review {i}: the film was {w}. It is: ', 'text': ('good', 'bad')[i % 2]}
    for i, w in enumerate(np.random.default_rng(0).integers(0, 9999, count).tolist())
  ]
  (folder / name).write_text('\n'.join(map(json.dumps, lines)) + '\n')
  return CorpusConfig(corpus=str(folder / name), cache_dir=str(folder / 'cache'))


def test_answers_alone_do_not_decide_what_is_held_out(tmp_path):
  """1,000 pairs with one of two answers."""
  both = _documents(_pairs(tmp_path, 1000))
  assert 30 <= len(both['validation']) <= 80 and sum(map(len, both.values())) == 1000
  for split in both.values():
    assert {d.text for d in split} == {'good', 'bad'}


@pytest.mark.parametrize('count', [3, 10, 19, 20, 60, 199, 200, 1000])
def test_files_and_shards_hold_out_the_same_documents(tmp_path, count):
  config = _pairs(tmp_path, count)
  both = _documents(config)
  assert both == _documents(config, 300)
  assert both['validation'] and sum(map(len, both.values())) == count  # no pair is cut
  words = parts.held_out_in_words(parts.find(config, parts.PART_BYTES))
  assert (count < 200) == bool(words) and (str(count) in words or not words)


def test_from_200_on_a_document_stays_on_its_side_when_others_come(tmp_path):
  few = _documents(_pairs(tmp_path, 200, 'few.jsonl'))
  many = _documents(_pairs(tmp_path, 900, 'many.jsonl'))
  number = lambda d: int(d.prompt.split(':')[0].split()[1])
  assert {number(d) for d in many['validation'] if number(d) < 200} == {
    number(d) for d in few['validation']
  }


def test_below_200_the_lowest_hash_is_held_out_as_well(tmp_path):
  config = dataclasses.replace(_pairs(tmp_path, 25), validation_fraction=1e-9)
  both = _documents(config)
  lowest = min(both['train'] + both['validation'], key=held_out.hash_of)
  assert both['validation'] == [lowest]


@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_of_few_texts_the_end_is_held_out_at_a_blank_line(tmp_path, end):
  """Nothing is lost or changed, and no document is cut twice."""
  texts = [
    (end * 2).join(f'Text {n}, paragraph {i}. ' + 'word ' * 20 for i in range(30))
    for n in range(4)
  ]
  for n, text in enumerate(texts):
    (tmp_path / f'{n}.txt').write_bytes(text.encode())
  config = CorpusConfig(corpus=str(tmp_path / '*.txt'), validation_fraction=0.1)
  both = _documents(config)
  assert both == _documents(config, 100)
  assert [d.text for d in both['train'][:3]] == texts[:3]
  [tail] = both['validation']
  assert both['train'][3].text + tail.text == texts[3] and len(both['train']) == 4
  assert tail.text.startswith('Text 3, paragraph ')
  share = len(tail.text) / sum(map(len, texts))
  assert share == pytest.approx(0.1, abs=0.01)


def test_of_documents_of_tokens_some_are_held_out():
  """A seqio task of tokens has no text that could be hashed."""
  documents = [Document('', ids=[5, 6, n]) for n in range(300)]
  for count in (10, 50, 300):
    few = documents[:count]
    rule = held_out.by_hash(0.05) if count >= 200 else held_out.of_few(few, 0.05, 'x')
    splits = collections.Counter(split for split, _ in rule.split(few))
    assert splits['validation'] >= 1 and splits['train'] >= 0.8 * count


@pytest.mark.parametrize('texts', [[''], ['one paragraph'], ['', ' ']])
def test_what_leaves_nothing_to_hold_out_is_refused(tmp_path, texts):
  for n, text in enumerate(texts):
    (tmp_path / f'{n}.txt').write_text(text)
  with pytest.raises(UserError, match='held out for validation|must hold some text'):
    _documents(CorpusConfig(corpus=str(tmp_path / '*.txt')))
