"""Devices one need not have: the TPU and GPU topologies that XLA compiles for.

libtpu describes a TPU slice, and XLA's GPU compiler a set of hosts, on any machine.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.performance.chips import CHIPS

# Some that libtpu knows: a host, a middle size, the largest of a pod.
KNOWN = {
  'v4': ('v4:2x2x1', 'v4:4x4x4', 'v4:8x8x16', 'v4:12x16x16'),
  'v5e': ('v5e:1x1', 'v5e:2x4', 'v5e:4x4', 'v5e:8x16', 'v5e:16x16'),
  'v5p': ('v5p:2x2x1', 'v5p:4x4x4', 'v5p:4x4x8', 'v5p:8x16x16', 'v5p:16x16x16'),
  'v6e': ('v6e:1x1', 'v6e:2x4', 'v6e:4x4', 'v6e:8x16', 'v6e:16x16'),
  'tpu7x': ('tpu7x:2x2x1', 'tpu7x:4x4x4', 'tpu7x:4x4x8', 'tpu7x:8x8x8'),
  'a100-40': ('a100-40:1x1x1', 'a100-40:1x1x8'),
  'a100-80': ('a100-80:1x1x1', 'a100-80:1x4x8'),
  'h100': ('h100:1x1x1', 'h100:1x1x8', 'h100:1x4x8'),
  'h200': ('h200:1x1x1', 'h200:1x4x8'),
  'rtx4090': ('rtx4090:1x1x1', 'rtx4090:1x1x2'),
}


class _Gpu(NamedTuple):
  """What XLA's GPU compiler asks of a card; NVIDIA's data sheets and tuning guides.

  Attributes:
    capability: of CUDA, as (major, minor).
    cores: multiprocessors.
    fpus: float32 units of each.
    threads: most that one has at a time.
    shared: bytes of its shared memory.
    l2: bytes of the cache of all.
    clock: GHz, boosted.
    memory: bytes that the driver reports.
    bandwidth: bytes/s.
  """

  capability: tuple[int, int]
  cores: int
  fpus: int
  threads: int
  shared: int
  l2: int
  clock: float
  memory: int
  bandwidth: int


_A100 = _Gpu((8, 0), 108, 64, 2048, 167936, 41943040, 1.41, 85100068864, 2039040000000)
_H100 = _Gpu((9, 0), 132, 128, 2048, 233472, 52428800, 1.98, 84942979072, 3352320000000)
_GPUS = {
  'a100-40': _A100._replace(memory=42331013120, bandwidth=1555200000000),
  'a100-80': _A100,
  'h100': _H100,
  'h200': _H100._replace(memory=151397597184, bandwidth=4800000000000),
  'rtx4090': _Gpu(
    (8, 9), 128, 128, 1536, 102400, 75497472, 2.52, 25393692672, 1008096000000
  ),
}

# XLA's description of a GPU to compile for (fields of its GpuTargetConfigProto).
_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {gpu.l2}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  shared_memory_per_block_optin: {optin}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Described:
  """A GPU as a mesh and the choice of kernels know it: what a plan from shapes needs."""

  id: int
  device_kind: str
  compute_capability: str
  platform: str = 'gpu'
  process_index: int = 0


def prepare_environment() -> None:
  """Lets libtpu be loaded on a machine without a TPU; precedes the first use of JAX."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  # libtpu would lock the chips of this machine, and ask the metadata server of a cloud VM
  # about them.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_MIN_LOG_LEVEL', '3')


def kind_of(name: str) -> str:
  """The kind of chip in KIND:SHAPE, a key of `CHIPS`.

  Raises:
    UserError: an unknown kind, or no shape.

  Example:
    >>> kind_of('rtx4090:1x1x1')
    'rtx4090'
  """
  kind, _, shape = name.partition(':')
  configs.check(
    kind in KNOWN and re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape) is not None,
    '--topology must be KIND:SHAPE of a kind among ' + ', '.join(KNOWN),
    repr(name),
    'use such as '
    + ', '.join(names[-1] for names in KNOWN.values())
    + ', or the nearest kind with --memory_gib, --peak_tflops and --bandwidth_gbs',
  )
  return kind


def devices(name: str, slices: int = 1, *, compiler: bool = True) -> list[Any]:
  """The devices of a topology.

  Args:
    name: such as 'v5p:4x4x8', or 'h100:1x4x8' (partitions, hosts, devices a host).
    slices: of that shape, joined by the data-center network.
    compiler: whether to compile for them. GPUs need none to be described; TPUs, whose
      network libtpu knows, do.

  Raises:
    UserError: a topology that the compiler does not know, or a compiler that is not
      installed.
  """
  kind, shape = kind_of(name), name.partition(':')[2]
  configs.check(slices >= 1, '--slices must be 1 or more', str(slices), 'give 1 or more')
  gpu = _GPUS.get(kind)
  if gpu:
    configs.check(slices == 1, 'GPUs have no slices', str(slices), 'leave --slices out')
    if not compiler:
      return _described(name, gpu)
  compiler_name, package, install = (
    ('GPU', 'jax_cuda12_plugin', "pip install 'jax[cuda12]'")
    if gpu
    else ('TPU', 'libtpu', 'pip install libtpu')
  )
  configs.check(
    importlib.util.find_spec(package) is not None,
    f'--topology={name} must have the {compiler_name} compiler installed',
    f'no package {package}',
    install,
  )
  if gpu:
    options: dict[str, Any] = {
      'platform': 'cuda',
      'topology_name': kind,
      'target_config': _TARGET.format(
        gpu=gpu, optin=gpu.shared - 1024, name=CHIPS[kind].device_kinds[0]
      ),
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


def _described(name: str, gpu: _Gpu) -> list[Described]:
  kind, _, shape = name.partition(':')
  sizes = [int(size) for size in shape.split('x')]
  configs.check(
    len(sizes) == 3,
    "a GPU's --topology must be KIND:PARTITIONSxHOSTSxDEVICES",
    repr(name),
    f'use such as {", ".join(KNOWN[kind])}',
  )
  capability = '{}.{}'.format(*gpu.capability)
  return [
    Described(i, CHIPS[kind].device_kinds[0], capability) for i in range(math.prod(sizes))
  ]
