"""Flags, gin, exit codes and quiet logs: what all commands share.

The one module that knows gin. gin binds configuration dataclasses and nothing else: the
model is read in Python. A gin file is parsed without running code: imports and
registrations in it are refused.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

EXIT_DATA = 65  # bad input or configuration: trying again does not help
EXIT_NUMERICS = 70  # the loss is no longer finite
EXIT_IO = 74  # a file cannot be read or written

_BINDING = re.compile(r'--gin\.([^=]+)=(.*)', re.DOTALL)


def main(run: Callable[[Sequence[str]], None]) -> None:
  """Runs a command: one message and an exit code for what a user can mend."""
  be_quiet()
  try:
    run(sys.argv[1:])
  except FloatingPointError as error:
    _stop(str(error), EXIT_NUMERICS)
  except (ValueError, OSError) as error:
    if isinstance(error, (UnicodeError, NotImplementedError)):
      raise
    _stop(_message(error), EXIT_IO if isinstance(error, OSError) else EXIT_DATA)
  except KeyboardInterrupt:
    _stop('interrupted', 130)


def parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
  """An argument parser whose help ends with an example."""
  return argparse.ArgumentParser(
    prog=f'python -m glm_jax.{command}',
    description=description,
    allow_abbrev=False,
    epilog=f'example:\n  {example}',
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


def add_gin_flags(flags: argparse.ArgumentParser) -> None:
  """--gin_file, --gin_search_paths, --gin.NAME=value and --import, as in T5X."""
  group = flags.add_argument_group('configuration')
  group.add_argument(
    '--gin_file',
    action='append',
    default=[],
    metavar='FILE',
    required=True,
    help='gin file; may be repeated, later ones win',
  )
  group.add_argument(
    '--gin_search_paths',
    default='',
    metavar='DIR,DIR',
    help='where gin files and their includes are looked for besides the '
    'current folder and the installed package',
  )
  group.add_argument(
    '--gin.NAME',
    dest='unused',
    metavar='VALUE',
    help='set one value, such as --gin.TRAIN_STEPS=100 or '
    '--gin.MODEL_DIR="\'runs/a\'"; may be repeated',
  )
  group.add_argument(
    '--import',
    dest='imports',
    action='append',
    default=[],
    metavar='MODULE',
    help='Python module to import first, which may '
    'register seqio tasks of your own; may be repeated',
  )


def add_process_flags(flags: argparse.ArgumentParser) -> None:
  """Flags of `glm_jax.distributed.Processes`, and virtual devices."""
  group = flags.add_argument_group('processes and devices')
  group.add_argument(
    '--multiprocess',
    action='store_true',
    help='several processes, detected by JAX (Cloud TPU, SLURM, ...)',
  )
  group.add_argument(
    '--coordinator_address',
    metavar='HOST:PORT',
    help='address of process 0, instead of detection',
  )
  group.add_argument('--process_count', type=int, metavar='N')
  group.add_argument('--process_index', type=int, metavar='I')
  group.add_argument(
    '--cpu_devices',
    type=int,
    default=0,
    metavar='N',
    help='act as N devices on the CPU of this process, to try a mesh',
  )


def split_bindings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Separates `--gin.NAME=value` arguments, as gin bindings, from the others.

  Example:
    >>> split_bindings(['--gin_file=a.gin', '--gin.TRAIN_STEPS=3'])
    (['--gin_file=a.gin'], ['TRAIN_STEPS=3'])
  """
  others, bindings = [], []
  for argument in argv:
    match = _BINDING.fullmatch(argument)
    if match:
      bindings.append(f'{match[1]}={match[2]}')
    else:
      others.append(argument)
  return others, bindings


def use_cpu_devices(count: int) -> None:
  """Splits the CPU into virtual devices; must precede the first use of JAX."""
  if count < 0:
    raise ValueError(f'--cpu_devices must be 1 or more, got {count}; leave it out for one.')
  if count:
    # XLA's pool has a thread a core; devices that wait for each other need more.
    os.environ.setdefault('NPROC', str(4 * count))
    import jax

    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', count)


def find_devices() -> None:
  """Starts JAX quietly: libtpu without a chip says so at length."""
  import jax

  with silenced_stderr():
    jax.devices()


def import_tensorflow() -> None:
  """Imports TensorFlow quietly, and so that it sees no accelerator: they belong to JAX."""
  with silenced_stderr():
    from glm_jax.data import pipeline as _  # noqa: F401 (which hides them)


def import_modules(names: Sequence[str]) -> None:
  """Imports modules of the user's by name, with the current folder on the path.

  They may use TensorFlow as soon as they are imported, so it is made ready before.
  """
  if not names:
    return
  import_tensorflow()
  if '' not in sys.path and str(Path.cwd()) not in sys.path:
    sys.path.insert(0, str(Path.cwd()))
  for name in names:
    try:
      importlib.import_module(name)
    except ModuleNotFoundError as error:
      if error.name and (name == error.name or name.startswith(error.name + '.')):
        raise ValueError(
          f'--import must name a module on the Python path, got {name!r}; '
          'run from its folder or set PYTHONPATH.'
        ) from error
      raise


def load_config(
  kind: type,
  configurables: Sequence[type],
  files: Sequence[str],
  search_paths: str,
  bindings: Sequence[str],
  *,
  placeholders: bool = False,
) -> tuple[Any, str]:
  """Builds a configuration from gin files and bindings.

  Args:
    kind: the dataclass to build.
    configurables: the dataclasses that gin may bind.
    files: gin files, later ones win.
    search_paths: comma-separated folders.
    bindings: such as 'TRAIN_STEPS=3'; they win over files.
    placeholders: whether macros that are used and not set, such as the path of a corpus,
      become 'unset', for a command that does not need them.

  Returns:
    The instance of `kind`, and the operative configuration: gin text that alone gives
    the same instance again.

  Raises:
    ValueError: whatever is wrong in them, in one message.
  """
  import gin

  root = Path(__file__).resolve().parent.parent
  folders = [path for path in search_paths.split(',') if path] + ['', str(root)]
  gin.clear_config()
  for configurable in configurables:
    if configurable.__name__ not in _registered:
      gin.external_configurable(configurable, configurable.__name__)
      _registered.add(configurable.__name__)
  # Only plain files: gin's other reader imports packages to find files in them, and
  # stumbles over a folder such as gin_configs, which is none.
  gin.config._FILE_READERS[:] = gin.config._FILE_READERS[:1]
  # The package's folder first: gin looks in the last one added first.
  for folder in reversed(folders):
    gin.add_config_file_search_path(folder)
  seen: dict[str, str] = {}
  for file in files:
    _refuse_code(_find(file, folders), folders, seen)
  try:
    gin.parse_config_files_and_bindings(list(files), list(bindings), finalize_config=False)
    _refuse_unused_macros(gin)
    if placeholders:
      defined, used = _macros(gin)
      gin.parse_config([f"{name} = 'unset'" for name in sorted(used - defined)])
    gin.finalize()
    config = gin.get_configurable(kind.__name__)()
    return config, gin.operative_config_str()
  except (
    ValueError,
    TypeError,
    RuntimeError,
    OSError,
    SyntaxError,
    AttributeError,
  ) as error:
    raise ValueError(_message(error)) from error


_registered: set[str] = set()


def _find(file: str, folders: Sequence[str]) -> Path:
  for folder in folders:
    path = Path(folder) / file
    if path.is_file():
      return path
  raise ValueError(
    f'--gin_file and include must name a gin file, got {file!r}, which is '
    f'in none of {[folder or "." for folder in folders]}; correct the path.'
  )


def _refuse_code(path: Path, folders: Sequence[str], seen: dict[str, str]) -> None:
  """Raises ValueError if a gin file, or one it includes, would run Python."""
  from gin import config_parser

  if str(path) in seen:
    return
  try:
    seen[str(path)] = text = path.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(
      f'a gin file must be UTF-8 text, got {path} ({error}); correct it.'
    ) from error
  try:
    statements = list(config_parser.ConfigParser(text, _NoDelegate()))
  except SyntaxError as error:
    raise ValueError(f'{path}: {error.msg} (line {error.lineno}).') from error
  for statement in statements:
    if isinstance(statement, config_parser.ImportStatement):
      raise ValueError(
        f'a gin file must not import modules, got {statement.module!r} in {path}; name '
        'modules of your own on the command line with --import.'
      )
    if isinstance(statement, config_parser.IncludeStatement):
      _refuse_code(_find(statement.filename, folders), folders, seen)


class _NoDelegate:
  """Stands for every configurable while a file is only looked at."""

  def configurable_reference(self, scoped_name: str, evaluate: bool) -> str:
    return scoped_name

  def macro(self, scoped_name: str) -> str:
    return scoped_name


def _refuse_unused_macros(gin: Any) -> None:
  """A macro that nothing refers to is a misspelt one."""
  import difflib

  defined, used = _macros(gin)
  for name in sorted(defined - used):
    near = difflib.get_close_matches(name, sorted(used), 1)
    hint = f'did you mean {near[0]}' if near else f'macros in use are {sorted(used)}'
    raise ValueError(
      f'a macro must be used by something, got {name}, which nothing refers to; {hint}?'
    )


def _macros(gin: Any) -> tuple[set[str], set[str]]:
  """Names of macros that are defined, and that are used."""
  text = gin.config_str()
  return (
    set(re.findall(r'^([A-Za-z_]\w*)\s*=', text, re.MULTILINE)),
    set(re.findall(r'%([A-Za-z_]\w*)', text)),
  )


def _message(error: BaseException) -> str:
  """The first paragraph of an error; gin adds its own trace behind it."""
  if isinstance(error, OSError) and error.strerror and error.filename:
    return f'{error.filename}: {error.strerror}'
  text = str(error).strip()
  text = re.split(r'\n\s*In call to configurable', text)[0].strip()
  return re.sub(r'\s*\n\s*', ' ', text)


def _stop(message: str, code: int) -> None:
  print(f'error: {message}', file=sys.stderr, flush=True)
  sys.exit(code)


def be_quiet() -> None:
  """Silences what TensorFlow and absl say to nobody; warnings of XLA remain."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
  import logging
  import threading
  import warnings

  from absl import logging as absl_logging

  # Errors, too: Orbax logs them with a trace before it raises them.
  absl_logging.set_verbosity(absl_logging.FATAL)
  absl_logging.set_stderrthreshold(absl_logging.FATAL)
  for name in ('absl', 'asyncio', 'jax', 'orbax', 'tensorflow', 'etils'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  warnings.filterwarnings('ignore')
  # Threads that write checkpoints print an error that is raised again in ours.
  sys.unraisablehook = threading.excepthook = lambda _: None


@contextlib.contextmanager
def silenced_stderr() -> Iterator[None]:
  """Hides file descriptor 2, where libraries write before their logging is set up."""
  sys.stderr.flush()
  saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(null, 2)
    yield
  finally:
    sys.stderr.flush()
    os.dup2(saved, 2)
    os.close(saved)
    os.close(null)
