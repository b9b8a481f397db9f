"""Proximal policy optimisation: a policy and a critic that share a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.configs import POSITIVE, at_least, within
from glm_jax.recipes import advantages
from glm_jax.recipes.experience import Experience
from glm_jax.recipes.policy import Policy
from glm_jax.recipes.rollouts import CRITIC
from glm_jax.training import log_probs
from glm_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(Policy):
  """PPO with a critic (Schulman et al., 2017; of language models, Ouyang et al., 2022).

  The critic is a product of what the model makes of a token with a leaf of its own, which
  begins at 0. The KL divergence from the reference is taken off the reward of each token.

  Attributes, besides those of `Policy`:
    discount: of a reward that comes a token later.
    lam: of generalised advantages.
    value_weight: of the critic's loss.
    value_clip: by how much its values may change in a rollout before nothing more is
      learnt from them; 0 for any.
    whiten: advantages have mean 0 and deviation 1 over a rollout.
  """

  epochs: Annotated[int, POSITIVE] = 4
  discount: Annotated[float, within('(0, 1]')] = 1.0
  lam: Annotated[float, within('[0, 1]')] = 0.95
  value_weight: Annotated[float, at_least(0)] = 0.1
  value_clip: Annotated[float, at_least(0)] = 0.2
  whiten: bool = True

  def leaves(self, config: TrainConfig) -> dict[str, Callable[[jax.Array], Any]]:
    D = config.model.hidden_size
    return {CRITIC: lambda key: {'weight': jnp.zeros(D), 'bias': jnp.zeros(())}}

  def advantages(
    self,
    rewards_N: np.ndarray,
    kl_NT: np.ndarray,
    values_NT: np.ndarray,
    scored_NT: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray]:
    rewards_NT = np.where(scored_NT, -kl_NT, 0.0)
    # At the last token of an answer.
    T = scored_NT.shape[1]
    last = T - 1 - scored_NT[:, ::-1].argmax(1)
    rewards_NT[np.arange(len(last)), last] += rewards_N
    better = advantages.estimated(
      rewards_NT, values_NT, scored_NT, discount=self.discount, lam=self.lam
    )
    returns = better + values_NT
    return (advantages.whitened(better, scored_NT) if self.whiten else better), returns

  def parts(
    self, said: log_probs.TokenScores, values_BT: jax.Array, batch: Experience
  ) -> dict[str, jax.Array]:
    error = jnp.square(values_BT - batch.returns)
    if self.value_clip:
      moved = jnp.clip(values_BT - batch.old_values, -self.value_clip, self.value_clip)
      error = jnp.maximum(error, jnp.square(batch.old_values + moved - batch.returns))
    value_loss = 0.5 * self.value_weight * error
    return {**super().parts(said, values_BT, batch), 'value_loss': value_loss}


CONFIGURABLES = (PPO,)
"""What gin may bind, besides what it may in pretraining."""
