"""Generation: the cache equals the full forward, rows do not disturb each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from commands import in_process, refused

from glm_jax import models, sharding
from glm_jax.batch import Visibility, prefix_visibility
from glm_jax.inference import decode
from glm_jax.inference.filling import Filler
from glm_jax.inference.sampling import Sampling, sample
from glm_jax.models import ChatGLM2Config, ChatGLMConfig, GLMConfig
from glm_jax.models import cache as kv_cache
from glm_jax.text.vocabulary import ByteVocabulary
from glm_jax.training import state

VOCABULARY = ByteVocabulary()
S = VOCABULARY.specials
CONFIG = GLMConfig(
  num_layers=2, hidden_size=32, num_heads=4, vocab_size=384, max_positions=80, init_std=0.3
)


_SMALL = dict(num_layers=2, hidden_size=32, num_heads=4, vocab_size=384, max_positions=80)
_SMALL |= dict(mlp_size=48, init_std=0.3)
OTHERS = {
  'chatglm': ChatGLMConfig(**_SMALL, deepnorm_layers=28),
  'glm_130b': ChatGLMConfig(**_SMALL, deepnorm_layers=2, gated=True, two_positions=False),
  'chatglm2': ChatGLM2Config(**_SMALL, num_kv_heads=2, head_size=8),
}


@pytest.fixture(scope='session')
def params():
  return small.params(CONFIG, 3)


@pytest.fixture(scope='session')
def filler(params):
  return Filler(CONFIG, {'params': params}, VOCABULARY)


def _teacher_forced(params, prompt, spans, config=CONFIG):
  """Argmax of one full forward over the context and all spans laid out as in training."""
  return _log_probs(params, prompt, spans, 1.0, config).argmax(-1)


def _log_probs(params, prompt, spans, temperature, config=CONFIG):
  """Log-probabilities of that forward, from the first [sop] on."""
  tokens, positions, blocks = list(prompt), list(range(len(prompt))), [0] * len(prompt)
  places = [i for i, t in enumerate(prompt) if t in (S.mask, S.gmask, S.smask)]
  for place, span in zip(places, spans, strict=True):
    goes_on = not config.two_positions and prompt[place] == S.gmask
    first = len(tokens)
    tokens += [S.sop, *span]
    positions += [first + i if goes_on else place for i in range(len(span) + 1)]
    blocks += range(1, len(span) + 2)
  # All rows are as long as the longest may be, so that they share a program.
  T = config.max_positions
  row = lambda x: jnp.asarray([*x, *[0] * (T - len(x))], jnp.int32)[None]
  visibility = prefix_visibility(jnp.array([len(prompt)]), jnp.array([len(tokens)]), T)
  inputs = (row(tokens), row(positions), row(blocks), visibility)
  logits = small.logits(config, params, *inputs)[:, : len(tokens)]
  allowed = np.arange(config.vocab_size) < VOCABULARY.size
  allowed[[S.pad, S.enc, S.mask, S.gmask, S.smask, S.sop, S.dblock]] = False
  logits = jnp.where(allowed, logits[0], -jnp.inf) / temperature
  return np.asarray(jax.nn.log_softmax(logits))[len(prompt) :]


def test_greedy_decoding_equals_teacher_forcing(filler, params):
  prompts = [
    filler.encode(text)
    for text in ('one [MASK] two [MASK] three', '[MASK]', 'a longer text with [sMASK]')
  ]
  prompts.append(filler.encode('and then', gmask=True))
  together = filler.fill(prompts, max_new_tokens=7)
  for prompt, spans in zip(prompts, together, strict=True):
    # Rows of a batch have lengths of their own and do not see each other.
    assert filler.fill([prompt], max_new_tokens=7)[0] == spans
    predicted = _teacher_forced(params, prompt, spans)
    at = 0
    for span in spans:
      wanted = span if len(span) == 7 else [*span, predicted[at + len(span)]]
      assert predicted[at : at + len(wanted)].tolist() == wanted
      if len(span) < 7:
        assert predicted[at + len(span)] in (S.eop, S.eos)
      at += len(span) + 1
  assert any(len(span) > 1 for spans in together for span in spans)


@pytest.mark.parametrize('name', ['chatglm', 'glm_130b'])
def test_greedy_decoding_of_chatglm_equals_teacher_forcing(name):
  config = OTHERS[name]
  params = small.params(config, 1)
  filler = Filler(config, {'params': params}, VOCABULARY)
  prompts = [filler.encode('one [MASK] two [MASK]'), filler.encode('so', gmask=True)]
  made = filler.fill(prompts, max_new_tokens=7)
  for prompt, spans in zip(prompts, made, strict=True):
    predicted, at = _teacher_forced(params, prompt, spans, config), 0
    for span in spans:
      assert predicted[at : at + len(span)].tolist() == span
      at += len(span) + 1
  assert any(len(span) > 1 for spans in made for span in spans)


def test_a_causal_model_goes_on_as_the_full_forward_does():
  config = OTHERS['chatglm2']
  params = small.params(config, 2)
  filler = Filler(config, {'params': params}, VOCABULARY)
  prompts = [filler.encode(text) for text in ('a', 'a longer [MASK] text')]
  assert prompts[0] == [S.enc, 97] and S.mask not in prompts[1]  # a mask is text to it
  for prompt, [span] in zip(prompts, filler.fill(prompts, max_new_tokens=7), strict=True):
    tokens, T = [*prompt, *span], config.max_positions
    t = jnp.arange(T)[None]  # padding follows, which no token sees
    row = jnp.asarray([*tokens, *[0] * (T - len(tokens))])[None]
    logits = small.logits(config, params, row, t, 0 * t, Visibility(0 * t, t + 1))
    predicted = logits[0, : len(tokens), : VOCABULARY.size].argmax(-1).tolist()
    predicted = predicted[len(prompt) - 1 :]
    assert predicted[: len(span)] == span and len(span) > 1
    assert len(span) == 7 or predicted[len(span)] in VOCABULARY.stops
    text = filler.text(prompt, [span], ('<', '>'))
    assert text == f'{VOCABULARY.decode(prompt)}<{VOCABULARY.decode(span)}>'


def _read(config, params, tokens, lengths):
  return decode.read_context(
    models.build(config), {'params': params}, jnp.asarray(tokens), jnp.asarray(lengths)
  )


def test_a_context_is_read_without_its_logits(params):
  read = lambda p: _read(CONFIG, p, np.ones((2, 8), int), [8, 5])
  cache, result = jax.eval_shape(read, params)
  assert result is None and cache['k'].shape == (2, 2, 8, 4, 8)
  assert '2,8,384]' not in str(jax.make_jaxpr(read)(params))


def test_later_blanks_see_all_of_a_span_that_was_cut(filler, params):
  """The last token of a span that `max_new_tokens` ends has been sampled and not read."""
  prompt = filler.encode('one [MASK] two [MASK] three')
  spans, scores = (x[0] for x in filler.fill_scored([prompt], max_new_tokens=3))
  assert len(spans[0]) == 3 and spans[1]
  of_second = lambda first: [
    _log_probs(params, prompt, [first, spans[1]], 1.0)[len(first) + 1 + i, token]
    for i, token in enumerate(spans[1])
  ]
  found = scores[1][: len(spans[1])]
  np.testing.assert_allclose(found, of_second(spans[0]), atol=2e-4)
  assert np.abs(np.subtract(found, of_second(spans[0][:2]))).max() > 1e-2


def test_log_probabilities_are_those_of_the_full_forward(filler, params):
  prompts = [filler.encode('one [MASK] two [MASK]'), filler.encode('so', gmask=True)]
  for sampling in (Sampling(), Sampling(temperature=0.7, top_k=5)):
    spans, scores = filler.fill_scored(prompts, max_new_tokens=6, sampling=sampling, seed=1)
    for prompt, made, found in zip(prompts, spans, scores, strict=True):
      log_probs = _log_probs(params, prompt, made, sampling.temperature or 1.0)
      at = 0
      for span, of_span in zip(made, found, strict=True):
        assert len(of_span) == min(len(span) + 1, 6)
        wanted = [log_probs[at + i, token] for i, token in enumerate(span)]
        np.testing.assert_allclose(of_span[: len(span)], wanted, atol=2e-4)
        if len(span) < 6:  # that of the stop token behind it
          stops = log_probs[at + len(span), [*VOCABULARY.stops]]
          assert np.abs(stops - of_span[-1]).min() < 2e-4
        at += len(span) + 1


def test_decoding_over_a_mesh_equals_that_on_one_device(filler, params):
  """Three prompts on four devices that cut rows, two that cut heads; and cut weights."""
  texts = ('one [MASK] two [MASK] three', '[MASK]', 'a longer text with [sMASK]')
  prompts = [filler.encode(text) for text in texts]
  expected = filler.fill_scored(prompts, max_new_tokens=5)
  layout = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
  abstract = state.abstract_params(CONFIG, layout)
  with sharding.active(layout):
    placed = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), params, abstract)
    cache = kv_cache.init(CONFIG, 4, 8)
    assert cache['k'].addressable_shards[0].data.shape == (2, 1, 8, 2, 8)
    spans, scores = Filler(CONFIG, {'params': placed}, VOCABULARY).fill_scored(
      prompts, max_new_tokens=5
    )
  assert spans == expected[0]
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), scores, expected[1]
  )


def test_the_second_blank_is_conditioned_on_the_first(params):
  """A cache slot that is written over, or one too many, would show here."""
  filler = Filler(CONFIG, {'params': params}, VOCABULARY)
  prompt = filler.encode('x [MASK] y [MASK] z')
  found = {
    tuple(
      map(
        tuple,
        filler.fill(
          [prompt], max_new_tokens=5, seed=seed, sampling=Sampling(temperature=2.0)
        )[0],
      )
    )
    for seed in range(4)
  }
  assert len(found) == 4


def test_sampling_is_a_function_of_the_seed(filler):
  prompt, hot = filler.encode('tell me [MASK]'), Sampling(temperature=1.0, top_p=0.9)
  once, again = (
    filler.fill([prompt], sampling=hot, seed=1, max_new_tokens=9) for _ in range(2)
  )
  assert once == again != filler.fill([prompt], sampling=hot, seed=2, max_new_tokens=9)


def test_control_pieces_are_never_generated(filler):
  spans = filler.fill(
    [filler.encode('free [MASK]')],
    max_new_tokens=60,
    min_new_tokens=20,
    sampling=Sampling(temperature=50.0),
  )[0]
  assert len(spans[0]) >= 20 and max(spans[0]) < S.mask


@pytest.mark.parametrize(
  'sampling,allowed',
  [
    (Sampling(temperature=1.0, top_k=2), {1, 2}),
    (Sampling(temperature=1.0, top_k=1), {1}),
    (Sampling(temperature=1.0, top_p=0.6), {1}),
    (Sampling(temperature=1.0, top_p=0.9), {1, 2}),
    (Sampling(temperature=1.0, top_k=100), {0, 1, 2}),
    (Sampling(), {1}),
  ],
)
def test_only_the_most_probable_are_sampled(sampling, allowed):
  logits = jnp.log(jnp.array([[0.1, 0.65, 0.25]]))
  keys = jax.random.split(jax.random.key(0), 200)
  found = sample(jnp.repeat(logits, 200, 0), sampling, keys)
  assert {*np.asarray(found).ravel().tolist()} == allowed


def test_prompts_are_laid_out_as_in_training(filler):
  assert filler.encode('ab [MASK] c') == [S.enc, 97, 98, S.mask, 32, 99, S.eos]
  assert filler.encode('ab [gMASK]') == [S.enc, 97, 98, S.gmask]
  assert filler.encode('ab', gmask=True) == [S.enc, 97, 98, S.gmask]
  prompt = filler.encode('ab [MASK] c')
  assert filler.text(prompt, [[32, 120]], ('<', '>')) == 'ab< x> c'


@pytest.mark.parametrize(
  'prompt,message',
  [
    ('no blank', 'must hold a blank'),
    ('', 'must hold some text'),
  ],
)
def test_prompts_without_a_blank_are_refused(filler, prompt, message):
  with pytest.raises(ValueError, match=message):
    filler.encode(prompt)


def test_too_long_prompts_and_spans_are_refused(filler):
  with pytest.raises(ValueError, match='at most 81 tokens'):
    filler.fill([filler.encode('x' * 90 + '[MASK]')])
  with pytest.raises(ValueError, match='max_new_tokens'):
    filler.fill([filler.encode('x [MASK]')], max_new_tokens=81)
  for bad in (dict(temperature=-1.0), dict(top_p=0.0), dict(top_k=-1)):
    with pytest.raises(ValueError, match='must be'):
      Sampling(**bad)


@pytest.mark.parametrize('seed', [-1, 2**32, 10**20])
def test_a_seed_that_would_lose_digits_is_refused(seed, tmp_path):
  arguments = [f'--checkpoint={tmp_path}', '--prompt=[MASK]', f'--seed={seed}']
  refused(in_process('generate', *arguments), f'32 bits, got {seed};')


@pytest.mark.parametrize(
  'temperature', [-1.0, 1e-31, 1e-300, 5e-324, 1e31, 1e300, float('inf'), float('nan')]
)
def test_temperatures_beyond_float32_are_refused(temperature):
  with pytest.raises(ValueError, match=r'temperature must be 0, or in \[1e-30, 1e30\]'):
    Sampling(temperature=temperature)


def test_the_most_probable_is_taken_at_the_limits():
  logits = jnp.array([[0.0, 2.0, -jnp.inf, 1.0]] * 64)
  keys = jax.random.split(jax.random.key(0), 64)
  draw = lambda **how: {*sample(logits, Sampling(**how), keys).tolist()}
  for top_p in (1.0, 0.9):
    assert draw(temperature=1e-30, top_p=top_p) == {1}
    assert draw(temperature=1e30, top_p=top_p) == {0, 1, 3}
  assert draw(temperature=1.0, top_p=1e-300) == {1}
  assert draw(temperature=1.0, top_k=10**20, top_p=1 - 1e-16) == {0, 1, 3}
