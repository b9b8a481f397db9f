"""Does ChatGLM2-6B generate there, and how fast: one chip, weights as they are or integers.

python -m benchmarks.decode_plan [--only=TEXT] [--table]

compiles what `plan --decode` does for chips one need not have, about ten seconds a row, and
writes benchmarks/decode_plan/results.json and the table of launch/README.md. `--only` takes
the rows that hold a text, such as 'v5e', and leaves the others as they were; `--table` only
writes the table.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import readme
from glm_jax import cli
from glm_jax.planning import released, topologies

RESULTS = Path(__file__).parent / 'decode_plan' / 'results.json'
MODEL = 'chatglm2-6b'
# The smallest slices that libtpu knows, of which one chip is taken.
CHIPS = {'v5e': 'v5e:1x1', 'v6e': 'v6e:1x1', 'v5p': 'v5p:2x2x1'}
ROWS = (1, 8, 64)
SLOTS = (1024, 8192, 32768)
KINDS = {'bfloat16': None, 'int8': 8, 'int4': 4}
CASES = tuple(itertools.product(CHIPS, ROWS, SLOTS, KINDS))


def key(chip: str, rows: int, slots: int, kind: str) -> str:
  """What a case is called in the results, and for `--only`."""
  return f'{chip}, {rows} x {slots}, {kind}'


def predict(chip: str, rows: int, slots: int, kind: str) -> dict[str, Any]:
  """The plan of a case as JSON, see `glm_jax.planning.decoding.DecodePlan`."""
  topologies.prepare_environment()
  from glm_jax import bindings, sharding
  from glm_jax.planning import decoding
  from glm_jax.recipes import CONFIGURABLES
  from glm_jax.training.config import TrainConfig

  files = released.files(MODEL)
  config, _ = bindings.load_config(
    TrainConfig, CONFIGURABLES, files, '', (), placeholders=True
  )
  devices = topologies.devices(CHIPS[chip])[:1]
  bits = KINDS[kind]
  plan = decoding.predict(
    config.model,
    sharding.make_mesh(sharding.MeshConfig(), devices),
    rows=rows,
    slots=slots,
    quantized=bits and {'bits': bits, 'group': 0},
  )
  return dataclasses.asdict(plan)


def cell(plan: dict[str, Any]) -> str:
  """Memory, and milliseconds a token of each row.

  Example:
    >>> memory = {'peak': 3 * 2**29, 'limit': 2**31}
    >>> cell({'memory': memory, 'predicted_seconds': 0.02, 'roofline_seconds': 0.005})
    '1.5 GiB, 20 ms (5.0)'
    >>> cell({'memory': memory | {'limit': 2**30}})
    'does not fit: 1.5 GiB'
  """
  memory = plan['memory']
  peak = f'{memory["peak"] / 2**30:.1f} GiB'
  if memory['peak'] > memory['limit']:
    return f'does not fit: {peak}'
  predicted, roofline = plan['predicted_seconds'] * 1e3, plan['roofline_seconds'] * 1e3
  return f'{peak}, {predicted:.0f} ms ({roofline:.1f})'


def table(results: dict[str, Any]) -> list[str]:
  """Markdown lines; cases that were not tried yet are left empty."""
  lines = [
    f'| chip, GiB | rows | cache | {" | ".join(KINDS)} |',
    '|---|---|---|' + '---|' * len(KINDS),
  ]
  for chip, rows, slots in itertools.product(CHIPS, ROWS, SLOTS):
    plans = {kind: results.get(key(chip, rows, slots, kind)) for kind in KINDS}
    limits = [plan['memory']['limit'] / 2**30 for plan in plans.values() if plan]
    if limits:
      cells = ' | '.join(cell(plan) if plan else '' for plan in plans.values())
      lines.append(f'| {chip}, {limits[0]:.1f} | {rows} | {slots:,} | {cells} |')
  return [
    *lines,
    '',
    'ChatGLM2-6B on one chip, as its compiler says: the peak of a program that generates '
    'many tokens; milliseconds a token of each row; in brackets the memory roofline: '
    'weights and cache read once at full bandwidth. Compiled, not run. (Written by '
    '`python -m benchmarks.decode_plan`.)',
  ]


def main(argv: Sequence[str]) -> None:
  """The command."""
  readme.tabulate(
    argv,
    prog='python -m benchmarks.decode_plan',
    description=__doc__.splitlines()[0],
    path=RESULTS,
    cases={key(*case): case for case in CASES},
    predict=lambda case: predict(*case),
    shown=lambda name, result: f'{name}: {cell(result)}',
    section='decode plan',
    table=table,
  )


if __name__ == '__main__':
  cli.main(main)
