"""How fast a run is: tokens, FLOPs and waiting since the last report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from glm_jax.performance import chips


class Meter:
  """Speed since the last report."""

  def __init__(self, step: int, total_steps: int):
    """
    Args:
      step: the first step.
      total_steps: of the run.
    """
    self._step, self._total = step, total_steps
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
      self._waited += time.perf_counter() - began
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
  if 'tokens_per_second' in values:
    parts.append(f'{values["tokens_per_second"]:,.0f} tokens/s')
  if 'mfu' in values:
    parts.append(f'MFU {values["mfu"]:.1%}')
  if 'seconds_left' in values and math.isfinite(values['seconds_left']):
    minutes, seconds = divmod(round(values['seconds_left']), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f'{hours}:{minutes:02}' if hours else f'{minutes}'
    parts.append(f'{clock}:{seconds:02} left')
  return '  '.join(parts)
