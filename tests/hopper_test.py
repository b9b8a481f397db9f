"""Gradients of attention on Hopper: the kernels' arithmetic, and their program for an H100.

What the kernels call of Mosaic is played by arrays below: which blocks they read, what they
mask and multiply is theirs. Barriers and copies are only compiled; `benchmarks.kernels`
runs them where the GPU is.
"""

import contextlib
import itertools
import types

import gpu_attention_test as gpu_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from glm_jax.attention import api, dense, gpu, hopper
from glm_jax.batch import Visibility
from glm_jax.models import ChatGLM2Config, ComputeConfig


class Ref:
  """An array that is written in place; `at` gives a view of it."""

  def __init__(self, array):
    self.array = array

  shape = property(lambda self: self.array.shape)
  dtype = property(lambda self: self.array.dtype)
  T = property(lambda self: Ref(self.array.T))
  at = property(lambda self: _At(self.array))

  def __getitem__(self, index):
    return self.array[index]

  def __setitem__(self, index, value):
    self.array[index] = value


class _At:
  def __init__(self, array):
    self._array = array

  def __getitem__(self, index):
    index = index if isinstance(index, tuple) else (index,)
    return Ref(self._array[tuple(_slice(i) for i in index)])


def _slice(i):
  if hasattr(i, 'size') and hasattr(i, 'start'):  # pl.ds
    return slice(int(i.start), int(i.start) + i.size)
  return i if isinstance(i, slice) else int(i)


class Mosaic:
  """Runs a kernel's warpgroups one after another, on numpy arrays."""

  def __init__(self, reads):
    self._place, self._reads = {}, reads

  def axis_index(self, name):
    return np.int32(self._place[name])

  def kernel(self, body, *, out_type, scratch_types, grid, grid_names, **_):
    outs = jax.tree.leaves(out_type)
    many = isinstance(out_type, tuple)

    def run(*arrays):
      # Nothing that is not written may look as if it were.
      made = [Ref(np.full(x.shape, np.nan, np.float32)) for x in outs]
      for place in itertools.product(*map(range, grid), range(2)):
        self._place = dict(zip((*grid_names, 'group'), place, strict=True))
        scratch = [make() for make in scratch_types]
        body(*(Ref(np.asarray(x)) for x in arrays), *made, *scratch)
      return tuple(x.array for x in made) if many else made[0].array

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), out_type)
    return lambda *args: jax.pure_callback(run, shapes, *args, vmap_method='sequential')

  def pipeline(self, block, *, grid, in_specs, compute_context, **_):
    def run(*refs):
      def steps(carry):
        (count,) = grid
        assert count >= 1  # what a pipeline of Mosaic is not made for
        self._reads.append(int(count))
        for i in range(int(count)):
          shared = []
          for spec, ref in zip(in_specs, refs, strict=True):
            indices = spec.index_map(i)
            index = [
              slice(int(n) * s, (int(n) + 1) * s)
              for n, s in zip(indices, spec.block_shape, strict=True)
            ]
            shared.append(Ref(ref.array[tuple(index)]))
          carry = block((i,), *shared, *[None] * len(refs), carry)
        return carry

      compute_context(steps)

    return run


def _wgmma(total, a, b):
  a, b = (np.asarray(getattr(x, 'array', x), np.float32) for x in (a, b))
  total.array += a @ b


@contextlib.contextmanager
def played(monkeypatch, reads):
  """Mosaic, as far as `hopper` uses it, played by numpy."""
  mosaic = Mosaic(reads)
  shared = lambda shape, dtype, **_: lambda: Ref(np.zeros(shape, np.float32))
  nothing = lambda *_, **__: None
  double = types.SimpleNamespace(
    kernel=mosaic.kernel,
    emit_pipeline_warp_specialized=mosaic.pipeline,
    BlockSpec=lambda shape, index, **_: types.SimpleNamespace(
      block_shape=shape, index_map=index
    ),
    SMEM=shared,
    Barrier=lambda **_: lambda: Ref(np.zeros(2)),
    ACC=lambda shape, dtype: Ref(np.zeros(shape, dtype)),
    load=lambda ref, *_, **__: jnp.asarray(ref.array),
    broadcasted_iota=lambda dtype, shape, axis, **_: jax.lax.broadcasted_iota(
      dtype, shape, axis
    ),
    copy_gmem_to_smem=lambda source, to, barrier: to.__setitem__(..., source.array),
    copy_smem_to_gmem=lambda source, to, **_: to.__setitem__(..., source.array),
    wgmma=_wgmma,
    wgmma_accumulator_load=lambda ref, **_: ref[...],
    Layout=mosaic_gpu.Layout,
    CompilerParams=mosaic_gpu.CompilerParams,
    find_swizzle=mosaic_gpu.find_swizzle,
    TilingTransform=mosaic_gpu.TilingTransform,
    SwizzleTransform=mosaic_gpu.SwizzleTransform,
    **dict.fromkeys(
      (
        'barrier_arrive',
        'barrier_wait',
        'commit_smem',
        'commit_smem_to_gmem_group',
        'wait_smem_to_gmem',
        'wgmma_wait',
      ),
      nothing,
    ),
  )
  with monkeypatch.context() as patch:
    patch.setattr(hopper, 'plgpu', double)
    patch.setattr(hopper.lax, 'axis_index', mosaic.axis_index)
    patch.setattr(hopper.pl, 'run_scoped', lambda run, *arrays: run(*arrays))
    yield


@pytest.mark.parametrize(
  ('T', 'S', 'N', 'K', 'H'),
  [(256, 256, 2, 1, 64), (256, 384, 4, 2, 24)],
  ids=['mqa', 'gqa, longer keys, small heads'],
)
def test_gradients_equal_those_of_dense_attention(T, S, N, K, H, monkeypatch):
  B, reads = 2, []
  keys = jax.random.split(jax.random.key(0), 4)
  q, weight = (jax.random.normal(key, (B, T, N, H)) for key in keys[:2])
  k, v = (jax.random.normal(key, (B, S, K, H)) for key in keys[2:])
  # A causal row from key 5 on, and three packed documents whose prefixes are seen whole.
  t = np.arange(T)
  cuts = np.array([0, 70, 130])
  first = cuts[np.searchsorted(cuts, t, 'right') - 1]
  start = jnp.asarray(np.stack([np.minimum(t, 5), first]), jnp.int32)
  end = jnp.asarray(np.stack([t + 1, np.maximum(first + 31, t + 1)]), jnp.int32)
  visibility = Visibility(start, end)

  def scores(q, k):
    grouped = q.reshape(B, T, K, N // K, H)
    s = jnp.einsum('BTKGH,BSKH->BKGTS', grouped, k).reshape(B, N, T, S) * H**-0.5
    return jnp.where(visibility.mask(S)[:, None], s, -jnp.inf)

  def attend(q, k, v):
    grouped = q.reshape(B, T, K, N // K, H)
    return dense.attend(grouped, k, v, visibility, 0.0, None).reshape(q.shape)

  out, gradients = jax.vjp(attend, q, k, v)
  s = scores(q, k)
  largest = s.max(-1)
  statistics = largest, jnp.exp(s - largest[..., None]).sum(-1)
  with played(monkeypatch, reads):
    ours = hopper.gradients(q, k, v, weight, out, statistics, start, end)
  for own, reference in zip(ours, gradients(weight), strict=True):
    np.testing.assert_allclose(own, reference, atol=3e-5)
  # Of T / 64 blocks each, a kernel reads those that a tile sees or is seen by.
  assert sum(reads) < 0.7 * len(reads) * S / 64


@pytest.mark.slow
@pytest.mark.parametrize(
  ('T', 'N', 'K', 'H', 'dtype'),
  [(8192, 32, 2, 128, 'bfloat16'), (37, 4, 1, 80, 'float16')],
)
def test_the_kernels_compile(T, N, K, H, dtype, monkeypatch):
  flash = gpu.flash
  monkeypatch.setattr(gpu, 'flash', lambda *args: flash(*args, own_gradients=True))
  step = gpu_test._compiled(T, N, K, H, dtype=dtype)
  assert step.as_text().count('"mosaic_gpu_v2"') == 3  # forward, dq, and dk with dv
  assert step.memory_analysis().temp_size_in_bytes < 400 * 2**20


def test_it_is_asked_for_by_name_and_on_hopper_alone():
  model = ChatGLM2Config(
    num_layers=1,
    hidden_size=128,
    num_heads=2,
    num_kv_heads=1,
    head_size=64,
    mlp_size=64,
    vocab_size=64,
    max_positions=64,
  )
  h100 = types.SimpleNamespace(platform='gpu', **vars(gpu_test.H100))
  a100 = types.SimpleNamespace(
    platform='gpu', device_kind='NVIDIA A100', compute_capability='8.0'
  )
  asked = ComputeConfig(dtype='bfloat16', attention='gpu_hopper')
  assert api.choose(model, asked, h100, 64)[0] == 'gpu_hopper'
  auto = ComputeConfig(dtype='bfloat16')
  assert api.choose(model, auto, h100, 64)[0] == 'gpu_tokamax'
  with pytest.raises(ValueError, match='A100 is no Hopper GPU'):
    api.choose(model, asked, a100, 64)
