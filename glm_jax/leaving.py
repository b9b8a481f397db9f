"""How a process ends before its time: what it must still do, what it says, and its code."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from glm_jax import startup

EXIT_AGAIN = 42
"""The run was stopped or has lost a process: the same command goes on."""
GRACE_SECONDS = 120.0
"""In which a run that is told to stop must have saved."""
# What is still to be done may wait for a bucket or for a process that is gone.
_SECONDS = 10.0

_duties: list[Callable[[str, int], None]] = []
# Of several threads that end the process, the first one has the word.
_first = threading.Lock()


class Again(Exception):
  """Why a run ends before its time, though nothing is wrong: the same command goes on."""


def in_words(message: str, code: int) -> str:
  """As it is printed: nothing is wrong with a run that is to be started again.

  Example:
    >>> in_words('stopped', EXIT_AGAIN), in_words('no such file', 65)
    ('stopped', 'error: no such file')
  """
  return message if code == EXIT_AGAIN else f'error: {message}'


@contextlib.contextmanager
def duty(action: Callable[[str, int], None]) -> Iterator[None]:
  """A context in which whoever leaves (`now`) does something before.

  Args:
    action: is given what is said and the exit code.
  """
  _duties.append(action)
  try:
    yield
  finally:
    _duties.remove(action)


def now(message: str, code: int) -> NoReturn:
  """Ends the process, from any of its threads.

  Nothing that Python or JAX do at an exit is waited for: other threads may be inside a
  compiler or wait for a process that is gone. Files are whole at all times: what a run
  writes is renamed or appended.

  Args:
    message: the last line on stderr; '' if all is said.
    code: of the exit.
  """

  def end() -> None:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(Exception):
        stream.flush()
    if message:
      os.write(startup.stderr(), f'{message}\n'.encode())
    for action in reversed(_duties):
      with contextlib.suppress(Exception):
        action(message, code)

  _first.acquire()
  thread = threading.Thread(target=end, daemon=True)
  thread.start()
  thread.join(_SECONDS)
  os._exit(code)
