"""Does a run that is killed again and again end as one that nobody touched?

python -m benchmarks.kill [--kills=100] [--minutes=M] [--folder=DIR]

Two processes of two devices each train under `supervise`. SIGKILL goes to one of them, or
to both: while they start, as a restored run goes on, behind a step, while a checkpoint is
being written, in a validation, or at any time, as a seed has it. In the end parameters and
optimizer must have the bits of a run that was left alone; the table says where the time
went. A minute or less a kill on 2 CPU cores. What came of it is kept in benchmarks/kill/.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import readme
from benchmarks.slurm import SMALL, digest
from benchmarks.step import about
from glm_jax import cli
from glm_jax.training import goodput

RESULTS = Path(__file__).parent / 'kill'
POINTS = ('start', 'restored', 'step', 'save', 'validation', 'any')
VICTIMS = ((0,), (1,), (0, 1))
# Steps between checkpoints, and between validations: each attempt reaches some.
EVERY = 10
BINDINGS = (
  f'CheckpointConfig.every={EVERY}',
  f'EvaluationConfig.every={2 * EVERY}',
  f'TrainConfig.log_every={EVERY}',
  'MeshConfig.data=2',
  'MeshConfig.fsdp=2',
)
# Longer than a start takes where other work is on the machine.
_SECONDS = 300.0


class Run:
  """A run under `supervise`, as it is seen from outside."""

  def __init__(self, folder: Path, name: str, steps: int, kills: int):
    """
    Args:
      folder: of all runs.
      name: of this one.
      steps: of it.
      kills: after which it is still started again.
    """
    self.path, self._log = folder / name, folder / f'{name}.log'
    bindings = [*SMALL, *BINDINGS, f'TRAIN_STEPS={steps}', f"MODEL_DIR='{self.path}'"]
    bindings.append(f"CorpusConfig.cache_dir='{folder / 'cache'}'")
    bindings.append(f"CorpusConfig.corpus='{folder / 'text'}/*.txt'")
    with self._log.open('wb') as log:
      self._process = subprocess.Popen(
        [
          *(sys.executable, '-m', 'glm_jax.supervise', '--processes=2'),
          *(f'--kills={kills}', f'--failures={kills}', '--', 'train'),
          *('--gin_file=gin_configs/glm_tiny.gin', '--cpu_devices=2'),
          *(f'--gin.{binding}' for binding in bindings),
        ],
        cwd=readme.ROOT,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
        stdout=log,
        stderr=subprocess.STDOUT,
      )

  @property
  def over(self) -> bool:
    return self._process.poll() is not None

  def finish(self) -> None:
    """Waits for its end.

    Raises:
      RuntimeError: it has failed.
    """
    if self._process.wait():
      raise RuntimeError(f'{self._process.returncode}, see {self._log}')

  def said(self) -> int:
    """Bytes of its log."""
    return self._log.stat().st_size

  def says(self, words: str, since: int) -> bool:
    """Whether its log has some words behind a place."""
    return words.encode() in self._behind(since)

  @property
  def restarts(self) -> int:
    """How often it was started again: the run itself knows of attempts that got to it."""
    return self._behind(0).count(b': started again')

  def steps(self, since: int) -> list[int]:
    """Those that its log tells of behind a place."""
    return [int(n) for n in re.findall(rb'\] step +(\d+)/', self._behind(since))]

  def _behind(self, since: int) -> bytes:
    with self._log.open('rb') as log:
      log.seek(since)
      return log.read()

  def pids(self) -> list[int]:
    """Of both processes of the attempt that is alive; [] until there are two."""
    found = {}
    for path in Path('/proc').glob('[0-9]*'):
      with contextlib.suppress(OSError):
        words = (path / 'cmdline').read_bytes().decode(errors='replace').split('\0')
        own = f"--gin.MODEL_DIR='{self.path}'" in words and 'glm_jax.train' in words
        index = [w for w in words if w.startswith('--process_index=')]
        if own and index:
          found[index[0]] = int(path.name)
    return [found[index] for index in sorted(found)] if len(found) == 2 else []


def kill(run: Run, point: str, victims: Sequence[int], rng: random.Random) -> bool:
  """Waits for an attempt to reach a point, and kills; whether it was still there."""
  if not _until(run, lambda: bool(run.pids())):
    return False
  pids, since = run.pids(), run.said()
  writes = lambda: any('tmp' in p.name for p in (run.path / 'checkpoints').glob('*'))
  reached: dict[str, Callable[[], bool]] = {
    'start': lambda: True,
    'restored': lambda: run.says('resumed', since),
    'step': lambda: bool(run.steps(since)),
    'save': writes,
    'validation': lambda: any(step % (2 * EVERY) == 0 for step in run.steps(since)),
    'any': lambda: True,
  }
  longest = {'start': 5.0, 'step': 0.5, 'any': 15.0}.get(point, 0.0)
  if not _until(run, reached[point]):
    return False
  time.sleep(rng.uniform(0, longest))
  for victim in victims:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pids[victim], signal.SIGKILL)
  # The supervisor has noticed when the pids are others.
  return _until(run, lambda: run.pids() not in (pids, []))


def _until(run: Run, holds: Callable[[], bool]) -> bool:
  """Waits for something; False if the run is over before."""
  until = time.monotonic() + _SECONDS
  while not run.over and time.monotonic() < until:
    if holds():
      return True
    time.sleep(0.002)
  return False


def measure(
  folder: Path, kills: int, minutes: float = float('inf'), seed: int = 0
) -> dict[str, Any]:
  """What came of it, as JSON: kills by point and victims, bits, goodput.

  Args:
    folder: of both runs.
    kills: how often.
    minutes: after which there is no further one, and the run ends undisturbed.
    seed: of victims and times.
  """
  # Attempts that are killed at a step get that far; the others may get nowhere.
  steps, rng = 10 * EVERY + 3 * EVERY * kills // 2, random.Random(seed)
  until = time.monotonic() + 60 * minutes
  # Little text, whose table of rows each start has read in a moment.
  (folder / 'text').mkdir(exist_ok=True)
  for path in Path(sysconfig.get_path('stdlib')).glob('*.py'):
    shutil.copy(path, folder / 'text' / f'{path.stem}.txt')
  straight = Run(folder, 'straight', steps, 0)
  straight.finish()
  run, done = Run(folder, 'killed', steps, 3 * kills), collections.Counter[str]()
  for number in range(kills):
    point, victims = POINTS[number % len(POINTS)], rng.choice(VICTIMS)
    if point == 'restored' and not [*(run.path / 'checkpoints').glob('[0-9]*')]:
      point = 'any'  # nothing is there yet to go on from
    if time.monotonic() > until or not kill(run, point, victims, rng):
      break
    done[f'{point}, {"both" if len(victims) == 2 else f"process {victims[0]}"}'] += 1
    print(f'{number + 1} of {kills}: {point}, {victims}', flush=True)
  run.finish()
  return {
    'kills': dict(sorted(done.items())),
    'steps': steps,
    'equal': digest(run.path) == digest(straight.path),
    **{
      name: json.loads((path.path / 'summary.json').read_text())['goodput']
      for name, path in (('goodput', run), ('goodput_alone', straight))
    },
    'restarts': run.restarts,
  }


def table(results: dict[str, Any]) -> list[str]:
  """Markdown lines of a device's results."""
  kills = sum(results['kills'].values())
  by_point = collections.Counter[str]()
  for name, count in results['kills'].items():
    by_point[name.split(',')[0]] += count
  where = ', '.join(f'{point} {count}' for point, count in by_point.items())
  bits = 'the same bits as' if results['equal'] else '**other bits** than'
  rows = [
    f'| {words} | {results["goodput"].get(cause, 0):.1%} | '
    f'{results["goodput_alone"].get(cause, 0):.1%} |'
    for cause, words in goodput.CAUSES.items()
  ]
  whole = [f'{sum(results[of].values()):.1%}' for of in ('goodput', 'goodput_alone')]
  return [
    f'{results["device"]}, {results["date"]}; jax {results["jax"]}: two processes of two '
    f'devices, {results["steps"]} steps, {kills} times SIGKILL to one or both ({where}), '
    f'{results["restarts"]} restarts: {bits} a run that was left alone.',
    '',
    '| time | killed | left alone |',
    '|---|---|---|',
    *rows,
    f'| all | {whole[0]} | {whole[1]} |',
  ]


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = argparse.ArgumentParser(
    prog='python -m benchmarks.kill', description=__doc__.splitlines()[0]
  )
  flags.add_argument('--kills', type=int, default=100, help='how often (100)')
  flags.add_argument(
    '--minutes',
    type=float,
    default=float('inf'),
    metavar='M',
    help='kill no more after so many, and let the run end',
  )
  flags.add_argument('--folder', help='where runs are kept; by default they are not')
  flags.add_argument('--table', action='store_true', help='only write the table')
  given = flags.parse_args(argv)
  if not given.table:
    with contextlib.ExitStack() as stack:
      folder = given.folder or stack.enter_context(tempfile.TemporaryDirectory())
      Path(folder).mkdir(parents=True, exist_ok=True)
      results = {**about(), **measure(Path(folder).absolute(), given.kills, given.minutes)}
    path = readme.path_of(RESULTS, results)
    path.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
  readme.write_results('kill', RESULTS, table, 'benchmarks.kill')


if __name__ == '__main__':
  cli.main(main)
