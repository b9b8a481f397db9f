"""Digests: one flipped bit shows, whatever the dtype, and no mesh changes them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glm_jax import sharding
from glm_jax.checkpoints import digests
from glm_jax.sharding import MeshConfig

DTYPES = [
  *(np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint32),
  *(np.int8, np.uint8, np.bool_, ml_dtypes.int4),
]
SHAPES = [(), (5,), (3, 4, 5), (2, 70, 900), (0, 3), (1, 1, 2, 2, 1, 3, 1, 2)]


def _array(rng, dtype, shape):
  return np.asarray(rng.normal(0, 3, shape)).astype(np.int8).astype(dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_the_host_and_the_devices_agree(dtype):
  rng = np.random.default_rng(0)
  arrays = {str(shape): _array(rng, dtype, shape) for shape in SHAPES}
  there, _ = digests.of_arrays({name: jnp.asarray(a) for name, a in arrays.items()})
  assert there == {name: digests.of_numpy(a) for name, a in arrays.items()}


@pytest.mark.parametrize('dtype', DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_one_flipped_bit_shows_in_both_halves(dtype):
  rng = np.random.default_rng(1)
  array = _array(rng, dtype, (7, 11, 3))
  before = digests.of_numpy(array).split()[1]
  # A boolean, and an integer of 4 bits, have no other bits in their byte.
  bits = {'bool': 1, 'int4': 4}.get(np.dtype(dtype).name, 8)
  for _ in range(60):
    place, bit = rng.integers(array.size), rng.integers(bits)
    flipped = array.copy()
    if np.dtype(dtype) == ml_dtypes.int4:
      flat = flipped.reshape(-1).astype(np.int8)
      flat[place] = np.int8(((int(flat[place]) & 15 ^ (1 << bit)) ^ 8) - 8)
      flipped = flat.astype(dtype).reshape(array.shape)
    else:
      byte = place * array.itemsize + rng.integers(array.itemsize)
      flipped.reshape(-1).view(np.uint8)[byte] ^= 1 << bit
    after = digests.of_numpy(flipped).split()[1]
    assert before[:8] != after[:8] and before[8:] != after[8:]


def test_what_changes_places_shows():
  rng = np.random.default_rng(2)
  array = rng.normal(size=(256, 512)).astype(ml_dtypes.bfloat16).astype(np.float32)
  whole = digests.of_numpy(array)
  others = [array[::-1], array[:, ::-1], np.roll(array, 1, 0), np.roll(array, 128, 1)]
  swapped = array.copy()
  swapped[0], swapped[128] = array[128], array[0]
  others += [swapped, array.T.reshape(array.shape), array.reshape(512, 256)]
  assert len({whole, *map(digests.of_numpy, others)}) == len(others) + 1


def test_parts_add_up_in_any_order():
  rng = np.random.default_rng(3)
  array = rng.normal(size=(4, 30, 50)).astype(np.float32)
  parts = digests.OfParts(array.dtype, array.shape)
  for layer in (2, 0, 3, 1):
    other = digests.OfParts(array.dtype, array.shape)
    other.add(array[layer : layer + 1, 10:], (layer, 10))
    parts.add(array[layer : layer + 1, :10], (layer,))
    parts.add_sums(other.sums)
  assert str(parts) == digests.of_numpy(array)


@pytest.mark.parametrize(
  'mesh', [MeshConfig(data=8), MeshConfig(fsdp=4, tensor=2), MeshConfig(data=1)]
)
def test_a_mesh_does_not_change_them(mesh):
  layout = sharding.make_mesh(mesh, jax.devices()[: 1 if mesh.data == 1 else 8])
  rng = np.random.default_rng(4)
  arrays = {
    'w': rng.normal(size=(8, 16)).astype(np.float32),
    'b': rng.integers(-8, 8, (16, 8)).astype(ml_dtypes.int4),
  }
  specs = {'w': PartitionSpec('fsdp', 'tensor'), 'b': PartitionSpec(('data', 'fsdp'))}
  placed = {
    name: jax.device_put(array, NamedSharding(layout.mesh, specs[name]))
    for name, array in arrays.items()
  }
  found, infinite = digests.of_arrays({'p': placed})
  assert found == {f'p/{name}': digests.of_numpy(a) for name, a in arrays.items()}
  assert not infinite
  placed['w'] = placed['w'].at[3, 3].set(jnp.nan)
  assert digests.of_arrays({'p': placed})[1] == ['p/w']
