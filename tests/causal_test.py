"""Causal rows: next tokens, documents that do not see each other, and their task."""

import jax.numpy as jnp
import numpy as np
import pytest
import small
import tensorflow as tf

from glm_jax.batch import OBJECTIVES, Visibility
from glm_jax.data import pipeline, prepare
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.data.examples import render
from glm_jax.data.examples.causal import causal_examples
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.rows.table import stream_rows
from glm_jax.models import ChatGLM2Config
from glm_jax.text import vocabulary as vocabularies
from glm_jax.text.released import ChatGLM3Vocabulary

LENGTH = 40


@pytest.fixture(scope='module')
def vocabulary():
  text = ['the quick brown fox jumps over the lazy dog. ' * 4, '语言模型在学习文字。' * 8]
  return ChatGLM3Vocabulary(vocabularies.train_sentencepiece(text, 512, bpe=True))


def _documents(count=60):
  """Token ids of documents of 2 to 90 tokens; a third of them with a prompt."""
  rng = np.random.default_rng(0)
  draw = lambda low, high: rng.integers(3, 200, rng.integers(low, high)).tolist()
  return [(draw(1, 9) if rng.random() < 1 / 3 else [], draw(2, 90)) for _ in range(count)]


def _batch(vocabulary, documents, length=LENGTH):
  """Rows of documents as a batch, and the rows themselves."""
  eos = vocabulary.specials.eos
  table = stream_rows(documents, vocabulary.prefix, eos, length + 1)
  made = causal_examples(
    *map(tf.constant, (table.tokens, table.lengths, table.scored, table.starts)),
    vocabulary.specials.pad,
  )
  packed = [
    (ids[:n].tolist(), flags[:n].tolist())
    for ids, flags, n in zip(table.tokens, table.scored, table.lengths, strict=True)
  ]
  return {k: v.numpy() for k, v in made.items()}, packed


def test_each_position_predicts_the_next_token_of_its_document(vocabulary):
  """Against a loop over tokens that knows nothing of intervals."""
  batch, packed = _batch(vocabulary, _documents())
  opening, several = vocabulary.prefix[0], 0
  for row, (ids, flags) in enumerate(packed):
    start = 0
    for t in range(LENGTH):
      if t >= len(ids) - 1:
        assert batch['loss_weights'][row, t] == 0
        assert batch['key_start'][row, t] == batch['key_end'][row, t] == 0
        continue
      start = t if ids[t] == opening else start
      several += start > 0
      assert batch['tokens'][row, t] == ids[t]
      assert batch['targets'][row, t] == ids[t + 1]
      assert batch['loss_weights'][row, t] == float(flags[t + 1])
      assert batch['positions'][row, t] == t - start
      assert (batch['key_start'][row, t], batch['key_end'][row, t]) == (start, t + 1)
  assert several > 100
  assert (batch['objective'] == OBJECTIVES.index('causal')).all()
  assert not batch['block_positions'].any()


def test_every_text_token_is_predicted_once_and_no_prompt_is(vocabulary):
  documents = _documents()
  batch, packed = _batch(vocabulary, documents)
  eos = vocabulary.specials.eos
  wanted = [token for _, text in documents for token in (*text, eos)]
  predicted = [
    token
    for row in range(len(packed))
    for token in batch['targets'][row][batch['loss_weights'][row] > 0].tolist()
  ]
  assert predicted == wanted


def test_a_packed_document_has_the_logits_it_has_alone(vocabulary):
  documents = [([], list(range(10, 10 + n))) for n in (7, 12, 5)]
  together, packed = _batch(vocabulary, documents)
  assert len(packed) == 1
  config = ChatGLM2Config(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    mlp_size=48,
    vocab_size=640,
    max_positions=64,
    init_std=0.3,
  )
  params = small.params(config)

  def logits_of(*inputs):
    return small.logits(config, params, *inputs[:3], Visibility(*inputs[3:]))

  names = ('tokens', 'positions', 'block_positions', 'key_start', 'key_end')
  whole = logits_of(*(jnp.asarray(together[name]) for name in names))[0]
  at = 0
  for document in documents:
    alone, _ = _batch(vocabulary, [document])
    own = logits_of(*(jnp.asarray(alone[name]) for name in names))[0]
    size = int((alone['key_end'] > 0).sum())
    np.testing.assert_allclose(whole[at : at + size], own[:size], atol=2e-5)
    at += size + 1  # <eos>, an input here alone


@pytest.fixture(scope='module')
def prepared(tmp_path_factory, vocabulary):
  folder = tmp_path_factory.mktemp('text')
  rng = np.random.default_rng(1)
  words = 'the quick brown fox jumps over a lazy dog 语言 模型 学习'.split()
  for number in range(40):
    text = ' '.join(rng.choice(words, rng.integers(5, 60)))
    (folder / f'{number:02}.txt').write_text(text, encoding='utf-8')
  corpus = CorpusConfig(corpus=str(folder / '*.txt'), cache_dir=str(folder / 'cache'))
  return prepare.prepare(
    'glm_causal',
    {'tokens': LENGTH},
    corpus,
    VocabularyConfig(),
    ObjectiveConfig(),
    vocabulary,
  )


def test_a_row_without_room_behind_a_prefix_is_refused(vocabulary, tmp_path):
  with pytest.raises(ValueError, match='must leave room behind the 2 tokens'):
    prepare.prepare(
      'glm_causal',
      {'tokens': 2},
      CorpusConfig(corpus=str(tmp_path / '*.txt'), packed=False),
      VocabularyConfig(),
      ObjectiveConfig(),
      vocabulary,
    )


def _stream(count, **reading):
  reading = {'batch_size': 24, 'seed': 3, **reading}
  stream = pipeline.batches('glm_causal', {'tokens': LENGTH}, **reading)
  return [next(stream) for _ in range(count)]


def test_the_stream_goes_on_from_any_step(prepared):
  later = _stream(1, start_step=2)[0]
  np.testing.assert_array_equal(later.tokens, _stream(3)[2].tokens)
  other = _stream(1, seed=4)[0]
  assert (other.tokens != _stream(1)[0].tokens).any()


def test_rows_are_shown_with_their_documents(prepared, vocabulary):
  batch = _stream(1)[0]
  example = {name: np.asarray(value)[0] for name, value in batch._asdict().items()}
  text = render.render(example, vocabulary)
  assert text.startswith('causal: ') and '[gMASK]sop' in text
  none = np.zeros(len(batch.tokens), int)
  statistics = render.statistics({**batch._asdict(), 'lost': none, 'capped': none}, 0)
  assert 'causal: 100.0% of examples' in statistics
