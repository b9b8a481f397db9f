"""Corpora by rate, packed rows and schedules: still a function of (seed, index)."""

import dataclasses
import itertools

import numpy as np
import pytest
import seqio
import tensorflow as tf
from etils import epath

from glm_jax.batch import MIXED, OBJECTIVES, Batch
from glm_jax.data import pipeline, prepare, shares, tasks
from glm_jax.data.corpora import parts
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.data.examples import infilling, packed
from glm_jax.data.examples.objective_config import ObjectiveConfig, causal_packing
from glm_jax.data.making import shard_job, shard_runner
from glm_jax.data.making.order import Order
from glm_jax.data.pipeline import Process
from glm_jax.data.rows.table import make_rows, packed_rows
from glm_jax.data.stream import mixing, stateless
from glm_jax.data.stream.mixing import MixtureConfig
from glm_jax.data.stream.source import Reading
from glm_jax.text.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary()
L = 96
LENGTHS = {'tokens': L}
BATCH = 24
OBJECTIVE = ObjectiveConfig(
  schedule=((0, 3, 1.0, 0.0, 0.0), (3, -1, 0.5, 0.3, 0.2)),
  loss_weights=(1.0, 0.5, 2.0),
  loss_mean='example',
)
MIXTURE = MixtureConfig(
  corpora={'a': 'shards:{}/a', 'b': 'shards:{}/b', 'c': 'shards:{}/c'},
  rates={'a': 0.5, 'b': 0.3, 'c': 0.2},
)
NAMES = [name for name in Batch._fields if name != 'index']


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
  """Shards of three corpora, packed, in blocks of 4 rows; the letters tell them apart."""
  folder = tmp_path_factory.mktemp('mixed')
  plan = OBJECTIVE.packing(L)
  rng = np.random.default_rng(0)
  block, Order.block = Order.block, property(lambda order: 4)
  for name, count in (('a', 500), ('b', 300), ('c', 300)):
    (folder / f'{name}.text').mkdir()
    for number in range(count):
      words = [name * int(k) for k in rng.integers(1, 8, rng.integers(1, 14))]
      text = f'{number} ' + ' '.join(words) + '. '
      (folder / f'{name}.text' / f'{number}.txt').write_text(text)
    corpus = CorpusConfig(
      corpus=str(folder / f'{name}.text' / '*.txt'), cache_dir=str(folder / 'cache')
    )
    todo = parts.find(corpus, 4000)
    job = shard_job.of_config(corpus, VOCABULARY, plan, todo, count=3, imports=())
    shard_runner.run(job, epath.Path(folder / name), todo, 1)
  Order.block = block
  return folder


def _prepare(folder, mixture=MIXTURE, task='glm_mixture', **corpus):
  named = {name: spec.format(folder) for name, spec in mixture.corpora.items()}
  return prepare.prepare(
    task,
    LENGTHS,
    CorpusConfig(packed=True, cache_dir=str(folder / 'cache'), **corpus),
    VocabularyConfig(path='bytes'),
    OBJECTIVE,
    mixture=dataclasses.replace(mixture, corpora=named),
  )


@pytest.fixture
def mixed(folder):
  return _prepare(folder)


def _take(count, task='glm_mixture', **reading):
  reading = {'batch_size': BATCH, 'seed': 7, **reading}
  stream = pipeline.dataset(task, LENGTHS, **reading).as_numpy_iterator()
  return list(itertools.islice(stream, count))


@pytest.mark.parametrize(
  'start,count',
  [
    (1, 3),
    pytest.param(1, 2, marks=pytest.mark.slow),
    pytest.param(10**9, 8, marks=pytest.mark.slow),
  ],
)
def test_global_batches_are_the_same_for_any_number_of_hosts(mixed, count, start):
  """With packing, a mixture of corpora and a schedule of objectives."""
  whole = _take(3, start_step=start)
  hosts = [
    _take(3, start_step=start, process=Process(index=i, count=count)) for i in range(count)
  ]
  for step in range(3):
    for name in whole[0]:
      together = np.concatenate([host[step][name] for host in hosts])
      np.testing.assert_array_equal(together, whole[step][name], err_msg=name)


def test_quotas_are_exact_and_every_corpus_has_its_own_epochs(mixed):
  n = {corpus.name: len(corpus.rows['train']) for corpus in mixed.corpora}
  source = seqio.get_mixture_or_task('glm_mixture').source.at(Reading(20))
  stream = source.get_dataset(seed=7).as_numpy_iterator()
  corpus, tokens = [], []
  for batch in itertools.islice(stream, 100):
    corpus += batch['corpus'].tolist()
    tokens += [row.tobytes() for row in batch['tokens']]
  assert np.bincount(corpus[:1000]).tolist() == [500, 300, 200]
  assert np.bincount(corpus[1000:]).tolist() == [500, 300, 200]
  for number, c in enumerate(mixed.corpora):
    mine = [row for row, which in zip(tokens, corpus, strict=True) if which == number]
    size = n[c.name]
    want = sorted(row.tobytes() for row in c.rows['train'].read().tokens)
    epochs = [mine[i : i + size] for i in range(0, len(mine) - size + 1, size)]
    assert len(epochs) >= 2
    for epoch in epochs:  # every row once, before any comes again
      assert sorted(epoch) == want
    assert epochs[0] != epochs[1]


def test_blocks_of_rows_are_read_together_and_fall_otherwise_each_epoch(mixed):
  rows_a = mixed.corpora[0].rows['train']
  assert rows_a.block == 4
  numbers = {row.tobytes(): i for i, row in enumerate(rows_a.read().tokens)}
  source = seqio.get_mixture_or_task('glm_mixture').source
  alone = type(source)([dataclasses.replace(source.corpora[0], share=1.0)], Reading(1))
  stream = alone.get_dataset(seed=7).as_numpy_iterator()
  n = len(rows_a)
  found = [numbers[next(stream)['tokens'].tobytes()] for _ in range(3 * n)]
  firsts = []
  for epoch in range(3):
    order = np.array(found[epoch * n : (epoch + 1) * n])
    assert sorted(order) == list(range(n))
    whole = order[: n // 4 * 4].reshape(-1, 4)
    assert ((whole - whole[:, :1]) % n == np.arange(4)).all()
    firsts.append(set(whole[:, 0].tolist()))
  assert firsts[0] != firsts[1] or firsts[1] != firsts[2]


def test_a_pattern_meets_small_shares_too():
  found = mixing.pattern([0.9989, 0.001, 0.0001], seed=3)
  assert len(found.corpus) == 100_000 and found.quotas.tolist() == [99_890, 100, 10]
  for number, quota in enumerate(found.quotas):
    ranks = found.rank[found.corpus == number]
    np.testing.assert_array_equal(ranks, np.arange(quota))
  other = mixing.pattern([0.9989, 0.001, 0.0001], seed=4)
  assert (other.corpus != found.corpus).any()


@pytest.mark.parametrize(
  'fields,message',
  [
    (dict(rates={'a': -1.0, 'b': 2.0}), 'rates must be 0 or more'),
    (dict(rates={'a': 0.0, 'b': 0.0}), 'rates must be 0 or more'),
    (dict(rates={'a': 1.0}), 'of the names'),
    (dict(rates={'a': 1.0, 'b': 1.0}, temperature=2.0), 'beside rates'),
    (dict(temperature=0.0), 'temperature must be 1 or more'),
  ],
)
def test_bad_rates_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    MixtureConfig(corpora={'a': 'x', 'b': 'y'}, **fields)


def test_a_corpus_of_rate_0_is_not_read(folder):
  mixture = dataclasses.replace(MIXTURE, rates={'a': 0.0, 'b': 1.0, 'c': 1.0})
  assert [c.name for c in _prepare(folder, mixture=mixture).corpora] == ['b', 'c']


@pytest.mark.parametrize('most', [0, 7, 12])
def test_an_index_of_validation_says_which_corpus_its_row_is_of(mixed, most):
  for task in mixed.evaluation_tasks.values():
    rows = pipeline.validated_rows(task, most)
    assert [*rows] == ['a', 'b', 'c'] and min(rows.values()) > 0
    if not most:
      assert [*rows.values()] == [len(c.rows['validation']) for c in mixed.corpora]
    batches = _take(99, task, split='validation', train=False, max_rows=most, batch_size=4)
    index, corpus = (np.concatenate([b[k] for b in batches]) for k in ('index', 'corpus'))
    assert (index >= 0).sum() == sum(rows.values()) and len(batches) < 99
    wanted = np.repeat(range(3), [*rows.values()])
    np.testing.assert_array_equal(corpus[index >= 0], wanted[index[index >= 0]])


def test_a_corpus_without_a_validation_split_is_not_validated(folder, mixed):
  """As shards may lack it: the others are, whatever the task."""

  def without(corpora):
    *others, last = corpora
    return [*others, dataclasses.replace(last, rows={'train': last.rows['train']})]

  tasks.register(without(mixed.corpora), VOCABULARY, OBJECTIVE, OBJECTIVE)
  texts = MixtureConfig(corpora={name: f'{{}}/{name}.text/*.txt' for name in 'ab'})
  causal = _prepare(folder, mixture=texts, task='glm_causal').corpora
  tasks.register_causal(without(causal), VOCABULARY)
  for name, there in (('blank', ['a', 'b']), ('causal', ['a'])):
    task = f'glm_{name}{tasks.EVALUATION}'
    rows = pipeline.validated_rows(task, 0)
    assert [*rows] == there
    batches = _take(99, task, split='validation', train=False)
    assert sum((b['index'] >= 0).sum() for b in batches) == sum(rows.values())


# Packing.


def _examples_of(batch, row):
  """The examples of a row, each as if alone."""
  end, start = batch['key_end'][row], batch['key_start'][row]
  firsts = np.flatnonzero((end > 0) & (start == np.arange(L)))
  stops = [*firsts[1:], int((end > 0).sum())]
  for first, stop in zip(firsts, stops, strict=True):
    example = {name: batch[name][row, first:stop].copy() for name in NAMES}
    example['key_start'] -= first
    example['key_end'] -= first
    yield example


def test_a_packed_example_is_the_one_it_is_alone(mixed):
  """Each document of each row, made into an example by itself with its key."""
  plan = mixed.corpora[0].rows['train'].plan
  source = seqio.get_mixture_or_task('glm_mixture').source.at(Reading(BATCH, 5))
  raw = next(source.get_dataset(seed=7).as_numpy_iterator())
  batch = _take(1, start_step=5)[0]
  taken, places = packed.take_apart({k: tf.constant(v) for k, v in raw.items()}, plan)
  size = taken.tokens.shape[1] + 2 * packed.spans_of_longest(plan)
  number, several = 0, 0
  for row in range(BATCH):
    examples = list(_examples_of(batch, row))
    several += len(examples) > 1
    for slot, example in enumerate(examples):
      assert (places.row[number], places.number[number]) == (row, slot)
      alone = infilling.make_examples(
        infilling.TextRows(*(field[number : number + 1] for field in taken)),
        size,
        OBJECTIVE,
        VOCABULARY,
      )
      length = len(example['tokens'])
      assert length == int((alone['key_end'][0] > 0).numpy().sum())
      for name in NAMES:
        np.testing.assert_array_equal(example[name], alone[name][0, :length], name)
      number += 1
  assert number == len(places.row) and several > BATCH / 3
  assert len({*taken.keys.numpy().tolist()}) == number


def test_every_document_is_whole_and_once_in_an_epoch_and_none_is_trimmed(folder):
  data = _prepare(folder, mixture=dataclasses.replace(MIXTURE, rates={}))
  found = []
  for corpus in data.corpora:
    table = corpus.rows['train'].read()
    for row, starts, n in zip(table.tokens, table.starts, table.lengths, strict=True):
      at = [*np.flatnonzero(starts[:n]), n]
      found += [bytes(row[i + 1 : j - 1].astype('u1')) for i, j in itertools.pairwise(at)]
      assert all(row[i] == VOCABULARY.prefix[0] for i in at[:-1])
  short = [
    path.read_bytes()
    for path in folder.glob('*.text/*.txt')
    if len(path.read_bytes()) + 2 <= data.corpora[0].rows['train'].plan.longest
  ]
  assert len(short) > 200
  held_out = sum(c.rows['validation'].stats['documents'] for c in data.corpora)
  assert len(set(short) - set(found)) <= held_out
  assert len(found) == len({*found})
  # Spans are put back: a row's text tokens are all there, [eop] and [sop] apart.
  batch = _take(1)[0]
  for row in range(BATCH):
    for example in _examples_of(batch, row):
      assert example['key_end'].max() == len(example['tokens'])
      assert (example['key_start'] == 0).all()
      assert example['positions'][0] == 0 and example['loss_weights'].sum() > 0


@pytest.mark.parametrize('length', [512, 2048])
def test_rows_are_filled_as_promised(length):
  """Documents of 30 to 600 tokens, some of which do not fit in a row of 512."""
  rng = np.random.default_rng(0)
  documents = [([], np.full(n, 97)) for n in rng.integers(28, 599, 3000)]
  eos = VOCABULARY.specials.eos
  plan = causal_packing(length)
  table = make_rows(documents, VOCABULARY.prefix, eos, plan)
  assert table.lengths.sum() / table.tokens.size > 0.97
  config = ObjectiveConfig()
  plan = config.packing(length)
  table = make_rows(documents, VOCABULARY.prefix, eos, plan)
  count = len(table.lengths)
  x = {k: tf.constant(v) for k, v in table._asdict().items()}
  x['keys'] = stateless.example_keys(0, tf.range(count, dtype=tf.int64))
  x['step'] = tf.zeros(count, tf.int64)
  source, places = packed.take_apart(x, plan)
  size = source.tokens.shape[1] + 2 * packed.spans_of_longest(plan)
  made = infilling.make_examples(source, size, config, VOCABULARY)
  made = packed.put_together(made, places, count, length, VOCABULARY.specials.pad)
  fill = (made['key_end'].numpy() > 0).mean()
  assert fill > 0.92, fill
  hidden = (made['block_positions'].numpy() == 1).sum()
  assert made['capped'].numpy().sum() < 0.02 * len(documents)
  assert hidden > 3000


@pytest.mark.parametrize('size', [63, 64, 65, 66, 67, 68, 128, 131, 150])
def test_a_long_document_fills_rows_and_its_last_part_is_not_tiny(size):
  # 65 tokens are trained on in 64 positions; a prefix and <eos> are among them.
  prompt, text = np.arange(10), np.arange(10, size)
  table = packed_rows([(prompt, text)], (99,), 98, causal_packing(64))
  parts_of = [
    (row[i:j].tolist(), scored[i:j].tolist())
    for row, scored, starts, n in zip(
      table.tokens, table.scored, table.starts, table.lengths, strict=True
    )
    for i, j in itertools.pairwise([*np.flatnonzero(starts), n])
  ]
  parts_of.sort(key=lambda part: part[0][1])
  assert [part[0] for part, _ in parts_of] == [99] * len(parts_of)
  assert [t for part, _ in parts_of for t in part[1:]] == [*range(size), 98]
  # Neither prefixes nor the prompt carry loss.
  assert [s for _, part in parts_of for s in part[1:]] == [i >= 10 for i in range(size + 1)]
  assert not any(part[0] for _, part in parts_of)
  *full, last = (len(part) - 1 for part, _ in parts_of)
  assert all(n == 64 for n in full[:-1])
  if full:  # a sixteenth of 64 is 4
    assert last >= 4 and (full[-1] == 64 or (last == 4 and full[-1] > 60))


def test_causal_documents_are_packed_too(folder):
  data = _prepare(
    folder,
    mixture=MixtureConfig(),
    task='glm_causal',
    corpus=str(folder / 'a.text' / '*.txt'),
  )
  batch = _take(1, 'glm_causal')[0]
  table = data.corpora[0].rows['train'].read()
  assert table.lengths.max() <= L + 1 and (batch['objective'] == 3).all()
  several = 0
  for row in range(BATCH):
    examples = list(_examples_of(batch, row))
    several += len(examples) > 1
    for example in examples:
      size = len(example['tokens'])
      np.testing.assert_array_equal(example['positions'], np.arange(size))
      np.testing.assert_array_equal(example['key_end'], np.arange(size) + 1)
      assert example['tokens'][0] == VOCABULARY.prefix[0]
  assert several > BATCH / 3


# Schedules and weights.


def test_objectives_follow_the_schedule(mixed):
  early = _take(3)
  for batch in early:
    assert (batch['objective'][batch['key_end'] > 0] == 0).all()
  counts = np.zeros(3)
  for batch in _take(40, start_step=3):
    for row in range(BATCH):
      for example in _examples_of(batch, row):
        counts[example['objective'][0]] += 1
  np.testing.assert_allclose(counts / counts.sum(), [0.5, 0.3, 0.2], atol=0.04)


def test_every_example_weighs_what_its_objective_does(mixed):
  seen = set()
  for batch in _take(6, start_step=2):
    for row in range(BATCH):
      for example in _examples_of(batch, row):
        objective = example['objective'][0]
        seen.add(objective)
        total = example['loss_weights'].sum()
        np.testing.assert_allclose(total, OBJECTIVE.loss_weights[objective], rtol=1e-5)
        assert len({*example['loss_weights'][example['loss_weights'] > 0]}) == 1
  assert seen == {0, 1, 2}


def test_validation_does_not_depend_on_how_training_is_weighed(mixed):
  assert [*mixed.evaluation_tasks] == list(MIXED)
  for number, task in enumerate(mixed.evaluation_tasks.values()):
    for batch in _take(9, task, split='validation', train=False):
      assert {*np.unique(batch['loss_weights'])} <= {0.0, 1.0}
      inside = batch['key_end'] > 0
      assert (batch['objective'][inside] == number).all()


@pytest.mark.parametrize(
  'schedule,message',
  [
    (((0, 10, 1.0, 0.0, 0.0), (11, -1, 1.0, 1.0, 1.0)), 'from 11 where 10 is next'),
    (((0, 10, 1.0, 0.0, 0.0), (9, -1, 1.0, 1.0, 1.0)), 'from 9 where 10 is next'),
    (((5, -1, 1.0, 0.0, 0.0),), 'from 5 where 0 is next'),
    (((0, -1, 1.0, 0.0, 0.0), (10, -1, 1.0, 1.0, 1.0)), 'must hold phases'),
    (((0, 10, 1.0, 0.0),), 'must hold phases'),
    (((0, 0, 1.0, 0.0, 0.0),), 'must hold phases'),
    (((0, -1, 0.0, 0.0, 0.0),), 'must be 0 or more'),
    (((0, -1, 2.0, -1.0, 0.0),), 'must be 0 or more'),
  ],
)
def test_schedules_with_gaps_or_nonsense_are_refused(schedule, message):
  with pytest.raises(ValueError, match=message):
    ObjectiveConfig(schedule=schedule)


def test_a_schedule_must_reach_the_end_of_the_run():
  config = ObjectiveConfig(schedule=((0, 10, 1.0, 0.0, 0.0),))
  config.check_steps(10)
  with pytest.raises(ValueError, match='must reach the last of 11 steps'):
    config.check_steps(11)


def test_the_table_says_what_is_trained_on(mixed):
  lines = shares.table(
    'glm_mixture',
    LENGTHS,
    mixed.corpora,
    batch_size=BATCH,
    seed=7,
    step=3,
    train_steps=100,
  )
  text = '\n'.join(lines)
  assert all(f'  {c} {o}' in text for c in 'abc' for o in MIXED)
  n = len(mixed.corpora[0].rows['train'])
  assert f'{n:>14,}{100 * BATCH * 0.5 / n:>9.2f}' in text
  batch = _take(1, start_step=3)[0]
  counts = shares.count(batch, 3)
  whole = list(itertools.chain(*(_examples_of(batch, row) for row in range(BATCH))))
  assert counts[..., 0].sum() == len(whole)
  assert counts.shape == (3, len(OBJECTIVES), 4)
  assert counts[..., 1].sum() == (batch['key_end'] > 0).sum()
  assert counts[..., 2].sum() == (batch['loss_weights'] > 0).sum()


# What does not fit.


def test_shards_for_something_else_are_refused(folder):
  with pytest.raises(ValueError, match=r'CorpusConfig.packed must be as'):
    prepare.prepare(
      'glm_mixture',
      LENGTHS,
      CorpusConfig(corpus=f'shards:{folder}/a', packed=False),
      VocabularyConfig(),
      OBJECTIVE,
    )
  for length, objective in (
    ({'tokens': 64}, OBJECTIVE),
    (LENGTHS, dataclasses.replace(OBJECTIVE, mask_ratio=0.4)),
  ):
    with pytest.raises(ValueError, match='must fit the rows of this run'):
      prepare.prepare(
        'glm_mixture',
        length,
        CorpusConfig(corpus=f'shards:{folder}/a', packed=True),
        VocabularyConfig(),
        objective,
      )


def test_a_corpus_smaller_than_its_part_of_a_batch_is_refused(mixed):
  prepare.check_batch(mixed, 24)
  with pytest.raises(ValueError, match="must hold the rows of one global batch.*'b'"):
    n = {c.name: len(c.rows['train']) for c in mixed.corpora}
    prepare.check_batch(mixed, int(n['b'] / 0.3) + 4)
