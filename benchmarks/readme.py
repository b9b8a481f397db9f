"""Sections of the READMEs that a command writes, between two marks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
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
