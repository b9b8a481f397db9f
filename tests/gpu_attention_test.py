"""The GPU backend: Triton's kernels interpreted, and all of them compiled for an H100.

JAX cannot interpret the Mosaic kernels (`plgpu.load` of shared memory is missing), so that
without a GPU they are compiled only.
"""

import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.sharding import SingleDeviceSharding

from glm_jax.attention import dense, gpu
from glm_jax.batch import Visibility
from glm_jax.planning import topologies

H100 = types.SimpleNamespace(device_kind='NVIDIA H100', compute_capability='9.0')


@pytest.mark.parametrize(
  ('head_size', 'dtype', 'device', 'words'),
  [
    (128, 'bfloat16', H100, None),
    (64, jnp.float16, None, None),
    (
      80,
      'bfloat16',
      types.SimpleNamespace(**{**vars(H100), 'compute_capability': '12.0'}),
      None,
    ),
    (256, 'bfloat16', H100, 'head_size=256'),
    (20, 'bfloat16', H100, 'no multiple of 8'),
    (0, 'bfloat16', H100, 'head_size=0'),
    (128, 'float32', H100, "'float32' is none of"),
    (128, 'bfloat16', types.SimpleNamespace(device_kind='cpu'), 'cpu is no NVIDIA GPU'),
    (
      128,
      'bfloat16',
      types.SimpleNamespace(device_kind='NVIDIA V100', compute_capability='7.0'),
      'V100 is no',
    ),
    (
      128,
      'bfloat16',
      types.SimpleNamespace(device_kind='AMD Instinct', compute_capability='gfx942'),
      'Instinct is no',
    ),
  ],
)
def test_what_the_kernels_lack(head_size, dtype, device, words):
  lacking = gpu.lacks(head_size, dtype, device)
  assert words in lacking if words else lacking == ''


def test_no_kernel_is_an_error():
  q = jnp.zeros((1, 2, 1, 1, 64), jnp.bfloat16)
  k = q[:, :, 0]
  visibility = Visibility(jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32))
  with pytest.raises(ValueError, match="kernel here, got cpu is .*choose 'chunked'"):
    gpu.flash(q, k, k, visibility)


def _interpreted(pallas_call=pallas.pallas_call, program_id=pallas.program_id):
  """`pallas_call` that runs a Triton kernel on the CPU.

  The interpreter does not find `program_id` inside of the kernels' loops: it is called in
  front of them.
  """

  def call(kernel, out_shape, *, grid_spec, compiler_params, name):
    del compiler_params

    def hoisted(*refs):
      ids = [program_id(axis) for axis in range(len(grid_spec.grid))]

      def of_grid(axis):
        if axis >= len(ids):
          raise ValueError('no such axis')  # as the original does
        return ids[axis]

      with mock.patch.object(pallas, 'program_id', of_grid):
        return kernel(*refs)

    return pallas_call(hoisted, out_shape, grid_spec=grid_spec, name=name, interpret=True)

  return call


def _visibility(B, T, S):
  """Rows of: two packed documents with prefixes, then padding; nothing; all keys."""
  t = np.arange(T)
  start, end = np.zeros((2, B, T), np.int32)
  cut, length = T // 3, T - T // 8
  start[0] = np.where(t < cut, 0, cut)
  end[0] = np.maximum(np.where(t < cut, cut // 2, (cut + T) // 2), t + 1)
  start[0, length:], end[0, length:] = 7, 7  # empty wherever it is
  end[2:] = S
  return Visibility(jnp.asarray(start), jnp.minimum(jnp.asarray(end), S))


@pytest.mark.parametrize(
  ('T', 'S', 'K', 'G', 'H'),
  [(200, 200, 2, 2, 24), (37, 300, 1, 3, 32)],
  ids=['gqa', 'mqa, longer keys'],
)
def test_triton_equals_dense_forward_and_backward(T, S, K, G, H, monkeypatch):
  """In float32, which interpreted kernels multiply exactly; several blocks of masks."""
  import tokamax

  B = 3
  monkeypatch.setattr(gpu, 'lacks', lambda *_: '')
  monkeypatch.setattr(gpu, '_MASKED', 128)
  monkeypatch.setattr(pallas, 'pallas_call', _interpreted())
  keys = jax.random.split(jax.random.key(0), 4)
  q, weight = (jax.random.normal(key, (B, T, K, G, H)) for key in keys[:2])
  k, v = (jax.random.normal(key, (B, S, K, H)) for key in keys[2:])
  visibility = _visibility(B, T, S)

  def run(attend, *dropout):
    def weighted(q, k, v):
      out = attend(q, k, v, visibility, *dropout)
      return (out * weight).sum(), out

    gradient = jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)
    (_, out), gradients = jax.jit(gradient)(q, k, v)
    return out, *gradients

  gpu._op()  # from here on tokamax's configuration can be set
  with tokamax.config.cross_compile(True):
    results = run(gpu.flash)
  for ours, reference in zip(results, run(dense.attend, 0.0, None), strict=True):
    np.testing.assert_allclose(ours, reference, atol=2e-5)
  empty = visibility.key_end <= visibility.key_start
  assert bool(empty[0].any()) and bool(empty[1].all())
  for x in results[:2]:  # outputs, and gradients of queries
    assert not np.asarray(x)[np.asarray(empty)].any()


def _compiled(T, N, K, H, *, dtype='bfloat16', remat=False):
  """Gradients of attention, compiled for one H100."""
  device = topologies.devices('h100:1x1x1')[0]

  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

  def total(q, k, v, *visibility):
    out = gpu.flash(q, k, v, Visibility(*visibility))
    return jnp.sin(out.astype(jnp.float32)).sum()

  if remat:
    policy = jax.checkpoint_policies.save_only_these_names('attention')
    total = jax.checkpoint(total, policy=policy)
  k, end = array(dtype, 1, T, K, H), array('int32', 1, T)
  with jax.default_device(device):
    step = jax.jit(jax.grad(total, (0, 1, 2)))
    return step.lower(array(dtype, 1, T, K, N // K, H), k, k, end, end).compile()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('hopper', 'call'), [(True, 'mosaic_gpu_v2'), (False, '__gpu$xla.gpu.triton')]
)
def test_kernels_compile_for_a_gpu_without_square_arrays(hopper, call, monkeypatch):
  if not hopper:  # what an A100 is given
    monkeypatch.setattr(gpu, 'is_hopper', lambda device: False)
  step = _compiled(8192, 32, 2, 128)
  text = step.as_text()
  assert f'custom_call_target="{call}"' in text
  assert not re.search(r'8192,(\d+,)*8192\]', text)
  assert step.memory_analysis().temp_size_in_bytes < 400 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
  ('T', 'N', 'K', 'H', 'dtype'),
  [(256, 4, 4, 64, 'float16'), (37, 4, 1, 80, 'bfloat16'), (256, 4, 2, 8, 'bfloat16')],
)
@pytest.mark.parametrize('hopper', [True, False])
def test_kernels_compile_at_the_edges(T, N, K, H, dtype, hopper, monkeypatch):
  monkeypatch.setattr(gpu, 'is_hopper', lambda device: hopper)
  assert 'custom_call_target' in _compiled(T, N, K, H, dtype=dtype).as_text()


@pytest.mark.slow
def test_remat_by_name_does_not_run_the_forward_kernel_again():
  calls = _compiled(1024, 4, 2, 128, remat=True).as_text().count('"mosaic_gpu_v2"')
  assert calls == 3  # forward, dq, and dk with dv
