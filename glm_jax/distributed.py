"""Several processes as one run: start-up, and who writes."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import ipaddress
import json
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from glm_jax import configs, joining, leaving

# All have met before JAX joins them: it waits for connections alone.
_START_SECONDS = 60
# After which a process that says nothing is gone, and JAX ends the others.
_HEARTBEAT_SECONDS = 30
# A week: nobody is waited for who is gone.
_WAIT_MILLISECONDS = 7 * 24 * 3600 * 1000

# How often each barrier was met: their names are used up.
_barriers: collections.Counter[str] = collections.Counter()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
  """How the processes of a run find each other (flags of every command, as in T5X).

  Attributes:
    multiprocess: let JAX detect the cluster (Cloud TPU, SLURM, GKE, Open MPI).
    coordinator_address: host:port of process 0, to say it explicitly instead.
    process_count: number of processes.
    process_index: of this one.
    coordinator_bind_address: host:port where process 0 listens; None for where the others
      look for it, and nowhere else.
    join_seconds: in which all must have come.
  """

  multiprocess: bool = False
  coordinator_address: str | None = None
  process_count: int | None = None
  process_index: int | None = None
  coordinator_bind_address: str | None = None
  join_seconds: float = 300.0

  @classmethod
  def of(cls, flags: argparse.Namespace) -> Processes:
    """As the flags of `cli.add_process_flags` say it."""
    return cls(
      **{field.name: getattr(flags, field.name) for field in dataclasses.fields(cls)}
    )


def initialize(processes: Processes, about: Mapping[str, str]) -> None:
  """Joins the other processes; does nothing for a run of one.

  Args:
    processes: how they find each other.
    about: what must be equal in all of them, by name.

  Raises:
    UserError: some but not all of the three explicit flags, an address or an index that is
      none, no cluster where one is to be detected, processes that differ.
    leaving.Again: some have not come.
  """
  explicit = (
    processes.coordinator_address,
    processes.process_count,
    processes.process_index,
  )
  devices = None
  configs.check_value('--join_seconds', processes.join_seconds, configs.POSITIVE)
  if all(value is None for value in explicit):
    if not processes.multiprocess:
      return
    *explicit, devices = _detected(processes.join_seconds)
  configs.check(
    all(value is not None for value in explicit),
    '--coordinator_address, --process_count and --process_index go together',
    str(tuple(explicit)),
    'give all three, or --multiprocess alone to have them detected',
  )
  address, count, index = explicit
  _check_address('--coordinator_address', address)
  bind = processes.coordinator_bind_address
  bind = bind or os.environ.get('JAX_COORDINATOR_BIND_ADDRESS')
  if bind is not None:
    _check_address('--coordinator_bind_address', bind)
  configs.check_value('--process_count', count, configs.at_most(2**20))
  configs.check(
    0 <= index < count,
    '--process_index must be in [0, process_count)',
    f'index {index} of {count}',
    'number the processes from 0',
  )
  bind = bind or _bind_address(address, processes.multiprocess)
  if count > 1:
    joining.meet(address, bind, count, index, about, processes.join_seconds)
  try:
    # Before anything asks for a device: JAX joins processes only while no backend is up.
    jax.distributed.initialize(
      address,
      count,
      index,
      devices,
      coordinator_bind_address=bind,
      initialization_timeout=_START_SECONDS,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except jax.errors.JaxRuntimeError as error:
    raise leaving.Again(
      f'JAX could not join the processes at {address} ({str(error).splitlines()[0]})'
    ) from error


def _detected(seconds: float) -> tuple[str, int, int, Any]:
  """Address, count, index and local devices, as JAX finds them in a cluster.

  Raises:
    UserError: it finds none, or not all of its numbers.
  """
  # JAX asks its clusters only where it joins at once, and names nobody who is missing.
  from jax._src import clusters

  reason = 'no cluster'
  try:
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      *(os.environ.get('JAX_COORDINATOR_ADDRESS'), None, None, None, None, int(seconds))
    )
  # As many kinds as there are clusters: an environment that lacks a variable, no package.
  except Exception as error:
    found, reason = (None,), f'{type(error).__name__}: {error}'
  if None in found[:3]:
    raise configs.UserError(
      '--multiprocess must run where JAX detects the other processes, got none '
      f'({reason.rstrip(".")}); give --coordinator_address, --process_count and '
      '--process_index.'
    )
  return found


def _check_address(flag: str, address: str) -> None:
  port = re.fullmatch(r'[^\s/]+:(\d{1,5})', address)
  configs.check(
    port is not None and 0 < int(port[1]) < 2**16,
    f'{flag} must be HOST:PORT',
    repr(address),
    'give the host of process 0 and a port that is free there, such as 10.0.0.1:1234',
  )


def _bind_address(address: str, detected: bool) -> str:
  """Where process 0 listens for those that are told its address: there, and nowhere else.

  But everywhere, where that would be for this machine alone, as of a name in /etc/hosts, or
  where a cluster names an address that is not the machine's own.
  """
  host, port = joining.split(address)
  everywhere = f'[::]:{port}'
  try:
    kind, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    local = ipaddress.ip_address(where[0]).is_loopback
    if local and host != 'localhost' and host != where[0]:
      return everywhere
    if detected:
      with socket.socket(kind, socket.SOCK_STREAM) as probe:
        probe.bind((where[0], 0))
  except OSError:
    return everywhere if detected else address
  return address


def check_devices() -> None:
  """Raises UserError, in all processes, if they have not the same devices each."""
  kinds: dict[int, list[str]] = {}
  for device in jax.devices():
    kinds.setdefault(device.process_index, []).append(device.device_kind)
  lines = [
    f'{len(own)} x {own[0]} in process {index}, {len(kinds[0])} x {kinds[0][0]} in 0'
    for index, own in kinds.items()
    if own != kinds[0]
  ]
  configs.check(
    not lines,
    'all processes must have the same number and kind of devices',
    '; '.join(lines),
    'start them on machines of one kind, with one --cpu_devices',
  )


def is_leader() -> bool:
  """Whether this process writes and prints for all."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits for all processes, however long; who is lost ends the wait (`glm_jax.peers`)."""
  if jax.process_count() > 1:
    _barriers[name] += 1
    # By the coordinator, as Orbax does, and not by a collective: the first one between
    # CPUs waits 30 s for the others, and process 0 may prepare data for longer.
    jax_distributed.global_state.client.wait_at_barrier(
      f'glm_jax/{name}/{_barriers[name]}', _WAIT_MILLISECONDS
    )


def any_process(flag: bool, mesh: jax.sharding.Mesh) -> jax.Array:
  """Whether it is true in one of the processes: a bool [] that nobody has waited for.

  Args:
    flag: of this process.
    mesh: of all devices.
  """
  axes = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
  flags = jax.make_array_from_callback((mesh.size,), axes, lambda _: np.array([flag]))
  return _any(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))(flags)


@functools.cache
def _any(everywhere: jax.sharding.NamedSharding) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(jnp.any, out_shardings=everywhere)


@contextlib.contextmanager
def leader_first() -> Iterator[None]:
  """The body runs in process 0, then in all others at once."""
  # The others wait before the body, the leader after it: one and the same barrier.
  if not is_leader():
    barrier('leader_first')
  yield
  if is_leader():
    barrier('leader_first')


def check_equal(name: str, value: Mapping[str, Any], remedy: str) -> None:
  """Raises UserError, in all processes, if they do not have the same values.

  Args:
    name: of what is compared.
    value: of this process, by name: JSON.
    remedy: what to do.
  """
  if jax.process_count() == 1:
    return
  own = {key: json.dumps(entry, sort_keys=True) for key, entry in value.items()}
  first, *others = (json.loads(text) for text in _gather(json.dumps(own)))
  lines = []
  for index, other in enumerate(others, 1):
    lines += joining.differences(first, other, index)
  configs.check(
    not lines, f'all processes must have the same {name}', '; '.join(lines[:5]), remedy
  )


def _gather(text: str) -> list[str]:
  """A text of each process, in their order."""
  barrier('gather')
  # Processes exchange arrays, of one size.
  content = np.frombuffer(text.encode('utf-8'), np.uint8)
  sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(content)))).ravel()
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(content)] = content
  rows = np.asarray(multihost_utils.process_allgather(padded))
  return [bytes(row[:size]).decode('utf-8') for row, size in zip(rows, sizes, strict=True)]
