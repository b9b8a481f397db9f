"""A policy: a model that learns from rewards of its own answers; see `ppo` and `grpo`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import checkpoints, configs, sharding
from glm_jax.batch import Batch, Visibility
from glm_jax.configs import POSITIVE, READABLE, at_least, one_of, within
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.inference import prompts
from glm_jax.models import config as model_config
from glm_jax.performance import flops
from glm_jax.recipes import finetuning, rollouts
from glm_jax.recipes import questions as asked
from glm_jax.recipes.experience import Experience, shapes
from glm_jax.recipes.policy_data import PolicyData
from glm_jax.recipes.rewards import Judge, RewardModel
from glm_jax.recipes.rollouts import Rollouts
from glm_jax.text import asking, chat
from glm_jax.training import adapters, log_probs, losses, recipe, start
from glm_jax.training.config import TrainConfig
from glm_jax.training.losses import LossFn

# What a run that goes on may change: it decides nothing of what was learnt.
_FREE = ('corpus', 'reward_seconds', 'show_every', 'decoding_rows', 'reward_model')
_FREE += ('chunks', 'feature_lengths')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(recipe.Recipe):
  """What `PPO` and `GRPO` are made of.

  Every `rollout_size / BATCH_SIZE * epochs` steps, the model answers questions, its answers
  are judged, and these steps learn from them.

  Attributes:
    feature_lengths: {'tokens': positions of a question and its answer}.
    corpus: the questions; what is held out is answered at each validation.
    template: a key of `glm_jax.text.chat.FAMILIES`; '' for that of the model.
    blank: how a question is written for a model without a chat template (GLM), with the
      mask that the answer belongs to, such as '{prompt} [MASK]'; '' with a template.
    rewards: functions 'module.name' of modules that --import names -> their weights, 0 for
      one that is only reported; see `glm_jax.recipes.rewards.RewardFn`.
    reward_model: a checkpoint of `glm_jax.recipes.reward` that judges, too; '' for none.
    reward_model_weight: of it.
    reward_seconds: that a function may take for a rollout.
    unfinished_penalty: what an answer without an end loses.
    rollout_size: answers of a rollout, a multiple of BATCH_SIZE and of `samples`.
    samples: answers to each question.
    epochs: times that each answer is learnt from.
    max_new_tokens: longest answer.
    temperature: of sampling, and of all log-probabilities.
    decoding_rows: answers that are generated at a time.
    clip: by how much the probability of a token may grow or shrink in a rollout, as a
      share, before nothing more is learnt from it.
    kl: weight of the KL divergence from the reference, what the run begins with; 0 for
      none, and no reference.
    kl_target: nats an answer to which `kl` is adapted from one rollout to the next; None
      leaves it as it is.
    sft_weight: of the mean loss of a token of the questions' own answers, which keeps what
      was learnt before (PPO-ptx, Ouyang et al., 2022, equation 2); reported as `sft_loss`.
    less_own: a reward is less what the question's own answer gets, so that easy questions
      do not count for more (reference-reward subtraction of ChatGLM-RLHF).
    entropy_weight: of the entropy of what is said, which keeps answers from becoming one.
    chunks: parts of a row whose logits exist at a time; 0 for all at once. Of own answers,
      as many parts of the vocabulary, see `LossConfig.vocab_chunks`.
    show_every: rollouts between those that are printed and written to rollouts/.
  """

  feature_lengths: dict[str, int]
  corpus: CorpusConfig = CorpusConfig()
  template: Annotated[str, one_of('', *chat.FAMILIES)] = ''
  blank: str = ''
  rewards: dict[str, float] = dataclasses.field(default_factory=dict)
  reward_model: Annotated[str, READABLE] = ''
  reward_model_weight: float = 1.0
  reward_seconds: Annotated[float, POSITIVE] = 600.0
  unfinished_penalty: float = 0.0
  rollout_size: Annotated[int, POSITIVE] = 128
  samples: Annotated[int, POSITIVE] = 1
  epochs: Annotated[int, POSITIVE] = 1
  max_new_tokens: Annotated[int, POSITIVE] = 128
  temperature: Annotated[float, POSITIVE] = 1.0
  decoding_rows: Annotated[int, POSITIVE] = 64
  clip: Annotated[float, within('(0, 1)')] = 0.2
  kl: Annotated[float, at_least(0)] = 0.05
  kl_target: Annotated[float | None, POSITIVE] = None
  sft_weight: Annotated[float, at_least(0)] = 0.0
  less_own: bool = False
  entropy_weight: Annotated[float, at_least(0)] = 0.0
  chunks: Annotated[int, at_least(0)] = 8
  show_every: Annotated[int, POSITIVE] = 10

  def __post_init__(self):
    configs.check_fields(self)
    name = type(self).__name__
    recipe.check_lengths(self.feature_lengths)
    configs.check(
      bool(self.rewards or self.reward_model),
      f'{name} must have rewards or a reward_model',
      'neither',
      f'set {name}.reward_model, or --import=my_rewards and {name}.rewards='
      "{'my_rewards.reward': 1.0}",
    )
    if self.blank:
      asking.check_pattern(self.blank)
    configs.check(
      not self.blank or not self.template,
      'questions must be read by a chat template or a blank',
      f'template={self.template!r} and blank={self.blank!r}',
      'leave one of them out',
    )
    configs.check(
      self.max_new_tokens < self.length,
      f'{name}.max_new_tokens must leave room for a question',
      f'{self.max_new_tokens} of {self.length} positions',
      'raise TASK_FEATURE_LENGTHS',
    )
    configs.check(
      self.kl_target is None or self.kl > 0,
      f'{name}.kl_target must adapt a kl above 0',
      f'kl={self.kl}',
      'set one',
    )

  @property
  def length(self) -> int:
    return self.feature_lengths['tokens']

  @property
  def reference(self) -> bool:
    return self.kl > 0

  @property
  def logits_share(self) -> float:
    return 1 / (self.chunks or 1)

  @property
  def judges(self) -> dict[str, float]:
    """Weights of what rewards, by name."""
    model = {'reward_model': self.reward_model_weight} if self.reward_model else {}
    return {**self.rewards, **model}

  def room(self, config: TrainConfig) -> int:
    """Most tokens of a question."""
    if config.model.causal:
      return self.length - self.max_new_tokens
    # A prefix model reads `[sop]` behind what is asked, too; the answer has its positions.
    room = self.length - self.max_new_tokens - 1
    return min(room, config.model.max_positions + 1)

  def updates(self, config: TrainConfig) -> int:
    """Steps that learn from one rollout."""
    return self.epochs * self.rollout_size // config.batch_size

  def check(self, config: TrainConfig) -> None:
    name = type(self).__name__
    configs.check(
      bool(config.init_from),
      'a policy must begin with a model that answers',
      "TrainConfig.init_from=''",
      'give the run of gin_configs/runs/sft.gin as INIT_FROM',
    )
    configs.check(
      self.rollout_size % config.batch_size == 0,
      f'{name}.rollout_size must be a multiple of BATCH_SIZE',
      f'{self.rollout_size} and {config.batch_size}',
      f'set it to {-(-self.rollout_size // config.batch_size) * config.batch_size}',
    )
    configs.check(
      config.batch_size % self.samples == 0,
      f'BATCH_SIZE must be a multiple of {name}.samples, which an update learns together',
      f'{config.batch_size} and {self.samples}',
      f'set it to {-(-config.batch_size // self.samples) * self.samples}',
    )
    configs.check(
      not getattr(config.adapters, 'dropout', 0),
      'a policy must be trained without dropout, as it has none when it answers',
      f'LoRAConfig.dropout={getattr(config.adapters, "dropout", 0)}',
      'leave it out',
    )
    configs.check(
      not adapters.virtual_tokens(config.adapters),
      'a policy must be trained whole or with low-rank factors',
      'TrainConfig.adapters=@PTuningConfig()',
      'use @LoRAConfig(), or train all parameters',
    )

  def prepare(
    self, config: TrainConfig, vocabulary: Any, layout: sharding.Layout
  ) -> PolicyData:
    name = type(self).__name__
    configs.check(
      vocabulary is not None,
      f"{name} must have the vocabulary of a checkpoint's model",
      f'TrainConfig.model=@{type(config.model).__name__}()',
      'set TrainConfig.model=@CheckpointModel(), as its gin file does',
    )
    configs.check(
      not self.blank or not config.model.causal,
      'a blank must be of a model that fills them',
      f'{self.blank!r} for {type(config.model).__name__}',
      f'leave {name}.blank out',
    )
    most = config.model.max_positions
    configs.check(
      (self.length <= most + 1) if config.model.causal else (self.max_new_tokens < most),
      "questions and answers must fit the model's positions",
      f'TASK_FEATURE_LENGTHS={self.length}, max_new_tokens={self.max_new_tokens}, '
      f'max_positions={most}',
      'lower TASK_FEATURE_LENGTHS'
      if config.model.causal
      else f'lower {name}.max_new_tokens',
    )
    template = None
    if not self.blank:
      template = finetuning.template_of(self, config, vocabulary)
    room = self.room(config)
    # Its end is not among the tokens of an answer.
    own = self.max_new_tokens + 1 if self.sft_weight or self.less_own else 0
    reader = asked.PromptReader(config.model, vocabulary, template, self.blank, room, own)
    questions = reader.read(self.corpus)
    model = None
    if self.reward_model:
      model = RewardModel(
        self.reward_model,
        config.model,
        vocabulary,
        config.compute,
        layout,
        config.batch_size // config.microbatches,
        self.length,
      )
    judge = Judge([*self.rewards], self.reward_seconds, model)
    identity = {
      'feature_lengths': dict(self.feature_lengths),
      'policy': {
        'kind': name,
        **{k: v for k, v in dataclasses.asdict(self).items() if k not in _FREE},
      },
      'reward_model': model and model.fingerprint,
      'data': asked.fingerprint(questions),
    }
    notes = reader.in_words()
    made = Rollouts(config, layout, vocabulary, template, judge)
    return PolicyData(config, layout, vocabulary, questions, made, identity, notes)

  def batch(self, config: TrainConfig) -> Experience:
    return self._shapes(config.batch_size)

  def _shapes(self, rows: int) -> Experience:
    return shapes(rows, self.length, len(self.judges), self.sft_weight > 0)

  def counts(self, batch: Experience) -> dict[str, jax.Array]:
    if not self.sft_weight:
      return {}
    count = self.weights(batch.rows.loss_weights)[1]
    return {'loss': count, 'own': batch.own.loss_weights.sum()}

  def values(
    self,
    config: TrainConfig,
    model: Any,
    variables: Mapping[str, Any],
    states_BTD: jax.Array,
    rows: Batch,
  ) -> jax.Array:
    """[B, T] float32: what a critic expects before each target; 0 without one.

    Args:
      config: of the run.
      model: a Flax module.
      variables: its collections.
      states_BTD: what the policy makes of rows.
      rows: that are read.
    """
    del config, model, variables, rows
    return jnp.zeros(states_BTD.shape[:2])

  def advantages(
    self,
    rewards_N: np.ndarray,
    kl_NT: np.ndarray,
    values_NT: np.ndarray,
    scored_NT: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray]:
    """[N, T] each: how much better than expected tokens are, and what a critic should say.

    Args:
      rewards_N: of answers, those to one question side by side.
      kl_NT: log-probabilities less the reference's, times the weight of the KL.
      values_NT: what was expected.
      scored_NT: bool, tokens of the answers.
    """
    raise NotImplementedError

  def parts(
    self, said: log_probs.TokenScores, values_BT: jax.Array, batch: Experience
  ) -> dict[str, jax.Array]:
    """[B, T]: what is added up to the loss of a token, by name; the first is the policy's.

    Args:
      said: by the model as it is.
      values_BT: of its critic.
      batch: to learn from.
    """
    ratio = jnp.exp(said.log_probs - batch.old_log_probs)
    kept = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
    gain = jnp.minimum(ratio * batch.advantages, kept * batch.advantages)
    return {
      'policy_loss': -gain,
      'entropy_loss': -self.entropy_weight * said.entropy,
    }

  def weights(self, scored_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, T] by which the losses of tokens are summed up; what divides the sum."""
    return scored_BT, scored_BT.sum()

  def loss(self, config: TrainConfig, model: Any) -> LossFn:
    allowed_V = jnp.asarray(self._allowed(config))

    def loss(
      variables: Mapping[str, Any],
      batch: Experience,
      key: jax.Array | None,
      counts: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, losses.Metrics]:
      del key  # there is no dropout
      own = {name: tree for name, tree in variables.items() if name != recipe.REFERENCE}
      said = log_probs.said(
        model,
        own,
        batch.rows,
        allowed_V=allowed_V,
        temperature=self.temperature,
        chunks=self.chunks,
      )
      values_BT = self.values(config, model, own, said.states, batch.rows)
      scored_BT = batch.rows.loss_weights
      # Elsewhere targets may be what is never said, whose ratio to anything is no number.
      heard_BT = jnp.where(scored_BT > 0, said.log_probs, 0)
      said = said._replace(log_probs=heard_BT)
      weights_BT, count = self.weights(scored_BT)
      parts = self.parts(said, values_BT, batch)
      sums = {name: (part * weights_BT).sum() for name, part in parts.items()}
      total = sum(sums.values())
      tokens, rows = scored_BT.sum(), (scored_BT.sum(1) > 0).astype(jnp.float32)
      of_tokens = lambda x_BT: ((x_BT * scored_BT).sum(), tokens)
      of_rows = lambda x_B: ((x_B * rows).sum(), rows.sum())
      left = said.log_probs - batch.old_log_probs
      outside = jnp.abs(jnp.exp(left) - 1) > self.clip
      kl = {
        'kl': of_tokens(batch.divergence(said.log_probs)),
        'kl_weight': of_rows(batch.kl_weight),
      }
      learnt = {}
      if self.sft_weight:
        losses_BT = losses.target_losses(model, own, batch.own, self.chunks)
        spoken, words = losses_BT * batch.own.loss_weights, batch.own.loss_weights.sum()
        learnt['sft_loss'] = (spoken.sum(), words)
        # The step divides by `count`: what is left is the mean over tokens of the batch.
        total += (
          self.sft_weight * spoken.sum() * counts['loss'] / jnp.maximum(counts['own'], 1)
        )
      return total, {
        'loss': (total, count),
        **{name: (part, count) for name, part in sums.items()},
        **learnt,
        'reward': of_rows(batch.reward),
        **{
          f'reward/{name}': of_rows(given)
          for name, given in zip(self.judges, batch.rewards, strict=True)
        },
        **(kl if self.reference else {}),
        'entropy': of_tokens(said.entropy),
        'clip_fraction': of_tokens(outside.astype(jnp.float32)),
        'answer_length': of_rows(scored_BT.sum(1)),
        'ended': of_rows(batch.ended),
        'explained_variance': of_rows(batch.explained),
      }

    return loss

  def programs(self, config: TrainConfig) -> recipe.Between:
    others = ()
    if self.reward_model:
      meta = checkpoints.read_meta(checkpoints.find(self.reward_model))
      others = (model_config.from_dict(meta['model']),)
    return recipe.Between(
      rows=self._shapes(config.batch_size // config.microbatches).rows,
      score=functools.partial(rollouts.score, config, self._allowed(config)),
      asked=self.rollout_size,
      at_a_time=self.decoding_rows,
      # A causal model generates from the last token of what it was asked.
      context=self.room(config) - config.model.causal,
      most=self.max_new_tokens,
      slots=self.length,
      temperature=self.temperature,
      kept=self._shapes(self.rollout_size),
      others=others,
    )

  def _allowed(self, config: TrainConfig) -> np.ndarray:
    """[V] bool: tokens that the model may say, and so may its log-probabilities."""
    folder = checkpoints.find(config.init_from)
    vocabulary = start.vocabulary_of(folder, checkpoints.read_meta(folder))
    return prompts.allowed(config.model, vocabulary)

  def work(self, config: TrainConfig, visibility: Visibility) -> tuple[float, float]:
    tokens, trained = super().work(config, visibility)
    # All answers of a rollout are read once more, and by the reference, too: forward alone,
    # a third of training's. Generating them is not counted, nor are own answers.
    forward = flops.training(config.model, tokens, flops.pairs(visibility)) / 3
    return tokens, trained + forward * (1 + self.reference) / self.epochs

  def visibility(self, config: TrainConfig) -> Visibility:
    """A full row, whose answer is as long as it may be."""
    start_, end = super().visibility(config)
    if not config.model.causal:
      end = np.maximum(end, self.length - self.max_new_tokens).astype(np.int32)
    return Visibility(start_, end)

  def rows_in_words(self, config: TrainConfig) -> str:
    return f'rows full, answers of {self.max_new_tokens} tokens'

  def validate(
    self, config: TrainConfig, data: PolicyData, variables: Mapping[str, Any]
  ) -> dict[str, float]:
    return data.held_out(variables)
