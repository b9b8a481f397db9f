"""What a run's step needs on accelerators one need not have: from shapes, or compiled.

The phases, in order: devices, configuration, shapes or compile, table. `--suggest` repeats
the last two over meshes, rows and remat policies.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_jax import cli, configs, startup
from glm_jax.configs import POSITIVE, at_least

if TYPE_CHECKING:  # it loads JAX, whose environment is prepared first
  from glm_jax.performance.chips import Chip
  from glm_jax.training.config import TrainConfig


def plan(config: TrainConfig, devices: list[Any], flags: argparse.Namespace) -> None:
  """Prints the table of one configuration, or the best of several.

  Args:
    config: of the run.
    devices: to plan for.
    flags: of the command.

  Raises:
    UserError: the step does not divide over the devices or fit.
  """
  # JAX only here: `main` sets its environment first.
  from glm_jax import sharding
  from glm_jax.planning import between, prediction, released, stand_in, suggest, table
  from glm_jax.training import start

  bits = _integers(config, flags)
  config, _, _ = start.resolve(config)
  where = flags.topology or f'{len(devices)} CPU devices'
  if flags.slices > 1:
    where = f'{flags.slices} slices of {where}'
  card = _card(flags)
  if flags.decode:
    layout = sharding.make_mesh(config.mesh, devices)
    return _generation(config, layout, bits, where, card, flags)
  configs.check(
    not bits or config.in_part,
    '--bits are of weights that are not trained',
    'a run that trains all of them',
    "leave it out, or give --gin.TrainConfig.adapters='@LoRAConfig()'",
  )
  found = stand_in.stored_dtype(config) if config.in_part else None
  stored = prediction.Frozen(found or released.STORED, bits)
  with stand_in.present(config) as config:
    if flags.suggest:
      result, config = suggest.best(config, devices, flags.trials, print, card, stored)
    elif flags.compile:
      print(f'compiling for {where} (minutes for a large model)', flush=True)
      layout = sharding.make_mesh(config.mesh, devices)
      result = between.predict(config, layout, card, stored)
    else:
      layout = sharding.make_mesh(config.mesh, devices)
      result = between.from_shapes(config, layout, card, stored)
  print(table.render(result, config, where))
  if flags.released:
    print(f'\n{released.assumed(config)}')
  elif config.in_part and not found:
    print(f'\nassumed: {released.FROZEN}')
  Path(flags.json).write_text(
    json.dumps({'topology': where, **result.to_dict()}, indent=2) + '\n', encoding='utf-8'
  )
  print(f'\nall of it in {flags.json}')
  # Last, so that a step that does not fit is an error with its table and JSON.
  prediction.check_fits(result)


def _integers(config: TrainConfig, flags: argparse.Namespace) -> dict[str, int] | None:
  """Bits and group of weights that are not trained: as asked for, or of the checkpoint."""
  from glm_jax import checkpoints
  from glm_jax.training.config import CheckpointModel

  asked = {'bits': flags.bits, 'group': flags.group} if flags.bits else None
  if not isinstance(config.model, CheckpointModel):
    return asked
  stored = checkpoints.read_meta(checkpoints.find(config.model.path)).get('quantized')
  configs.check(
    not stored or asked in (None, stored),
    f'--bits and --group must be those of a checkpoint that is quantised, {stored}',
    str(asked),
    'leave them out, or plan for the checkpoint that it was made from',
  )
  return stored or asked


def _generation(
  config: TrainConfig,
  layout: Any,
  bits: dict[str, int] | None,
  where: str,
  card: Chip | None,
  flags: argparse.Namespace,
) -> None:
  """Prints what generating a token a row needs."""
  from glm_jax.planning import decoding

  result = decoding.predict(
    config.model,
    layout,
    rows=flags.rows,
    slots=flags.cache,
    quantized=bits,
    dtype=config.compute.dtype,
    card=card,
  )
  print(result.in_words(where))
  text = json.dumps({'topology': where, **dataclasses.asdict(result)}, indent=2) + '\n'
  Path(flags.json).write_text(text, encoding='utf-8')
  limit, peak = result.memory['limit'], result.memory['peak']
  configs.check(
    not limit or peak <= limit,
    f'what generates must fit into {limit / 2**30:.2f} GiB a device',
    f'{peak / 2**30:.2f} GiB',
    'take fewer --rows, a shorter --cache or --bits=4',
  )


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = cli.parse(_flags(), argv)
  _check(flags)
  from glm_jax.planning import topologies

  # Before anything imports JAX, which reads the environment once.
  topologies.prepare_environment()
  if flags.topology:
    # libtpu complains there of the chips that it does not find.
    with startup.silenced_stderr():
      devices = topologies.devices(flags.topology, flags.slices, compiler=flags.compile)
  else:
    startup.use_cpu_devices(flags.cpu_devices)
    import jax

    devices = jax.devices()
  plan(_configuration(flags, len(devices)), devices, flags)


def _check(flags: argparse.Namespace) -> None:
  """Raises UserError for flags that do not go together; says what `compile` is."""
  configs.check(
    bool(flags.gin_file) != bool(flags.released),
    'plan must be given --gin_file, a whole run, or --released, a model',
    f'--gin_file={flags.gin_file}, --released={flags.released!r}',
    'give one of them, such as --released=chatglm3-6b; --gin.NAME=value changes either',
  )
  configs.check(
    bool(flags.topology) != (flags.platform == 'cpu'),
    'plan must be given --topology, or --platform=cpu',
    f'--topology={flags.topology!r}, --platform={flags.platform!r}',
    'give one of them, such as --topology=v5p:4x4x8',
  )
  for name in _CARD:
    value = getattr(flags, name)
    if value is not None:
      configs.check_value(f'--{name}', value, POSITIVE)
      configs.check(
        bool(flags.topology),
        f'--{name} must be of a card',
        '--platform=cpu',
        'give the --topology of the nearest kind, such as rtx4090:1x1x1',
      )
  cli.output_file('--json', flags.json)
  if flags.platform == 'cpu':
    configs.check(
      flags.slices == 1, '--slices are of a TPU', str(flags.slices), 'give a --topology'
    )
  configs.check(
    not flags.suggest or flags.compile is not False,
    '--suggest must compile what it tries',
    '--no-compile',
    'leave one of them out',
  )
  for name in ('rows', 'cache'):
    configs.check_value(f'--{name}', getattr(flags, name), POSITIVE)
  configs.check_value('--group', flags.group, at_least(0))
  configs.check(
    not flags.decode or (not flags.suggest and flags.compile is not False),
    '--decode must compile one program',
    '--suggest or --no-compile',
    'leave it out',
  )
  if flags.decode:
    flags.compile = True
  if flags.compile is None:
    flags.compile = flags.suggest or not flags.released


# Flag -> what it replaces of a `Chip`, in its unit.
_CARD = {
  'memory_gib': ('hbm_bytes', 2**30),
  'peak_tflops': ('peak_flops', 1e12),
  'bandwidth_gbs': ('hbm_bandwidth', 1e9),
}


def _card(flags: argparse.Namespace) -> Chip | None:
  """The kind of chip with what the flags say of it; None if they say nothing."""
  from glm_jax.performance.chips import CHIPS
  from glm_jax.planning import topologies

  given = {
    field: getattr(flags, name) * unit
    for name, (field, unit) in _CARD.items()
    if getattr(flags, name) is not None
  }
  if not given:
    return None
  return dataclasses.replace(CHIPS[topologies.kind_of(flags.topology)], **given)


def _configuration(flags: argparse.Namespace, devices: int) -> TrainConfig:
  if not flags.released:
    return cli.configuration(flags, placeholders=True)[0]
  from glm_jax.planning import released

  flags.gin_file = released.files(flags.released)
  model = cli.configuration(flags, placeholders=True)[0].model
  # Before the user's own, which win.
  flags.bindings = [*released.bindings(model, devices), *flags.bindings]
  return cli.configuration(flags, placeholders=True)[0]


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'plan',
    'What a training step needs on accelerators that are not here: does it fit, how fast '
    'would it be, what moves between devices.',
    'python -m glm_jax.plan --gin_file=gin_configs/pretrain_chatglm2_6b.gin '
    '--topology=v5p:4x4x8\n'
    '  python -m glm_jax.plan --released=chatglm3-6b --topology=rtx4090:1x1x1\n'
    '  python -m glm_jax.plan --released=glm-4-9b --topology=rtx4090:1x1x2 \\\n'
    '    --memory_gib=44 --peak_tflops=362 --bandwidth_gbs=864   # two L40S',
  )
  cli.add_gin_flags(flags, required=False)
  group = flags.add_argument_group('instead of a gin file')
  group.add_argument(
    '--released',
    default='',
    metavar='NAME',
    help='a released model, such as chatglm3-6b, that goes on learning as '
    'gin_configs/runs/continue.gin says; nothing is downloaded or converted',
  )
  group = flags.add_argument_group('where')
  group.add_argument(
    '--topology',
    default='',
    metavar='KIND:SHAPE',
    help='such as v5e:16x16, h100:1x4x8 (4 hosts of 8 GPUs), rtx4090:1x1x1',
  )
  group.add_argument(
    '--slices', type=int, default=1, metavar='N', help='TPU slices of that shape'
  )
  group.add_argument(
    '--memory_gib',
    type=float,
    metavar='N',
    help='memory of a device, if it is not what its kind has: with the two flags below, '
    'the nearest kind stands for a card that plan does not know',
  )
  group.add_argument(
    '--peak_tflops', type=float, metavar='N', help='its dense bfloat16 TFLOP/s'
  )
  group.add_argument('--bandwidth_gbs', type=float, metavar='N', help='GB/s of its memory')
  group.add_argument(
    '--platform', default='', choices=['cpu'], help='a dry run on virtual CPU devices'
  )
  group.add_argument('--cpu_devices', type=int, default=1, metavar='N')
  group = flags.add_argument_group('what')
  group.add_argument(
    '--compile',
    action=argparse.BooleanOptionalAction,
    help='compile the step, which is exact and takes minutes, or estimate it from shapes '
    'in seconds; without either flag a gin file is compiled, a released model estimated',
  )
  group.add_argument(
    '--suggest', action='store_true', help='try meshes, rows and remat; print the best'
  )
  group.add_argument(
    '--trials', type=int, default=6, metavar='N', help='compiles of --suggest'
  )
  group.add_argument(
    '--bits',
    type=int,
    choices=(4, 8),
    help='of weights that are integers, and are not trained (by default those of a '
    'checkpoint)',
  )
  group.add_argument('--group', type=int, default=0, metavar='N', help='see quantize (0)')
  group = flags.add_argument_group('generating instead of training')
  group.add_argument('--decode', action='store_true', help='what a token of each row needs')
  group.add_argument('--rows', type=int, default=8, metavar='B', help='of the batch (8)')
  group.add_argument('--cache', type=int, default=1024, metavar='S', help='tokens (1024)')
  group.add_argument('--json', default='plan.json', metavar='FILE', help='results as JSON')
  return flags


if __name__ == '__main__':
  cli.main(main)
