"""Fills blanks or continues a text with a trained checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from glm_jax import cli, configs, startup


def main(argv: Sequence[str]) -> None:
  """The command: load, fill, print."""
  flags = _flags().parse_args(argv)

  # JAX only after the flags are known to be good.
  import jax

  from glm_jax import checkpoints, sharding
  from glm_jax.checkpoints import variables
  from glm_jax.inference.filling import Filler
  from glm_jax.inference.sampling import Sampling
  from glm_jax.models import ComputeConfig
  from glm_jax.models import config as model_config
  from glm_jax.training import start, state

  startup.find_devices()
  configs.check_value('--checkpoint', flags.checkpoint, configs.READABLE)
  # JAX takes 32 bits of a seed, and would drop the others.
  configs.check_value('--seed', flags.seed, configs.SEED)
  sampling = Sampling(temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p)
  folder = checkpoints.find(flags.checkpoint)
  meta = checkpoints.read_meta(folder)
  config = model_config.from_dict(meta['model'])
  vocabulary = start.vocabulary_of(folder, meta)
  # One device: a prompt is a batch of one row.
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1])
  # Weights stay as they are stored: each is cast where it is used.
  read = variables.read(folder, state.abstract_params(config, mesh))

  with sharding.active(mesh):
    compute = ComputeConfig(dtype=flags.dtype)
    filler = Filler(config, read, vocabulary, compute)
    prompt = filler.encode(flags.prompt, flags.gmask)
    spans = filler.fill(
      [prompt], max_new_tokens=flags.max_new_tokens, sampling=sampling, seed=flags.seed
    )[0]
  print(filler.text(prompt, spans))


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'generate',
    'Fills the blanks of a text, or continues it, with a checkpoint.',
    "python -m glm_jax.generate --checkpoint=runs/quickstart --prompt='Return the [MASK] "
    "of a list.'",
  )
  flags.add_argument(
    '--checkpoint',
    required=True,
    metavar='DIR',
    help='a MODEL_DIR (its newest checkpoint) or one checkpoint folder',
  )
  flags.add_argument(
    '--prompt',
    required=True,
    metavar='TEXT',
    help='text with [MASK] (a few words), [sMASK] (a sentence) or [gMASK] (the rest)',
  )
  flags.add_argument('--gmask', action='store_true', help='continue the text instead')
  flags.add_argument('--max_new_tokens', type=int, default=64, help='longest span (64)')
  flags.add_argument(
    '--temperature', type=float, default=0.0, help='0 takes the most probable token (0)'
  )
  flags.add_argument('--top_k', type=int, default=0, help='sample among so many; 0: all')
  flags.add_argument(
    '--top_p',
    type=float,
    default=1.0,
    help='sample among the most probable that reach this share (1)',
  )
  flags.add_argument('--seed', type=int, default=0, help='of sampling (0)')
  flags.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    default='float32',
    help='of activations (float32)',
  )
  return flags


if __name__ == '__main__':
  cli.main(main)
