"""Muon: which parameters it takes, what it makes of them, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm_jax import models
from glm_jax.training import muon, state
from glm_jax.training.optimizer import OptimizerConfig, make_optimizer

_FAMILIES = {
  'glm': models.GLMConfig(
    num_layers=3, hidden_size=16, num_heads=4, vocab_size=32, max_positions=16
  ),
  'chatglm2': models.ChatGLM2Config(
    num_layers=3,
    hidden_size=16,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    mlp_size=24,
    vocab_size=32,
    max_positions=16,
  ),
}


@pytest.fixture(params=_FAMILIES, scope='module')
def params(request):
  """Of a model, with numbers of its own in each."""
  abstract = state.abstract_params(_FAMILIES[request.param])
  leaves, tree = jax.tree.flatten(abstract)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  made = [jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(tree, made)


def _names(path):
  return '/'.join(key.key for key in path)


def _updates(params, optimizer, steps=2):
  opt_state, update = optimizer.init(params), jax.jit(optimizer.update)
  gradients = params
  for _ in range(steps):
    updates, opt_state = update(gradients, opt_state, params)
    gradients = jax.tree.map(lambda g: g[::-1] - 0.5 * g, gradients)
  return {_names(path): u for path, u in jax.tree_util.tree_leaves_with_path(updates)}


def test_matrices_of_layers_become_orthogonal_and_the_rest_is_adams(params):
  adam = optax.scale_by_adam(0.95, 0.98, 1e-6)
  ours = _updates(params, muon.scale_by_muon(0.95, 'float32', adam))
  theirs = _updates(params, adam)
  products = ('q', 'k', 'v', 'out', 'up', 'gate', 'down')
  matrices = 0
  for name, update in ours.items():
    *_, module, leaf = name.split('/')
    if not (name.startswith('layers/') and leaf == 'weight' and module in products):
      np.testing.assert_array_equal(update, theirs[name], err_msg=name)
      continue
    matrices += 1
    for layer in update:
      # q [D, N, H] maps D to all heads; out [N, H, D] maps all heads to D.
      rows = layer.shape[0] if module != 'out' else layer.shape[0] * layer.shape[1]
      matrix = np.reshape(layer, (rows, -1))
      values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
      # Five steps of Newton and Schulz bring singular values near 1, not to it.
      # The least of a random square matrix is near 0, and stays below.
      assert 0.5 < values[-2] and values[0] < 1.3, name
  assert matrices == (7 if any('gate' in name for name in ours) else 6)


def test_each_layer_has_directions_of_its_own(params):
  """What happens to one layer's gradient says nothing to the next one."""
  optimizer = muon.scale_by_muon(0.95, 'float32', optax.scale_by_adam())
  whole = _updates(params, optimizer, steps=1)
  other = jax.tree.map(lambda p: p, params)
  up = other['layers']['mlp']['up']
  up['weight'] = up['weight'].at[1].multiply(-3.0)
  changed = _updates(other, optimizer, steps=1)
  name = 'layers/mlp/up/weight'
  np.testing.assert_allclose(changed[name][::2], whole[name][::2], atol=1e-6)
  # A gradient's size does not count, its sign does.
  np.testing.assert_allclose(changed[name][1], -whole[name][1], atol=1e-4)


def test_updates_have_the_size_of_adams(params):
  """So that a rate and a decay that suit AdamW suit Muon."""
  gradients = jax.tree.map(
    lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params
  )
  optimizer = muon.scale_by_muon(0.95, 'float32', optax.scale_by_adam())
  updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
  for path, update in jax.tree_util.tree_leaves_with_path(updates['layers']):
    if path[-1].key == 'weight' and update.ndim > 2:
      assert 0.1 < float(jnp.sqrt(jnp.mean(update**2))) < 0.3, _names(path)


@pytest.mark.parametrize('dtype,size', [('float32', 4), ('bfloat16', 2)])
def test_a_matrix_keeps_its_momentum_alone(params, dtype, size):
  config = OptimizerConfig(algorithm='muon', first_moment_dtype=dtype)
  opt_state = jax.eval_shape(make_optimizer(config, 10).init, params)
  held = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
    name = _names([key for key in path if isinstance(key, jax.tree_util.DictKey)])
    held[name] = held.get(name, 0) + leaf.size * leaf.dtype.itemsize
  [up] = [v for k, v in held.items() if k.endswith('layers/mlp/up/weight')]
  assert up == size * params['layers']['mlp']['up']['weight'].size
  [words] = [v for k, v in held.items() if k.endswith('words/weight')]
  assert words == (size + 4) * params['words']['weight'].size
