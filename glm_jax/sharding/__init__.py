"""The mesh and its rules, arrays on it, and functions on each device's part."""

from glm_jax.sharding.arrays import (
  batch_sharding,
  place,
  place_whole,
  replicated,
  row_share,
  shardings,
)
from glm_jax.sharding.devices import (
  alone,
  axes_of,
  axis_size,
  gather_length,
  per_device,
  spread,
  unspread,
)
from glm_jax.sharding.mesh import (
  AXES,
  RULES,
  Layout,
  MeshConfig,
  active,
  check_fits,
  make_mesh,
)

__all__ = [
  'AXES',
  'RULES',
  'Layout',
  'MeshConfig',
  'active',
  'alone',
  'axes_of',
  'axis_size',
  'batch_sharding',
  'check_fits',
  'gather_length',
  'make_mesh',
  'per_device',
  'place',
  'place_whole',
  'replicated',
  'row_share',
  'shardings',
  'spread',
  'unspread',
]
