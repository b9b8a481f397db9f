"""Sections of the READMEs that a command writes, between two marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
