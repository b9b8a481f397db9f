"""How fast a run is, and what it has taken: tokens, FLOPs, waiting, memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from glm_jax.performance import chips

_GIB = 2**30


class Meter:
  """Speed since the last report, and sums over the whole run."""

  def __init__(
    self,
    step: int,
    total_steps: int,
    so_far: Mapping[str, float] | None = None,
    waited: Callable[[float], None] = lambda seconds: None,
  ):
    """
    Args:
      step: the first step.
      total_steps: of the run.
      so_far: `so_far` at that step; None for a new run, {} where nobody counted.
      waited: is told of seconds that devices waited for data.
    """
    self._so_far = {'tokens': 0, 'flops': 0.0} if so_far is None else dict(so_far)
    self._step, self._total, self._tell = step, total_steps, waited
    self._seconds, self._tokens, self._flops, self._waited = 0.0, 0.0, 0.0, 0.0
    self._since = time.perf_counter()

  def restart(self) -> None:
    """Begins to count; called after compilation, validation and saving."""
    self._since = time.perf_counter()

  def stop(self) -> None:
    self._seconds += time.perf_counter() - self._since

  def count(self, tokens: float, flops: float) -> None:
    """Adds one step's work (all processes)."""
    self._tokens += tokens
    self._flops += flops
    if self._so_far:
      self._so_far['tokens'] += round(tokens)
      self._so_far['flops'] += flops

  @property
  def so_far(self) -> dict[str, float]:
    """tokens and flops of all steps of the run; {} if some were not counted."""
    return dict(self._so_far)

  def taken(self) -> dict[str, float]:
    """The same as metrics, and peak_memory_gib, of this process's fullest device so far,
    where devices tell it."""
    values = {f'{name}_so_far': value for name, value in self._so_far.items()}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s['peak_bytes_in_use'] for s in stats if 'peak_bytes_in_use' in s]
    return {**values, **({'peak_memory_gib': max(peaks) / _GIB} if peaks else {})}

  def wait_for(
    self, stream: Callable[[Any], Any], state: Any, running: Sequence[Any] = ()
  ) -> Any:
    """What a stream answers, and how long the devices had to wait for it.

    Args:
      stream: see `recipe.WorkStream`.
      state: that it is asked with.
      running: results of the steps before; while they are computed nobody waits.
    """
    began = time.perf_counter()
    item = stream(state)
    # Devices that are still at work did not wait, however long the host did.
    if all(leaf.is_ready() for leaf in jax.tree.leaves(running)):
      waited = time.perf_counter() - began
      self._waited += waited
      self._tell(waited)
    return item

  def report(self, step: int) -> dict[str, float]:
    """tokens_per_second, seconds_left, input_stall (the share of the time that devices
    waited for data) and, where the peak is known, mfu; restarts."""
    self.stop()
    steps, seconds = step - self._step, max(self._seconds, 1e-9)
    speed = {
      'tokens_per_second': self._tokens / seconds,
      'seconds_left': (self._total - step) * seconds / max(steps, 1),
      'input_stall': self._waited / seconds,
    }
    chip = chips.of_device_kind(jax.devices()[0].device_kind)
    if chip:
      # Model FLOPs alone: what remat computes again does not count (PaLM, appendix B).
      speed['mfu'] = self._flops / seconds / (chip.peak_flops * jax.device_count())
    self._step, self._seconds, self._tokens, self._flops = step, 0.0, 0.0, 0.0
    self._waited = 0.0
    self.restart()
    return speed


def progress_line(step: int, total: int, values: Mapping[str, float]) -> str:
  """One line for a person.

  Example:
    >>> progress_line(20, 300, {'loss': 6.25, 'tokens_per_second': 5210.0,
    ...                         'seconds_left': 125.0})
    'step    20/300  loss 6.250  5,210 tokens/s  2:05 left'
  """
  # Batches may hold prompts alone.
  scored = f'loss {values["loss"]:.3f}' if 'loss' in values else 'nothing scored'
  parts = [f'step {step:>5}/{total}', scored]
  if 'reward' in values:  # of a policy, whose loss says little
    parts.append(f'reward {values["reward"]:.3f}')
  if 'tokens_per_second' in values:
    parts.append(f'{values["tokens_per_second"]:,.0f} tokens/s')
  if 'mfu' in values:
    parts.append(f'MFU {values["mfu"]:.1%}')
  if 'peak_memory_gib' in values:
    parts.append(f'{values["peak_memory_gib"]:.1f} GiB')
  if 'seconds_left' in values and math.isfinite(values['seconds_left']):
    minutes, seconds = divmod(round(values['seconds_left']), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f'{hours}:{minutes:02}' if hours else f'{minutes}'
    parts.append(f'{clock}:{seconds:02} left')
  return '  '.join(parts)
