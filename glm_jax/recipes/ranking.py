"""Two answers to one question in a row, of which people preferred the first.

What stages that learn from preferences share: the data, and who is in which document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import configs, sharding
from glm_jax.batch import Batch, Visibility
from glm_jax.configs import one_of
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.rows.table import RowPlan
from glm_jax.recipes import finetuning
from glm_jax.recipes.pretraining import Pretraining
from glm_jax.recipes.reading import TaskData
from glm_jax.text import asking, chat
from glm_jax.text.vocabulary import Vocabulary
from glm_jax.training import adapters
from glm_jax.training.config import TrainConfig

_TASK = 'glm_ranked'
# Whose roles objects are read in where a model has no chat template: a question, an answer.
_PLAIN = 'chatglm'


class Pair(NamedTuple):
  """What carries loss in each of the two answers of rows.

  Attributes:
    chosen: [B, T] float32, 1 at a target of the preferred answer or its end.
    rejected: likewise of the other.
    present: [B] float32, 0 for rows that only fill a batch up.
  """

  chosen: jax.Array
  rejected: jax.Array
  present: jax.Array


def pair_of(batch: Batch) -> Pair:
  """The two documents of each row."""
  # The first one's keys begin where the row does; padding carries no loss.
  first = batch.key_start == 0
  weights = batch.loss_weights
  present = (weights.sum(1) > 0).astype(jnp.float32)
  return Pair(jnp.where(first, weights, 0), jnp.where(first, 0, weights), present)


class RankedData(TaskData):
  """See `recipe.Data`."""

  def examples(self) -> Iterator[Mapping[str, np.ndarray]]:
    for batch in super().examples():
      yield {**batch, 'ranked': np.ones(len(batch['tokens']), bool)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking(Pretraining):
  """What `Preference` and `Reward` are made of.

  Attributes, besides those of `Pretraining`, of which `objectives` are not used:
    template: a key of `glm_jax.text.chat.FAMILIES`; '' for that of the model.
    blank: how a prompt is written for a model without a chat template (GLM), with the mask
      that the answer belongs to, such as '{prompt} [MASK]'; '' with a chat template.
  """

  task: Annotated[str, one_of(_TASK)] = _TASK
  template: Annotated[str, one_of('', *chat.FAMILIES)] = ''
  blank: str = ''

  def __post_init__(self):
    super().__post_init__()
    if self.blank:
      asking.check_pattern(self.blank)
      configs.check(
        not self.template,
        'preferences must be read by a chat template or a blank',
        f'template={self.template!r} and blank={self.blank!r}',
        'leave one of them out',
      )

  def check(self, config: TrainConfig) -> None:
    super().check(config)
    configs.check(
      self.corpus.packed is not False,
      'a row of preferences must hold two documents',
      'CorpusConfig.packed=False',
      'leave it out',
    )
    configs.check(
      self.corpus.too_long != 'truncate_answer',
      'an answer that is compared must be whole',
      "CorpusConfig.too_long='truncate_answer'",
      "use 'truncate_prompt_left', 'drop' or 'error'",
    )
    configs.check(
      not adapters.virtual_tokens(config.adapters),
      'virtual tokens open rows of one document each, and a row of preferences holds two',
      'TrainConfig.adapters=@PTuningConfig()',
      'use @LoRAConfig(), or train all parameters',
    )
    loss = self.loss_config
    configs.check(
      not loss.z_loss and not loss.label_smoothing,
      'z_loss and label_smoothing of LossConfig must be 0 where answers are compared',
      f'{loss.z_loss} and {loss.label_smoothing}',
      'leave them out',
    )

  def own_vocabulary(self) -> Vocabulary:
    return finetuning.vocabulary_of(self)

  def row_plans(
    self, config: TrainConfig, vocabulary: Vocabulary
  ) -> tuple[dict[str, CorpusConfig], dict[str, RowPlan], str]:
    from glm_jax.data import prepare_answers

    family = ''
    if not self.blank:
      family = finetuning.template_of(self, config, vocabulary).family
    configs.check(
      not self.blank or not config.model.causal,
      'a blank must be of a model that fills them',
      f'{self.blank!r} for {type(config.model).__name__}',
      f'leave {type(self).__name__}.blank out',
    )
    plan = prepare_answers.plan_ranked(self.length, template=family, blank=self.blank)
    corpora = {
      name: dataclasses.replace(corpus, conversations=family or _PLAIN, ranked=True)
      for name, corpus in self.corpora().items()
    }
    return corpora, dict.fromkeys(corpora, plan), ''

  def prepare(
    self, config: TrainConfig, vocabulary: Any, layout: sharding.Layout
  ) -> RankedData:
    vocabulary = vocabulary or self.own_vocabulary()
    prepared, identity = finetuning.prepare_rows(self, config, vocabulary)
    return self.data_of(RankedData, config, layout, prepared, **identity, **self.settings())

  def settings(self) -> dict[str, Any]:
    """What a resumed run must keep, besides the data."""
    return {}

  def counts(self, batch: Batch) -> dict[str, jax.Array]:
    pair = pair_of(batch)
    return {'pairs': pair.present.sum(), 'chosen': pair.chosen.sum()}

  def visibility(self, config: TrainConfig) -> Visibility:
    """Two documents of one length."""
    t = np.arange(self.length, dtype=np.int32)
    half = -(-self.length // 2)
    start = np.where(t < half, 0, half).astype(np.int32)
    end = t + 1
    if not config.model.causal:
      # Nobody knows before the data are read: as much is asked as is answered.
      end = np.maximum(end, start + half // 2)
    return Visibility(start[None], end[None].astype(np.int32))

  def rows_in_words(self, config: TrainConfig) -> str:
    return 'rows full, two answers each'

  def _check_task(self, config: TrainConfig) -> None:
    # Both kinds of models learn from it.
    del config

  def fixed_validation(self) -> list[str]:
    return []

  def report(
    self,
    config: TrainConfig,
    data: TaskData,
    variables: Mapping[str, Any],
    validated: Mapping[str, float],
    say: Callable[..., None],
  ) -> dict[str, Any]:
    # What is validated says it all.
    return {}
