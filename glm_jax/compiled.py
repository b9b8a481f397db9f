"""What XLA compiled, kept for the next run: JAX's cache, in the user's folder for caches.

It is on unless the user has told JAX otherwise: `JAX_COMPILATION_CACHE_DIR` names another
folder, and turns it off where it is empty, as `JAX_ENABLE_COMPILATION_CACHE=false` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import warnings
from importlib import metadata
from pathlib import Path

# A step of the largest models is some hundred megabytes.
_MOST_BYTES = 5 * 2**30
# What tells processors apart in /proc/cpuinfo, where each core also has its own clock.
_OF_PROCESSOR = ('vendor_id', 'cpu family', 'model', 'flags', 'Features', 'CPU ')
_LEAST_SECONDS = 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'


def folder() -> Path:
  """Where it is kept: by version, and by processor.

  JAX's own key of an entry knows the version, the program and the compiler's options. It
  does not know the processor's instructions, and a home folder may be that of several
  machines: code for another dies of SIGILL. Nor does it know the cores, for which XLA
  splits its loops.

  Raises:
    RuntimeError: the user has no home folder.
  """
  cpuinfo = Path('/proc/cpuinfo')
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  kinds = {line for line in lines if line.startswith(_OF_PROCESSOR)}
  machine = os.uname().machine
  cores = len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()
  known = '\n'.join([machine, str(cores), *sorted(kinds)])
  processor = hashlib.sha256(known.encode()).hexdigest()[:12]
  version = metadata.version('jaxlib')
  return _root() / f'jax-{version}-{machine}-{processor}'


def keep() -> list[str]:
  """Lets JAX keep what it compiles; to be called before it compiles anything.

  With several processes, it is left to the user: JAX writes from the first alone, so that
  the others find nothing unless they share its disk, and an executable that only some of
  them compile may wait for the others' measurements for ever.

  Returns:
    A line if nothing can be kept, without which a run goes on.
  """
  import jax

  said = jax.config.jax_compilation_cache_dir is not None
  if (
    said or not jax.config.jax_enable_compilation_cache or jax.distributed.is_initialized()
  ):
    return []
  try:
    path = folder()
    # What is in it is run: nobody else may write there.
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
      raise PermissionError(f'no permission to write {path}')
    forget(path.parent, _MOST_BYTES)
  except (OSError, RuntimeError) as error:
    return [
      f'what XLA compiles is not kept: {error}; set XDG_CACHE_HOME to a folder of yours'
    ]
  jax.config.update('jax_compilation_cache_dir', str(path))
  if _LEAST_SECONDS not in os.environ:
    # A run begins with dozens of programs that take a moment each.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  # JAX compiles anew what it cannot read. That takes time, so it is said.
  warnings.filterwarnings('default', message='Error .* persistent compilation cache')
  return []


def forget(root: Path, most_bytes: int) -> None:
  """Removes what was not used for longest, of any version, until the rest is no larger.

  JAX's own bound (`jax_compilation_cache_max_size`) is one for each version's folder, and
  takes a lock for each program, for which a shared disk may let it wait.
  """
  found = []
  for path in root.rglob('*-cache'):
    # Another run may clear up at the same time.
    with contextlib.suppress(FileNotFoundError):
      stat = path.stat()
      # Most disks note a first reading after a writing, and then one a day.
      found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
  total = sum(size for _, size, _ in found)
  for _, size, path in sorted(found):
    if total <= most_bytes:
      return
    path.unlink(missing_ok=True)
    total -= size


def _root() -> Path:
  cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
  return Path(cache) / 'glm_jax' / 'compiled'
