"""The engine: a token is what teacher forcing says, whatever family, weights and way."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from variants import FAMILIES, KINDS, variables_of

from glm_jax import sharding
from glm_jax.batch import Visibility, prefix_visibility
from glm_jax.inference.engine import Engine, no_rows
from glm_jax.inference.request import Request, Span
from glm_jax.inference.sampling import Sampling
from glm_jax.models import stack, virtual

V, MOST, SOP = 64, 6, 1
STOPS = (2, 3)
# Lengths of contexts; the longest is read in pieces by causal families.
LENGTHS = (5, 1, 12, 30, 3, 9)


def _requests(config, lengths=LENGTHS):
  rng = np.random.default_rng(0)
  requests = []
  for number, n in enumerate(lengths):
    context = rng.integers(4, V, n).tolist()
    if config.causal:
      spans = [Span(first=context[-1], position=None, stride=1)]
      context = context[:-1]
    else:
      # Two blanks, or one: of one position each.
      places = sorted(rng.choice(n, min(n, 1 + number % 2), replace=False).tolist())
      spans = [Span(first=SOP, position=p, stride=0) for p in places]
    requests.append(Request(number=number, context=context, spans=spans))
  return requests


@functools.cache
def _engine(family, kind, rows=4, **how):
  config = FAMILIES[family]
  allowed = np.ones(V, bool)
  allowed[SOP] = False
  variables = variables_of(family, kind)
  return Engine(config, variables, stops=STOPS, allowed=allowed, rows=rows, **how)


def _teacher_forced(config, variables, request, answer, never=None):
  """Log-probabilities [tokens, V] of one forward over context and spans."""
  P = virtual.count(variables)
  tokens, positions = list(request.context), list(range(len(request.context)))
  blocks, read = [0] * len(tokens), len(tokens)
  for span, made in zip(request.spans, answer.spans, strict=True):
    first = len(tokens) if span.position is None else span.position
    tokens += [span.first, *made]
    positions += [first + span.stride * i for i in range(len(made) + 1)]
    blocks += range(1, len(made) + 2)
  T = 64
  row = lambda x, before: jnp.asarray([*before, *x, *[0] * (T - len(x))], jnp.int32)[None]
  prefix_end = jnp.array([P + (0 if config.causal else read)])
  visibility = prefix_visibility(prefix_end, jnp.array([P + len(tokens)]), P + T)
  if config.causal:
    # Virtual tokens see no others: their own keys are not computed from what they see.
    end = jnp.minimum(jnp.arange(P + T) + 1, P + len(tokens))[None]
    visibility = Visibility(jnp.zeros_like(end), end)
  inputs = (row(tokens, [0] * P), row(positions, range(-P, 0)), row(blocks, [0] * P))
  logits = small.apply(config, variables, *inputs, visibility)[0, P:]
  logits = logits.at[:, slice(never) if never else SOP].set(-jnp.inf)
  return np.asarray(jax.nn.log_softmax(logits))[read : len(tokens)]


def _check(config, variables, requests, answers):
  """Greedy tokens and their scores are those of the full forward."""
  assert [a.number for a in answers] == [r.number for r in requests]
  for request, answer in zip(requests, answers, strict=True):
    log_probs, at = _teacher_forced(config, variables, request, answer), 0
    spans = zip(answer.spans, answer.log_probs, answer.ends, strict=True)
    for made, scores, end in spans:
      ended = [] if len(made) == MOST else [int(log_probs[at + len(made)].argmax())]
      assert not ended or ended[0] in STOPS
      assert end == (ended[0] if ended else -1)
      said = [*made, *ended]
      expected = log_probs[np.arange(at, at + len(said)), said]
      # Of integers, processors round logits 1e-5 apart.
      np.testing.assert_allclose(scores, expected, atol=2e-5)
      assert (expected >= log_probs[at : at + len(said)].max(-1) - 1e-5).all()
      at += len(made) + 1


def _sorted(answers):
  return sorted(answers, key=lambda answer: answer.number)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('family', FAMILIES)
def test_continuous_batches_equal_teacher_forcing(family, kind):
  """More prompts than rows, of all lengths; causal contexts in pieces."""
  config, variables = FAMILIES[family], variables_of(family, kind)
  requests = _requests(config)
  answers = _sorted(_engine(family, kind, piece=8).generate(requests, most=MOST))
  _check(config, variables, requests, answers)
  assert sum(len(span) for a in answers for span in a.spans) > 10
  assert [a.read for a in answers] == [len(r.context) for r in requests]


@pytest.mark.parametrize('family', FAMILIES)
def test_what_a_prompt_gets_does_not_depend_on_what_stands_beside_it(family):
  """Sampled: together, alone, and in another order."""
  config = FAMILIES[family]
  requests, how = _requests(config), dict(most=MOST, seed=3)
  how['sampling'] = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.2)
  together = _sorted(_engine(family, 'plain').generate(requests, **how))
  backwards = _sorted(_engine(family, 'plain').generate(requests[::-1], **how))
  alone = [next(_engine(family, 'plain', rows=1).generate([r], **how)) for r in requests]
  for other in (backwards, alone):
    assert [a.spans for a in other] == [a.spans for a in together]
  assert len({str(a.spans) for a in together}) == len(together)
  how['seed'] = 4
  again = _sorted(_engine(family, 'plain').generate(requests, **how))
  assert [a.spans for a in again] != [a.spans for a in together]


@pytest.mark.parametrize('kind', ['plain', 'int4', 'prefix'])
@pytest.mark.parametrize('family', FAMILIES)
def test_eight_devices_answer_as_one_does(family, kind):
  config, variables = FAMILIES[family], variables_of(family, kind)
  requests = _requests(config)
  layout = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
  with sharding.active(layout):
    engine = Engine(config, variables, stops=STOPS, allowed=np.arange(V) != SOP, rows=4)
    answers = _sorted(engine.generate(requests, most=MOST))
  _check(config, variables, requests, answers)


@pytest.mark.parametrize('family', FAMILIES)
def test_a_cache_of_int8_is_near_one_of_floats(family):
  requests = _requests(FAMILIES[family])
  scores = [
    np.concatenate([s[:1] for a in answers for s in a.log_probs])
    for answers in (
      _sorted(_engine(family, 'plain', cache_dtype=dtype).generate(requests, most=MOST))
      for dtype in ('', 'int8')
    )
  ]
  assert 0 < np.abs(scores[0] - scores[1]).max() < 0.05


def test_nothing_ends_before_its_least_and_all_ends_at_its_most():
  requests = _requests(FAMILIES['glm'])
  # Every token but the stops is impossible: a span ends as soon as it may.
  engine = Engine(
    FAMILIES['glm'],
    variables_of('glm', 'plain'),
    stops=STOPS,
    allowed=np.isin(np.arange(V), (*STOPS, 9)),
    rows=4,
  )
  hot = Sampling(temperature=1e3)
  lengths = [
    len(span)
    for seed in range(8)
    for a in engine.generate(requests, most=4, least=3, sampling=hot, seed=seed)
    for span in a.spans
  ]
  assert {*lengths} == {3, 4}


def test_a_watch_ends_a_span_and_later_spans_see_its_last_token():
  config, variables = FAMILIES['glm'], variables_of('glm', 'plain')
  [request] = [r for r in _requests(config) if len(r.spans) == 2][:1]
  seen = []

  def watch(number, made):
    seen.append((number, len(made)))
    return len(made) >= 2

  # It says nothing that would end a span by itself.
  engine = Engine(config, variables, stops=STOPS, allowed=np.arange(V) > max(STOPS))
  [answer] = engine.generate([request], most=40, watch=watch)
  first, second = answer.spans
  assert {number for number, _ in seen} == {request.number}
  # It is asked every 16 tokens.
  assert len(first) == len(second) == 16
  log_probs = _teacher_forced(config, variables, request, answer, never=max(STOPS) + 1)
  expected = [log_probs[17 + i, token] for i, token in enumerate(second)]
  np.testing.assert_allclose(answer.log_probs[1][:16], expected, atol=1e-5)


def test_a_penalty_makes_what_was_said_less_likely():
  requests = _requests(FAMILIES['chatglm2'])
  spans = [
    [
      a.spans[0]
      for a in _sorted(
        _engine('chatglm2', 'plain').generate(
          requests, most=20, least=20, sampling=Sampling(repetition_penalty=penalty)
        )
      )
    ]
    for penalty in (1.0, 1e6)
  ]
  for request, made in zip(requests, spans[1], strict=True):
    said = [*request.context, request.spans[0].first, *made]
    # Nothing twice, as long as there is anything else: of 59 tokens and two stops.
    assert len({*made}) == len(made) and not {*made} & {*said[: -len(made)]}
  assert any(len({*made}) < len(made) for made in spans[0])


def test_contexts_are_read_by_the_kernel_of_training():
  """They attend to themselves, and not to slots of the cache."""
  engine = _engine('glm', 'plain')
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
  cache = jax.eval_shape(lambda: engine.cache(4, 256))
  text = str(
    jax.make_jaxpr(engine._insert)(
      engine.variables, cache, shape(4, 64), shape(4), shape(4)
    )
  )
  # Scores of 64 queries are with 64 keys.
  assert '4,1,64,64]' in text and '64,256]' not in text


def test_few_shapes_are_compiled():
  engine = Engine(
    FAMILIES['chatglm2'],
    variables_of('chatglm2', 'plain'),
    stops=STOPS,
    allowed=np.arange(V) != SOP,
    rows=4,
  )
  for lengths in ((3, 9, 20), (1, 2, 3, 4, 5), (50, 1), (7, 7, 7, 7)):
    [*engine.generate(_requests(engine.config, lengths), most=MOST)]
  # Batches of four rows, and of two; contexts of one, two, or all rows.
  assert engine._insert._cache_size() <= 4 and engine._advance._cache_size() <= 2


@pytest.mark.parametrize('rows', [1, 4])
@pytest.mark.parametrize('family', FAMILIES)
def test_a_step_on_a_cpu_copies_no_cache(family, rows):
  """It would take longer than all else where the cache is long."""
  engine, slots = _engine(family, 'plain'), 96
  step = engine._advance.lower(
    engine.variables,
    engine.cache(rows, slots),
    None,
    no_rows(rows, MOST),
    allowed_V=engine.allowed,
    steps=MOST,
    eager=False,
    sampling=Sampling(),
  ).compile()
  size = rows * slots * engine.config.num_kv_heads * engine.config.head_size
  made = re.findall(
    r'%(\S+) = f32\[([\d,]+)\]\S* (?:copy|transpose|fusion)\(', step.as_text()
  )
  of_cache = [name for name, dims in made if math.prod(map(int, dims.split(','))) == size]
  assert of_cache and all('scatter' in name for name in of_cache)


def test_on_one_cpu_layers_are_apart_in_the_memory_of_the_stack():
  """A product with one token would take as long as to copy its weight out of the stack."""
  variables = variables_of('chatglm2', 'int4')
  engine = _engine.__wrapped__('chatglm2', 'int4')
  assert stack.are_apart(engine.variables)
  for name, collection in variables.items():
    stacked = jax.tree.map(np.asarray, collection['layers'])
    for number in range(engine.config.num_layers):
      layer = engine.variables[name][f'layers_{number}']
      jax.tree.map(
        lambda x, whole, n=number: np.testing.assert_array_equal(x, whole[n]),
        layer,
        stacked,
      )
  # Arrays of a size that is a multiple of 64 bytes are views.
  stacked = jax.tree.map(jnp.asarray, variables_of('chatglm2', 'plain'))
  apart = stack.apart(stacked)['params']['layers_1']['mlp']['down']['weight']
  whole = stacked['params']['layers']['mlp']['down']['weight']
  assert apart.unsafe_buffer_pointer() - whole.unsafe_buffer_pointer() == apart.nbytes


def test_on_one_cpu_int8_is_stored_outputs_first():
  """Unless it has groups of scales."""
  layers = variables_of('chatglm2', 'int8')['params']['layers']
  own = _engine.__wrapped__('chatglm2', 'int8').variables['params']['layers_1']
  for names, inputs in (
    (('attention', 'q'), 1),
    (('attention', 'out'), 2),
    (('mlp', 'up'), 1),
  ):
    stored = layers[names[0]][names[1]]['weight'][1]
    turned = own[names[0]][names[1]]['turned']
    order = [*range(inputs, stored.ndim), *range(inputs)]
    np.testing.assert_array_equal(turned, stored.transpose(order))
  grouped = _engine.__wrapped__('chatglm2', 'groups').variables['params']['layers_1']
  assert 'weight' in grouped['attention']['q']


def test_where_a_mesh_has_devices_layers_are_a_stack():
  with sharding.active(sharding.make_mesh(sharding.MeshConfig(data=8))):
    engine = _engine.__wrapped__('chatglm2', 'plain')
  assert not stack.are_apart(engine.variables)
