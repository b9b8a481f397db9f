"""Numbers that are printed, counted once more another way."""

import collections
import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm_jax import models, sharding
from glm_jax.batch import OBJECTIVES, Batch, Visibility
from glm_jax.checkpoints.slices import flat
from glm_jax.data import baselines, shares
from glm_jax.models import ChatGLM2Config, ChatGLMConfig, GLMConfig
from glm_jax.performance import chips, flops
from glm_jax.planning import estimate, prediction
from glm_jax.training import evaluation, losses, metrics, state, step
from glm_jax.training import meter as meters
from glm_jax.training.recipe import Recipe

_SMALL = dict(num_layers=3, hidden_size=24, num_heads=4, vocab_size=80, max_positions=15)
MODELS = {
  'glm': GLMConfig(**_SMALL),
  'glm_narrow': GLMConfig(**_SMALL, mlp_size=20),
  'chatglm_6b': ChatGLMConfig(
    **{**_SMALL, 'hidden_size': 16}, mlp_size=28, deepnorm_layers=3
  ),
  'glm_130b': ChatGLMConfig(
    **{**_SMALL, 'hidden_size': 16},
    mlp_size=28,
    deepnorm_layers=3,
    gated=True,
    two_positions=False,
    tied_head=False,
  ),
  'chatglm2': ChatGLM2Config(
    **_SMALL, num_kv_heads=2, head_size=10, mlp_size=36, rotated_size=4
  ),
  'chatglm2_tied': ChatGLM2Config(
    **_SMALL, num_kv_heads=1, head_size=8, mlp_size=12, qkv_bias=False, tied_head=True
  ),
}


@pytest.mark.parametrize('name', MODELS)
def test_flops_are_those_of_the_weights_and_of_the_matmuls_of_a_step(name):
  """Recounted from the parameters, and from the program of a loss with its gradients."""
  config, B, T = MODELS[name], 2, 8
  params = state.abstract_params(config)
  weights = {path: leaf.size for path, leaf in flat(params).items() if path[-1] == 'weight'}
  tables = ('words', 'positions', 'block_positions', 'head')
  used = sum(size for path, size in weights.items() if path[0] not in tables)
  used += weights.get(('head', 'weight'), weights['words', 'weight'])
  assert flops.matmul_weights(config) == used

  ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
  batch = Batch(*[ids] * 8)._replace(loss_weights=jax.ShapeDtypeStruct((B, T), jnp.float32))
  loss_fn = losses.pretraining_loss(models.build(config))
  program = jax.make_jaxpr(jax.grad(lambda p, b: loss_fn({'params': p}, b, None)[0]))(
    params, batch
  )
  asked = flops.training(config, tokens=B * T, pairs=B * T * T)
  assert _matmul_flops(program.jaxpr) == asked


def _matmul_flops(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (inside, _), _ = equation.params['dimension_numbers']
      summed = math.prod(equation.invars[0].aval.shape[i] for i in inside)
      total += 2 * summed * equation.outvars[0].aval.size
    times = equation.params['length'] if equation.primitive.name == 'scan' else 1
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        total += times * _matmul_flops(inner)
  return total


@pytest.mark.parametrize('name', MODELS)
def test_parameters_are_counted_by_hand(name):
  c = MODELS[name]
  D, N, K, H, F = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_size, c.inner_size
  is_glm, is_causal = isinstance(c, GLMConfig), isinstance(c, ChatGLM2Config)
  gates = 2 if c.gated else 1
  layer = D * H * (N + 2 * K) + N * H * D + gates * D * F + F * D
  if not is_causal:  # biases everywhere, and norms of scale and bias
    layer += H * (N + 2 * K) + D + gates * F + D + 2 * 2 * D
  else:
    layer += H * (N + 2 * K) * c.qkv_bias + 2 * D
  total = c.num_layers * layer + D * (1 if is_causal else 2) + c.vocab_size * D
  total += 2 * (c.max_positions + 1) * D if is_glm else 0
  total += 0 if getattr(c, 'tied_head', True) else c.vocab_size * D
  assert state.count(state.abstract_params(c)) == total


def _ragged(seed=0, B=6, T=20):
  """A batch of random intervals, padding behind, objectives and weights."""
  rng = np.random.default_rng(seed)
  t, length = np.arange(T), rng.integers(2, T + 1, (B, 1))
  start = np.minimum(rng.integers(0, T, (B, T)), t)
  end = np.where(t < length, np.maximum(t + 1, rng.integers(0, T, (B, T))), 0)
  start = np.where(end > 0, start, 0)
  draw = lambda high: rng.integers(0, high, (B, T)).astype(np.int32)
  return Batch(
    tokens=draw(9),
    targets=draw(9),
    loss_weights=((t < length) * rng.choice([0, 0.5, 1], (B, T))).astype(np.float32),
    positions=draw(9),
    block_positions=draw(9),
    key_start=start.astype(np.int32),
    key_end=end.astype(np.int32),
    objective=draw(len(OBJECTIVES)),
  )


def test_pairs_and_tokens_of_a_batch_are_those_of_its_mask():
  batch = _ragged()
  mask = np.asarray(batch.visibility.mask(20))
  assert flops.pairs(batch.visibility) == mask.sum()
  wanted = flops.training(MODELS['glm'], mask.any(-1).sum(), mask.sum())
  run = types.SimpleNamespace(model=MODELS['glm'], pattern='', adapters=None)
  assert Recipe().work(run, batch.visibility) == (mask.any(-1).sum(), wanted)
  backwards = Visibility(np.array([[3, 0]]), np.array([[1, 2]]))
  assert flops.pairs(backwards) == 2


def test_speed_is_of_the_seconds_since_the_last_report(monkeypatch):
  """Tokens and FLOPs a second, the share of the peak, and the time that is left."""
  clock, chip = [100.0], dataclasses.replace(chips.CHIPS['v4'], peak_flops=50.0)
  monkeypatch.setattr(meters.time, 'perf_counter', lambda: clock[0])
  monkeypatch.setattr(chips, 'of_device_kind', lambda kind: chip)
  monkeypatch.setattr(jax, 'device_count', lambda: 8)
  meter = meters.Meter(10, 40)
  for number, seconds, steps in ((14, 2.0, 4), (20, 5.0, 6)):
    for _ in range(steps):
      meter.count(tokens=30, flops=1000)
      clock[0] += seconds / steps
    meter.stop()
    clock[0] += 1000  # validation and saving
    meter.restart()
    found = meter.report(number)
    assert found['tokens_per_second'] == pytest.approx(30 * steps / seconds)
    assert found['mfu'] == pytest.approx(1000 * steps / seconds / (50 * 8))
    assert found['seconds_left'] == pytest.approx((40 - number) * seconds / steps)
    assert found['input_stall'] == 0


def test_means_are_of_sums_and_counts():
  a, b = {'x': (6.0, 2.0), 'y': (1.0, 1.0)}, {'x': (2.0, 6.0), 'z': (5.0, 0.0)}
  total = metrics.add(a, b)
  assert total == {'x': (8.0, 8.0), 'y': (1.0, 1.0), 'z': (5.0, 0.0)}
  assert metrics.averages(total) == {'x': 1.0, 'y': 1.0}


def _linear(variables, batch, key, counts):
  """A loss whose gradient is known: sum of w (x . p)."""
  del key, counts
  total = (batch['w'] * (batch['x'] @ variables['params']['p'])).sum()
  return total, {'loss': (total, batch['w'].sum()), 'more': (total, batch['w'].sum())}


@pytest.mark.parametrize('microbatches', [1, 2, 4])
def test_the_gradients_norm_is_that_of_the_mean_before_it_is_clipped(microbatches):
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(8, 5)).astype(np.float32), np.arange(1, 9, dtype=np.float32)
  mean = (w[:, None] * x).sum(0) / w.sum()
  optimizer = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(2.0))
  train_step = step.make_train_step(_linear, optimizer, microbatches=microbatches, seed=0)
  params = {'p': jnp.ones(5)}
  current = {'step': jnp.int32(3), 'params': params, 'opt_state': optimizer.init(params)}
  made, found = jax.jit(train_step)(current, {}, {'x': x, 'w': w})
  values = metrics.averages(found)
  assert values['gradient_norm'] == pytest.approx(np.linalg.norm(mean), rel=1e-5)
  assert values['loss'] == values['more'] == pytest.approx(mean.sum(), rel=1e-5)
  assert int(made['step']) == 4
  moved = 2e-3 * mean / np.linalg.norm(mean)
  np.testing.assert_allclose(made['params']['p'], 1 - moved, rtol=1e-6)


def test_a_step_without_a_scored_token_moves_nothing_and_is_finite():
  optimizer = optax.sgd(1.0)
  train_step = step.make_train_step(_linear, optimizer, microbatches=1, seed=0)
  params = {'p': jnp.ones(5)}
  current = {'step': jnp.int32(0), 'params': params, 'opt_state': optimizer.init(params)}
  made, found = jax.jit(train_step)(current, {}, {'x': jnp.ones((4, 5)), 'w': jnp.zeros(4)})
  np.testing.assert_array_equal(made['params']['p'], 1)
  assert float(found['gradient_norm'][0]) == 0 and 'loss' not in metrics.averages(found)


def test_validations_loss_is_the_mean_over_objectives_of_means_over_tokens(monkeypatch):
  """Of rows of a loss and a number of tokens each, in batches of different sizes."""
  batches = {
    'of blanks': [[(3.0, 1)], [(1.0, 5), (2.0, 2)]],
    'of documents': [[(7.0, 4)]],
  }

  def eval_step(params, batch):
    sums, counts = params * batch.tokens * batch.loss_weights, batch.loss_weights
    found = {'loss': (sums.sum(), counts.sum())}
    for i, name in enumerate(('blank', 'document')):
      own = batch.objective == i
      found[f'loss/{name}'] = ((sums * own).sum(), (counts * own).sum())
    return found

  def stream(task):
    for rows in batches[task]:
      values, counts = (
        np.array(column, np.float32)[:, None] for column in zip(*rows, strict=True)
      )
      kind = np.full_like(values, task == 'of documents')
      yield Batch(values, *[counts] * 6, objective=kind)

  layout = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
  sets = {task: functools.partial(stream, task) for task in batches}
  found = evaluation.Validation(sets, eval_step, layout)(jnp.float32(1))
  assert found == pytest.approx({'loss/blank': 1.5, 'loss/document': 7, 'loss': 4.25})


@pytest.mark.parametrize('sizes', [(5, 3), (1, 1, 1, 8), (4, 4), (2,), (3, 0, 6)])
def test_validation_by_corpus_is_that_of_its_rows_alone(sizes):
  """Batches of four, whose rows may be of several corpora; the last is filled up."""
  rng = np.random.default_rng(0)
  corpora = {f'c{i}': n for i, n in enumerate(sizes)}
  number_of = np.repeat(range(len(sizes)), sizes)
  total = len(number_of)
  values, weights = rng.random((2, 2, total)).astype(np.float32)  # [objective, row]

  def eval_step(params, batch):
    sums, counts = params * batch.tokens * batch.loss_weights, batch.loss_weights
    found = {'loss': (sums.sum(), counts.sum())}
    for i, name in enumerate(('blank', 'document')):
      own = batch.objective == i
      found[f'loss/{name}'] = ((sums * own).sum(), (counts * own).sum())
    scored = counts > 0
    found['accuracy'] = ((scored * (batch.tokens > 0.5)).sum(), scored.sum())
    found['moment'] = (sums.sum(), scored.sum())
    return found

  def told(means):
    return {'told' if k == 'moment' else k: v + (k == 'moment') for k, v in means.items()}

  def stream(kind):
    for first in range(0, total, 4):
      index = np.arange(first, first + 4)
      there = index < total
      row = np.minimum(index, total - 1)
      tokens = values[kind, row][:, None]
      loss_weights = np.where(there, weights[kind, row], 0)[:, None]
      batch = Batch(tokens, tokens, loss_weights, *[tokens] * 4, np.full_like(tokens, kind))
      yield batch._replace(index=np.where(there, index, -1))

  layout = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
  sets = {name: functools.partial(stream, name) for name in range(2)}
  found = evaluation.Validation(sets, eval_step, layout, corpora, told)(jnp.float32(1))
  whole = evaluation.Validation(sets, eval_step, layout, told=told)(jnp.float32(1))
  assert {*whole} == {'loss', 'loss/blank', 'loss/document', 'accuracy', 'told'}
  # What all rows have together is the same to the bit, whether corpora are told apart.
  assert {name: found[name] for name in whole} == whole
  for i, name in enumerate(corpora):
    own = number_of == i
    if own.any():
      means = [np.average(values[k][own], weights=weights[k][own]) for k in range(2)]
      assert found.pop(f'corpus/{name}/loss') == pytest.approx(np.mean(means), rel=1e-5)
      right = np.mean(values[:, own] > 0.5)
      assert found.pop(f'corpus/{name}/accuracy') == pytest.approx(right)
      mean = np.mean(values[:, own] * weights[:, own])
      assert found.pop(f'corpus/{name}/told') == pytest.approx(mean + 1, rel=1e-5)
  # A corpus without a row has none of it; losses by objective are of all corpora alone.
  assert found == whole


def test_baselines_are_counted_by_hand():
  """Witten and Bell: counts of pairs, and the unigram for as much as a token has kinds."""
  train, scored = [_ragged(seed, B=3) for seed in (1, 2)], [_ragged(3, B=3)]
  V = 11
  pairs = [
    (int(b.tokens[i]), int(b.targets[i]))
    for b in train
    for i in zip(*np.nonzero(b.loss_weights), strict=True)
  ]
  ones = collections.Counter(target for _, target in pairs)
  twos, firsts = collections.Counter(pairs), collections.Counter(a for a, _ in pairs)
  kinds = collections.Counter(a for a, _ in twos)
  unigram = {t: (ones[t] + 1) / (len(pairs) + V) for t in range(V)}
  sums = np.zeros(3)
  for b in scored:
    for i in zip(*np.nonzero(b.loss_weights), strict=True):
      a, t, w = int(b.tokens[i]), int(b.targets[i]), float(b.loss_weights[i])
      both = (twos[a, t] + kinds[a] * unigram[t]) / (firsts[a] + kinds[a])
      both = both if firsts[a] else unigram[t]
      sums += [-w * math.log(unigram[t]), -w * math.log(both), w]
  found = baselines.fit_and_score(train, scored, V)
  assert found == pytest.approx(
    {'unigram': sums[0] / sums[2], 'bigram': sums[1] / sums[2]}, rel=1e-6
  )


def test_what_is_trained_on_is_counted_by_hand():
  """Two examples a row, of objectives of their own."""
  rng = np.random.default_rng(0)
  B, T, C = 5, 12, 3
  batch = {k: np.zeros((B, T), np.int32) for k in ('key_start', 'key_end', 'objective')}
  batch['loss_weights'] = np.zeros((B, T), np.float32)
  batch['corpus'] = rng.integers(0, C, B)
  wanted = np.zeros((C, len(OBJECTIVES), 4))
  for row in range(B):
    at = 0
    for _ in range(2):
      n, kind = int(rng.integers(1, 7)), int(rng.integers(0, 4))
      batch['key_start'][row, at : at + n] = at
      batch['key_end'][row, at : at + n] = at + n
      batch['objective'][row, at : at + n] = kind
      weights = rng.choice([0, 0.25, 2.0], n)
      batch['loss_weights'][row, at : at + n] = weights
      sums = [1, n, (weights > 0).sum(), weights.sum()]
      wanted[batch['corpus'][row], kind] += sums
      at += n
  np.testing.assert_allclose(shares.count(batch, C), wanted)


def test_attention_is_priced_by_the_blocks_and_heads_of_a_device():
  """A call is a row: two matmuls forward and five backward, over what is visited."""
  layout = sharding.make_mesh(sharding.MeshConfig(data=2, sequence=2, tensor=2))
  model = ChatGLM2Config(**_SMALL, num_kv_heads=2, head_size=64, mlp_size=36)
  t = np.arange(1024)[None]
  causal = Visibility(np.zeros_like(t), t + 1)
  chip = dataclasses.replace(chips.CHIPS['v4'], head_efficiency={'splash': 0.6})
  config = types.SimpleNamespace(model=model)
  found = prediction._attention(config, 'tpu_splash', causal, layout, chip)
  area, width = flops.visited(causal) / 2, 4 * 64 / 2
  assert flops.pairs(causal) < flops.visited(causal) < 1024**2 * 1.01
  assert found.forward_flops == 2 * 2 * area * width
  assert found.backward_flops == 5 * 2 * area * width
  assert found.efficiency == 0.6 / 2  # heads of 64 fill half of a systolic array
  assert prediction._attention(config, 'dense', causal, layout, chip) is None


def test_a_prediction_says_numbers_of_a_chip():
  """tpu7x has two devices a chip."""
  found = prediction.Prediction(
    parameters=1,
    trained=1,
    devices=16,
    device_kind=chips.CHIPS['tpu7x'].device_kinds[0],
    mesh={},
    attention=('dense', ''),
    rows=4,
    tokens=8000,
    memory={},
    fits=True,
    model_flops=32e15,
    compile_seconds=0.0,
    fingerprint='',
    estimate=estimate.Estimate(0.25, 0.15, 0.1, {}, {}, ()),
    efficiency=None,
    visited=None,
  )
  peak = chips.CHIPS['tpu7x'].peak_flops
  assert (found.chips, found.estimate.step_seconds) == (8, pytest.approx(0.5))
  assert found.tokens_per_second == pytest.approx(8000 / 0.5 / 8)
  assert found.mfu == pytest.approx(32e15 / 16 / (0.5 * peak))
  said = found.to_dict()
  assert said['mfu'] == found.mfu and said['step_seconds'] == found.estimate.step_seconds
  assert said['tokens_per_second_per_chip'] == found.tokens_per_second
  nothing = dataclasses.replace(found, estimate=None)
  assert nothing.mfu is None and nothing.tokens_per_second is None
