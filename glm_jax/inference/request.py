"""What an engine is asked, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from glm_jax import configs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
  """One span of a request.

  Attributes:
    first: the token that opens it: `[sop]`, or the last of a causal context.
    position: the first position of that token; None to go on after what was read.
    stride: by which positions grow.
  """

  first: int
  position: int | None
  stride: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A context, and spans to be generated behind it, one after the other.

  Attributes:
    number: of the request, from which its random numbers come.
    context: token ids that are read first.
    spans: at least one.
    most: longest span; None for that of the call.
  """

  number: int
  context: Sequence[int]
  spans: Sequence[Span]
  most: int | None = None


@dataclasses.dataclass(kw_only=True)
class Answer:
  """What a request got.

  Attributes:
    number: of the request.
    spans: token ids of each, without what ended it.
    log_probs: of these tokens, and behind them that of the stop token, if there was one.
    ends: the stop token of each span; -1 of one that was cut short. Of spans that were
      searched with beams there are none.
    scores: of each span that was searched with beams, see `beam`; of others there are none.
    read: tokens of context that were read for it.
  """

  number: int
  spans: list[list[int]] = dataclasses.field(default_factory=list)
  log_probs: list[list[float]] = dataclasses.field(default_factory=list)
  ends: list[int] = dataclasses.field(default_factory=list)
  scores: list[float] = dataclasses.field(default_factory=list)
  read: int = 0


def check_context(config: Any, tokens: int) -> None:
  """Raises UserError for a context that the model has no positions for."""
  most = config.max_positions + 1
  configs.check(
    tokens <= most, f'a prompt must have at most {most} tokens', str(tokens), 'shorten it'
  )
