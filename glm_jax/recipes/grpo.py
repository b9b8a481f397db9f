"""Group-relative policy optimisation, and RLOO and Dr. GRPO, its kin: without a critic."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import configs
from glm_jax.configs import at_least, one_of
from glm_jax.recipes import advantages
from glm_jax.recipes.experience import Experience
from glm_jax.recipes.policy import Policy
from glm_jax.training import log_probs


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPO(Policy):
  """Group-relative policy optimisation, and RLOO and Dr. GRPO, its kin; without a critic.

  An answer is as good as it is better than the others to its question (Shao et al., 2024).
  The KL divergence from the reference is part of the loss, as exp(d) - d - 1 with d the
  reference's log-probability less the policy's.

  Attributes, besides those of `Policy`:
    baseline: 'group', the mean of the answers to a question, or 'others' (RLOO).
    scaled: by the deviation of their rewards.
    per: what counts alike in the loss: each 'token' (DAPO), each 'answer' (GRPO), or
      tokens, whose sum is divided by `max_new_tokens` ('limit': Dr. GRPO, with
      scaled=False).
  """

  samples: Annotated[int, at_least(2)] = 8
  kl: Annotated[float, at_least(0)] = 0.04
  baseline: Annotated[str, one_of('group', 'others')] = 'group'
  scaled: bool = True
  per: Annotated[str, one_of('token', 'answer', 'limit')] = 'answer'

  def __post_init__(self):
    super().__post_init__()
    configs.check(
      not self.less_own,
      'less_own must be of PPO: a group is compared with itself, whatever is taken off all',
      'GRPO.less_own=True',
      'leave it out',
    )

  def advantages(
    self,
    rewards_N: np.ndarray,
    kl_NT: np.ndarray,
    values_NT: np.ndarray,
    scored_NT: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray]:
    better = advantages.in_groups(
      rewards_N,
      self.samples,
      leave_one_out=self.baseline == 'others',
      scaled=self.scaled,
    )
    return np.where(scored_NT, better[:, None], 0), np.zeros_like(values_NT)

  def parts(
    self, said: log_probs.TokenScores, values_BT: jax.Array, batch: Experience
  ) -> dict[str, jax.Array]:
    kl = batch.kl_weight[:, None] * batch.divergence(said.log_probs)
    return {**super().parts(said, values_BT, batch), 'kl_loss': kl}

  def weights(self, scored_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    if self.per == 'token':
      return super().weights(scored_BT)
    length = scored_BT.sum(1, keepdims=True)
    divisor = jnp.maximum(length, 1) if self.per == 'answer' else self.max_new_tokens
    return scored_BT / divisor, (length > 0).sum().astype(jnp.float32)


CONFIGURABLES = (GRPO,)
"""What gin may bind, besides what it may in pretraining."""
