"""What a policy learns from: answers with all that is known of them, on the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.batch import DTYPES, Batch, Visibility


class Experience(NamedTuple):
  """Answers to learn from; [B, T] float32 at the targets of an answer, or [B] float32.

  Attributes:
    rows: a question and its answer each; loss_weights are 1 at the answer and its end.
    old_log_probs: of the policy that gave the answers.
    reference_log_probs: of the reference; those of the policy without one.
    advantages: how much better than expected.
    returns: what the critic is to say.
    old_values: what it said.
    reward: [B], of the answer, without KL.
    rewards: [B] each, of which it is the weighted sum but for the penalty.
    ended: [B], 1 for an answer with an end.
    kl_weight: [B], of the rollout.
    explained: [B], share of the variance of the returns that the critic explained.
    own: rows of the questions' own answers; None where nothing is learnt from them.
  """

  rows: Batch
  old_log_probs: Any
  reference_log_probs: Any
  advantages: Any
  returns: Any
  old_values: Any
  reward: Any
  rewards: tuple[Any, ...]
  ended: Any
  kl_weight: Any
  explained: Any
  own: Batch | None = None

  def divergence(self, log_probs_BT: jax.Array) -> jax.Array:
    """[B, T]: Schulman's estimate of the KL from the reference, which is never negative."""
    apart = self.reference_log_probs - log_probs_BT
    return jnp.exp(apart) - apart - 1

  @property
  def visibility(self) -> Visibility:
    return self.rows.visibility


_BY_TOKEN = Experience._fields[1:6]
_BY_ROW = ('reward', 'ended', 'kl_weight', 'explained')


def shapes(rows: int, length: int, judges: int, own: bool) -> Experience:
  """Shapes and dtypes of an experience.

  Args:
    rows: B.
    length: T.
    judges: rewards of each.
    own: with the questions' own answers.
  """
  of = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype)
  batch = Batch(*[of(dtype, length) for dtype in DTYPES])._replace(index=None)
  by_token = dict.fromkeys(_BY_TOKEN, of(np.float32, length))
  by_row = dict.fromkeys(_BY_ROW, of(np.float32))
  rewards = (of(np.float32),) * judges
  return Experience(
    batch, **by_token, **by_row, rewards=rewards, own=batch if own else None
  )


def to_dict(made: Experience) -> dict[str, Any]:
  """As checkpoints hold it: arrays by name."""
  rows = {name: x for name, x in made.rows._asdict().items() if name != 'index'}
  fields = {name: getattr(made, name) for name in (*_BY_TOKEN, *_BY_ROW)}
  given = {f'reward_{i}': x for i, x in enumerate(made.rewards)}
  own = {} if made.own is None else {f'own_{k}': x for k, x in made.own._asdict().items()}
  own.pop('own_index', None)
  return {**rows, **fields, **given, **own}


def from_dict(arrays: Mapping[str, Any]) -> Experience:
  names = [name for name in Batch._fields if name != 'index']
  rows = Batch(**{name: arrays[name] for name in names})
  own = None
  if 'own_tokens' in arrays:
    own = Batch(**{name: arrays[f'own_{name}'] for name in names})
  rewards = [name for name in arrays if name.startswith('reward_')]
  return Experience(
    rows,
    rewards=tuple(arrays[f'reward_{i}'] for i in range(len(rewards))),
    own=own,
    **{name: arrays[name] for name in (*_BY_TOKEN, *_BY_ROW)},
  )
