"""The stream of examples is a function of (seed, index), through the registered task."""

import functools
import itertools

import jax
import numpy as np
import pytest
import seqio
import tensorflow as tf
from etils import epath

from glm_jax.batch import DTYPES, Batch
from glm_jax.checkpoints import place
from glm_jax.data import pipeline, prepare, preprocessors, tasks
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.making import tokenized
from glm_jax.data.pipeline import Process
from glm_jax.data.rows.table import RowPlan
from glm_jax.data.stream.source import Corpus, Reading
from glm_jax.text.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary()
LENGTHS = {'tokens': 64}


@pytest.fixture(scope='module')
def registered(tmp_path_factory):
  """The four tasks over 40 documents of bytes."""
  folder = tmp_path_factory.mktemp('text')
  rng = np.random.default_rng(0)
  for number in range(40):
    words = [bytes(rng.integers(97, 123, rng.integers(2, 9))).decode() for _ in range(60)]
    (folder / f'{number:02}.txt').write_text('. '.join(words))
  corpus = CorpusConfig(corpus=str(folder / '*.txt'), cache_dir=str(folder / 'cache'))
  config = ObjectiveConfig(blank=0.5, document=0.2, sentence=0.3)
  made = {
    split: tokenized.cached_rows(corpus, VOCABULARY, split, RowPlan(config.row_length(64)))
    for split in ('train', 'validation')
  }
  tasks.register([Corpus('', made)], VOCABULARY, config, config)
  return made


def _take(count, task='glm_mixture', **reading):
  reading = {'batch_size': 24, 'seed': 7, **reading}
  stream = pipeline.batches(task, LENGTHS, **reading)
  return [next(stream) for _ in range(count)]


def _same(a, b):
  for name in Batch._fields:
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_batches_have_the_contract(registered):
  batch = _take(1)[0]
  for name, dtype in zip(Batch._fields, DTYPES, strict=True):
    assert getattr(batch, name).dtype == dtype
    assert getattr(batch, name).shape == ((24,) if name == 'index' else (24, 64))


def test_examples_come_in_the_order_of_their_index(registered):
  index = np.concatenate([batch.index for batch in _take(20)])
  np.testing.assert_array_equal(index, np.arange(480))


def test_global_batches_do_not_depend_on_the_number_of_processes(registered):
  """More numbers of them in mixing_test.py, where rows are packed and corpora mixed."""
  start, count = 10**9, 3
  whole = _take(2, start_step=start)
  parts = [
    _take(2, start_step=start, process=Process(index=i, count=count)) for i in range(count)
  ]
  for step in range(2):
    joined = Batch(
      *(
        np.concatenate(columns)
        for columns in zip(*(part[step] for part in parts), strict=True)
      )
    )
    _same(joined, whole[step])


def test_resuming_begins_at_its_step_and_reads_nothing_before(registered):
  """The stream is a range of steps that begins there: there is nothing to replay."""
  straight = _take(6)
  _same(_take(1, start_step=5)[0], straight[5])
  task = seqio.get_mixture_or_task('glm_mixture')
  source = task.source.at(Reading(24, start_step=10**9))
  first = next(source.get_dataset(seed=7).as_numpy_iterator())
  assert first['index'][0] == 24 * 10**9


def test_an_epoch_reads_every_row_once_and_the_next_in_another_order(registered):
  n = len(registered['train'])
  task = seqio.get_mixture_or_task('glm_mixture')
  stream = task.source.at(Reading(1)).get_dataset(seed=7).as_numpy_iterator()
  seen = [next(stream)['tokens'].tobytes() for _ in range(2 * n)]
  assert len({*seen[:n]}) == len({*seen[n:]}) == len({*seen}) == n
  assert seen[:n] != seen[n:]
  assert seen[:n] != [row.tobytes() for row in registered['train'].read().tokens]


def test_masks_are_fresh_each_epoch_and_fixed_in_validation(registered):
  n = len(registered['train'])
  by_text = {}
  stream = pipeline.batches('glm_blank', LENGTHS, batch_size=n, seed=7)
  for batch in itertools.islice(stream, 2):
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
      key = tuple(sorted([*tokens.tolist(), *targets.tolist()]))
      by_text.setdefault(key, []).append(tokens.tobytes())
  # The same text twice: other masks, so other inputs.
  inputs = [x for group in by_text.values() for x in group]
  assert len({*inputs}) > 1.9 * n
  for _ in range(2):
    first, second = (
      [
        *pipeline.batches(
          'glm_blank', LENGTHS, batch_size=8, seed=0, split='validation', train=False
        )
      ]
      for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
      _same(a, b)


def test_validation_reads_the_split_once_and_fills_up_with_nothing(registered):
  n = len(registered['validation'])
  for count in (1, 2):
    found = []
    for i in range(count):
      found += pipeline.batches(
        'glm_blank',
        LENGTHS,
        batch_size=8,
        seed=0,
        train=False,
        split='validation',
        process=Process(index=i, count=count),
      )
    index = np.sort(np.concatenate([batch.index for batch in found]))
    np.testing.assert_array_equal(index[index >= 0], np.arange(n))
    for batch in found:
      assert (batch.loss_weights[batch.index < 0] == 0).all()
      assert (batch.key_end[batch.index < 0] == 0).all()
      assert (batch.loss_weights[batch.index >= 0].sum(1) > 0).all()
  few = [
    *pipeline.batches(
      'glm_blank',
      LENGTHS,
      batch_size=8,
      seed=0,
      train=False,
      split='validation',
      max_rows=5,
    )
  ]
  assert sum((batch.index >= 0).sum() for batch in few) == 5


def test_other_seeds_and_objectives_have_other_examples(registered):
  a, b = _take(1)[0], _take(1, seed=8)[0]
  assert (a.tokens != b.tokens).any(1).all()
  blank, sentence = _take(1, 'glm_blank')[0], _take(1, 'glm_sentence')[0]
  assert (blank.objective == 0).all() and (sentence.objective == 2).all()


def test_the_stream_does_not_depend_on_parallelism(registered):
  provider = seqio.get_mixture_or_task('glm_mixture')
  results = []
  for calls in (1, 16):
    options = tf.data.Options()
    options.threading.private_threadpool_size = calls
    dataset = pipeline.dataset('glm_mixture', LENGTHS, batch_size=24, seed=7)
    stream = dataset.with_options(options).as_numpy_iterator()
    results.append([next(stream)['tokens'].tobytes() for _ in range(30)])
  assert results[0] == results[1]
  assert provider.output_features['tokens'].rank == 2


def test_a_seed_and_a_divisible_batch_are_asked_for(registered):
  with pytest.raises(ValueError, match='function of its seed'):
    seqio.get_mixture_or_task('glm_blank').source.get_dataset()
  with pytest.raises(ValueError, match='must divide by the processes'):
    _take(1, process=Process(index=0, count=5))


# Tasks of the user's own: any seqio source, single examples.


@pytest.fixture(scope='module')
def own_task():
  texts = [f'Document {i} says something. ' * (3 + i % 5) for i in range(50)]

  def source(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    return tf.data.Dataset.from_tensor_slices({'text': texts})

  config = ObjectiveConfig(blank=1, document=1, sentence=1)
  with_vocabulary = functools.partial(functools.partial, vocabulary=VOCABULARY)
  seqio.TaskRegistry.add(
    'own',
    source=seqio.FunctionDataSource(source, splits=('train', 'validation')),
    preprocessors=[
      with_vocabulary(preprocessors.tokenize),
      functools.partial(preprocessors.to_rows, vocabulary=VOCABULARY, config=config),
      functools.partial(preprocessors.glm_mixture, vocabulary=VOCABULARY, config=config),
    ],
    output_features=preprocessors.output_features(VOCABULARY),
    shuffle_buffer_size=20,
  )
  yield 'own'
  seqio.TaskRegistry.remove('own')


def test_an_ordinary_task_yields_the_same_contract(own_task):
  a, b = _take(5, own_task), _take(5, own_task)
  for one, two in zip(a, b, strict=True):
    _same(one, two)
    assert one.tokens.shape == (24, 64) and one.loss_weights.sum() > 0
  assert (
    prepare.prepare(
      own_task, LENGTHS, CorpusConfig(), None, ObjectiveConfig()
    ).vocabulary.fingerprint
    == 'bytes'
  )


def test_processes_of_an_ordinary_task_see_other_examples_and_masks(own_task):
  """seqio hands every process the same seeds."""
  parts = [_take(2, own_task, process=Process(index=i, count=2)) for i in range(2)]
  rows_of = [{row.tobytes() for batch in part for row in batch.tokens} for part in parts]
  assert not rows_of[0] & rows_of[1]
  found = [
    [
      *pipeline.batches(
        own_task,
        LENGTHS,
        batch_size=16,
        seed=0,
        train=False,
        split='validation',
        process=Process(index=i, count=2),
      )
    ]
    for i in range(2)
  ]
  assert len(found[0]) == len(found[1])


def test_a_task_without_the_contract_is_refused(own_task):
  with pytest.raises(ValueError, match='lacks'):
    seqio.TaskRegistry.add(
      'short',
      source=seqio.FunctionDataSource(lambda split, shuffle_files: None, ('train',)),
      preprocessors=[],
      output_features={'tokens': seqio.Feature(seqio.ByteVocabulary())},
    )
    next(pipeline.batches('short', LENGTHS, batch_size=2, seed=0))
  seqio.TaskRegistry.remove('short')
  with pytest.raises(ValueError, match='must be one of'):
    prepare.prepare('no_such_task', LENGTHS, CorpusConfig(), None, ObjectiveConfig())


def test_too_long_a_sequence_is_an_error_not_a_trim(own_task):
  longer = {'tokens': np.arange(200, dtype=np.int32) % 256}
  dataset = tf.data.Dataset.from_tensors(longer)
  with (
    pytest.raises(tf.errors.InvalidArgumentError, match='split documents with to_rows'),
    seqio.utils.map_seed_manager(0),
  ):
    made = preprocessors.blank_infilling(dataset, LENGTHS, vocabulary=VOCABULARY)
    next(made.as_numpy_iterator())


def test_an_ordinary_stream_goes_on_from_its_place(own_task, tmp_path):
  """Shuffle buffer and seeds included; nothing is read again."""

  def stream():
    return pipeline.Stream(own_task, LENGTHS, batch_size=8, seed=7)

  one = stream()
  assert not one.indexed
  for _ in range(3):
    next(one)
  one.save(str(tmp_path / 'place'))
  wanted = [next(one) for _ in range(12)]  # into the next epoch
  other = stream()
  other.restore(str(tmp_path / 'place'))
  for batch in wanted:
    _same(next(other), batch)
  with pytest.raises(ValueError, match='place in the data must be readable'):
    stream().restore(str(tmp_path / 'nowhere'))
  with pytest.raises(ValueError, match='begins at step 0'):
    _take(1, own_task, start_step=3)


def test_another_number_of_processes_cannot_go_on_from_a_place(
  own_task, tmp_path, monkeypatch
):
  stream = pipeline.Stream(own_task, LENGTHS, batch_size=8, seed=7)
  handler = place.PlaceHandler()
  folder = epath.Path(tmp_path)
  handler.save(folder, place.SavePlace(stream))
  handler.restore(folder, place.RestorePlace(stream))
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(
    ValueError, match=r'as many processes as it had, got \[1\] then and 2'
  ):
    handler.restore(folder, place.RestorePlace(stream))


def test_a_pipeline_with_python_in_it_says_that_it_has_no_place(tmp_path):
  def numbers():
    while True:
      yield {'tokens': np.arange(20, dtype=np.int32)}

  signature = {'tokens': tf.TensorSpec([20], tf.int32)}
  seqio.TaskRegistry.add(
    'of_python',
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: tf.data.Dataset.from_generator(
        numbers, output_signature=signature
      ),
      splits=('train',),
    ),
    preprocessors=[functools.partial(preprocessors.blank_infilling, vocabulary=VOCABULARY)],
    output_features=preprocessors.output_features(VOCABULARY),
    shuffle_buffer_size=8,
  )
  stream = pipeline.Stream('of_python', LENGTHS, batch_size=8, seed=7)
  next(stream)
  with pytest.raises(ValueError, match='TensorFlow operations alone'):
    stream.save(str(tmp_path / 'place'))
  seqio.TaskRegistry.remove('of_python')
