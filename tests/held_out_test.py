"""What is held out is read once, by every process its part, each corpus its share."""

import numpy as np
import pytest
import seqio

from glm_jax.data.corpora.config import CorpusConfig
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
  assert [(corpus, name) for _, _, corpus, name in found] == wanted


@pytest.mark.parametrize('batch_size,processes', [(1, 1), (3, 1), (6, 2), (6, 3), (32, 4)])
def test_neither_batches_nor_processes_change_what_is_read(corpora, batch_size, processes):
  assert _read(corpora, batch_size, processes) == _read(corpora, 4)


@pytest.mark.parametrize('most', [1, 5, 10])
def test_of_some_rows_each_corpus_has_its_share_as_far_as_it_goes(corpora, most):
  found = _read(corpora, 4, max_rows=most)
  for number, (name, size) in enumerate(SIZES.items()):
    own = [row for _, _, corpus, row in found if corpus == number]
    count = min(size, max(1, round(most * SHARES[name])))
    assert own == [f'{name}{i:02}h567' for i in range(count)]
