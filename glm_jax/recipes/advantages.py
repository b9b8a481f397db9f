"""How much better an answer, or a token of it, was than expected: numpy, on the host."""

from __future__ import annotations

import numpy as np


def estimated(
  rewards_NT: np.ndarray,
  values_NT: np.ndarray,
  scored_NT: np.ndarray,
  *,
  discount: float,
  lam: float,
) -> np.ndarray:
  """[N, T]: generalised advantages (Schulman et al., ICLR 2016, equation 16).

  A_t = sum over k of (discount lam)^k delta_{t+k}, with delta_t = r_t + discount V_{t+1} -
  V_t; behind the last token of an answer, nothing is worth anything.

  Args:
    rewards_NT: for each token.
    values_NT: what was expected before each token.
    scored_NT: bool, tokens of the answers; those of a row stand one behind the other.
    discount: of what comes a token later.
    lam: 0 for the error of each value alone, 1 for all that came.

  Example:
    >>> of = lambda *x: np.array([x], float)
    >>> scored = np.array([[False, True, True]])
    >>> estimated(of(0, 0, 1), of(9, 0.5, 0.75), scored, discount=1, lam=1).tolist()
    [[0.0, 0.5, 0.25]]
  """
  advantages = np.zeros_like(rewards_NT)
  following, value = np.zeros((2, len(rewards_NT)))
  for t in range(rewards_NT.shape[1] - 1, -1, -1):
    delta = rewards_NT[:, t] + discount * value - values_NT[:, t]
    # Outside of an answer, both are 0: so they are behind its end.
    following = np.where(scored_NT[:, t], delta + discount * lam * following, 0)
    value = np.where(scored_NT[:, t], values_NT[:, t], 0)
    advantages[:, t] = following
  return advantages


def whitened(x_NT: np.ndarray, scored_NT: np.ndarray) -> np.ndarray:
  """With mean 0 and deviation 1 over the tokens of all answers.

  Example:
    >>> whitened(np.array([[1.0, 3.0, 7.0]]), np.array([[True, True, False]])).tolist()
    [[-1.0, 1.0, 0.0]]
  """
  of = x_NT[scored_NT]
  deviation = max(float(of.std()), 1e-8)
  return np.where(scored_NT, (x_NT - of.mean()) / deviation, 0)


def in_groups(
  scores_N: np.ndarray, size: int, *, leave_one_out: bool, scaled: bool
) -> np.ndarray:
  """[N]: how much better each answer is than the others to its question.

  Args:
    scores_N: of answers, those to one question side by side.
    size: answers to each question.
    leave_one_out: against the mean of the others (RLOO, Ahmadian et al., ACL 2024), which
      is not biased; else of all (GRPO, Shao et al., 2024, section 4.1).
    scaled: divided by the deviation of the group, of its sample (ddof 1), plus 1e-4, as TRL
      does; Dr. GRPO (Liu et al., 2025) leaves that out, since it prefers questions that
      are answered almost always, or almost never, right.

  Example:
    >>> in_groups(np.array([1.0, 0.0, 0.0, 0.0]), 4, leave_one_out=True, scaled=False)
    array([ 1.        , -0.33333333, -0.33333333, -0.33333333])
  """
  groups = scores_N.reshape(-1, size)
  better = groups - groups.mean(axis=1, keepdims=True)
  if leave_one_out:
    better *= size / (size - 1)
  if scaled:
    better /= groups.std(axis=1, ddof=1, keepdims=True) + 1e-4
  return better.ravel()
