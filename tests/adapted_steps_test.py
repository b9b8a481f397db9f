"""Steps of adapters: the same on every mesh, however they are cut, and of what base."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import variants
from flax import traverse_util

from glm_jax import bindings, models, sharding
from glm_jax.checkpoints import variables
from glm_jax.models import low_rank, quantized
from glm_jax.planning import prediction
from glm_jax.recipes import CONFIGURABLES
from glm_jax.recipes.pretraining import Pretraining
from glm_jax.sharding import MeshConfig
from glm_jax.training import adapters, optimizer, program, state, step
from glm_jax.training.adapters import LoRAConfig, PTuningConfig
from glm_jax.training.config import TrainConfig
from glm_jax.training.losses import LossConfig
from glm_jax.training.optimizer import OptimizerConfig

KINDS = {
  'lora': LoRAConfig(rank=4, dropout=0.2),
  'two': LoRAConfig(rank=4, targets='layers/attention/(q|v)/weight', rank_stabilized=True),
  'ptuning': PTuningConfig(tokens=8),
  'projection': PTuningConfig(tokens=8, projection=True),
}


def _run(model, kind, chunks=0, **changes):
  recipe = Pretraining(
    task='glm_mixture',
    feature_lengths={'tokens': 48},
    loss_config=LossConfig(vocab_chunks=chunks),
  )
  fields = dict(model=model, recipe=recipe, batch_size=16, train_steps=10, model_dir='x')
  constant = OptimizerConfig(learning_rate=1e-3, schedule='constant')
  fields |= dict(init_from='x', adapters=KINDS[kind], optimizer=constant)
  return TrainConfig(**{**fields, 'mesh': MeshConfig(data=1), **changes})


def _base(model, bits):
  """Leaves of a checkpoint, and what they are as plain weights."""
  params = small.params(model)
  if not bits:
    return params, params
  made = quantized.of_tree(params, bits)
  flat, plain = (dict(traverse_util.flatten_dict(made['params'])) for _ in range(2))
  for path, scales in traverse_util.flatten_dict(made['scales']).items():
    flat[quantized.scale_of(path)] = scales
    pairs = zip(flat[path], scales, strict=True)
    inputs = quantized.inputs_of(path)
    plain[path] = np.stack([quantized.dequantize(*pair, inputs) for pair in pairs])
  return traverse_util.unflatten_dict(flat), traverse_util.unflatten_dict(plain)


def _begun(run, bits=0, plain=False):
  """Its program, layout, state and what is frozen; b is not 0, so that a has a gradient."""
  devices = jax.devices()[: int(np.prod([*run.mesh.sizes.values()]))]
  layout = sharding.make_mesh(run.mesh, devices)
  built = program.build(run, layout, variables.of_channels(0 if plain else bits))
  base = _base(run.model, bits)[plain]
  frozen = jax.tree.map(
    lambda a, x: jax.device_put(np.asarray(x), a.sharding), built.frozen, base
  )
  params = state.init_leaves(program.all_leaves(run), built.state['params'], run.seed)
  flat = traverse_util.flatten_dict(params)
  rng = np.random.default_rng(3)
  for path, leaf in flat.items():
    if path[-1] == 'b':
      noise = rng.normal(0, 0.05, leaf.shape).astype(np.float32)
      flat[path] = jax.device_put(noise, leaf.sharding)
  params = traverse_util.unflatten_dict(flat)
  return built, layout, state.begin(params, built.optimizer, built.state), frozen


def _steps(run, batch, **base):
  """What is trained after three steps, their losses, and what is frozen."""
  built, layout, current, frozen = _begun(run, **base)
  found = []
  with sharding.active(layout):
    for _ in range(3):
      rows = sharding.place(batch._replace(index=None), layout)
      current, metrics = built.train_step(current, frozen, rows)
      found.append(metrics['loss'][0] / metrics['loss'][1])
  return jax.device_get((current['params'], found)), frozen


@pytest.fixture(scope='module')
def reference(config, batch):
  """_steps of each kind on one device, once."""
  known = {}

  def steps(kind, bits=0):
    if (kind, bits) not in known:
      known[kind, bits] = _steps(_run(config, kind), batch, bits=bits)[0]
    return known[kind, bits]

  return steps


EIGHT = MeshConfig(data=2, fsdp=2, tensor=2)
REMAT = models.ComputeConfig(remat='full')


_SLOW = [
  ('lora', 0, {'mesh': EIGHT}),
  ('lora', 0, {'compute': REMAT}),
  ('two', 0, {'compute': REMAT, 'microbatches': 2, 'chunks': 4}),
  ('two', 4, {'compute': REMAT, 'microbatches': 2}),
  ('ptuning', 0, {'mesh': EIGHT}),
  ('projection', 8, {'mesh': EIGHT}),
]


@pytest.mark.parametrize(
  ('kind', 'bits', 'changes'),
  [
    ('lora', 4, {'mesh': EIGHT, 'chunks': 4}),
    ('projection', 0, {'compute': REMAT, 'microbatches': 2, 'chunks': 4}),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in _SLOW),
  ],
)
def test_meshes_remat_parts_and_chunks_change_nothing(
  config, batch, reference, kind, bits, changes
):
  again, frozen = _steps(_run(config, kind, **changes), batch, bits=bits)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
  jax.tree.map(close, again, reference(kind, bits))
  # Not a bit of the base has changed, integers and scales among it.
  jax.tree.map(np.testing.assert_array_equal, frozen, _base(config, bits)[0])


def test_integers_train_adapters_as_their_dequantised_weights_do(config, batch, reference):
  plain, _ = _steps(_run(config, 'two'), batch, bits=4, plain=True)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
  jax.tree.map(close, plain, reference('two', 4))
  differs = np.abs(np.subtract(plain[1], reference('two')[1]))
  assert differs.max() > 1e-4
  # Nor are they copied as floats, which would compute the same in eight times the memory.
  base, _ = _base(config, 4)
  cast = traverse_util.flatten_dict(step.cast(base, 'bfloat16'))
  kinds = {leaf.dtype for path, leaf in cast.items() if quantized.inputs_of(path)}
  assert kinds == {quantized.DTYPES[4]} and cast['words', 'weight'].dtype == jnp.bfloat16


def test_adapters_inherit_the_sharding_of_their_weights(config):
  _, _, current, _ = _begun(_run(config, 'lora', mesh=EIGHT))
  q = current['params']['adapters']['layers']['attention']['q']
  down = current['params']['adapters']['layers']['mlp']['down']
  spec = lambda x: (*x.sharding.spec, *[None] * x.ndim)[: x.ndim]
  assert spec(q['a']) == (None, 'fsdp', None) and spec(q['b'])[2] == 'tensor'
  assert spec(down['a'])[1] == 'tensor' and spec(down['b']) == (None, None, 'fsdp')
  shardings = lambda tree: {x.sharding for x in jax.tree.leaves(tree) if x.ndim > 2}
  assert shardings(current['opt_state']) == shardings(current['params'])
  assert {*current['params']} == {'adapters'}


@pytest.mark.parametrize('family', variants.FAMILIES)
def test_a_run_begins_as_the_model_it_adapts(family):
  """b is 0; a is within 1 / sqrt(inputs), evenly."""
  model = variants.FAMILIES[family]
  leaves = adapters.leaves(KINDS['lora'], model)
  layout = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  abstract = state.abstract_params(model, layout, leaves)
  made = state.init_leaves(leaves, abstract, 0)['adapters']
  draws = set()
  for path, leaf in traverse_util.flatten_dict(made).items():
    if path[-1] == 'b':
      assert not leaf.any()
      continue
    bound = 1 / np.sqrt(np.prod(leaf.shape[1:-1]))
    assert np.abs(leaf).max() <= bound and leaf.std() > 0.5 * bound, path
    draws.add(round(float(leaf.ravel()[0] / bound), 6))
  assert len(draws) == len({*made['layers']['attention'], *made['layers']['mlp']})


@pytest.mark.parametrize(
  ('changes', 'scaling'),
  [({}, 4.0), ({'rank_stabilized': True}, 8.0), ({'alpha': 4.0}, 1.0)],
)
def test_scaling_is_alpha_over_rank_or_over_its_root(changes, scaling):
  config = LoRAConfig(**{'rank': 4, 'alpha': 16.0, **changes})
  assert config.scaling == scaling
  params = {'adapters': {'layers': {'mlp': {'up': {'a': np.ones(3), 'b': np.ones(3)}}}}}
  found = adapters.variables(config, None, params)['adapters']['layers']['mlp']['up']
  assert found['a'].tolist() == [1, 1, 1] and found['b'].tolist() == [scaling] * 3


def test_merged_weights_compute_what_adapters_do():
  model = variants.FAMILIES['chatglm2']
  factors, merged = variants.adapters(model)
  flat = traverse_util.flatten_dict(small.params(model))
  for path in [path for path in flat if quantized.inputs_of(path)]:
    a, b = (traverse_util.flatten_dict(factors)[*path[:-1], name] for name in 'ab')
    for layer, expected in enumerate(traverse_util.flatten_dict(merged)[path]):
      found = low_rank.merged(np.asarray(flat[path][layer]), a[layer], b[layer] / 3, 3.0)
      np.testing.assert_allclose(found, expected, atol=1e-6)


def test_each_layer_and_module_has_its_own_dropout(config, batch, monkeypatch):
  keys, rates = [], []
  draw = jax.random.bernoulli

  def spied(key, p, shape):
    note = lambda key, p: (keys.append(tuple(key.tolist())), rates.append(1 - float(p)))
    jax.debug.callback(note, jax.random.key_data(key), p)
    return draw(key, p, shape)

  monkeypatch.setattr(jax.random, 'bernoulli', spied)
  factors, _ = variants.adapters(config)
  params = {**small.params(config), 'adapters': factors}
  tree = adapters.variables(KINDS['lora'], config, params)
  inputs = (batch.tokens, batch.positions, batch.block_positions, batch.visibility)
  apply = jax.jit(models.build(config).apply, static_argnames='deterministic')
  run = lambda key: apply(tree, *inputs, deterministic=False, rngs={'dropout': key})[0]
  first = run(jax.random.key(0))
  jax.effects_barrier()
  # Six products in each of two layers.
  assert len(keys) == len({*keys}) == 12 and np.allclose(rates, 0.2)
  assert np.abs(first - run(jax.random.key(1))).max() > 1e-3
  # Nothing is dropped without a key, and on average nothing is lost.
  keys.clear()
  plain = apply(tree, *inputs)[0]
  jax.effects_barrier()
  assert not keys
  means = np.mean([run(jax.random.key(i)) for i in range(2, 34)], 0)
  assert np.abs(means - plain).mean() < 0.5 * np.abs(first - plain).mean()


def test_weight_decay_spares_adapters(config):
  run = _run(config, 'lora', trained='words/weight')
  built, _, current, frozen = _begun_beside(run)
  decayed = optimizer.decays(current['params'])
  flat = traverse_util.flatten_dict(decayed)
  assert {path[0] for path, decays in flat.items() if decays} == {'words'}
  assert {path[0] for path in flat} == {'adapters', 'words'}
  assert ('words', 'weight') not in traverse_util.flatten_dict(frozen)
  # With gradients of 0, decay is all that moves.
  zeros = jax.tree.map(jnp.zeros_like, current['params'])
  updates, _ = built.optimizer.update(zeros, current['opt_state'], current['params'])
  moved = {p for p, x in traverse_util.flatten_dict(updates).items() if np.any(x)}
  assert moved == {('words', 'weight')}


def _begun_beside(run):
  layout = sharding.make_mesh(run.mesh, jax.devices()[:1])
  built = program.build(run, layout)
  params = state.init_leaves(
    adapters.leaves(run.adapters, run.model), built.state['params'], 0
  )
  params |= {'words': small.params(run.model)['words']}
  return built, layout, state.begin(params, built.optimizer, built.state), built.frozen


@pytest.mark.parametrize('bits', [0, 4])
def test_a_plan_counts_what_is_trained_and_no_gradient_of_the_rest(config, bits):
  layout = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  stored = prediction.Frozen('bfloat16', variables.of_channels(bits))
  plan = lambda run: prediction.from_shapes(run, layout, stored=stored)
  whole = dataclasses.replace(_run(config, 'two'), adapters=None, init_from='')
  full = prediction.from_shapes(whole, layout)
  part = plan(_run(config, 'two'))
  # Of q and v in two layers, 64 x 64 each: rank 4 on either side.
  own = 2 * 2 * 4 * (64 + 64)
  assert part.trained == own and part.parameters == full.parameters + own
  # Every product of the layers and the head lacks a gradient: 2 FLOPs a token and weight.
  frozen = 2 * (4 * 64 * 64 + 2 * 64 * 256) + 512 * 64
  assert full.model_flops - part.model_flops == (2 * frozen - 6 * own) * part.tokens
  m = part.memory
  assert m['parameters'] == 4 * own == m['gradients'] and m['optimizer'] < 9 * own
  products = 2 * (4 * 64 * 64 + 2 * 64 * 256)
  expected = 2 * full.parameters
  if bits:  # half a byte in place of two, and scales of the outputs
    expected += products // 2 - 2 * products + 2 * 4 * (4 * 64 + 256 + 64)
  assert m['frozen'] == expected
  # Virtual tokens are seen by every token.
  tokens = plan(_run(config, 'ptuning'))
  layers = 12 * config.num_layers * 64
  shorter = full.model_flops - 2 * frozen * full.tokens
  assert tokens.model_flops - shorter == layers * 8 * full.tokens


@pytest.mark.parametrize('name', ['lora', 'qlora', 'ptuning'])
def test_gin_files_stand_on_top_of_a_run(name):
  files = [f'gin_configs/runs/{part}.gin' for part in ('continue', name)]
  load = lambda files: bindings.load_config(
    TrainConfig, CONFIGURABLES, files, '', (), placeholders=True
  )[0]
  alone, run = load(files[:1]), load(files)
  assert alone.adapters is None and run.in_part and run.pattern is None
  assert type(run.adapters) is (PTuningConfig if name == 'ptuning' else LoRAConfig)
  assert run.optimizer.learning_rate > alone.optimizer.learning_rate
  if name == 'qlora':
    lora = load([files[0], 'gin_configs/runs/lora.gin'])
    assert run.adapters.scaling == lora.adapters.scaling
