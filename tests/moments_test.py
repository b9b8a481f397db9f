"""Moments in less memory: they train as float32 does, on every mesh, and are resumed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from commands import TINY, gin, in_process, refused, snapshot
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax import models, sharding
from glm_jax.checkpoints import CheckpointConfig, Checkpoints
from glm_jax.sharding import MeshConfig
from glm_jax.training import losses, moments, state, step
from glm_jax.training.optimizer import OptimizerConfig, make_optimizer

_SMALL = dict(first_moment_dtype='bfloat16', second_moment_dtype='bfloat16')
_BARE = dict(algorithm='adafactor', beta1=0.0)


def _distance(adam):
  """Of 256 numbers from their targets, when gradients have become a thousand times less."""
  target = jnp.linspace(1, 3, 256)

  def move(carry, number):
    w, opt_state = carry
    scale = jnp.where(number < 20, 1.0, 1e-3)
    updates, opt_state = adam.update({'weight': scale * (w - target)}, opt_state)
    return (w - 0.01 * updates['weight'], opt_state), None

  begin = (jnp.zeros(256), adam.init({'weight': jnp.zeros(256)}))
  (w, _), _ = jax.lax.scan(move, begin, jnp.arange(5000))
  return float(jnp.abs(w - target).mean())


def test_at_random_a_small_moment_trains_as_float32_and_to_the_nearest_it_stalls(
  monkeypatch,
):
  adam = optax.scale_by_adam(b2=0.998)
  whole, small = _distance(adam), _distance(moments.rounded(adam))
  monkeypatch.setattr(moments, '_at_random', lambda x, key: x.astype(jnp.bfloat16))
  nearest = _distance(moments.rounded(adam))
  assert small < whole + 0.01
  assert nearest > whole + 0.5


def test_a_number_becomes_one_of_its_neighbours_and_stays_itself_on_average():
  numbers = jnp.array([1 + 2**-9, 1 + 2**-7 * 0.9, 3e-20, 1.0, 0.0])
  keys = jax.random.split(jax.random.key(1), 4000)
  drawn = jax.vmap(lambda key: moments._at_random(numbers, key))(keys).astype(jnp.float32)
  for x, values in zip(numbers, drawn.T, strict=True):
    spacing = 2.0 ** (np.floor(np.log2(x)) - 7) if x else 0
    assert np.abs(values - x).max() < spacing or (values == x).all()
    # Five standard deviations of a mean of 4,000 draws.
    assert abs(float(values.mean() - x)) <= 5 * spacing / 2 / np.sqrt(4000)
  broken = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
  kept = moments._at_random(broken, keys[0]).astype(jnp.float32)
  np.testing.assert_array_equal(kept, broken)


def test_every_mesh_draws_the_same():
  """Of the same gradients; those of another mesh differ by their own rounding."""
  adam = moments.rounded(optax.scale_by_adam(b2=0.99))
  weights = {'a': {'weight': jnp.zeros((16, 8))}, 'b': {'weight': jnp.zeros((16, 8))}}
  gradients = jax.tree.map(lambda w: jax.random.normal(jax.random.key(0), w.shape), weights)

  def run(spec):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)).mesh
    place = lambda tree: jax.device_put(tree, NamedSharding(mesh, spec))
    opt_state, update = adam.init(place(weights)), jax.jit(adam.update)
    for _ in range(3):
      _, opt_state = update(place(gradients), opt_state)
    return jax.device_get(opt_state.nu)

  whole = run(PartitionSpec())
  jax.tree.map(np.testing.assert_array_equal, whole, run(PartitionSpec('fsdp', 'tensor')))
  # Two parameters that are alike are rounded differently.
  assert (whole['a']['weight'] != whole['b']['weight']).any()


def _gradients(shapes, seed):
  key = jax.random.key(seed)
  return {
    name: jax.random.normal(jax.random.fold_in(key, i), shape) * (i + 1)
    for i, (name, shape) in enumerate(shapes.items())
  }


def _updates(tree_of, steps=3, **fields):
  """The last updates of parameters {name: shape}, spelt as `tree_of` does."""
  shapes = {'up': (6, 10), 'q': (12, 2, 4), 'out': (3, 4, 6), 'bias': (2, 4)}
  scale = moments.scale_by_factored_moment(0.9, 1e-6)
  update, opt_state, updates = jax.jit(scale.update), None, None
  for number in range(steps):
    gradients = tree_of([_gradients(shapes, 10 * number + layer) for layer in range(5)])
    opt_state = opt_state or scale.init(gradients)
    updates, opt_state = update(gradients, opt_state)
  return updates


def _named(layer):
  """{'up': ...} as {'up': {'weight': ...}}, and a bias by that name."""
  return {k: {'bias' if k == 'bias' else 'weight': v} for k, v in layer.items()}


def test_stacked_layers_are_scaled_as_those_of_a_loop():
  loop = _updates(lambda layers: {f'layer_{i}': _named(x) for i, x in enumerate(layers)})
  stack = lambda layers: {'layers': jax.tree.map(lambda *x: jnp.stack(x), *layers)}
  stacked = _updates(lambda layers: stack([*map(_named, layers)]))['layers']
  for layer in range(5):
    jax.tree.map(
      lambda a, b, i=layer: np.testing.assert_allclose(a[i], b, rtol=1e-5),
      stacked,
      loop[f'layer_{layer}'],
    )


def test_a_matrix_is_scaled_as_by_optax_and_heads_are_one_axis():
  ours = moments.scale_by_factored_moment(0.6, 1e-6)
  peer = optax.chain(
    optax.scale_by_factored_rms(
      min_dim_size_to_factor=1,
      epsilon=1e-12,
      # Bounded, as ours is: from step 4 on.
      decay_rate_fn=lambda i, exponent: jnp.minimum(1 - (i + 1.0) ** -exponent, 0.6),
    ),
    optax.clip_by_block_rms(1.0),
  )
  params = {'weight': jnp.zeros((12, 8))}
  heads = lambda tree: {'weight': tree['weight'].reshape(12, 2, 4)}
  a, b, c = ours.init(params), peer.init(params), ours.init(heads(params))
  for number in range(6):
    gradients = _gradients({'weight': (12, 8)}, number)
    of_ours, a = ours.update(gradients, a)
    of_peer, b = peer.update(gradients, b, params)
    of_heads, c = ours.update(heads(gradients), c)
    np.testing.assert_allclose(of_ours['weight'], of_peer['weight'], rtol=1e-5)
    np.testing.assert_allclose(of_heads['weight'], heads(of_ours)['weight'], rtol=1e-5)
  assert b[0].v_row['weight'].shape == (8,) and a.moments['weight']['row'].shape == (12,)


@pytest.mark.parametrize(
  'fields,least,most',
  [
    ({}, 8, 8),
    (dict(first_moment_dtype='bfloat16'), 6, 6),
    (dict(second_moment_dtype='bfloat16'), 6, 6),
    (_SMALL, 4, 4),
    (dict(algorithm='adafactor'), 4, 4.02),
    (dict(algorithm='adafactor', first_moment_dtype='bfloat16'), 2, 2.02),
    (_BARE, 0, 0.02),
  ],
)
def test_bytes_of_moments_a_parameter(fields, least, most):
  config = small.CHATGLM2_6B
  params = state.abstract_params(config)
  opt_state = jax.eval_shape(make_optimizer(OptimizerConfig(**fields), 10).init, params)
  held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(opt_state))
  # Counts of steps are a few bytes.
  assert least <= held / state.count(params) <= most + 1e-8


def test_rows_and_columns_lie_where_their_parameters_do():
  config = models.ChatGLM2Config(
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    mlp_size=96,
    vocab_size=512,
    max_positions=48,
  )
  layout = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
  optimizer = make_optimizer(OptimizerConfig(algorithm='adafactor'), 10)
  held = state.abstract_state(config, optimizer, layout)
  factors, mean = held['opt_state'][1].moments, held['opt_state'][2].ema
  assert jax.tree.map(lambda a: a.sharding, mean) == jax.tree.map(
    lambda a: a.sharding, held['params']
  )
  spec = lambda leaf: (leaf.shape, tuple(leaf.sharding.spec))
  attention = factors['layers']['attention']
  assert spec(attention['q']['weight']['row']) == ((2, 64), (None, 'fsdp'))
  assert spec(attention['q']['weight']['column']) == ((2, 4, 16), (None, 'tensor', None))
  # Two key heads for four devices: whole on each, as their weights are.
  assert spec(attention['k']['weight']['column']) == ((2, 2, 16), (None, None, None))
  assert spec(attention['out']['weight']['row']) == ((2, 64), (None, 'fsdp'))
  assert spec(factors['words']['weight']['row']) == ((512,), ('tensor',))
  assert spec(factors['words']['weight']['column']) == ((64,), ('fsdp',))
  assert spec(factors['layers']['mlp']['down']['weight']['row']) == (
    (2, 96),
    (None, 'tensor'),
  )
  assert attention['q']['bias'].shape == (2, 4, 16)


@pytest.mark.parametrize(
  'fields', [dict(algorithm='adafactor'), dict(algorithm='muon'), _SMALL]
)
def test_a_part_that_is_trained_alone_has_moments_of_its_own(config, fields):
  """Those of parameters from a checkpoint, which know no logical axes, as those planned."""
  layout = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
  optimizer = make_optimizer(OptimizerConfig(**fields), 10)
  pattern = 'layers/attention/.*|final_norm/scale'
  planned = state.abstract_state(config, optimizer, layout, pattern=pattern)
  params = jax.tree.map(
    lambda a: jax.device_put(jnp.zeros(a.shape), a.sharding), planned['params']
  )
  begun = state.begin(params, optimizer, planned)
  kinds = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), tree)
  assert kinds(begun) == kinds(planned)
  assert {*begun['params']} == {'layers', 'final_norm'}


def _trained(config, batch, fields, mesh, current=None, steps=2):
  """The state after steps of training, and its `Layout` and optimizer."""
  layout = sharding.make_mesh(mesh, jax.devices()[: np.prod([*mesh.sizes.values()])])
  optimizer = make_optimizer(OptimizerConfig(**fields, learning_rate=1e-3), 10)
  current = current or state.init_state(config, optimizer, layout, 0)
  loss = losses.pretraining_loss(models.build(config))
  train_step = jax.jit(
    step.make_train_step(loss, optimizer, microbatches=1, seed=0), donate_argnums=0
  )
  with sharding.active(layout):
    placed = sharding.place(batch._replace(index=None), layout)
    for _ in range(steps):
      current, _ = jax.block_until_ready(train_step(current, {}, placed))
  return current, layout, optimizer


@pytest.mark.parametrize(
  'fields',
  [
    dict(algorithm='adafactor'),
    dict(algorithm='muon'),
    pytest.param(_SMALL, marks=pytest.mark.slow),
  ],
)
def test_a_state_goes_on_to_the_bit_and_on_another_mesh(config, batch, tmp_path, fields):
  one, many = MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)
  half, _, _ = _trained(config, batch, fields, one)
  saved = Checkpoints(str(tmp_path), CheckpointConfig())
  saved.save(half, {}, {})
  saved.close()
  straight = jax.device_get(_trained(config, batch, fields, one, half)[0])

  def resumed(mesh):
    _, layout, optimizer = _trained(config, batch, fields, mesh, steps=0)
    abstract = state.abstract_state(config, optimizer, layout)
    again = Checkpoints(str(tmp_path), CheckpointConfig()).restore(2, abstract)
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.dtype, leaf.sharding), tree)
    assert kinds(again) == kinds(abstract)
    return jax.device_get(_trained(config, batch, fields, mesh, again)[0])

  jax.tree.map(np.testing.assert_array_equal, resumed(one), straight)
  # Where a gradient is nearly 0, its sign, and with it a step of 1e-3, is that of rounding.
  close = functools.partial(np.testing.assert_allclose, atol=1e-4)
  jax.tree.map(close, resumed(many)['params'], straight['params'])


def _train(folder, text, *bindings):
  return in_process(
    'train',
    '--gin_file=gin_configs/glm_tiny.gin',
    *gin(*TINY, 'CheckpointConfig.every=2', "OptimizerConfig.schedule='constant'"),
    *gin(f"CorpusConfig.corpus='{text}/*.txt'", f"CorpusConfig.cache_dir='{folder}/cache'"),
    *gin(*bindings),
  )


def _optimizer(**fields):
  return [f'OptimizerConfig.{name}={value!r}' for name, value in fields.items()]


@pytest.mark.slow
def test_a_run_keeps_its_optimizer(tmp_path, text):
  run = lambda steps, **fields: _train(
    tmp_path,
    text,
    f"MODEL_DIR='{tmp_path}/run'",
    f'TRAIN_STEPS={steps}',
    *_optimizer(**fields),
  )
  assert run(2, **_BARE).returncode == 0
  before = snapshot(tmp_path / 'run')
  for algorithm in ('adamw', 'adafactor'):
    refused(
      run(4, algorithm=algorithm),
      'holds a run with adafactor without a first moment, from whose checkpoints',
      f'got {algorithm}; set OptimizerConfig.algorithm (and beta1) back',
    )
  assert snapshot(tmp_path / 'run') == before
  done = run(4, **_BARE)
  assert done.returncode == 0 and 'from here on' not in done.stdout


@pytest.mark.parametrize(
  'fields,message',
  [
    (dict(algorithm='adam'), 'must be one of'),
    (dict(algorithm='adafactor', second_moment_dtype='bfloat16'), 'must be float32'),
    (dict(**_BARE, first_moment_dtype='bfloat16'), 'which Adafactor lacks at beta1=0'),
  ],
)
def test_moments_that_there_are_not_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    OptimizerConfig(**fields)
