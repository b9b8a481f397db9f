"""Writes the README's quickstart results from a finished run's summary.json.

bash launch/quickstart.sh && python -m benchmarks.quickstart runs/quickstart
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.readme import ROOT, write_section

ASKED = {
  'top 1': 'the first token is the likeliest',
  'top 5': '... among the 5 likeliest',
  'of 4': 'which of 4 words of that length were there',
}
"""What the report counts, see `glm_jax.recipes.guesses`, in words."""


def main(run: Path) -> None:
  """Copies the summary and the picture, and rewrites the README between its marks."""
  kept = ROOT / 'benchmarks' / 'quickstart'
  for name in ('summary.json', 'loss.png'):
    # The kept files themselves may be given, to rewrite the README from them.
    if run.resolve() != kept:
      shutil.copy(run / name, kept / name)
  summary = json.loads((kept / 'summary.json').read_text(encoding='utf-8'))
  guessed = summary['guesses']
  rows = [
    f'| {guessed["blanks"]:,} blanks | model | bigram | unigram | chance |',
    '|---|---|---|---|---|',
    *(_shares(name, guessed[key]) for key, name in ASKED.items()),
    f'| ... by pairs on both of its sides | | {guessed["of 4"]["both ways"]:.1%} | | |',
    _losses(summary),
  ]
  write_section(
    'quickstart',
    [
      f'After {summary["steps"]:,} steps, on packages that training did not see:',
      '',
      *rows,
      '',
      '(Written by `python -m benchmarks.quickstart runs/quickstart`.)',
    ],
  )


def _losses(summary: dict[str, Any]) -> str:
  """A row of the table.

  Example:
    >>> scores = {'blank': {'bigram': 3.0, 'unigram': 4.0}}
    >>> _losses({'baselines': scores, 'validation': {'loss/blank': 2.0}})
    '| loss, nats a target token: blank | 2.00 | 3.00 | 4.00 | |'
  """
  names, baselines = list(summary['baselines']), summary['baselines'].values()
  columns = [
    [summary['validation'][f'loss/{name}'] for name in names],
    *([scores[key] for scores in baselines] for key in ('bigram', 'unigram')),
  ]
  cells = ' | '.join(', '.join(f'{loss:.2f}' for loss in column) for column in columns)
  return f'| loss, nats a target token: {", ".join(names)} | {cells} | |'


def _shares(name: str, shares: dict[str, float]) -> str:
  """A row of the table.

  Example:
    >>> _shares('which', {'model': 0.5, 'bigram': 0.25, 'unigram': 0.1, 'chance': 0})
    '| which | **50.0%** | 25.0% | 10.0% | 0.0% |'
  """
  model, *others = (shares[key] for key in ('model', 'bigram', 'unigram', 'chance'))
  cells = ' | '.join(f'{share:.1%}' for share in others)
  return f'| {name} | **{model:.1%}** | {cells} |'


if __name__ == '__main__':
  main(Path(sys.argv[1]))
