"""Writes the README's quickstart results from a finished run's summary.json.

bash launch/quickstart.sh && python -m benchmarks.quickstart runs/quickstart
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from benchmarks.readme import ROOT, write_section


def main(run: Path) -> None:
  """Copies the summary and the picture, and rewrites the README between its marks."""
  kept = ROOT / 'benchmarks' / 'quickstart'
  for name in ('summary.json', 'loss.png'):
    # The kept files themselves may be given, to rewrite the README from them.
    if run.resolve() != kept:
      shutil.copy(run / name, kept / name)
  summary = json.loads((kept / 'summary.json').read_text(encoding='utf-8'))
  rows = [
    '| validation loss, nats a target token | model | bigram | unigram |',
    '|---|---|---|---|',
  ]
  for name, scores in summary['baselines'].items():
    loss = summary['validation'][f'loss/{name}']
    rows.append(
      f'| {name} | {loss:.3f} | {scores["bigram"]:.3f} | {scores["unigram"]:.3f} |'
    )
  write_section(
    'quickstart',
    [
      f'After {summary["steps"]:,} steps, on packages that training did not see:',
      '',
      *rows,
      '',
      '![Loss curve of the quickstart](benchmarks/quickstart/loss.png)',
      '',
      '(Written by `python -m benchmarks.quickstart runs/quickstart`.)',
    ],
  )


if __name__ == '__main__':
  main(Path(sys.argv[1]))
