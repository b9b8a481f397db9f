"""Makes shards: text, once and for all, as shuffled rows of tokens that pods read.

The same gin file as for training says which text, which vocabulary and how long the rows
are; training then reads `CorpusConfig.corpus='shards:DIR'`. Of a mixture, every corpus has
a folder of its own in the output folder, and all have one vocabulary.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Sequence
from typing import Any

from etils import epath

from glm_jax import cli, configs, startup
from glm_jax.recipes.pretraining import Pretraining
from glm_jax.training import start


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = cli.parse(_flags(), argv)
  for name in ('shards', 'processes', 'part_mb'):
    value = getattr(flags, name)
    for rule in (configs.at_least(1), configs.at_most(100_000)):
      configs.check_value(f'--{name}', value, rule)
  config, _ = cli.configuration(flags, placeholders=True)
  recipe = config.recipe
  configs.check(
    isinstance(recipe, Pretraining),
    'make_shards must be given a recipe that reads a corpus',
    type(recipe).__name__,
    'use Pretraining or a recipe made of it',
  )
  for rule in (configs.READABLE, configs.NOT_EMPTY):
    configs.check_value('--output_dir', flags.output_dir, rule)
  folder = epath.Path(os.path.expanduser(flags.output_dir))
  # Imported below the flags: a mistake in them is told at once.
  with startup.silenced_stderr():
    from glm_jax.data.corpora import sources
    from glm_jax.data.making import shard_job
  # One corpus fills the folder; those of a mixture have a folder each in it.
  corpora = recipe.corpora()
  folders = {name: folder / name if name else folder for name in corpora}
  for name, named in corpora.items():
    configs.check(
      re.fullmatch(r'[\w.-]*', name) is not None and name.strip('.') == name,
      'a corpus of a mixture must have a name that a folder can have',
      repr(name),
      'use letters, digits, - and _ in MixtureConfig.corpora',
    )
    configs.check(
      not isinstance(sources.of(named), sources.Shards),
      'make_shards reads text',
      repr(named.corpus),
      'give the corpus as it was when they were made',
    )
  left = shard_job.unfinished(list(folders.values()))
  config, vocabulary, _ = start.resolve(config)
  vocabulary = vocabulary or recipe.own_vocabulary()
  corpora, plans, why = recipe.row_plans(config, vocabulary)
  if why:
    print(why, flush=True)
  for name, named in corpora.items():
    if folders[name] in left:
      _make(named, folders[name], vocabulary, plans[name], flags)
    else:
      shard_job.check_same(folders[name], vocabulary, plans[name])
      print(f'{folders[name]}: as an earlier call made it', flush=True)
  print('train with')
  for binding in recipe.of_shards({n: f'shards:{path}' for n, path in folders.items()}):
    print(f'  --gin.{binding}')


def _make(
  corpus: Any, folder: epath.Path, vocabulary: Any, plan: Any, flags: argparse.Namespace
) -> None:
  """Makes the shards of one corpus, and says what is in them."""
  from glm_jax.data.corpora import parts
  from glm_jax.data.making import shard_job, tokenized
  from glm_jax.data.rows import shards

  began = time.perf_counter()
  todo = parts.find(corpus, flags.part_mb * 10**6)
  job = shard_job.of_config(
    corpus, vocabulary, plan, todo, count=flags.shards, imports=tuple(flags.imports)
  )
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
    print(
      f'{split}: {tokenized.in_words(rows.stats)} in {len(rows):,} rows of '
      f'{plan.row_length}, {len(rows.files)} file(s)'
    )
  tokens = sum(rows.stats['tokens'] for rows in splits.values())
  print(f'{folder}: {tokens / seconds:,.0f} tokens/s', flush=True)


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
