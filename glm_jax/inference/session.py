"""One conversation in a cache that is kept: a causal model reads only what is new.

A prefix model (GLM, ChatGLM-6B) sees its context whole, and every token of it sees what
was added: it reads the context again for each answer, and `read` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from glm_jax import configs
from glm_jax.inference import engine as engines
from glm_jax.inference.engine import Engine
from glm_jax.inference.request import Request, Span
from glm_jax.inference.sampling import Sampling
from glm_jax.models import cache as kv_cache

# Pieces of a conversation are padded to a multiple of this.
_PIECE = 64
# Tokens between two looks at what has been said: small, since somebody reads along.
_STEPS = 4


class Session:
  """A row of its own.

  Attributes:
    held: ids whose keys and values the cache holds, in order.
    read: tokens of context that were read for the last answer.
  """

  def __init__(self, engine: Engine, window: int):
    """
    Args:
      engine: of the model, on devices that do not share a batch.
      window: most tokens of a conversation, its last answer included.
    """
    self.window = min(window, engine.config.max_positions + 1)
    self._engine = engine
    self._slots = engines.bucket(engine.virtual + self.window + 1)
    self._cache: Any = None
    self.held: list[int] = []
    self.read = 0

  def answer(
    self,
    ids: Sequence[int],
    *,
    most: int,
    mask: int = 0,
    sampling: Sampling = Sampling(),
    seed: int = 0,
  ) -> Iterator[list[int]]:
    """Goes on with a conversation; yields what is said so far, a few tokens at a time.

    Whoever stops listening ends the answer, and may go on with the conversation.

    Args:
      ids: all of it, with the token that opens the answer as the last one.
      most: longest answer.
      mask: of a prefix model, where the mask stands that is to be filled.
      sampling: how tokens are chosen.
      seed: of sampling.

    Raises:
      UserError: the conversation and its answer exceed the window.
    """
    configs.check(
      len(ids) + most <= self.window,
      f'a conversation and its answer must have at most {self.window} tokens',
      f'{len(ids)} and {most}',
      'ask for a shorter answer (--max_new_tokens), or begin anew',
    )
    engine, context = self._engine, list(ids[:-1])
    self.read = 0
    if self._cache is None:
      self._cache, self.held = engine.cache(1, self._slots), []
    if engine.config.causal:
      same = _common(self.held, context)
      self._read_on(context, same)
      span = Span(first=ids[-1], position=None, stride=1)
    else:
      same = 0
      # Without block positions, positions go on behind the context.
      place = mask if engine.config.two_positions else None
      span = Span(first=ids[-1], position=place, stride=int(place is None))
      request = Request(number=0, context=context, spans=[span])
      self._cache = engine.read(self._lend(), [(0, request)])
    self.held, self.read = context, len(context) - same
    rows = engines.no_rows(1, most)
    rows.slot[0] = engine.virtual + len(context)
    engines.begin(rows, 0, span, len(context), 0, most)
    rows.seed[0] = seed
    had = None
    if sampling.repetition_penalty != 1:
      had = np.zeros((1, engine.config.vocab_size), bool)
      had[0, list(ids)] = True
    while not rows.done[0]:
      self._cache, had, rows = engine.advance(
        self._lend(), had, rows, steps=_STEPS, eager=False, sampling=sampling
      )
      made = rows.tokens[0, : rows.count[0]].tolist()
      # Of what was said, the last token may not have been read yet.
      self.held = [*ids, *made][: rows.slot[0] - engine.virtual]
      yield made

  def _read_on(self, context: list[int], same: int) -> None:
    """Reads what follows the first `same` tokens, a piece after the other."""
    engine, cache = self._engine, self._lend()
    row = np.zeros(1, np.int32)
    while same < len(context):
      room = kv_cache.shape(cache)[1] - engine.virtual - same
      piece = context[same : same + min(engine.piece, room)]
      width = min(-(-len(piece) // _PIECE) * _PIECE, room)
      if same == 0:
        request = Request(number=0, context=piece, spans=[])
        cache = engine.read(cache, [(0, request)])
      else:
        tokens, lengths = engines.padded([piece], 1, width)
        cache = engine.read_on(cache, tokens, lengths, row, same)
      same += len(piece)
    self._cache = jax.block_until_ready(cache)

  def _lend(self) -> Any:
    """The cache, for a program that takes it and gives another one back.

    Whoever interrupts that program has neither: the next answer begins with an empty one.
    """
    cache, self._cache = self._cache, None
    return cache


def _common(a: Sequence[int], b: Sequence[int]) -> int:
  """Tokens that two sequences begin with alike.

  Example:
    >>> _common([1, 2, 3], [1, 2, 4, 5])
    2
  """
  pairs = zip(a, b, strict=False)
  return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
