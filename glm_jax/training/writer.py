"""What a run leaves to be read: `metrics.jsonl`, TensorBoard, and a picture at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


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
    # Whoever follows the run sees the record at once, and a kill does not lose it.
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

  # Without pyplot, which looks for a display and keeps figures in a global list.
  figure = Figure(figsize=(7, 4), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  train, validation = read(model_dir, 'train'), read(model_dir, 'validation')
  # A record has no loss if none of its rows had a target.
  scored = [(r['step'], r['loss']) for r in train if 'loss' in r]
  axes.plot(*zip(*scored or [((), ())], strict=True), label='training', color='0.6')
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
