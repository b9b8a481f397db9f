"""A reward model: a score for an answer; of two answers, the better one's is higher."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from glm_jax.batch import Batch
from glm_jax.configs import at_least
from glm_jax.recipes.ranking import Pair, Ranking, pair_of
from glm_jax.training import losses
from glm_jax.training.config import TrainConfig
from glm_jax.training.losses import LossFn

VALUE = 'value'
"""The leaf that scores: {'weight': [D]} float32."""

# Of scores and lengths, in the order that `correlation` takes their means.
_MOMENTS = tuple(f'moment/{name}' for name in ('x', 'y', 'xx', 'yy', 'xy'))
# A variance of less than this share of the mean square is none.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(Ranking):
  """The score of the better answer becomes higher (Bradley and Terry, 1952).

  A score is a product of what the model makes of the token that ends an answer with a leaf
  of its own, which begins at 0: all losses do at ln 2. With d the difference of the scores
  of a pair, its loss is -log sigmoid(d - margin).

  Attributes, besides those of `Ranking`:
    margin: by which the better one is to be ahead.
    squares: weight of the sum of a pair's squared scores, which keeps them near 0.
    length_balanced: the pairs of a batch whose better answer is the longer one weigh as
      much as those whose better one is the shorter, so that length tells nothing
      (ChatGLM-RLHF, section 3, balances its data so). How much length told, three numbers
      show: `accuracy/longer` and `accuracy/shorter`, of pairs whose better answer is the
      longer and the shorter one, and `length_correlation` of the scores of all answers
      with their tokens (Pearson; 0 where either is the same for all).
  """

  margin: Annotated[float, at_least(0)] = 0.0
  squares: Annotated[float, at_least(0)] = 0.0
  length_balanced: bool = False

  @property
  def logits_share(self) -> float:
    return 0.0

  def settings(self) -> dict[str, Any]:
    names = ('margin', 'squares', 'length_balanced')
    return {'reward': {name: getattr(self, name) for name in names}}

  def leaves(self, config: TrainConfig) -> dict[str, Callable[[jax.Array], Any]]:
    return {VALUE: lambda key: {'weight': jnp.zeros(config.model.hidden_size)}}

  def counts(self, batch: Batch) -> dict[str, jax.Array]:
    pair = pair_of(batch)
    longer, shorter = _by_length(pair)
    return {**super().counts(batch), 'longer': longer.sum(), 'shorter': shorter.sum()}

  def loss(self, config: TrainConfig, model: Any) -> LossFn:
    def loss(
      variables: Mapping[str, Any],
      batch: Batch,
      key: jax.Array | None,
      counts: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, losses.Metrics]:
      x_BTD = losses.applied(model, variables, batch, key, head=lambda x_BTD, _: x_BTD)
      values_BT = x_BTD.astype(jnp.float32) @ variables['params'][VALUE]['weight']
      pair = pair_of(batch)
      chosen, rejected = (
        jnp.where(at_end(weights_BT), values_BT, 0).sum(1)
        for weights_BT in (pair.chosen, pair.rejected)
      )
      ahead = chosen - rejected
      of_pairs = -jax.nn.log_sigmoid(ahead - self.margin)
      of_pairs += self.squares * (jnp.square(chosen) + jnp.square(rejected))
      longer, shorter = _by_length(pair)
      weights = pair.present
      if self.length_balanced:
        weights = _balanced(longer, shorter, pair.present, counts)
      total = (of_pairs * weights).sum()
      # Before training all scores are 0, and half of a tie is right.
      right = (ahead > 0) + 0.5 * (ahead == 0)
      present = pair.present.sum()
      # Rows that fill a batch up have no tokens and no score, and add nothing.
      scores = jnp.concatenate([chosen, rejected])
      lengths = jnp.concatenate([pair.chosen.sum(1), pair.rejected.sum(1)])
      moments = (scores, lengths, scores**2, lengths**2, scores * lengths)
      return total, {
        'loss': (total, weights.sum()),
        'accuracy': ((right * pair.present).sum(), present),
        'accuracy/longer': ((right * longer).sum(), longer.sum()),
        'accuracy/shorter': ((right * shorter).sum(), shorter.sum()),
        'ahead': ((ahead * pair.present).sum(), present),
        'reward/chosen': ((chosen * pair.present).sum(), present),
        'reward/rejected': ((rejected * pair.present).sum(), present),
        **{
          name: (values.sum(), 2 * present)
          for name, values in zip(_MOMENTS, moments, strict=True)
        },
      }

    return loss

  def told(self, values: Mapping[str, float]) -> dict[str, float]:
    told = {name: value for name, value in values.items() if name not in _MOMENTS}
    if moments := [values[name] for name in _MOMENTS if name in values]:
      told['length_correlation'] = correlation(*moments)
    return told


def correlation(x: float, y: float, xx: float, yy: float, xy: float) -> float:
  """Pearson's, of the means of x, y, their squares and their product.

  0 where x or y is the same everywhere, but for the rounding of float32.

  Example:
    >>> correlation(1.5, 3.0, 2.5, 10.0, 5.0)  # of (1, 2) and (2, 4)
    1.0
  """
  of_x, of_y = xx - x * x, yy - y * y
  if of_x <= _ROUNDING * xx or of_y <= _ROUNDING * yy:
    return 0.0
  return max(-1.0, min(1.0, (xy - x * y) / math.sqrt(of_x * of_y)))


def at_end(weights_BT: jax.Array) -> jax.Array:
  """[B, T] bool, where the token that ends an answer is read; nowhere without an answer.

  Args:
    weights_BT: 1 at the targets of an answer, the last of which ends it.

  Example:
    >>> at_end(jnp.array([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])).tolist()[0]
    [False, False, False, True, False]
  """
  t = jnp.arange(weights_BT.shape[1])
  last = jnp.where(weights_BT > 0, t, -2).max(1)
  # What is predicted at t is read at t + 1.
  return t == last[:, None] + 1


def _by_length(pair: Pair) -> tuple[jax.Array, jax.Array]:
  """[B] float32: pairs whose better answer is the longer one, and the shorter one."""
  more = pair.chosen.sum(1) - pair.rejected.sum(1)
  return (more > 0).astype(jnp.float32), (more < 0).astype(jnp.float32)


def _balanced(
  longer: jax.Array, shorter: jax.Array, present: jax.Array, counts: Mapping[str, Any]
) -> jax.Array:
  """[B] weights of pairs, whose sum over the batch is their number."""
  both = (counts['longer'] + counts['shorter']) / 2
  # A batch that has but one kind cannot be balanced.
  able = (counts['longer'] > 0) & (counts['shorter'] > 0)
  of_longer = both / jnp.maximum(counts['longer'], 1)
  of_shorter = both / jnp.maximum(counts['shorter'], 1)
  alike = present - longer - shorter
  weights = of_longer * longer + of_shorter * shorter + alike
  return jnp.where(able, weights, present)


CONFIGURABLES = (Reward,)
"""What gin may bind, besides what it may in pretraining."""
