"""What a process does before anything else: devices, TensorFlow, quiet logs.

This module imports no other room, so that worker processes may begin with it, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from glm_jax import configs

# Loggers of libraries that say at length what nobody acts on, or what they raise besides.
_LOUD = ('absl', 'asyncio', 'jax', 'orbax', 'tensorflow', 'etils')
# Libraries that print an error in a thread of their own, and raise it in ours later.
_TOLD_AGAIN = ('orbax', 'tensorstore', 'tensorboard')


# Of NVIDIA, AMD, and TPUs of two kinds.
_ACCELERATORS = ('/dev/nvidiactl', '/dev/kfd', '/dev/accel0', '/dev/vfio')
# M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD of <malloc.h>: a single arena, which gives
# nothing back. Those of threads are unmapped whenever they are empty.
_KEEP = {-8: 1, -4: 0, -1: -1}

# Each has threads of its own.
_MOST_CPU_DEVICES = 1024


def be_quiet() -> None:
  """Silences what libraries say to nobody; warnings of XLA and our own threads remain."""
  # Both are read when TensorFlow is imported, and must be set before.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  from absl import logging as absl_logging

  # Errors, too: Orbax logs them with a trace before it raises them.
  absl_logging.set_verbosity(absl_logging.FATAL)
  absl_logging.set_stderrthreshold(absl_logging.FATAL)
  for name in _LOUD:
    logging.getLogger(name).setLevel(logging.CRITICAL)
  warnings.filterwarnings('ignore')
  threading.excepthook, sys.unraisablehook = _of_thread, _unraisable


def _of_thread(args: threading.ExceptHookArgs) -> None:
  """Prints what ended a thread, unless a library raises it again where it is waited for."""
  if not _packages(args.exc_traceback) & {*_TOLD_AGAIN}:
    threading.__excepthook__(args)


def _unraisable(args: sys.UnraisableHookArgs) -> None:
  """Prints what nobody can catch, but for TensorStore's writes after the first that failed.

  Orbax closes its event loop at the first error and raises it; TensorStore's own threads
  then tell asyncio of the other writes, and have no frame of Python beside asyncio's.
  """
  if _packages(args.exc_traceback) != {'asyncio'}:
    sys.__unraisablehook__(args)


def _packages(trace: TracebackType | None) -> set[str]:
  """The top-level packages of all frames: a thread may have been started by any of them."""
  frames = (frame for frame, _ in traceback.walk_tb(trace))
  return {frame.f_globals.get('__name__', '').split('.')[0] for frame in frames}


# Copies of file descriptor 2 while it is hidden, the oldest first.
_hidden: list[int] = []


def stderr() -> int:
  """The descriptor of what a user reads, whether it is hidden for the moment or not."""
  return [*_hidden, 2][0]


@contextlib.contextmanager
def silenced_stderr() -> Iterator[None]:
  """Hides file descriptor 2, where libraries write before their logging is set up."""
  sys.stderr.flush()
  # The descriptor, not sys.stderr: C++ libraries write to it directly.
  saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  _hidden.append(saved)
  try:
    os.dup2(null, 2)
    yield
  finally:
    sys.stderr.flush()
    os.dup2(saved, 2)
    _hidden.remove(saved)
    os.close(saved)
    os.close(null)


class Telling:
  """Says every so often what a command is doing, until it has something else to say.

  Whoever starts quickly is told nothing. Use it as a context: nothing runs on behind it.

  Attributes:
    quiet: whether this process leaves it to another.
  """

  def __init__(self, doing: str, *, quiet: bool = False, seconds: float = 10.0):
    self.quiet = quiet
    self._doing, self._began, self._seconds = doing, time.perf_counter(), seconds
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._tell, daemon=True)

  def __call__(self, doing: str) -> None:
    """From now on, the process is doing that."""
    self._doing = doing

  def stop(self) -> None:
    """Nothing more is told."""
    self._ended.set()

  def __enter__(self) -> Telling:
    self._thread.start()
    return self

  def __exit__(self, *error: object) -> None:
    self.stop()
    self._thread.join()

  def _tell(self) -> None:
    while not self._ended.wait(self._seconds):
      if not self.quiet:
        print(f'{time.perf_counter() - self._began:.0f} s: {self._doing}', flush=True)


def process_fields(number: int | str) -> list[str]:
  """What Linux says of a process behind its name: proc_pid_stat(5), from field 3 on.

  Raises:
    OSError: there is none, or this is no Linux.
  """
  # The name may hold spaces and brackets.
  return Path(f'/proc/{number}/stat').read_text().rpartition(')')[2].split()


def process_began() -> float:
  """When this process did, in seconds since the epoch: before Python imported anything."""
  try:
    ticks = int(process_fields('self')[19])
    uptime = float(Path('/proc/uptime').read_text().split()[0])
  except (OSError, ValueError, IndexError):  # no Linux
    return time.time()
  return time.time() - max(0.0, uptime - ticks / os.sysconf('SC_CLK_TCK'))


def use_cpu_devices(count: int) -> None:
  """Splits the CPU into virtual devices; must precede the first use of JAX."""
  configs.check(
    0 <= count <= _MOST_CPU_DEVICES,
    f'--cpu_devices must be in 1 .. {_MOST_CPU_DEVICES}',
    str(count),
    'give fewer, or leave it out',
  )
  if count:
    # XLA's pool has a thread a core; devices that wait for each other need more.
    os.environ.setdefault('NPROC', str(4 * count))
    import jax

    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', count)


def keep_memory() -> None:
  """Where JAX computes on a CPU: what arrays leave behind is kept for those that follow.

  To be called before there are threads. As it is, glibc gives the memory of each step back
  to the system, whose pages of zeros in return took a fifth to a quarter of a step. Does
  nothing where an accelerator is asked for or there is one, nor without glibc.
  """
  asked = os.environ.get('JAX_PLATFORMS', '')
  if asked != 'cpu' and (asked or any(map(os.path.exists, _ACCELERATORS))):
    return
  if sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'mallopt'):
    for option, value in _KEEP.items():
      libc.mallopt(option, value)


def find_devices() -> None:
  """Starts JAX quietly: libtpu without a chip says so at length. See `compiled`, too.

  Raises:
    UserError: see `accelerators.start`.
  """
  from glm_jax import accelerators, compiled

  with silenced_stderr():
    warned = accelerators.start()
  for line in [*warned, *compiled.keep()]:
    print(f'warning: {line}', file=sys.stderr, flush=True)


def import_tensorflow() -> None:
  """Imports TensorFlow quietly, and so that it sees no accelerator: they belong to JAX."""
  with silenced_stderr():
    import tensorflow as tf

    for kind in ('GPU', 'TPU'):
      tf.config.set_visible_devices([], kind)


def import_modules(names: Sequence[str]) -> list[type]:
  """Imports modules of the user's by name, with the current folder on the path.

  They may use TensorFlow as soon as they are imported, so it is made ready before.

  Returns:
    What gin may bind besides: the dataclasses that their `CONFIGURABLES` list.
  """
  if not names:
    return []
  own: list[type] = []
  import_tensorflow()
  if '' not in sys.path and str(Path.cwd()) not in sys.path:
    # A module beside the caller is found under `python -m` and under an entry point alike.
    sys.path.insert(0, str(Path.cwd()))
  for name in names:
    configs.check(
      all(part.isidentifier() for part in name.split('.')),
      '--import must name a module',
      repr(name),
      'write its name, such as my.module, without a path',
    )
    try:
      own += getattr(importlib.import_module(name), 'CONFIGURABLES', ())
    except ModuleNotFoundError as error:
      # A module that exists and imports another that does not is the user's to debug, with
      # its traceback.
      if error.name and (name == error.name or name.startswith(error.name + '.')):
        raise configs.UserError(
          f'--import must name a module on the Python path, got {name!r}; '
          'run from its folder or set PYTHONPATH, and leave out .py.'
        ) from error
      raise
  return own
