"""Proximal policy optimisation: a policy, and a critic in the same model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import configs
from glm_jax.batch import Batch
from glm_jax.configs import POSITIVE, at_least, within
from glm_jax.recipes import advantages
from glm_jax.recipes.experience import Experience
from glm_jax.recipes.policy import Policy
from glm_jax.training import adapters, log_probs, losses
from glm_jax.training.adapters import LoRAConfig
from glm_jax.training.config import TrainConfig

CRITIC, FACTORS = 'critic', 'critic_factors'
"""Leaves of a critic: {'vector': [D], 'bias': []}, and its own adapters; float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(Policy):
  """PPO with a critic (Schulman et al., 2017; of language models, Ouyang et al., 2022).

  The critic is a product of what the model makes of a token with a leaf of its own, which
  begins at 0; with adapters, it may have low-rank factors of its own beside the base. The
  KL divergence from the reference is taken off the reward of each token.

  Attributes, besides those of `Policy`:
    discount: of a reward that comes a token later.
    lam: of generalised advantages.
    value_weight: of the critic's loss.
    value_clip: by how much its values may change in a rollout before nothing more is
      learnt from them; 0 for any.
    critic_rank: of its own factors, with the targets and alpha of the policy's LoRAConfig;
      0 for those of the policy, which its loss then trains, too.
    whiten: advantages have mean 0 and deviation 1 over a rollout.
  """

  epochs: Annotated[int, POSITIVE] = 4
  discount: Annotated[float, within('(0, 1]')] = 1.0
  lam: Annotated[float, within('[0, 1]')] = 0.95
  value_weight: Annotated[float, at_least(0)] = 0.1
  value_clip: Annotated[float, at_least(0)] = 0.2
  critic_rank: Annotated[int, at_least(0)] = 0
  whiten: bool = True

  def check(self, config: TrainConfig) -> None:
    super().check(config)
    configs.check(
      not self.critic_rank or isinstance(config.adapters, LoRAConfig),
      'factors of a critic must stand beside a base that is not trained',
      f'PPO.critic_rank={self.critic_rank}, TrainConfig.adapters={config.adapters}',
      'add --gin_file=gin_configs/runs/lora.gin, or leave critic_rank out',
    )

  def leaves(self, config: TrainConfig) -> dict[str, Callable[[jax.Array], Any]]:
    D = config.model.hidden_size
    own = {}
    if self.critic_rank:
      own[FACTORS] = adapters.leaves(self._lora(config), config.model)[adapters.FACTORS]
    # No `weight`, which a step casts to the dtype of the computation.
    return {CRITIC: lambda key: {'vector': jnp.zeros(D), 'bias': jnp.zeros(())}, **own}

  def _lora(self, config: TrainConfig) -> LoRAConfig:
    return dataclasses.replace(config.adapters, rank=self.critic_rank)

  def values(
    self,
    config: TrainConfig,
    model: Any,
    variables: Mapping[str, Any],
    states_BTD: jax.Array,
    rows: Batch,
  ) -> jax.Array:
    params = variables['params']
    if self.critic_rank:
      factors = {adapters.FACTORS: params[FACTORS]}
      own = adapters.beside(self._lora(config), config.model, factors)
      states_BTD = losses.applied(
        model, {**variables, **own}, rows, None, head=lambda x_BTD, _: x_BTD
      )
    leaf = params[CRITIC]
    return states_BTD.astype(jnp.float32) @ leaf['vector'] + leaf['bias']

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
