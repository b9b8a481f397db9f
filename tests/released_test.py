"""The released families against numbers of the original code; every size is the file's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from foreign import arrays_of, config_json, exported, imported

from glm_jax import models
from glm_jax.batch import Visibility
from glm_jax.inference import decode
from glm_jax.inference.engine import Engine
from glm_jax.inference.request import Request, Span
from glm_jax.models import ChatGLM2Config, ChatGLMConfig, chatglm, chatglm2, layers
from glm_jax.models import cache as kv_cache
from glm_jax.training import losses


@pytest.fixture(scope='session')
def golden():
  """(arrays, config, params) of each file, imported once."""
  made = {}

  def get(name):
    if name not in made:
      arrays, tensors = arrays_of(name)
      if name == 'glm_130b':
        heads = int(arrays['meta/heads'])
        found, params = imported(tensors, {}, 'megatron', num_heads=heads)
      else:
        found, params = imported(tensors, config_json(name, arrays))
      made[name] = arrays, found, jax.tree.map(jnp.asarray, params)
    return made[name]

  return get


def _prefix_inputs(arrays, at, two):
  """Inputs of a batch whose mask is True where nothing is seen."""
  ids = jnp.asarray(arrays[f'{at}/ids'], jnp.int32)
  positions = jnp.asarray(arrays[f'{at}/position_ids'], jnp.int32)
  sees = ~arrays[f'{at}/attention_mask'][:, 0]
  end = jnp.asarray(sees.sum(-1), jnp.int32)
  visibility = Visibility(jnp.zeros_like(end), end)
  np.testing.assert_array_equal(visibility.mask(ids.shape[1]), sees)  # one interval
  if two:
    return ids, positions[:, 0], positions[:, 1], visibility
  return ids, positions, jnp.zeros_like(positions), visibility


def _causal_inputs(ids):
  ids = jnp.asarray(ids, jnp.int32)
  t = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
  return ids, t, jnp.zeros_like(t), Visibility(jnp.zeros_like(t), t + 1)


def _check_step(arrays, found, params, inputs, at, grads_at):
  """Logits, the loss of shifted labels, and the gradient norm of every tensor."""
  model = models.build(found.config)
  labels = arrays[f'in{at}/labels'][:, 1:]
  weights, targets = jnp.asarray(labels >= 0, jnp.float32), jnp.maximum(labels, 0)

  @jax.jit
  def value_and_gradients(params):
    def mean(params):
      logits, _ = model.apply({'params': params}, *inputs)
      ce = losses.cross_entropy(logits[:, :-1], jnp.asarray(targets, jnp.int32))
      return (ce * weights).sum() / weights.sum(), logits

    return jax.value_and_grad(mean, has_aux=True)(params)

  (value, logits), gradients = value_and_gradients(params)
  np.testing.assert_allclose(logits, arrays[f'out{at}/logits'], atol=2e-5)
  np.testing.assert_allclose(value, arrays[f'out{at}/loss'], rtol=1e-5)
  norms = {
    name: np.linalg.norm(gradient)
    for name, gradient in exported(gradients, found.format, found.config).items()
    if not name.endswith('inv_freq')
  }
  checked = 0
  for name, norm in norms.items():
    np.testing.assert_allclose(norm, arrays[f'{grads_at}/{name}'], rtol=1e-4, err_msg=name)
    checked += 1
  assert checked == sum(
    key.startswith(f'{grads_at}/') and '__' not in key and 'inv_freq' not in key
    for key in arrays
  )


@pytest.mark.parametrize('kind', ['gmask', 'mask'])
@pytest.mark.parametrize('name', ['chatglm', 'glm_130b'])
def test_chatglm_equals_the_original(golden, name, kind):
  arrays, found, params = golden(name)
  assert not found.config.causal and found.config.two_positions == (name == 'chatglm')
  inputs = _prefix_inputs(arrays, f'in_{kind}', found.config.two_positions)
  _check_step(arrays, found, params, inputs, f'_{kind}', f'gradnorm_{kind}')


def test_deepnorm_counts_28_layers_whatever_the_depth(golden):
  arrays, found, params = golden('chatglm')
  assert found.config.deepnorm_layers == arrays['meta/alpha_layers'] == 28
  assert (2 * 28) ** 0.5 == pytest.approx(float(arrays['meta/alpha']))
  assert (
    golden('glm_130b')[1].config.deepnorm_layers == golden('glm_130b')[1].config.num_layers
  )
  own = dataclasses.replace(found.config, deepnorm_layers=found.config.num_layers)
  inputs = _prefix_inputs(arrays, 'in_gmask', True)
  logits = small.logits(own, params, *inputs)
  assert np.abs(logits - arrays['out_gmask/logits']).max() > 0.01


def test_glm4_0414_normalises_what_attention_and_mlp_add(golden):
  """Under two more norms a layer, which it would lose as a model of another name."""
  arrays, found, params = golden('glm4_0414')
  assert found.format == 'glm4' and found.config.sandwich_norms
  assert not golden('hf_glm')[1].config.sandwich_norms
  inputs = _causal_inputs(arrays['in/ids'])
  logits = small.logits(found.config, params, *inputs)
  np.testing.assert_allclose(logits, arrays['out/logits'], atol=1e-5)
  added = {'attention_out_norm', 'mlp_out_norm'}
  assert {*params['layers']} - {*golden('hf_glm')[2]['layers']} == added
  plain = dataclasses.replace(found.config, sandwich_norms=False)
  layers_ = {k: v for k, v in params['layers'].items() if k not in added}
  other = small.logits(plain, {**params, 'layers': layers_}, *inputs)
  assert np.abs(other - logits).max() > 0.1


def test_glm4_0414_without_biases_is_the_larger_one(golden):
  """GLM-4-32B-0414; a bias that is not there is 0."""
  arrays, found, _ = golden('glm4_0414')
  _, tensors = arrays_of('glm4_0414')
  bias = lambda name: name.endswith('proj.bias')
  config = {**config_json('glm4_0414', arrays), 'attention_bias': False}
  larger, params = imported({k: v for k, v in tensors.items() if not bias(k)}, config)
  assert larger.config == dataclasses.replace(found.config, qkv_bias=False)
  zeros = {k: np.zeros_like(v) if bias(k) else v for k, v in tensors.items()}
  _, with_zeros = imported(zeros, config_json('glm4_0414', arrays))
  inputs = _causal_inputs(arrays['in/ids'])
  logits = small.logits(larger.config, params, *inputs)
  np.testing.assert_array_equal(logits, small.logits(found.config, with_zeros, *inputs))
  assert np.abs(logits - arrays['out/logits']).max() > 0.1


def test_a_step_of_adamw_is_pytorchs(golden):
  """Its parameters and the loss behind it; decay of everything, as PyTorch's default."""
  arrays, found, params = golden('glm4_0414')
  inputs, model = _causal_inputs(arrays['in/ids']), models.build(found.config)
  targets = jnp.asarray(arrays['in/labels'][:, 1:])
  weights = jnp.asarray(targets >= 0, jnp.float32)

  @jax.jit
  def loss(params):
    logits, _ = model.apply({'params': params}, *inputs)
    ce = losses.cross_entropy(logits[:, :-1], jnp.maximum(targets, 0))
    return (ce * weights).sum() / weights.sum()

  optimizer = optax.adamw(1e-3, 0.9, 0.95, eps=1e-8, weight_decay=0.1)
  updates, _ = optimizer.update(jax.grad(loss)(params), optimizer.init(params), params)
  after = optax.apply_updates(params, updates)
  np.testing.assert_allclose(loss(after), arrays['step/loss_after'], rtol=1e-5)
  tensors, checked = exported(after, 'glm4', found.config), 0
  for name, tensor in tensors.items():
    if f'step/{name}' in arrays:
      # Where a gradient is almost 0, its sign is a whole step.
      np.testing.assert_allclose(tensor, arrays[f'step/{name}'], atol=2e-5)
      checked += 1
  assert checked == 7


def test_a_tied_head_is_the_embedding_table(golden):
  arrays, _, _ = golden('chatglm')
  _, tensors = arrays_of('chatglm')
  tensors['lm_head.weight'] = tensors['transformer.word_embeddings.weight'].copy()
  found, params = imported(tensors, config_json('chatglm', arrays))
  assert found.config.tied_head and found.repeats_head and 'head' not in params
  inputs = _prefix_inputs(arrays, 'in_gmask', True)
  logits = small.logits(found.config, params, *inputs)
  np.testing.assert_allclose(logits, arrays['tied/logits'], atol=2e-5)


@pytest.mark.parametrize('name', ['chatglm2', 'hf_glm', 'glm4_0414'])
def test_chatglm2_equals_the_original(golden, name):
  arrays, found, params = golden(name)
  inputs = _causal_inputs(arrays['in/ids'])
  _check_step(arrays, found, params, inputs, '', 'gradnorm')


@pytest.mark.parametrize('name', ['chatglm2', 'hf_glm', 'glm4_0414'])
def test_left_padded_inputs_are_compact_rows_here(golden, name):
  arrays, found, params = golden(name)
  for row, mask in enumerate(arrays['pad/attention_mask'].astype(bool)):
    ids = arrays.get('pad/ids', arrays['in/ids'])  # padded, or what would be
    inputs = _causal_inputs(ids[row][mask][None])
    np.testing.assert_array_equal(inputs[1][0], arrays['pad/position_ids'][row][mask])
    logits = small.logits(found.config, params, *inputs)
    np.testing.assert_allclose(logits[0], arrays['pad/logits'][row][mask], atol=2e-5)


def test_chatglm3_weights_in_the_layout_of_hugging_face_are_the_same_model(golden):
  arrays, found, params = golden('chatglm2')
  tensors = exported(params, 'glm', found.config)
  again, there = imported(tensors, config_json('hf_glm', golden('hf_glm')[0]))
  jax.tree.map(np.testing.assert_array_equal, there, jax.tree.map(np.asarray, params))
  inputs = _causal_inputs(arrays['in/ids'])
  logits = small.logits(again.config, there, *inputs)
  np.testing.assert_allclose(logits, golden('hf_glm')[0]['mapped/logits'], atol=2e-5)


def test_another_rope_theta(golden):
  arrays, found, params = golden('hf_glm')
  inputs = _causal_inputs(arrays['in/ids'])
  for change in ({'rope_theta': 5e6}, {'rope_ratio': 500.0}):
    config = dataclasses.replace(found.config, **change)
    logits = small.logits(config, params, *inputs)
    np.testing.assert_allclose(logits, arrays['rope500/logits'], atol=2e-5)


def _incremental(config, params, inputs, context):
  """Logits of a context read at once and of the rest token by token."""
  model, T = models.build(config), inputs[0].shape[1]
  tokens, positions, blocks, _ = inputs
  variables = {'params': params}
  read_in, logits = decode.read_context(
    model,
    variables,
    tokens[:, :context],
    jnp.array([context]),
    causal=config.causal,
    head=layers.logits,
  )
  cache = kv_cache.put(kv_cache.init(config, 1, T), read_in, jnp.array([0]))
  read = jax.jit(lambda *args: decode.read_token(model, variables, *args))
  steps = [logits[0]]
  for t in range(context, T):
    cache, logits = read(cache, tokens[:, t], positions[:, t], blocks[:, t], jnp.array([t]))
    steps.append(logits)
  return jnp.concatenate(steps)


@pytest.mark.parametrize('name', ['chatglm', 'chatglm2'])
def test_incremental_decoding_equals_the_original(golden, name):
  arrays, found, params = golden(name)
  if name == 'chatglm':
    inputs = _prefix_inputs(arrays, 'in_gmask', True)
    context = int(inputs[3].key_end[0, 0])
    np.testing.assert_array_equal(inputs[0][:1], arrays['inc/ids'])
  else:
    inputs, context = _causal_inputs(arrays['in/ids']), 6
  inputs = jax.tree.map(lambda x: x[:1], inputs)
  logits = _incremental(found.config, params, inputs, context)
  np.testing.assert_allclose(logits, arrays['inc/logits'][0], atol=2e-5)


@pytest.mark.parametrize('name', ['hf_glm', 'glm4_0414'])
def test_greedy_tokens_are_those_of_transformers(golden, name):
  arrays, found, params = golden(name)
  prompt, wanted = arrays['gen/prompt'][0].tolist(), arrays['gen/ids'][0].tolist()
  config, n = found.config, len(prompt)
  engine = Engine(
    config, {'params': params}, stops=[-1], allowed=np.ones(config.vocab_size, bool)
  )
  span = Span(first=prompt[-1], position=None, stride=1)
  request = Request(number=0, context=prompt[:-1], spans=[span])
  [answer] = engine.generate([request], most=len(wanted) - n)
  assert answer.spans == [wanted[n:]]


# Rotary positions at the released sizes.

CHATGLM_6B = ChatGLMConfig(
  num_layers=28,
  hidden_size=4096,
  num_heads=32,
  mlp_size=16384,
  vocab_size=130528,
  max_positions=2048,
  deepnorm_layers=28,
)
POSITIONS = jnp.arange(0, 8192, 97)[None]


def _table(phases):
  return np.stack([phases[0][0], phases[1][0]], axis=-1)


def test_chatglm2_phases_are_the_released_tables():
  arrays, _ = arrays_of('chatglm2')
  phases = chatglm2.rotary_phases(small.CHATGLM2_6B, POSITIONS)
  # XLA's and PyTorch's cosines differ in their last bits.
  np.testing.assert_allclose(_table(phases), arrays['rope/real_fp32'], atol=3e-7)
  # ChatGLM3 computes in float32 and rounds the table.
  rounded = _table(phases).astype(np.float16).astype(np.float32)
  np.testing.assert_allclose(rounded, arrays['rope/chatglm3_fp16'], atol=1e-3)
  assert (rounded == arrays['rope/chatglm3_fp16']).mean() > 0.999
  # ChatGLM2 in float16 computes the angles in float16, too.
  half = dataclasses.replace(small.CHATGLM2_6B, rope_phase_dtype='float16')
  table = _table(chatglm2.rotary_phases(half, POSITIONS))
  np.testing.assert_allclose(table, arrays['rope/real_fp16'], atol=1e-3)
  assert (table == arrays['rope/real_fp16']).mean() > 0.999
  assert np.abs(table - arrays['rope/real_fp32']).max() > 1


def test_chatglm_phases_in_float16_are_the_released_table():
  arrays, _ = arrays_of('chatglm')
  half = dataclasses.replace(CHATGLM_6B, rope_phase_dtype='float16')
  positions = jnp.arange(0, 2048, 16)[None]
  first, second = chatglm.rotary_phases(half, positions, positions)
  for phases in (first, second):
    # The last bit of a float16 sine: XLA rounds its float32 one.
    np.testing.assert_allclose(phases[0][0], arrays['rope_real/cos_half'], atol=1e-3)
    np.testing.assert_allclose(phases[1][0], arrays['rope_real/sin_half'], atol=1e-3)
    assert (np.asarray(phases[0][0]) == arrays['rope_real/cos_half']).mean() > 0.999
  exact, _ = chatglm.rotary_phases(CHATGLM_6B, positions, positions)
  assert np.abs(exact[0][0] - arrays['rope_real/cos_half'].astype(np.float32)).max() > 0.1


def test_positions_are_divided_where_the_checkpoint_says_so():
  stretched = dataclasses.replace(
    small.CHATGLM2_6B, rope_ratio=4.0, rope_scaling='positions'
  )
  there = chatglm2.rotary_phases(stretched, 4 * POSITIONS)
  here = chatglm2.rotary_phases(small.CHATGLM2_6B, POSITIONS)
  np.testing.assert_allclose(there[0], here[0], atol=1e-6)


# Properties.


def _tiny(kind, **changes):
  common = dict(
    num_layers=2, hidden_size=32, num_heads=4, vocab_size=96, max_positions=64, init_std=0.3
  )
  if kind == 'chatglm2':
    common |= dict(num_kv_heads=2, head_size=16, mlp_size=48)
    return ChatGLM2Config(**{**common, **changes})
  common |= dict(mlp_size=48, deepnorm_layers=2)
  if kind == 'glm_130b':
    common |= dict(gated=True, two_positions=False)
  return ChatGLMConfig(**{**common, **changes})


@pytest.mark.parametrize('kind', ['chatglm', 'glm_130b', 'chatglm2'])
def test_only_differences_of_positions_matter(kind):
  """Rotary positions are relative: shifting all of them changes nothing."""
  config = _tiny(kind)
  params, model = small.params(config), models.build(config)
  ids, t, _, visibility = _causal_inputs(np.arange(1, 13)[None])
  blocks = jnp.maximum(t - 5, 0)
  run = jax.jit(lambda t, b: model.apply({'params': params}, ids, t, b, visibility)[0])
  logits = run(t, blocks)
  np.testing.assert_allclose(run(t + 7, blocks), logits, atol=2e-4)
  assert np.abs(run(t * 2, blocks) - logits).max() > 1e-2
  changes = np.abs(run(t, blocks * 2) - logits).max()
  assert (changes > 1e-3) == config.two_positions


def test_heads_share_keys_in_groups():
  """Query heads 0 and 1 use key head 0: changing key head 1 leaves them alone."""
  config = _tiny('chatglm2', num_layers=1)
  params = small.params(config)
  ids, t, blocks, visibility = _causal_inputs(np.arange(1, 9)[None])

  def only_heads(params, heads):
    out = params['layers']['attention']['out']['weight']
    mask = np.zeros(out.shape, np.float32)
    mask[:, heads] = 1
    attention = {**params['layers']['attention'], 'out': {'weight': out * mask}}
    return {**params, 'layers': {**params['layers'], 'attention': attention}}

  v = params['layers']['attention']['v']
  changed = {
    **params,
    'layers': {
      **params['layers'],
      'attention': {
        **params['layers']['attention'],
        'v': {**v, 'weight': v['weight'].at[:, :, 1].add(1.0)},
      },
    },
  }
  for heads, same in ((slice(0, 2), True), (slice(2, 4), False)):
    a, b = (
      small.logits(config, only_heads(p, heads), ids, t, blocks, visibility)
      for p in (params, changed)
    )
    assert (np.abs(a - b).max() < 1e-6) == same


def test_the_embedding_gradient_shrinks_and_the_logits_do_not():
  inputs = _causal_inputs(np.arange(1, 9)[None])
  made = {}
  for share in (1.0, 0.1):
    config = _tiny('glm_130b', embedding_gradient=share, tied_head=False)
    params = small.params(config)
    run = lambda p, config=config: small.logits(config, p, *inputs)
    gradients = jax.jit(jax.grad(lambda p, run=run: run(p).std()))(params)
    made[share] = run(params), gradients['words']['weight'], gradients['head']['weight']
  np.testing.assert_allclose(made[1.0][0], made[0.1][0], atol=1e-5)
  np.testing.assert_allclose(0.1 * made[1.0][1], made[0.1][1], rtol=1e-3, atol=1e-7)
  np.testing.assert_allclose(made[1.0][2], made[0.1][2], rtol=1e-3, atol=1e-7)


def test_deepnorm_initialisation():
  config = _tiny('glm_130b', hidden_size=128, mlp_size=256, num_heads=4, init_std=0.02)
  layer = small.params(config)['layers']
  gain = (2 * config.deepnorm_layers) ** -0.5
  for weight, std in (
    (layer['attention']['q']['weight'], (1 / 128) ** 0.5),
    (layer['attention']['k']['weight'], (1 / 128) ** 0.5),
    (layer['attention']['v']['weight'], gain * (1 / 128) ** 0.5),
    (layer['attention']['out']['weight'], gain * (1 / 128) ** 0.5),
    (layer['mlp']['gate']['weight'], gain * (2 / 384) ** 0.5),
    (layer['mlp']['up']['weight'], gain * (2 / 384) ** 0.5),
    (layer['mlp']['down']['weight'], gain * (2 / 384) ** 0.5),
  ):
    assert float(weight.std()) == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
  'changes,match',
  [
    ({'num_kv_heads': 3}, r'num_heads must be divisible by num_kv_heads'),
    ({'rotated_size': 17}, r'rotated_size must be even'),
    ({'rope_phase_dtype': 'bfloat16'}, r'rope_phase_dtype must be one of'),
    ({'rope_scaling': 'ntk'}, r'rope_scaling must be one of'),
    ({'rope_ratio': 0.0}, r'rope_ratio must be positive'),
    ({'norm_epsilon': -1.0}, r'norm_epsilon must be positive'),
  ],
)
def test_a_wrong_chatglm2_is_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    _tiny('chatglm2', **changes)


@pytest.mark.parametrize(
  'changes,match',
  [
    ({'num_heads': 16}, r'head size must be divisible by 4'),
    ({'embedding_gradient': 0.0}, r'embedding_gradient must be in \(0, 1\]'),
    ({'deepnorm_layers': 0}, r'deepnorm_layers must be positive'),
  ],
)
def test_a_wrong_chatglm_is_refused(changes, match):
  with pytest.raises(ValueError, match=match):
    _tiny('chatglm', **changes)
