"""Supervised fine-tuning: a model learns to answer, from conversations or from pairs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from glm_jax import configs, distributed, sharding, storage
from glm_jax.configs import READABLE, one_of, within
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.rows.table import RowPlan
from glm_jax.recipes import answering
from glm_jax.recipes.answering import AnswerConfig, Answering
from glm_jax.recipes.pretraining import Pretraining
from glm_jax.recipes.reading import TaskData
from glm_jax.text import asking, chat, loading
from glm_jax.text.vocabulary import Vocabulary
from glm_jax.training import losses
from glm_jax.training.config import TrainConfig
from glm_jax.training.losses import LossFn

_CONVERSATIONS, _PAIRS = 'glm_conversations', 'glm_pairs'
# Predictions that a report shows.
_SHOWN = 3


class AnswerData(TaskData):
  """See `recipe.Data`.

  Attributes:
    answering: asks what is held out.
  """

  answering: Answering


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetuning(Pretraining):
  """Questions in, answers out: loss on an answer and the token that ends it.

  Attributes, besides those of `Pretraining`, whose `objectives` are those of mixed-in text:
    task: 'glm_conversations', whose lines become messages in the template of the model's
      family (see `glm_jax.data.corpora.turns`), or 'glm_pairs', a prompt and an answer as
      they stand.
    template: a key of `glm_jax.text.chat.FAMILIES`; '' for that of the model.
    blank: how a pair's prompt is written for a prefix model (GLM, ChatGLM-6B), with the
      mask that the answer belongs to; '{prompt}' where prompts have one of their own.
    text: text of pretraining that is mixed in, against forgetting, named as
      `CorpusConfig.corpus` names one; '' for none.
    text_share: share of the rows that are of it.
    answers: what is answered at each validation.
  """

  task: Annotated[str, one_of(_CONVERSATIONS, _PAIRS)] = _CONVERSATIONS
  template: Annotated[str, one_of('', *chat.FAMILIES)] = ''
  blank: str = f'{asking.PROMPT}[gMASK]'
  text: Annotated[str, READABLE] = ''
  text_share: Annotated[float, within('(0, 1)')] = 0.1
  answers: AnswerConfig = AnswerConfig()

  def __post_init__(self):
    super().__post_init__()
    asking.check_pattern(self.blank)

  def check(self, config: TrainConfig) -> None:
    super().check(config)
    configs.check(
      self.packed or not self.text,
      'text that is mixed in must stand in packed rows, as the answers then do',
      'CorpusConfig.packed=False',
      'leave it out, or Finetuning.text',
    )

  @property
  def packed(self) -> bool:
    """Whether a row has several documents; `CorpusConfig.packed` says it is to have one."""
    return self.corpus.packed is not False

  def loss(self, config: TrainConfig, model: Any) -> LossFn:
    # Answers, and what text is mixed in.
    return losses.pretraining_loss(model, self.loss_config)

  def own_vocabulary(self) -> Vocabulary:
    return vocabulary_of(self)

  def corpora(self) -> dict[str, CorpusConfig]:
    from glm_jax.data.prepare_answers import TEXT

    named = super().corpora()
    if not self.text:
      return named
    if '' in named:
      named = {'answers': named['']}
    configs.check(
      TEXT not in named,
      'MixtureConfig.corpora must not have the name of the text that is mixed in',
      repr(TEXT),
      'name it otherwise',
    )
    # Held-out files are of answers; of the text, a share is held out.
    text = dataclasses.replace(self.corpus, corpus=self.text, validation='')
    return {**named, TEXT: text}

  def row_plans(
    self, config: TrainConfig, vocabulary: Vocabulary
  ) -> tuple[dict[str, CorpusConfig], dict[str, RowPlan], str]:
    from glm_jax.data import prepare_answers

    causal, family, blank = config.model.causal, '', ''
    if self.task == _CONVERSATIONS:
      family = template_of(self, config, vocabulary).family
    elif not causal:
      blank = self.blank
    plan = prepare_answers.plan_answers(
      self.length, template=family, blank=blank, packed=self.packed
    )
    corpora = {
      name: dataclasses.replace(corpus, conversations=family)
      for name, corpus in self.corpora().items()
    }
    plans = dict.fromkeys(corpora, plan)
    if self.text:
      name = prepare_answers.TEXT
      corpora[name] = dataclasses.replace(corpora[name], conversations='')
      plans[name] = prepare_answers.plan_text(self.length, self.objectives, causal=causal)
    return corpora, plans, ''

  def of_shards(self, corpora: Mapping[str, str]) -> list[str]:
    from glm_jax.data.prepare_answers import TEXT

    answers = dict(corpora)
    text = [f'Finetuning.text="{answers.pop(TEXT)!r}"'] if self.text else []
    if not self.mixture.corpora:
      answers = {'': next(iter(answers.values()))}
    return [*super().of_shards(answers), *text]

  def prepare(
    self, config: TrainConfig, vocabulary: Any, layout: sharding.Layout
  ) -> AnswerData:
    from glm_jax.data.prepare_answers import TEXT

    vocabulary = vocabulary or self.own_vocabulary()
    prepared, identity = prepare_rows(
      self, config, vocabulary, text_share=self.text_share, packed=self.packed
    )
    answers = [c for c in prepared.corpora if c.name != TEXT]
    if self.text:
      identity['objectives'] = dataclasses.asdict(self.objectives)
    data = self.data_of(AnswerData, config, layout, prepared, **identity)
    data.answering = Answering(
      config,
      layout,
      vocabulary,
      template_of(self, config, vocabulary) if identity['template'] else None,
      [c.rows['validation'] for c in answers if 'validation' in c.rows],
      self.answers,
    )
    return data

  def _check_task(self, config: TrainConfig) -> None:
    if self.text and not config.model.causal:
      self.check_positions(config)

  def _part_a(self) -> float:
    # Nobody knows before the data are read: as much is asked as is answered.
    return 0.5

  def fixed_validation(self) -> list[str]:
    return []

  def validate(
    self, config: TrainConfig, data: Any, variables: Mapping[str, Any]
  ) -> dict[str, float]:
    """Scores of answers to what is held out, in percent."""
    return data.answering(variables)

  def report(
    self,
    config: TrainConfig,
    data: Any,
    variables: Mapping[str, Any],
    validated: Mapping[str, float],
    say: Callable[..., None],
  ) -> dict[str, Any]:
    """A few answers to what is held out, beside the references."""
    if not data.answering.questions or not distributed.is_leader():
      return {}
    content = storage.Folder(config.model_dir).read(answering.PREDICTIONS) or b''
    shown = [json.loads(line) for line in content.splitlines()[:_SHOWN]]
    say(f'\nheld-out questions, answered by the model ({answering.PREDICTIONS}):')
    for line in shown:
      for name, text in line.items():
        say(f'  {name:<10} {text}'.replace('\n', '↵'))
    return {'answers': shown}


def prepare_rows(
  recipe: Any,
  config: TrainConfig,
  vocabulary: Vocabulary,
  *,
  text_share: float = 0.0,
  packed: bool = True,
) -> tuple[Any, dict[str, Any]]:
  """The rows of a recipe of answers, and what they are besides their text.

  Args:
    recipe: whose `row_plans` say how they are made, those of answers first.
    config: of the run.
    vocabulary: of the tokens.
    text_share: of the rows, which are of pretraining text.
    packed: several documents a row.
  """
  from glm_jax.data import prepare_answers

  model = config.model
  corpora, plans, _ = recipe.row_plans(config, vocabulary)
  prepared = prepare_answers.prepare_answers(
    recipe.task,
    corpora,
    plans,
    vocabulary,
    mixture=recipe.mixture,
    text_share=text_share,
    objectives=recipe.objectives,
    causal=model.causal,
    two_positions=not model.causal and model.two_positions,
    packed=packed,
  )
  plan = next(iter(plans.values()))
  return prepared, {'template': plan.template, 'blank': plan.blank}


def vocabulary_of(recipe: Any) -> Vocabulary:
  """That which a recipe of answers names, where no checkpoint has one."""
  # One that is trained on conversations would be of their braces and quotes.
  configs.check(
    recipe.has_vocabulary,
    'fine-tuning must have the vocabulary of a checkpoint',
    'none',
    'set TrainConfig.model=@CheckpointModel() (runs/sft.gin) or VocabularyConfig.path',
  )
  return loading.load(recipe.vocabulary.path)


def template_of(recipe: Any, config: TrainConfig, vocabulary: Vocabulary) -> Any:
  """The chat template of a run: the model's, or what `recipe.template` names."""
  model = config.model
  template = chat.template_for(vocabulary, recipe.template or chat.family_of(model))
  configs.check(
    template.reads_again != model.causal,
    "a chat template must be of the model's family",
    f'{template.family!r} for {type(model).__name__}',
    f'leave {type(recipe).__name__}.template out',
  )
  return template


CONFIGURABLES = (Finetuning, AnswerConfig)
"""What gin may bind, besides what it may in pretraining."""
