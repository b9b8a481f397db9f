"""Flags, gin and exit codes: what all commands share.

The one module that knows gin. gin binds configuration dataclasses and nothing else: the
model is read in Python. A gin file is parsed without running code: imports and
registrations in it are refused.
"""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glm_jax import startup
from glm_jax.configs import ResourceError, UserError

# Exit codes as in sysexits.h, by which a scheduler can tell whether to try again.
# Bad input or configuration: the next attempt would fail as well.
EXIT_DATA = 65
# The loss is no longer finite.
EXIT_NUMERICS = 70
# A file cannot be read or written.
EXIT_IO = 74

# What the system says of its disks and permissions. A file that is missing is not among
# them: either it is refused by name, or the program lost it.
_OF_THE_DISK = frozenset(
  getattr(errno, name)
  for name in (
    *('EACCES', 'EPERM', 'EROFS', 'ENOSPC', 'EDQUOT', 'EFBIG', 'EIO'),
    *('EEXIST', 'ENOTDIR', 'EISDIR', 'ENAMETOOLONG', 'EMFILE', 'ENFILE'),
  )
)
_BINDING = re.compile(r'--gin\.([^=]+)=(.*)', re.DOTALL)


def main(run: Callable[[Sequence[str]], None]) -> None:
  """Runs a command and leaves with its exit code."""
  startup.be_quiet()
  sys.exit(exit_code(run, sys.argv[1:]))


def exit_code(run: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
  """Runs a command: one message and an exit code for what a user can mend.

  Any other exception is a defect of the program, and passes.
  """
  try:
    run(argv)
  except UserError as error:
    return _stop(_message(error), EXIT_DATA)
  except FloatingPointError as error:
    return _stop(str(error), EXIT_NUMERICS)
  except OSError as error:
    if not isinstance(error, ResourceError) and error.errno not in _OF_THE_DISK:
      raise
    return _stop(_message(error), EXIT_IO)
  except KeyboardInterrupt:
    # 128 + SIGINT, as a shell reports it.
    return _stop('interrupted', 130)
  return 0


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
    # For --help alone: `split_bindings` takes these before the parser sees them.
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


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
  """The flags of a command that has `add_gin_flags`; `bindings` holds --gin.NAME=value."""
  argv, bindings = split_bindings(argv)
  flags = parser.parse_args(argv)
  flags.bindings = bindings
  return flags


def configuration(
  flags: argparse.Namespace,
  *,
  kind: type | None = None,
  more: Sequence[type] = (),
  bindings: Sequence[str] = (),
  placeholders: bool = False,
) -> tuple[Any, str]:
  """The configuration that the flags of a command ask for, and its text.

  Modules of the user's are imported first: what they register, and the dataclasses that
  their `CONFIGURABLES` lists, may be named in gin.

  Args:
    flags: as `parse` gives them.
    kind: a dataclass to build instead of a `TrainConfig`.
    more: dataclasses that gin may bind besides those of a run.
    bindings: that win over the flags'.
    placeholders: see `load_config`.
  """
  # Not above: --help of a command must not wait for JAX.
  from glm_jax.recipes import CONFIGURABLES
  from glm_jax.training.config import TrainConfig

  own = startup.import_modules(flags.imports)
  return load_config(
    kind or TrainConfig,
    (*CONFIGURABLES, *more, *own),
    flags.gin_file,
    flags.gin_search_paths,
    [*flags.bindings, *bindings],
    placeholders=placeholders,
  )


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
    UserError: whatever is wrong in them, in one message.
  """
  import gin

  root = Path(__file__).resolve().parent.parent
  folders = [path for path in search_paths.split(',') if path] + ['', str(root)]
  # gin's state belongs to the process: what an earlier call bound must not remain.
  gin.clear_config()
  for configurable in configurables:
    if configurable.__name__ not in _registered:
      gin.external_configurable(configurable, configurable.__name__)
      _registered.add(configurable.__name__)
  # Only plain files. A private list of gin: its other reader imports packages to find files
  # in them, and stumbles over a folder such as gin_configs, which is none.
  gin.config._FILE_READERS[:] = gin.config._FILE_READERS[:1]
  # The package's folder first: gin looks in the last one added first.
  for folder in reversed(folders):
    gin.add_config_file_search_path(folder)
  seen: dict[str, str] = {}
  for file in files:
    # Before gin parses anything: parsing an import statement runs it.
    _refuse_code(_find(file, folders), folders, seen)
  _refuse_moved([binding.split('=')[0].split('/')[-1].strip() for binding in bindings])
  # No code of ours runs in here: whatever is raised is about the text.
  try:
    gin.parse_config_files_and_bindings(list(files), list(bindings), finalize_config=False)
    _refuse_unused_macros(gin)
    if placeholders:
      defined, used = _macros(gin)
      gin.parse_config([f"{name} = 'unset'" for name in sorted(used - defined)])
    gin.finalize()
  except Exception as error:
    raise UserError(_message(error)) from error
  try:
    config = gin.get_configurable(kind.__name__)()
  except (UserError, TypeError, RuntimeError) as error:
    # gin raises TypeError for a call that does not fit, and RuntimeError for a parameter
    # without a value; the same types from code of ours are defects.
    if not isinstance(error, UserError) and not _is_of_gin(error):
      raise
    raise UserError(_message(error)) from error
  return config, gin.operative_config_str()


def _is_of_gin(error: BaseException) -> bool:
  """Whether a call that gin made failed at once, so that no code of ours was reached."""
  trace = error.__traceback__
  while trace is not None and trace.tb_next is not None:
    trace = trace.tb_next
  return trace is None or trace.tb_frame.f_globals.get('__name__', '').startswith('gin.')


# gin refuses to register a name twice, even after `clear_config`.
_registered: set[str] = set()


def _find(file: str, folders: Sequence[str]) -> Path:
  for folder in folders:
    path = Path(folder) / file
    if path.is_file():
      return path
  raise UserError(
    f'--gin_file and include must name a gin file, got {file!r}, which is '
    f'in none of {[folder or "." for folder in folders]}; see --gin_search_paths.'
  )


def _refuse_code(path: Path, folders: Sequence[str], seen: dict[str, str]) -> None:
  """Raises UserError if a gin file, or one it includes, would run Python."""
  from gin import config_parser

  if str(path) in seen:
    return
  try:
    seen[str(path)] = text = path.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise UserError(
      f'a gin file must be UTF-8 text, got {path} ({error}); save it as UTF-8.'
    ) from error
  try:
    statements = list(config_parser.ConfigParser(text, _NoDelegate()))
  except SyntaxError as error:
    raise UserError(f'{path}: {error.msg} (line {error.lineno}).') from error
  bound = [s for s in statements if isinstance(s, config_parser.BindingStatement)]
  _refuse_moved([f'{s.selector}.{s.arg_name}' for s in bound], f' in {path}')
  for statement in statements:
    if isinstance(statement, config_parser.ImportStatement):
      raise UserError(
        f'a gin file must not import modules, got {statement.module!r} in {path}; name '
        'modules of your own on the command line with --import.'
      )
    if isinstance(statement, config_parser.IncludeStatement):
      _refuse_code(_find(statement.filename, folders), folders, seen)


def _refuse_moved(names: Sequence[str], where: str = '') -> None:
  """Raises UserError for parameters under the names of an earlier version, all at once."""
  from glm_jax.recipes import MOVED, WIRED

  old = [name for name in dict.fromkeys(names) if name in MOVED]
  if old:
    new = [MOVED[name] for name in old]
    once = dict.fromkeys(WIRED[name.split('.')[0]] for name in new)
    raise UserError(
      f'a parameter must have its name of today, got {", ".join(old)}{where}; write '
      f'{", ".join(new)} (and {", ".join(once)} once).'
    )


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
    raise UserError(
      f'a macro must be used by something, got {name}, which nothing refers to; {hint}?'
    )


def _macros(gin: Any) -> tuple[set[str], set[str]]:
  """Names of macros that are defined, and that are used."""
  # gin has no call that lists macros: its own text of the configuration does.
  text = gin.config_str()
  return (
    set(re.findall(r'^([A-Za-z_]\w*)\s*=', text, re.MULTILINE)),
    set(re.findall(r'%([A-Za-z_]\w*)', text)),
  )


def _message(error: BaseException) -> str:
  """The first paragraph of an error; gin adds its own trace behind it."""
  # str(error) would begin with '[Errno 2]'.
  if isinstance(error, OSError) and error.strerror and error.filename:
    return f'{error.filename}: {error.strerror}'
  text = str(error).strip()
  # One line for the terminal, without the configurables that gin was in.
  text = re.split(r'\n\s*In call to configurable', text)[0].strip()
  return re.sub(r'\s*\n\s*', ' ', text)


def _stop(message: str, code: int) -> int:
  print(f'error: {message}', file=sys.stderr, flush=True)
  return code
