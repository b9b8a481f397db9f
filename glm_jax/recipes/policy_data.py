"""What a policy is asked, in a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from glm_jax import sharding
from glm_jax.inference import scoring
from glm_jax.recipes.questions import Query
from glm_jax.recipes.rollouts import Rollouts, RolloutStream, ended
from glm_jax.text.vocabulary import Vocabulary
from glm_jax.training import recipe
from glm_jax.training.config import TrainConfig

# Seed of the answers to held-out questions: the same for each run.
_HELD_OUT = 0


class PolicyData(recipe.Data):
  """See `recipe.Data`.

  Attributes:
    questions: by split.
    rollouts: answers them.
  """

  validation: Mapping[str, Any] = {}

  def __init__(
    self,
    config: TrainConfig,
    layout: sharding.Layout,
    vocabulary: Vocabulary,
    questions: Mapping[str, Sequence[Query]],
    made: Rollouts,
    identity: Mapping[str, Any],
    notes: Sequence[str],
  ):
    """
    Args:
      config: of the run.
      layout: of the devices.
      vocabulary: of the tokens.
      questions: by split, 'train' and 'validation'.
      made: answers them.
      identity: see `recipe.Data`.
      notes: lines that say what was left out.
    """
    self.vocabulary, self.questions, self.rollouts = vocabulary, questions, made
    self.identity, self.fingerprint = identity, identity['data']
    self._config, self._layout, self._notes = config, layout, notes
    r = config.recipe
    # So many make an epoch in which each question is asked once.
    self.rows = len(questions['train']) * r.samples * r.epochs

  def stream(self, step: int) -> RolloutStream:
    train = self.questions['train']
    return RolloutStream(self._config, self._layout, self.rollouts, train, step)

  def describe(self, step: int, train_steps: int) -> list[str]:
    r, counts = self._config.recipe, {k: len(v) for k, v in self.questions.items()}
    updates = r.updates(self._config)
    return [
      *self._notes,
      f'{counts["train"]:,} questions, {counts["validation"]:,} held out; a rollout: '
      f'{r.rollout_size // r.samples} questions x {r.samples} answers, {updates} updates',
    ]

  def examples(self) -> Iterator[Mapping[str, np.ndarray]]:
    c, v = self._config, self.vocabulary
    while True:
      for first in range(0, len(self.questions['train']), c.batch_size):
        part = self.questions['train'][first : first + c.batch_size]
        requests = [self.rollouts.request(0, question) for question in part]
        # Where an answer begins carries loss: that is all that is known of it.
        made = [scoring.lay_out(c.model, v, request, [[]]) for request in requests]
        rows = scoring.batch(made, 'answer', v.specials.pad)
        rows = scoring.padded(rows, len(made), c.recipe.length)
        yield {k: x for k, x in rows._asdict().items() if k != 'index'}

  def held_out(self, variables: Mapping[str, Any]) -> dict[str, float]:
    """Rewards of one answer to each held-out question, sampled as in training.

    Args:
      variables: the model's collections, the reference's among them.
    """
    config, r = self._config, self._config.recipe
    questions = self.questions['validation'][: config.evaluation.examples or None]
    if not questions:
      return {}
    answers = self.rollouts.answers(variables, questions, _HELD_OUT)
    _, given, rewards = self.rollouts.judged(questions, answers)
    kl = {}
    if r.reference:
      rows = self.rollouts.rows(questions, answers)
      log_probs_NT, reference_NT, _ = self.rollouts.said(variables, rows)
      # Of an answer, in nats: of all that was sampled, none is left out.
      kl['kl'] = float((log_probs_NT - reference_NT).sum(1).mean())
    return {
      'reward': float(rewards.mean()),
      **{f'reward/{k}': float(x) for k, x in zip(r.judges, given.mean(0), strict=True)},
      **kl,
      'answer_length': float(np.mean([len(answer.spans[0]) for answer in answers])),
      'ended': float(ended(answers).mean()),
    }
