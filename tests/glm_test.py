"""GLM: numbers of the original PyTorch code, and properties of the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from foreign import arrays_of, imported

from glm_jax import models, sharding
from glm_jax.batch import Visibility, prefix_visibility
from glm_jax.inference import decode
from glm_jax.models import cache as kv_cache
from glm_jax.models import layers, stack
from glm_jax.models.compute import REMAT_POLICIES, ComputeConfig
from glm_jax.training import losses, optimizer


@pytest.fixture(scope='session')
def golden():
  """The original's tiny model and batch; every size is read from the arrays."""
  arrays, tensors = arrays_of('glm')
  found, params = imported(tensors, {}, 'megatron', num_heads=4)
  return arrays, tensors, found.config, jax.tree.map(jnp.asarray, params)


def _inputs(arrays):
  tokens = jnp.asarray(arrays['in/tokens'], jnp.int32)
  positions = jnp.asarray(arrays['in/position_ids'], jnp.int32)
  B, T = tokens.shape
  visibility = prefix_visibility(arrays['in/sep'], np.full(B, T), T)
  return tokens, positions[:, 0], positions[:, 1], visibility


def test_logits_loss_and_gradients_equal_the_original(golden):
  arrays, _, config, params = golden
  model, inputs = models.build(config), _inputs(arrays)
  weights = jnp.asarray(arrays['in/loss_mask'], jnp.float32)

  @jax.jit
  def value_and_gradients(params):
    def mean_loss(params):
      logits, _ = model.apply({'params': params}, *inputs)
      ce = losses.cross_entropy(logits, jnp.asarray(arrays['in/targets'], jnp.int32))
      return (ce * weights).sum() / weights.sum(), (logits, ce)

    return jax.value_and_grad(mean_loss, has_aux=True)(params)

  (value, (logits, ce)), gradients = value_and_gradients(params)
  np.testing.assert_allclose(logits, arrays['out/logits'], atol=2e-5)
  np.testing.assert_allclose(ce, arrays['out/per_token_ce'], atol=2e-5)
  np.testing.assert_allclose(value, arrays['out/loss'], rtol=1e-6)
  # Megatron fuses Q, K and V; their norms add up as squares.
  norms = jax.tree.map(
    lambda g: jnp.sqrt(jnp.square(g).sum(tuple(range(1, g.ndim)))), gradients['layers']
  )
  for i in range(config.num_layers):
    at, layer = f'gradnorm/transformer.layers.{i}.', jax.tree.map(lambda n: n[i], norms)
    attention = layer['attention']
    for kind in ('weight', 'bias'):
      fused = np.sqrt(sum(attention[name][kind] ** 2 for name in 'qkv'))
      pairs = {
        f'attention.query_key_value.{kind}': fused,
        f'attention.dense.{kind}': attention['out'][kind],
        f'mlp.dense_h_to_4h.{kind}': layer['mlp']['up'][kind],
        f'mlp.dense_4h_to_h.{kind}': layer['mlp']['down'][kind],
        f'input_layernorm.{kind}': layer['attention_norm'][_norm_name(kind)],
        f'post_attention_layernorm.{kind}': layer['mlp_norm'][_norm_name(kind)],
      }
      for name, norm in pairs.items():
        np.testing.assert_allclose(norm, arrays[at + name], rtol=1e-4, err_msg=name)
  for name, ours in (
    ('word_embeddings', gradients['words']),
    ('transformer.position_embeddings', gradients['positions']),
    ('transformer.block_position_embeddings', gradients['block_positions']),
  ):
    norm = np.linalg.norm(ours['weight'])
    np.testing.assert_allclose(norm, arrays[f'gradnorm/{name}.weight'], rtol=1e-4)
  for kind in ('weight', 'bias'):
    norm = np.linalg.norm(gradients['final_norm'][_norm_name(kind)])
    np.testing.assert_allclose(
      norm, arrays[f'gradnorm/transformer.final_layernorm.{kind}'], rtol=1e-4
    )


def _norm_name(kind):
  return {'weight': 'scale', 'bias': 'bias'}[kind]


def test_every_remat_policy_has_a_name():
  assert {*REMAT_POLICIES} == {'none', *stack._REMAT}


@pytest.mark.parametrize(
  'attention,remat', [('chunked', 'none'), ('dense', 'full'), ('dense', 'dots_no_batch')]
)
def test_backends_and_remat_change_memory_not_numbers(golden, attention, remat):
  arrays, _, config, params = golden
  compute = ComputeConfig(attention=attention, remat=remat)
  model, inputs = models.build(config, compute), _inputs(arrays)
  apply = lambda params: model.apply({'params': params}, *inputs)[0]
  logits = jax.jit(apply)(params)
  np.testing.assert_allclose(logits, arrays['out/logits'], atol=2e-5)
  text = str(jax.make_jaxpr(jax.grad(lambda p: apply(p).sum()))(params))
  assert ('remat' in text or 'checkpoint' in text) == (
    remat != 'none' or attention == 'chunked'
  )


def test_the_published_hugging_face_code_computes_another_gelu(golden):
  """glm-10b's own code has erf; the weights were trained with tanh."""
  arrays, tensors, config, params = golden
  prefixed = {f'glm.{name}': tensor for name, tensor in tensors.items()}
  found, theirs = imported(prefixed, {}, num_heads=4)
  assert found.format == 'glm-10b' and found.prefix == 'glm.'
  jax.tree.map(np.testing.assert_array_equal, theirs, jax.tree.map(np.asarray, params))
  same = {f'in/{name}': arrays[f'hf/{name}'] for name in ('tokens', 'position_ids', 'sep')}
  for activation, wanted in (('gelu', 'tanh'), ('gelu_erf', 'erf')):
    changed = dataclasses.replace(config, activation=activation)
    logits = small.logits(changed, params, *_inputs(same))
    np.testing.assert_allclose(logits, arrays[f'hf/logits_{wanted}'], atol=2e-5)


def test_incremental_decoding_equals_the_original_and_the_full_forward(golden):
  arrays, _, config, params = golden
  model = models.build(config)
  tokens, positions, blocks, _ = (
    x[:1] if not isinstance(x, Visibility) else x for x in _inputs(arrays)
  )
  part_a, T = int(arrays['in/sep'][0]), tokens.shape[1]
  variables = {'params': params}
  read = jax.jit(lambda *args: decode.read_token(model, variables, *args))
  context, logits = decode.read_context(
    model, variables, tokens[:, :part_a], jnp.array([part_a]), head=layers.logits
  )
  cache = kv_cache.put(kv_cache.init(config, 1, T), context, jnp.array([0]))
  steps = [logits[0]]
  for t in range(part_a, T):
    cache, logits = read(cache, tokens[:, t], positions[:, t], blocks[:, t], jnp.array([t]))
    steps.append(logits)
  np.testing.assert_allclose(jnp.concatenate(steps), arrays['inc/logits'][0], atol=2e-5)
  np.testing.assert_allclose(arrays['inc/logits'][0], arrays['out/logits'][0], atol=2e-5)


def test_weight_decay_groups_equal_the_original(golden):
  arrays, tensors, config, params = golden
  decayed = optimizer.decays(params)
  decayed = {
    name for name in tensors if bool(np.all(_like_megatron(decayed, config)[name]))
  }
  assert decayed == set(arrays['wd/decayed'].tolist())
  assert set(tensors) - decayed == set(arrays['wd/not_decayed'].tolist())


def _like_megatron(flags, config):
  layer = flags['layers']
  names = {
    'word_embeddings.weight': flags['words']['weight'],
    'transformer.position_embeddings.weight': flags['positions']['weight'],
    'transformer.block_position_embeddings.weight': flags['block_positions']['weight'],
    'transformer.final_layernorm.weight': flags['final_norm']['scale'],
    'transformer.final_layernorm.bias': flags['final_norm']['bias'],
  }
  for i in range(config.num_layers):
    at = f'transformer.layers.{i}.'
    for theirs, ours in (
      ('input_layernorm', 'attention_norm'),
      ('post_attention_layernorm', 'mlp_norm'),
    ):
      names[f'{at}{theirs}.weight'] = layer[ours]['scale']
      names[f'{at}{theirs}.bias'] = layer[ours]['bias']
    for kind in ('weight', 'bias'):
      qkv = [layer['attention'][name][kind] for name in 'qkv']
      names[f'{at}attention.query_key_value.{kind}'] = qkv
      names[f'{at}attention.dense.{kind}'] = layer['attention']['out'][kind]
      names[f'{at}mlp.dense_h_to_4h.{kind}'] = layer['mlp']['up'][kind]
      names[f'{at}mlp.dense_4h_to_h.{kind}'] = layer['mlp']['down'][kind]
  return names


def test_initial_scales_are_the_originals(config):
  params = small.params(config)
  scaled = 0.02 / (2 * config.num_layers) ** 0.5
  layer = params['layers']
  for weight, std in (
    (params['words']['weight'], 0.02),
    (params['positions']['weight'], 0.02),
    (layer['attention']['q']['weight'], 0.02),
    (layer['attention']['out']['weight'], scaled),
    (layer['mlp']['up']['weight'], 0.02),
    (layer['mlp']['down']['weight'], scaled),
  ):
    assert float(weight.std()) == pytest.approx(std, rel=0.06)
  assert float(jnp.abs(layer['mlp']['up']['bias']).max()) == 0
  # Each layer has weights of its own.
  assert not jnp.allclose(layer['mlp']['up']['weight'][0], layer['mlp']['up']['weight'][1])


def test_a_token_influences_exactly_those_that_see_it(config, batch):
  """By gradient: Part A sees all of Part A, Part B only what precedes it.

  Each token gets a position of its own, so that the gradient of a query's logits to
  the position table says whose embedding they depend on.
  """
  params = small.params(config)
  model, T = models.build(config), batch.tokens.shape[1]
  row = jax.tree.map(lambda x: x[:1], batch._replace(index=None))
  readout = jax.random.normal(jax.random.key(1), (config.vocab_size,))

  @jax.jit
  def influence(t):
    def query(table):
      logits, _ = model.apply(
        {'params': {**params, 'positions': {'weight': table}}},
        row.tokens,
        jnp.arange(T)[None],
        row.block_positions,
        row.visibility,
      )
      return logits[0, t] @ readout

    return jnp.abs(jax.grad(query)(params['positions']['weight'])[:T]).max(-1) > 0

  sees = np.asarray(row.visibility.mask(T))[0]
  part_a = int(row.key_end[0, 0])
  for t in (0, part_a - 1, part_a, part_a + 5):
    np.testing.assert_array_equal(influence(t), sees[t])
  assert sees[0, part_a - 1] and not sees[part_a - 1, part_a] and sees[part_a + 5, part_a]


def test_the_unseen_padding_changes_nothing(config, batch):
  params = small.params(config)
  padding = batch.key_end == 0
  assert padding.any()
  rest = (batch.positions, batch.block_positions, batch.visibility)
  apply = lambda tokens: small.logits(config, params, tokens, *rest)
  changed = apply(np.where(padding, 7, batch.tokens))
  np.testing.assert_array_equal(
    np.where(padding[..., None], 0, changed),
    np.where(padding[..., None], 0, apply(batch.tokens)),
  )


def test_bfloat16_computes_close_to_float32(golden):
  arrays, _, config, params = golden
  compute = ComputeConfig(dtype='bfloat16')
  logits = small.logits(config, params, *_inputs(arrays), compute=compute)
  assert logits.dtype == jnp.float32
  # bfloat16 keeps 8 bits: the references agree to 3e-2.
  np.testing.assert_allclose(logits, arrays['out/logits'], atol=3e-2)


def test_activations_are_constrained_under_the_mesh(config, batch):
  """Flax drops logical constraints without a word in the wrong kind of context."""
  params = small.params(config)
  mesh = sharding.make_mesh(sharding.MeshConfig(data=4, tensor=2))

  def text():
    return str(
      jax.make_jaxpr(
        lambda p: models.build(config).apply(
          {'params': p},
          batch.tokens,
          batch.positions,
          batch.block_positions,
          batch.visibility,
        )[0]
      )(params)
    )

  assert 'sharding_constraint' not in text()
  with sharding.active(mesh):
    assert 'sharding_constraint' in text()
