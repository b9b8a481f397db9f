"""Writes the README's quickstart results from a finished run's summary.json.

bash launch/quickstart.sh && python benchmarks/quickstart.py runs/quickstart
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKS = ('<!-- results -->', '<!-- end of results -->')


def main(run: Path) -> None:
  """Copies the summary and the picture, and rewrites the README between its marks."""
  kept = ROOT / 'benchmarks' / 'quickstart'
  for name in ('summary.json', 'loss.png'):
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
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  before, rest = text.split(MARKS[0])
  _, after = rest.split(MARKS[1])
  body = '\n'.join(
    [
      '',
      f'After {summary["steps"]:,} steps, on packages that training did not see:',
      '',
      *rows,
      '',
      '![Loss curve of the quickstart](benchmarks/quickstart/loss.png)',
      '',
      f'(Written by `python {Path(__file__).relative_to(ROOT)} runs/quickstart`.)',
      '',
    ]
  )
  (ROOT / 'README.md').write_text(
    before + MARKS[0] + body + MARKS[1] + after, encoding='utf-8'
  )


if __name__ == '__main__':
  main(Path(sys.argv[1]))
