"""Many prompts through a batch of a few rows: a row that has ended takes the next prompt.

Continuous batching (Yu et al., Orca, OSDI 2022, section 3.2): the host gives contexts to
free rows and looks after every few tokens; the device computes with a fixed set of shapes.
What a prompt gets does not depend on what stands beside it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import attention, configs, models, sharding
from glm_jax.inference import beam as beam_lib
from glm_jax.inference import decode
from glm_jax.inference.beam import BeamConfig, Openings
from glm_jax.inference.decode import RowStates
from glm_jax.inference.request import Answer, Request, Span, check_context
from glm_jax.inference.sampling import Sampling
from glm_jax.models import cache as kv_cache
from glm_jax.models import stack, virtual
from glm_jax.models.cache import Cache

# Contexts are padded to this times a power of two, so that few shapes are compiled.
_BUCKET = 32
PIECE = 1024
"""Tokens of a causal context that an engine reads at a time."""

# Tokens between looks of the host, which costs a few microseconds each.
_STEPS = 16


class Engine:
  """Generates with one model, in a batch of a fixed number of rows."""

  def __init__(
    self,
    config: Any,
    variables: Any,
    *,
    stops: Sequence[int],
    allowed: np.ndarray,
    compute: models.ComputeConfig = models.ComputeConfig(),
    rows: int = 8,
    cache_dtype: str = '',
    piece: int = PIECE,
  ):
    """
    Args:
      config: of the model.
      variables: its collections.
      stops: ids that end a span.
      allowed: [V] bool, tokens that may be generated.
      compute: of the model.
      rows: most prompts at a time; a multiple of the devices that share a batch.
      cache_dtype: of `models.cache.DTYPES`; '' for that of `compute`.
      piece: tokens of a causal context that are read at a time.
    """
    compute = with_kernel(config, compute, jax.devices()[0])
    self.model = models.build(config, compute)
    self.config, self.variables, self.rows = config, variables, rows
    self.virtual = virtual.count(variables)
    self._stops, self.allowed = tuple(stops), jnp.asarray(allowed)
    self.cache_dtype, self.piece = cache_dtype or compute.dtype, piece
    read = functools.partial(
      decode.read_into, self.model, causal=config.causal, dtype=self.cache_dtype
    )
    self._insert = jax.jit(read, donate_argnums=1)
    # Each gives back the cache that it was given, in the same memory.
    self._extend = jax.jit(functools.partial(decode.extend, self.model), donate_argnums=1)
    self._advance = jax.jit(
      functools.partial(decode.advance, self.model, stops=self._stops),
      donate_argnums=1,
      static_argnames='sampling',
    )
    self._spread = jax.jit(beam_lib.spread, static_argnums=1)
    self._search = jax.jit(
      functools.partial(beam_lib.search, self.model, stops=self._stops),
      donate_argnums=1,
      static_argnames=('most', 'config'),
    )
    self._read_spans = jax.jit(
      functools.partial(beam_lib.read_spans, self.model), donate_argnums=1
    )

  @property
  def variables(self) -> dict[str, Any]:
    """The collections of the model; on one CPU, each layer's weights are apart."""
    return self._variables

  @variables.setter
  def variables(self, variables: dict[str, Any]) -> None:
    on_cpu = sharding.alone() and all(map(_on_one_cpu, jax.tree.leaves(variables)))
    self._variables = stack.apart(variables) if on_cpu else variables

  def cache(self, rows: int, slots: int) -> Cache:
    """An empty cache for the model."""
    apart = stack.are_apart(self.variables)
    return kv_cache.init(self.config, rows, slots, self.cache_dtype, apart=apart)

  def generate(
    self,
    requests: Sequence[Request],
    *,
    most: int,
    least: int = 0,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    watch: Callable[[int, list[int]], bool] | None = None,
    cut: Callable[[int, list[int]], int] | None = None,
    slots: int = 0,
  ) -> Iterator[Answer]:
    """Answers requests, in the order in which they are done.

    Args:
      requests: what is asked.
      most: longest span.
      least: tokens of a span before a stop token is allowed.
      sampling: how tokens are chosen.
      seed: of sampling.
      watch: told of a request and of its unfinished span so far, every few tokens; says
        whether the span is to end here.
      cut: told of the same, and of finished spans; says how many of its tokens the span
        keeps. One that loses some has ended, and later spans see what it keeps.
      slots: that each row has at least: calls with the same number run the same program.

    Raises:
      UserError: a context or a span that the model has no positions for.
    """
    self.check(requests, most)
    if not requests:
      return
    B = batch_rows(len(requests), self.rows)
    longest = max(self._slots(r, most) for r in requests)
    cache = self.cache(B, bucket(max(longest, slots)))
    penalized = sampling.repetition_penalty != 1
    had = np.zeros((B, self.config.vocab_size), bool) if penalized else None
    rows = no_rows(B, most)
    queue = collections.deque(requests)
    asked: list[Request | None] = [None] * B
    answers = [Answer(number=-1) for _ in range(B)]
    while True:
      # 1. Free rows take the next requests, whose contexts are read together.
      free = [row for row in range(B) if asked[row] is None]
      taken = [(row, queue.popleft()) for row in free[: len(queue)]]
      for row, request in taken:
        asked[row] = request
        answers[row] = Answer(number=request.number, read=len(request.context))
        rows.slot[row] = self.virtual + len(request.context)
        if had is not None:
          ids = [*request.context, request.spans[0].first]
          had = _only(had, row, ids)
      if taken:
        cache = self.read(cache, taken)
      # 2. Rows whose span has ended begin the next one of their request.
      for row, request in enumerate(asked):
        if request is not None and rows.done[row]:
          span = request.spans[len(answers[row].spans)]
          limit = most if request.most is None else min(request.most, most)
          begin(rows, row, span, rows.slot[row] - self.virtual, min(least, limit), limit)
          rows.last[row] = len(answers[row].spans) + 1 == len(request.spans)
          numbers = [seed, request.number, len(answers[row].spans)]
          rows.seed[row] = np.random.SeedSequence(numbers).generate_state(1)[0]
      if all(request is None for request in asked):
        return
      # 3. A few tokens.
      waiting = bool(queue) or any(r and len(r.spans) > 1 for r in asked)
      steps = _STEPS if waiting or watch or cut else most + 1
      cache, had, rows = self.advance(
        cache, had, rows, steps=steps, eager=waiting, sampling=sampling
      )
      # 4. What has ended is kept, and handed out with its request's last span.
      for row, request in enumerate(asked):
        if request is None:
          continue
        made = rows.tokens[row, : rows.count[row]].tolist()
        if cut and (kept := cut(request.number, made)) < len(made):
          made = made[:kept]
          _shorten(rows, row, kept)
          if had is not None:
            said = [*itertools.chain(*answers[row].spans), *made]
            had = _only(had, row, [*request.context, request.spans[0].first, *said])
        if watch and not rows.done[row] and watch(request.number, made):
          # Its last token has yet to be read.
          rows.limit[row] = rows.count[row]
        if rows.done[row]:
          scores = rows.log_probs[row]
          answers[row].spans.append(made)
          answers[row].log_probs.append(scores[~np.isnan(scores)].tolist())
          answers[row].ends.append(int(rows.end[row]))
          if len(answers[row].spans) == len(request.spans):
            asked[row] = None
            yield answers[row]

  def advance(
    self,
    cache: Any,
    had: Any,
    rows: RowStates,
    *,
    steps: int,
    eager: bool,
    sampling: Sampling,
  ) -> tuple[Any, Any, RowStates]:
    """See `decode.advance`; the rows that come back are numpy, to be written to."""
    cache, had, rows = self._advance(
      self.variables,
      cache,
      had,
      rows,
      allowed_V=self.allowed,
      steps=steps,
      eager=eager,
      sampling=sampling,
    )
    return cache, had, jax.tree.map(np.array, jax.device_get(rows))

  def search(
    self, requests: Sequence[Request], *, most: int, least: int = 0, config: BeamConfig
  ) -> Iterator[Answer]:
    """Answers requests with beam search, in their order.

    A later span of a request goes on from the best text of the one before it. A batch has
    as many beams as `generate` has rows, and all those of a prompt.

    Args:
      requests: what is asked.
      most: longest span.
      least: tokens of a span before a stop token is allowed.
      config: of the search.

    Raises:
      UserError: a context or a span that the model has no positions for, or a span that
        would have to repeat n-grams.
    """
    if not requests:
      return
    self.check(requests, most)
    slots = bucket(max(self._slots(r, most) for r in requests))
    B = batch_rows(len(requests), self.rows // config.num_beams)
    for first in range(0, len(requests), B):
      yield from self._search_batch(
        requests[first : first + B], B, slots, most, least, config
      )

  def _search_batch(
    self,
    requests: Sequence[Request],
    B: int,
    slots: int,
    most: int,
    least: int,
    config: BeamConfig,
  ) -> list[Answer]:
    """Answers of at most B requests, whose first spans are searched, then their second."""
    cache = self.cache(B, slots)
    cache = self._spread(self.read(cache, [*enumerate(requests)]), config.num_beams)
    answers = [Answer(number=r.number, read=len(r.context)) for r in requests]
    slot = np.zeros(B, np.int32)
    slot[: len(requests)] = [self.virtual + len(r.context) for r in requests]
    for number in range(max(len(r.spans) for r in requests)):
      # 1. The next span of each request that has one. What a device was given may not be
      # written to: it may look at it later.
      rows = Openings(*np.zeros((3, B), np.int32), slot=slot, done=np.ones(B, bool))
      asked = [row for row, r in enumerate(requests) if number < len(r.spans)]
      for row in asked:
        span, following = requests[row].spans[number], slot[row] - self.virtual
        rows.token[row], rows.stride[row], rows.done[row] = span.first, span.stride, False
        rows.position[row] = following if span.position is None else span.position
      cache, texts = self._search(
        self.variables,
        cache,
        rows,
        least=least,
        most=most,
        config=config,
        allowed_V=self.allowed,
      )
      # 2. The best text of each.
      best = jax.tree.map(lambda x: x[:, 0], jax.device_get(texts))
      configs.check(
        bool((best.score[asked] > -np.inf).all()),
        'a span must have a text without a repeated n-gram',
        f'none of {least} tokens or more with no_repeat_ngram_size='
        f'{config.no_repeat_ngram_size}',
        'let n-grams be longer, or ask for fewer tokens',
      )
      for row in asked:
        answers[row].spans.append(best.tokens[row, : best.length[row]].tolist())
        log_probs = best.log_probs[row]
        answers[row].log_probs.append(log_probs[~np.isnan(log_probs)].tolist())
        answers[row].scores.append(float(best.score[row]))
      # 3. Later spans see it.
      if any(len(r.spans) > number + 1 for r in requests):
        cache = self._read_spans(self.variables, cache, rows, best.tokens, best.length)
        slot = slot + ~rows.done * (1 + best.length)
    return answers

  def read(self, cache: Any, taken: Sequence[tuple[int, Request]]) -> Any:
    """The cache, with the contexts of requests in their rows."""
    B, S = kv_cache.shape(cache)
    # Few shapes: 1, 2, 4, 8, … rows; or all, where a batch is spread over devices.
    spread = sharding.axis_size('act_batch') > 1
    R = B if spread else min(B, 2 ** math.ceil(math.log2(len(taken))))
    numbers = np.full(R, B, np.int32)
    numbers[: len(taken)] = [row for row, _ in taken]
    contexts = [request.context for _, request in taken]
    first = max(map(len, contexts))
    if self.config.causal:
      first = min(first, self.piece)
    tokens, lengths = padded([c[:first] for c in contexts], R, bucket(first))
    room = S - self.virtual
    cache = self._insert(self.variables, cache, tokens[:, :room], lengths, numbers)
    # The rest of long causal contexts, a piece after the other.
    for start in range(first, max(map(len, contexts)), self.piece):
      pieces = [c[start : start + self.piece] for c in contexts]
      tokens, lengths = padded(pieces, R, self.piece)
      cache = self.read_on(cache, tokens, lengths, numbers, start)
    return cache

  def read_on(self, cache, tokens, lengths, numbers, start: int) -> Any:
    """The cache after more tokens of causal rows, which hold `start` tokens of context."""
    slots = np.full(len(numbers), self.virtual + start, np.int32)
    # A piece may be wider than what is left of the cache, whose end it would be moved to.
    room = kv_cache.shape(cache)[1] - self.virtual - start
    tokens = tokens[:, :room]
    return self._extend(self.variables, cache, tokens, lengths, numbers, slots)[0]

  def _slots(self, request: Request, most: int) -> int:
    """Slots that a request fills: every span's opening token is read, too."""
    return self.virtual + len(request.context) + len(request.spans) * (most + 1)

  def check(self, requests: Sequence[Request], most: int) -> None:
    """Raises UserError for what `generate` does."""
    if not requests:
      return
    check_context(self.config, max(len(request.context) for request in requests))
    largest = self.config.max_positions
    configs.check(
      1 <= most <= largest,
      f'--max_new_tokens must be in 1 .. {largest}',
      str(most),
      'generate less at a time',
    )


def with_kernel(
  config: Any, compute: models.ComputeConfig, device: Any
) -> models.ComputeConfig:
  """With the kernel that reads contexts, if the device has one; nothing drops out here."""
  if compute.attention != 'auto':
    return compute
  if getattr(config, 'attention_dropout', 0):
    config = dataclasses.replace(config, attention_dropout=0.0)
  backend, _ = attention.choose(config, compute, device, _BUCKET)
  # Of the others, which one is best depends on the length: 'auto' looks at that.
  kernel = backend not in (*attention.DENSE, 'chunked')
  return dataclasses.replace(compute, attention=backend) if kernel else compute


def _on_one_cpu(x: Any) -> bool:
  devices = x.devices() if isinstance(x, jax.Array) else jax.devices()[:1]
  return len(devices) == 1 and all(device.platform == 'cpu' for device in devices)


def batch_rows(requests: int, most: int) -> int:
  """B, about `most`: few shapes, and as many rows on every device of the active mesh."""
  parts = sharding.axis_size('act_batch')
  wanted = min(max(most, 1), _power_of_2(requests))
  return -(-wanted // parts) * parts


def bucket(length: int) -> int:
  """The least padded length.

  Example:
    >>> [bucket(n) for n in (0, 64, 65, 200)]
    [32, 64, 128, 256]
  """
  return _BUCKET * _power_of_2(-(-length // _BUCKET))


def _power_of_2(number: int) -> int:
  """The least that is not below it."""
  return 2 ** max(0, number - 1).bit_length()


def padded(contexts: Sequence[Sequence[int]], R: int, width: int) -> tuple[Any, Any]:
  """Tokens [R, width] and lengths [R] of contexts."""
  tokens, lengths = np.zeros((R, width), np.int32), np.zeros(R, np.int32)
  for row, context in enumerate(contexts):
    tokens[row, : len(context)] = context
    lengths[row] = len(context)
  return tokens, lengths


def no_rows(B: int, most: int) -> RowStates:
  zeros = lambda dtype=np.int32, *shape: np.zeros((B, *shape), dtype)
  return RowStates(
    **{name: zeros() for name in RowStates._fields[:8]},
    seed=zeros(np.uint32),
    end=zeros(),
    last=zeros(bool),
    done=np.ones(B, bool),
    tokens=zeros(np.int32, most),
    log_probs=zeros(np.float32, most + 1),
  )


def begin(
  rows: RowStates, row: int, span: Span, following: int, least: int, most: int
) -> None:
  """Sets a row to the beginning of a span; its slot is where the last one ended."""
  rows.token[row] = span.first
  rows.position[row] = following if span.position is None else span.position
  rows.stride[row], rows.block[row], rows.count[row], rows.end[row] = span.stride, 1, 0, -1
  rows.least[row], rows.limit[row], rows.done[row] = least, most, False
  rows.log_probs[row] = np.nan


def _shorten(rows: RowStates, row: int, kept: int) -> None:
  """Takes the last tokens off a span, which ends there.

  What the cache holds of them lies behind the row's slot, and is written over.
  """
  lost = rows.count[row] - kept
  rows.slot[row] -= lost
  rows.position[row] -= lost * rows.stride[row]
  rows.block[row] -= lost
  rows.log_probs[row, kept:] = np.nan
  rows.count[row], rows.limit[row], rows.end[row] = kept, kept, -1
  # Of a span that has not ended, the last token is yet to be read.
  rows.token[row] = rows.tokens[row, kept - 1]


def _only(had: Any, row: int, ids: Sequence[int]) -> np.ndarray:
  """Which tokens a row has, when it begins anew."""
  had = np.array(had)
  had[row] = False
  had[row, list(ids)] = True
  return had
