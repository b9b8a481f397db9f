"""What a weight is: integers, low-rank factors, learnt keys of virtual tokens."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import variants
from flax import traverse_util
from foreign import arrays_of, config_json, imported
from variants import FAMILIES

from glm_jax import models, sharding
from glm_jax.batch import Batch, Visibility
from glm_jax.configs import UserError
from glm_jax.models import products, quantized, virtual
from glm_jax.training import adapters, losses
from glm_jax.training.adapters import PTuningConfig

B, T = 4, 16


@pytest.fixture(params=FAMILIES)
def config(request):
  return FAMILIES[request.param]


@pytest.fixture(scope='module')
def inputs():
  rng = np.random.default_rng(0)
  ids = jnp.asarray(rng.integers(0, 64, (B, T)), jnp.int32)
  t = jnp.broadcast_to(jnp.arange(T), (B, T))
  return ids, t, jnp.zeros_like(t), Visibility(jnp.zeros_like(t), t + 1)


def _logits(config, variables, inputs):
  return small.apply(config, variables, *inputs)


def _relative(a, b):
  return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


def _dequantized(variables):
  flat = traverse_util.flatten_dict(variables['params'])
  scales = traverse_util.flatten_dict(variables['scales'])
  for path, scale in scales.items():
    pairs = zip(flat[path], scale, strict=True)
    inputs = quantized.inputs_of(path)
    flat[path] = np.stack([quantized.dequantize(*pair, inputs) for pair in pairs])
  return traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize(('bits', 'group'), [(8, 0), (4, 0), (4, 8)])
def test_integers_compute_what_their_dequantised_weights_do(config, inputs, bits, group):
  variables = quantized.of_tree(small.params(config), bits, group)
  weight = variables['params']['layers']['mlp']['up']['weight']
  assert weight.dtype == quantized.DTYPES[bits]
  plain = _logits(config, {'params': _dequantized(variables)}, inputs)
  assert _relative(_logits(config, variables, inputs), plain) < 2e-6
  # They are near the weights that they were made from, and groups are nearer.
  whole = _logits(config, {'params': small.params(config)}, inputs)
  assert 0 < _relative(plain, whole) < {8: 0.05, 4: 1}[bits]


def test_integers_are_not_computed_with_unless_their_scales_are_there(config, inputs):
  params = quantized.of_tree(small.params(config), 8)['params']
  with pytest.raises(TypeError, match=r'int8 without scales in .*attention/'):
    _logits(config, {'params': params}, inputs)


def test_groups_are_nearer_than_channels():
  weight = np.random.default_rng(0).normal(size=(4, 16, 32)).astype(np.float32)
  errors = [
    np.square(
      quantized.dequantize(*quantized.quantize(weight, 2, 4, group), 2) - weight
    ).sum()
    for group in (0, 16, 4)
  ]
  assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize('group', [3, 64, -1])
def test_a_group_must_divide_the_inputs(group):
  with pytest.raises(UserError, match=f'--group={group}, and a product with 32 inputs'):
    quantized.quantize(np.ones((32, 4)), 1, 4, group)


def test_adapters_compute_what_merged_weights_do(config, inputs):
  adapters, merged = variants.adapters(config)
  params = small.params(config)
  got = _logits(config, {'params': params, 'adapters': adapters}, inputs)
  assert _relative(got, _logits(config, {'params': merged}, inputs)) < 2e-6
  assert _relative(got, _logits(config, {'params': params}, inputs)) > 1e-2
  # Beside integers, as QLoRA has them.
  whole = quantized.of_tree(params, 4)
  with_integers = _logits(config, {**whole, 'adapters': adapters}, inputs)
  flat = traverse_util.flatten_dict(_dequantized(whole))
  low = traverse_util.flatten_dict(merged)
  base = traverse_util.flatten_dict(params)
  merged = traverse_util.unflatten_dict({k: flat[k] + low[k] - base[k] for k in flat})
  assert _relative(with_integers, _logits(config, {'params': merged}, inputs)) < 3e-6


@pytest.mark.parametrize('kind', ['int4', 'groups', 'adapters'])
def test_eight_devices_compute_what_one_does(config, inputs, kind):
  if kind == 'adapters':
    variables = {'params': small.params(config), 'adapters': variants.adapters(config)[0]}
  else:
    variables = quantized.of_tree(small.params(config), 4, 8 if kind == 'groups' else 0)
  one = _logits(config, variables, inputs)
  layout = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
  with sharding.active(layout):
    assert _relative(_logits(config, variables, inputs), np.asarray(one)) < 2e-6


def _opened(inputs, P):
  """The same rows, with P virtual tokens before each, which all their tokens see."""
  ids, positions, block, seen = inputs
  zeros = jnp.zeros_like(ids)
  batch = Batch(ids, zeros, zeros, positions, block, *seen, zeros)
  opened = virtual.opened_batch(batch, P)
  return opened.tokens, opened.positions, opened.block_positions, opened.visibility


def _encoder(arrays, at):
  get = lambda name: jnp.asarray(arrays[f'{at}/{name}'])
  encoder = {'embedding': get('prefix_encoder.embedding.weight')}
  for name, module in (('hidden', 'trans.0'), ('out', 'trans.2')):
    if f'{at}/prefix_encoder.{module}.weight' in arrays:
      weight, bias = (get(f'prefix_encoder.{module}.{n}') for n in ('weight', 'bias'))
      encoder[name] = {'weight': weight.T, 'bias': bias}
  return encoder


@pytest.mark.parametrize('kind', ['ptuning', 'ptuning_proj'])
@pytest.mark.parametrize('name', ['chatglm', 'chatglm2'])
def test_virtual_tokens_equal_the_original(name, kind):
  arrays, tensors = arrays_of(name)
  found, params = imported(tensors, config_json(name, arrays))
  golden = np.load(pathlib.Path(__file__).parent / 'golden' / 'ptuning.npz')
  golden = {
    k.removeprefix(f'{name}/'): golden[k] for k in golden.files if k.startswith(f'{name}/')
  }
  at = 'in_gmask' if name == 'chatglm' else 'in'
  ids, labels = jnp.asarray(arrays[f'{at}/ids'], jnp.int32), arrays[f'{at}/labels'][:, 1:]
  if name == 'chatglm':
    positions, block = jnp.moveaxis(
      jnp.asarray(arrays[f'{at}/position_ids'], jnp.int32), 1, 0
    )
    end = jnp.asarray((~arrays[f'{at}/attention_mask'][:, 0]).sum(-1), jnp.int32)
  else:
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    block, end = jnp.zeros_like(positions), positions + 1
  P = 5
  tokens = PTuningConfig(tokens=P, projection=kind == 'ptuning_proj')
  rows = _opened((ids, positions, block, Visibility(jnp.zeros_like(end), end)), P)
  weights, targets = jnp.asarray(labels >= 0), jnp.asarray(np.maximum(labels, 0), jnp.int32)

  @jax.jit
  def step(encoder):
    def mean(encoder):
      learnt = {**params, 'prefix': encoder}
      variables = adapters.variables(tokens, found.config, learnt)
      logits = models.build(found.config).apply(variables, *rows)[0][:, P:]
      ce = losses.cross_entropy(logits[:, :-1], targets)
      return (ce * weights).sum() / weights.sum(), logits

    return jax.value_and_grad(mean, has_aux=True)(encoder)

  theirs = _encoder(golden, kind)
  fresh = adapters.leaves(tokens, found.config)['prefix']
  fresh = jax.eval_shape(lambda: nn.unbox(fresh(jax.random.key(0))))
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, theirs)
  (loss, logits), gradients = step(theirs)
  np.testing.assert_allclose(logits, golden[f'{kind}/logits'], atol=2e-5)
  np.testing.assert_allclose(loss, golden[f'{kind}/loss'], rtol=1e-5)
  flat = {
    'embedding.weight': gradients['embedding'],
    **{
      f'{module}.{n}': gradients[part][n].T
      for part, module in (('hidden', 'trans.0'), ('out', 'trans.2'))
      if part in gradients
      for n in ('weight', 'bias')
    },
  }
  for key, gradient in flat.items():
    expected = golden[f'{kind}/grad.{key}']
    np.testing.assert_allclose(
      gradient, expected, atol=1e-4 * np.abs(expected).max(), err_msg=key
    )


def test_virtual_tokens_of_packed_documents_are_each_its_own(config):
  """Two documents in a row, each behind its virtual tokens, and each in a row alone."""
  P, rng = 3, np.random.default_rng(2)
  learnt = virtual.prefix(config, variants.encoder(config, P))
  variables = {'params': small.params(config), 'prefix': learnt}
  assert virtual.count(variables) == P
  n = 8
  ids = jnp.asarray(rng.integers(0, 64, (2, n)), jnp.int32)
  t = jnp.broadcast_to(jnp.arange(n), (2, n))
  apart = _opened((ids, t, jnp.zeros_like(t), Visibility(jnp.zeros_like(t), t + 1)), P)
  flat = [x.reshape(1, -1) for x in apart[:3]]
  shift = jnp.arange(2)[:, None] * (P + n)
  start, end = ((x + shift).reshape(1, -1) for x in apart[3])
  packed = _logits(config, variables, (*flat, Visibility(start, end)))
  alone = _logits(config, variables, apart)
  np.testing.assert_allclose(packed[0], alone.reshape(-1, alone.shape[-1]), atol=2e-5)
  # They matter, and do so through every layer's keys and values.
  other = {**variables, 'prefix': jax.tree.map(lambda x: -x, variables['prefix'])}
  assert np.abs(_logits(config, other, apart) - alone)[:, P:].max() > 1e-3


def _int8(group):
  """Random numbers, a factor [N, H, D] of them as int8, and what it stands for."""
  random = np.random.default_rng(0).normal
  weight, scales = quantized.quantize(random(size=(8, 3, 6)), 2, 8, group)
  axes = ('heads', 'head_dim', 'embed')
  factor = products.Factor(jnp.asarray(weight), axes, jnp.asarray(scales))
  return random, factor, quantized.dequantize(weight, scales, 2)


@pytest.mark.parametrize('group', [0, 4])
def test_a_cpu_multiplies_a_few_tokens_and_integers_as_integers(group):
  """Floats of the weight would be as large as one that is not quantised."""
  random, factor, floats = _int8(group)
  product = jax.jit(lambda x: products.einsum('BTNH,NHD->BTD', x, [factor])[0])
  # Tokens of unlike size, one of them nothing, each with its own scale.
  few = jnp.asarray(random(size=(4, 1, 8, 3)) * [[[[1]]], [[[1e4]]], [[[1e-4]]], [[[0]]]])
  few = few.astype(jnp.float32)
  exact = np.einsum(
    'BTNH,NHD->BTD',
    np.asarray(few, np.float64),
    floats.astype(np.float64),
  )
  size = np.abs(exact).max(-1, keepdims=True)
  assert (np.abs(product(few) - exact) <= 5e-7 * size).all()
  many = jnp.zeros((4, 64, 8, 3), jnp.float32)
  text = lambda x, platform: (
    product.trace(x).lower(lowering_platforms=(platform,)).as_text()
  )
  casts = re.compile(r'stablehlo.convert .*xi8>\) -> tensor<.*xf32>')
  assert not casts.search(text(few, 'cpu')) and 'xi32>' in text(few, 'cpu')
  assert casts.search(text(many, 'cpu')) and casts.search(text(few, 'tpu'))


@pytest.mark.parametrize('group', [0, 4])
def test_gradients_through_integers_are_those_of_floats(group):
  """However few tokens there are: digits, which a CPU multiplies, have no slope."""
  random, factor, floats = _int8(group)
  x, slope = (jnp.asarray(random(size=s), jnp.float32) for s in ((2, 5, 8, 3), (2, 5, 6)))
  pulled = lambda product: jax.jit(jax.grad(lambda x: (jnp.sin(product(x)) * slope).sum()))(
    x
  )
  of_integers = pulled(lambda x: products.einsum('BTNH,NHD->BTD', x, [factor])[0])
  of_floats = pulled(lambda x: jnp.einsum('BTNH,NHD->BTD', x, floats))
  np.testing.assert_allclose(of_integers, of_floats, atol=1e-4)
  assert np.abs(of_floats).max() > 1
