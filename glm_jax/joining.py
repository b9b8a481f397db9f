"""Where the processes of a run meet before JAX joins them: who is missing, who differs.

JAX's own start waits for all without a name for whoever is missing, ends in C++, and joins
processes that were started with different commands. So they meet on the coordinator's port
before it does: each says once, in a line of JSON, who it is and what it runs; process 0
answers all alike, and leaves the port to JAX.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import platform
import socket
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_jax import configs, leaving

# Of a process's line: configurations are a few thousand characters.
_MOST_BYTES = 2**22
# For a process that has connected to say its line, and for all to read the answer.
_LINE_SECONDS = 10.0
_LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
_MOST_DIFFERENCES = 5


def meet(
  address: str,
  bind: str,
  count: int,
  index: int,
  about: Mapping[str, str],
  seconds: float,
) -> None:
  """Returns once all processes have come and say the same of themselves.

  Args:
    address: HOST:PORT of process 0.
    bind: HOST:PORT on which it listens.
    count: of processes.
    index: of this one.
    about: what must be equal, by name; see `code`.
    seconds: to wait for the others.

  Raises:
    UserError: they differ, two have one index, or process 0 cannot listen there.
    leaving.Again: somebody has not come in time.
  """
  about = {'process_count': str(count), **about}
  if index:
    answer = _ask(address, {'index': index, 'about': about}, seconds)
  else:
    answer = _answer(address, bind, count, about, seconds)
  if answer.get('missing'):
    raise leaving.Again(answer['missing'])
  if answer.get('wrong'):
    raise configs.UserError(answer['wrong'])


def code(imports: Sequence[str]) -> dict[str, str]:
  """Versions of what computes, by name, and digests of the code that has none.

  Args:
    imports: modules of the user's.
  """
  versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
  own = sorted(Path(__file__).parent.rglob('*.py'))
  versions |= {'python': platform.python_version(), 'glm_jax': _digest(own)}
  for name in imports:
    file = getattr(sys.modules.get(name), '__file__', None)
    versions[f'--import={name}'] = _digest([Path(file)] if file else [])
  return versions


def differences(
  first: Mapping[str, str], other: Mapping[str, str], index: int
) -> list[str]:
  """A line for each thing that process `index` says otherwise than process 0.

  Example:
    >>> differences({'a': 'x = 1\\ny = 2'}, {'a': 'x = 1\\ny = 3'}, 1)
    ['y: 2 in process 0, 3 in process 1']
  """
  one, two = _lines(first), _lines(other)
  return [
    f'{name}: {one.get(name, "nothing")} in process 0, {two.get(name, "nothing")} in '
    f'process {index}'
    for name in sorted({*one, *two})
    if one.get(name) != two.get(name)
  ]


def _lines(about: Mapping[str, str]) -> dict[str, str]:
  """Each line 'name = value' of a configuration by its own name."""
  found = {}
  for name, text in about.items():
    for line in text.splitlines() or ['']:
      field, equals, value = line.partition(' = ')
      found[field if equals else name] = value if equals else text
  return found


def _digest(files: Sequence[Path]) -> str:
  content = b''.join(file.name.encode() + file.read_bytes() for file in files)
  return hashlib.sha256(content).hexdigest()[:12]


def check_port(address: str, bind: str) -> socket.socket:
  """Listens where process 0 is to.

  Raises:
    UserError: the port is in use, or the host is none of this machine's.
  """
  host, port = split(bind)
  try:
    kind, *_, where = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    return socket.create_server(
      where[:2], family=kind, dualstack_ipv6=host in ('::', '') and kind == socket.AF_INET6
    )
  except OSError as error:
    if error.errno == errno.EADDRINUSE:
      raise configs.UserError(
        f'--coordinator_address must have a port that is free, got {address!r}, which is '
        'in use; choose another one for all processes.'
      ) from error
    raise configs.UserError(
      f'process 0 must be able to listen at {bind!r}, got {error.strerror or error}; give '
      'an address of its machine as --coordinator_address, or as '
      '--coordinator_bind_address.'
    ) from error


def split(address: str) -> tuple[str, int]:
  """Host and port.

  Example:
    >>> split('[::1]:80'), split('here:81')
    (('::1', 80), ('here', 81))
  """
  host, _, port = address.rpartition(':')
  return host.strip('[]'), int(port)


def _answer(
  address: str, bind: str, count: int, about: Mapping[str, str], seconds: float
) -> dict[str, str]:
  """Process 0: listens to all, compares, answers."""
  came: dict[int, socket.socket] = {}
  connections: list[socket.socket] = []
  lines: list[str] = []
  until = time.monotonic() + seconds
  with check_port(address, bind) as server, contextlib.ExitStack() as open_sockets:
    while len(came) < count - 1:
      server.settimeout(max(0.01, until - time.monotonic()))
      try:
        connection, _ = server.accept()
      except TimeoutError:
        break
      open_sockets.enter_context(connection)
      said = _read(connection)
      if not _is_line(said):
        continue  # of somebody who is none of us
      index = said['index']
      if index in came and _is_open(came[index]):
        lines.append(f'--process_index={index} twice')
      lines += differences(about, said['about'], index)
      came[index] = connection
      connections.append(connection)
      if lines:  # the others are to hear of it, but not to be waited for
        until = min(until, time.monotonic() + _LINE_SECONDS)
    answer = _verdict(address, count, came, lines, seconds)
    for connection in connections:
      with contextlib.suppress(OSError):
        connection.setblocking(True)
        connection.sendall(json.dumps(answer).encode() + b'\n')
    for connection in connections:
      _read(connection)  # until it has closed: no port is left behind in TIME_WAIT
  return answer


def _verdict(
  address: str, count: int, came: Collection[int], lines: Sequence[str], seconds: float
) -> dict[str, str]:
  """What all are told: {} to go on."""
  if lines:
    more = len(lines) - _MOST_DIFFERENCES
    told = '; '.join(lines[:_MOST_DIFFERENCES]) + (f'; and {more} more' if more > 0 else '')
    wrong = (
      'all processes must be started alike, each with an index of its own, got '
      f'{told}; start them with one command and one version.'
    )
    return {'wrong': wrong}
  missing = ', '.join(str(index) for index in range(1, count) if index not in came)
  if missing:
    words = (
      f'of {count} processes, {missing} did not come to {address} in {seconds:g} s; see '
      'whether they were started and reach it'
    )
    return {'missing': words}
  return {}


def _ask(address: str, line: dict[str, Any], seconds: float) -> dict[str, str]:
  """Another process: says its line, as soon as process 0 is there, and waits."""
  until = time.monotonic() + seconds
  reason = 'no answer'
  while time.monotonic() < until:
    try:
      with socket.create_connection(split(address), timeout=2) as connection:
        connection.sendall(json.dumps(line).encode() + b'\n')
        # Whoever is missing has the same time, and process 0 says who it was.
        answer = _read(connection, until - time.monotonic() + _LINE_SECONDS)
      if isinstance(answer, dict):
        return answer
    except OSError as error:
      reason = str(error)
    time.sleep(0.2)
  return {
    'missing': f'process 0 did not come to {address} in {seconds:g} s ({reason}); see '
    'whether it was started and can be reached'
  }


def _read(connection: socket.socket, seconds: float = _LINE_SECONDS) -> Any:
  """A line of JSON; None for whatever else it is."""
  content, until = b'', time.monotonic() + seconds
  try:
    while not content.endswith(b'\n') and len(content) < _MOST_BYTES:
      connection.settimeout(max(0.01, until - time.monotonic()))
      if not (part := connection.recv(2**16)):
        break
      content += part
    return configs.parse_json(content)
  except (OSError, ValueError):
    return None


def _is_line(said: Any) -> bool:
  """Whether it is what a process of a run says."""
  return (
    isinstance(said, dict)
    and isinstance(said.get('index'), int)
    and isinstance(said.get('about'), dict)
    and all(isinstance(value, str) for value in said['about'].values())
  )


def _is_open(connection: socket.socket) -> bool:
  connection.setblocking(False)
  try:
    return connection.recv(1) != b''
  except BlockingIOError:
    return True
  except OSError:
    return False
