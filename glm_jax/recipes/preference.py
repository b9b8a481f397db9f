"""Preferences without a reward model: DPO (Rafailov et al., 2023) and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from glm_jax import configs
from glm_jax.batch import Batch, Visibility
from glm_jax.configs import POSITIVE, at_least, one_of, within
from glm_jax.performance import flops
from glm_jax.recipes.ranking import Ranking, pair_of
from glm_jax.training import losses
from glm_jax.training.config import TrainConfig
from glm_jax.training.losses import LossFn
from glm_jax.training.recipe import REFERENCE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(Ranking):
  """The preferred answer becomes more probable, against what the run began with.

  With m = log p(chosen) - log p(rejected), less the same of the reference, the loss of a
  pair is by `kind`

    sigmoid  -log sigmoid(beta m): DPO; with `smoothing` e, a label is wrong with
             probability e (conservative DPO, Mitchell, 2023)
    hinge    max(0, 1 - beta m) (SLiC, Zhao et al., 2023)
    ipo      (m - 1 / (2 beta)) ** 2 (Azar et al., 2023)

  Neither model has dropout: at the first step, m is 0.

  Attributes, besides those of `Ranking`:
    kind: of the loss.
    beta: how dear it is to leave the reference.
    smoothing: see above; of 'sigmoid' alone.
    length_normalised: log p is the mean over an answer's tokens, not their sum, so that
      longer answers do not count for more (Meng et al., 2024).
    sft_weight: of the mean loss of a token of the preferred answers, which keeps them
      probable; reported apart, as `sft_loss`.
  """

  kind: Annotated[str, one_of('sigmoid', 'hinge', 'ipo')] = 'sigmoid'
  beta: Annotated[float, POSITIVE] = 0.1
  smoothing: Annotated[float, within('[0, 0.5)')] = 0.0
  length_normalised: bool = False
  sft_weight: Annotated[float, at_least(0)] = 0.0

  def check(self, config: TrainConfig) -> None:
    super().check(config)
    configs.check(
      bool(config.init_from),
      'preferences must be learnt by a model that answers, which is the reference',
      "TrainConfig.init_from=''",
      'give the run of gin_configs/runs/sft.gin as INIT_FROM',
    )
    configs.check(
      self.kind == 'sigmoid' or not self.smoothing,
      "Preference.smoothing must be of the kind 'sigmoid'",
      f'{self.smoothing} with {self.kind!r}',
      'leave it out',
    )
    configs.check(
      not getattr(config.adapters, 'dropout', 0),
      'preferences must be learnt without dropout, as the reference has none',
      f'LoRAConfig.dropout={getattr(config.adapters, "dropout", 0)}',
      'leave it out',
    )

  @property
  def reference(self) -> bool:
    return True

  def settings(self) -> dict[str, Any]:
    names = ('kind', 'beta', 'smoothing', 'length_normalised', 'sft_weight')
    return {'preference': {name: getattr(self, name) for name in names}}

  def loss(self, config: TrainConfig, model: Any) -> LossFn:
    chunks = self.loss_config.vocab_chunks

    def loss(
      variables: Mapping[str, Any],
      batch: Batch,
      key: jax.Array | None,
      counts: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, losses.Metrics]:
      del key  # there is no dropout
      own = {name: tree for name, tree in variables.items() if name != REFERENCE}
      pair = pair_of(batch)
      with jax.named_scope('policy'):
        losses_BT = losses.target_losses(model, own, batch, chunks)
      with jax.named_scope('reference'):
        began_BT = losses.target_losses(model, variables[REFERENCE], batch, chunks)
      # log p, less that of the reference.
      gained_BT = jax.lax.stop_gradient(began_BT) - losses_BT

      def reward(weights_BT: jax.Array) -> jax.Array:
        gained_B = (gained_BT * weights_BT).sum(1)
        if self.length_normalised:
          gained_B /= jnp.maximum(weights_BT.sum(1), 1)
        return self.beta * gained_B

      chosen, rejected = reward(pair.chosen), reward(pair.rejected)
      margin = chosen - rejected
      total = (self.of_margins(margin) * pair.present).sum()
      # Before training all margins are 0, and half of a tie is right.
      right = (margin > 0) + 0.5 * (margin == 0)
      count = pair.present.sum()
      metrics = {
        'loss': (total, count),
        'margin': ((margin * pair.present).sum(), count),
        'accuracy': ((right * pair.present).sum(), count),
        'reward/chosen': ((chosen * pair.present).sum(), count),
        'reward/rejected': ((rejected * pair.present).sum(), count),
      }
      if self.sft_weight:
        spoken, tokens = (losses_BT * pair.chosen).sum(), pair.chosen.sum()
        metrics['sft_loss'] = (spoken, tokens)
        # The step divides by pairs: what is left is the mean over tokens of the batch.
        total += (
          self.sft_weight * spoken * counts['pairs'] / jnp.maximum(counts['chosen'], 1)
        )
      return total, metrics

    return loss

  def of_margins(self, margin: jax.Array) -> jax.Array:
    """Losses of pairs, of beta m each.

    Example:
      >>> recipe = Preference(feature_lengths={'tokens': 8}, kind='hinge')
      >>> recipe.of_margins(jnp.array([0.0, 0.25, 2.0])).tolist()
      [1.0, 0.75, 0.0]
    """
    if self.kind == 'hinge':
      return jax.nn.relu(1 - margin)
    if self.kind == 'ipo':
      return jnp.square((margin - 0.5) / self.beta)
    right, wrong = (-jax.nn.log_sigmoid(sign * margin) for sign in (1, -1))
    return (1 - self.smoothing) * right + self.smoothing * wrong

  def work(self, config: TrainConfig, visibility: Visibility) -> tuple[float, float]:
    tokens, trained = super().work(config, visibility)
    # The reference reads the same rows, forward alone: a third of training's.
    forward = flops.training(config.model, tokens, flops.pairs(visibility)) / 3
    return tokens, trained + forward


CONFIGURABLES = (Preference,)
"""What gin may bind, besides what it may in pretraining."""
