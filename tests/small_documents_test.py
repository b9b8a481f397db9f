"""The smallest documents and windows, and sentences that something cuts.

Tokens tell their place in the row, so that an example can be read back exactly, with what
each of its targets weighs.
"""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf

from glm_jax.batch import MIXED
from glm_jax.data.examples import causal, infilling, packed
from glm_jax.data.examples.objective_config import ObjectiveConfig, causal_packing
from glm_jax.data.rows.table import _cut, packed_rows, stream_rows
from glm_jax.data.stream import stateless
from glm_jax.text.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary()
S = VOCABULARY.specials
MASKS = (S.mask, S.gmask, S.smask)
CONFIGS = {
  **{name: ObjectiveConfig().only(name) for name in MIXED},
  'mixture': ObjectiveConfig(blank=1, document=1, sentence=1),
  'infill': ObjectiveConfig(document_infill_probability=1.0).only('document'),
  'many': ObjectiveConfig(mask_ratio=0.5, span_mean=1.0),
  'single': ObjectiveConfig(single_span_probability=1.0),
}
ENDS = [ord(mark) for mark in '.?!;:\n']
LETTERS = [i for i in range(256) if i not in ENDS]


@functools.cache
def _op(length, config):
  def make(*source):
    return infilling.make_examples(infilling.TextRows(*source), length, config, VOCABULARY)

  return tf.function(make, autograph=False, reduce_retracing=False)


def _make(tokens, lengths, scored, length, config, seed=0):
  n = len(tokens)
  keys = stateless.example_keys(seed, tf.range(n, dtype=tf.int64))
  made = _op(length, config)(
    tf.constant(tokens), tf.constant(lengths), scored, keys, tf.zeros([n], tf.int64)
  )
  return {name: value.numpy() for name, value in made.items()}


def _read(made, row, first=0, last=None):
  """Text of an example in order; {place in it: weight}, of what is predicted; its spans.

  Checks that each span is seen as it should be, and that [eop] weighs what the last token
  of its span does. `first` and `last` are the ends of the example in a packed row.
  """
  part = {k: v[row][first:last] for k, v in made.items() if v.ndim == 2}
  end, inside = part['key_end'] - first, int((part['key_end'] > 0).sum())
  assert (part['key_start'][:inside] == first).all() and not part['key_end'][inside:].any()
  part_a = int(end[0]) if inside else 0
  blocks, positions = part['block_positions'], part['positions']
  spans = {}
  for a in range(part_a, inside):
    if blocks[a] != 1:
      continue
    n = 1
    while a + n < inside and blocks[a + n] == n + 1:
      n += 1
    targets = part['targets'][a : a + n].tolist()
    assert (
      part['tokens'][a] == S.sop
      and part['tokens'][a + 1 : a + n].tolist() == (targets[:-1])
    )
    weights = part['loss_weights'][a : a + n].tolist()
    closed = targets[-1] == S.eop
    if closed:
      assert n > 1 and weights[-1] == weights[-2]
      targets, weights = targets[:-1], weights[:-1]
    assert int(positions[a]) not in spans
    spans[int(positions[a])] = (targets, weights, closed)
  assert sum(len(t) + c for t, _, c in spans.values()) == inside - part_a
  assert not part['loss_weights'][:part_a].any()
  assert not part['loss_weights'][inside:].any()
  text, weight, hidden = [], {}, []
  for place in range(part_a):
    token = int(part['tokens'][place])
    assert positions[place] == place
    if token in MASKS:
      targets, weights, closed = spans.pop(place)
      weight |= {len(text) + i: w for i, w in enumerate(weights)}
      hidden.append((len(text), len(targets), closed))
      text += targets
    else:
      text.append(token)
  assert not spans
  return text, weight, hidden


@pytest.mark.parametrize('prefix', [(), (S.enc,), (S.enc, S.sop)], ids=len)
@pytest.mark.parametrize('name', CONFIGS)
def test_a_document_of_one_token_or_more_can_be_learnt_from(name, prefix):
  """One to five tokens of text and <eos>, with prefixes of 0 to 2; some of it a prompt."""
  tables, texts = [], []
  for size in range(6):
    for prompt in range(size + 1):
      ids = [*prefix, *LETTERS[10 : 10 + size], S.eos]
      texts += [(ids, len(prefix) + prompt)] * 8
      tables += [ids + [S.pad] * (12 - len(ids))] * 8
  lengths = np.array([len(ids) for ids, _ in texts], np.int32)
  scored = np.arange(12) >= np.array([unscored for _, unscored in texts])[:, None]
  made = _make(np.array(tables, np.int32), lengths, scored, 40, CONFIGS[name])
  for row, (ids, unscored) in enumerate(texts):
    text, weight, hidden = _read(made, row)
    assert text == ids
    assert weight == {place: float(place >= unscored) for place in weight}
    size = len(ids) - len(prefix) - 1
    kind = MIXED[made['objective'][row, 0]]
    if size or kind == 'document':
      assert hidden, (ids, kind)
    for start, n, closed in hidden:
      if kind == 'document':
        assert n >= max(1, int(0.5 * len(ids))) or closed
        # Two tokens stay, where there are three or more.
        assert n <= max(len(ids) - 2, 1) and (closed or start + n == len(ids))
      else:
        assert closed and len(prefix) <= start and start + n < len(ids)
    if kind == 'document':
      assert len(hidden) == 1
    if kind == 'sentence' and size:
      assert hidden == [(len(prefix), size, True)]  # all of the text is a sentence
    if kind == 'blank' and size:
      budget = max(1, int(CONFIGS[name].mask_ratio * len(ids)))
      assert sum(n for _, n, _ in hidden) >= min(budget, size) or name in ('many', 'single')
      ends = [(start, start + n) for start, n, _ in hidden]
      assert all(b[0] > a[1] for a, b in itertools.pairwise(ends))


def _packed(documents, config, plan, prefix):
  table = packed_rows(documents, prefix, S.eos, plan)
  n = len(table.lengths)
  fields = {k: tf.constant(v) for k, v in table._asdict().items()}
  fields['keys'] = stateless.example_keys(0, tf.range(n, dtype=tf.int64))
  fields['step'] = tf.zeros([n], tf.int64)
  source, places = packed.take_apart(fields, plan)
  size = source.tokens.shape[1] + 2 * packed.spans_of_longest(plan)
  apart = infilling.make_examples(source, size, config, VOCABULARY)
  made = packed.put_together(apart, places, n, plan.positions, S.pad)
  return table, {name: value.numpy() for name, value in made.items()}


@pytest.mark.parametrize('prefix', [(), (S.enc,)], ids=len)
@pytest.mark.parametrize('name', ['blank', 'document', 'sentence', 'mixture'])
def test_small_documents_of_a_packed_row_are_whole_and_see_themselves_alone(name, prefix):
  rng = np.random.default_rng(0)
  documents = [
    (rng.choice(LETTERS, k).tolist() if k < 3 else [], rng.choice(LETTERS, n).tolist())
    for n in (1, 2, 3, 4, 7, 12)
    for k in range(4)
  ] * 3
  config = CONFIGS[name]
  table, made = _packed(documents, config, config.packing(32), prefix)
  found = []
  for row in range(len(table.lengths)):
    inside = made['key_end'][row] > 0
    firsts = np.flatnonzero(inside & (made['key_start'][row] == np.arange(32)))
    size = int(inside.sum())
    assert (made['tokens'][row, size:] == S.pad).all()
    assert (made['targets'][row, size:] == S.pad).all()
    at = 0
    for a, z in zip(firsts, [*firsts[1:], size], strict=True):
      text, weight, hidden = _read(made, row, a, z)
      own = table.tokens[row, at : at + len(text)].tolist()
      flags = table.scored[row, at : at + len(text)]
      assert text == own and hidden
      assert weight == {place: float(flags[place]) for place in weight}
      at += len(text)
      found.append((text, flags.sum()))
    assert at == table.lengths[row]
  wanted = [([*prefix, *a, *b, S.eos], len(b) + 1) for a, b in documents]
  assert sorted(found) == sorted(wanted)
  assert not made['capped'].any() or name in ('blank', 'mixture')


def test_every_plan_has_room_for_a_span_in_its_smallest_document():
  for config in CONFIGS.values():
    for length in (20, 40, 200):
      plan = config.packing(length)
      assert plan.room[0] == 0 and plan.longest >= 8
      assert all(b >= n + 2 for n, b in enumerate(plan.room) if n)
      assert plan.room[-1] <= length and list(plan.room) == sorted(plan.room)
      row = config.row_length(length)
      assert (
        row + 2 * config.max_spans(row) <= length < row + 1 + 2 * config.max_spans(row + 1)
      )


@pytest.mark.parametrize('prefix', [(), (S.enc,), (S.gmask, S.sop)], ids=len)
def test_small_documents_of_a_stream_are_cut_where_rows_end(prefix):
  """Every size beside every place in a row, against a loop over tokens."""
  for row_length in (5, 6, 8):
    documents = [
      (list(range(50, 50 + n // 2)), list(range(100, 100 + n))) for n in range(9)
    ]
    documents = documents + documents[::-1] + documents[1:]
    table = stream_rows(documents, prefix, S.eos, row_length)
    wanted, row = [], []
    for prompt, text in documents:
      if len(row) + len(prefix) >= row_length:
        wanted, row = [*wanted, row], []
      opening = [(token, False, i == 0) for i, token in enumerate(prefix)]
      body = [(t, False, False) for t in prompt] + [
        (t, True, False) for t in (*text, S.eos)
      ]
      whole = [*opening, *body]
      whole[0] = (*whole[0][:2], True)
      for token in whole:
        if len(row) == row_length:
          wanted, row = [*wanted, row], [*opening]
          if not opening:
            token = (*token[:2], True)
        row.append(token)
    wanted.append(row)
    wanted = [row for row in wanted if row]
    assert table.lengths.tolist() == [len(row) for row in wanted]
    for i, row in enumerate(wanted):
      made = zip(table.tokens[i], table.scored[i], table.starts[i], strict=True)
      assert [(int(a), bool(b), bool(c)) for a, b, c in made][: len(row)] == row
      assert not table.scored[i, len(row) :].any() and not table.starts[i, len(row) :].any()


@pytest.mark.parametrize('prefix', [(), (S.enc,), (S.gmask, S.sop)], ids=len)
def test_small_documents_predict_their_next_tokens_and_nobody_elses(prefix):
  """Causal rows, as a stream and packed, of documents of 1 to 6 tokens."""
  length = 12
  documents = [([7] * k, [*range(20, 20 + n)]) for n in range(1, 6) for k in range(3)] * 2
  for table in (
    stream_rows(documents, prefix, S.eos, length + 1),
    packed_rows(documents, prefix, S.eos, causal_packing(length)),
  ):
    made = causal.causal_examples(
      *map(tf.constant, (table.tokens, table.lengths, table.scored, table.starts)), S.pad
    )
    made = {name: value.numpy() for name, value in made.items()}
    for row, size in enumerate(table.lengths):
      assert (made['tokens'][row, size:] == S.pad).all()
      assert (made['targets'][row, size:] == S.pad).all()
      start = 0
      for t in range(length):
        start = t if table.starts[row, t] else start
        found = [made[k][row, t] for k in ('key_start', 'key_end', 'positions')]
        if t + 1 >= size:
          assert found == [0, 0, 0] and made['loss_weights'][row, t] == 0
          continue
        assert found == [start, t + 1, t - start]
        assert made['tokens'][row, t] == table.tokens[row, t]
        assert made['targets'][row, t] == table.tokens[row, t + 1]
        assert made['loss_weights'][row, t] == table.scored[row, t + 1]
        if prefix:  # the first token of a document is predicted from no other
          assert not (table.starts[row, t + 1] and made['loss_weights'][row, t])


@pytest.mark.parametrize('longest', [8, 16, 32, 40])
def test_documents_about_as_long_as_a_part_are_cut_whole(longest):
  for prefix in ((), (S.enc,), (S.gmask, S.sop)):
    most = longest - len(prefix)
    for size in {*range(1, 2 * most + 4)}:
      for prompt in {0, 1, size // 2, size - 1, min(most, size), min(most + 1, size)}:
        ids = np.arange(1000, 1000 + size)
        made = list(_cut(ids[:prompt], ids[prompt:], prefix, S.eos, longest))
        assert all(len(part) <= longest for part, _ in made)
        assert all(tuple(part[: len(prefix)]) == prefix for part, _ in made)
        body = [token for part, _ in made for token in part[len(prefix) :].tolist()]
        assert body == [*ids.tolist(), S.eos]
        scored = [t for part, learnt in made for t in part[learnt].tolist()]
        assert scored == [*ids[prompt:].tolist(), S.eos]
        assert len(made) == -(-(size + 1) // most)  # no more parts than it needs
        assert len(made[-1][0]) - len(prefix) >= min(size + 1, max(1, most // 16))


# Windows.


@pytest.mark.parametrize('name', MIXED)
@pytest.mark.parametrize('opening', ['prefix', 'none'])
def test_a_window_keeps_what_is_scored_with_its_tokens(name, opening, monkeypatch):
  """Each token tells its place; each is scored or not for itself."""
  if opening == 'none':
    monkeypatch.setattr(VOCABULARY, 'prefix', ())
  rng = np.random.default_rng(3)
  n, N = 300, 120
  lengths = np.concatenate(
    [rng.integers(30, N + 1, n - 40), np.repeat([N, 33, 32, 31], 10)]
  )
  lengths = lengths.astype(np.int32)
  tokens = np.broadcast_to(np.array(LETTERS[100 : 100 + N], np.int32), (n, N))
  place_of = {token: place for place, token in enumerate(LETTERS[100 : 100 + N])}
  scored = rng.random((n, N)) < 0.5
  tokens = np.where(np.arange(N) < lengths[:, None], tokens, S.pad).astype(np.int32)
  config = ObjectiveConfig(short_probability=0.8, mask_ratio=0.3).only(name)
  source = infilling.TextRows(
    *map(tf.constant, (tokens, lengths, scored)),
    stateless.example_keys(0, tf.range(n, dtype=tf.int64)),
    tf.zeros([n], tf.int64),
  )
  made = infilling.make_examples(source, N + 80, config, VOCABULARY)
  made = {key: value.numpy() for key, value in made.items()}
  short = made['lost'] > 0
  assert short[: n - 40].mean() > 0.6 and not short[n - 20 :].any()
  firsts, lasts = [], []
  for row in range(n):
    text, weight, _ = _read(made, row)
    assert len(text) == lengths[row] - made['lost'][row] >= min(32, lengths[row])
    opened = int(short[row] and opening == 'prefix')
    assert text[:opened] == [S.enc] * opened
    places = [place_of[token] for token in text[opened:]]
    assert places == [*range(places[0], places[0] + len(places))]
    assert places[-1] < lengths[row]
    if short[row]:
      firsts.append(places[0])
      lasts.append(lengths[row] - 1 - places[-1])
    for at, value in weight.items():
      assert value == (float(scored[row, places[at - opened]]) if at >= opened else 0.0)
  # Windows begin and end wherever there is room, at both ends of the row as well.
  assert min(firsts) <= opened + 1 and min(lasts) == 0 and max(firsts) > 50 < max(lasts)


# Sentences.


def _sentences(tokens, length):
  """(start, length, whether it ends with a mark or with the row), by hand."""
  found, start = [], None
  for t in range(length):
    text = tokens[t] < 256
    if text and start is None:
      start = t
    if text and (tokens[t] in ENDS or t == length - 1):
      found.append((start, t + 1 - start, True))
      start = None
    elif not text and start is not None:
      found.append((start, t - start, False))
      start = None
  return found


def test_a_sentence_that_a_documents_end_cuts_counts_only_where_there_is_no_other():
  rng = np.random.default_rng(0)
  n, N = 600, 40
  tokens = rng.choice(LETTERS, (n, N)).astype(np.int32)
  marks = rng.random((n, N)) < rng.choice([0.0, 0.02, 0.1, 0.3], (n, 1))
  tokens[marks] = rng.choice(ENDS, marks.sum())
  ends = rng.random((n, N)) < rng.choice([0.0, 0.03, 0.2], (n, 1))
  tokens[ends] = S.eos
  lengths = rng.integers(2, N + 1, n).astype(np.int32)
  tokens[np.arange(n), lengths - 1] = np.where(
    rng.random(n) < 0.7, S.eos, tokens[np.arange(n), lengths - 1]
  )
  config = ObjectiveConfig(mask_ratio=0.3).only('sentence')
  made = _make(tokens, lengths, np.ones((n, N), bool), N + 20, config)
  cut = chosen_cut = 0
  for row in range(n):
    text, _, hidden = _read(made, row)
    assert text == tokens[row, : lengths[row]].tolist()
    every = _sentences(tokens[row], lengths[row])
    whole = [(start, size) for start, size, finished in every if finished]
    eligible = whole or [(start, size) for start, size, _ in every]
    taken = [(start, size) for start, size, _ in hidden]
    assert {*taken} <= {*eligible} and bool(taken) == bool(eligible)
    cut += bool(whole) and len(every) > len(whole)
    chosen_cut += bool(taken) and not whole
    # As many as reach the budget, and no more: without the last, it is not reached.
    budget, total = max(1, int(0.3 * lengths[row])), sum(size for _, size in taken)
    if not made['capped'][row]:
      assert total >= budget or len(taken) == len(eligible)
    assert total - max((size for _, size in taken), default=0) < budget
  assert cut > 50 and chosen_cut > 50


def test_each_sentence_is_chosen_equally_often():
  text = [S.enc, *(t for i in range(8) for t in (*[LETTERS[70 + i]] * 4, ENDS[0])), S.eos]
  n = 3000
  tokens = np.broadcast_to(np.array(text, np.int32), (n, len(text)))
  lengths = np.full(n, len(text), np.int32)
  config = ObjectiveConfig(mask_ratio=0.01).only('sentence')
  made = _make(tokens, lengths, np.ones(tokens.shape, bool), len(text) + 8, config)
  counts = np.zeros(8)
  for row in range(n):
    [(start, size, _)] = _read(made, row)[2]
    assert size == 5
    counts[(start - 1) // 5] += 1
  assert (abs(counts / n - 1 / 8) < 0.03).all()


def test_rows_that_fill_up_a_batch_stay_empty_with_every_kind_of_noise():
  config = dataclasses.replace(
    CONFIGS['mixture'], short_probability=0.5, dblock_probability=0.5
  )
  tokens = np.full((9, 20), S.pad, np.int32)
  made = _make(tokens, np.zeros(9, np.int32), np.zeros((9, 20), bool), 40, config)
  for field in ('loss_weights', 'key_end', 'positions', 'block_positions', 'lost'):
    assert not made[field].any(), field
  assert (made['tokens'] == S.pad).all()
