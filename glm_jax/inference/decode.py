"""Filling blanks, and going on with a text, with a key/value cache.

The context (Part A) is read once, bidirectionally; then each blank is generated from
`[sop]`, left to right, every span seeing the context and the spans before it, as in
training (THUDM/GLM generate_samples.py). A causal model reads all but the last token of
a text and generates from that one. Rows of a batch are compact: each has a length of its
own in the cache, and nothing is padded in between.
"""

from __future__ import annotations

import functools
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
  shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_size)
  return {name: jnp.zeros(shape, jnp.dtype(config.dtype)) for name in ('k', 'v')}


def read_context(
  model: Any,
  params: Any,
  cache: Cache,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
  *,
  causal: bool = False,
) -> tuple[Cache, jax.Array]:
  """Reads a context into slots 0 .. length; returns the cache and logits [B, T, V].

  Args:
    model: a Flax module.
    params: its parameters.
    cache: empty.
    tokens_BT: the contexts, padded at the end.
    lengths_B: tokens of each context.
    causal: each token sees those before it; else all of its context (Part A).
  """
  B, T = tokens_BT.shape
  # Keys of padding are written, too, but into slots behind the row's context, which no
  # interval reaches before a generated token has overwritten them.
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  inside = positions < lengths_B[:, None]
  positions = jnp.where(inside, positions, 0)
  end = jnp.where(inside, positions + 1 if causal else lengths_B[:, None], 0)
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
  # Slots are filled without gaps: a new token sees all before its own, and itself.
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
  first_B: jax.Array,
  position_B: jax.Array,
  stride_B: jax.Array,
  slot_B: jax.Array,
  active_B: jax.Array,
  key: jax.Array,
  *,
  stop: tuple[int, ...],
  allowed_V: jax.Array,
  max_tokens: int,
  sampling: Sampling,
) -> tuple[Cache, jax.Array, jax.Array, jax.Array]:
  """Generates one span a row, from its first token to a stop token or `max_tokens`.

  Args:
    model: a Flax module.
    params: its parameters.
    cache: context and spans so far.
    first_B: token that opens the span: `[sop]`, or the last of a causal context.
    position_B: its first position: where its mask stands in the context.
    stride_B: by how much the position grows with each token: 0 for a span, 1 where
      positions go on.
    slot_B: first free slot of each row.
    active_B: rows that take part; the others keep their slot.
    key: consumed.
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

  # One token a row and iteration: reads the last one, samples the next. `count_B` is of
  # tokens kept, `done_B` of rows that met a stop token or do not take part.
  def advance(carry):
    step, cache, tokens, token_B, done_B, count_B, slot_B = carry
    # Block positions begin at 1 inside a span; 0 is the context's.
    block_B = jnp.full_like(position_B, step + 1)
    cache, logits_BV = read_token(
      model, params, cache, token_B, position_B + step * stride_B, block_B, slot_B
    )
    # A finished row writes into a slot that is not its own yet, and moves no further.
    slot_B = slot_B + ~done_B
    logits_BV = jnp.where(allowed_V, logits_BV, -jnp.inf)
    token_B = sample(logits_BV, sampling, jax.random.fold_in(key, step))
    # Once done, always done: a finished row goes on sampling, but nothing is kept of it.
    done_B |= jnp.isin(token_B, jnp.array(stop))
    tokens = tokens.at[:, step].set(jnp.where(done_B, 0, token_B))
    return step + 1, cache, tokens, token_B, done_B, count_B + ~done_B, slot_B

  start = (
    jnp.int32(0),
    cache,
    jnp.zeros((B, max_tokens), jnp.int32),
    first_B,
    ~active_B,
    jnp.zeros((B,), jnp.int32),
    slot_B,
  )
  _, cache, tokens, _, _, count_B, slot_B = jax.lax.while_loop(unfinished, advance, start)
  return cache, tokens, count_B, slot_B


class Filler:
  """Fills the blanks of texts with one model; a causal model goes on with them."""

  def __init__(self, config: Any, params: Any, vocabulary: Vocabulary):
    """
    Args:
      config: of the model.
      params: its parameters.
      vocabulary: that it was trained with.
    """
    # Rows of the table behind the vocabulary's pieces are never trained on. Of the special
    # pieces, a span of GLM has none but a stop token.
    allowed = np.arange(config.vocab_size) < vocabulary.size
    if not config.causal:
      allowed[list(vocabulary.names)] = False
      allowed[list(vocabulary.stops)] = True
    self._config, self._params, self._vocabulary = config, params, vocabulary
    model = models.build(config)
    self._read = jax.jit(functools.partial(read_context, model, causal=config.causal))
    self._generate = jax.jit(
      functools.partial(
        generate_span, model, stop=vocabulary.stops, allowed_V=jnp.asarray(allowed)
      ),
      static_argnames=('max_tokens', 'sampling'),
    )

  def encode(self, prompt: str, gmask: bool = False) -> list[int]:
    """`[ENC] text <eos>`, with '[MASK]', '[sMASK]' and '[gMASK]' spelt out.

    Space before a mask is dropped: a filled span brings its own. With `gmask`, the text
    is to be continued: `[gMASK]` follows it and there is no <eos>. What stands around
    the text is the vocabulary's `prefix` and `suffix`. A causal model always continues,
    and a mask is text to it.

    Raises:
      UserError: nothing to fill, or an empty text.
    """
    v, s = self._vocabulary, self._vocabulary.specials
    masks = {'[MASK]': s.mask, '[sMASK]': s.smask, '[gMASK]': s.gmask}
    known = [] if self._config.causal else [n for n, t in masks.items() if t is not None]
    ids = v.encode_marked(prompt, known) if known else v.encode(prompt)
    configs.check(bool(ids), 'the prompt must hold some text', repr(prompt), 'give a text')
    blanks = [token for token in ids if token in [masks[name] for name in known]]
    ids = [*v.prefix, *ids]
    if self._config.causal:
      return ids
    if gmask:
      configs.check(
        s.gmask is not None,
        'the vocabulary must have [gMASK] to continue a text',
        v.kind,
        'mark a blank with [MASK]',
      )
      return [*ids, s.gmask]
    configs.check(
      bool(blanks),
      'the prompt must hold a blank: [MASK], [sMASK] or [gMASK]',
      repr(prompt),
      'mark one, or continue the text with --gmask',
    )
    # [gMASK] at the end is a text to be continued: nothing follows it, as with `gmask`.
    return ids if ids[-1] == s.gmask else [*ids, *v.suffix]

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
      UserError: a prompt or span longer than the model's positions.
    """
    s, c = self._vocabulary.specials, self._config
    blanks = [self._blanks(p) for p in prompts]
    # 1. The contexts, into a cache with room for every span.
    # A causal model generates from the last token of its prompt.
    contexts = [p[:-1] if c.causal else p for p in prompts]
    lengths = np.array([len(p) for p in contexts], np.int32)
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
    rounds = max(map(len, blanks))
    width = -(-max(int(lengths.max()), 1) // _BUCKET) * _BUCKET
    tokens = np.full((len(prompts), width), s.pad, np.int32)
    for row, context in enumerate(contexts):
      tokens[row, : len(context)] = context
    # One slot a span more than its tokens: [sop] is read, too.
    cache = init_cache(c, len(prompts), width + rounds * (max_tokens + 1))
    cache, _ = self._read(self._params, cache, tokens, lengths)

    # 2. The blanks: in each round the next one of every prompt that has one left.
    spans: list[list[list[int]]] = [[] for _ in prompts]
    slot = jnp.asarray(lengths)
    for number in range(rounds):
      active = np.array([number < len(b) for b in blanks])
      position = np.array([b[number] if number < len(b) else 0 for b in blanks], np.int32)
      first = np.array([p[-1] if c.causal else s.sop for p in prompts], np.int32)
      # Without block positions, positions go on after a causal context and after [gMASK].
      mask = np.array([p[i] for p, i in zip(prompts, position, strict=True)])
      goes_on = (not c.two_positions) & ((mask == s.gmask) | c.causal)
      # From the first free slot: slots and positions agree, unless a span came before.
      position = np.where(goes_on, slot, position).astype(np.int32)
      key = jax.random.fold_in(jax.random.key(seed), number)
      cache, generated, count, slot = self._generate(
        self._params,
        cache,
        first,
        position,
        goes_on.astype(np.int32),
        slot,
        active,
        key,
        max_tokens=max_tokens,
        sampling=sampling,
      )
      for row in np.flatnonzero(active):
        spans[row].append(np.asarray(generated[row, : count[row]]).tolist())
    return spans

  def _blanks(self, prompt: Sequence[int]) -> list[int]:
    """Positions of the masks; of the last token for a causal model."""
    if self._config.causal:
      return [len(prompt) - 1]
    s = self._vocabulary.specials
    return [i for i, t in enumerate(prompt) if t in (s.mask, s.gmask, s.smask)]

  def text(
    self,
    prompt: Sequence[int],
    spans: Sequence[Sequence[int]],
    mark: tuple[str, str] = ('', ''),
  ) -> str:
    """A prompt with its blanks filled, each between two marks."""
    decode = self._vocabulary.decode
    if self._config.causal:
      # Together: the space before the first new word is the prompt's end or its own.
      given, whole = decode(prompt), decode([*prompt, *spans[0]])
      return given + mark[0] + whole[len(given) :] + mark[1]
    left, rest, out = list(spans), [], []

    # Text between two blanks is decoded at once: a piece alone may be half a character.
    def flush() -> None:
      out.append(decode(rest))
      rest.clear()

    blanks = set(self._blanks(prompt))
    for position, token in enumerate(prompt):
      if position in blanks and left:
        flush()
        out.append(mark[0] + decode(left.pop(0)) + mark[1])
      else:
        rest.append(token)
    flush()
    return ''.join(out)
