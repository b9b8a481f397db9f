"""Which objectives a run trains on, and the numbers that define them."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

from glm_jax import configs
from glm_jax.batch import MIXED
from glm_jax.configs import one_of, within
from glm_jax.data.rows.table import RowPlan

LONGEST_SPAN = 39
"""Longest token span that is ever drawn (THUDM/GLM blocklm_utils.py)."""

# Deviations of the number of spans that a row has room for: at 512 tokens 1.3 % of
# the rows draw more and are cut short there, for 2.3 % of padding.
_SPAN_DEVIATIONS = 2.3

_PROBABILITY = within('[0, 1]').but('give a probability')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
  """Autoregressive blank infilling, and the two objectives beside it.

  Attributes:
    blank: alpha, the probability that an example of `glm_mixture` is token spans.
    document: beta, that it is one span of most of the row.
    sentence: gamma, that it is whole sentences. The three need not sum to 1.
    schedule: (first step, step after the last, alpha, beta, gamma) of each phase of a run
      that does not keep to one mixture; the last phase may end at -1, never. () for
      `blank`, `document` and `sentence` throughout.
    loss_weights: of the loss of each objective's tokens, in the order of the three.
    loss_mean: what counts alike in the loss, each 'token' or each 'example'; a document
      example has five times the target tokens of a blank one.
    span_mean: lambda of the Poisson law of span lengths (1 to 39 tokens).
    mask_ratio: share of a row's tokens in blank and sentence spans.
    shuffle_spans: Part B holds the spans in random order.
    single_span_probability: share of blank examples with one span only.
    document_min_ratio: shortest document span, as a share of the row; the longest
      leaves two tokens.
    document_infill_probability: share of one-document rows whose document span lies
      anywhere and ends in [eop]; the others run to the end of the row.
    dblock_probability: share of blank Part B inputs replaced by [dBLOCK].
    short_probability: share of rows of which only a random window (32 tokens or
      more) is used.
    task_masks: [gMASK] for documents and [sMASK] for sentences; else [MASK] for all.
    original_positions: first positions count the original text, not the corrupted.
    block_positions: False for a model without them (GLM-130B): what follows [gMASK]
      goes on counting first positions, where else it would keep the mask's.
    one_dimensional: positions count through Parts A and B, and there are no second ones;
      to measure what the second dimension brings.
  """

  blank: float = 1.0
  document: float = 0.0
  sentence: float = 0.0
  schedule: tuple[tuple[int | float, ...], ...] = ()
  loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
  loss_mean: Annotated[str, one_of('token', 'example')] = 'token'
  span_mean: Annotated[float, within('(0, 20]').but('use 3 as the paper')] = 3.0
  mask_ratio: Annotated[
    float, within('(0, 1)').but('use 0.15 as the paper, or 0.1 to 0.2')
  ] = 0.15
  shuffle_spans: bool = True
  single_span_probability: Annotated[float, _PROBABILITY] = 0.0
  document_min_ratio: Annotated[float, within('(0, 1)').but('use 0.5 as the paper')] = 0.5
  document_infill_probability: Annotated[float, _PROBABILITY] = 0.5
  dblock_probability: Annotated[float, _PROBABILITY] = 0.0
  short_probability: Annotated[float, _PROBABILITY] = 0.0
  task_masks: bool = True
  original_positions: bool = False
  block_positions: bool = True
  one_dimensional: bool = False

  def __post_init__(self):
    configs.check_fields(self)
    name = 'ObjectiveConfig'
    _check_weights(f'{name}.blank, document and sentence', self.weights)
    _check_schedule(f'{name}.schedule', self.schedule)
    configs.check(
      min(self.loss_weights) > 0 and math.isfinite(sum(self.loss_weights)),
      f'{name}.loss_weights must be above 0',
      str(self.loss_weights),
      'use (1.0, 1.0, 1.0), or leave an objective out by its probability',
    )
    mean, _ = self._span_moments()
    # Spans never touch, so each needs a token of its own beside it.
    configs.check(
      self.mask_ratio * (1 + 1 / mean) < 1,
      f'{name}.mask_ratio must leave a token between spans, so be below '
      f'{mean / (mean + 1):.2f} for spans of mean {mean:.2f}',
      str(self.mask_ratio),
      'lower it or raise span_mean',
    )

  @property
  def weights(self) -> tuple[float, float, float]:
    """(alpha, beta, gamma), in the order of `glm_jax.batch.MIXED`."""
    return (self.blank, self.document, self.sentence)

  @property
  def phases(self) -> tuple[tuple[int, tuple[float, float, float]], ...]:
    """(first step, (alpha, beta, gamma)) of each phase; the first begins at 0.

    Example:
      >>> config = ObjectiveConfig(schedule=((0, 100, 1, 0, 0), (100, -1, 2, 1, 1)))
      >>> config.phases
      ((0, (1, 0, 0)), (100, (2, 1, 1)))
    """
    if not self.schedule:
      return ((0, self.weights),)
    return tuple((phase[0], phase[2:]) for phase in self.schedule)

  @property
  def objectives(self) -> tuple[str, ...]:
    """Those that come up in some phase."""
    # zip(*...) turns weights by phase into weights by objective.
    totals = map(sum, zip(*(weights for _, weights in self.phases), strict=True))
    return tuple(name for name, total in zip(MIXED, totals, strict=True) if total)

  def only(self, objective: str) -> ObjectiveConfig:
    """The same with every example of one objective."""
    chosen = {name: float(name == objective) for name in MIXED}
    return dataclasses.replace(self, schedule=(), **chosen)

  def for_evaluation(self) -> ObjectiveConfig:
    """The same with tokens that all count alike, so that losses can be compared."""
    return dataclasses.replace(self, loss_weights=(1.0, 1.0, 1.0), loss_mean='token')

  def check_steps(self, train_steps: int) -> None:
    """Raises UserError if the schedule ends before the run does."""
    end = self.schedule[-1][1] if self.schedule else -1
    configs.check(
      end == -1 or end >= train_steps,
      f'ObjectiveConfig.schedule must reach the last of {train_steps} steps',
      f'a last phase that ends at {end}',
      'let it end at -1, never',
    )

  def _span_moments(self) -> tuple[float, float]:
    """Mean and variance of a zero-truncated Poisson."""
    share = 1 - math.exp(-self.span_mean)
    mean = self.span_mean / share
    return mean, (self.span_mean + self.span_mean**2) / share - mean**2

  def max_spans(self, row_length: int) -> int:
    """Spans that a row of `row_length` tokens is given room for.

    The number drawn has, by renewal theory, mean `m / mu + (s^2 / mu^2 + 1) / 2 - 1/2`
    and variance `m s^2 / mu^3` for m masked tokens and spans of mean mu, variance s^2.
    """
    # A document span is one, however long the row.
    if self.objectives == ('document',):
      return 1
    mean, variance = self._span_moments()
    masked = self.mask_ratio * row_length
    expected = masked / mean + variance / mean**2 / 2
    return max(1, round(expected + _SPAN_DEVIATIONS * (masked * variance / mean**3) ** 0.5))

  def packing(self, length: int) -> RowPlan:
    """The plan of packed rows of `length` positions: each document with its own spans."""
    # room[n]: positions of a document of n tokens and its spans, at most one a token. The
    # table grows until a document no longer fits, and that one is left out.
    room = [0]
    while room[-1] <= length:
      n = len(room)
      room.append(n + 2 * min(self.max_spans(n), n))
    # Even a row of one document has a span, hence two tokens less than positions.
    _check_text(len(room) - 2, length)
    return RowPlan(row_length=length - 2, positions=length, room=tuple(room[:-1]))

  def row_length(self, length: int) -> int:
    """The longest row of text that fits, with its spans, in `length` positions.

    Each span adds two tokens ([MASK] in Part A; [sop] or [eop] in Part B).

    Example:
      >>> ObjectiveConfig().row_length(512)
      458
      >>> ObjectiveConfig(blank=0, document=1).row_length(512)
      510
    """
    # `max_spans` is a formula with a square root, rounded: it is searched, not inverted.
    row = length - 2
    while row > 0 and row + 2 * self.max_spans(row) > length:
      row -= 1
    _check_text(row, length)
    return row


def causal_packing(length: int) -> RowPlan:
  """The plan of packed rows for next tokens, which need one token more than positions."""
  # A row of L + 1 tokens makes L positions; a document of n tokens takes n of the L + 1.
  _check_text(length, length)
  return RowPlan(length + 1, length + 1, tuple(range(length + 2)))


def _check_text(tokens: int, length: int) -> None:
  configs.check(
    tokens >= 8,
    'TASK_FEATURE_LENGTHS must leave 8 tokens of text',
    f"{{'tokens': {length}}}",
    'use longer rows',
  )


def _check_weights(name: str, weights: tuple[float, ...]) -> None:
  configs.check(
    min(weights) >= 0 and sum(weights) > 0 and math.isfinite(sum(weights)),
    f'{name} must be 0 or more, and one above 0',
    str(weights),
    'give each its share, such as 0.5, 0.2, 0.3',
  )


def _check_schedule(name: str, schedule: tuple[tuple[int | float, ...], ...]) -> None:
  end = 0
  for phase in schedule:
    # Steps are ints, and only the last phase may be without an end.
    whole = len(phase) == 5 and all(isinstance(step, int) for step in phase[:2])
    configs.check(
      whole and (phase[1] > phase[0] or (phase[1] == -1 and phase is schedule[-1])),
      f'{name} must hold phases of (first step, step after the last, alpha, beta, gamma)',
      str(phase),
      'write ((0, 1000, 1.0, 0.0, 0.0), (1000, -1, 0.5, 0.3, 0.2))',
    )
    configs.check(
      phase[0] == end,
      f'{name} must leave no step out and have none twice: a phase begins where the one '
      'before it ends, the first at 0',
      f'a phase from {phase[0]} where {end} is next',
      'let it begin there',
    )
    _check_weights(f'the probabilities of {name}', phase[2:])
    end = phase[1]
