"""Steps, meshes and checkpoints: the same numbers however they are computed."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from glm_jax import checkpoints, models, sharding
from glm_jax.checkpoints import CheckpointConfig, Checkpoints
from glm_jax.models import layers, products
from glm_jax.sharding import MeshConfig
from glm_jax.training import losses, metrics, state, step
from glm_jax.training import meter as meters
from glm_jax.training.losses import LossConfig
from glm_jax.training.optimizer import OptimizerConfig, make_optimizer

OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=2), 100)


def _devices(config):
  sizes = list(config.sizes.values())
  return jax.devices()[: int(np.prod(sizes))]


@functools.cache
def _fresh(config, optimizer):
  """On the host: the same for all meshes, as a test below says."""
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  return jax.device_get(state.init_state(config, optimizer, mesh, 0))


def _run(
  config,
  batch,
  mesh_config,
  microbatches=1,
  steps=3,
  optimizer=OPTIMIZER,
  loss_config=LossConfig(),
  compute=models.ComputeConfig(),
):
  """State and metrics after some steps on a mesh."""
  mesh = sharding.make_mesh(mesh_config, _devices(mesh_config))
  # A copy, since the step takes its state's memory.
  shardings = jax.tree.map(
    lambda leaf: leaf.sharding, state.abstract_state(config, optimizer, mesh)
  )
  current = jax.device_put(_fresh(config, optimizer), shardings)
  train_step = step.make_train_step(
    losses.pretraining_loss(models.build(config, compute), loss_config),
    optimizer,
    microbatches=microbatches,
    seed=0,
  )
  with sharding.active(mesh):
    train_step = jax.jit(train_step, donate_argnums=0)
    for _ in range(steps):
      placed = sharding.place(batch._replace(index=None), mesh)
      current, found = train_step(current, {}, placed)
      jax.block_until_ready(found)
  return current, metrics.averages(found)


@pytest.fixture(scope='session')
def reference(config, batch):
  current, found = _run(config, batch, MeshConfig(data=1))
  return jax.device_get(current['params']), found


def _largest_difference(a, b):
  return max(
    jax.tree.leaves(
      jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)
    )
  )


@pytest.mark.parametrize(
  'mesh,microbatches',
  [
    # Each axis alone is slow: the fast ones have two or three.
    pytest.param(MeshConfig(data=8), 1, marks=pytest.mark.slow),
    pytest.param(MeshConfig(data=1, fsdp=8), 1, marks=pytest.mark.slow),
    pytest.param(MeshConfig(data=1, tensor=4), 1, marks=pytest.mark.slow),
    pytest.param(MeshConfig(data=1, sequence=4), 1, marks=pytest.mark.slow),
    (MeshConfig(data=2, fsdp=2, tensor=2), 1),
    (MeshConfig(data=2, fsdp=4), 2),
    (MeshConfig(data=1, fsdp=2, sequence=2, tensor=2), 1),
    (MeshConfig(data=4, fsdp=2, rules='fsdp_data'), 1),
    pytest.param(MeshConfig(data=4, fsdp=2, rules='replicated'), 1, marks=pytest.mark.slow),
    (MeshConfig(data=2, tensor=2, overrides={'vocab': None}), 1),
  ],
)
def test_eight_devices_equal_one(config, batch, reference, mesh, microbatches):
  current, found = _run(config, batch, mesh, microbatches)
  params, wanted = reference
  assert found == pytest.approx(wanted, abs=1e-5)
  assert _largest_difference(jax.device_get(current['params']), params) <= 1e-5


_SMALL = dict(num_layers=2, hidden_size=64, num_heads=4, mlp_size=96, vocab_size=512)
_SMALL |= dict(max_positions=48)


@pytest.mark.parametrize(
  'other',
  [
    models.ChatGLMConfig(**_SMALL, deepnorm_layers=2, gated=True),
    models.ChatGLM2Config(**_SMALL, num_kv_heads=2, head_size=16),
  ],
  ids=['chatglm', 'chatglm2'],
)
def test_eight_devices_equal_one_in_every_family(other, batch):
  one, found = _run(other, batch, MeshConfig(data=1), steps=2)
  # Four devices share the heads: two of them each of the two key heads.
  many, again = _run(other, batch, MeshConfig(data=1, sequence=2, tensor=4), steps=2)
  assert again == pytest.approx(found, abs=1e-5)
  params = jax.device_get((one['params'], many['params']))
  assert _largest_difference(*params) <= 1e-5


@pytest.mark.parametrize(
  'mesh',
  [
    pytest.param(MeshConfig(data=1), marks=pytest.mark.slow),
    MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
  ],
)
def test_the_loss_in_chunks_of_the_vocabulary_equals_the_whole(
  config, batch, reference, mesh
):
  """256 or 512 pieces a device in 3 chunks, which do not divide them."""
  current, found = _run(config, batch, mesh, loss_config=LossConfig(vocab_chunks=3))
  assert found == pytest.approx(reference[1], abs=1e-5)
  assert _largest_difference(jax.device_get(current['params']), reference[0]) <= 1e-5


def test_the_loss_in_chunks_holds_no_logits():
  T, V, D = 2048, 16384, 64
  shapes = [(1, T, D), (V, D)]
  x, weight = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
  targets = jnp.zeros((1, T), jnp.int32)

  def peak(f):
    gradient = jax.jit(jax.grad(f, argnums=(0, 1)))
    return gradient.lower(x, weight).compile().memory_analysis().temp_size_in_bytes

  whole = peak(lambda x, w: losses.cross_entropy(x @ w.T, targets).sum())
  chunked = peak(lambda x, w: losses.chunked_cross_entropy(x, w, targets, 16)[0].sum())
  assert chunked <= 0.25 * 4 * T * V <= whole


def test_z_loss_is_the_square_of_the_logsumexp(config, batch):
  params = small.params(config)
  rows = batch._replace(index=None)
  model = models.build(config)
  inputs = (rows.tokens, rows.positions, rows.block_positions, rows.visibility)
  logits = small.logits(config, params, *inputs)
  square = np.square(np.asarray(jax.nn.logsumexp(logits, -1)))
  wanted = 0.01 * (square * batch.loss_weights).sum()
  both = []
  for chunks in (0, 4):
    made = losses.pretraining_loss(model, LossConfig(z_loss=0.01, vocab_chunks=chunks))
    run = jax.value_and_grad(
      lambda p, made=made: made({'params': p}, rows, None), has_aux=True
    )
    (total, found), gradients = jax.jit(run)(params)
    assert float(found['z_loss'][0]) == pytest.approx(wanted, rel=1e-5)
    assert float(total) == pytest.approx(float(found['loss'][0]) + wanted, rel=1e-5)
    both.append(gradients)
  # Of gradients up to 100: sums over 768 tokens.
  assert _largest_difference(*both) <= 1e-3


def test_label_smoothing_spreads_a_share_of_the_target(config, batch):
  """(1 - e) * ce + e * mean(-log p), in training alone, and its gradient."""
  params = small.params(config)
  rows = batch._replace(index=None)
  model = models.build(config)
  inputs = (rows.tokens, rows.positions, rows.block_positions, rows.visibility)

  def plain(params):
    log_p = jax.nn.log_softmax(small.logits(config, params, *inputs))
    chosen = jnp.take_along_axis(log_p, jnp.asarray(batch.targets)[..., None], -1)[..., 0]
    smoothed = 0.9 * -chosen + 0.1 * -log_p.mean(-1)
    return (smoothed * batch.loss_weights).sum(), -(chosen * batch.loss_weights).sum()

  (wanted, unsmoothed), gradients = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
  for chunks in (0, 4):
    made = losses.pretraining_loss(
      model, LossConfig(label_smoothing=0.1, vocab_chunks=chunks)
    )
    run = jax.value_and_grad(
      lambda p, made=made: made({'params': p}, rows, jax.random.key(0)), has_aux=True
    )
    (total, found), others = jax.jit(run)(params)
    assert float(total) == pytest.approx(float(wanted), rel=1e-6)
    assert float(found['loss'][0]) == pytest.approx(float(unsmoothed), rel=1e-6)
    assert float(found['label_smoothing'][0]) == pytest.approx(
      float(wanted - unsmoothed), rel=1e-3
    )
    assert _largest_difference(gradients, others) <= 1e-3
    # What is validated can be compared with other runs.
    total, found = jax.jit(lambda p, made=made: made({'params': p}, rows, None))(params)
    assert float(total) == pytest.approx(float(unsmoothed), rel=1e-6)
    assert 'label_smoothing' not in found


@pytest.mark.parametrize(
  'computed',
  [
    {'remat': 'full'},
    pytest.param({'remat': 'attention'}, marks=pytest.mark.slow),
    pytest.param({'remat': 'projections'}, marks=pytest.mark.slow),
    {'remat': 'attention_qkv'},
    {'unroll': 0},
  ],
  ids=lambda computed: '-'.join(map(str, *computed.items())),
)
def test_how_layers_are_computed_changes_nothing(config, batch, reference, computed):
  compute = models.ComputeConfig(**computed)
  current, found = _run(config, batch, MeshConfig(data=1), compute=compute)
  assert found == pytest.approx(reference[1], rel=1e-6)
  assert _largest_difference(current['params'], reference[0]) <= 1e-6


@pytest.mark.parametrize('unroll,loops', [(0, 0), (1, 2), (2, 2)])
def test_unrolled_layers_are_no_loop(config, batch, unroll, loops):
  """Three layers; two in a turn leave one behind the loop. Forward and backward."""
  deep, compute = (
    dataclasses.replace(config, num_layers=3),
    models.ComputeConfig(unroll=unroll),
  )
  loss = losses.pretraining_loss(models.build(deep, compute))
  lowered = jax.jit(jax.grad(loss, has_aux=True)).lower(
    {'params': state.abstract_params(deep)}, batch._replace(index=None), None
  )
  assert lowered.as_text().count('stablehlo.while') == loops


def test_products_with_the_head_multiply_the_computations_dtype(batch):
  """Else two of the three are float32 products, at a quarter of a GPU's speed."""
  config = models.ChatGLM2Config(**_SMALL, num_kv_heads=2, head_size=16)
  compute = models.ComputeConfig(dtype='bfloat16')
  loss = losses.pretraining_loss(models.build(config, compute))
  lowered = jax.jit(jax.grad(loss, has_aux=True)).lower(
    {'params': state.abstract_params(config)}, batch._replace(index=None), None
  )
  products = re.findall(r'dot_general .*: \((.*)\) -> (.*)', lowered.as_text())
  of_head = [line for line in products if re.search(r'[<x]512x', ' '.join(line))]
  assert len(of_head) == 3
  assert not any('f32' in operands.replace('bf16', '') for operands, _ in of_head)


def test_a_smaller_first_moment_is_close(config, batch, reference):
  small = make_optimizer(
    OptimizerConfig(learning_rate=1e-3, warmup_steps=2, first_moment_dtype='bfloat16'), 100
  )
  current, found = _run(config, batch, MeshConfig(data=1), optimizer=small)
  assert found['loss'] == pytest.approx(reference[1]['loss'], abs=1e-3)
  # Three steps of at most 1e-3 each; bfloat16 keeps 8 bits of the moment, and their sign
  # and size follow it.
  assert 0 < _largest_difference(current['params'], reference[0]) <= 1e-4
  kinds = {leaf.dtype for leaf in jax.tree.leaves(current['opt_state'])}
  assert {jnp.dtype('bfloat16'), jnp.dtype('float32')} <= kinds


def test_balanced_rows_and_back():
  """Device i of n holds chunks i and 2 n - 1 - i; gathered keys are in order again."""
  mesh = sharding.make_mesh(MeshConfig(data=2, sequence=4))
  x = jnp.arange(2 * 32).reshape(2, 32)
  with sharding.active(mesh):
    spread = jax.jit(sharding.spread)(x)
    back = jax.jit(sharding.unspread)(spread)
    whole = jax.jit(
      sharding.per_device(
        lambda x: sharding.gather_length(x, spread=True),
        (('act_batch', 'act_length'),),
        ('act_batch', None),
        kernels=True,
      )
    )(spread)
  chunks = [0, 7, 1, 6, 2, 5, 3, 4]
  np.testing.assert_array_equal(spread, x.reshape(2, 8, 4)[:, chunks].reshape(2, 32))
  np.testing.assert_array_equal(back, x)
  np.testing.assert_array_equal(whole, x)


@pytest.mark.parametrize(
  'parts', [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 16))]
)
def test_micro_batches_with_ragged_weights_equal_one_batch(config, batch, reference, parts):
  weights = batch.loss_weights.reshape(parts, -1).sum(1)
  assert np.ptp(weights) > 0
  current, found = _run(config, batch, MeshConfig(data=1), parts)
  # A loss of 6 has float32 steps of 5e-7.
  assert found == pytest.approx(reference[1], rel=1e-6)
  assert _largest_difference(current['params'], reference[0]) <= 1e-6


def test_the_loss_is_the_weighted_mean_over_the_batch(config, batch):
  params = small.params(config)
  inputs = (batch.tokens, batch.positions, batch.block_positions, batch.visibility)
  logits = small.logits(config, params, *inputs)
  log_probs = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))
  ce = -np.take_along_axis(log_probs, batch.targets[..., None], -1)[..., 0]
  loss_fn = jax.jit(losses.pretraining_loss(models.build(config)))
  _, found = loss_fn({'params': params}, batch._replace(index=None), None)
  found = metrics.averages(found)
  w = batch.loss_weights
  assert found['loss'] == pytest.approx((ce * w).sum() / w.sum(), rel=1e-5)
  for number, name in enumerate(('blank', 'document', 'sentence')):
    chosen = w * (batch.objective == number)
    assert found[f'loss/{name}'] == pytest.approx(
      (ce * chosen).sum() / chosen.sum(), rel=1e-5
    )


@pytest.mark.parametrize(
  'mesh',
  [
    MeshConfig(data=4, fsdp=2),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=1, tensor=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
  ],
)
def test_state_is_born_sharded(mesh):
  """Bytes of parameters and optimizer on each device."""
  config = models.GLMConfig(
    num_layers=2, hidden_size=128, num_heads=4, vocab_size=1024, max_positions=32
  )
  built = sharding.make_mesh(mesh, _devices(mesh))
  current = state.init_state(config, OPTIMIZER, built, 0)
  for tree in (current['params'], current['opt_state']):
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
    total = sum(leaf.nbytes for leaf in leaves)
    for device in built.devices.flat:
      here = sum(
        shard.data.nbytes
        for leaf in leaves
        for shard in leaf.addressable_shards
        if shard.device == device
      )
      assert here <= total / (mesh.fsdp * mesh.tensor) * 1.1


def test_initial_parameters_do_not_depend_on_the_mesh(config):
  one, many = (
    state.init_state(config, OPTIMIZER, sharding.make_mesh(mesh, _devices(mesh)), 0)
    for mesh in (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2))
  )
  assert _largest_difference(one['params'], many['params']) == 0
  other = state.init_state(
    config, OPTIMIZER, sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1]), 1
  )
  assert _largest_difference(one['params'], other['params']) > 0.01


def test_dropout_differs_by_step_and_repeats_by_seed(config, batch):
  config = dataclasses.replace(
    config, output_dropout=0.3, embedding_dropout=0.3, attention_dropout=0.3
  )
  train_step = jax.jit(
    step.make_train_step(
      losses.pretraining_loss(models.build(config)), OPTIMIZER, microbatches=2, seed=0
    )
  )
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  fresh = state.init_state(config, OPTIMIZER, mesh, 0)
  rows = batch._replace(index=None)

  def first_loss(start):
    return metrics.averages(train_step(start, {}, rows)[1])['loss']

  at_step = [first_loss({**fresh, 'step': jnp.int32(number)}) for number in (0, 1, 2, 0)]
  assert at_step[0] == at_step[3] and len({*at_step}) == 3
  # Two equal micro-batches get masks of their own, from the key of the step.
  half = jax.tree.map(lambda x: np.repeat(x[:8], 2, axis=0), rows)
  loss_fn = jax.jit(losses.pretraining_loss(models.build(config)))
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 0)
  first_rows = jax.tree.map(lambda x: x[:8], rows)
  parts = [
    float(loss_fn({'params': fresh['params']}, first_rows, part)[0])
    for part in (jax.random.fold_in(key, 0), jax.random.fold_in(key, 1))
  ]
  total = train_step(fresh, {}, half)[1]['loss'][0]
  assert abs(parts[0] - parts[1]) > 1e-2
  assert float(total) == pytest.approx(sum(parts), rel=1e-5)


def test_gradients_in_bfloat16_are_those_of_float32(config, batch):
  """Of every parameter, also summed over micro-batches."""
  sgd = optax.sgd(1.0)
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  fresh = state.init_state(config, sgd, mesh, 0)
  found = {}
  for dtype in ('float32', 'bfloat16'):
    model = models.build(config, models.ComputeConfig(dtype=dtype))
    train_step = step.make_train_step(
      losses.pretraining_loss(model), sgd, microbatches=4, seed=0, dtype=dtype
    )
    stepped, _ = jax.jit(train_step)(fresh, {}, batch._replace(index=None))
    found[dtype] = jax.tree.map(lambda a, b: a - b, fresh['params'], stepped['params'])
  assert jax.tree.leaves(found['bfloat16'])[0].dtype == jnp.float32
  for path, right in jax.tree_util.tree_leaves_with_path(found['float32']):
    near = found['bfloat16']
    for key in path:
      near = near[key.key]
    # bfloat16 rounds each activation by 2^-9 of its size, in a chain of layers; a key's
    # bias has no gradient but for rounding.
    assert jnp.linalg.norm(near - right) <= 0.03 * jnp.linalg.norm(right) + 1e-6, path


@pytest.mark.parametrize(
  'equation,shape',
  [('BTD,DNH->BTNH', (6, 4, 3)), ('BTNH,NHD->BTD', (4, 3, 6)), ('BTD,VD->BTV', (9, 6))],
)
def test_on_one_device_a_product_is_one_of_matrices(equation, shape):
  """Nothing is transposed, and it is what einsum computes."""
  tokens, _, _ = products.letters_of(equation)
  sizes = dict(B=2, T=5, D=6, N=4, H=3)
  random = np.random.default_rng(0).normal
  x = jnp.asarray(random(size=[sizes[letter] for letter in tokens]), jnp.float32)
  weight = jnp.asarray(random(size=shape), jnp.float32)
  axes = ('heads',) * len(shape)
  ours = lambda x, w: products.einsum(equation, x, [products.Factor(w, axes)])[0]
  np.testing.assert_allclose(
    ours(x, weight), jnp.einsum(equation, x, weight), rtol=1e-5, atol=1e-5
  )
  text = str(jax.make_jaxpr(ours)(x, weight))
  assert text.count('dot_general') == 1 and 'transpose' not in text


def test_sums_over_many_tokens_do_not_saturate():
  """In bfloat16, 256 + 1 is 256: a frequent piece, and a bias, are in every token."""
  T = 4096
  table = layers.Table(8, 4, 'vocab', 1.0, jnp.bfloat16)
  dense = products.Einsum('BTD,DF->BTF', (4, 4), ('embed', 'mlp'), 1, 1.0, jnp.bfloat16)
  for module, x in [
    (table, jnp.zeros((1, T), jnp.int32)),
    (dense, jnp.ones((1, T, 4), jnp.bfloat16)),
  ]:
    params = nn.unbox(module.init(jax.random.key(0), x)['params'])
    params = {**params, 'weight': params['weight'].astype(jnp.bfloat16)}
    gradient = jax.grad(lambda p, m=module, x=x: m.apply({'params': p}, x).sum())(params)
    if 'bias' in params:
      np.testing.assert_array_equal(gradient['bias'], np.full(4, T))
    else:
      np.testing.assert_array_equal(gradient['weight'][0], np.full(4, T))


@pytest.mark.parametrize('attention,square', [('chunked', False), ('dense', True)])
def test_the_step_with_chunked_attention_holds_no_square_array(config, attention, square):
  T = 4096
  config = dataclasses.replace(config, max_positions=T, num_layers=1)
  model = models.build(config, models.ComputeConfig(attention=attention))
  ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
  rows = _batch_of(ids)
  train_step = step.make_train_step(
    losses.pretraining_loss(model), OPTIMIZER, microbatches=1, seed=0
  )
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  abstract = state.abstract_state(config, OPTIMIZER, mesh)
  with sharding.active(mesh):
    text = jax.jit(train_step).lower(abstract, {}, rows).compile().as_text()
  assert (f'{T},{T}' in text) == square


def _batch_of(ids):
  from glm_jax.batch import Batch

  weights = jax.ShapeDtypeStruct(ids.shape, jnp.float32)
  return Batch(ids, ids, weights, ids, ids, ids, ids, ids)


def test_a_checkpoint_is_read_on_any_mesh(config, batch, tmp_path):
  current, _ = _run(config, batch, MeshConfig(data=2, fsdp=2, tensor=2), steps=2)
  wanted = jax.device_get(current)
  written = Checkpoints(str(tmp_path), CheckpointConfig())
  written.save(current, {'note': 'x'}, {'loss': 1.0})
  written.close()
  assert checkpoints.latest_step(str(tmp_path)) == 2
  for mesh_config in (
    MeshConfig(data=1),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=4, tensor=2),
  ):
    mesh = sharding.make_mesh(mesh_config, _devices(mesh_config))
    reader = Checkpoints(str(tmp_path), CheckpointConfig())
    found = reader.restore(2, state.abstract_state(config, OPTIMIZER, mesh))
    reader.close()
    assert _largest_difference(jax.device_get(found), wanted) == 0
    assert jax.tree.structure(found) == jax.tree.structure(current)
    assert {x.sharding.mesh.size for x in jax.tree.leaves(found)} == {mesh.size}


@pytest.mark.parametrize(
  'config,message',
  [
    (MeshConfig(data=3), 'must multiply to the 8 devices'),
    (MeshConfig(data=-1, fsdp=3), 'must multiply to the 8 devices'),
  ],
)
def test_meshes_that_do_not_fit_are_refused(config, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(config)


def test_models_and_batches_that_do_not_divide_are_refused(config):
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
  sharding.check_fits(config, 8, 4, 48, mesh)
  with pytest.raises(ValueError, match='BATCH_SIZE must divide'):
    sharding.check_fits(config, 9, 1, 48, mesh)
  with pytest.raises(ValueError, match='num_heads must divide'):
    sharding.check_fits(dataclasses.replace(config, num_heads=2), 8, 1, 48, mesh)
  long = sharding.make_mesh(MeshConfig(data=1, sequence=8))
  with pytest.raises(ValueError, match='divide by twice the mesh axis sequence'):
    sharding.check_fits(config, 8, 1, 40, long)
  few = models.ChatGLM2Config(**_SMALL, num_kv_heads=2, head_size=16)
  sharding.check_fits(few, 8, 1, 48, mesh)
  three = dataclasses.replace(few, num_heads=12, num_kv_heads=3)
  with pytest.raises(ValueError, match='num_kv_heads must divide'):
    sharding.check_fits(three, 8, 1, 48, mesh)
  for bad in (
    dict(data=0),
    dict(data=-1, fsdp=-1),
    dict(tensor=2.0),
    dict(rules='zero'),
    dict(overrides={'width': 'fsdp'}),
    dict(overrides={'embed': 'pipeline'}),
    dict(overrides={'vocab': 'fsdp'}),
    dict(overrides={'embed': 'tensor'}),
    dict(overrides={'embed': ('fsdp', 'tensor')}),
    dict(overrides={'vocab': 'fsdp', 'embed': None}),
    dict(overrides={'act_length': 'tensor'}),
    dict(overrides={'act_length': 'fsdp'}),
  ):
    with pytest.raises(ValueError, match='MeshConfig'):
      MeshConfig(**bad)


class _Result:
  def __init__(self, ready):
    self.is_ready = lambda: ready


def test_waiting_for_data_is_a_share_of_the_time_that_steps_took(monkeypatch):
  clock = [0.0]
  monkeypatch.setattr(meters.time, 'perf_counter', lambda: clock[0])

  def stream(asked):
    assert asked == 'state'
    clock[0] += 0.25  # the pipeline is late
    return 'batch'

  meter = meters.Meter(0, 10)
  for _ in range(4):
    assert meter.wait_for(stream, 'state') == 'batch'
    meter.count(100, 0)
    clock[0] += 0.75  # the step
  for ready in (True, False):  # while a step is being computed, nobody waits
    running = [{'loss': _Result(True)}, {'loss': _Result(ready)}]
    meter.wait_for(stream, 'state', running)
    meter.count(100, 0)
    clock[0] += 0.75
  meter.stop()
  clock[0] += 50  # validation does not count
  meter.restart()
  found = meter.report(4)
  assert found['input_stall'] == pytest.approx(0.25 * 5 / 6)
  assert found['tokens_per_second'] == pytest.approx(100)
  clock[0] += 1.0
  assert meter.report(5)['input_stall'] == 0
