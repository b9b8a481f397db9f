"""Filling blanks with a key/value cache.

The context (Part A) is read once, bidirectionally; then each blank is generated from
`[sop]`, left to right, every span seeing the context and the spans before it, as in
training (THUDM/GLM generate_samples.py). Rows of a batch are compact: each has a length
of its own in the cache, and nothing is padded in between.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import configs, models
from glm_jax.batch import Visibility
from glm_jax.inference.sampling import Sampling, sample
from glm_jax.text.vocabulary import Vocabulary

# Contexts are padded to a multiple of this, so that few shapes are compiled.
_BUCKET = 64

Cache = dict[str, jax.Array]
"""{'k', 'v'}: [L, B, S, K, H] each."""


def init_cache(config: Any, rows: int, slots: int) -> Cache:
  """An empty cache.

  Args:
    config: of the model.
    rows: B.
    slots: S, tokens of context and spans together.
  """
  shape = (config.num_layers, rows, slots, config.num_heads, config.head_size)
  return {name: jnp.zeros(shape, jnp.dtype(config.dtype)) for name in ('k', 'v')}


def read_context(
  model: Any, params: Any, cache: Cache, tokens_BT: jax.Array, lengths_B: jax.Array
) -> tuple[Cache, jax.Array]:
  """Reads Part A into slots 0 .. length; returns the cache and logits [B, T, V]."""
  B, T = tokens_BT.shape
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  inside = positions < lengths_B[:, None]
  positions = jnp.where(inside, positions, 0)
  end = jnp.where(inside, lengths_B[:, None], 0)
  logits_BTV, cache = model.apply(
    {'params': params},
    tokens_BT,
    positions,
    jnp.zeros_like(positions),
    Visibility(jnp.zeros_like(end), end),
    cache=cache,
    cache_start=jnp.zeros_like(lengths_B),
  )
  return cache, logits_BTV


def read_token(
  model: Any,
  params: Any,
  cache: Cache,
  token_B: jax.Array,
  position_B: jax.Array,
  block_B: jax.Array,
  slot_B: jax.Array,
) -> tuple[Cache, jax.Array]:
  """Reads one more token a row into its slot; returns the cache and logits [B, V]."""
  end = slot_B[:, None] + 1
  logits_BTV, cache = model.apply(
    {'params': params},
    token_B[:, None],
    position_B[:, None],
    block_B[:, None],
    Visibility(jnp.zeros_like(end), end),
    cache=cache,
    cache_start=slot_B,
  )
  return cache, logits_BTV[:, 0]


def generate_span(
  model: Any,
  params: Any,
  cache: Cache,
  position_B: jax.Array,
  slot_B: jax.Array,
  active_B: jax.Array,
  key: jax.Array,
  *,
  sop: int,
  stop: tuple[int, ...],
  allowed_V: jax.Array,
  max_tokens: int,
  sampling: Sampling,
) -> tuple[Cache, jax.Array, jax.Array, jax.Array]:
  """Generates one span a row, from `[sop]` until a stop token or `max_tokens`.

  Args:
    model: a Flax module.
    params: its parameters.
    cache: context and spans so far.
    position_B: first position of the span, its mask's place in the context.
    slot_B: first free slot of each row.
    active_B: rows that take part; the others keep their slot.
    key: consumed.
    sop: id that opens the span.
    stop: ids that end it (not returned).
    allowed_V: bool, tokens that may be generated.
    max_tokens: longest span.
    sampling: how tokens are chosen.

  Returns:
    The cache, tokens [B, max_tokens], their number [B], and the next free slot [B].
  """
  B = position_B.shape[0]

  def unfinished(carry):
    step, _, _, _, done_B, *_ = carry
    return (step < max_tokens) & ~done_B.all()

  def one(carry):
    step, cache, tokens, token_B, done_B, count_B, slot_B = carry
    block_B = jnp.full_like(position_B, step + 1)
    cache, logits_BV = read_token(
      model, params, cache, token_B, position_B, block_B, slot_B
    )
    # A finished row writes into a slot that is not its own yet, and moves no further.
    slot_B = slot_B + ~done_B
    logits_BV = jnp.where(allowed_V, logits_BV, -jnp.inf)
    token_B = sample(logits_BV, sampling, jax.random.fold_in(key, step))
    done_B |= jnp.isin(token_B, jnp.array(stop))
    tokens = tokens.at[:, step].set(jnp.where(done_B, 0, token_B))
    return step + 1, cache, tokens, token_B, done_B, count_B + ~done_B, slot_B

  start = (
    jnp.int32(0),
    cache,
    jnp.zeros((B, max_tokens), jnp.int32),
    jnp.full((B,), sop, jnp.int32),
    ~active_B,
    jnp.zeros((B,), jnp.int32),
    slot_B,
  )
  _, cache, tokens, _, _, count_B, slot_B = jax.lax.while_loop(unfinished, one, start)
  return cache, tokens, count_B, slot_B


class Filler:
  """Fills the blanks of texts with one model."""

  def __init__(self, config: Any, params: Any, vocabulary: Vocabulary):
    """
    Args:
      config: of the model.
      params: its parameters.
      vocabulary: that it was trained with.
    """
    s = vocabulary.specials
    allowed = np.arange(config.vocab_size) < vocabulary.size
    allowed[[s.pad, s.enc, s.mask, s.gmask, s.smask, s.sop, s.dblock]] = False
    # A padding piece that is also the end of the text must stay.
    allowed[[s.eos, s.eop]] = True
    self._config, self._params, self._vocabulary = config, params, vocabulary
    model = models.build(config)
    self._read = jax.jit(functools.partial(read_context, model))
    self._generate = jax.jit(
      functools.partial(
        generate_span, model, sop=s.sop, stop=(s.eop, s.eos), allowed_V=jnp.asarray(allowed)
      ),
      static_argnames=('max_tokens', 'sampling'),
    )

  def encode(self, prompt: str, gmask: bool = False) -> list[int]:
    """`[ENC] text <eos>`, with '[MASK]', '[sMASK]' and '[gMASK]' spelt out.

    Space before a mask is dropped: a filled span brings its own. With `gmask`, the text
    is to be continued: `[gMASK]` follows it and there is no <eos>.

    Raises:
      ValueError: nothing to fill, or an empty text.
    """
    s = self._vocabulary.specials
    masks = {'[MASK]': s.mask, '[sMASK]': s.smask, '[gMASK]': s.gmask}
    ids, blanks = [s.enc], 0
    for part in re.split(r'\s*(\[[sg]?MASK\])', prompt):
      if part in masks:
        ids.append(masks[part])
        blanks += 1
      else:
        ids.extend(self._vocabulary.encode(part))
    configs.check(
      len(ids) > 1, 'the prompt must hold some text', repr(prompt), 'give a text'
    )
    if gmask:
      return [*ids, s.gmask]
    configs.check(
      blanks > 0,
      'the prompt must hold a blank: [MASK], [sMASK] or [gMASK]',
      repr(prompt),
      'mark one, or continue the text with --gmask',
    )
    return ids if ids[-1] == s.gmask else [*ids, s.eos]

  def fill(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 64,
    sampling: Sampling = Sampling(),
    seed: int = 0,
  ) -> list[list[list[int]]]:
    """Generates every blank of every prompt, blanks left to right.

    Args:
      prompts: token ids with mask pieces, as `encode` gives them.
      max_tokens: longest span.
      sampling: how tokens are chosen.
      seed: of sampling.

    Returns:
      For each prompt, the token ids of each of its blanks.

    Raises:
      ValueError: a prompt or span longer than the model's positions.
    """
    s, c = self._vocabulary.specials, self._config
    masks = (s.mask, s.gmask, s.smask)
    places = [[i for i, t in enumerate(p) if t in masks] for p in prompts]
    lengths = np.array([len(p) for p in prompts], np.int32)
    configs.check(
      lengths.max() <= c.max_positions + 1,
      f'a prompt must have at most {c.max_positions + 1} tokens',
      f'{lengths.max()}',
      'shorten it',
    )
    configs.check(
      1 <= max_tokens <= c.max_positions,
      f'--max_tokens must be in 1 .. {c.max_positions}',
      str(max_tokens),
      'generate less at a time',
    )
    most = max(map(len, places))
    width = -(-int(lengths.max()) // _BUCKET) * _BUCKET
    tokens = np.full((len(prompts), width), s.pad, np.int32)
    for row, prompt in enumerate(prompts):
      tokens[row, : len(prompt)] = prompt
    cache = init_cache(c, len(prompts), width + most * (max_tokens + 1))
    cache, _ = self._read(self._params, cache, tokens, lengths)

    spans: list[list[list[int]]] = [[] for _ in prompts]
    slot = jnp.asarray(lengths)
    for number in range(most):
      active = np.array([number < len(p) for p in places])
      position = np.array([p[number] if number < len(p) else 0 for p in places], np.int32)
      key = jax.random.fold_in(jax.random.key(seed), number)
      cache, made, count, slot = self._generate(
        self._params,
        cache,
        position,
        slot,
        active,
        key,
        max_tokens=max_tokens,
        sampling=sampling,
      )
      for row in np.flatnonzero(active):
        spans[row].append(np.asarray(made[row, : count[row]]).tolist())
    return spans

  def text(
    self,
    prompt: Sequence[int],
    spans: Sequence[Sequence[int]],
    mark: tuple[str, str] = ('', ''),
  ) -> str:
    """A prompt with its blanks filled, each between two marks."""
    s = self._vocabulary.specials
    left, rest, out = list(spans), [], []

    def flush() -> None:
      out.append(self._vocabulary.decode(rest))
      rest.clear()

    for token in prompt:
      if token in (s.mask, s.gmask, s.smask) and left:
        flush()
        out.append(mark[0] + self._vocabulary.decode(left.pop(0)) + mark[1])
      else:
        rest.append(token)
    flush()
    return ''.join(out)
