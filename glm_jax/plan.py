"""Compiles a run's step for accelerators one need not have, and prints what it needs.

The phases, in order: configuration, topology, compile, table. `--suggest` repeats the last
two over meshes, rows and remat policies.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glm_jax import cli, configs, startup

if TYPE_CHECKING:  # it loads JAX, whose environment is prepared first
  from glm_jax.training.config import TrainConfig


def plan(config: TrainConfig, flags: argparse.Namespace) -> None:
  """Prints the table of one configuration, or the best of several.

  Args:
    config: of the run.
    flags: of the command.

  Raises:
    UserError: the topology is unknown, or the step does not divide over it or fit.
  """
  # JAX only here: `main` sets its environment first.
  import jax

  from glm_jax import sharding
  from glm_jax.planning import prediction, suggest, table, topologies
  from glm_jax.training import start

  config, _, _ = start.resolve(config)
  if flags.topology:
    # libtpu complains there of the chips that it does not find.
    with startup.silenced_stderr():
      devices = topologies.devices(flags.topology, flags.slices)
  else:
    devices = jax.devices()
  where = flags.topology or f'{len(devices)} CPU devices'
  if flags.slices > 1:
    where = f'{flags.slices} slices of {where}'
  if flags.suggest:
    result, config = suggest.best(config, devices, flags.trials, print)
  else:
    print(f'compiling for {where} (minutes for a large model)', flush=True)
    result = prediction.predict(config, sharding.make_mesh(config.mesh, devices))
  print(table.render(result, config, where))
  Path(flags.json).write_text(
    json.dumps({'topology': where, **result.to_dict()}, indent=2) + '\n', encoding='utf-8'
  )
  print(f'\nall of it in {flags.json}')
  # Last, so that a step that does not fit is an error with its table and JSON.
  prediction.check_fits(result)


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = cli.parse(_flags(), argv)
  configs.check(
    bool(flags.topology) != (flags.platform == 'cpu'),
    'plan must be given --topology, or --platform=cpu',
    f'--topology={flags.topology!r}, --platform={flags.platform!r}',
    'give one of them, such as --topology=v5p:4x4x8',
  )
  cli.output_file('--json', flags.json)
  from glm_jax.planning import topologies

  # Before anything imports JAX, which reads the environment once.
  topologies.prepare_environment()
  if flags.platform == 'cpu':
    configs.check(
      flags.slices == 1, '--slices are of a TPU', str(flags.slices), 'give a --topology'
    )
    startup.use_cpu_devices(flags.cpu_devices)
  config, _ = cli.configuration(flags, placeholders=True)
  plan(config, flags)


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'plan',
    'Compiles the training step of a configuration for accelerators that are not here: '
    'does it fit, how fast would it be, what moves between devices.',
    'python -m glm_jax.plan --gin_file=gin_configs/pretrain_chatglm2_6b.gin '
    '--topology=v5p:4x4x8',
  )
  cli.add_gin_flags(flags)
  group = flags.add_argument_group('where')
  group.add_argument(
    '--topology', default='', metavar='KIND:SHAPE', help='such as v5e:16x16, h100:1x4x8'
  )
  group.add_argument(
    '--slices', type=int, default=1, metavar='N', help='TPU slices of that shape'
  )
  group.add_argument(
    '--platform', default='', choices=['cpu'], help='a dry run on virtual CPU devices'
  )
  group.add_argument('--cpu_devices', type=int, default=1, metavar='N')
  group = flags.add_argument_group('what')
  group.add_argument(
    '--suggest', action='store_true', help='try meshes, rows and remat; print the best'
  )
  group.add_argument(
    '--trials', type=int, default=6, metavar='N', help='compiles of --suggest'
  )
  group.add_argument('--json', default='plan.json', metavar='FILE', help='results as JSON')
  return flags


if __name__ == '__main__':
  cli.main(main)
