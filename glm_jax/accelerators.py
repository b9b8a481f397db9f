"""Accelerators whose plugin is installed and that give JAX no device.

JAX says so in its log and computes on the CPU. What it knows stands behind private names,
of which `jax._src.xla_bridge` has had these from jax 0.10 to 0.12.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import jax
from jax._src import hardware_utils, xla_bridge

from glm_jax.configs import check

# What JAX raises of processes that do not find each other, which is no plugin's fault.
_OF_PEERS = ('DEADLINE_EXCEEDED', 'UNAVAILABLE')


def start() -> list[str]:
  """Starts JAX.

  Returns:
    Warnings of JAX's: of hardware for which no plugin is installed.

  Raises:
    UserError: an accelerator did not load, and neither `JAX_PLATFORMS` nor `--cpu_devices`
      asks for the CPU.
  """
  asked = [name for name in (jax.config.jax_platforms or '').split(',') if name]
  with _log_of_jax() as records:
    try:
      jax.devices()
      reasons = []
    # JAX's own assertion fails if the only platforms that it was given have no device.
    except (RuntimeError, AssertionError) as error:
      if any(word in str(error) for word in _OF_PEERS):
        raise
      reasons = [str(error) or f'JAX_PLATFORMS={",".join(asked)} has no device']
  if not reasons and asked[:1] == ['cpu']:
    return []
  reasons = reasons or [*_without_devices(asked)]
  # What a plugin said explains why JAX has none; of no interest if all that was asked for
  # is there.
  if reasons or not asked:
    reasons = [*_failed_plugins(records), *reasons]
  check(
    not reasons,
    'an accelerator that a plugin is installed for, or JAX_PLATFORMS names, must load',
    ' / '.join(reasons),
    "mend its driver and libraries (nvidia-smi lists NVIDIA's GPUs), uninstall the plugin, "
    'or set JAX_PLATFORMS=cpu to compute on the CPU',
  )
  return [] if asked else [record.getMessage() for record in records]


def _failed_plugins(records: list[logging.LogRecord]) -> Iterator[str]:
  """What JAX's log says of plugins that it could not import or initialize."""
  for record in records:
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
      # The cause holds what the driver said.
      causes = [' '.join(str(e).split()) for e in (error, error.__cause__) if e is not None]
      yield ': '.join([*map(str, record.args or ()), *causes])


def _without_devices(asked: list[str]) -> Iterator[str]:
  """What is asked for, or if nothing is, registered, and gave JAX no device."""
  backends, registered = xla_bridge.backends(), xla_bridge._backend_factories
  for name in asked or registered:
    if name in backends:
      continue
    # JAX is quiet of libtpu, which is also a compiler, on machines without a TPU.
    if asked or not registered[name].fail_quietly:
      yield f'{name}: JAX sees no device of it'
    elif name == 'tpu' and hardware_utils.num_available_tpu_chips_and_device_id()[0]:
      yield f'tpu: {xla_bridge._backend_errors[name]}'


@contextlib.contextmanager
def _log_of_jax() -> Iterator[list[logging.LogRecord]]:
  """Warnings and errors of the module that loads plugins, which nobody else hears."""
  log, records = logging.getLogger(xla_bridge.__name__), []
  handler = logging.Handler(logging.WARNING)
  handler.emit = records.append
  level, propagate = log.level, log.propagate
  log.setLevel(logging.WARNING)
  log.propagate = False
  log.addHandler(handler)
  try:
    yield records
  finally:
    log.removeHandler(handler)
    log.setLevel(level)
    log.propagate = propagate
