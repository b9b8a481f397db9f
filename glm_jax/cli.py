"""Flags and exit codes: what all commands share."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from glm_jax import gin_files, leaving, slips, startup
from glm_jax.bindings import load_config
from glm_jax.configs import LOCAL, ResourceError, UserError, check, check_value, one_line

# Exit codes as in sysexits.h, by which a scheduler can tell whether to try again.
# Bad input or configuration: the next attempt would fail as well.
EXIT_DATA = 65
# The loss is no longer finite.
EXIT_NUMERICS = 70
# A file cannot be read or written.
EXIT_IO = 74
# 128 + SIGPIPE, as a shell reports it.
_EXIT_PIPE = 141

# What the system says of its disks and permissions. A file that is missing is not among
# them: either it is refused by name, or the program lost it.
_OF_THE_DISK = frozenset(
  getattr(errno, name)
  for name in (
    *('EACCES', 'EPERM', 'EROFS', 'ENOSPC', 'EDQUOT', 'EFBIG', 'EIO'),
    *('EEXIST', 'ENOTDIR', 'EISDIR', 'ENAMETOOLONG', 'EMFILE', 'ENFILE'),
  )
)
# Characters of what a server says, which may be a page.
_LONGEST = 400
_BINDING = re.compile(r'--gin\.([^=]+)=(.*)', re.DOTALL)


def main(run: Callable[[Sequence[str]], None]) -> None:
  """Runs a command and leaves with its exit code."""
  startup.be_quiet()
  code = exit_code(run, sys.argv[1:])
  if code == _EXIT_PIPE:
    # Python writes what it still holds as it ends, and would complain again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  sys.exit(code)


def exit_code(run: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
  """Runs a command: one message and an exit code for what a user can mend.

  Any other exception is a defect of the program, and passes.
  """
  try:
    run(argv)
  except BrokenPipeError:
    return _EXIT_PIPE  # whoever read the output, such as head, has enough
  except (Exception, KeyboardInterrupt) as error:
    explained = explain(error)
    if explained is None:
      raise
    message, code = explained
    print(leaving.in_words(message, code), file=sys.stderr, flush=True)
    return code
  return 0


def explain(error: BaseException) -> tuple[str, int] | None:
  """What is said of an error that a user can mend, and the exit code; None for a defect."""
  match error:
    case UserError():
      return one_line(error), EXIT_DATA
    case FloatingPointError():
      return str(error), EXIT_NUMERICS
    case leaving.Again():
      return str(error), leaving.EXIT_AGAIN
    case KeyboardInterrupt():
      return 'interrupted', 130  # 128 + SIGINT, as a shell reports it
    case OSError() if isinstance(error, ResourceError) or error.errno in _OF_THE_DISK:
      return one_line(error), EXIT_IO
    case _ if _is_of_a_bucket(error):
      return one_line(error)[:_LONGEST], EXIT_IO
  return None


def _is_of_a_bucket(error: BaseException) -> bool:
  """Whether TensorFlow could not read or write gs://: no permission, bucket or network."""
  # It has errors of its own, and is not imported to ask.
  return type(error).__module__.startswith('tensorflow.') and 'gs://' in str(error)


class _Parser(argparse.ArgumentParser):
  """One that says in a line what is wrong, as everything else here does."""

  def error(self, message: str) -> NoReturn:
    words = [part for part in message.split() if part.startswith('-')]
    known = [name for action in self._actions for name in action.option_strings]
    if message.startswith('unrecognized') and words:
      near = slips.nearest(words[0].partition('=')[0], known)
      remedy = f'did you mean {near[0]}?' if near else 'see --help'
      if words[0].startswith('--gin.'):
        remedy = 'write a binding as one argument, --gin.NAME=value'
    else:
      remedy = 'see --help'
    raise UserError(f'{message}; {remedy}')


def parser(command: str, description: str, example: str) -> argparse.ArgumentParser:
  """An argument parser whose help ends with an example."""
  return _Parser(
    prog=f'python -m glm_jax.{command}',
    description=description,
    allow_abbrev=False,
    epilog=f'example:\n  {example}',
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


def add_gin_flags(flags: argparse.ArgumentParser, *, required: bool = True) -> None:
  """--gin_file, --gin_search_paths, --gin.NAME=value and --import, as in T5X."""
  group = flags.add_argument_group('configuration')
  group.add_argument(
    '--gin_file',
    action='append',
    default=[],
    metavar='FILE',
    required=required,
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
  add_import_flag(group)


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
    '--coordinator_bind_address',
    metavar='HOST:PORT',
    help="where process 0 listens, if not at --coordinator_address; '[::]:PORT' is "
    'everywhere',
  )
  group.add_argument(
    '--join_seconds',
    type=float,
    default=300.0,
    metavar='SECONDS',
    help='wait so long for the other processes at the start (%(default)g)',
  )
  group.add_argument(
    '--grace_seconds',
    type=float,
    default=leaving.GRACE_SECONDS,
    metavar='SECONDS',
    help='after SIGTERM, SIGINT or SIGHUP, the run saves and leaves with code 42 in at '
    'most so many (%(default)g); a second signal ends it at once',
  )
  add_cpu_devices_flag(group)


def add_import_flag(flags: Any) -> None:
  """The flag of `startup.import_modules`."""
  flags.add_argument(
    '--import',
    dest='imports',
    action='append',
    default=[],
    metavar='MODULE',
    help='Python module to import first, which may '
    'register tasks of your own; may be repeated',
  )


def add_cpu_devices_flag(flags: Any) -> None:
  """The flag of `startup.use_cpu_devices`."""
  flags.add_argument(
    '--cpu_devices',
    type=int,
    default=0,
    metavar='N',
    help='act as N devices on the CPU of this process, to try a mesh',
  )


def add_checkpoint_flags(flags: argparse.ArgumentParser) -> None:
  """The flags of what `opening.find` calls `path` and `beside`."""
  flags.add_argument(
    '--checkpoint',
    required=True,
    metavar='DIR',
    help='a MODEL_DIR (its newest checkpoint), one checkpoint folder, or a released model',
  )
  flags.add_argument(
    '--adapters',
    default='',
    metavar='DIR',
    help='a MODEL_DIR or a checkpoint of adapters that were trained on --checkpoint; a run '
    'with adapters, given as --checkpoint itself, brings its own',
  )


def add_sampling_flags(flags: argparse.ArgumentParser) -> None:
  """Flags of `glm_jax.inference.sampling.Sampling`, its seed, and the dtype."""
  flags.add_argument(
    '--temperature', type=float, default=0.0, help='0 takes the most probable token (0)'
  )
  flags.add_argument('--top_k', type=int, default=0, help='sample among so many; 0: all')
  flags.add_argument(
    '--top_p',
    type=float,
    default=1.0,
    help='sample among the most probable that reach this share (1)',
  )
  flags.add_argument(
    '--min_p',
    type=float,
    default=0.0,
    help='sample among those at least this share as probable as the most probable (0)',
  )
  flags.add_argument(
    '--repetition_penalty',
    type=float,
    default=1.0,
    help='above 1: makes tokens less probable that were there before (1)',
  )
  flags.add_argument('--seed', type=int, default=0, help='of sampling (0)')
  add_dtype_flag(flags)


def add_dtype_flag(flags: argparse.ArgumentParser) -> None:
  """The flag of `ComputeConfig.dtype`."""
  flags.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    default='float32',
    help='of activations (float32)',
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
  """The flags of a command that has `add_gin_flags`; `bindings` holds --gin.NAME=value.

  Says which gin files are the package's own.
  """
  argv, bindings = split_bindings(argv)
  flags = parser.parse_args(argv)
  flags.bindings = bindings
  given = vars(flags)
  if not (given.get('multiprocess') or given.get('process_index')):  # one says it for all
    for line in gin_files.told(flags.gin_file, flags.gin_search_paths):
      print(line, flush=True)
  return flags


def output_file(flag: str, value: str) -> Path:
  """The file that a flag names, which can be written: asked before the work, not after it.

  Raises:
    UserError: its folder does not exist, or it is a folder, or an address elsewhere.
  """
  check_value(flag, value, LOCAL)
  path = Path(value)
  check(
    path.resolve().parent.is_dir() and not path.is_dir(),
    f'{flag} must be a file in a folder that exists',
    repr(value),
    'make the folder, or choose another file',
  )
  return path


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
    roots=(TrainConfig, *more),
    placeholders=placeholders,
  )
