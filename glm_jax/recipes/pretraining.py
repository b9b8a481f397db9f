"""Pretraining: GLM's objectives or the next token, over a corpus or a task of one's own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from glm_jax import configs, sharding
from glm_jax.batch import MIXED, PRETRAINING, Visibility
from glm_jax.checkpoints import folder
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.rows.table import RowPlan
from glm_jax.data.stream.mixing import MixtureConfig
from glm_jax.recipes import samples
from glm_jax.recipes.reading import TaskData
from glm_jax.text.vocabulary import Vocabulary
from glm_jax.training import losses, recipe
from glm_jax.training.config import TrainConfig
from glm_jax.training.losses import LossConfig, LossFn

_CAUSAL = 'glm_causal'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining(recipe.Recipe):
  """Text in, blanks or next tokens out.

  Attributes:
    task: a registered seqio task or mixture (MIXTURE_OR_TASK_NAME).
    feature_lengths: {'tokens': positions of a row} (TASK_FEATURE_LENGTHS).
    corpus: the text.
    mixture: several corpora, by rate.
    vocabulary: how it becomes tokens.
    objectives: how tokens become examples.
    validated: what is validated, on masks of its own; None for what is trained on. Runs
      that train on different objectives are compared on one.
    loss_config: how the loss is computed.
  """

  task: str
  feature_lengths: dict[str, int]
  corpus: CorpusConfig = CorpusConfig()
  mixture: MixtureConfig = MixtureConfig()
  vocabulary: VocabularyConfig = VocabularyConfig()
  objectives: ObjectiveConfig = ObjectiveConfig()
  validated: ObjectiveConfig | None = None
  loss_config: LossConfig = LossConfig()

  def __post_init__(self):
    configs.check_fields(self)
    recipe.check_lengths(self.feature_lengths)

  @property
  def length(self) -> int:
    return self.feature_lengths['tokens']

  @property
  def has_vocabulary(self) -> bool:
    return bool(self.vocabulary.path)

  @property
  def logits_share(self) -> float:
    return 1 / (self.loss_config.vocab_chunks or 1)

  def loss(self, config: TrainConfig, model: Any) -> LossFn:
    return losses.pretraining_loss(model, self.loss_config, PRETRAINING)

  def prepare(
    self, config: TrainConfig, vocabulary: Any, layout: sharding.Layout
  ) -> TaskData:
    from glm_jax.data import prepare

    prepared = prepare.prepare(
      self.task,
      self.feature_lengths,
      self.corpus,
      self.vocabulary,
      self.objectives,
      vocabulary,
      mixture=self.mixture,
      evaluation=self.validated,
      packed=folder.decided(config.model_dir).get('packed'),
    )
    objectives = dataclasses.asdict(self.objectives)
    return self.data_of(TaskData, config, layout, prepared, objectives=objectives)

  def data_of(
    self,
    kind: Any,
    config: TrainConfig,
    layout: sharding.Layout,
    prepared: Any,
    **identity: Any,
  ) -> Any:
    """What was prepared, as `kind` gives it to a run.

    Args:
      kind: `TaskData`, or of its subclasses.
      config: of the run.
      layout: of the devices.
      prepared: a `glm_jax.data.prepare.Prepared`.
      **identity: what a resumed run must keep, besides the task, its lengths and the data.
    """
    identity = {
      'task': self.task,
      'feature_lengths': dict(self.feature_lengths),
      **identity,
      'data': prepared.fingerprint,
    }
    return kind(
      config,
      layout,
      task=self.task,
      feature_lengths=self.feature_lengths,
      prepared=prepared,
      identity=identity,
    )

  def check(self, config: TrainConfig) -> None:
    # What two configurations must agree in is checked by the one that sees both.
    if config.train_steps is not None:
      self.objectives.check_steps(config.train_steps)

  def check_data(self, config: TrainConfig, data: TaskData) -> None:
    from glm_jax.data import prepare

    self._check_model(config, data)
    prepare.check_batch(data.prepared, config.batch_size)
    prepare.verify(data.prepared, self.corpus, jax.process_index(), jax.process_count())

  def own_vocabulary(self) -> Vocabulary:
    """That which the recipe says, where no checkpoint does."""
    from glm_jax.data.corpora import corpus

    return corpus.load_or_train_vocabulary(self.vocabulary, [*self.corpora().values()])

  def corpora(self) -> dict[str, CorpusConfig]:
    """What is read, by name; '' where there is one alone."""
    from glm_jax.data import prepare

    return prepare.corpora_of(self.corpus, self.mixture)

  def row_plans(
    self, config: TrainConfig, vocabulary: Vocabulary
  ) -> tuple[dict[str, CorpusConfig], dict[str, RowPlan], str]:
    """How the training rows of each corpus are made.

    Args:
      config: of the run, its model resolved.
      vocabulary: of the tokens.

    Returns:
      The corpora as they are read, their plans, and what was decided, in words.
    """
    from glm_jax.data import prepare

    corpora, packed, why = self.corpora(), self.corpus.packed, ''
    if packed is None:
      packed, why = prepare.decide_packed([*corpora.values()])
    plan = prepare.row_plan(
      self.task, self.length, self.objectives, vocabulary, packed=packed
    )
    return corpora, dict.fromkeys(corpora, plan), why

  def of_shards(self, corpora: Mapping[str, str]) -> list[str]:
    """gin bindings to read the shards of each corpus instead."""
    if self.mixture.corpora:
      return [f'MixtureConfig.corpora="{dict(corpora)}"']
    return [f'CorpusConfig.corpus="{corpora[""]!r}"']

  def _check_model(self, config: TrainConfig, data: TaskData) -> None:
    model, vocabulary = config.model, data.vocabulary
    name = type(model).__name__
    self._check_task(config)
    configs.check(
      vocabulary.size <= model.vocab_size,
      "the model's vocab_size must hold the vocabulary",
      f'vocab_size={model.vocab_size}, vocabulary of {vocabulary.size}',
      f'set {name}.vocab_size to {math.ceil(vocabulary.size / 128) * 128}',
    )
    # One more than the table's largest index, since positions begin at 0. A GLM row may be
    # longer than its text, whose spans repeat the positions of their masks.
    most = model.max_positions + 1
    configs.check(
      self.length <= most or self._text_length(data.prepared.packed) <= most,
      "rows must fit the model's position table",
      f'rows of {self.length} positions, max_positions={model.max_positions}',
      f'raise {name}.max_positions or shorten TASK_FEATURE_LENGTHS',
    )

  def _check_task(self, config: TrainConfig) -> None:
    model = config.model
    name = type(model).__name__
    if self.task.startswith('glm_'):
      configs.check(
        model.causal == (self.task == _CAUSAL),
        'MIXTURE_OR_TASK_NAME must be glm_causal for a causal model, and for no other',
        f'{self.task!r} for {name}',
        'use glm_causal with a causal model, and glm_mixture with any other',
      )
      if not model.causal:
        self.check_positions(config)

  def check_positions(self, config: TrainConfig) -> None:
    """Raises UserError for objectives with other positions than the model's."""
    two = config.model.two_positions
    configs.check(
      two == self.objectives.block_positions,
      "ObjectiveConfig.block_positions must be the model's two_positions",
      f'{self.objectives.block_positions} and {two}',
      f'set ObjectiveConfig.block_positions = {two}',
    )

  def _text_length(self, packed: bool) -> int:
    """Tokens of text in a row: no position is larger."""
    # A packed row may hold one document alone.
    if packed or self.objectives.one_dimensional:
      return self.length
    return self.objectives.row_length(self.length)

  def visibility(self, config: TrainConfig) -> Visibility:
    """A full row; causal, or with GLM's Part A as on average."""
    start, end = super().visibility(config)
    if config.model.causal:
      return Visibility(start, end)
    # Query t sees the keys before end[t]; of Part A, all of Part A.
    part_a = round(self.length * self._part_a())
    return Visibility(start, np.maximum(part_a, end).astype(np.int32))

  def rows_in_words(self, config: TrainConfig) -> str:
    if config.model.causal:
      return ''
    return f'rows full, {self._part_a():.0%} of them Part A'

  def _part_a(self) -> float:
    """Share of a row that is Part A: what the mixture leaves of a text."""
    o = self.objectives
    only = self.task.removeprefix('glm_')
    # A task of one objective has the mixture that holds nothing else.
    if only in MIXED:
      o = o.only(only)
    # By objective (blank, document, sentence): the share of a text that spans replace. The
    # length of a document's span is uniform between its least ratio and the whole.
    hidden = (o.mask_ratio, (o.document_min_ratio + 1) / 2, o.mask_ratio)
    return 1 - float(np.dot(o.weights, hidden)) / sum(o.weights)

  def fixed_validation(self) -> list[str]:
    if self.task == _CAUSAL:  # it has no masks
      return []
    # Every setting is bound, also those that are searched: validation is the same for all.
    fixed = self.validated or dataclasses.replace(
      self.objectives, schedule=(), blank=1.0, document=1.0, sentence=1.0
    )
    return [
      f'{type(self).__name__}.validated=@validation/ObjectiveConfig()',
      *(
        f'validation/ObjectiveConfig.{field.name}={getattr(fixed, field.name)!r}'
        for field in dataclasses.fields(ObjectiveConfig)
      ),
    ]

  def report(
    self,
    config: TrainConfig,
    data: TaskData,
    variables: Mapping[str, Any],
    validated: Mapping[str, float],
    say: Callable[..., None],
  ) -> dict[str, Any]:
    """Tables beside baselines; blanks filled, or text continued, by the model."""
    baselines = samples.beside_baselines(config, data, validated, say)
    filled, guessed = [], {}
    if data.prepared.corpora and config.evaluation.fill:
      if 'blank' in data.validation:
        guessed = samples.guess(config, data, variables, say)
      name = next(iter(self.mixture.corpora.values()), self.corpus.corpus)
      source = dataclasses.replace(self.corpus, corpus=name)
      filled = samples.fill(config, data, source, variables, say)
    lines = {
      f'{k} ({name})': v
      for name, scores in baselines.items()
      for k, v in scores.items()
      if name in ('blank', 'causal')
    }
    return {
      'baselines': baselines,
      'guesses': guessed,
      'filled': filled,
      'lines': lines,
    }


CONFIGURABLES = (
  Pretraining,
  CorpusConfig,
  MixtureConfig,
  VocabularyConfig,
  ObjectiveConfig,
  LossConfig,
)
"""What gin may bind."""
