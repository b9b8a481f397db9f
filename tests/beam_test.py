"""Beam search: GLM's numbers, the laws of a search, and the cache behind it."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from decode_test import CONFIG, VOCABULARY
from engine_test import MOST, SOP, V, _requests, _sorted, _teacher_forced
from variants import FAMILIES, variables_of

from glm_jax import sharding
from glm_jax.inference import beam
from glm_jax.inference.beam import BeamConfig
from glm_jax.inference.engine import Engine
from glm_jax.inference.filling import Filler
from glm_jax.inference.request import Request, Span
from glm_jax.inference.sampling import Sampling
from glm_jax.models import cache as kv_cache

_GOLDEN = np.load(pathlib.Path(__file__).parent / 'golden' / 'beam.npz')
# Names of the golden's special pieces.
_PAD, _MASK, _EOP = 100, 102, 104


def _log_softmax(logits):
  highest = logits.max(-1, keepdims=True)
  return logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))


def _searched(log_probs_of, rows, most, stops, least, config):
  """Best text and score of each row, where `log_probs_of(tokens [B, K, most], count)`."""
  step = jax.jit(functools.partial(beam.step, config=config, stops=stops, least=least))
  finish = jax.jit(beam.finish, static_argnums=1)
  beams = beam.start(jnp.zeros(rows, bool), config, most)
  for count in range(most):
    tokens_BKT = np.asarray(beams.live.tokens)
    beams, _ = step(beams, count, log_probs_of(tokens_BKT, count))
    if beams.done.all():
      break
  texts = jax.device_get(finish(beams, config))
  said = [t[0, : n[0]].tolist() for t, n in zip(texts.tokens, texts.length, strict=True)]
  return said, texts


@pytest.mark.parametrize(
  'name,least,how',
  [
    ('b4', 3, dict(num_beams=4, length_penalty=0.7)),
    ('b3_ng2', 0, dict(num_beams=3, no_repeat_ngram_size=2)),
    ('b1', 0, dict(num_beams=1, length_penalty=0.0)),
  ],
)
def test_texts_and_scores_are_those_of_glm(name, least, how):
  """Its seq2seq loop over a model that is a table: of the last token, and of positions."""
  table, steps, source = (_GOLDEN[key] for key in ('table', 'step', 'src'))
  first = (source == _MASK).argmax(1)[:, None]

  def log_probs_of(tokens_BKT, count):
    # All begin with [sop], the last of the source.
    last = (
      tokens_BKT[..., count - 1] if count else source[:, -1:].repeat(len(tokens_BKT[0]), 1)
    )
    logits = table[last] + np.float32(0.7) * steps[(first + count + 1) % len(steps)]
    return _log_softmax(logits)

  said, texts = _searched(log_probs_of, 3, 12, (_EOP,), least, BeamConfig(**how))
  expected = [[t for t in row if t not in (_PAD, _EOP)] for row in _GOLDEN[name].tolist()]
  assert said == expected
  np.testing.assert_allclose(texts.score[:, 0], _GOLDEN[f'{name}_score'], rtol=1e-6)


def _one_by_one(log_probs, most, stops, least, config):
  """The same search of one row in plain Python: the best (score, text, log-probability)."""
  K, n = config.num_beams, config.no_repeat_ngram_size
  by_length = lambda total, length: total / max(length, 1) ** config.length_penalty
  live, ended = [((), 0.0)], []
  for count in range(most):
    candidates = []
    for text, total in live:
      grams = [text[i : i + n] for i in range(count - n + 1)] if n else []
      for token in range(log_probs.shape[-1]):
        is_repeated = n and (*text, token)[-n:] in grams
        if not is_repeated and not (token in stops and count < least):
          last = text[-1] if text else 0
          candidates.append((total + float(log_probs[count, last, token]), text, token))
    candidates.sort(reverse=True)
    ended += [
      (by_length(total, count), text)
      for total, text, token in candidates[:K]
      if token in stops
    ]
    ended = sorted(ended, reverse=True)[:K]
    live = [((*text, t), total) for total, text, t in candidates if t not in stops][:K]
    best = by_length(candidates[0][0], count)
    if len(ended) == K and (config.early_stopping or ended[-1][0] >= best):
      return ended[0]
  return max([*ended, *((by_length(total, most), text) for text, total in live)])


@pytest.mark.parametrize(
  'K,n,penalty,early,least',
  [
    (1, 0, 1.0, False, 2),
    (2, 2, 0.0, True, 0),
    (3, 1, 2.0, True, 1),
    (5, 3, -1.0, False, 0),
    (2, 0, 2.0, False, 0),
  ],
)
def test_a_search_over_rows_is_that_of_each_row_in_plain_python(
  K, n, penalty, early, least
):
  """Two stop tokens, a least length, both ways to end, n-grams that would repeat."""
  most, stops, rng = 6, (1, 4), np.random.default_rng(K)
  # So peaked that texts would repeat themselves; often all the best tokens are stops.
  logits = rng.normal(0, 1.5, (24, most, 9, 9)).astype('f4')
  logits[..., stops] += 1
  log_probs = _log_softmax(logits)
  rows = np.arange(len(log_probs))[:, None]

  def log_probs_of(tokens_BKT, count):
    last = tokens_BKT[..., count - 1] if count else np.zeros((len(rows), K), int)
    return log_probs[rows, count, last]

  config = BeamConfig(
    num_beams=K, length_penalty=penalty, early_stopping=early, no_repeat_ngram_size=n
  )
  said, texts = _searched(log_probs_of, len(rows), most, stops, least, config)
  for row, of_row in enumerate(log_probs):
    score, text = _one_by_one(of_row, most, stops, least, config)
    assert tuple(said[row]) == text
    np.testing.assert_allclose(texts.score[row, 0], score, rtol=1e-5)
  assert len({*map(len, said)}) > 1


@pytest.mark.parametrize('penalty', [0.0, 0.7, 1.0, 2.0])
def test_with_beams_for_all_texts_the_best_of_all_is_found(penalty):
  most, size, stop = 2, 5, 4
  rng = np.random.default_rng(int(10 * penalty))
  log_probs = _log_softmax(rng.normal(size=(8, size + 1, size)).astype('f4'))
  rows = np.arange(8)[:, None]
  config = BeamConfig(num_beams=size**most, length_penalty=penalty)

  def log_probs_of(tokens_BKT, count):
    last = tokens_BKT[..., count - 1] if count else np.full((8, size**most), size)
    return log_probs[rows, last]

  said, texts = _searched(log_probs_of, 8, most, (stop,), 0, config)
  for row, p in enumerate(log_probs):
    scores = {(): p[size, stop]}
    for a in range(stop):
      scores[a,] = p[size, a] + p[a, stop]
      for b in range(stop):
        scores[a, b] = (p[size, a] + p[a, b]) / 2**penalty
    best = max(scores, key=scores.get)
    assert tuple(said[row]) == best
    np.testing.assert_allclose(texts.score[row, 0], scores[best], rtol=1e-5)
    # And all others, in their order.
    ordered = sorted(scores.values(), reverse=True)
    np.testing.assert_allclose(texts.score[row, : len(scores)], ordered, rtol=1e-5)
    assert (texts.score[row, len(scores) :] == -np.inf).all()


_HOW = BeamConfig(num_beams=3, length_penalty=0.5, no_repeat_ngram_size=2)
# So many that texts of models that were not trained end.
_STOPS = tuple(range(2, 12))


@functools.cache
def _engine(family, kind='plain'):
  """Of four prompts at a time; causal contexts in pieces."""
  return Engine(
    FAMILIES[family],
    variables_of(family, kind),
    stops=_STOPS,
    allowed=np.arange(V) != SOP,
    rows=12,
    piece=8,
  )


def _search(engine, requests):
  return [*engine.search(requests, most=MOST, least=1, config=_HOW)]


def _check(config, variables, requests, answers):
  """Scores are those of the full forward: of all tokens, by length."""
  assert [a.number for a in answers] == [r.number for r in requests]
  for request, answer in zip(requests, answers, strict=True):
    log_probs, at = _teacher_forced(config, variables, request, answer), 0
    spans = zip(answer.spans, answer.log_probs, answer.scores, strict=True)
    for made, found, score in spans:
      assert len(found) == min(len(made) + 1, MOST)
      forced = log_probs[np.arange(at, at + len(made)), made]
      np.testing.assert_allclose(found[: len(made)], forced, atol=1e-5)
      if len(made) < MOST:  # that of the stop token behind it
        stops = log_probs[at + len(made), [*_STOPS]]
        assert np.abs(stops - found[-1]).min() < 1e-5
      by_length = sum(found) / max(len(made), 1) ** _HOW.length_penalty
      np.testing.assert_allclose(score, by_length, rtol=1e-5)
      at += len(made) + 1


@pytest.mark.parametrize(
  'family,kind',
  [
    ('glm', 'int4'),
    ('glm', 'prefix'),
    ('chatglm', 'plain'),
    ('chatglm2', 'plain'),
    ('chatglm2', 'prefix'),
  ],
)
def test_scores_are_those_of_teacher_forcing(family, kind):
  """Of contexts of all lengths, and of a second blank after the best text of the first."""
  config = FAMILIES[family]
  requests = _requests(config)
  if not config.causal:
    # A text that goes on in positions of its own, and a blank after it.
    places = (dict(position=None, stride=1), dict(position=3, stride=0))
    spans = [Span(first=SOP, **place) for place in places]
    requests.append(Request(number=len(requests), context=range(20, 30), spans=spans))
  answers = _search(_engine(family, kind), requests)
  _check(config, variables_of(family, kind), requests, answers)
  assert [a.read for a in answers] == [len(r.context) for r in requests]
  lengths = {len(span) for a in answers for span in a.spans}
  assert len(lengths) > 1 and max(lengths) > 1


@pytest.mark.parametrize('family', FAMILIES)
def test_one_beam_is_greedy(family):
  requests, engine = _requests(FAMILIES[family]), _engine(family)
  for least in (0, 3):
    greedy = _sorted(engine.generate(requests, most=MOST, least=least))
    answers = [*engine.search(requests, most=MOST, least=least, config=BeamConfig())]
    assert [a.spans for a in answers] == [a.spans for a in greedy]
    if not least:
      _close(answers, greedy)


def _close(some, others):
  for one, other in zip(some, others, strict=True):
    for found, expected in zip(one.log_probs, other.log_probs, strict=True):
      np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize('family', FAMILIES)
def test_rows_do_not_disturb_each_other(family):
  requests, engine = _requests(FAMILIES[family]), _engine(family)
  together, backwards = _search(engine, requests), _sorted(_search(engine, requests[::-1]))
  alone = [answer for request in requests for answer in _search(engine, [request])]
  for other in (backwards, alone):
    assert [a.spans for a in other] == [a.spans for a in together]
    _close(other, together)


def test_of_a_cache_the_slots_of_a_span_follow_their_parents():
  """Scales of int8, too; what stands before and behind stays."""
  B, K, first, width = 2, 3, np.array([1, 4]), 2
  config = FAMILIES['chatglm2']
  cache = kv_cache.init(config, B * K, 7, 'int8')
  cache = {name: jnp.arange(x.size).reshape(x.shape) for name, x in cache.items()}
  parents = np.array([[2, 2, 0], [0, 1, 1]])
  reordered = jax.jit(beam._reorder, static_argnums=3)(cache, parents, first, width)
  assert {*reordered} == {'k', 'v', 'k_scale', 'v_scale'}
  for name, x in jax.device_get(cache).items():
    for row, beam_number in np.ndindex(B, K):
      span = slice(first[row], first[row] + width)
      expected = x[:, row * K + beam_number].copy()
      expected[:, span] = x[:, row * K + parents[row, beam_number], span]
      np.testing.assert_array_equal(reordered[name][:, row * K + beam_number], expected)


@pytest.mark.parametrize('family', FAMILIES)
def test_eight_devices_find_what_one_does(family):
  config, variables = FAMILIES[family], variables_of(family, 'plain')
  requests = _requests(config)
  expected = _search(_engine(family), requests)
  layout = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
  with sharding.active(layout):
    engine = _engine.__wrapped__(family)
    answers = _search(engine, requests)
    # The beams of a prompt are on one device, so that no part of a cache moves.
    cache = engine._spread(kv_cache.init(config, 4, 64), 3)
    assert cache['k'].sharding.shard_shape(cache['k'].shape)[1] == 3
    parents, slots = jnp.zeros((4, 3), jnp.int32), jnp.zeros(4, jnp.int32)
    reorder = jax.jit(beam._reorder, static_argnums=3).lower(cache, parents, slots, MOST)
    text = reorder.compile().as_text()
  assert [a.spans for a in answers] == [a.spans for a in expected]
  _check(config, variables, requests, answers)
  assert not any(f'all-{word}(' in text for word in ('gather', 'reduce', 'to-all'))


def test_a_text_that_cannot_be_is_refused():
  """Every token was said once, and the span may not end yet."""
  config, allowed = FAMILIES['glm'], np.isin(np.arange(V), (2, 8, 9))
  engine = Engine(config, variables_of('glm', 'plain'), stops=(2,), allowed=allowed)
  how = dict(most=6, config=BeamConfig(num_beams=2, no_repeat_ngram_size=1))
  requests = _requests(config, (5,))
  with pytest.raises(
    ValueError, match='must have a text without a repeated n-gram, got no'
  ):
    [*engine.search(requests, least=3, **how)]
  [answer] = engine.search(requests, least=2, **how)
  assert sorted(answer.spans[0]) == [8, 9]


def test_blanks_of_a_text_are_filled_with_what_is_best():
  filler = Filler(CONFIG, {'params': small.params(CONFIG, 3)}, VOCABULARY)
  prompts = [filler.encode(text) for text in ('one [MASK] two [MASK]', 'a [sMASK]')]
  how = dict(max_new_tokens=5, min_new_tokens=2)
  answers = [*filler.answers(prompts, beam=BeamConfig(num_beams=4), **how)]
  assert [len(a.spans) for a in answers] == [2, 1]
  assert all(2 <= len(span) <= 5 for a in answers for span in a.spans)
  # Of the first blank of each: later ones stand behind other texts.
  greedy = [*filler.answers(prompts, beam=BeamConfig(), **how)]
  assert all(b.scores[0] >= g.scores[0] for b, g in zip(answers, greedy, strict=True))
  assert any(b.scores[0] > g.scores[0] for b, g in zip(answers, greedy, strict=True))
  for more, received in (
    (dict(sampling=Sampling(temperature=0.5)), 'got Sampling(temperature=0.5'),
    (dict(sampling=Sampling(repetition_penalty=1.5)), 'repetition_penalty=1.5'),
    (dict(watch=lambda number, made: False), 'got a stop string'),
  ):
    with pytest.raises(ValueError, match='beam search must be without') as error:
      filler.answers(prompts, beam=BeamConfig(num_beams=4), **how, **more)
    assert received in str(error.value)


@pytest.mark.parametrize(
  'how,message',
  [
    (dict(num_beams=0), 'num_beams must be 1 or more, got 0; use 1 for greedy decoding'),
    (dict(num_beams=2.0), 'num_beams must be int'),
    (dict(no_repeat_ngram_size=-1), 'must be 0 or more, got -1; use 0 for no such rule'),
    (dict(length_penalty=float('nan')), 'length_penalty must be in'),
    (dict(early_stopping='never'), 'early_stopping must be bool'),
  ],
)
def test_false_sizes_are_refused(how, message):
  with pytest.raises(ValueError, match=message):
    BeamConfig(**how)
