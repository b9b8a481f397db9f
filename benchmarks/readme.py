"""Sections of the READMEs that a command writes, between two marks."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
READMES = tuple(ROOT / path / 'README.md' for path in ('.', 'launch', 'benchmarks'))


def write_section(name: str, lines: Sequence[str]) -> None:
  """Replaces what stands between `<!-- name -->` and `<!-- end of name -->`."""
  first, last = f'<!-- {name} -->', f'<!-- end of {name} -->'
  path = next(path for path in READMES if first in path.read_text(encoding='utf-8'))
  text = path.read_text(encoding='utf-8')
  # Unpacking raises if a mark is missing or is there twice: nothing is overwritten then.
  before, rest = text.split(first)
  _, after = rest.split(last)
  body = '\n'.join(['', *lines, ''])
  path.write_text(before + first + body + last + after, encoding='utf-8')


def tabulate(
  argv: Sequence[str],
  *,
  prog: str,
  description: str,
  path: Path,
  cases: Mapping[str, Any],
  predict: Callable[[Any], dict[str, Any]],
  shown: Callable[[str, dict[str, Any]], str],
  section: str,
  table: Callable[[dict[str, Any]], list[str]],
) -> None:
  """A command that predicts cases, keeps what came of them as JSON, and writes a section.

  Args:
    argv: of the command.
    prog: how it is called.
    description: of it.
    path: of the JSON, by the names of cases; those that are not tried again stay.
    cases: by name.
    predict: what comes of one.
    shown: a line for it.
    section: of a README, see `write_section`.
    table: its lines, of all that is known.
  """
  flags = argparse.ArgumentParser(prog=prog, description=description)
  flags.add_argument('--only', default='', metavar='TEXT', help='cases with it in the name')
  flags.add_argument('--table', action='store_true', help='only write the table')
  given = flags.parse_args(argv)
  results: dict[str, Any] = {}
  if path.exists():
    results = json.loads(path.read_text(encoding='utf-8'))
  for name, case in () if given.table else cases.items():
    if given.only not in name:
      continue
    results[name] = predict(case)
    # After each: minutes that were waited for are not lost.
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
    print(shown(name, results[name]), flush=True)
  write_section(section, table(results))


def path_of(folder: Path, results: dict[str, Any]) -> Path:
  """Where results of a device and a date are kept; the folder is made."""
  folder.mkdir(parents=True, exist_ok=True)
  name = re.sub(r'[^a-z0-9]+', '-', results['device'].lower()).strip('-')
  return folder / f'{name}-{results["date"]}.json'


def write_results(
  name: str, folder: Path, table: Callable[[dict[str, Any]], list[str]], command: str
) -> None:
  """Writes a section from the newest results of each device.

  Args:
    name: of the section.
    folder: of the results, each with its device and date in the file's name.
    table: Markdown lines of one device's.
    command: that wrote them.
  """
  # By name, hence by date: the newest is the last of its device.
  newest: dict[str, dict[str, Any]] = {}
  for path in sorted(folder.glob('*.json')):
    results = json.loads(path.read_text(encoding='utf-8'))
    newest[results['device']] = results
  lines = [line for results in newest.values() for line in ['', *table(results)]]
  write_section(name, [*lines, '', f'(Written by `python -m {command}`.)'])
