"""One run at a time in a MODEL_DIR: who owns it stands there, and shows that it lives.

`owner.json` is replaced only by who has read what it replaces (`storage.Folder.replace`):
of several newcomers, one succeeds. What a process says of itself can be looked up on the
same machine; of another one, only its heartbeats tell, by the newcomer's own clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm_jax import configs, leaving, startup, storage

FILE = 'owner.json'
HEARTBEAT_SECONDS = 5.0
MISSED = 3
"""Heartbeats after which an owner on another machine counts as dead."""
ATTEMPT = 'GLM_JAX_ATTEMPT'
"""In the environment, whoever starts a run again and again names itself: of all processes
with one name, only one is alive at a time."""


class Owner:
  """This process as the owner of a MODEL_DIR, once it has taken it.

  Use it as a context, behind which the folder belongs to nobody.
  """

  def __init__(self, model_dir: str, say: Callable[[str], None] = print):
    """
    Args:
      model_dir: of the run; need not be there.
      say: is told whose folder is taken over.
    """
    self._model_dir, self._say = model_dir, say
    self._folder = storage.Folder(model_dir)
    self._record = {**_process(os.getpid()), 'id': uuid.uuid4().hex, 'beat': 0}
    self._version = b''  # of our record; b'' while it is not there
    self._free: bytes | None = None  # the version that may be replaced
    self._ended, self._writing = threading.Event(), threading.Lock()

  def look(self) -> None:
    """Whether the folder can be taken; changes nothing.

    Raises:
      UserError: it belongs to a run that is alive.
    """
    with startup.silenced_stderr():  # TensorStore says how it is let into a bucket
      content, version = self._folder.read_version(FILE)
    if content is None or version == self._free:
      self._free = version
      return
    record = _parsed(content)
    here = record.get('place') == self._record['place']
    attempt = self._record['attempt']
    if attempt and record.get('attempt') == attempt:
      how = 'an attempt of the same start'
    elif here and not _alive(record):
      how = 'it has ended without a word'
    elif here or self._beats(version, record):
      raise configs.UserError(
        f'MODEL_DIR must belong to one run at a time, got {self._model_dir!r}, in which '
        f'{_named(record)} is training; stop that one or wait for its end, or choose '
        'another folder.'
      )
    else:
      how = f'not heard of for {MISSED * HEARTBEAT_SECONDS:g} s'
    self._say(f'{self._model_dir} is taken over from {_named(record)}: {how}')
    self._free = version

  def take(self) -> None:
    """From here on, the folder is this process's.

    Raises:
      UserError: it belongs to a run that is alive.
      OSError: it cannot be written.
    """
    while not self._version:
      self.look()
      # Whoever else is that far has read the same version: one of us is first, and the
      # others look at its record.
      self._version = self._folder.replace(FILE, self._text(), self._free) or b''
    threading.Thread(target=self._beat, daemon=True).start()

  def __enter__(self) -> Owner:
    self._duty = contextlib.ExitStack()
    self._duty.enter_context(leaving.duty(lambda *_: self._release()))
    return self

  def __exit__(self, *error: object) -> None:
    self._duty.close()
    self._release()

  def _release(self) -> None:
    self._ended.set()
    with self._writing:
      if self._version:
        with contextlib.suppress(OSError):  # a run that has ended has not failed by this
          self._folder.replace(FILE, None, self._version)
        self._version = b''

  def _beat(self) -> None:
    while not self._ended.wait(HEARTBEAT_SECONDS):
      with self._writing:
        if self._ended.is_set():
          return
        self._record['beat'] += 1
        try:
          version = self._folder.replace(FILE, self._text(), self._version)
          if version is None:
            content, version = self._folder.read_version(FILE)
            other = _parsed(content or b'{}')
            # A bucket may have written, and its answer been lost.
            if other.get('id') != self._record['id']:
              break
        except OSError:
          continue  # of storage that does not answer for a moment
        self._version = version
    else:
      return
    leaving.now(
      f'error: MODEL_DIR {self._model_dir!r} was taken over by {_named(other)}, which had '
      'not heard of this process; only one of them may write.',
      os.EX_DATAERR,
    )

  def _beats(self, version: bytes, record: dict[str, Any]) -> bool:
    """Whether an owner elsewhere writes meanwhile; as long as it may miss heartbeats."""
    until = time.monotonic() + MISSED * HEARTBEAT_SECONDS
    self._say(
      f'{self._model_dir} belongs to {_named(record)}: waiting for a sign of life, '
      f'{MISSED * HEARTBEAT_SECONDS:g} s at most'
    )
    while time.monotonic() < until:
      time.sleep(HEARTBEAT_SECONDS / 5)
      if self._folder.read_version(FILE)[1] != version:
        return True
    return False

  def _text(self) -> bytes:
    return (json.dumps(self._record, indent=2) + '\n').encode('utf-8')


def _process(number: int) -> dict[str, Any]:
  """What tells a process from all others, on any machine."""
  return {
    'host': socket.gethostname(),
    # Containers and machines may share a name; process numbers are of a namespace.
    'place': [socket.gethostname(), _boot(), _link('/proc/self/ns/pid')],
    'pid': number,
    'began': _began(number),
    'attempt': os.environ.get(ATTEMPT, ''),
  }


def _boot() -> str:
  with contextlib.suppress(OSError):
    return Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  return ''


def _link(path: str) -> str:
  with contextlib.suppress(OSError):
    return os.readlink(path)
  return ''


def _began(number: int) -> str:
  """When a process began, in the kernel's ticks; '' for none, or where nobody says it."""
  with contextlib.suppress(OSError):
    fields = startup.process_fields(number)
    # Of a zombie, nothing is left but its number.
    return '' if fields[0] in 'ZX' else fields[19]
  return ''


def _alive(record: dict[str, Any]) -> bool:
  """Whether the process of a record of this machine is there, and not only its number."""
  try:
    os.kill(int(record['pid']), 0)
  except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
    return isinstance(error, PermissionError)
  return _began(int(record['pid'])) == record.get('began')


def _parsed(content: bytes) -> dict[str, Any]:
  """A record; {} for a damaged one, whose owner is known by its heartbeats alone."""
  try:
    record = configs.parse_json(content)
  except ValueError:
    return {}
  return record if isinstance(record, dict) else {}


def _named(record: dict[str, Any]) -> str:
  return f'process {record.get("pid", "?")} on {record.get("host", "an unknown host")}'
