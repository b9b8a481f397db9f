"""Signals that stop a run: it saves where it is, and says that it is to be started again.

Schedulers send SIGTERM before they take a machine away, terminals SIGINT and SIGHUP. In a
run of several processes each may be told, or only one: all ask each other before each step
(one bit, which nobody waits for), so that all save the same step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

from glm_jax import configs, distributed, leaving

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# timeout(1) and some schedulers tell a process and then its group, in which it is.
_ECHO_SECONDS = 0.25


class Signals:
  """The first signal asks the run to save and end; a second one ends it at once.

  Use it as a context. While there is nothing to save (`holding` is False: at the start,
  in the first step, in the report), the first one ends the process at once, too.

  Attributes:
    holding: whether steps have been done that no checkpoint holds.
    received: name of the first signal; '' until then.
  """

  def __init__(self, grace_seconds: float = leaving.GRACE_SECONDS):
    """
    Args:
      grace_seconds: in which a run that is to stop must have saved; else it ends without,
        and goes on from the checkpoint before.
    """
    self.holding, self.received = False, ''
    configs.check_value('--grace_seconds', grace_seconds, configs.at_least(0))
    self._grace = grace_seconds
    self._asked: Any = False
    self._leaving, self._since = False, 0.0
    self._timer: threading.Timer | None = None
    self._before: dict[int, Any] = {}
    self._thread: threading.Thread | None = None

  def __enter__(self) -> Signals:
    # Python calls its handlers between two of the main thread's bytecodes, which may be
    # minutes away, inside the compiler. The number of the signal is in the pipe at once.
    self._read, self._write = os.pipe()
    self._terminals = [number for number in (1, 2) if os.isatty(number)]
    os.set_blocking(self._write, False)
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()
    self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    self.listen()
    return self

  def listen(self) -> None:
    """Takes the signals; again after `jax.distributed`, which takes SIGTERM for itself."""
    if self._thread is None:
      return
    for number in _STOPPING:
      # Whoever starts with one ignored, as nohup has it, wants it ignored.
      if signal.getsignal(number) is not signal.SIG_IGN:
        before = signal.signal(number, lambda *_: None)
        self._before.setdefault(number, before)

  def __exit__(self, *error: object) -> None:
    for number, before in self._before.items():
      signal.signal(number, before if before is not None else signal.SIG_DFL)
    signal.set_wakeup_fd(self._wakeup)
    os.write(self._write, b'\0')
    self._thread.join()
    if self._timer is not None:
      self._timer.cancel()
    os.close(self._read)
    os.close(self._write)
    self._thread = None

  def ask(self, mesh: jax.sharding.Mesh) -> None:
    """Begins to ask all processes whether one is to stop; before each step, by all.

    Args:
      mesh: of all devices.
    """
    if jax.process_count() > 1:
      self._asked = distributed.any_process(bool(self.received), mesh)

  def agreed(self, step: int) -> bool:
    """Whether the run ends with this step: in all processes, or in none.

    Args:
      step: that `ask` was called before.
    """
    if jax.process_count() == 1:
      self._leaving = bool(self.received)
    else:
      # JAX knows of notices that are no signal, where a platform has such.
      noticed = multihost_utils.reached_preemption_sync_point(step)
      self._leaving = bool(self._asked) or noticed
      if self._leaving and not self.received:
        self._begin('a notice to another process')
    return self._leaving

  def release(self, step: int) -> None:
    """Says that nothing is left to save: from here on, a signal ends the process at once.

    Args:
      step: that is saved.

    Raises:
      leaving.Again: the run was to stop, and has.
    """
    self.holding = False
    if self.received or self._leaving:
      raise leaving.Again(
        f'stopped by {self.received} at step {step}, which is saved; the same command '
        'goes on'
      )

  def _watch(self) -> None:
    while number := os.read(self._read, 1)[0]:
      if number in _STOPPING:
        self._heard(signal.Signals(number).name)

  def _heard(self, name: str) -> None:
    if name == 'SIGHUP':  # of a terminal that is gone, a line would be an error
      nothing = os.open(os.devnull, os.O_WRONLY)
      for number in self._terminals:
        os.dup2(nothing, number)
      os.close(nothing)
    if self.received:
      if time.monotonic() < self._since + _ECHO_SECONDS:
        return
      leaving.now(
        f'{name} again: ended at once; the same command goes on from the last checkpoint',
        leaving.EXIT_AGAIN,
      )
    if not self.holding:
      self.received = name
      leaving.now(
        f'stopped by {name}; the same command goes on from the last checkpoint, if there '
        'is one',
        leaving.EXIT_AGAIN,
      )
    self._begin(name)

  def _begin(self, name: str) -> None:
    self.received, self._since = name, time.monotonic()
    with contextlib.suppress(OSError):  # whoever read it may be gone
      print(
        f'{name}: saving and leaving, in {self._grace:.0f} s at most; a second signal '
        'ends the run at once',
        flush=True,
      )
    self._timer = threading.Timer(self._grace, self._too_late)
    self._timer.daemon = True
    self._timer.start()

  def _too_late(self) -> None:
    leaving.now(
      f'stopped by {self.received}: nothing could be saved in {self._grace:.0f} s; the '
      'same command goes on from the last checkpoint',
      leaving.EXIT_AGAIN,
    )
