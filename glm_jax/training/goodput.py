"""Where a run's time went: the share of it in steps that count, and the rest by cause.

A run may be started many times. Each start is an attempt with a record of its own in
`attempts.json`, written as the run goes, so that a process that is killed leaves what it
knew: the next one adds the time until it began, and the steps that it has to repeat.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from glm_jax import configs, storage

FILE = 'attempts.json'
STEPS = 'steps'
CAUSES = {
  STEPS: 'steps that count',
  'start': 'starting: imports, data, parameters',
  'restore': 'reading a checkpoint',
  'compile': 'compiling, until the first step is done',
  'data': 'devices waiting for data',
  'evaluate': 'validation and reports',
  'save': 'saving',
  'lost': 'steps done again behind a checkpoint',
  'down': 'not running',
}
"""Of a run's time, and what each is in words; together they are all of it."""


class Clock:
  """The time of a run by cause: at each moment, there is one.

  Example:
    >>> now = iter(range(100, 200, 10))
    >>> clock = Clock(None, began=90, now=lambda: next(now))
    >>> clock.begins(0)
    >>> clock.to('steps')
    >>> with clock.doing('save'):
    ...   pass
    >>> clock.shares(2)
    {'steps': 0.5, 'start': 0.25, 'save': 0.25}
  """

  def __init__(
    self,
    folder: storage.Folder | None,
    *,
    began: float,
    now: Callable[[], float] = time.time,
  ):
    """
    Args:
      folder: the MODEL_DIR, or None to keep nothing there.
      began: when this process did, in seconds since the epoch: what is measured is from
        one process to the next.
      now: seconds since the epoch.
    """
    self._folder, self._now = folder, now
    self._before = _attempts(folder)
    self._own = {'began': began, 'until': began, 'first': 0, 'step': 0, 'seconds': {}}
    self._cause, self._since = 'start', began

  @property
  def restarts(self) -> int:
    """Attempts before this one."""
    return len(self._before)

  def begins(self, step: int) -> None:
    """Says which step this attempt goes on from."""
    self._own |= {'first': step, 'step': step}

  def to(self, cause: str) -> None:
    """From now on, time is of this cause."""
    now = self._now()
    self._add(self._cause, now - self._since)
    self._cause, self._since = cause, now

  @contextlib.contextmanager
  def doing(self, cause: str) -> Iterator[None]:
    """Time within is of this cause; behind it, of the one before."""
    before = self._cause
    self.to(cause)
    try:
      yield
    finally:
      self.to(before)

  def waited(self, seconds: float) -> None:
    """So much of the time until now was waiting for data."""
    self._add(self._cause, -seconds)
    self._add('data', seconds)

  def shares(self, step: int) -> dict[str, float]:
    """Of each cause that there was, in the run's whole time until now; they sum to 1.

    Args:
      step: that the run is at.
    """
    self.to(self._cause)
    self._own |= {'until': self._since, 'step': step}
    seconds = by_cause([*self._before, self._own])
    whole = sum(seconds.values())
    return {cause: own / whole for cause, own in seconds.items()} if whole else {}

  def write(self, step: int) -> dict[str, float]:
    """Keeps this attempt's record in the folder; its `shares`."""
    shares = self.shares(step)
    if self._folder is not None:
      text = json.dumps([*self._before, self._own], indent=1) + '\n'
      self._folder.write(FILE, text.encode('utf-8'))
    return shares

  def _add(self, cause: str, seconds: float) -> None:
    own = self._own['seconds']
    own[cause] = own.get(cause, 0.0) + seconds


def by_cause(attempts: list[Mapping[str, Any]]) -> dict[str, float]:
  """Seconds of a run by cause, of those that there were.

  An attempt that goes on from an earlier step than the one before had reached repeats the
  steps between: their share of the time in steps is lost. From the last record of an
  attempt to the beginning of the next the run was down; what a killed process did after
  its last record is in it.

  Example:
    >>> first = {'began': 0, 'until': 30, 'first': 0, 'step': 20}
    >>> second = {'began': 40, 'until': 60, 'first': 15, 'step': 30}
    >>> by_cause([
    ...   {**first, 'seconds': {'start': 10, 'steps': 20}},
    ...   {**second, 'seconds': {'start': 5, 'steps': 15}},
    ... ])
    {'steps': 30.0, 'start': 15.0, 'lost': 5.0, 'down': 10.0}
  """
  seconds = dict.fromkeys(CAUSES, 0.0)
  kept: list[list[float]] = []  # first step, last step, seconds a step
  for number, attempt in enumerate(attempts):
    for cause, own in attempt['seconds'].items():
      if cause != STEPS:
        seconds[cause] += own
    first, last = attempt['first'], attempt['step']
    for span in kept:  # what is done again now has not counted
      again = max(0, span[1] - max(span[0], first))
      seconds['lost'] += again * span[2]
      span[1] -= again
    in_steps = attempt['seconds'].get(STEPS, 0.0)
    if last > first:
      kept.append([first, last, in_steps / (last - first)])
    else:  # none was completed
      seconds['lost'] += in_steps
    if number:
      seconds['down'] += max(0.0, attempt['began'] - attempts[number - 1]['until'])
  seconds[STEPS] = sum((last - first) * each for first, last, each in kept)
  return {cause: own for cause, own in seconds.items() if own}


def line(shares: Mapping[str, float], restarts: int) -> str:
  """The table in a line.

  Example:
    >>> line({'steps': 0.9, 'compile': 0.06, 'save': 0.04}, 2)
    'goodput 90.0% (compile 6.0%, save 4.0%), 2 restarts'
  """
  rest = sorted((k for k in shares if k != STEPS), key=lambda k: -shares[k])
  others = ', '.join(f'{cause} {shares[cause]:.1%}' for cause in rest)
  again = f', {restarts} restart{"s" * (restarts != 1)}' if restarts else ''
  return f'goodput {shares.get(STEPS, 0.0):.1%} ({others}){again}'


def _attempts(folder: storage.Folder | None) -> list[dict[str, Any]]:
  """Those before, of a run that goes on."""
  content = folder.read(FILE) if folder is not None else None
  if content is None:
    return []
  names = {'began', 'until', 'first', 'step', 'seconds'}
  try:
    attempts = configs.parse_json(content)
    known = all(names == {*a} and {*a['seconds']} <= {*CAUSES} for a in attempts)
  except (ValueError, TypeError, KeyError):
    known = False
  configs.check(
    known,
    f'{folder.path}/{FILE} must be the record of a run',
    'something else',
    'remove it: times of this run are counted anew',
  )
  return attempts
