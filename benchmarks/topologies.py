"""Does it fit, how fast would it be: each model on the slices one would rent.

python -m benchmarks.topologies [--only=TEXT]

compiles the training step of each row for chips one need not have, a minute or two each,
and writes benchmarks/topologies/results.json and the README's table. A row whose lowered
step has not changed is not compiled again, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import readme
from glm_jax.performance import chips
from glm_jax.planning import topologies

RESULTS = Path(__file__).parent / 'topologies' / 'results.json'


class Row(NamedTuple):
  """A line of the table."""

  model: str
  topology: str
  bindings: tuple[str, ...]
  slices: int = 1
  file: str = 'pretrain_chatglm2_6b.gin'

  @property
  def key(self) -> str:
    return f'{self.model} {self.slices} x {self.topology}'


def _6b(topology: str, rows: int, remat: str, *more: str, slices: int = 1) -> Row:
  bindings = (f'BATCH_SIZE={rows}', f"ComputeConfig.remat='{remat}'", *more)
  return Row('ChatGLM2-6B, 8,192', topology, bindings, slices)


_GLM = ('GLMConfig.attention_dropout=0.0', "ComputeConfig.remat='attention_qkv'")

ROWS = (
  _6b('v5e:16x16', 256, 'attention_qkv'),
  _6b('v5p:4x4x8', 256, 'projections'),
  _6b('v6e:16x16', 256, 'attention_qkv'),
  _6b('tpu7x:4x4x4', 128, 'projections'),
  _6b('v4:4x4x8', 128, 'attention_qkv'),
  _6b('v5p:2x2x1', 8, 'attention_qkv', 'MeshConfig.fsdp=4'),
  _6b('v6e:2x4', 8, 'attention_qkv', 'MeshConfig.fsdp=8'),
  _6b('v5e:16x16', 512, 'attention_qkv', slices=2),
  _6b('v5p:16x16x16', 8192, 'projections'),
  Row(
    'ChatGLM3-6B-32k, 32,768',
    'v5p:4x4x8',
    (
      'BATCH_SIZE=64',
      'MeshConfig.sequence=4',
      "ComputeConfig.remat='projections'",
      "TASK_FEATURE_LENGTHS={'tokens': 32768}",
      'ChatGLM2Config.rope_ratio=50.0',
    ),
  ),
  Row(
    'GLM-4-9B, 8,192',
    'v5p:4x4x8',
    (
      'BATCH_SIZE=128',
      "ComputeConfig.remat='attention_qkv'",
      'ChatGLM2Config.num_layers=40',
      'ChatGLM2Config.vocab_size=151552',
    ),
  ),
  Row(
    'GLM-Base, 568',
    'v5e:2x4',
    ('TrainConfig.microbatches=16',),
    file='pretrain_glm_base.gin',
  ),
  Row('GLM-Large, 568', 'v5e:16x16', (), file='pretrain_glm_large.gin'),
  Row(
    'GLM-10B, 1,024',
    'v5p:4x4x8',
    (
      'BATCH_SIZE=2048',
      'MeshConfig.fsdp=16',
      "TASK_FEATURE_LENGTHS={'tokens': 1024}",
      *_GLM,
    ),
    file='pretrain_glm_10b.gin',
  ),
  Row('GLM-130B, 2,048', 'v5p:8x16x16', (), file='pretrain_glm_130b.gin'),
)


def main(argv: Sequence[str] | None = None) -> None:
  flags = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  flags.add_argument('--only', default='', help='rows whose name holds this text')
  only = flags.parse_args(argv).only
  results: dict[str, Any] = {}
  if RESULTS.exists():
    results = json.loads(RESULTS.read_text(encoding='utf-8'))
  for row in ROWS:
    if only not in row.key:
      continue
    config, layout = configure(row)
    fingerprint = lowered_fingerprint(config, layout)
    if results.get(row.key, {}).get('fingerprint') == fingerprint:
      print(f'{row.key}: as before', flush=True)
      continue
    predicted = predict(config, layout)
    results[row.key] = {**predicted, 'bindings': row.bindings, 'file': row.file}
    # After each row: a row that took minutes is not lost.
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
    print(row.key, predicted['mfu'], f'{predicted["compile_seconds"]:.0f} s', flush=True)
  write(results)


def configure(row: Row) -> tuple[Any, Any]:
  """The run's configuration and mesh."""
  topologies.prepare_environment()
  from glm_jax import cli, sharding
  from glm_jax.recipes import CONFIGURABLES
  from glm_jax.training.config import TrainConfig

  config, _ = cli.load_config(
    TrainConfig,
    CONFIGURABLES,
    [f'gin_configs/{row.file}'],
    '',
    list(row.bindings),
    placeholders=True,
  )
  devices = topologies.devices(row.topology, row.slices)
  return config, sharding.make_mesh(config.mesh, devices)


def lowered_fingerprint(config: Any, layout: Any) -> str:
  """Of the step as it is handed to the compiler."""
  from glm_jax.planning import prediction

  lowered = prediction.lower(config, layout)[1]
  return prediction.fingerprint(lowered, layout.device_kind)


def predict(config: Any, layout: Any) -> dict[str, Any]:
  """The prediction as JSON, and what made it."""
  import jax

  from glm_jax.planning import prediction

  result = prediction.predict(config, layout)
  values = result.to_dict()
  # The table applies the calibration of the time when it is written.
  values.pop('calibrated', None)
  tokens = result.tokens / result.chips
  return {**values, 'tokens_a_chip': tokens, 'jax': jax.__version__}


def write(results: dict[str, Any]) -> None:
  """The README's table, one row a model and kind of chip, and the whole of it."""
  # In reverse, so that of several rows the first one stays.
  first = {(row.model, row.topology[:3]): row for row in reversed(ROWS)}
  shown = [
    row for row in ROWS if row in first.values() and row.topology[:2] in ('v5', 'v6')
  ]
  readme.write_section('topologies', lines(results, shown))
  readme.write_section('all topologies', lines(results, ROWS))


def lines(results: dict[str, Any], rows: Sequence[Row]) -> list[str]:
  """A table of some rows."""
  table = [
    '| model, positions a row | chips | mesh | tokens a chip | HBM, GiB | predicted MFU, '
    'calibrated | tokens/s a chip |',
    '|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    r = results.get(row.key)
    if r is None:
      continue
    mesh = ' x '.join(f'{k} {v}' for k, v in r['mesh'].items() if v > 1)
    where = f'{row.slices} x {row.topology}' if row.slices > 1 else row.topology
    peak, limit = r['memory']['peak'] / 2**30, r['memory']['limit'] / 2**30
    speed = ['does not fit', '']
    if r['fits']:
      factor = chips.of_device_kind(r['device_kind']).calibration
      calibrated = f', {r["mfu"] * factor[0]:.0%}' if factor else ''
      speed = [f'{r["mfu"]:.1%}{calibrated}', f'{r["tokens_per_second_per_chip"]:,.0f}']
    table.append(
      f'| {row.model} | {where} | {mesh} | {r["tokens_a_chip"]:,.0f} | '
      f'{peak:.1f} of {limit:.1f} | {speed[0]} | {speed[1]} |'
    )
  return [
    *table,
    '',
    'Compiled, not run: predictions of the compiler, with the calibration that published '
    'runs give. (Written by `python -m benchmarks.topologies`.)',
  ]


if __name__ == '__main__':
  main()
