"""The processes of a run end together: one that fails tells the others why.

Whoever fails leaves the cause with the coordinator, where all look once a second, and ends
without JAX's barrier at an exit, which would wait for those that are gone. A process that
is killed tells nothing: where a collective breaks, as it does between CPUs, the others are
told by that; else JAX ends them once its heartbeats are missing, with SIGABRT, as it does
when process 0 is lost.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed as jax_distributed

from glm_jax import leaving

Explained = Callable[[BaseException], tuple[str, int] | None]
"""What is said of an error and its exit code; None for a defect of the program."""

_FOLDER = 'glm_jax/ended/'
_POLL_SECONDS = 1.0
# For the others to hear of it, before process 0 takes the coordinator with it.
_TOLD_SECONDS = 5.0
# Of whom an error speaks, whatever its type, that says that a collective has broken.
_COLLECTIVES = ('Gloo', 'NCCL')
# What JAX says, besides, when it cannot reach a process any more.
_LOST = ('UNAVAILABLE', 'DEADLINE_EXCEEDED', 'ABORTED', 'heartbeat', 'oordination')
_LOST += ('onnection reset', 'onnection closed', 'ocket closed')


@contextlib.contextmanager
def together(explain: Explained) -> Iterator[None]:
  """A context that ends all processes once one of them fails in it.

  Args:
    explain: what is said of an error of this process.
  """
  if not jax.distributed.is_initialized() or jax_distributed.global_state.num_processes < 2:
    yield
    return
  peers = Peers()
  with leaving.duty(peers.tell):
    thread = threading.Thread(target=peers.watch, daemon=True)
    thread.start()
    try:
      yield
    except BaseException as error:
      leaving.now(*peers.cause(error, explain))
    finally:
      peers.ended.set()
      thread.join()


class Peers:
  """The other processes, through what they leave with the coordinator.

  Attributes:
    ended: set once this process needs nobody any more.
  """

  def __init__(self):
    # JAX has no public name for its client, which Orbax uses, too.
    state = jax_distributed.global_state
    self._client, self._index, self._count = (
      state.client,
      state.process_id,
      state.num_processes,
    )
    self.ended = threading.Event()

  def tell(self, message: str, code: int) -> None:
    """Leaves the cause for the others; process 0 waits until they have heard of it."""
    self.ended.set()
    self._client.key_value_set(
      f'{_FOLDER}{self._index}', json.dumps([message, code]), allow_overwrite=True
    )
    until = time.monotonic() + _TOLD_SECONDS
    while not self._index and len(self._told()) < self._count - 1:
      if time.monotonic() > until:
        return
      time.sleep(0.1)
    time.sleep(0.2)  # who has told it leaves a moment later

  def watch(self) -> None:
    """Leaves as soon as another process has told why it left."""
    failures = 0
    while not self.ended.wait(_POLL_SECONDS):
      try:
        told, failures = self._told(), 0
      except jax.errors.JaxRuntimeError as error:
        failures += 1
        if failures > 2 and not self.ended.is_set():
          leaving.now(_lost(error), leaving.EXIT_AGAIN)
        continue
      if told and not self.ended.is_set():
        leaving.now(*_said(told))

  def cause(self, error: BaseException, explain: Explained) -> tuple[str, int]:
    """What is said of an error in this process, and the exit code."""
    lost = _of_a_peer(error)
    if lost is not None:
      # Whoever left may have told why, and that is the cause of this, too.
      until = time.monotonic() + _TOLD_SECONDS
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        while time.monotonic() < until:
          if told := self._told():
            return _said(told)
          time.sleep(0.2)
      return _lost(lost), leaving.EXIT_AGAIN
    explained = explain(error)
    if explained is None:
      traceback.print_exception(error)
      explained = f'{type(error).__name__}: {_first_line(error)}', 1
    message, code = explained
    return leaving.in_words(message, code), code

  def _told(self) -> dict[int, tuple[str, int]]:
    """What the others have left, by index."""
    entries = self._client.key_value_dir_get(_FOLDER)
    told = {int(key.rpartition('/')[2]): json.loads(value) for key, value in entries}
    return {
      index: (said[0], said[1]) for index, said in told.items() if index != self._index
    }


def _said(told: dict[int, tuple[str, int]]) -> tuple[str, int]:
  """The cause among several: of one that failed, others may have said that it is gone."""
  index = min(told, key=lambda i: (told[i][1] == leaving.EXIT_AGAIN, i))
  message, code = told[index]
  message = message.removeprefix('error: ')
  if not message.startswith('process '):
    message = f'process {index} has ended the run: {message}'
  return leaving.in_words(message, code), code


def _lost(error: BaseException) -> str:
  return (
    f'another process was lost ({_first_line(error)}); the same command goes on from the '
    'last checkpoint'
  )


def _of_a_peer(error: BaseException | None) -> BaseException | None:
  """What JAX says of a process that it cannot reach, in an error or behind it."""
  seen: list[Any] = []
  while error is not None and error not in seen:
    text = str(error)
    of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    if any(word in text for word in (*_COLLECTIVES, *(_LOST if of_jax else ()))):
      return error
    seen.append(error)
    error = error.__cause__ or error.__context__
  return None


def _first_line(error: BaseException) -> str:
  return (str(error).splitlines() or [''])[0][:200]
