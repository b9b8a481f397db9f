"""From a run's configuration to a registered task: corpus, vocabulary, rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import seqio

from glm_jax import configs
from glm_jax.batch import MIXED
from glm_jax.data import corpus as corpora
from glm_jax.data import rows as row_store
from glm_jax.data import tasks
from glm_jax.data.config import CorpusConfig, VocabularyConfig
from glm_jax.data.objective_config import ObjectiveConfig
from glm_jax.data.preprocessors import SeqioVocabulary
from glm_jax.text.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
  """What a run needs to know of its data.

  Attributes:
    vocabulary: of the tokens.
    fingerprint: tells one set of training examples from another.
    evaluation_tasks: registered tasks that have a validation split.
    stats: of the rows by split; empty for a task of the user's.
  """

  vocabulary: Vocabulary
  fingerprint: str
  evaluation_tasks: tuple[str, ...]
  stats: dict[str, dict]


def prepare(
  task: str,
  feature_lengths: Mapping[str, int],
  corpus: CorpusConfig,
  vocabulary_config: VocabularyConfig,
  objectives: ObjectiveConfig,
  vocabulary: Vocabulary | None = None,
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

  Raises:
    ValueError: a task that is not registered; bad text (see `corpus` and `rows`).
  """
  registered = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if task in tasks.NAMES:
    if vocabulary is None:
      vocabulary = corpora.load_or_train_vocabulary(vocabulary_config, corpus)
    length = feature_lengths['tokens']
    if task == tasks.CAUSAL:
      row_length = length + 1  # the last token is a target alone
      configs.check(
        length > len(vocabulary.prefix),
        f'TASK_FEATURE_LENGTHS must leave room behind the {len(vocabulary.prefix)} tokens '
        'that open a document',
        str(length),
        'raise it',
      )
    else:
      if task != tasks.MIXTURE:
        objectives = objectives.only(task.removeprefix('glm_'))
      row_length = objectives.row_length(length)
    rows = {
      split: row_store.build_rows(corpus, vocabulary, split, row_length)
      for split in ('train', 'validation')
    }
    if task == tasks.CAUSAL:
      tasks.register_causal(rows, vocabulary)
      wanted = [task]
    else:
      tasks.register(rows, vocabulary, objectives)
      weights = zip(MIXED, objectives.weights, strict=True)
      wanted = [f'glm_{name}' for name, weight in weights if weight]
    return Prepared(
      vocabulary=vocabulary,
      fingerprint=rows['train'].stats['digest'],
      evaluation_tasks=tuple(wanted),
      stats={k: v.stats for k, v in rows.items()},
    )
  configs.check(
    task in registered,
    f'MIXTURE_OR_TASK_NAME must be one of {list(tasks.NAMES)} or a registered task',
    repr(task),
    'register it in a module named by --import',
  )
  provider = seqio.get_mixture_or_task(task)
  feature = provider.output_features.get('tokens')
  vocabulary = getattr(feature and feature.vocabulary, 'vocabulary', None)
  configs.check(
    feature is not None and isinstance(feature.vocabulary, SeqioVocabulary),
    f'the task {task!r} must have the feature tokens with a SeqioVocabulary',
    str(feature),
    'use output_features() of glm_jax.data.preprocessors',
  )
  has_validation = 'validation' in provider.splits
  return Prepared(
    vocabulary=vocabulary,
    fingerprint=f'task {task}',
    evaluation_tasks=(task,) if has_validation else (),
    stats={},
  )
