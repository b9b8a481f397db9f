"""Step time from the text of a compiled step, without running it.

TensorCore, attention and exposed collectives add up. Against public runs of MaxText the
sum was too long (`Chip.calibration`).
"""

from __future__ import annotations

import collections
import dataclasses

from glm_jax import configs
from glm_jax.performance.chips import Chip
from glm_jax.planning import hlo

# The compiler's cost model asks 2.5-2.8 times the HBM roofline for elementwise work (six
# compiles each for v5e, v5p, v6e); real kernels come within some 15 % of the roofline.
_ELEMENTWISE_EXCESS = 2.6
_ROOFLINE_SLACK = 1.15


@dataclasses.dataclass(frozen=True)
class AttentionCost:
  """What one call of the attention kernels computes on one device, in FLOPs.

  Visited blocks count whole; a call is one row of the batch in one layer.

  Attributes:
    forward_flops: two matmuls.
    backward_flops: five matmuls, those of the fused backward; of seven where dq is a
      kernel of its own, dkv does four and dq three of the same size.
    efficiency: of `Chip.peak_flops`, such as `chip.head_efficiency['splash']`.
  """

  forward_flops: float
  backward_flops: float
  efficiency: float


@dataclasses.dataclass(frozen=True)
class Traffic:
  """The collectives of one kind in a step.

  Attributes:
    count: how often they run.
    bytes: size of the whole arrays (`Collective.bytes`), over all runs.
    overlapped_bytes: the part of `bytes` that other work may hide.
    exposed_seconds: time that nothing hides.
  """

  count: int
  bytes: int
  overlapped_bytes: int
  exposed_seconds: float


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Predicted seconds of a step on each device, uncalibrated.

  Attributes:
    tensorcore_seconds: all but attention kernels; on GPU the roofline.
    attention_seconds: the attention kernels.
    exposed_collective_seconds: collectives that no work hides.
    traffic: by kind of collective.
    attention_calls: runs of the 'fwd', 'dkv' and 'dq' kernels.
    unknown_loops: loops counted once since the text does not say how often they run.
  """

  tensorcore_seconds: float
  attention_seconds: float
  exposed_collective_seconds: float
  traffic: dict[str, Traffic]
  attention_calls: dict[str, int]
  unknown_loops: tuple[str, ...]

  @property
  def step_seconds(self) -> float:
    return (
      self.tensorcore_seconds + self.attention_seconds + self.exposed_collective_seconds
    )


def estimate(
  step: hlo.Step, chip: Chip, attention: AttentionCost | None = None
) -> Estimate:
  """Step time on a TPU from the compiler's cycles.

  - TensorCore: sum of trips x cycles / clock; for fusions without a matmul instead
    `min(cycles, max(cycles / 2.6, 1.15 x HBM bytes / HBM rate))`.
  - AttentionCost (Pallas kernels, of which the compiler knows no cycles): FLOPs x calls /
    (peak x efficiency). Other Pallas kernels count nothing.
  - Collectives: `Collective.wire_bytes` / (rate of a torus axis x axes used). Overlapped
    ones count only above the other two in the same computation.

  Args:
    step: what the compiled text says.
    chip: a TPU.
    attention: FLOPs of the Splash kernels; needed if `step` calls one.

  Raises:
    UserError: no clock is known for the chip, or attention's FLOPs are missing.
  """
  clock = chip.clock_hz
  configs.check(
    clock is not None,
    'An estimate from cycles needs a TPU',
    str(chip.device_kinds),
    'use roofline()',
  )
  assert clock is not None
  calls = attention_calls(step)
  configs.check(
    attention is not None or not calls,
    'An estimate needs the FLOPs of attention where its kernels are called',
    f'none for {calls}',
    'pass attention',
  )
  # 1. Work, by computation: a collective can only hide behind what its own one does.
  core: dict[str, float] = collections.defaultdict(float)
  for op in step.ops:
    core[op.computation] += op.trips * _op_seconds(op, clock, chip.hbm_bandwidth)
  # 2. Attention kernels, whose cost the compiler does not know.
  kernel: dict[str, float] = collections.defaultdict(float)
  if attention is not None:
    # `backward_flops` is that of five matmuls. Apart, both kernels compute q k^T and
    # dO v^T: dkv has four matmuls then, and dq three.
    unfused = 'dq' in calls
    flops = {
      'fwd': attention.forward_flops,
      'dkv': attention.backward_flops * (4 / 5 if unfused else 1),
      'dq': attention.backward_flops * 3 / 5,
    }
    rate = chip.peak_flops * attention.efficiency
    for call in step.kernels:
      if part := _attention_part(call):
        kernel[call.computation] += call.trips * flops[part] / rate
  # 3. Collectives, beside the work that may hide them.
  busy = {name: core[name] + kernel[name] for name in {*core, *kernel}}
  traffic = _traffic(step, chip, busy)
  return Estimate(
    tensorcore_seconds=sum(core.values()),
    attention_seconds=sum(kernel.values()),
    exposed_collective_seconds=sum(t.exposed_seconds for t in traffic.values()),
    traffic=traffic,
    attention_calls=calls,
    unknown_loops=step.unknown_loops,
  )


def roofline(step: hlo.Step, chip: Chip, flops: float) -> Estimate:
  """A lower bound of the step time where the compiler estimates no cycles (GPU).

  `max(flops / peak, HBM bytes / HBM rate)` + exposed collectives; overlapped ones count
  above the computation's share of that time by its HBM bytes.

  Args:
    step: what the compiled text says.
    chip: that it was compiled for.
    flops: of one device in one step, without recomputation.
  """
  # Without cycles, HBM traffic tells how the time is spread over computations.
  moved: dict[str, float] = collections.defaultdict(float)
  for op in step.ops:
    moved[op.computation] += op.trips * (op.output_bytes + op.operand_bytes)
  total = sum(moved.values())
  seconds = max(flops / chip.peak_flops, total / chip.hbm_bandwidth)
  busy = {name: seconds * share / total for name, share in moved.items() if share}
  traffic = _traffic(step, chip, busy)
  return Estimate(
    tensorcore_seconds=seconds,
    attention_seconds=0.0,
    exposed_collective_seconds=sum(t.exposed_seconds for t in traffic.values()),
    traffic=traffic,
    attention_calls=attention_calls(step),
    unknown_loops=step.unknown_loops,
  )


def mfu(model_flops_per_device: float, step_seconds: float, chip: Chip) -> float:
  """Model FLOPs utilisation: model FLOPs / (seconds x peak).

  Args:
    model_flops_per_device: of a step, without recomputation, visible pairs only.
    step_seconds: measured or predicted.
    chip: of each device.

  Example:
    >>> from glm_jax.performance.chips import CHIPS
    >>> mfu(98.5e12, 1.0, CHIPS['v5e'])
    0.5
  """
  return model_flops_per_device / (step_seconds * chip.peak_flops)


def attention_calls(step: hlo.Step) -> dict[str, int]:
  """Runs in a step of Splash's 'fwd', 'dkv' and 'dq' kernels, recomputed ones included.

  Stock and tokamax kernels alike are called `splash_mha_fwd_residuals`,
  `splash_mqa_dkv_no_residuals`, ...; a fused backward is 'dkv' alone.
  """
  calls: dict[str, int] = collections.Counter()
  for call in step.kernels:
    if part := _attention_part(call):
      calls[part] += call.trips
  return dict(calls)


def _attention_part(kernel: hlo.Kernel) -> str | None:
  if 'splash' not in kernel.name:
    return None
  return next((part for part in ('fwd', 'dkv', 'dq') if part in kernel.name), None)


def _op_seconds(op: hlo.Op, clock: float, bandwidth: float) -> float:
  """Seconds of one run.

  Whole arrays count even where a fusion reads a slice, and ops outside of fusions keep
  their cycles: the calibration runs were counted so.
  """
  seconds = op.cycles / clock
  if op.has_matmul or op.opcode != 'fusion':
    return seconds
  memory = op.array_bytes / bandwidth
  return min(seconds, max(seconds / _ELEMENTWISE_EXCESS, _ROOFLINE_SLACK * memory))


def _traffic(step: hlo.Step, chip: Chip, busy: dict[str, float]) -> dict[str, Traffic]:
  """The collectives by kind; `busy` holds each computation's seconds of work, all runs."""

  def seconds(c: hlo.Collective) -> float:
    return c.trips * c.wire_bytes / (chip.ici_bandwidth * c.torus_dims)

  # Overlapped collectives of a computation run at the same time as its work: what does not
  # fit into that is exposed.
  hidden: dict[str, float] = collections.defaultdict(float)
  for c in step.collectives:
    if c.overlapped:
      hidden[c.computation] += seconds(c)
  # What exceeds the work is shared out among the collectives in proportion.
  excess = {
    name: max(0.0, 1 - busy.get(name, 0.0) / total)
    for name, total in hidden.items()
    if total
  }
  traffic: dict[str, Traffic] = {}
  for c in step.collectives:
    exposed = seconds(c) * (excess.get(c.computation, 0.0) if c.overlapped else 1)
    old = traffic.get(c.kind, Traffic(0, 0, 0, 0.0))
    traffic[c.kind] = Traffic(
      count=old.count + c.trips,
      bytes=old.bytes + c.trips * c.bytes,
      overlapped_bytes=old.overlapped_bytes + c.trips * c.bytes * c.overlapped,
      exposed_seconds=old.exposed_seconds + exposed,
    )
  return traffic
