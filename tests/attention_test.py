"""Attention over intervals: every backend equals a plain softmax."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import sharding
from glm_jax.attention import (
  api,
  attend,
  blocks,
  choose,
  chunked,
  prepare,
  splash,
  tokamax_splash,
)
from glm_jax.attention.dense import drop
from glm_jax.batch import Visibility
from glm_jax.models import ChatGLM2Config, ComputeConfig, GLMConfig
from glm_jax.performance import flops
from glm_jax.sharding import MeshConfig

B, H = 3, 8


def _visibility(kind, T):
  """Intervals of each layout; T is no multiple of a chunk."""
  t = np.arange(T)
  rng = np.random.default_rng(0)
  start, end = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
  if kind == 'causal':
    end[:] = t + 1
  elif kind == 'bidirectional':
    end[:] = T
  elif kind == 'prefix':
    end[:] = np.maximum(rng.integers(1, T, (B, 1)), t + 1)
  elif kind == 'padded':
    length = rng.integers(1, T, (B, 1))
    end[:] = np.where(t < length, np.maximum(length // 2, t + 1), 0)
  elif kind == 'packed':
    for b in range(B):
      cuts = [0, *np.sort(rng.choice(np.arange(1, T), 3, replace=False)), T]
      for a, z in itertools.pairwise(cuts):
        start[b, a:z] = a
        end[b, a:z] = np.maximum((a + z) // 2, t[a:z] + 1)
  return Visibility(jnp.asarray(start), jnp.asarray(end))


def _reference(q, k, v, visibility):
  """Loops and numpy in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for b, t, n in np.ndindex(q.shape[:3]):
    a, z = int(visibility.key_start[b, t]), int(visibility.key_end[b, t])
    if z > a:
      head = n // (q.shape[2] // k.shape[2])
      scores = k[b, a:z, head] @ q[b, t, n] / np.sqrt(q.shape[-1])
      weights = np.exp(scores - scores.max())
      out[b, t, n] = weights @ v[b, a:z, head] / weights.sum()
  return out


HEADS = {'mha': (2, 2), 'gqa': (4, 2), 'mqa': (4, 1)}
# Every layout, and every number of key heads in the richest one.
CASES = [('causal', 'mha'), ('bidirectional', 'gqa'), ('prefix', 'mqa'), ('padded', 'gqa')]
CASES += [('packed', heads) for heads in HEADS]


@pytest.mark.parametrize('kind,heads', CASES)
def test_backends_equal_the_reference_forward_and_backward(kind, heads, monkeypatch):
  monkeypatch.setattr(chunked, 'QUERY_CHUNK', 16)
  monkeypatch.setattr(chunked, 'KEY_CHUNK', 8)
  T, (N, K) = 37, HEADS[heads]
  keys = jax.random.split(jax.random.key(0), 4)
  q = jax.random.normal(keys[0], (B, T, N, H))
  k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[1:3])
  weight = jax.random.normal(keys[3], (B, T, N, H))
  visibility = _visibility(kind, T)
  gradients = {}
  for backend in ('dense', 'chunked', 'cpu_dense'):

    def weighted(q, k, v, backend=backend):
      out = attend(q, k, v, visibility, backend=backend)
      return (out * weight).sum(), out

    run = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients[backend] = run(q, k, v)
    np.testing.assert_allclose(out, _reference(q, k, v, visibility), atol=2e-6)
  for dense, *others in zip(*gradients.values(), strict=True):
    for other in others:
      np.testing.assert_allclose(other, dense, atol=1e-5)
    assert bool(jnp.isfinite(dense).all())


def test_a_cpu_computes_in_float32_whatever_it_is_given():
  """Rounded once, at the end: no further from the exact result than its dtype asks."""
  T = 37
  keys = jax.random.split(jax.random.key(0), 4)
  of_dtype = lambda key, heads: jax.random.normal(key, (B, T, heads, H), jnp.bfloat16)
  q, k, v = (of_dtype(key, heads) for key, heads in zip(keys, (4, 2, 2), strict=False))
  weight, visibility = of_dtype(keys[3], 4), _visibility('packed', T)

  def pulled(q, k, v, backend):
    out, pull = jax.vjp(lambda *a: attend(*a, visibility, backend=backend), q, k, v)
    return out, *pull(weight.astype(out.dtype))

  exact = pulled(*(x.astype(jnp.float32) for x in (q, k, v)), 'dense')
  for found, wanted in zip(pulled(q, k, v, 'cpu_dense'), exact, strict=True):
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize('T', [1, 2])  # a CPU has its own way with one query
@pytest.mark.parametrize('heads', HEADS)
def test_queries_may_be_fewer_than_keys(heads, T):
  """As in a cache: over slots of a longer one, or none; each head with its own keys."""
  N, K = HEADS[heads]
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (B, T, N, H))
  k, v = (jax.random.normal(key, (B, 9, K, H)) for key in keys[1:])
  start, end = jnp.array([0, 2, 5]), jnp.array([4, 9, 5])
  visibility = Visibility(*(jnp.repeat(x[:, None], T, axis=1) for x in (start, end)))
  run = jax.jit(lambda *arrays: attend(*arrays, visibility))
  out = run(q, k, v)
  np.testing.assert_allclose(out, _reference(q, k, v, visibility), atol=2e-6)
  rounded = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  exact = _reference(*(x.astype(jnp.float32) for x in rounded), visibility)
  found = run(*rounded)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-6, atol=2**-6)


def test_an_unknown_backend_is_refused():
  q = jnp.zeros((1, 2, 2, H))
  visibility = Visibility(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32))
  with pytest.raises(ValueError, match="one of .*got 'flash'"):
    attend(q, q, q, visibility, backend='flash')


def test_dropout_drops_its_share_and_keeps_the_mean():
  x = jnp.ones((200, 200))
  dropped = drop(x, 0.25, jax.random.key(0))
  assert float((dropped == 0).mean()) == pytest.approx(0.25, abs=0.01)
  assert float(dropped.mean()) == pytest.approx(1, abs=0.02)


def test_chunks_do_not_share_random_numbers(monkeypatch):
  """A reused key would drop the same places of every block of probabilities."""
  monkeypatch.setattr(chunked, 'QUERY_CHUNK', 16)
  monkeypatch.setattr(chunked, 'KEY_CHUNK', 16)
  T = 32
  q, k = jnp.zeros((1, T, 1, T)), jnp.zeros((1, T, 1, T))
  v = jnp.eye(T)[None, :, None]  # the output shows which keys were kept
  out = attend(
    q,
    k,
    v,
    Visibility(jnp.zeros((1, T), jnp.int32), jnp.full((1, T), T, jnp.int32)),
    backend='chunked',
    dropout_rate=0.5,
    dropout_key=jax.random.key(0),
  )
  kept = np.asarray(out[0, :, 0] > 0)
  blocks = [kept[i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16)]
  for i, block in enumerate(blocks):
    assert 0.3 < block.mean() < 0.7
    for other in blocks[i + 1 :]:
      assert (block != other).mean() > 0.3


@pytest.fixture
def kernels(monkeypatch):
  """The TPU kernels without a TPU, in blocks of 128."""
  from jax.experimental.pallas import tpu as pltpu

  monkeypatch.setattr(splash, 'INTERPRET', True)
  # Plain interpret mode gets tokamax's gradients wrong: it does not share memory between
  # inputs and outputs.
  monkeypatch.setattr(tokamax_splash, 'INTERPRET', pltpu.InterpretParams())
  monkeypatch.setattr(blocks.tiles, '__defaults__', (128,))


def _equal_to_dense(backend, kind, heads, T=300):
  """Values and gradients of one row of T queries, of which the last block is not full."""
  N, K = heads
  keys = jax.random.split(jax.random.key(0), 4)
  q, weight = (jax.random.normal(key, (1, T, N, 128)) for key in (keys[0], keys[3]))
  k, v = (jax.random.normal(key, (1, T, K, 128)) for key in keys[1:3])
  visibility = jax.tree.map(lambda x: x[:1], _visibility(kind, T))

  def weighted(q, k, v, seen):
    out = attend(q, k, v, seen)
    return (out * weight).sum(), out

  run = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
  seen = jax.jit(lambda v: prepare(v, backend))(visibility)
  assert seen.backend == backend and seen.metadata is not None
  (_, wanted), wanted_gradients = run(q, k, v, prepare(visibility, 'dense'))
  (_, out), gradients = run(q, k, v, seen)
  np.testing.assert_allclose(out, wanted, atol=2e-5)
  for found, right in zip(gradients, wanted_gradients, strict=True):
    np.testing.assert_allclose(found, right, atol=2e-5)


# The interpreted kernels are slow: the fast ones have every mask and number of key heads.
OTHERS = [
  pytest.param(*case, marks=pytest.mark.slow)
  for case in (('bidirectional', 'gqa'), ('packed', 'mha'), ('packed', 'mqa'))
]


@pytest.mark.parametrize(
  'kind,heads',
  [('causal', 'mha'), ('prefix', 'mqa'), ('padded', 'gqa'), ('packed', 'gqa'), *OTHERS],
)
def test_splash_equals_dense(kind, heads, kernels):
  _equal_to_dense('tpu_splash', kind, HEADS[heads])


@pytest.mark.parametrize(
  'heads', ['mqa', *(pytest.param(name, marks=pytest.mark.slow) for name in ('mha', 'gqa'))]
)
def test_splash_with_segments_equals_dense(heads, kernels, monkeypatch):
  """As for rows whose intervals do not fit into an int32."""
  monkeypatch.setattr(splash, 'LONGEST_PACKED', 128)
  _equal_to_dense('tpu_splash', 'packed', HEADS[heads])
  if heads == 'mqa':
    _equal_to_dense('tpu_splash', 'padded', HEADS[heads])


@pytest.mark.parametrize('kind,heads', [('packed', 'gqa'), ('padded', 'mha')])
def test_tokamax_equals_dense(kind, heads, kernels):
  _equal_to_dense('tpu_tokamax', kind, HEADS[heads])


@pytest.mark.slow
@pytest.mark.parametrize(
  'kind,heads', [('causal', 'mqa'), ('bidirectional', 'gqa'), ('prefix', 'mha')]
)
def test_tokamax_equals_dense_in_the_other_layouts(kind, heads, kernels):
  _equal_to_dense('tpu_tokamax', kind, HEADS[heads])


@pytest.mark.parametrize(
  'backend', ['dense', 'chunked', 'cpu_dense', 'tpu_splash', 'tpu_tokamax']
)
def test_a_key_influences_exactly_the_queries_whose_interval_holds_it(backend, kernels):
  """Boundaries inside blocks and at their edges, empty rows, an interval of one."""
  T = 260
  start, end = np.zeros((1, T), np.int32), np.zeros((1, T), np.int32)
  intervals = {0: (0, 1), 1: (0, 128), 127: (127, 128), 128: (128, 129), 129: (5, 259)}
  intervals |= {200: (128, 256), 255: (127, 257), 256: (259, 260), 258: (0, 260)}
  for t, (a, z) in intervals.items():
    start[0, t], end[0, t] = a, z
  q, k, v = (
    jax.random.normal(key, (1, T, 1, 128)) for key in jax.random.split(jax.random.key(1), 3)
  )
  seen = prepare(Visibility(jnp.asarray(start), jnp.asarray(end)), backend)
  out, pull = jax.vjp(jax.jit(lambda k, v: attend(q, k, v, seen)), k, v)
  nothing = np.setdiff1d(np.arange(T), list(intervals))
  assert not np.asarray(out)[0, nothing].any()
  pull = jax.jit(pull)
  for t, (a, z) in intervals.items():
    dk, dv = pull(jnp.zeros_like(out).at[0, t].set(1.0))
    touched = np.flatnonzero(np.abs(np.asarray(dv)[0]).max((1, 2)) > 0)
    np.testing.assert_array_equal(touched, np.arange(a, z), err_msg=f'query {t}')
    assert set(np.flatnonzero(np.abs(np.asarray(dk)[0]).max((1, 2)))) <= set(range(a, z))
  dk, dv = pull(jnp.zeros_like(out).at[0, nothing].set(1.0))
  assert not np.asarray(dk).any() and not np.asarray(dv).any()


@pytest.mark.parametrize('longest_packed', [splash.LONGEST_PACKED, 128])
def test_splash_under_a_mesh_equals_dense(longest_packed, kernels, monkeypatch):
  """Tokens over sequence, two key heads over four devices: values and all gradients."""
  monkeypatch.setattr(splash, 'LONGEST_PACKED', longest_packed)
  T, N, K = 512, 4, 2
  visibility = jax.tree.map(lambda x: x[:1], _visibility('packed', T))
  keys = jax.random.split(jax.random.key(0), 4)
  q, weight = (jax.random.normal(key, (1, T, N, 128)) for key in (keys[0], keys[3]))
  k, v = (jax.random.normal(key, (1, T, K, 128)) for key in keys[1:3])
  layout = sharding.make_mesh(MeshConfig(sequence=2, tensor=4), jax.devices())

  def weighted(q, k, v, visibility, backend, spread):
    if spread:
      q, k, v, visibility = jax.tree.map(sharding.spread, (q, k, v, visibility))
    seen = prepare(visibility, backend, spread=spread)
    out = attend(q, k, v, seen)
    out = sharding.unspread(out) if spread else out
    return (out * weight).sum(), out

  run = jax.jit(
    jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True), static_argnums=(4, 5)
  )
  (_, wanted), wanted_gradients = run(q, k, v, visibility, 'dense', False)
  with sharding.active(layout):
    (_, out), gradients = run(q, k, v, visibility, 'tpu_splash', True)
  np.testing.assert_allclose(out, wanted, atol=2e-5)
  for found, right in zip(gradients, wanted_gradients, strict=True):
    np.testing.assert_allclose(found, right, atol=2e-5)


@pytest.mark.parametrize('backend', ['dense', 'chunked'])
def test_devices_drop_different_probabilities(backend):
  """The same row and head on each of four devices, and the same again with its key."""
  layout = sharding.make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
  x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 64, 1, 8)), (2, 64, 4, 8))
  visibility = Visibility(jnp.zeros((2, 64), jnp.int32), jnp.full((2, 64), 64))

  @jax.jit
  def run(key):
    seen = prepare(visibility, backend)
    return attend(x, x, x, seen, dropout_rate=0.5, dropout_key=key)

  with sharding.active(layout):
    out, again, other = (np.asarray(run(jax.random.key(i))) for i in (0, 0, 1))
  np.testing.assert_array_equal(out, again)
  assert np.abs(out - other).max() > 0.1
  seen = [out[b, :, n] for b in range(2) for n in range(4)]
  for a, b in itertools.combinations(seen, 2):
    assert np.abs(a - b).max() > 0.1


def test_one_token_is_a_row(kernels):
  x = jax.random.normal(jax.random.key(0), (1, 1, 2, 128))
  one = Visibility(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
  np.testing.assert_allclose(attend(x, x, x, prepare(one, 'tpu_splash')), x, atol=1e-6)


def _random_row(rng, T):
  """Packed prefix documents and padding."""
  used = T - int(rng.integers(0, T // 4))
  cuts = np.sort(rng.choice(np.arange(1, used), rng.integers(0, 8), replace=False))
  start, end = np.zeros(T, np.int32), np.zeros(T, np.int32)
  for a, z in itertools.pairwise([0, *cuts, used]):
    t = np.arange(a, z)
    start[a:z], end[a:z] = a, np.maximum(a + int(rng.integers(1, z - a + 1)), t + 1)
  return start, end


@pytest.mark.parametrize('block', [512, 1024])
def test_no_block_is_visited_in_vain(block):
  rng, T = np.random.default_rng(0), 8192
  cut = blocks.tiles(T, block)
  classify = jax.jit(lambda a, z: blocks.active(a, z, cut, cut))
  visited = needed = 0
  for _ in range(20):
    start, end = _random_row(rng, T)
    found = classify(start, end)
    s = np.arange(T)
    seen = (start[:, None] <= s) & (s < end[:, None])
    seen = seen.reshape(cut.count, cut.block, cut.count, cut.block)
    needs, full = seen.any((1, 3)), seen.all((1, 3))
    assert not (needs & ~np.asarray(found.visited)).any()
    np.testing.assert_array_equal(found.full, full)
    visited, needed = visited + int(found.visited.sum()), needed + int(needs.sum())
  assert visited <= 1.05 * needed


def test_visited_pairs_are_counted():
  """8 blocks of 1,024: 36 of 64 for a causal row."""
  t = np.arange(8192)
  causal = Visibility(np.zeros((2, 8192), np.int32), np.stack([t + 1, t + 1]))
  assert flops.visited(causal) == 2 * 36 * 1024**2
  assert flops.pairs(causal) == 8192 * 8193


class _Device:
  def __init__(self, platform, kind):
    self.platform, self.device_kind = platform, kind


_SIZES = dict(num_layers=1, hidden_size=256, num_heads=2, vocab_size=64, max_positions=64)
_CAUSAL = ChatGLM2Config(**_SIZES, num_kv_heads=1, head_size=128, mlp_size=8)
_AUTO = ComputeConfig()


@pytest.mark.parametrize(
  'kind,length,best',
  [
    ('TPU v4', 8192, 'tpu_splash'),
    ('TPU v5', 8192, 'tpu_splash'),
    ('TPU v5 lite', 8192, 'tpu_tokamax'),
    ('TPU v6 lite', 8192, 'tpu_tokamax'),
    ('TPU7x', 8192, 'tpu_tokamax'),
    ('TPU7x', 65536, 'tpu_splash'),
  ],
)
def test_the_backend_is_that_of_the_chip(kind, length, best):
  assert choose(_CAUSAL, _AUTO, _Device('tpu', kind), length)[0] == best


def test_without_tokamax_the_next_best_is_named(monkeypatch):
  monkeypatch.setattr(api.importlib.util, 'find_spec', lambda name: None)
  backend, why = choose(_CAUSAL, _AUTO, _Device('tpu', 'TPU v6 lite'), 8192)
  assert backend == 'tpu_splash' and 'tpu_tokamax is out: tokamax is missing' in why
  backend, why = choose(_CAUSAL, _AUTO, _Device('gpu', 'NVIDIA H100'), 8192)
  assert backend == 'chunked' and "pip install 'glm_jax[gpu]'" in why


def test_a_backend_that_cannot_is_refused_or_named():
  cpu, tpu = _Device('cpu', 'cpu'), _Device('tpu', 'TPU v5')
  assert choose(_CAUSAL, _AUTO, cpu, 512)[0] == 'cpu_dense'
  assert choose(_CAUSAL, _AUTO, cpu, 8192)[0] == 'chunked'
  dropping = GLMConfig(**_SIZES, attention_dropout=0.1)
  backend, why = choose(dropping, _AUTO, tpu, 8192)
  assert backend == 'chunked' and 'attention_dropout=0.1' in why
  for model, asked, device, words in [
    (_CAUSAL, 'tpu_splash', cpu, 'runs on tpu.*this is cpu'),
    (dropping, 'tpu_splash', tpu, 'attention_dropout=0.1'),
    (_CAUSAL, 'tpu_tokamax', tpu, '65536 positions'),
    (_CAUSAL, 'gpu_tokamax', tpu, 'runs on gpu'),
  ]:
    with pytest.raises(ValueError, match=words):
      choose(model, ComputeConfig(attention=asked), device, 65536)
  x = jnp.zeros((1, 2, 1, 128))
  ones = Visibility(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32))
  with pytest.raises(ValueError, match='prepare'):
    attend(x, x, x, ones, backend='tpu_splash')
  with pytest.raises(ValueError, match='dropout must be dense or chunked'):
    api.attend(
      x, x, x, prepare(ones, 'tpu_splash'), dropout_rate=0.1, dropout_key=jax.random.key(0)
    )
