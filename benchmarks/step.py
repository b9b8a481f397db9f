"""How fast is a training step, beside the same step in plain PyTorch?

python -m benchmarks.step [--only=TEXT] [--table]

times the step that `train` compiles, on the CPU or the one GPU that JAX sees: ours, then
PyTorch's, eager and compiled, then ours again, and so on, from the same weights and rows.
Needs jax, flax, optax, orbax, torch and launch/requirements/gpu_bench.txt; no TensorFlow.
Results are kept by device and date in benchmarks/step/; --table only writes the README's
tables from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import readme, rows
from glm_jax import cli, configs, sharding, startup
from glm_jax.batch import Batch
from glm_jax.models import ChatGLM2Config, ComputeConfig, GLMConfig
from glm_jax.performance import chips
from glm_jax.planning import prediction
from glm_jax.recipes.pretraining import Pretraining
from glm_jax.training import program, state
from glm_jax.training.config import TrainConfig

RESULTS = Path(__file__).parent / 'step'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A step to be timed.

  Attributes:
    name: of the row in the table.
    model: a configuration without dropout.
    compute: how it is computed; its `attention` may be 'auto'.
    rows: B.
    length: T.
    documents: packed into a row of Part A and Part B; 0 for causal rows.
    peers: time PyTorch beside it.
  """

  name: str
  model: Any
  compute: ComputeConfig = ComputeConfig()
  rows: int
  length: int
  documents: int = 0
  peers: bool = True

  @property
  def batch(self) -> Batch:
    if self.documents:
      return rows.prefix(
        self.rows, self.length, self.model.vocab_size, documents=self.documents
      )
    return rows.causal(self.rows, self.length, self.model.vocab_size)

  @property
  def config(self) -> TrainConfig:
    return TrainConfig(
      model=self.model,
      compute=self.compute,
      recipe=Pretraining(
        task='glm_blank' if self.documents else 'glm_causal',
        feature_lengths={'tokens': self.length},
      ),
      batch_size=self.rows,
      train_steps=1000,
      model_dir='unused',
    )


_NO_DROPOUT = {'embedding_dropout': 0.0, 'attention_dropout': 0.0, 'output_dropout': 0.0}


SMALL_CHATGLM2 = ChatGLM2Config(
  num_layers=8,
  hidden_size=512,
  num_heads=8,
  num_kv_heads=2,
  head_size=64,
  mlp_size=1408,
  vocab_size=8192,
  max_positions=512,
)
"""31 million parameters; `benchmarks.decode` generates with it, too."""

WIDE_CHATGLM2 = ChatGLM2Config(
  num_layers=28,
  hidden_size=4096,
  num_heads=32,
  num_kv_heads=2,
  head_size=128,
  mlp_size=13696,
  vocab_size=65024,
  max_positions=32768,
)
"""ChatGLM2-6B, of which a card has as many layers as fit beside PyTorch's copy."""


def cpu_cases() -> list[Case]:
  """25 to 60 million parameters, float32, 1,024 tokens a step."""
  glm = GLMConfig(
    num_layers=8,
    hidden_size=512,
    num_heads=8,
    vocab_size=8192,
    max_positions=512,
    **_NO_DROPOUT,
  )
  return [
    Case(name=name, model=model, rows=1024 // length, length=length, documents=documents)
    for length in (256, 512)
    for name, model, documents in (('GLM', glm, 2), ('ChatGLM2', SMALL_CHATGLM2, 0))
  ]


def gpu_cases(memory_bytes: int) -> list[Case]:
  """GLM-Large, and layers of ChatGLM2-6B's width, in bfloat16.

  Ours and PyTorch's copies are in memory side by side: each layer of ChatGLM2-6B's width
  asks for 12 bytes a parameter of state, and for activations, in both.
  """
  large = GLMConfig(
    num_layers=24,
    hidden_size=1024,
    num_heads=16,
    vocab_size=30592,
    max_positions=512,
    **_NO_DROPOUT,
  )
  layers = 3 if memory_bytes < 100e9 else 6
  wide = dataclasses.replace(WIDE_CHATGLM2, num_layers=layers)
  name = f'{layers} layers of ChatGLM2-6B'
  # Without a loop over layers, which 24 layers take minutes to be compiled in.
  looped = ComputeConfig(dtype='bfloat16')
  whole = dataclasses.replace(looped, unroll=0)
  cases = [
    Case(name='GLM-Large', model=large, compute=looped, rows=32, length=512, documents=2)
  ]
  for length in (4096, 8192):
    cases += [
      Case(
        name=name,
        model=wide,
        compute=whole,
        rows=8192 // length,
        length=length,
        documents=documents,
      )
      for documents in (0, 4)
    ]
  # Without PyTorch: a loop over layers or a shorter one, and each further backend where its
  # scores fit.
  others = []
  for case in cases[:3]:
    for change in (
      {'unroll': 1 if case.compute.unroll == 0 else 4},
      {'attention': 'gpu_hopper'},
      {'attention': 'chunked'},
      {'attention': 'dense'},
    ):
      compute = dataclasses.replace(case.compute, **change)
      others.append(dataclasses.replace(case, compute=compute, peers=False))
  return cases + others


class OurStep:
  """The step of `program.build`, on one device."""

  def __init__(self, case: Case):
    self._layout = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    self._built = program.build(case.config, self._layout)
    self.optimizer, self.attention = case.config.optimizer, self._built.attention
    self.state = state.init_state(case.model, self._built.optimizer, self._layout, 0)
    self.params = self.state['params']
    self._batch = sharding.place(case.batch._replace(index=None), self._layout)

  def run(self, steps: int) -> tuple[float, float]:
    """Seconds a step, and the loss of the last."""
    self.params = None  # the state is donated
    began = time.perf_counter()
    with sharding.active(self._layout):
      for _ in range(steps):
        self.state, metrics = self._built.train_step(self.state, {}, self._batch)
    total, count = jax.block_until_ready(metrics['loss'])
    return (time.perf_counter() - began) / steps, float(total / count)

  def peak_bytes(self) -> int | None:
    """Of device memory, since the process began."""
    return (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')


def measure(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
  """Times the contenders in turn.

  Args:
    case: what to time.
    rounds: how often each has its turn.
    seconds: how long a turn is, in whole steps.

  Returns:
    For each contender its median, least and largest time of a step in seconds; ratios of
    PyTorch's time to ours in the same round; the plan of the same step.
  """
  contenders: dict[str, Callable[[], Any]] = {}
  ours = OurStep(case)
  contenders['ours'] = ours
  if case.peers:
    from benchmarks import torch_step

    for name, compiled in (('eager', False), ('compile', True)):
      contenders[name] = torch_step.Step(
        case.model,
        case.compute.dtype,
        ours.optimizer,
        ours.params,
        case.batch,
        compiled=compiled,
      )
  first, peaks, steps = {}, {}, {}
  for name, contender in contenders.items():
    _, first[name] = contender.run(1)
    contender.run(2)  # the first after compilation may still allocate
    peaks[name] = contender.peak_bytes()
    steps[name] = max(1, round(seconds / contender.run(1)[0]))
  tolerance = 1e-4 if case.compute.dtype == 'float32' else 1e-2
  for name, loss in first.items():
    if abs(loss - first['ours']) > tolerance * first['ours']:
      raise ValueError(f'{name} computes another model: loss {loss}, ours {first["ours"]}')
  times: dict[str, list[float]] = {name: [] for name in contenders}
  for _ in range(rounds):
    for name, contender in contenders.items():
      times[name].append(contender.run(steps[name])[0])
  _, work = case.config.recipe.work(case.config, case.batch.visibility)
  chip = chips.of_device_kind(jax.devices()[0].device_kind)
  result = {
    'case': case.name,
    'length': case.length,
    'rows': case.rows,
    'documents': case.documents,
    'dtype': case.compute.dtype,
    'parameters': state.count(state.abstract_params(case.model)),
    'attention': ours.attention[0],
    'unroll': case.compute.unroll,
    'flops': work,
    'first_loss': first,
    'peak_bytes': peaks,
    'seconds': {
      name: {'median': statistics.median(t), 'least': min(t), 'largest': max(t)}
      for name, t in times.items()
    },
    'ratios': {
      name: [peer / own for peer, own in zip(times[name], times['ours'], strict=True)]
      for name in times
      if name != 'ours'
    },
  }
  if chip:
    result['mfu'] = {
      name: work / statistics.median(t) / chip.peak_flops for name, t in times.items()
    }
    layout = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    plan = prediction.predict(case.config, layout).to_dict()
    result['plan'] = {
      'seconds': plan.get('step_seconds'),
      'peak_bytes': plan['memory']['peak'],
    }
  return result


def table(results: dict[str, Any]) -> list[str]:
  """Markdown lines of a device's results."""
  gpu = any('mfu' in row for row in results['rows'])
  lines = [
    f'{results["device"]}, {results["date"]}; jax {results["jax"]}, PyTorch '
    f'{results["torch"]}; medians, and the least and the largest ratio of the rounds:',
    '',
    '| step | rows | attention | ours, ms | tokens/s | × eager | × compile |'
    + (' MFU | peak GiB | planned ms, GiB |' if gpu else ''),
    '|---|---|---|---|---|---|---|' + ('---|---|---|' if gpu else ''),
  ]
  for row in results['rows']:
    median = row['seconds']['ours']['median']
    kind = f'prefix, {row["documents"]} packed' if row['documents'] else 'causal'
    cells = [
      f'{row["case"]}, {row["parameters"] / 1e6:,.0f} M',
      f'{row["rows"]} × {row["length"]:,} {kind}',
      row['attention'] + (', unrolled' if row['unroll'] == 0 else ''),
      f'{median * 1e3:,.0f}',
      f'{row["rows"] * row["length"] / median:,.0f}',
    ]
    for name in ('eager', 'compile'):
      ratios = row['ratios'].get(name)
      cells.append(
        f'**{statistics.median(ratios):.2f}** ({min(ratios):.2f}–{max(ratios):.2f})'
        if ratios
        else '–'
      )
    if gpu:
      plan, peak = row['plan'], row['peak_bytes']['ours']
      cells.append(f'{row["mfu"]["ours"]:.1%}')
      cells.append(f'{peak / 2**30:.1f}')
      cells.append(f'{plan["seconds"] * 1e3:,.0f}, {plan["peak_bytes"] / 2**30:.1f}')
    lines.append('| ' + ' | '.join(cells) + ' |')
  return lines


def write_tables() -> None:
  """The README's section, from the newest results of each device."""
  readme.write_results('step', RESULTS, table, 'benchmarks.step')


def cases(flags: argparse.Namespace) -> list[Case]:
  """Those for the device that is here, of the sizes that were asked for."""
  device = jax.devices()[0]
  if device.platform == 'cpu':
    chosen = cpu_cases()
  else:
    chosen = gpu_cases((device.memory_stats() or {}).get('bytes_limit', 0))
  sizes = {
    name: getattr(flags, name) for name in ('rows', 'length') if getattr(flags, name)
  }
  model = {'num_layers': flags.layers} if flags.layers else {}
  return [
    dataclasses.replace(case, model=dataclasses.replace(case.model, **model), **sizes)
    for case in chosen
    if flags.only in case.name
  ]


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = _flags().parse_args(argv)
  if flags.table:
    return write_tables()
  configs.check(
    importlib.util.find_spec('torch') is not None,
    'benchmarks.step must have PyTorch to compare with',
    'no package torch',
    'pip install torch',
  )
  # Ours and PyTorch's are in memory side by side.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  chosen = cases(flags)
  if flags.case is not None:
    result = measure(chosen[flags.case], flags.rounds, flags.seconds)
    flags.out.write_text(json.dumps(result), encoding='utf-8')
    return
  import torch

  results = {
    **about(),
    'torch': torch.__version__,
    'rows': [],
  }
  path = readme.path_of(flags.folder, results)
  began = time.monotonic()
  for number, case in enumerate(chosen):
    if time.monotonic() - began > 60 * flags.minutes:
      print(f'{flags.minutes:g} minutes are over: {len(chosen) - number} steps left out')
      break
    # A process of its own for each: peaks of memory are a process's.
    with tempfile.TemporaryDirectory() as folder:
      out = Path(folder) / 'result.json'
      command = [sys.executable, '-m', 'benchmarks.step', *argv]
      done = subprocess.run([*command, f'--case={number}', f'--out={out}'], check=False)
      if done.returncode:
        # The others go on: a card is at hand for minutes.
        print(f'{case.name}, {case.rows} x {case.length}: failed', file=sys.stderr)
        continue
      results['rows'].append(json.loads(out.read_text(encoding='utf-8')))
    path.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
    print(table(results)[-1], flush=True)
  if flags.folder == RESULTS:
    write_tables()


def about() -> dict[str, str]:
  """The device that JAX computes on, the date, and JAX's version: the head of results."""
  device = jax.devices()[0]
  return {
    'device': cpu_name() if device.platform == 'cpu' else device.device_kind,
    'date': datetime.date.today().isoformat(),
    'jax': jax.__version__,
  }


def cpu_name() -> str:
  """The processor of this machine, and its threads."""
  lines = Path('/proc/cpuinfo')
  found = re.search(r'model name\s*: (.*)', lines.read_text()) if lines.exists() else None
  name = found[1] if found else platform.processor() or platform.machine()
  return f'{name}, {os.cpu_count()} threads'


def _flags() -> argparse.ArgumentParser:
  flags = argparse.ArgumentParser(
    prog='python -m benchmarks.step', description=__doc__.splitlines()[0]
  )
  flags.add_argument('--only', default='', metavar='TEXT', help='cases with it in the name')
  flags.add_argument('--rows', type=int, metavar='B', help="instead of the cases' own")
  flags.add_argument('--length', type=int, metavar='T', help='likewise')
  flags.add_argument('--layers', type=int, metavar='L', help='likewise')
  flags.add_argument('--rounds', type=int, default=5, help='turns of each contender')
  flags.add_argument('--seconds', type=float, default=3.0, help='of a turn')
  flags.add_argument(
    '--minutes', type=float, default=8.0, help='after which no further step is begun'
  )
  flags.add_argument('--folder', type=Path, default=RESULTS, help='of the results')
  flags.add_argument('--table', action='store_true', help='only write the tables')
  flags.add_argument('--case', type=int, help=argparse.SUPPRESS)
  flags.add_argument('--out', type=Path, help=argparse.SUPPRESS)
  return flags


if __name__ == '__main__':
  startup.keep_memory()
  cli.main(main)
