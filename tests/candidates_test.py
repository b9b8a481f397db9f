"""Which candidates stand beside the right one: drawn anew, and the same for all who ask."""

import numpy as np
import pytest

from glm_jax.data import pipeline, prepare_cloze
from glm_jax.data.examples import candidates
from glm_jax.data.rows.table import grouped_rows
from glm_jax.data.stream import stateless
from glm_jax.text.vocabulary import ByteVocabulary

LENGTH = 48


def _pieces(number, count, rng):
  """An example whose tokens say which it is: 40 + number, and 100 + its candidates."""
  context = np.array([1, *[40 + number] * rng.integers(1, 6), 2])
  spans = [np.full(rng.integers(1, 4), 100 + i) for i in range(count)]
  scored = [np.zeros(len(context), bool), *(np.ones(len(span), bool) for span in spans)]
  return [*zip([context, *spans], scored, strict=True)]


def _rows(examples, seed=0, first=0):
  table = grouped_rows(examples, max(sum(len(t) for t, _ in e) for e in examples))
  index = np.arange(first, first + len(examples))
  return {**table._asdict(), 'keys': stateless.example_keys(seed, index), 'index': index}


def _said(tokens, starts, length):
  """The candidate of each document of a row, by the numbers that its tokens are."""
  parts = np.split(tokens[:length], np.flatnonzero(starts[:length])[1:])
  return [int(part[-1]) - 100 for part in parts]


@pytest.fixture(scope='module')
def examples():
  rng = np.random.default_rng(0)
  return [_pieces(i, count, rng) for i, count in enumerate([5, 2, 3, 1, 5, 4])]


def test_all_candidates_are_documents_in_their_order(examples):
  made = candidates.documents(_rows(examples), 80, most=5)
  for i, (context, *spans) in enumerate(examples):
    whole = [np.concatenate([context[0], span]) for span, _ in spans]
    expected = np.concatenate(whole)
    assert made['lengths'][i] == len(expected) and made['tokens'].shape[1] == 81
    np.testing.assert_array_equal(made['tokens'][i, : len(expected)], expected)
    assert not made['tokens'][i, len(expected) :].numpy().any()
    begins = np.cumsum([0, *map(len, whole)])[:-1]
    np.testing.assert_array_equal(np.flatnonzero(made['starts'][i]), begins)
    scored = np.concatenate([np.arange(len(w)) >= len(context[0]) for w in whole])
    np.testing.assert_array_equal(made['scored'][i, : len(expected)], scored)
    assert not made['scored'][i, len(expected) :].numpy().any()


def test_an_empty_row_stays_empty(examples):
  rows = _rows(examples)
  made = candidates.documents({**rows, 'lengths': 0 * rows['lengths']}, LENGTH, most=5)
  for name in ('tokens', 'scored', 'starts', 'lengths'):
    assert not made[name].numpy().any()


def test_the_right_one_stays_and_every_wrong_one_comes_as_often(examples):
  rounds, counts = 400, np.zeros(5)
  for first in range(rounds):
    made = candidates.documents(
      _rows(examples, first=6 * first), LENGTH, most=5, negatives=2
    )
    tokens, starts, lengths = (made[n].numpy() for n in ('tokens', 'starts', 'lengths'))
    for i, (_, *spans) in enumerate(examples):
      said = _said(tokens[i], starts[i], lengths[i])
      assert said[0] == 0 and said == sorted({*said})
      assert len(said) == min(len(spans), 3)
    counts[_said(tokens[0], starts[0], lengths[0])] += 1
  # Two of four: each half of the time, to five standard deviations.
  assert counts[0] == rounds
  assert np.abs(counts[1:] - rounds / 2).max() < 5 * (rounds / 4) ** 0.5


def _prepared(examples, cache, negatives):
  return prepare_cloze.prepare_clozes(
    'glm_cloze',
    {'train': examples, 'validation': examples},
    ByteVocabulary(),
    length=LENGTH,
    negatives=negatives,
    cache_dir=str(cache),
    corpus='here',
    causal=True,
    two_positions=False,
  )


def _stream(seed=3, start=0, split='train'):
  how = dict(batch_size=6, seed=seed, start_step=start, split=split)
  return pipeline.batches('glm_cloze', {'tokens': LENGTH}, **how, train=split == 'train')


def _of(batch):
  """{example: its candidates} of a batch of the contract."""
  found = {}
  for row in range(len(batch.tokens)):
    scored = batch.loss_weights[row] > 0
    # The first token of each document that is scored.
    _, first = np.unique(batch.key_start[row][scored], return_index=True)
    said = batch.targets[row][scored][first] - 100
    found[int(batch.tokens[row, 1]) - 40] = said.tolist()
  return found


def test_an_epoch_draws_others_and_a_resumed_run_the_same(examples, tmp_path):
  _prepared(examples, tmp_path, 1)
  batches = [batch for batch, _ in zip(_stream(), range(12), strict=False)]
  epochs = [_of(batch) for batch in batches]
  # A batch is an epoch: each example once.
  assert all({*epoch} == {*range(6)} for epoch in epochs)
  assert {tuple(epoch[0]) for epoch in epochs} == {(0, i) for i in range(1, 5)}
  assert all(epoch[3] == [0] for epoch in epochs)
  resumed = next(_stream(start=7))
  np.testing.assert_array_equal(resumed.tokens, batches[7].tokens)
  other = [_of(batch)[0] for batch, _ in zip(_stream(seed=4), range(12), strict=False)]
  assert other != [epoch[0] for epoch in epochs]
  # What is held out is the same at each look.
  one, two = (next(_stream(seed=0, split='validation')) for _ in range(2))
  np.testing.assert_array_equal(one.tokens, two.tokens)


def test_rows_are_stored_once_however_many_are_drawn(examples, tmp_path):
  few, all_of_them = (_prepared(examples, tmp_path, negatives) for negatives in (1, 0))
  assert few.fingerprint == all_of_them.fingerprint
