"""Shows what a configuration trains on: examples as text, statistics, the mask."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from glm_jax import cli, configs, sharding, startup
from glm_jax.training import start

# Examples that the statistics are over.
_COUNTED = 512


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = cli.parse(_flags(), argv)
  configs.check(
    1 <= flags.examples <= _COUNTED,
    f'--examples must be in 1 .. {_COUNTED}',
    str(flags.examples),
    'give a number in that range',
  )
  path = cli.output_file('--output', flags.output)
  # Of an accelerator a preview needs nothing, and a run beside it may hold all.
  startup.use_cpu_devices(1)
  with startup.Telling('importing TensorFlow') as telling:
    startup.import_tensorflow()
    from matplotlib.backend_bases import FigureCanvasBase

    from glm_jax.data.examples import render

    formats = FigureCanvasBase.get_supported_filetypes()
    configs.check(
      path.suffix.lower().removeprefix('.') in formats,
      '--output must end as a picture does',
      repr(flags.output),
      f'choose among {", ".join(sorted(formats))}',
    )
    config, _ = cli.configuration(flags)
    config, vocabulary, _ = start.resolve(config)
    # Wherever the run will be, this is one device.
    layout = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1])
    telling('preparing data: the text, its vocabulary')
    data = config.recipe.prepare(config, vocabulary, layout)
    count = -(-_COUNTED // config.batch_size)
    batches = list(itertools.islice(data.examples(), count))
  batch = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
  # Only the tasks of this package count them.
  for name in ('lost', 'capped'):
    batch.setdefault(name, np.zeros(len(batch['tokens']), int))
  # For the statistics, which tell a span that ends with [eop] from one that does not.
  batch['eop'] = np.full(len(batch['tokens']), data.vocabulary.specials.eop)
  for number in range(flags.examples):
    example = {k: v[number] for k, v in batch.items()}
    print(f'--- example {number}, {render.render(example, data.vocabulary)}\n')
  print(render.statistics(batch, data.skipped))
  render.picture({k: v[0] for k, v in batch.items()}, path)
  print(f'\nmask of example 0 in {path}')


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'preview',
    'Prints training examples as text, with statistics.',
    'python -m glm_jax.preview --gin_file=gin_configs/quickstart.gin --examples=3',
  )
  cli.add_gin_flags(flags)
  flags.add_argument(
    '--examples', type=int, default=3, metavar='N', help='how many to print (3)'
  )
  flags.add_argument(
    '--output',
    default='mask.png',
    metavar='FILE',
    help='where the picture of the mask goes (mask.png)',
  )
  return flags


if __name__ == '__main__':
  cli.main(main)
