"""Tries meshes, rows a device and remat policies, and keeps the fastest that fits.

A rough count of FLOPs, memory and traffic orders the candidates; the compiler judges the
best of them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from glm_jax import attention, configs, sharding
from glm_jax.configs import UserError
from glm_jax.performance import flops
from glm_jax.performance.chips import Chip, of_device_kind
from glm_jax.planning import between, prediction, shapes
from glm_jax.planning.prediction import GIB, Prediction
from glm_jax.training import program, state
from glm_jax.training.config import TrainConfig

# From this length on, a row's tokens may be spread over devices.
_LONG_ROW = 16384


class Candidate(NamedTuple):
  """One way to run a step."""

  fsdp: int
  sequence: int
  tensor: int
  # Of each group of sequence * tensor devices, in one micro-batch.
  rows: int
  remat: str


def best(
  config: TrainConfig,
  devices: list[Any],
  trials: int,
  say: Callable[..., None],
  card: Chip | None = None,
  stored: prediction.Frozen = prediction.Frozen(),
) -> tuple[Prediction, Any]:
  """Compiles the most promising candidates.

  Args:
    config: a run's, with its model resolved.
    devices: those of the topology.
    trials: how many to compile.
    say: prints a line for each.
    card: what is known of the devices, if it is not what their kind says.
    stored: see `prediction.Frozen`.

  Returns:
    The prediction with the most tokens a second, and its configuration.

  Raises:
    UserError: no candidate fits.
  """
  chip = card or of_device_kind(devices[0].device_kind)
  configs.check(
    chip is not None,
    '--suggest must know the memory and speed of the chip',
    devices[0].device_kind,
    'give it a --topology',
  )
  configs.check(trials >= 1, '--trials must be 1 or more', str(trials), 'give 1 or more')
  # The rough model only orders: the compiler is asked about the most promising ones.
  needs = _needs(config, devices[0], stored)
  ranked = sorted(
    (c for c in _candidates(config, len(devices)) if needs(c) < chip.hbm_bytes),
    key=lambda c: _seconds_a_token(c, config, chip),
  )
  fitting: list[tuple[Prediction, Any]] = []
  tried = 0
  for candidate in ranked:
    if tried == trials:
      break
    try:
      changed = apply(config, candidate, len(devices))
      layout = sharding.make_mesh(changed.mesh, devices)
      sharding.check_fits(
        changed.model,
        changed.batch_size,
        changed.microbatches,
        changed.recipe.length,
        layout,
      )
    except UserError:
      # What does not divide is no candidate, and costs no trial.
      continue
    tried += 1
    result = between.predict(changed, layout, card, stored)
    say(f'{tried:>3}/{trials}  {_words(candidate)}: {_outcome(result)}', flush=True)
    if result.fits:
      fitting.append((result, changed))
  configs.check(
    bool(fitting),
    f'the model must fit {len(devices)} x {devices[0].device_kind}',
    f'{tried} candidates, none of which does',
    'use more or larger chips, or more --trials',
  )
  winner = max(fitting, key=lambda pair: pair[0].tokens_per_second or 0)
  say(f'\nthe best of them:\n  {bindings(config, winner[1])}\n')
  return winner


def bindings(original: Any, config: TrainConfig) -> str:
  """The flags that make a suggested configuration of the original one."""
  before = original.mesh.sizes
  return ' '.join(
    [
      f'--gin.MeshConfig.{axis}={size}'
      for axis, size in config.mesh.sizes.items()
      if size != before[axis]
    ]
    + [
      f'--gin.BATCH_SIZE={config.batch_size}',
      f'--gin.ComputeConfig.remat="\'{config.compute.remat}\'"',
    ]
  )


def apply(config: TrainConfig, candidate: Candidate, devices: int) -> Any:
  """The configuration, run that way: the batch is what its devices hold."""
  c = candidate
  mesh = dataclasses.replace(
    config.mesh, data=-1, fsdp=c.fsdp, sequence=c.sequence, tensor=c.tensor
  )
  return dataclasses.replace(
    config,
    mesh=mesh,
    batch_size=c.rows * devices // (c.sequence * c.tensor) * config.microbatches,
    compute=dataclasses.replace(config.compute, remat=c.remat),
  )


def _candidates(config: TrainConfig, devices: int) -> Iterator[Candidate]:
  powers = [2**i for i in range(14) if devices % 2**i == 0]
  long = config.recipe.length >= _LONG_ROW
  for fsdp, tensor, sequence, rows, remat in itertools.product(
    powers, (1, 2, 4, 8), (1, 2, 4, 8) if long else (1,), (1, 2, 4, 8), _RECOMPUTED
  ):
    if devices % (fsdp * tensor * sequence) == 0:
      yield Candidate(fsdp, sequence, tensor, rows, remat)


# Share of the forward pass that is computed again.
_RECOMPUTED = {
  'projections': 0.05,
  'attention_qkv': 0.75,
  'attention': 0.85,
  'full': 1.0,
}


def _needs(
  config: TrainConfig, device: Any, stored: prediction.Frozen
) -> Callable[[Candidate], float]:
  """Roughly, the bytes of a device that a candidate needs; see `shapes`."""
  m = config.model
  backend, _ = attention.choose(m, config.compute, device, config.recipe.length)
  # Embedding and head count apart: they are not gathered layer by layer.
  weights = flops.matmul_weights(m) + m.hidden_size * m.vocab_size
  trained, frozen = weights, 0.0
  if config.in_part or config.recipe.reference:
    params, others = program.parts(config, None, stored.quantized)
    trained = state.count(params)
    bits = 8 * np.dtype(stored.dtype).itemsize
    if stored.quantized:
      bits = stored.quantized['bits']
    frozen = bits / 8 * state.count(others)
  size = np.dtype(config.compute.dtype).itemsize

  @functools.cache
  def rows(remat: str) -> shapes.Rows:
    compute = dataclasses.replace(config.compute, remat=remat)
    changed = dataclasses.replace(config, compute=compute)
    return shapes.rows(changed, backend, stored.quantized)

  def needs(c: Candidate) -> float:
    parts = c.fsdp * c.tensor
    # In float32: weights and two moments. As computed with: weights and gradients.
    gradients = size * trained / parts
    held = (12 * trained + frozen) / parts + gradients
    count = c.rows / c.sequence
    whole = shapes.gathered(config, c.tensor) if c.fsdp > 1 else (0.0, 0.0)
    return held + shapes.at_work(rows(c.remat), count, c.tensor, gradients, 0.0, whole)

  return needs


def _seconds_a_token(c: Candidate, config: TrainConfig, chip: Chip) -> float:
  m = config.model
  weights = flops.matmul_weights(m)
  tokens = c.rows * config.recipe.length / c.sequence
  # 2 FLOPs a weight: forward, twice in the backward pass, and what is computed again.
  compute = 2 * weights * (3 + _RECOMPUTED[c.remat]) / c.tensor / chip.peak_flops
  # Weights move three times a step (half of it hidden), sums over tensor eight times a
  # layer, keys and values of other devices four times.
  moved = 3 * 2 * weights / c.tensor / tokens if c.fsdp > 1 else 0.0
  if c.tensor > 1:
    moved += 8 * 2 * 2 * m.num_layers * m.hidden_size
  if c.sequence > 1:
    moved += 4 * 2 * 2 * m.num_layers * m.num_kv_heads * m.head_size * c.sequence
  # A gather over many devices has more, smaller parts.
  spread = 1 + 0.1 * max(0, c.fsdp // 16 - 1)
  seconds = compute + 0.5 * spread * moved / chip.ici_bandwidth
  # Once a step, however many tokens it has, weights and moments are read and written.
  seconds += 2 * 12 * weights / (c.fsdp * c.tensor) / chip.hbm_bandwidth / tokens
  # A token that several devices share is as slow as on each of them, and occupies all.
  return seconds * c.tensor * c.sequence


def _words(c: Candidate) -> str:
  axes = [f'{n} {getattr(c, n)}' for n in ('fsdp', 'sequence', 'tensor')]
  return f'{", ".join(axes)}, {c.rows} rows, remat {c.remat}'


def _outcome(p: Prediction) -> str:
  peak = p.memory['peak'] / GIB
  if not p.fits:
    return f'{peak:.1f} GiB, does not fit'
  speed = f'{p.tokens_per_second:,.0f} tokens/s a chip, MFU {p.mfu:.1%}'
  return f'{peak:.1f} GiB, {speed}'
