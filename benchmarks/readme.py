"""Sections of the README that a command writes, each between two marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_section(name: str, lines: Sequence[str]) -> None:
  """Replaces what stands between `<!-- name -->` and `<!-- end of name -->`."""
  path = ROOT / 'README.md'
  text = path.read_text(encoding='utf-8')
  first, last = f'<!-- {name} -->', f'<!-- end of {name} -->'
  before, rest = text.split(first)
  _, after = rest.split(last)
  body = '\n'.join(['', *lines, ''])
  path.write_text(before + first + body + last + after, encoding='utf-8')
