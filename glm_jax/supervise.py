"""Starts a run's processes on this machine, and starts them again when they are stopped.

The story: start them, on a port of their own; pass signals on; when one ends, end the
others; by the exit code, say whether and from where it goes on. A cluster's own restarts
(JobSet, Slurm's requeue) do the same by the same codes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from glm_jax import cli, leaving, ownership
from glm_jax.configs import POSITIVE, at_least, check, check_value
from glm_jax.training import writer

# sysexits.h: what the next attempt would say as well.
_NEVER = frozenset({0, *range(64, 79)})
# Also of a signal that comes before the run listens.
_STOPPED = frozenset({leaving.EXIT_AGAIN, 129, 130, 143})
# By SIGABRT, JAX ends those that have lost a process; by SIGKILL, a kernel without memory.
_KILLED = frozenset({134, 137})
_KINDS = ('failure', 'kill', 'preemption')
# For the others to end by themselves, and to say why, when one has ended.
_OTHERS_SECONDS = 15.0
_LONGEST_PAUSE = 30.0
_POLL_SECONDS = 0.1
_TRAIN = (sys.executable, '-m', 'glm_jax.train')
_OF_PROCESSES = ('--coordinator_address', '--process_count', '--process_index')


class Ended(NamedTuple):
  """How an attempt has ended.

  Attributes:
    code: of the exit.
    step: the last step that was done; None if there was none.
    hung: whether it was ended since there was no next one.
  """

  code: int
  step: int | None
  hung: bool


class Supervisor:
  """The attempts at one run."""

  def __init__(self, flags: argparse.Namespace, command: Sequence[str]):
    """
    Args:
      flags: of `supervise`.
      command: the flags of `train`.
    """
    self._flags, self._command = flags, list(command)
    self._left = dict.fromkeys(_KINDS, 0)
    self._signals: list[int] = []
    self._passed = 0
    # All attempts are ours, and one at a time: the next one need not wait for the last.
    self._name = f'{socket.gethostname()}-{os.getpid()}-{time.time_ns()}'

  def run(self) -> int:
    """The exit code of the last attempt, when there is to be no other."""
    self._left = {
      'failure': self._flags.failures,
      'kill': self._flags.kills,
      'preemption': self._flags.preemptions,
    }
    before, failed, pause = None, (), 0.0
    with self._listening(), tempfile.TemporaryDirectory() as folder:
      while True:
        ended = self._attempt(Path(folder))
        kind = kind_of(ended.code)
        if ended.code in _NEVER or self._signals:
          return ended.code
        at = f'at step {ended.step}' if ended.step is not None else 'before its first step'
        how = 'hung' if ended.hung else f'ended with {ended.code}'
        if kind == 'failure' or ended.hung:
          if failed == (ended.step,):
            _say(f'{how} {at}, as it did before: not started again')
            return ended.code
          failed = (ended.step,)
        if not self._left[kind]:
          _say(f'{how} {at}: no {kind} is left of those that were allowed (--{kind}s)')
          return ended.code
        self._left[kind] -= 1
        # Whatever it is that ends it, it may need time to pass.
        moved = ended.step is not None and ended.step != before
        pause = 0.0 if moved else min(max(1.0, 2 * pause), _LONGEST_PAUSE)
        before = ended.step
        _say(
          f'{how} {at}: started again'
          + (f' in {pause:.0f} s' if pause else '')
          + f' ({self._left[kind]} more after a {kind})'
        )
        until = time.monotonic() + pause
        while time.monotonic() < until and not self._signals:
          time.sleep(_POLL_SECONDS)
        if self._signals:
          return ended.code

  @contextlib.contextmanager
  def _listening(self) -> Iterator[None]:
    """Notes signals; whoever starts with one ignored wants it ignored."""
    numbers = [
      number
      for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
      if signal.getsignal(number) is not signal.SIG_IGN
    ]
    noted = lambda number, _: self._signals.append(number)
    before = {number: signal.signal(number, noted) for number in numbers}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def _attempt(self, folder: Path) -> Ended:
    """Runs all processes until all have ended."""
    for path in folder.iterdir():
      path.unlink()
    count = self._flags.processes
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    children, threads = [], []
    for index in range(count):
      own = [f'--coordinator_address=localhost:{port}', f'--process_count={count}']
      own = [*own, f'--process_index={index}'] if count > 1 else []
      pipe = subprocess.PIPE if count > 1 else None
      child = subprocess.Popen(
        [*_TRAIN, *own, *self._command],
        env={
          **os.environ,
          **({'PYTHONUNBUFFERED': '1'} if pipe else {}),
          ownership.ATTEMPT: self._name,
          writer.PROGRESS: str(folder / str(index)),
        },
        stdout=pipe,
        stderr=pipe,
        # A terminal's Ctrl-C is passed on, once; and with it end its own processes.
        start_new_session=True,
      )
      children.append(child)
      if pipe:
        threads += _prefixed(index, child)
    try:
      codes, hung = self._watch(children, folder)
    finally:
      _kill(children)
    for thread in threads:
      thread.join()
    return Ended(verdict(codes), _step(folder), hung)

  def _watch(self, children: list[Any], folder: Path) -> tuple[list[int], bool]:
    """Waits until all have ended, or must be ended.

    Returns:
      Codes of those that have ended by themselves, and whether they hung.
    """
    began, until, hung = time.monotonic(), float('inf'), False
    seen, since = None, began
    while True:
      codes = [code for child in children if (code := child.poll()) is not None]
      now = time.monotonic()
      if len(codes) == len(children) or now > until:
        return codes or [-signal.SIGKILL], hung
      if any(codes):
        until = min(until, now + _OTHERS_SECONDS)
      progress = _written(folder)
      if progress != seen:
        seen, since = progress, now
      if now - since > self._flags.hang_seconds and not hung:
        hung, until = True, now
      if self._passed < len(self._signals):
        number = self._signals[self._passed]
        self._passed += 1
        for child in children:
          child.send_signal(number)
        until = min(until, now + self._flags.grace_seconds + _OTHERS_SECONDS)
      time.sleep(_POLL_SECONDS)


def kind_of(code: int) -> str:
  """Which of the budgets an exit code is taken from.

  Example:
    >>> [kind_of(code) for code in (42, 137, 1)]
    ['preemption', 'kill', 'failure']
  """
  if code in _STOPPED:
    return 'preemption'
  return 'kill' if code in _KILLED else 'failure'


def verdict(codes: Sequence[int]) -> int:
  """The exit code of several processes: what was wrong, rather than what came of it.

  Args:
    codes: of those that ended; -N is signal N, as `subprocess` has it.

  Example:
    >>> [verdict(codes) for codes in ([0, 0], [42, -9], [137, 1], [65, 1], [-11])]
    [0, 137, 1, 65, 139]
  """
  shell = [128 - code if code < 0 else code for code in codes]
  order = lambda code: (
    code not in _NEVER - {0},
    not code,
    _KINDS.index(kind_of(code)),
  )
  return min(shell, key=order)


def _prefixed(index: int, child: subprocess.Popen) -> list[threading.Thread]:
  """Passes on what a process says, each line with its number."""

  def copy(source: BinaryIO, target: BinaryIO) -> None:
    for line in source:
      # One write a line: several threads do so.
      target.write(b'[%d] %s' % (index, line if line.endswith(b'\n') else line + b'\n'))
      target.flush()

  pairs = ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer))
  threads = [threading.Thread(target=copy, args=pair, daemon=True) for pair in pairs]
  for thread in threads:
    thread.start()
  return threads


def _kill(children: Sequence[subprocess.Popen]) -> None:
  """Ends them and the processes that they have started."""
  for child in children:
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _written(folder: Path) -> list[tuple[str, int]]:
  """When each process has noted a step."""
  return sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())


def _step(folder: Path) -> int | None:
  """The last one that a process has noted; a kill may leave half of a note."""
  noted = [path.read_text() for path in folder.iterdir()]
  return max((int(text) for text in noted if text.endswith('\n')), default=None)


def _say(words: str) -> None:
  print(f'supervise: {words}', file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
  """The command."""
  own, dashes, command = [*argv], '--' in argv, []
  if dashes:
    place = own.index('--')
    own, command = own[:place], own[place + 1 :]
  flags = _flags().parse_args(own)
  check(
    bool(command) and command[0] == 'train',
    'supervise must be given a command of train behind --',
    ' '.join(command[:1]) or 'none',
    'write python -m glm_jax.supervise -- train --gin_file=...',
  )
  for name, rule in (
    ('processes', at_least(1)),
    ('hang_seconds', POSITIVE),
    ('grace_seconds', POSITIVE),
    *((f'{kind}s', at_least(0)) for kind in _KINDS),
  ):
    check_value(f'--{name}', getattr(flags, name), rule)
  given = [flag for flag in command if flag.startswith(_OF_PROCESSES)]
  check(
    not given or flags.processes == 1,
    'supervise --processes must give its processes their numbers itself',
    ' '.join(given),
    'leave them out, or start each with a supervise of its own',
  )
  sys.exit(Supervisor(flags, command[1:]).run())


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'supervise',
    'Starts a run on this machine, and again when it was stopped, killed or has failed; '
    'exit codes 0 and 64 to 78 are final.',
    'python -m glm_jax.supervise --processes=2 -- train '
    '--gin_file=gin_configs/quickstart.gin --gin.MeshConfig.fsdp=2',
  )
  flags.add_argument(
    '--processes', type=int, default=1, metavar='N', help='of the run, on this machine (1)'
  )
  flags.add_argument(
    '--hang_seconds',
    type=float,
    default=1800.0,
    metavar='SECONDS',
    help='end and restart a run without a new step for so long; more than its start, a '
    'validation and a save take (%(default)g)',
  )
  flags.add_argument(
    '--grace_seconds',
    type=float,
    default=leaving.GRACE_SECONDS,
    metavar='SECONDS',
    help='kill what has not ended so long after a signal that was passed on (%(default)g)',
  )
  for kind, default, why in (
    ('preemptions', 1000, 'was stopped (exit code 42)'),
    ('kills', 20, 'was killed, aborted or hung (137, 134)'),
    ('failures', 10, 'has failed otherwise; never twice at one step'),
  ):
    flags.add_argument(
      f'--{kind}',
      type=int,
      default=default,
      metavar='N',
      help=f'start it again so often when it {why} (%(default)d)',
    )
  return flags


if __name__ == '__main__':
  cli.main(main)
