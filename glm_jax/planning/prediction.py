"""What a run's step will need on devices one need not have: compiled, or from shapes."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from glm_jax import configs, sharding
from glm_jax.batch import Visibility
from glm_jax.models import quantized
from glm_jax.performance import flags, flops
from glm_jax.performance.chips import Chip, of_device_kind
from glm_jax.planning import estimate, hlo, shapes
from glm_jax.training import program, state
from glm_jax.training.config import TrainConfig
from glm_jax.training.recipe import REFERENCE

GIB = 2**30


class Frozen(NamedTuple):
  """How the parameters are stored that are not trained.

  Attributes:
    dtype: of plain ones.
    quantized: bits and group of integers; None without any.
  """

  dtype: str = 'float32'
  quantized: Mapping[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a step needs and, on a TPU, how long it is predicted to take.

  Attributes:
    parameters: how many the model has.
    trained: how many of them are trained.
    devices: how many are in the mesh.
    device_kind: as JAX names it.
    mesh: axis -> devices.
    attention: the backend, and why.
    rows: how many the global batch has.
    tokens: how many the global batch has.
    memory: bytes of a device by kind: arguments, temporaries, peak, limit; from shapes, the
      kinds of `shapes.memory`, and limit. Of a stage with more programs than its step, the
      peak is that of all, and 'resident' what stays whichever of them runs.
    fits: whether the compiler accepted it, and its peak is within the limit.
    model_flops: FLOPs of a step on all devices, as `flops.training` counts them.
    compile_seconds: time for tracing, lowering and compiling.
    fingerprint: hash of the lowered step; '' from shapes, where nothing is compiled.
    estimate: the step's time; None if it does not fit, for a CPU, or from shapes.
    efficiency: what attention kernels are assumed to reach; None without one.
    visited: pairs in visited blocks over visible pairs; None without a kernel.
    card: what is known of the devices, if it is not what `device_kind` says.
    programs: of a stage that has more than its step, name -> bytes of a device at its peak,
      with what stays there beside it; see `between`.
  """

  parameters: int
  trained: int
  devices: int
  device_kind: str
  mesh: dict[str, int]
  attention: tuple[str, str]
  rows: int
  tokens: int
  memory: dict[str, int]
  fits: bool
  model_flops: float
  compile_seconds: float
  fingerprint: str
  estimate: estimate.Estimate | None
  efficiency: float | None
  visited: float | None
  card: Chip | None = None
  programs: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def chip(self) -> Chip | None:
    return self.card or of_device_kind(self.device_kind)

  @property
  def compiled(self) -> bool:
    """Whether its memory is the compiler's word."""
    return 'activations' not in self.memory

  @property
  def chips(self) -> float:
    return self.devices / (self.chip.devices_per_chip if self.chip else 1)

  @property
  def mfu(self) -> float | None:
    if self.estimate is None or self.chip is None:
      return None
    share = self.model_flops / self.devices
    return estimate.mfu(share, self.estimate.step_seconds, self.chip)

  @property
  def tokens_per_second(self) -> float | None:
    """A chip, predicted."""
    if self.estimate is None:
      return None
    return self.tokens / self.estimate.step_seconds / self.chips

  @property
  def least_seconds(self) -> float | None:
    """From shapes: no step is faster on the chip."""
    if self.compiled or self.chip is None:
      return None
    state = self.memory['parameters'] + self.memory['optimizer']
    compute = self.model_flops / self.devices / self.chip.peak_flops
    return max(compute, 2 * state / self.chip.hbm_bandwidth)

  def to_dict(self) -> dict[str, Any]:
    """As JSON."""
    extra = {'mfu': self.mfu, 'tokens_per_second_per_chip': self.tokens_per_second}
    if not self.compiled:
      extra['least_seconds'] = self.least_seconds
    if self.estimate:
      extra['step_seconds'] = self.estimate.step_seconds
      if self.chip and self.chip.calibration:
        factor, run = self.chip.calibration
        extra['calibrated'] = {'mfu': self.mfu * factor, 'factor': factor, 'run': run}
    return {**dataclasses.asdict(self), **extra}


def lower(
  config: TrainConfig, layout: sharding.Layout, stored: Frozen = Frozen()
) -> tuple[program.Program, Any]:
  """The step that `train` would run on these devices, lowered.

  Args:
    config: a run's, with its model resolved.
    layout: the mesh of the devices.
    stored: see `Frozen`.
  """
  built = build(config, layout, stored)
  # The GPU kernels ask which GPU they are traced for.
  with sharding.active(layout), jax.default_device(layout.devices.flat[0]):
    return built, built.train_step.lower(built.state, built.frozen, built.batch)


def build(config: TrainConfig, layout: sharding.Layout, stored: Frozen) -> program.Program:
  """The program, with what is not trained as it is stored."""
  built = program.build(config, layout, stored.quantized)
  flat = traverse_util.flatten_dict(built.frozen)
  for path, a in flat.items():
    as_stored = path[-1] != quantized.SCALE and path[0] != REFERENCE
    if as_stored and jnp.issubdtype(a.dtype, jnp.floating):
      flat[path] = jax.ShapeDtypeStruct(a.shape, stored.dtype, sharding=a.sharding)
  return built._replace(frozen=traverse_util.unflatten_dict(flat))


def from_shapes(
  config: TrainConfig,
  layout: sharding.Layout,
  card: Chip | None = None,
  stored: Frozen = Frozen(),
) -> Prediction:
  """The same as `predict` in seconds: nothing is compiled, and the peak is an estimate.

  The devices need only be described.
  """
  began = time.perf_counter()
  built = build(config, layout, stored)
  chip = card or of_device_kind(layout.device_kind)
  limit = chip.hbm_bytes if chip else 0
  memory = {'limit': limit, **shapes.memory(config, built, layout, stored.quantized)}
  return Prediction(
    **_facts(config, layout, built),
    memory=memory,
    fits=not limit or memory['peak'] <= limit,
    compile_seconds=time.perf_counter() - began,
    fingerprint='',
    estimate=None,
    efficiency=None,
    visited=None,
    card=card,
  )


def _facts(
  config: TrainConfig, layout: sharding.Layout, built: program.Program
) -> dict[str, Any]:
  """The fields of a `Prediction` that need no compiler."""
  rows = config.recipe.visibility(config)
  tokens, model_flops = (
    config.batch_size * of_a_row for of_a_row in config.recipe.work(config, rows)
  )
  count = state.count(built.state['params'])
  return {
    'parameters': count + program.count_frozen(built),
    'trained': count,
    'devices': layout.size,
    'device_kind': layout.device_kind,
    'mesh': layout.shape,
    'attention': built.attention,
    'rows': config.batch_size,
    'tokens': int(tokens),
    'model_flops': model_flops,
  }


def predict(
  config: TrainConfig,
  layout: sharding.Layout,
  card: Chip | None = None,
  stored: Frozen = Frozen(),
) -> Prediction:
  """Compiles the step that `train` would run on these devices.

  Args:
    config: a run's, with its model resolved.
    layout: the mesh of the devices.
    card: what is known of the devices, if it is not what their kind says.
    stored: see `Frozen`.

  Raises:
    UserError: the configuration does not fit the mesh or the chip's kernels.
  """
  began = time.perf_counter()
  built, lowered = lower(config, layout, stored)
  facts = _facts(config, layout, built)
  rows = config.recipe.visibility(config)
  kind = layout.device_kind
  chip = card or of_device_kind(kind)
  # A step that is too large is a result, too: the compiler says by how much.
  needed, compiled = compile_or_measure(lowered)
  seconds = time.perf_counter() - began
  limit = chip.hbm_bytes if chip else 0
  memory, step_time, attention = {'limit': limit}, None, None
  if compiled is None:
    memory |= dict(zip(('peak', 'limit'), needed, strict=True))
  else:
    stats = compiled.memory_analysis()
    memory |= {
      'arguments': stats.argument_size_in_bytes,
      'temporaries': stats.temp_size_in_bytes,
      'peak': peak(compiled, layout.device_kind),
    }
    if chip:
      step = hlo.read(compiled.as_text())
      attention = _attention(config, built.attention[0], rows, layout, chip)
      if chip.clock_hz:
        step_time = estimate.estimate(step, chip, attention)
      else:
        step_time = estimate.roofline(step, chip, facts['model_flops'] / layout.size)
  return Prediction(
    **facts,
    memory=memory,
    # XLA refuses what does not fit into a TPU; for a GPU it compiles anything.
    fits=compiled is not None and (not limit or memory['peak'] <= limit),
    compile_seconds=seconds,
    fingerprint=fingerprint(lowered, kind),
    estimate=step_time,
    efficiency=attention.efficiency if attention else None,
    visited=flops.visited(rows) / flops.pairs(rows) if attention else None,
    card=card,
  )


def peak(compiled: Any, device_kind: str) -> int:
  """Bytes of a device when its memory is fullest, arguments included.

  Args:
    compiled: a program.
    device_kind: that it was compiled for. A CPU's compiler leaves temporaries out of its
      peak; a TPU's peak may be less than the block that it sets aside for temporaries.
  """
  stats = compiled.memory_analysis()
  if device_kind == 'cpu':
    return stats.argument_size_in_bytes + stats.temp_size_in_bytes
  return stats.peak_memory_in_bytes


def compile_or_measure(lowered: Any) -> tuple[tuple[int, int] | None, Any]:
  """The executable; or, if it is too large, the bytes it needs and those there are."""
  try:
    return None, lowered.compile()
  except Exception as error:  # XLA's own, of several types
    needed = hlo.out_of_memory(str(error))
    if needed is None:
      raise
    configs.check(
      needed[1] >= GIB,  # no core has that much VMEM, and no chip less HBM
      f"a kernel must fit into a core's {needed[1] / 2**20:.0f} MiB of VMEM",
      f'{needed[0] / 2**20:.0f} MiB',
      'set attention to another backend',
    )
    return needed, None


def _attention(
  config: TrainConfig, backend: str, rows: Visibility, layout: sharding.Layout, chip: Chip
) -> estimate.AttentionCost | None:
  name = {'tpu_splash': 'splash', 'tpu_tokamax': 'tokamax'}.get(backend)
  if name is None:
    return None
  model = config.model
  width = model.num_heads * model.head_size / layout.count('act_heads')
  # Heads and queries are divided among devices, and blocks with the queries.
  area = flops.visited(rows) / layout.count('act_length')
  # A head that is narrower than a systolic array leaves the rest of it idle.
  filled = min(1.0, model.head_size / 128)
  return estimate.AttentionCost(
    # 2 FLOPs a multiply-add: two matmuls forward, five backward.
    forward_flops=4 * area * width,
    backward_flops=10 * area * width,
    efficiency=chip.head_efficiency[name] * filled,
  )


def fingerprint(lowered: Any, device_kind: str) -> str:
  """A hash of what a lowered step computes and of its compiler's options."""
  # A kernel's program is written out differently each time; `jax.result_info` spells the
  # names of the state's tree, which compute nothing.
  named = r'backend_config = "[^"]*"|jax\.result_info = "[^"]*"'
  text = re.sub(named, '', lowered.as_text())
  text += str(sorted(flags.compiler_options(device_kind).items()))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_fits(prediction: Prediction) -> None:
  """Raises UserError if a program does not fit, by how much."""
  peak, limit = prediction.memory['peak'], prediction.memory['limit']
  about = '' if prediction.compiled else '~'
  programs = prediction.programs
  largest = max(programs, key=programs.get) if programs else 'step'
  configs.check(
    prediction.fits or largest == 'step',
    f'{largest} must fit into {limit / GIB:.2f} GiB a device, with what stays beside it',
    f'{about}{peak / GIB:.2f} GiB, {about}{(peak - limit) / GIB:.2f} too many',
    "answer fewer questions at a time (the recipe's decoding_rows), read fewer rows "
    '(TrainConfig.microbatches), or use more fsdp or adapters (gin_configs/runs/lora.gin)',
  )
  configs.check(
    prediction.fits,
    f'the step must fit into {limit / GIB:.2f} GiB a device',
    f'{about}{peak / GIB:.2f} GiB, {about}{(peak - limit) / GIB:.2f} too many',
    'see what fits with --suggest: fewer rows, more remat or fsdp, or '
    'LossConfig.vocab_chunks=8; of a released model, train adapters '
    '(gin_configs/runs/lora.gin), on integers too (--bits=4), or a part '
    '(TrainConfig.trained)',
  )
