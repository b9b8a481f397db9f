"""What do saving and its digests cost a run?

python -m benchmarks.saving [--rounds=5] [--table]

On the device that is here, a GLM of 25 million parameters saves every 20 steps: how long a
save holds up the loop, its digests included, and what is written behind its back. By the
clock of all CPU cores, both together are what steps lose where no core is idle. And,
compiled for TPUs one need not have, the digests of ChatGLM2-6B and its optimizer. About 3
minutes on 2 CPU cores. Results are kept by device and date in benchmarks/saving/; --table
only writes the table of launch/README.md from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flax import serialization

from benchmarks import readme, step, topologies
from glm_jax import cli
from glm_jax.checkpoints import CheckpointConfig, Checkpoints, digests
from glm_jax.performance import chips
from glm_jax.planning import estimate, hlo
from glm_jax.training import program, state

RESULTS = Path(__file__).parent / 'saving'
EVERY = 20
# Steps of ChatGLM2-6B between saves.
STEPS_OF_6B = 1000
ROW = topologies.ROWS[0]
# Of them, those that are timed in a round.
TIMED = 4
PARTS = {
  'digest': 'digests of all arrays',
  'save': 'a save until the loop goes on, digests included',
  'write': 'what it writes while the loop goes on',
}


def measure(folder: Path, rounds: int) -> dict[str, Any]:
  """Seconds of a step and of a save's parts: by the clock and of all CPU cores.

  Args:
    folder: for checkpoints.
    rounds: saves, and steps between them.
  """
  case = step.cpu_cases()[0]
  model = dataclasses.replace(case.model, num_layers=7, vocab_size=4096)
  case = dataclasses.replace(case, model=model)
  ours = step.OurStep(case)
  ours.run(3)
  told: list[dict[str, list[float]]] = []
  for number in range(rounds + 1):
    checkpoints = Checkpoints(str(folder / str(number)), CheckpointConfig())
    meta = {'step': int(ours.state['step'])}
    save = functools.partial(checkpoints.save, ours.state, meta, {})
    parts = {
      'save': _timed(save),
      'write': _timed(checkpoints.close),
      'digest': _timed(lambda: digests.of_arrays(_arrays(ours.state))),
      'step': [seconds / TIMED for seconds in _timed(lambda: ours.run(TIMED))],
    }
    if number:  # the first save compiles, as it does once in a run
      told.append(parts)
      print(f'{number} of {rounds}: {parts}', flush=True)
  return {
    'parameters': state.count(state.abstract_params(model)),
    'tokens': case.rows * case.length,
    'rounds': told,
  }


def _arrays(current: Any) -> Any:
  """As a checkpoint has them."""
  rest = {name: tree for name, tree in current.items() if name != 'params'}
  return {'params': current['params'], 'optimizer': serialization.to_state_dict(rest)}


def _timed(work: Callable[[], Any]) -> list[float]:
  """Seconds by the clock, and of all of this process's threads."""
  began = time.perf_counter(), time.process_time()
  work()
  return [time.perf_counter() - began[0], time.process_time() - began[1]]


def predict() -> dict[str, Any]:
  """The digests of a whole run's state, compiled for its mesh, beside its step."""
  config, layout = topologies.configure(ROW)
  leaves = digests.flat(_arrays(program.build(config, layout).state))
  compiled = digests.program(leaves).lower([*leaves.values()]).compile()
  chip = chips.of_device_kind(layout.device_kind)
  assert chip is not None
  known = json.loads(topologies.RESULTS.read_text(encoding='utf-8'))[ROW.key]
  return {
    'row': ROW.key,
    'seconds': estimate.estimate(hlo.read(compiled.as_text()), chip).step_seconds,
    'step_seconds': known['step_seconds'],
    'temporaries': compiled.memory_analysis().temp_size_in_bytes,
  }


def table(results: dict[str, Any]) -> list[str]:
  """Markdown lines of a device's results."""
  # By each of both clocks, the median of each part.
  clocks = [
    {
      name: statistics.median(parts[name][clock] for parts in results['rounds'])
      for name in (*PARTS, 'step')
    }
    for clock in range(2)
  ]

  def cells(of: Callable[[dict[str, float]], float]) -> str:
    shares = [(of(parts), of(parts) / parts['step'] / EVERY) for parts in clocks]
    return ' | '.join(f'{seconds:.2f} ({share:.1%})' for seconds, share in shares)

  rows = [
    f'| {words} | {cells(lambda parts, name=name: parts[name])} |'
    for name, words in PARTS.items()
  ]
  steps = ' | '.join(f'{EVERY * parts["step"]:.2f}' for parts in clocks)
  tpu = results['predicted']
  share = tpu['seconds'] / tpu['step_seconds'] / STEPS_OF_6B
  return [
    f'{results["device"]}, {results["date"]}; jax {results["jax"]}: a GLM of '
    f'{results["parameters"] / 1e6:.0f} M parameters, {results["tokens"]:,} tokens a step, '
    f'saves every {EVERY} steps; medians of {len(results["rounds"])} saves:',
    '',
    '| | seconds | CPU seconds |',
    '|---|---|---|',
    f'| {EVERY} steps | {steps} |',
    *rows,
    f'| a save in all | {cells(lambda parts: parts["save"] + parts["write"])} |',
    '',
    f'Compiled, not run: the digests of {tpu["row"]}, of parameters and optimizer, take '
    f'{tpu["seconds"] * 1e3:.0f} ms, {share:.4%} of {STEPS_OF_6B:,} steps of '
    f'{tpu["step_seconds"]:.1f} s.',
  ]


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = argparse.ArgumentParser(
    prog='python -m benchmarks.saving', description=__doc__.splitlines()[0]
  )
  flags.add_argument('--rounds', type=int, default=5, help='saves (5)')
  flags.add_argument('--table', action='store_true', help='only write the table')
  given = flags.parse_args(argv)
  if not given.table:
    with tempfile.TemporaryDirectory() as folder:
      results = {**step.about(), **measure(Path(folder), given.rounds)}
    results['predicted'] = predict()
    path = readme.path_of(RESULTS, results)
    path.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
  readme.write_results('saving', RESULTS, table, 'benchmarks.saving')


if __name__ == '__main__':
  cli.main(main)
