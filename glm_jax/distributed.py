"""Several processes as one run: start-up, and who writes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from glm_jax import configs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
  """How the processes of a run find each other (flags of every command, as in T5X).

  Attributes:
    multiprocess: let JAX detect the cluster (Cloud TPU, SLURM, GKE, Open MPI).
    coordinator_address: host:port of process 0, to say it explicitly instead.
    process_count: number of processes.
    process_index: of this one.
  """

  multiprocess: bool = False
  coordinator_address: str | None = None
  process_count: int | None = None
  process_index: int | None = None


def initialize(processes: Processes) -> None:
  """Joins the other processes; does nothing for a run of one.

  Raises:
    UserError: some but not all of the three explicit flags, an address or an index that is
      none, or no cluster where one is to be detected.
  """
  explicit = (
    processes.coordinator_address,
    processes.process_count,
    processes.process_index,
  )
  # Before anything asks for a device: JAX joins processes only while no backend is up.
  if all(value is None for value in explicit):
    if processes.multiprocess:
      try:
        jax.distributed.initialize()
      except ValueError as error:  # JAX found no cluster, or not all of its numbers
        raise configs.UserError(
          '--multiprocess must run where JAX detects the other processes, got none '
          f'({str(error).rstrip(".")}); give --coordinator_address, --process_count and '
          '--process_index.'
        ) from error
    return
  configs.check(
    all(value is not None for value in explicit),
    '--coordinator_address, --process_count and --process_index go together',
    str(explicit),
    'give all three, or --multiprocess alone to have them detected',
  )
  address, count, index = explicit
  port = re.fullmatch(r'[^\s/]+:(\d{1,5})', address)
  configs.check(
    port is not None and 0 < int(port[1]) < 2**16,
    '--coordinator_address must be HOST:PORT',
    repr(address),
    'give the host of process 0 and a port that is free there, such as 10.0.0.1:1234',
  )
  configs.check(
    0 <= index < count,
    '--process_index must be in [0, process_count)',
    f'index {index} of {count}',
    'number the processes from 0',
  )
  jax.distributed.initialize(address, count, index)


def is_leader() -> bool:
  """Whether this process writes and prints for all."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits for all processes."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


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


def check_equal(name: str, value: str) -> None:
  """Raises UserError if the processes do not have the same value."""
  if jax.process_count() == 1:
    return
  # Processes exchange arrays, not text: 28 bits of a hash, which an int32 holds.
  number = int(hashlib.sha256(value.encode()).hexdigest()[:7], 16)
  numbers = np.asarray(multihost_utils.process_allgather(np.int32(number))).ravel()
  configs.check(
    bool((numbers == number).all()),
    f'all processes must have the same {name}',
    f'different ones ({value} in process {jax.process_index()})',
    'use one CorpusConfig.cache_dir, or files that are the same everywhere',
  )
