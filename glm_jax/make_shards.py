"""Makes shards: text, once and for all, as shuffled rows of tokens that pods read.

The same gin file as for training says which text, which vocabulary and how long the rows
are; training then reads `CorpusConfig.corpus='shards:DIR'`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

from etils import epath

from glm_jax import cli, configs, startup
from glm_jax.recipes.pretraining import Pretraining
from glm_jax.training import start


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = cli.parse(_flags(), argv)
  for name in ('shards', 'processes', 'part_mb'):
    value = getattr(flags, name)
    configs.check(value >= 1, f'--{name} must be 1 or more', str(value), 'raise it')
  config, _ = cli.configuration(flags, placeholders=True)
  recipe = config.recipe
  configs.check(
    isinstance(recipe, Pretraining),
    'make_shards must be given a recipe that reads a corpus',
    type(recipe).__name__,
    'use Pretraining or a recipe made of it',
  )
  folder = epath.Path(os.path.expanduser(flags.output_dir))
  began = time.perf_counter()
  # Imported below the flags: a mistake in them is told at once.
  with startup.silenced_stderr():
    from glm_jax.data import prepare
    from glm_jax.data.corpora import corpus, parts, sources
    from glm_jax.data.making import shard_job
    from glm_jax.data.rows import shards
  shard_job.check_folder(folder)
  configs.check(
    not isinstance(sources.of(recipe.corpus), sources.Shards),
    'make_shards reads text',
    repr(recipe.corpus.corpus),
    'give CorpusConfig.corpus as it was when they were made',
  )
  config, vocabulary, _ = start.resolve(config)
  if vocabulary is None:
    vocabulary = corpus.load_or_train_vocabulary(recipe.vocabulary, [recipe.corpus])
  plan = prepare.row_plan(
    recipe.task,
    recipe.length,
    recipe.objectives,
    vocabulary,
    packed=recipe.corpus.packed,
  )
  job = shard_job.of_config(
    recipe.corpus,
    vocabulary,
    plan,
    count=flags.shards,
    seed=config.seed,
    imports=tuple(flags.imports),
  )
  todo = parts.find(job.corpus, flags.part_mb * 10**6)
  if words := parts.held_out_in_words(todo):
    print(words, flush=True)
  if flags.runner == 'beam':
    from glm_jax.data.making import beam

    beam.run(job, folder, todo, flags.beam_options)
  else:
    from glm_jax.data.making import shard_runner

    shard_runner.run(job, folder, todo, flags.processes)
  seconds = time.perf_counter() - began
  # Read back as a run would: what is printed is what was written.
  splits = shards.load(str(folder))
  for split, rows in splits.items():
    stats = rows.stats
    print(
      f'{split}: {stats["documents"]:,} documents, {stats["tokens"]:,} tokens in '
      f'{len(rows):,} rows of {plan.row_length}, {len(rows.files)} file(s) '
      f'({stats["skipped"]} documents under two tokens skipped)'
    )
  tokens = sum(rows.stats['tokens'] for rows in splits.values())
  print(f'{tokens / seconds:,.0f} tokens/s; train with')
  print(f'  --gin.CorpusConfig.corpus="\'shards:{folder}\'"')


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'make_shards',
    'Writes a corpus as shards of shuffled token rows; run again, it goes on.',
    'python -m glm_jax.make_shards --gin_file=gin_configs/quickstart.gin '
    '--output_dir=shards/documentation',
  )
  cli.add_gin_flags(flags)
  flags.add_argument(
    '--output_dir',
    required=True,
    metavar='DIR',
    help='a new folder, or gs://BUCKET/NAME',
  )
  flags.add_argument(
    '--shards', type=int, default=16, metavar='N', help='training files (16)'
  )
  flags.add_argument(
    '--processes',
    type=int,
    default=os.cpu_count() or 1,
    metavar='N',
    help='that work at a time (one a core)',
  )
  flags.add_argument(
    '--part_mb',
    type=int,
    default=64,
    metavar='MB',
    help='text that is worked on at a time (64)',
  )
  flags.add_argument(
    '--runner',
    choices=('local', 'beam'),
    default='local',
    help='beam for corpora beyond one machine (extra: beam)',
  )
  flags.add_argument(
    '--beam_options',
    default='--runner=DirectRunner',
    metavar='OPTIONS',
    help='of Apache Beam, in one string (--runner=DirectRunner)',
  )
  return flags


if __name__ == '__main__':
  cli.main(main)
