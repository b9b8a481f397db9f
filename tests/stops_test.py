"""Where an answer ends, and what a finished one leaves behind, with scripted models."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import models
from glm_jax.inference import decode, filling
from glm_jax.inference.sampling import Sampling, sample
from glm_jax.interop import hub
from glm_jax.models import ChatGLM2Config, GLMConfig
from glm_jax.models import cache as kv_cache
from glm_jax.text import vocabulary as vocabularies
from glm_jax.text.released import (
  ChatGLM2Vocabulary,
  ChatGLM3Vocabulary,
)
from glm_jax.text.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary()
S = VOCABULARY.specials
SLOTS, MOST, V = 40, 6, 384
NOTHING = -7.0  # in a slot that was never written


class Scripted:
  """A model whose answers stand in a table, and whose cache holds what it has read.

  Row b of the batch says `script[b, position of the token in its span]`, or what follows
  in `script[b]` for a causal one; the cache is [1, B, S, 1, 3]: token and two positions.
  """

  config = types.SimpleNamespace(num_layers=1, num_kv_heads=1, head_size=3)

  def __init__(self, script, size=V):
    self.script, self.size = jnp.asarray(script), size

  def apply(
    self, _, tokens, positions, blocks, seen, *, cache, cache_start=None, head=None
  ):
    read = jnp.stack([tokens, positions, blocks], axis=-1)[:, :, None].astype(jnp.float32)
    write = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))
    start = jnp.zeros(len(tokens), int) if cache_start is None else cache_start
    k = write(cache['k'][0], read, start, 0)[None]
    step = jnp.clip(blocks - 1, 0, self.script.shape[1] - 1)
    answer = jnp.take_along_axis(self.script, step, axis=1)
    return 10.0 * jax.nn.one_hot(answer, self.size), {'k': k, 'v': cache['v'] + 0}


def _generate(script, slots, active, *, stops, cache=None, last=False):
  B = len(script)
  cache = cache or _nothing(None, B, SLOTS)
  full = lambda value, dtype=jnp.int32: jnp.full(B, value, dtype)
  rows = decode.RowStates(
    token=full(S.sop),
    position=jnp.arange(B) + 3,
    stride=full(0),
    block=full(1),
    slot=jnp.asarray(slots),
    count=full(0),
    least=full(0),
    limit=full(MOST),
    seed=full(0, jnp.uint32),
    end=full(-1),
    last=full(last, bool),
    done=~jnp.asarray(active),
    tokens=jnp.zeros((B, MOST), jnp.int32),
    log_probs=jnp.zeros((B, MOST + 1)),
  )
  cache, _, rows = decode.advance(
    Scripted(script),
    {},
    cache,
    None,
    rows,
    steps=MOST + 1,
    eager=jnp.array(False),
    stops=stops,
    allowed_V=jnp.ones(V, bool),
    sampling=Sampling(),
  )
  return cache, rows.tokens, rows.count, rows.slot


def _nothing(config, rows, slots, dtype='float32', **_):
  return {
    'k': jnp.full((1, rows, slots, 1, 3), NOTHING),
    'v': jnp.zeros((1, rows, slots, 1, 1)),
  }


STOPS = (300, 301, 302, 303)


@pytest.fixture(scope='session')
def ragged():
  """Rows that end after 0, 1, .. tokens, each at every one of the stops; and at none."""
  script = [
    [*range(10, 10 + n), stop, *[77] * (MOST - 1 - n)]
    for n in range(MOST)
    for stop in STOPS
  ]
  script += [[10 + i for i in range(MOST)]] * 2
  sizes = [n for n in range(MOST) for _ in STOPS] + [MOST, 0]
  slots = np.arange(len(script)) % 7 + 2
  active = np.arange(len(script)) < len(script) - 1
  made = _generate(np.array(script), slots, active, stops=STOPS)
  return script, np.array(sizes), slots, active, jax.tree.map(np.asarray, made)


def test_any_stop_ends_an_answer_and_is_no_part_of_it(ragged):
  script, sizes, _, _, (_, tokens, count, _) = ragged
  np.testing.assert_array_equal(count, sizes)
  for row, size in enumerate(sizes):
    assert tokens[row].tolist() == [*script[row][:size], *[0] * (MOST - size)]


def test_a_row_takes_a_slot_for_each_token_that_it_reads_and_none_when_finished(ragged):
  script, sizes, slots, active, (cache, _, _, behind) = ragged
  for row, size in enumerate(sizes):
    read = [S.sop, *script[row][:size]] if active[row] else []
    assert behind[row] == slots[row] + len(read)
    held = cache['k'][0, row, :, 0]
    own = held[slots[row] : behind[row]]
    assert own[:, 0].tolist() == read
    assert own[:, 1].tolist() == [row + 3] * len(read)  # the mask's place
    assert own[:, 2].tolist() == [*range(1, len(read) + 1)]
    assert (held[: slots[row]] == NOTHING).all()


def test_the_last_token_is_read_only_for_what_follows(ragged):
  """A full answer behind which nothing comes is a step shorter, and otherwise the same."""
  script, sizes, slots, active, (_, tokens, count, behind) = ragged
  _, *made, end = _generate(np.array(script), slots, active, stops=STOPS, last=True)
  for found, expected in zip(made, (tokens, count), strict=True):
    np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(end, behind - (sizes == MOST))


def test_the_next_blank_follows_the_last_one_without_a_gap(ragged):
  """Whatever a finished row wrote meanwhile is written over, and none of it is seen."""
  script, sizes, slots, active, (cache, _, _, behind) = ragged
  again = [[90 + i for i in range(MOST)]] * len(script)
  later, _, _, end = _generate(
    np.array(again), behind, ~np.zeros(len(script), bool), stops=STOPS, cache=cache
  )
  for row, size in enumerate(sizes):
    read = [S.sop, *script[row][:size]] if active[row] else []
    held = np.asarray(later['k'])[0, row, slots[row] : int(end[row]), 0, 0]
    assert held.tolist() == [*read, S.sop, *again[row][:MOST]]


def _filler(monkeypatch, script, vocabulary=VOCABULARY, causal=False):
  sizes = dict(num_layers=1, hidden_size=3, num_heads=1, vocab_size=V, max_positions=90)
  config = GLMConfig(**sizes)
  if causal:
    config = ChatGLM2Config(
      **{**sizes, 'vocab_size': 1024},
      num_kv_heads=1,
      head_size=4,
      mlp_size=4,
      rotated_size=2,
    )
  model = Scripted(script, config.vocab_size)
  monkeypatch.setattr(models, 'build', lambda config, compute: model)
  monkeypatch.setattr(kv_cache, 'init', _nothing)
  return filling.Filler(config, {}, vocabulary)


def test_every_stop_of_a_vocabulary_may_be_said_and_ends_a_blank(monkeypatch):
  stops = VOCABULARY.stops
  assert len(stops) == 2
  script = [[97, 98, stop, 99, 100] for stop in stops]
  filler = _filler(monkeypatch, script)
  prompts = [filler.encode('a [MASK] b [MASK] c'), filler.encode('no [MASK]')]
  made = filler.fill(prompts, max_new_tokens=5)
  assert made == [[[97, 98], [97, 98]], [[97, 98]]]


@pytest.fixture(scope='session')
def model_file():
  text = ['the quick brown fox jumps over the lazy dog. ' * 4, '语言模型在学习文字。' * 8]
  return vocabularies.train_sentencepiece(text, 512, bpe=True)


@pytest.mark.parametrize('kind', [ChatGLM2Vocabulary, ChatGLM3Vocabulary])
def test_every_stop_of_a_chat_ends_an_answer(kind, model_file, monkeypatch, tmp_path):
  """An answer ends with </s>, or with the role that speaks next; exports say so, too."""
  vocabulary = kind(model_file)
  stops = vocabulary.stops
  assert len({*stops}) == {'chatglm2': 1, 'chatglm3': 3}[vocabulary.kind]
  script = [[20, 21, stop, 22] for stop in stops]
  # As many rows as the batch has.
  script += [script[-1]] * (len(script) == 3)
  filler = _filler(monkeypatch, script, vocabulary, causal=True)
  # The script is by block position, which counts from 1 behind a causal prompt, too.
  made = filler.fill([filler.encode('the fox')] * len(stops), max_new_tokens=4)
  assert made == [[[20, 21]]] * len(stops)
  config = ChatGLM2Config(
    num_layers=1,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=1,
    head_size=4,
    mlp_size=8,
    vocab_size=vocabulary.size,
    max_positions=32,
  )
  hub.write_config(tmp_path, 'glm', config, {}, 'float32', vocabulary)
  for name in ('config.json', 'generation_config.json'):
    assert json.loads((tmp_path / name).read_text())['eos_token_id'] == list(stops)


def test_tokens_rows_blanks_and_seeds_are_sampled_apart(monkeypatch):
  """Of a model that thinks everything equally likely."""
  filler = _filler(monkeypatch, [[0]] * 4)
  flat = Scripted.apply

  def indifferent(self, *arguments, **more):
    logits, cache = flat(self, *arguments, **more)
    return 0 * logits, cache

  monkeypatch.setattr(Scripted, 'apply', indifferent)
  prompts = [filler.encode('a [MASK] b [MASK]')] * 4
  sampling = Sampling(temperature=1.0)
  spans = [
    span + [-i - 1] * (24 - len(span))  # what is missing is like nothing
    for seed in (0, 1, 2)
    for i, row in enumerate(
      filler.fill(prompts, max_new_tokens=24, sampling=sampling, seed=seed)
    )
    for span in row
  ]
  table = np.array(spans)
  said = table >= 0
  assert said.sum() > 350 and len(np.unique(table[said])) > 150
  for i, a in enumerate(table):
    for lag in range(1, 12):  # one token and those after it
      both = said[i, lag:]
      assert ((a[lag:] == a[:-lag]) & both).sum() <= 2
    for b in table[i + 1 :]:  # other rows, blanks and seeds, shifted or not
      for lag in range(-3, 4):
        x, y = a[max(lag, 0) : 24 + min(lag, 0)], b[max(-lag, 0) : 24 - max(lag, 0)]
        assert ((x == y) & (x >= 0)).sum() <= 3


def test_samples_have_the_probabilities_of_the_logits():
  logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]] * 4000))
  keys = jax.random.split(jax.random.key(1), 4000)
  draw = jax.jit(sample, static_argnums=1)
  for sampling, wanted in (
    (Sampling(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
    (Sampling(temperature=0.5), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
    (Sampling(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
    (Sampling(temperature=1.0, top_p=0.75), [0.625, 0.375, 0, 0]),
  ):
    found = np.bincount(draw(logits, sampling, keys), minlength=4) / 4000
    np.testing.assert_allclose(found, wanted, atol=0.03)
