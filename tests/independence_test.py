"""Random numbers that decide different things have nothing to do with each other."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow as tf

from glm_jax import models
from glm_jax.batch import MIXED, Visibility
from glm_jax.data.corpora import parts
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.examples import infilling, packed
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.making import shard_job
from glm_jax.data.making.order import Order
from glm_jax.data.rows.table import RowPlan, packed_rows
from glm_jax.data.stream import hashing, mixing, source, stateless
from glm_jax.models import ChatGLMConfig, GLMConfig
from glm_jax.text.vocabulary import ByteVocabulary
from glm_jax.training import state, step

VOCABULARY = ByteVocabulary()
S = VOCABULARY.specials
EVERYTHING = ObjectiveConfig(
  blank=1,
  document=1,
  sentence=1,
  single_span_probability=0.2,
  dblock_probability=0.2,
  short_probability=0.5,
)


def _uncorrelated(columns, tolerance=5.0):
  """Each two of the [n] columns, within so many standard errors of no correlation."""
  ranks = np.argsort(np.argsort(np.stack(columns), axis=1), axis=1)
  found = np.corrcoef(ranks) - np.eye(len(columns))
  assert np.abs(found).max() * ranks.shape[1] ** 0.5 < tolerance, np.argwhere(
    np.abs(found) * ranks.shape[1] ** 0.5 >= tolerance
  )


# Examples.


@functools.cache
def _draws():
  """Every call of `stateless.uniform` for a mixture of all that draws: numbers by purpose.

  Also those of each objective alone, for 2,000 rows.
  """
  n, calls = 2000, []
  original = stateless.uniform

  def recorded(keys, purpose, count):
    calls.append((purpose, original(keys, purpose, count).numpy()))
    return tf.constant(calls[-1][1])

  tokens = np.full((n, 60), ord('a'), np.int32)
  tokens[:, 9::10], tokens[:, 0], tokens[:, -1] = ord('.'), S.enc, S.eos
  rows_of = infilling.TextRows(
    tf.constant(tokens),
    tf.fill([n], 60),
    tf.ones([n, 60], tf.bool),
    stateless.example_keys(3, tf.range(n, dtype=tf.int64)),
    tf.zeros([n], tf.int64),
  )
  by_config = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stateless, 'uniform', recorded)
    for name in ('', *MIXED):
      config = EVERYTHING.only(name) if name else EVERYTHING
      infilling.make_examples(rows_of, 100, config, VOCABULARY)
      by_config[name], calls = calls, []
  return by_config


@pytest.mark.parametrize('objective', ['', *MIXED])
def test_whatever_is_drawn_for_an_example_has_a_purpose_of_its_own(objective):
  """Two draws with one purpose would be the same numbers."""
  purposes = [purpose for purpose, _ in _draws()[objective]]
  assert len(purposes) == len({*purposes}) >= 4
  if objective:  # all rows are drawn for, so that columns can be compared
    columns = [u[:, i] for _, u in _draws()[objective] for i in range(min(6, u.shape[1]))]
    _uncorrelated(columns)


def test_purposes_counters_and_keys_never_meet():
  """Number i of one purpose is no number of another, for any of the keys."""
  keys = stateless.example_keys(0, tf.range(4, dtype=tf.int64))
  draws = np.stack([stateless.uniform(keys, purpose, 64).numpy() for purpose in range(32)])
  assert draws.shape == (32, 4, 64)
  # 8,192 numbers of 24 bits: two equal ones are expected in 2^26 / 2^25 pairs.
  assert draws.size - len(np.unique(draws)) < 12
  grid = [
    stateless.example_keys(seed, tf.range(first, first + 100, dtype=tf.int64)).numpy()
    for seed in range(20)
    for first in (0, 10**12)
  ]
  children = stateless.child_keys(
    tf.constant(np.repeat(grid[0], 50)), tf.constant(np.tile(np.arange(50), 100), tf.int32)
  ).numpy()
  every = np.concatenate([*grid, children])
  assert len(np.unique(every)) == len(every)


def test_neighbours_in_the_stream_draw_differently():
  for seed in (0, 1):
    keys = stateless.example_keys(seed, tf.range(3000, dtype=tf.int64))
    u = stateless.uniform(keys, 0, 3).numpy()
    others = stateless.uniform(stateless.child_keys(keys, tf.ones(3000, tf.int32)), 0, 1)
    _uncorrelated([u[:-2, 0], u[1:-1, 0], u[2:, 0], u[:-2, 1], u[:-2, 2], others[:-2, 0]])


def _spans_of(made, row):
  """[(place of the mask, length)] in the order of Part B."""
  block, position = made['block_positions'][row], made['positions'][row]
  targets = made['targets'][row]
  opens = np.flatnonzero(block == 1)
  found = []
  for a in opens:
    n = 0
    while a + n < len(block) and block[a + n] == n + 1:
      n += 1
    found.append((int(position[a]), n - (targets[a + n - 1] == S.eop)))
  return found


def _examples(config, n=2000, length=60):
  tokens = np.full((n, length), ord('a'), np.int32)
  tokens[:, 0], tokens[:, -1] = S.enc, S.eos
  made = infilling.make_examples(
    infilling.TextRows(
      tf.constant(tokens),
      tf.fill([n], length),
      tf.ones([n, length], tf.bool),
      stateless.example_keys(5, tf.range(n, dtype=tf.int64)),
      tf.zeros([n], tf.int64),
    ),
    length + 40,
    config,
    VOCABULARY,
  )
  return {name: value.numpy() for name, value in made.items()}


def test_length_place_and_order_of_spans_have_nothing_to_do_with_each_other():
  """Of rows with two spans, between which what is left decides nothing."""
  made = _examples(ObjectiveConfig(mask_ratio=0.1, dblock_probability=0.5), n=6000)
  found = []
  for row in range(6000):
    spans = _spans_of(made, row)
    if len(spans) != 2:
      continue
    (first, second), came_first = sorted(spans), spans[0] < spans[1]
    noise = (made['tokens'][row] == S.dblock).sum() - 0.5 * (first[1] + second[1])
    before, behind = first[0] - 1, made['key_end'][row][0] - 2 - second[0]
    found.append((first[1] - second[1], came_first, before - behind, noise))
  longer, came_first, place, noise = np.array(found, float).T
  assert len(found) > 1500
  for a, b in itertools.combinations((longer, came_first, place, noise), 2):
    assert abs(np.corrcoef(a, b)[0, 1]) * len(found) ** 0.5 < 4
  assert abs(came_first.mean() - 0.5) < 0.04  # shuffled
  assert abs(longer.mean()) < 0.15 and abs(place.mean()) < 1.5  # no end is favoured


def test_the_spans_of_each_document_of_a_row_are_equally_long():
  """The one that crosses the budget is longer than most, and drawn last."""
  n = 4000
  document = [S.enc, *[ord('a')] * 28, S.eos]
  tokens = np.broadcast_to(np.array(document * 2, np.int32), (n, 60))
  made = infilling.make_examples(
    infilling.TextRows(
      tf.constant(tokens),
      tf.fill([n], 60),
      tf.ones([n, 60], tf.bool),
      stateless.example_keys(2, tf.range(n, dtype=tf.int64)),
      tf.zeros([n], tf.int64),
    ),
    100,
    ObjectiveConfig(mask_ratio=0.2),
    VOCABULARY,
  )
  made = {name: value.numpy() for name, value in made.items()}
  lengths = {False: [], True: []}
  for row in range(n):
    second = np.flatnonzero(made['tokens'][row] == S.enc)[1]
    for place, size in _spans_of(made, row):
      lengths[place > second].append(size)
  counts, means = zip(*((len(x), np.mean(x)) for x in lengths.values()), strict=True)
  assert min(counts) > 6000 and abs(counts[0] / sum(counts) - 0.5) < 0.05
  assert abs(means[0] - means[1]) < 0.12, means


def test_a_documents_size_place_and_end_are_drawn_apart():
  config = ObjectiveConfig(document_min_ratio=0.1).only('document')
  made = _examples(config, n=4000)
  spans = [_spans_of(made, row)[0] for row in range(4000)]
  place, size = np.array(spans).T
  inside = (made['targets'] == S.eop).any(1)
  assert abs(np.corrcoef(inside, size)[0, 1]) < 0.06
  # Where it lies is uniform among the places that its size leaves.
  free = np.maximum(58 - size, 1)
  share = ((place - 1) / free)[inside & (free > 10)]
  _uncorrelated([share, size[inside & (free > 10)]])
  assert abs(share.mean() - 0.5) < 0.04


def test_where_a_window_lies_does_not_depend_on_its_size():
  tokens = np.broadcast_to(np.arange(200, dtype=np.int32), (4000, 200))
  keys = stateless.example_keys(1, tf.range(4000, dtype=tf.int64))
  short = infilling._shorten(
    infilling.TextRows(
      tf.constant(tokens), tf.fill([4000], 200), tf.ones([4000, 200], tf.bool), keys, None
    ),
    ObjectiveConfig(short_probability=0.7),
    VOCABULARY,
  )
  size, start = short.lengths.numpy(), short.tokens.numpy()[:, 1] - 1
  free, kind = 200 - size, size < 200
  roomy = kind & (free > 20)
  share = start[roomy] / free[roomy]
  _uncorrelated([share, size[roomy]])
  assert abs(share.mean() - 0.5) < 0.03 and abs(size[kind].mean() - 116) < 5
  assert abs(kind.mean() - 0.7) < 0.03


def test_documents_of_a_row_and_rows_of_a_batch_have_keys_of_their_own():
  """Equal documents, so that nothing but their number tells them apart."""
  plan = ObjectiveConfig().packing(120)
  table = packed_rows([([], [ord('a')] * 20)] * 60, VOCABULARY.prefix, S.eos, plan)
  n = len(table.lengths)
  fields = {k: tf.constant(v) for k, v in table._asdict().items()}
  keys = stateless.example_keys(0, tf.range(n, dtype=tf.int64))
  fields |= {'keys': keys, 'step': tf.zeros([n], tf.int64)}
  apart, places = packed.take_apart(fields, plan)
  assert places.number.numpy().max() >= 2 and len(apart.lengths) == 60
  every = [*apart.keys.numpy().tolist(), *keys.numpy().tolist()]
  assert len({*every}) == len(every)
  size = apart.tokens.shape[1] + 2 * packed.spans_of_longest(plan)
  made = infilling.make_examples(apart, size, ObjectiveConfig(), VOCABULARY)
  spans = [tuple(_spans_of({k: v.numpy() for k, v in made.items()}, i)) for i in range(60)]
  assert len({*spans}) > 45


# The stream.


@pytest.mark.parametrize('n,block', [(300, 1), (302, 4)])
def test_epochs_corpora_and_seeds_have_permutations_of_their_own(n, block):
  found = []
  for seed, corpus in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2)]:
    order = source._order(n, block, seed, corpus)
    whole = order(tf.range(3 * n, dtype=tf.int64)).numpy().reshape(3, n)
    np.testing.assert_array_equal(np.sort(whole, axis=1), np.tile(np.arange(n), (3, 1)))
    found += [*whole]
  # The cipher behind them is weak: epochs may agree in half of their places.
  for a, b in itertools.combinations(found, 2):
    assert (a == b).mean() < 0.75
  if block > 1:  # blocks begin elsewhere each epoch: so do those rows that are left over
    assert len({order[-1] for order in found}) >= 8


def test_patterns_of_a_mixture_are_of_their_seed_and_without_a_pattern():
  first, again, other = (mixing.pattern([0.5, 0.5], seed).corpus for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  _uncorrelated([first[:-2], first[1:-1], first[2:], other[:-2]])


def test_rows_of_other_parts_splits_and_seeds_have_other_keys(tmp_path):
  grid = [
    hashing.keys(*(seed, 50, *more)) for seed in range(3) for more in ((), (0,), (1,))
  ]
  grid += [
    hashing.keys(s, 50, *more)
    for s in (0, 1)
    for more in itertools.product((0, 1, 2), (0, 1))
  ]
  every = np.concatenate(grid)
  assert len(np.unique(every)) == len(every)
  # The same text in every file; a held-out file is told by its text.
  for number in range(60):
    (tmp_path / f'{number}.jsonl').write_text(
      '\n'.join(f'{{"text": "{"abc" * i} {number}"}}' for i in range(1, 6))
    )
  corpus = CorpusConfig(corpus=str(tmp_path / '*.jsonl'), validation_fraction=0.4)
  found = parts.find(corpus, 1500)
  assert len(found) > 2
  plan, seen = RowPlan(16), []
  job = shard_job.of_config(corpus, VOCABULARY, plan, found, count=2, imports=())
  # As of a corpus that is not small.
  job = dataclasses.replace(job, order=Order(small=False, parts=len(found)))
  made = [shard_job.work(job, part) for part in found]
  assert {split for buckets in made for split, _ in buckets} == {'train', 'validation'}
  seen += [bucket.keys for buckets in made for bucket in buckets.values()]
  every = np.concatenate(seen)
  assert len(np.unique(every)) == len(every) > 200


# The model.

_SMALL = dict(num_layers=3, hidden_size=16, num_heads=2, vocab_size=40, max_positions=16)
_DROPS = dict(embedding_dropout=0.5, attention_dropout=0.5, output_dropout=0.5)
DROPPING = {
  'glm': GLMConfig(**_SMALL, **_DROPS),
  'chatglm': ChatGLMConfig(**_SMALL, **_DROPS, mlp_size=16, deepnorm_layers=3),
}


@pytest.mark.parametrize('name', DROPPING)
def test_every_layer_place_row_and_value_is_dropped_on_its_own(name, monkeypatch):
  """Embeddings once; attention, and what it and the MLP add, in each of three layers."""
  config, masks = DROPPING[name], []
  original = jax.random.bernoulli

  def recorded(key, p, shape):
    kept = original(key, p, shape)
    if not isinstance(kept, jax.core.Tracer):
      masks.append(np.asarray(kept))
    return kept

  ids = jnp.tile(jnp.arange(8), (4, 1))
  seen = Visibility(jnp.zeros_like(ids), jnp.full_like(ids, 8))
  model = models.build(config)
  params = jax.tree.map(
    lambda leaf: jnp.ones(leaf.shape, leaf.dtype), state.abstract_params(config)
  )
  monkeypatch.setattr(jax.random, 'bernoulli', recorded)

  for seed in (0, 1):
    # Without jit the layers' scan is a loop in Python, whose masks are values.
    with jax.disable_jit():
      model.apply(
        {'params': params},
        *(ids, ids, ids, seen),
        deterministic=False,
        rngs={'dropout': jax.random.key(seed)},
      )
  hidden = [mask for mask in masks if mask.shape == (4, 8, 16)]
  attention = [mask for mask in masks if mask.ndim == 5 and mask.size == 4 * 2 * 8 * 8]
  assert (len(hidden), len(attention)) == (2 * 7, 2 * 3) and len(masks) == 20
  for group in (hidden, attention):
    assert abs(np.mean(group) - 0.5) < 0.05
    # Of each mask, each row; all 512 numbers of a mask, 128 of a row.
    flat = np.stack([mask.reshape(-1) for mask in group]).astype(float)
    by_row = np.concatenate([np.moveaxis(mask, 0, 0).reshape(4, -1) for mask in group])
    for table, most in ((flat, 0.25), (by_row.astype(float), 0.45)):
      assert np.abs(np.corrcoef(table) - np.eye(len(table))).max() < most
  # Heads, queries and positions of one mask.
  heads = np.concatenate([m.reshape(-1, 8, 8)[:, :4].reshape(-1, 32) for m in attention])
  assert np.abs(np.corrcoef(heads.astype(float)) - np.eye(len(heads))).max() < 0.85
  assert len({tuple(line) for m in hidden for line in m.reshape(-1, 16)}) > 430


def _keys_of_steps(seed, steps, microbatches):
  """Dropout keys that the loss is given."""
  keys = []

  def loss(variables, batch, key, counts):
    jax.debug.callback(lambda k: keys.append(tuple(k.tolist())), jax.random.key_data(key))
    total = (variables['params']['w'] * batch).sum()
    return total, {'loss': (total, jnp.float32(1))}

  optimizer = optax.sgd(0.1)
  train_step = jax.jit(
    step.make_train_step(loss, optimizer, microbatches=microbatches, seed=seed)
  )
  params = {'w': jnp.ones(())}
  for number in steps:
    train_step(
      {'step': jnp.int32(number), 'params': params, 'opt_state': optimizer.init(params)},
      {},
      jnp.ones(6),
    )
  jax.effects_barrier()
  return keys


def test_every_step_micro_batch_and_seed_has_a_dropout_key_of_its_own():
  """And none is the key that parameters are drawn with."""
  found = [
    key
    for seed in (0, 1)
    for parts, steps in ((1, range(4)), (3, range(4, 8)))
    for key in _keys_of_steps(seed, steps, parts)
  ]
  initial = [tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in range(9)]
  assert len(found) == 2 * (4 + 12)
  assert len({*found, *initial}) == len(found) + len(initial)
  assert _keys_of_steps(1, range(4), 1) == found[16:20]  # a resumed run repeats them


def test_weights_of_layers_and_places_are_drawn_apart():
  """Every weight of a model beside every other one of its size, and each layer's."""
  config = GLMConfig(
    num_layers=3, hidden_size=16, num_heads=2, mlp_size=16, vocab_size=64, max_positions=63
  )
  init = jax.jit(lambda seed: nn.unbox(state.init_params(config, jax.random.key(seed))))
  tables = {}
  for seed, tree in ((seed, init(seed)) for seed in (0, 1)):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      if path[-1].key == 'weight':
        layers = leaf if path[0].key == 'layers' else leaf[None]
        for i, layer in enumerate(layers):
          tables[seed, jax.tree_util.keystr(path), i] = np.asarray(layer).ravel()[:256]
  assert len(tables) == 2 * (3 * 6 + 3)
  _uncorrelated([*tables.values()])
