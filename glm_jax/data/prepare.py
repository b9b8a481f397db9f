"""From a run's configuration to a registered task: corpora, vocabulary, rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import seqio

from glm_jax import configs
from glm_jax.data import tasks
from glm_jax.data.corpora import corpus as corpora_module
from glm_jax.data.corpora import sources
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.data.examples.objective_config import ObjectiveConfig, causal_packing
from glm_jax.data.making import tokenized
from glm_jax.data.preprocessors import SeqioVocabulary
from glm_jax.data.rows import shards
from glm_jax.data.rows.table import RowPlan
from glm_jax.data.stream.mixing import MixtureConfig
from glm_jax.data.stream.source import Corpus
from glm_jax.text.vocabulary import Vocabulary

# Share of the documents whose loss is more than a number in a line.
_MANY_LEFT_OUT = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
  """What a run needs to know of its data.

  Attributes:
    vocabulary: of the tokens.
    fingerprint: tells one set of training examples from another.
    evaluation_tasks: registered tasks that have a validation split, by objective.
    corpora: rows by split; empty for a task of the user's.
    indexed: whether the stream is a function of a step alone; a task of the user's keeps
      its place in an iterator.
    packed: whether rows hold whole documents.
    notes: what was decided for a person who may not expect it.
  """

  vocabulary: Vocabulary
  fingerprint: str
  evaluation_tasks: dict[str, str]
  corpora: tuple[Corpus, ...] = ()
  indexed: bool = True
  packed: bool = False
  notes: tuple[str, ...] = ()


def prepare(
  task: str,
  feature_lengths: Mapping[str, int],
  corpus: CorpusConfig,
  vocabulary_config: VocabularyConfig,
  objectives: ObjectiveConfig,
  vocabulary: Vocabulary | None = None,
  *,
  mixture: MixtureConfig = MixtureConfig(),
  evaluation: ObjectiveConfig | None = None,
  packed: bool | None = None,
) -> Prepared:
  """Makes (or finds, cached) everything that the task reads, and registers it.

  A task that is already registered, by `--import`, brings its own data; its
  vocabulary is that of its `tokens` feature.

  Args:
    task: its name.
    feature_lengths: {'tokens': L}.
    corpus: the text.
    vocabulary_config: how it becomes tokens.
    objectives: how tokens become examples.
    vocabulary: that of a checkpoint, which the model goes on from; else
      `vocabulary_config` says which.
    mixture: of corpora.
    evaluation: what is validated, if not what is trained on.
    packed: what a run that goes on began with; None for a new one.

  Raises:
    UserError: a task that is not registered; bad text or shards (see `corpus`,
      `shards`), or shards that are made for something else.
  """
  configs.check(
    task not in tasks.ANSWERS,
    'fine-tuning must have a recipe of its own',
    f'MIXTURE_OR_TASK_NAME={task!r} in pretraining',
    'use gin_configs/runs/sft.gin, cloze.gin or dpo.gin',
  )
  if task not in tasks.NAMES:
    return _registered_task(task)
  # 1. Corpora and the vocabulary. A run without a mixture has one corpus, without a name.
  named = corpora_of(corpus, mixture)
  if vocabulary is None:
    vocabulary = corpora_module.load_or_train_vocabulary(
      vocabulary_config, list(named.values())
    )
  # 2. Rows. Training and validation may be of other objectives, hence of other plans.
  if task not in (tasks.CAUSAL, tasks.MIXTURE):
    objectives = objectives.only(task.removeprefix('glm_'))
  evaluation = evaluation or objectives
  length, notes = feature_lengths['tokens'], []
  if corpus.packed is not None:
    packed = corpus.packed
  elif packed is None:
    packed, why = decide_packed([*named.values()])
    notes += [why] if why else []
  if task == tasks.MIXTURE and objectives.objectives == ('blank',):
    notes.append(
      f'{task} is of blanks alone: ObjectiveConfig.document and sentence weigh the others'
    )
  plans = {
    'train': row_plan(task, length, objectives, vocabulary, packed=packed),
    'validation': row_plan(task, length, evaluation, vocabulary, packed=packed),
  }
  rows = {name: rows_of(source, vocabulary, plans) for name, source in named.items()}
  notes += [left_out(named[name], r['train'].stats) for name, r in rows.items()]
  shares = mixture.shares({name: len(r['train']) for name, r in rows.items()})
  # A corpus without a share is not read.
  corpora = [Corpus(name, rows[name], share) for name, share in shares.items() if share]
  check_alike(corpora)
  # 3. The tasks over them.
  if task == tasks.CAUSAL:
    tasks.register_causal(corpora, vocabulary)
    evaluation_tasks = {'causal': f'{task}{tasks.EVALUATION}'}
  else:
    tasks.register(corpora, vocabulary, objectives, evaluation)
    evaluation_tasks = {n: f'glm_{n}{tasks.EVALUATION}' for n in evaluation.objectives}
  has_validation = any('validation' in c.rows for c in corpora)
  return Prepared(
    vocabulary=vocabulary,
    fingerprint=fingerprint(corpora),
    evaluation_tasks=evaluation_tasks if has_validation else {},
    corpora=tuple(corpora),
    packed=packed,
    notes=tuple(filter(None, notes)),
  )


def left_out(corpus: CorpusConfig, stats: Mapping[str, Any]) -> str:
  """What a person is told of a corpus whose pairs are often too long; '' of others."""
  dropped, all_of_it = stats['dropped'], stats['dropped'] + stats['documents']
  if dropped <= _MANY_LEFT_OUT * all_of_it:
    return ''
  return (
    f'{dropped:,} of {all_of_it:,} documents in {corpus.corpus!r} are longer than a row '
    'and left out: raise TASK_FEATURE_LENGTHS, or see CorpusConfig.too_long'
  )


def decide_packed(corpora: Sequence[CorpusConfig]) -> tuple[bool, str]:
  """Whether rows hold whole documents where nobody says so, and why in words."""
  for config in corpora:
    source = sources.of(config)
    if isinstance(source, sources.Shards):
      return next(iter(shards.load(source.name).values())).plan.packed, ''
    if source.has_prompts():
      what = f'{config.corpus!r} has prompts'
      return True, f'{what}: rows hold whole documents (CorpusConfig.packed)'
  return False, ''


def corpora_of(corpus: CorpusConfig, mixture: MixtureConfig) -> dict[str, CorpusConfig]:
  """The corpora of a run by name; one without a name where there is no mixture."""
  named = mixture.corpora or {'': corpus.corpus}
  return {name: dataclasses.replace(corpus, corpus=spec) for name, spec in named.items()}


def row_plan(
  task: str,
  length: int,
  objectives: ObjectiveConfig,
  vocabulary: Vocabulary,
  *,
  packed: bool,
) -> RowPlan:
  """How documents become rows for a task of this package.

  Args:
    task: its name.
    length: L, positions of a row.
    objectives: of `glm_mixture`, or of the one objective.
    vocabulary: of the tokens.
    packed: whole documents, each an example of its own.
  """
  if task == tasks.CAUSAL:
    configs.check(
      length > len(vocabulary.prefix),
      f'TASK_FEATURE_LENGTHS must leave room behind the {len(vocabulary.prefix)} tokens '
      'that open a document',
      str(length),
      'raise it',
    )
    # The last token is a target alone.
    return causal_packing(length) if packed else RowPlan(length + 1)
  return objectives.packing(length) if packed else RowPlan(objectives.row_length(length))


def check_batch(data: Prepared, batch_size: int) -> None:
  """Raises UserError for a corpus with fewer rows than a global batch takes from it."""
  for corpus in data.corpora:
    n, needed = len(corpus.rows['train']), batch_size * corpus.share
    configs.check(
      n >= needed,
      f'a corpus must hold the rows of one global batch, {needed:,.0f} of BATCH_SIZE='
      f'{batch_size}',
      f'{n:,} rows' + f' in {corpus.name!r}' * bool(corpus.name),
      'give more text, shorter rows or a smaller batch',
    )


def verify(data: Prepared, config: CorpusConfig, index: int, count: int) -> int:
  """Bytes of shards that this process, `index` of `count`, compared with checksums."""
  if not config.verify:
    return 0
  return sum(
    shards.verify(rows, index, count)
    for corpus in data.corpora
    for rows in corpus.rows.values()
  )


def _registered_task(task: str) -> Prepared:
  registered = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  configs.check(
    task in registered,
    f'MIXTURE_OR_TASK_NAME must be one of {list(tasks.NAMES)} or a registered task',
    repr(task),
    'register it in a module named by --import',
  )
  provider = seqio.get_mixture_or_task(task)
  feature = provider.output_features.get('tokens')
  configs.check(
    feature is not None and isinstance(feature.vocabulary, SeqioVocabulary),
    f'the task {task!r} must have the feature tokens with a SeqioVocabulary',
    str(feature),
    'use output_features() of glm_jax.data.preprocessors',
  )
  return Prepared(
    vocabulary=feature.vocabulary.vocabulary,
    fingerprint=f'task {task}',
    evaluation_tasks={task: task} if 'validation' in provider.splits else {},
    indexed=False,
  )


def rows_of(
  config: CorpusConfig, vocabulary: Vocabulary, plans: dict[str, RowPlan]
) -> dict[str, shards.StoredRows]:
  """Rows by split of a corpus, made or found, with a plan for each split."""
  source = sources.of(config)
  if not isinstance(source, sources.Shards):
    return {
      split: tokenized.cached_rows(config, vocabulary, split, plan)
      for split, plan in plans.items()
    }
  path = source.name
  rows = shards.load(path, vocabulary)
  configs.check(
    'train' in rows,
    f'the shards in {path} must have a train split',
    str(sorted(rows)),
    'make them again',
  )
  for split, plan in plans.items():
    if split in rows:
      _check_plan(path, rows[split].plan, plan)
  return rows


def _check_plan(path: str, stored: RowPlan, planned: RowPlan) -> None:
  asks = [
    'ranked answers to ' * plan.ranked + (plan.template or plan.blank or 'text')
    for plan in (stored, planned)
  ]
  configs.check(
    asks[0] == asks[1],
    f'the shards in {path} must be of what this run reads, {asks[1]}',
    asks[0],
    'make them again with this configuration',
  )
  kind = {True: 'packed documents', False: 'a stream cut into rows'}
  configs.check(
    stored.packed == planned.packed,
    f'CorpusConfig.packed must be as the shards in {path} were made',
    f'{kind[stored.packed]} there, {kind[planned.packed]} here',
    f'set CorpusConfig.packed={stored.packed}, or make them again',
  )
  if not stored.packed:
    fits = stored.row_length <= planned.row_length
    got = f'rows of {stored.row_length} tokens'
    most = f'{planned.row_length} tokens of text'
  else:
    # Each document must have room for its spans, and the row for its documents.
    both = zip(stored.room, planned.room, strict=False)
    fits = stored.positions <= planned.positions and all(a >= b for a, b in both)
    got = f'rows planned for {stored.positions} positions'
    most = f'{planned.positions} positions and these objectives'
  configs.check(
    fits,
    f'shards in {path} must fit the rows of this run: {most}',
    got,
    'raise TASK_FEATURE_LENGTHS, or make shards with this configuration',
  )


def check_alike(corpora: Sequence[Corpus]) -> None:
  """Raises UserError for corpora that cannot share a stream."""
  layouts = {c.name: c.rows['train'].layout.row_length for c in corpora}
  configs.check(
    len({*layouts.values()}) == 1 and len({c.rows['train'].plan for c in corpora}) == 1,
    'the corpora of a mixture must have rows of one length and plan',
    str(layouts),
    'make their shards with the same configuration',
  )


def fingerprint(corpora: Sequence[Corpus]) -> str:
  """Tells the rows and shares of a run from those of another."""
  if len(corpora) == 1:
    return corpora[0].rows['train'].stats['digest']
  parts = [[c.name, c.share, c.rows['train'].stats['digest']] for c in corpora]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
