"""Accelerators as JAX sees them: peak, memory, links."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

_GIB = 2**30
# Written by `python -m benchmarks.calibration`.
_CALIBRATION = Path(__file__).with_name('calibration.json')


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device, which is a chip or, on tpu7x, half of one.

  Attributes:
    device_kinds: what `jax.Device.device_kind` says.
    peak_flops: dense bfloat16 FLOP/s.
    hbm_bytes: memory a program may take; on TPU the compiler's own limit, which its
      refusal of a program that is too large names ("exceeds available HBM (31.25G)"); on
      GPU the data sheet's GB of 10**9 bytes, some 5 % below what a driver reports, of
      which CUDA's context takes its part.
    hbm_bandwidth: bytes/s.
    ici_bandwidth: bytes/s received along one torus axis, links of both directions
      together (public chip pages, not measured); on GPU the NVLink of one device, or its
      PCIe.
    clock_hz: of a TensorCore, peak / (MXU FLOPs a cycle); None where the compiler
      estimates no cycles.
    devices_per_chip: JAX devices on one chip.
    head_efficiency: by kernel ('splash', 'tokamax'), the assumed ratio of attention's
      FLOP/s in visited blocks to `peak_flops`, head size 128. From the static cycles of
      the kernels; on v4, and for stock Splash on tpu7x, from their nearest relative. On
      v4/v5p the backward kernels must keep both cores busy (KV heads vmapped).
  """

  device_kinds: tuple[str, ...]
  peak_flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  ici_bandwidth: float
  clock_hz: float | None = None
  devices_per_chip: int = 1
  head_efficiency: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def calibration(self) -> tuple[float, str] | None:
    """(measured / predicted tokens/s, the public run of it); None where there is none."""
    pairs = [pair for name, pair in calibrations().items() if CHIPS.get(name) is self]
    return pairs[0] if pairs else None


# TPU: peak and HBM rate from `jax._src.pallas.mosaic.tpu_info` and the public chip pages,
# HBM limits from libtpu 0.0.42.1. GPU: NVIDIA's data sheets.
CHIPS: dict[str, Chip] = {
  'v4': Chip(
    device_kinds=('TPU v4',),
    peak_flops=275e12,
    # 15.25 a core.
    hbm_bytes=int(30.5 * _GIB),
    hbm_bandwidth=1230e9,
    ici_bandwidth=90e9,
    clock_hz=1.05e9,
    head_efficiency={'splash': 0.85, 'tokamax': 0.85},
  ),
  'v5e': Chip(
    device_kinds=('TPU v5 lite', 'TPU v5e'),
    peak_flops=197e12,
    hbm_bytes=int(15.75 * _GIB),
    hbm_bandwidth=820e9,
    ici_bandwidth=90e9,
    clock_hz=1.5e9,
    head_efficiency={'splash': 0.85, 'tokamax': 0.85},
  ),
  'v5p': Chip(
    device_kinds=('TPU v5', 'TPU v5p'),
    peak_flops=459e12,
    hbm_bytes=int(95.74 * _GIB),
    hbm_bandwidth=2765e9,
    ici_bandwidth=180e9,
    clock_hz=1.75e9,
    head_efficiency={'splash': 0.85, 'tokamax': 0.85},
  ),
  'v6e': Chip(
    device_kinds=('TPU v6 lite', 'TPU v6e'),
    peak_flops=918e12,
    hbm_bytes=int(31.25 * _GIB),
    hbm_bandwidth=1640e9,
    ici_bandwidth=180e9,
    clock_hz=1.75e9,
    head_efficiency={'splash': 0.34, 'tokamax': 0.37},
  ),
  'tpu7x': Chip(
    device_kinds=('TPU7x',),
    # A JAX device is one of a chip's two halves, each with its own HBM.
    peak_flops=2307e12 / 2,
    hbm_bytes=int(94.75 * _GIB),
    hbm_bandwidth=7380e9 / 2,
    ici_bandwidth=200e9,
    clock_hz=2.2e9,
    devices_per_chip=2,
    head_efficiency={'splash': 0.35, 'tokamax': 0.39},
  ),
  'h100': Chip(
    device_kinds=('NVIDIA H100 80GB HBM3',),
    peak_flops=989e12,
    hbm_bytes=80 * 10**9,
    hbm_bandwidth=3350e9,
    ici_bandwidth=450e9,
  ),
  'h200': Chip(
    device_kinds=('NVIDIA H200',),
    peak_flops=989e12,
    hbm_bytes=141 * 10**9,
    hbm_bandwidth=4800e9,
    ici_bandwidth=450e9,
  ),
  'a100-80': Chip(
    # The PCIe cards compute as fast; their memory has 1,935 GB/s.
    device_kinds=('NVIDIA A100-SXM4-80GB', 'NVIDIA A100 80GB PCIe'),
    peak_flops=312e12,
    hbm_bytes=80 * 10**9,
    hbm_bandwidth=2039e9,
    ici_bandwidth=300e9,
  ),
  'a100-40': Chip(
    device_kinds=('NVIDIA A100-SXM4-40GB', 'NVIDIA A100-PCIE-40GB'),
    peak_flops=312e12,
    hbm_bytes=40 * 10**9,
    hbm_bandwidth=1555e9,
    ici_bandwidth=300e9,
  ),
  'rtx4090': Chip(
    device_kinds=('NVIDIA GeForce RTX 4090',),
    # With sums in float32, as ours are: half of what it does with sums in float16.
    peak_flops=165.2e12,
    hbm_bytes=24 * 10**9,
    hbm_bandwidth=1008e9,
    # It has no NVLink: PCIe 4.0 x16.
    ici_bandwidth=32e9,
  ),
}


def calibrations() -> dict[str, tuple[float, str]]:
  """chip -> (measured / predicted tokens/s, the public run of it).

  Example:
    >>> sorted(calibrations())
    ['v5e', 'v5p', 'v6e']
  """
  runs = json.loads(_CALIBRATION.read_text(encoding='utf-8'))
  return {k: (r['measured'] / r['predicted'], r['run']) for k, r in runs.items()}


def of_device_kind(kind: str) -> Chip | None:
  """The chip of `jax.Device.device_kind`; None for an unknown one, such as a CPU.

  Example:
    >>> of_device_kind('TPU v5 lite') is CHIPS['v5e']
    True
    >>> of_device_kind('cpu') is None
    True
  """
  for chip in CHIPS.values():
    if kind in chip.device_kinds:
      return chip
  return None
