"""Every array is spread over all the mesh axes that the rules say, on every mesh."""

import dataclasses
import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from glm_jax import models, sharding
from glm_jax.attention import api
from glm_jax.batch import Batch
from glm_jax.models import ChatGLM2Config, ChatGLMConfig, GLMConfig, layers
from glm_jax.models.products import Factor
from glm_jax.sharding import MeshConfig
from glm_jax.training import losses, state

SIZES = dict(
  num_layers=2, hidden_size=64, num_heads=16, mlp_size=128, vocab_size=256, max_positions=31
)
MODELS = {
  'glm': GLMConfig(**SIZES),
  'chatglm': ChatGLMConfig(**SIZES, gated=True, deepnorm_layers=2, tied_head=False),
  'chatglm2': ChatGLM2Config(**SIZES, num_kv_heads=2, head_size=4),
  'many': ChatGLM2Config(**SIZES, num_kv_heads=8, head_size=4, tied_head=True),
}
# What each dimension of a parameter is, by the end of its name; layers come first.
_HEADS = {'q': 'heads', 'k': 'kv_heads', 'v': 'kv_heads'}
_NAMES = {
  **{f'attention.{k}.weight': ('embed', v, '') for k, v in _HEADS.items()},
  **{f'attention.{k}.bias': (v, '') for k, v in _HEADS.items()},
  'attention.out.weight': ('heads', '', 'embed'),
  'attention.out.bias': ('embed',),
  'mlp.gate.weight': ('embed', 'mlp'),
  'mlp.gate.bias': ('mlp',),
  'mlp.up.weight': ('embed', 'mlp'),
  'mlp.up.bias': ('mlp',),
  'mlp.down.weight': ('mlp', 'embed'),
  'mlp.down.bias': ('embed',),
  'words.weight': ('vocab', 'embed'),
  'head.weight': ('vocab', 'embed'),
  'positions.weight': ('', 'embed'),
  'block_positions.weight': ('', 'embed'),
  'scale': ('',),
  'norm.bias': ('',),
}
# Mesh axes of what is spread at all: of weights, then of activations.
_TENSOR = dict.fromkeys(
  ('heads', 'kv_heads', 'mlp', 'vocab', 'act_heads', 'act_mlp'), ('tensor',)
)
_BASE = {**_TENSOR, 'act_batch': ('data', 'fsdp'), 'act_length': ('sequence',)}
TABLES = {
  'fsdp': {**_BASE, 'embed': ('fsdp',)},
  'replicated': {**_BASE, 'embed': ()},
  'fsdp_data': {**_BASE, 'embed': ('fsdp', 'data')},
}
OVERRIDES = {
  'vocabulary': {'vocab': None},
  'mlp': {'mlp': None, 'act_mlp': None},
  'rows': {'act_batch': 'data'},
  'wide': {'embed': ('data', 'fsdp', 'sequence')},
  'two': {'mlp': ('tensor', 'sequence'), 'act_mlp': 'tensor', 'act_length': None},
}
MESHES = [
  dict(data=8),
  dict(data=2, fsdp=4),
  dict(data=2, fsdp=2, tensor=2),
  dict(data=1, fsdp=2, sequence=2, tensor=2),
  dict(data=2, sequence=2, tensor=2),
  dict(data=1, tensor=8),
]
CASES = [(mesh, rules, '') for mesh in MESHES for rules in TABLES]
CASES += [(mesh, 'fsdp', name) for mesh in MESHES[1:4] for name in OVERRIDES]


def _layout(mesh, rules, override):
  changed = OVERRIDES.get(override, {})
  return sharding.make_mesh(MeshConfig(**mesh, rules=rules, overrides=changed))


def _table(rules, override):
  as_tuple = lambda x: () if x is None else (x,) if isinstance(x, str) else x
  changed = {k: as_tuple(v) for k, v in OVERRIDES.get(override, {}).items()}
  return {**TABLES[rules], **changed}


def _parts(mesh, table, logical):
  """Parts that a dimension is cut into."""
  return math.prod(mesh.get(axis, 1) for axis in table.get(logical, ()))


@functools.cache
def _boxed(name):
  config = MODELS[name]
  return jax.eval_shape(lambda: state.init_params(config, jax.random.key(0)))


def _logical(path):
  names = [key.key for key in path]
  name = '.'.join(names)
  found = next(axes for end, axes in _NAMES.items() if name.endswith(end))
  return ('', *found) if names[0] == 'layers' else found


@pytest.mark.parametrize('name', MODELS)
def test_each_parameter_is_cut_along_every_axis_of_its_rule(name):
  boxed = _boxed(name)
  specs, plain = nn.get_partition_spec(boxed), nn.unbox(boxed)
  for mesh, rules, override in CASES:
    table, layout = _table(rules, override), _layout(mesh, rules, override)
    placed = sharding.shardings(specs, plain, layout)
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain):
      shard = functools.reduce(lambda node, key: node[key.key], path, placed)
      wanted = []
      for size, logical in zip(leaf.shape, _logical(path), strict=True):
        parts = _parts(mesh, table, logical)
        # Too few key heads for their devices are whole on each.
        whole = logical == 'kv_heads' and size % parts
        wanted.append(size if whole else size // parts)
      assert shard.shard_shape(leaf.shape) == tuple(wanted), (path, mesh, rules, override)


@pytest.mark.parametrize('mesh,rules,override', CASES)
def test_parts_of_an_axis_are_counted_over_all_of_its_mesh_axes(mesh, rules, override):
  table, layout = _table(rules, override), _layout(mesh, rules, override)
  assert {*dict(layout.rules)} >= {*table}
  for logical in dict(layout.rules):
    parts = _parts(mesh, table, logical)
    assert layout.count(logical) == parts
    assert layout.words(logical) == ' x '.join(table.get(logical, ()))
    with sharding.active(layout):
      assert sharding.axes_of(logical) == table.get(logical, ())
      assert sharding.axis_size(logical) == parts
  assert sharding.axes_of('embed') == () and sharding.axis_size('embed') == 1
  rows, length = _parts(mesh, table, 'act_batch'), _parts(mesh, table, 'act_length')
  shape = sharding.batch_sharding(layout).shard_shape((16, 32))
  assert shape == (16 // rows, 32 // length)
  assert sharding.replicated(layout).shard_shape((16, 32)) == (16, 32)
  assert sharding.row_share(layout) == (0, 1)


def test_the_optimizers_moments_lie_where_their_parameters_do():
  layout = _layout(MESHES[2], 'fsdp_data', '')
  found = state.abstract_state(MODELS['chatglm2'], optax.adam(1e-3), layout)
  wanted = jax.tree.map(lambda leaf: leaf.sharding, found['params'])
  for moments in (found['opt_state'][0].mu, found['opt_state'][0].nu):
    assert jax.tree.map(lambda leaf: leaf.sharding, moments) == wanted
  assert found['step'].sharding.is_fully_replicated


def _batch(rows, length):
  ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  return Batch(*[ids] * 8)._replace(
    loss_weights=jax.ShapeDtypeStruct((rows, length), jnp.float32)
  )


def _constraints(jaxpr):
  """(shape, spec) of every sharding constraint in a program."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'sharding_constraint':
      yield equation.invars[0].aval.shape, equation.params['sharding'].spec
    for value in equation.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from _constraints(inner)


@pytest.mark.parametrize('mesh,rules,override', [*CASES[6:12:2], CASES[18], CASES[-1]])
@pytest.mark.parametrize('name', ['glm', 'chatglm2'])
def test_activations_are_cut_along_every_axis_of_their_rule(name, mesh, rules, override):
  """Of the residual stream, queries and the MLP, in the program that is compiled."""
  config, rows, length = MODELS[name], 16, 32
  table, layout = _table(rules, override), _layout(mesh, rules, override)
  params = nn.unbox(_boxed(name))
  loss_fn = losses.pretraining_loss(models.build(config))
  with sharding.active(layout):
    jaxpr = jax.make_jaxpr(lambda p, b: loss_fn({'params': p}, b, None))(
      params, _batch(rows, length)
    )
  found = [*_constraints(jaxpr.jaxpr)]
  T = (rows, length)
  kinds = {
    (*T, 64): (),
    (*T, 16, 4): ('act_heads', ''),
    (*T, 128): ('act_mlp',),
  }
  assert {shape for shape, _ in found} == {*kinds}
  for shape, spec in found:
    cut = jax.sharding.NamedSharding(layout.mesh, spec).shard_shape(shape)
    names = ('act_batch', 'act_length', *(kinds[shape] or ('',)))
    wanted = [n // _parts(mesh, table, k) for n, k in zip(shape, names, strict=True)]
    assert cut == tuple(wanted), (shape, spec)


@pytest.mark.parametrize('rules', ['fsdp', 'fsdp_data'])
def test_a_product_over_a_cut_weight_equals_that_over_the_whole(rules):
  """For meshes of one long axis and of all of them; forward and backward."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(8, 8, 16)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
  out = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
  table = jnp.asarray(rng.normal(size=(32, 16)), jnp.float32)
  ids = jnp.asarray(rng.integers(0, 32, (8, 8)))
  look_up = layers.Table(32, 16, 'vocab', 1.0, jnp.float32)

  def f(x, w, out, table):
    x = x + look_up.apply({'params': {'weight': table}}, ids)
    [h] = layers.einsum('BTD,DF->BTF', x, [Factor(w, ('embed', 'mlp'))])
    [y] = layers.einsum('BTF,FD->BTD', jnp.tanh(h), [Factor(out, ('mlp', 'embed'))])
    return (jnp.sin(y) * jnp.arange(8)[:, None, None]).sum(), layers.logits(y, table)

  def run(x, w, out, table):
    _, back, logits = jax.vjp(f, x, w, out, table, has_aux=True)
    return logits, back(jnp.float32(1))

  wanted = jax.jit(run)(x, w, out, table)
  for mesh in (MESHES[1], MESHES[3]):
    with sharding.active(_layout(mesh, rules, '')):
      found = jax.jit(run)(x, w, out, table)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found, wanted
    )


def test_every_device_that_computes_other_probabilities_has_a_number_of_its_own():
  for mesh, rules, override in CASES[6:18]:
    layout = _layout(mesh, rules, override)
    every = PartitionSpec(sharding.AXES)
    with sharding.active(layout):
      numbers = jax.jit(
        sharding.per_device(lambda: jnp.full(1, api._device()), (), every, kernels=True)
      )()
    assert sorted(np.asarray(numbers).tolist()) == [*range(8)]


@pytest.mark.parametrize('n', [2, 3, 8])
def test_rows_are_balanced_over_any_number_of_devices(n):
  """Device i of n holds chunks i and 2 n - 1 - i; gathered, they are in order again."""
  layout = sharding.make_mesh(MeshConfig(data=1, sequence=n), jax.devices()[:n])
  x = jnp.arange(2 * 4 * n).reshape(2, 4 * n)
  rows = (('act_batch', 'act_length'),)
  gather = lambda x: sharding.gather_length(x, spread=True)
  whole = lambda x: sharding.per_device(gather, rows, ('act_batch', None), kernels=True)(x)
  with sharding.active(layout):
    spread, back, gathered = jax.jit(
      lambda x: (
        sharding.spread(x),
        sharding.unspread(sharding.spread(x)),
        whole(sharding.spread(x)),
      )
    )(x)
  chunks = [chunk for i in range(n) for chunk in (i, 2 * n - 1 - i)]
  np.testing.assert_array_equal(spread, x.reshape(2, 2 * n, 2)[:, chunks].reshape(2, -1))
  np.testing.assert_array_equal(back, x)
  np.testing.assert_array_equal(gathered, x)


# Processes.


@dataclasses.dataclass(frozen=True)
class _Device:
  """A device of some process."""

  id: int
  process_index: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'


def _shares(monkeypatch, mesh, local, rules='fsdp'):
  """(number, of how many) of each process, and the rows of 64 that its devices hold."""
  count = math.prod(mesh.values())
  devices = np.array([_Device(i, i // local) for i in range(count)], object)
  shape = [mesh.get(axis, 1) for axis in sharding.AXES]
  axis_types = (AxisType.Auto,) * len(shape)
  built = Mesh(devices.reshape(shape), sharding.AXES, axis_types=axis_types)
  layout = sharding.Layout(built, tuple(MeshConfig(**mesh, rules=rules).table.items()))
  # By hand: data is outermost, then fsdp; the others share rows.
  per_row = mesh.get('sequence', 1) * mesh.get('tensor', 1)
  of_device = 64 * per_row // count
  held, found = {}, {}
  for device in devices:
    first = device.id // per_row * of_device
    held.setdefault(device.process_index, set()).update(range(first, first + of_device))
  for process in range(count // local):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    found[process] = sharding.row_share(layout)
  return found, held


@pytest.mark.parametrize('local', [1, 2, 4, 8])
@pytest.mark.parametrize(
  'mesh',
  [
    dict(data=16),
    dict(data=4, fsdp=4),
    dict(data=2, fsdp=2, sequence=2, tensor=2),
    dict(data=1, fsdp=2, sequence=8),
    dict(data=2, tensor=8),
    dict(data=1, sequence=4, tensor=4),
    dict(data=4, sequence=2, tensor=4),
  ],
  ids=str,
)
def test_processes_that_share_rows_read_the_same_and_others_read_others(
  mesh, local, monkeypatch
):
  shares, held = _shares(monkeypatch, mesh, local)
  for process, (number, count) in shares.items():
    size = 64 // count
    assert {*range(number * size, (number + 1) * size)} == held[process]
  assert {number for number, _ in shares.values()} == {*range(shares[0][1])}
  for a, b in itertools.combinations(shares, 2):
    assert (shares[a] == shares[b]) == (held[a] == held[b])


def test_uneven_shares_of_the_rows_are_refused(monkeypatch):
  with pytest.raises(ValueError, match='an even share of the rows'):
    _shares(monkeypatch, dict(data=3, sequence=2, tensor=2), local=6)
