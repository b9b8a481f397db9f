"""Does a stage after pretraining fit: ChatGLM2-6B and all programs of a run, compiled.

python -m benchmarks.stages_plan [--only=TEXT] [--table]

compiles for each row what `plan` does, the step and what a policy computes between updates,
a minute to ten each, and writes benchmarks/stages_plan/results.json and the table of
launch/README.md. `--only` takes the rows that hold a text, such as 'v5e', and leaves the
others as they were; `--table` only writes the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import readme
from glm_jax import cli
from glm_jax.planning import released, topologies

RESULTS = Path(__file__).parent / 'stages_plan' / 'results.json'
MODEL = 'gin_configs/models/chatglm2_6b.gin'
LORA = 'gin_configs/runs/lora.gin'
# The programs of `glm_jax.planning.between`, in the order of the table.
PROGRAMS = ('step', 'scoring', 'reading questions', 'generating')


class Row(NamedTuple):
  """A line of the table."""

  stage: str
  topology: str
  files: tuple[str, ...]
  bindings: tuple[str, ...]

  @property
  def key(self) -> str:
    return f'{self.stage}, {self.topology}'


_REWARD = "rewards={'my_rewards.reward': 1.0}"


def _dpo(topology: str, rows: int, fsdp: int) -> Row:
  bindings = (f'BATCH_SIZE={rows}', f'MeshConfig.fsdp={fsdp}')
  return Row('DPO, LoRA', topology, ('gin_configs/runs/dpo.gin', LORA), bindings)


def _grpo(topology: str, rows: int, fsdp: int, *more: str) -> Row:
  bindings = (f'BATCH_SIZE={rows}', f'MeshConfig.fsdp={fsdp}', f'GRPO.{_REWARD}', *more)
  return Row('GRPO, LoRA', topology, ('gin_configs/runs/grpo.gin', LORA), bindings)


ROWS = (
  _dpo('v5e:2x4', 32, 8),
  _dpo('h100:1x1x1', 8, 1),
  _grpo('v5e:2x4', 64, 8),
  _grpo('h100:1x1x1', 32, 1, 'TrainConfig.microbatches=4'),
  Row(
    'PPO, all parameters',
    'v5p:4x4x2',
    ('gin_configs/runs/ppo.gin',),
    (
      'BATCH_SIZE=256',
      'MeshConfig.fsdp=32',
      "TASK_FEATURE_LENGTHS={'tokens': 2048}",
      'PPO.max_new_tokens=1024',
      "ComputeConfig.remat='projections'",
      'PPO.rollout_size=512',
      'PPO.decoding_rows=256',
      f'PPO.{_REWARD}',
    ),
  ),
)


def configure(row: Row) -> Any:
  """The run's configuration."""
  topologies.prepare_environment()
  from glm_jax import bindings
  from glm_jax.recipes import CONFIGURABLES
  from glm_jax.training.config import TrainConfig

  stage, *more = row.files
  return bindings.load_config(
    TrainConfig,
    CONFIGURABLES,
    [stage, MODEL, *more],
    '',
    row.bindings,
    placeholders=True,
  )[0]


def predict(row: Row) -> dict[str, Any]:
  """The plan as JSON, see `glm_jax.planning.prediction.Prediction`."""
  config, result = _planned(row, compiled=True)
  import jax

  return {
    **result.to_dict(),
    'estimated': estimate(row),
    'length': config.recipe.length,
    'bindings': row.bindings,
    'jax': jax.__version__,
  }


def estimate(row: Row) -> dict[str, Any]:
  """The peak, and that of each program, from shapes."""
  _, result = _planned(row, compiled=False)
  return {'peak': result.memory['peak'], 'programs': result.programs}


def _planned(row: Row, compiled: bool) -> tuple[Any, Any]:
  config = configure(row)
  from glm_jax import sharding
  from glm_jax.planning import between, prediction, stand_in

  devices = topologies.devices(row.topology, compiler=compiled)
  layout = sharding.make_mesh(config.mesh, devices)
  stored = prediction.Frozen(released.STORED)
  with stand_in.present(config) as run:
    plan = between.predict if compiled else between.from_shapes
    return run, plan(run, layout, stored=stored)


def line(row: Row, result: dict[str, Any]) -> str:
  """Of the table.

  Example:
    >>> memory = {'peak': 3 * 2**29, 'limit': 2**31}
    >>> result = {'rows': 8, 'length': 1024, 'mesh': {'fsdp': 8, 'data': 1}}
    >>> row = Row('DPO', 'v5e:2x4', (), ())
    >>> line(row, result | {'memory': memory, 'programs': {}, 'fits': True})
    '| DPO | v5e:2x4 | fsdp 8 | 8 of 1,024 | 1.5 |  |  |  | 1.5 of 2.0 |'
  """
  gib = lambda size: f'{size / 2**30:.1f}'
  memory = result['memory']
  peaks = result['programs'] or {PROGRAMS[0]: memory['peak']}
  cells = ' | '.join(gib(peaks[name]) if name in peaks else '' for name in PROGRAMS)
  mesh = ' x '.join(f'{k} {v}' for k, v in result['mesh'].items() if v > 1) or 'one'
  total = f'{gib(memory["peak"])} of {gib(memory["limit"])}'
  total += '' if result['fits'] else ', does not fit'
  batch = f'{result["rows"]} of {result["length"]:,}'
  return f'| {row.stage} | {row.topology} | {mesh} | {batch} | {cells} | {total} |'


def table(results: dict[str, Any]) -> list[str]:
  """Markdown lines; rows that were not tried yet are left out."""
  rows = [line(row, results[row.key]) for row in ROWS if row.key in results]
  return [
    f'| stage | chips | mesh | rows | {" | ".join(PROGRAMS)} | largest, GiB a device |',
    '|---|---|---|---|' + '---|' * len(PROGRAMS) + '---|',
    *rows,
    '',
    'ChatGLM2-6B, bfloat16, full remat (PPO: projections), as the compiler says: the peak '
    'of each program and all that is there beside it (parameters, moments, the reference, '
    'the rows of a rollout). What LoRA does not train is stored in bfloat16. Policies '
    'answer 64 (PPO: 256) questions at a time. Compiled, not run. (Written by `python -m '
    'benchmarks.stages_plan`.)',
  ]


def main(argv: Sequence[str]) -> None:
  """The command."""
  rows = {row.key: row for row in ROWS}
  readme.tabulate(
    argv,
    prog='python -m benchmarks.stages_plan',
    description=__doc__.splitlines()[0],
    path=RESULTS,
    cases=rows,
    predict=predict,
    shown=lambda name, result: line(rows[name], result),
    section='stages plan',
    table=table,
  )


if __name__ == '__main__':
  cli.main(main)
