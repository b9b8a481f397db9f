"""What a run leaves to be read: metrics, TensorBoard, and a picture at the end."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from glm_jax import configs, storage

PROGRESS = 'GLM_JAX_PROGRESS'
"""In the environment, whoever watches a process names a file for its latest step."""


def note_step(step: int) -> None:
  """Writes a step down for whoever watches this process (`PROGRESS`), if somebody does."""
  if path := os.environ.get(PROGRESS):
    Path(path).write_text(f'{step}\n')


class Writer:
  """Writes metrics and TensorBoard's events; on the leader only.

  Here, a line of `metrics.jsonl` is appended. In a bucket, where nothing can be, a record
  is a file of its own, `metrics/STEP-KIND.json`.
  """

  def __init__(self, model_dir: str, enabled: bool):
    """
    Args:
      model_dir: of the run.
      enabled: False writes nothing.
    """
    self._board = self._file = None
    self._folder = storage.Folder(model_dir)
    if enabled:
      # Not tensorboardX, which imports PyTorch wherever it is installed: four seconds.
      from tensorboard.summary import Writer as Board

      if not storage.is_remote(model_dir):
        self._file = _open(Path(model_dir) / 'metrics.jsonl')
      self._board = Board(f'{model_dir}/tensorboard')

  def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
    """One record: kind is 'train' or 'validation'."""
    if self._board is None:
      return
    record = {'step': step, 'kind': kind, **{k: round(v, 6) for k, v in values.items()}}
    line = json.dumps(record) + '\n'
    if self._file is None:
      self._folder.write(f'metrics/{step:012}-{kind}.json', line.encode('utf-8'))
    else:
      self._file.write(line)
      # Whoever follows the run sees the record at once, and a kill does not lose it.
      self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(f'{kind}/{name}', value, step)
    self._board.flush()  # a kill would take what waits here with it

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
    if self._board is not None:
      self._board.close()


def _open(path: Path) -> IO[str]:
  """A file of lines to append to."""
  file = path.open('a', encoding='utf-8')
  if path.stat().st_size:
    with path.open('rb') as before:
      before.seek(-1, io.SEEK_END)
      torn = before.read() != b'\n'
    # Of a process killed in the middle of a line: the next one would be lost with it.
    if torn:
      file.write('\n')
  return file


def read(model_dir: str, kind: str) -> list[dict[str, float]]:
  """Records of one kind in order of step; a step repeated after a resume, its last."""
  folder = storage.Folder(model_dir)
  if storage.is_remote(model_dir):
    lines = folder.read_all(folder.below('metrics'))
  else:
    lines = (folder.read('metrics.jsonl') or b'').splitlines()
  records = {}
  for line in lines:
    try:
      record = configs.parse_json(line)
      if record['kind'] == kind:
        records[record['step']] = record
    except (ValueError, TypeError, KeyError):
      continue  # a process killed in the middle of a line left it
  return [records[step] for step in sorted(records)]


def plot_losses(model_dir: str, baselines: Mapping[str, float]) -> str:
  """Saves `loss.png`, training and validation losses over steps; says where.

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
  picture = io.BytesIO()
  figure.savefig(picture, dpi=120, format='png')
  storage.Folder(model_dir).write('loss.png', picture.getvalue())
  return f'{model_dir}/loss.png'
