"""What a run reports: lines, `metrics.jsonl`, TensorBoard, and a picture at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glm_jax.performance import chips, flops


def averages(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
  """(sum, count) pairs to means, leaving out what was not counted."""
  pairs = {k: (float(total), float(count)) for k, (total, count) in metrics.items()}
  return {k: total / count for k, (total, count) in pairs.items() if count > 0}


def add(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
  """Adds (sum, count) pairs by name."""
  return {
    k: tuple(
      float(x) + float(y) for x, y in zip(a.get(k, (0, 0)), b.get(k, (0, 0)), strict=True)
    )
    for k in {**a, **b}
  }


def step_flops(model: Any, batch: Any) -> float:
  """`flops.training` of the rows of a numpy batch."""
  tokens = float((np.asarray(batch.key_end) > np.asarray(batch.key_start)).sum())
  return flops.training(model, tokens, flops.pairs(batch.visibility))


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

  def wait_for(self, stream: Iterator[Any], running: Sequence[Any] = ()) -> Any:
    """The next item, and how long the devices had to wait for it.

    Args:
      stream: of batches.
      running: results of the steps before; while they are computed nobody waits.
    """
    began = time.perf_counter()
    item = next(stream)
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
  parts = [f'step {step:>5}/{total}', f'loss {values["loss"]:.3f}']
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


class Writer:
  """Appends to `metrics.jsonl` and to TensorBoard; on the leader only."""

  def __init__(self, model_dir: str, enabled: bool):
    """
    Args:
      model_dir: of the run.
      enabled: False writes nothing.
    """
    self._file = self._board = None
    if enabled:
      # Not tensorboardX, which imports PyTorch wherever it is installed: four seconds.
      from tensorboard.summary import Writer as Board

      self._file = (Path(model_dir) / 'metrics.jsonl').open('a', encoding='utf-8')
      self._board = Board(str(Path(model_dir) / 'tensorboard'))

  def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
    """One record: kind is 'train' or 'validation'."""
    if self._file is None:
      return
    record = {'step': step, 'kind': kind, **{k: round(v, 6) for k, v in values.items()}}
    self._file.write(json.dumps(record) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(f'{kind}/{name}', value, step)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._board.close()


def read(model_dir: str, kind: str) -> list[dict[str, float]]:
  """Records of one kind in order of step; a step repeated after a resume, its last."""
  path = Path(model_dir) / 'metrics.jsonl'
  records = {}
  for line in path.read_text(encoding='utf-8').splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      continue  # a process killed in the middle of a line left it
    if record['kind'] == kind:
      records[record['step']] = record
  return [records[step] for step in sorted(records)]


def plot_losses(model_dir: str, baselines: Mapping[str, float]) -> Path:
  """Saves `loss.png`: training and validation losses over steps.

  Args:
    model_dir: of the run.
    baselines: horizontal lines by label, in nats.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  train, validation = read(model_dir, 'train'), read(model_dir, 'validation')
  axes.plot(
    [r['step'] for r in train], [r['loss'] for r in train], label='training', color='0.6'
  )
  for name in sorted({k for r in validation for k in r if k.startswith('loss/')}):
    points = [(r['step'], r[name]) for r in validation if name in r]
    axes.plot(
      *zip(*points, strict=True),
      marker='.',
      label=f'validation, {name.removeprefix("loss/")}',
    )
  for style, (label, value) in zip(('--', ':', '-.'), baselines.items(), strict=False):
    axes.axhline(value, ls=style, color='0.3', lw=1, label=label)
  axes.set(xlabel='step', ylabel='loss (nats a target token)')
  axes.legend(frameon=False)
  path = Path(model_dir) / 'loss.png'
  figure.savefig(path, dpi=120)
  return path
