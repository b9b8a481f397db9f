"""Schedules and decay: numbers of the original, and limits."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm_jax.training.optimizer import (
  ENDING,
  SCHEDULES,
  OptimizerConfig,
  ends,
  make_optimizer,
  schedule,
)

_GOLDEN = dict(np.load(pathlib.Path(__file__).parent / 'golden' / 'learning_rates.npz'))
_RUNS = sorted({name.split('/')[0] for name in _GOLDEN})


@pytest.mark.parametrize('run', _RUNS)
def test_rates_equal_the_original_down_to_its_floor(run):
  get = lambda name: _GOLDEN[f'{run}/{name}']
  peak, end = float(get('arg_lr')), int(get('arg_iters'))
  config = OptimizerConfig(
    learning_rate=peak,
    schedule=str(get('arg_style')),
    decay_steps=end,
    warmup_steps=round(float(get('arg_warmup')) * end),
    final_ratio=float(get('arg_ratio')),
  )
  ours = jax.vmap(schedule(config, end))(get('step'))
  # The original's linear decay goes on below its floor, later below 0; ours stays.
  wanted = np.where(
    get('step') > end, np.maximum(get('value'), peak * config.final_ratio), get('value')
  )
  np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize(
  'name,points',
  [
    ('cosine', {0: 0, 5: 0.5, 10: 1, 55: 0.55, 100: 0.1, 999: 0.1}),
    ('linear', {0: 0, 5: 0.5, 10: 1, 55: 0.55, 100: 0.1, 999: 0.1}),
    ('rsqrt', {0: 0, 5: 0.5, 10: 1, 40: 0.5, 90: 1 / 3, 10_000: 0.1}),
    ('wsd', {0: 0, 5: 0.5, 10: 1, 80: 1, 90: 0.55, 100: 0.1, 999: 0.1}),
    ('constant', {0: 0, 5: 0.5, 10: 1, 999: 1}),
  ],
)
def test_schedules_by_hand(name, points):
  config = OptimizerConfig(learning_rate=1.0, schedule=name, warmup_steps=10)
  rate = schedule(config, 100)
  for step, value in points.items():
    assert float(rate(step)) == pytest.approx(value, rel=1e-5, abs=1e-7), step


def test_weight_decay_moves_matrices_and_nothing_else():
  params = {
    'norm': {'scale': jnp.ones(3), 'bias': jnp.ones(3)},
    'mlp': {'weight': jnp.ones((2, 3)), 'bias': jnp.ones(3)},
  }
  config = OptimizerConfig(learning_rate=0.5, schedule='constant', weight_decay=0.1)
  optimizer = make_optimizer(config, 10)
  updates, _ = optimizer.update(
    jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
  )
  moved = optax.apply_updates(params, updates)
  np.testing.assert_allclose(moved['mlp']['weight'], 1 - 0.5 * 0.1)
  for same in (moved['norm']['scale'], moved['norm']['bias'], moved['mlp']['bias']):
    np.testing.assert_array_equal(same, 1)


def test_gradients_are_clipped_by_their_global_norm():
  """Adam does not see the size of a gradient, so its second moment is looked at."""
  config = OptimizerConfig(clip_norm=1.0, beta2=0.5)
  optimizer = make_optimizer(config, 10)
  params = {'weight': jnp.zeros(2)}
  _, opt_state = optimizer.update(
    {'weight': jnp.array([30.0, 40.0])}, optimizer.init(params), params
  )
  np.testing.assert_allclose(opt_state[1].nu['weight'], [0.5 * 0.36, 0.5 * 0.64], rtol=1e-6)


@pytest.mark.parametrize(
  'fields,message',
  [
    (dict(schedule='step'), 'must be one of'),
    (dict(learning_rate=-1.0), 'must be positive'),
    (dict(learning_rate='1e-3'), 'must be float'),
    (dict(warmup_steps=1e3), 'must be int'),
    (dict(beta2=1.0), r'in \[0, 1\)'),
  ],
)
def test_bad_configurations_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    OptimizerConfig(**fields)


def test_a_warmup_longer_than_the_decay_is_refused():
  with pytest.raises(ValueError, match='warmup_steps must be below decay_steps'):
    schedule(OptimizerConfig(warmup_steps=100, decay_steps=100), 1000)


@pytest.mark.parametrize('name', SCHEDULES)
def test_a_warmup_is_kept_where_it_fits_and_shortened_where_nothing_would_be_left(name):
  for warmup in (0, 1, 5, 100):
    config = OptimizerConfig(learning_rate=1.0, schedule=name, warmup_steps=warmup)
    for steps in (1, 2, 20, 100, 101, 5000):
      fits = warmup < steps or name not in ENDING
      assert ends(config, steps) == (warmup if fits else steps // 10, steps)
  # A try of 20 steps has the rates of one that was given a warm-up of two.
  short = OptimizerConfig(schedule=name, warmup_steps=100)
  fitting = dataclasses.replace(short, warmup_steps=2 if name in ENDING else 100)
  rates = [[float(schedule(c, 20)(step)) for step in range(21)] for c in (short, fitting)]
  assert rates[0] == rates[1]
