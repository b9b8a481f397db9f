"""Devices one need not have: the TPU and GPU topologies that XLA compiles for.

libtpu describes a TPU slice, and XLA's GPU compiler a set of hosts, on any machine.
"""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Any

from glm_jax import configs
from glm_jax.configs import UserError

# Some that libtpu knows: a host, a middle size, the largest of a pod.
KNOWN = {
  'v4': ('v4:2x2x1', 'v4:4x4x4', 'v4:8x8x16', 'v4:12x16x16'),
  'v5e': ('v5e:1x1', 'v5e:2x4', 'v5e:4x4', 'v5e:8x16', 'v5e:16x16'),
  'v5p': ('v5p:2x2x1', 'v5p:4x4x4', 'v5p:4x4x8', 'v5p:8x16x16', 'v5p:16x16x16'),
  'v6e': ('v6e:1x1', 'v6e:2x4', 'v6e:4x4', 'v6e:8x16', 'v6e:16x16'),
  'tpu7x': ('tpu7x:2x2x1', 'tpu7x:4x4x4', 'tpu7x:4x4x8', 'tpu7x:8x8x8'),
  'h100': ('h100:1x1x8', 'h100:1x4x8'),
}

# XLA's description of a GPU to compile for (fields of its GpuTargetConfigProto, numbers of
# NVIDIA's data sheet).
_GPU_TARGETS = {
  'h100': """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
""",
}


def prepare_environment() -> None:
  """Lets libtpu be loaded on a machine without a TPU; precedes the first use of JAX."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  # libtpu would lock the chips of this machine, and ask the metadata server of a cloud VM
  # about them.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_MIN_LOG_LEVEL', '3')


def devices(name: str, slices: int = 1) -> list[Any]:
  """The devices of a topology.

  Args:
    name: such as 'v5p:4x4x8', or 'h100:1x4x8' (partitions, hosts, devices a host).
    slices: of that shape, joined by the data-center network.

  Raises:
    UserError: a topology that the compiler does not know, or a compiler that is not
      installed.
  """
  kind, _, shape = name.partition(':')
  configs.check(
    kind in KNOWN and re.fullmatch(r'\d+(x\d+)*', shape) is not None,
    '--topology must be KIND:SHAPE of a kind among ' + ', '.join(KNOWN),
    repr(name),
    'use such as ' + ', '.join(names[-1] for names in KNOWN.values()),
  )
  configs.check(slices >= 1, '--slices must be 1 or more', str(slices), 'give 1 or more')
  compiler, package, install = (
    ('GPU', 'jax_cuda12_plugin', "pip install 'jax[cuda12]'")
    if kind in _GPU_TARGETS
    else ('TPU', 'libtpu', 'pip install libtpu')
  )
  configs.check(
    importlib.util.find_spec(package) is not None,
    f'--topology={name} must have the {compiler} compiler installed',
    f'no package {package}',
    install,
  )
  if kind in _GPU_TARGETS:
    configs.check(slices == 1, 'GPUs have no slices', str(slices), 'leave --slices out')
    options: dict[str, Any] = {
      'platform': 'cuda',
      'topology_name': kind,
      'target_config': _GPU_TARGETS[kind],
      'topology': shape,
    }
  else:
    options = {'platform': 'tpu', 'topology_name': name}
    if slices > 1:
      options['num_slices'] = slices
    if kind == 'v4':
      # Both cores of a chip are one device, as JAX shows them on a real v4 host.
      options['chip_config_name'] = 'megacore'
    if shape == '1x1':
      # A host of a single chip: libtpu takes hosts to have more.
      options['chips_per_host_bounds'] = (1, 1, 1)
  # Imported here: `prepare_environment` must come before JAX.
  from jax.experimental import topologies

  try:
    return list(topologies.get_topology_desc(**options).devices)
  except Exception as error:  # of several types, by version
    text = ' '.join(str(error).split())[:200]
    raise UserError(
      f'--topology must be one that the compiler knows, got {name!r} ({text}); use such '
      f'as {", ".join(KNOWN[kind])}.'
    ) from error
