"""Reading a context and generating spans, with a key/value cache.

The context (Part A) is read once, bidirectionally; then each blank is generated from
`[sop]`, left to right, every span seeing the context and the spans before it, as in
training; also the last token of one that was cut, which THUDM/GLM generate_samples.py does
not show to later blanks. A causal model reads all but the last token of
a text and generates from that one. Rows of a batch are compact: each has a length of its
own in the cache, and nothing is padded in between.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from glm_jax import sharding
from glm_jax.batch import Visibility
from glm_jax.inference.sampling import Sampling, sample
from glm_jax.models import layers

Cache = dict[str, jax.Array]
"""{'k', 'v'}: [L, B, S, K, H] each."""


def init_cache(config: Any, rows: int, slots: int, dtype: str = 'float32') -> Cache:
  """An empty cache, spread over the mesh as activations are: rows, and heads.

  Args:
    config: of the model.
    rows: B.
    slots: S, tokens of context and spans together.
    dtype: of keys and values.
  """
  shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_size)
  # Few heads, or few rows, are whole on every device.
  axes = (None, 'act_batch', None, 'act_heads', None)
  spread = [
    sharding.axes_of(axis) if axis and size % sharding.axis_size(axis) == 0 else None
    for axis, size in zip(axes, shape, strict=True)
  ]
  spec = PartitionSpec(*spread)
  return {name: _zeros(shape, jnp.dtype(dtype), spec) for name in ('k', 'v')}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.Array:
  """Under jit, so that no device ever holds more than its part."""
  zeros = jnp.zeros(shape, dtype)
  return jax.lax.with_sharding_constraint(zeros, spec) if any(spec) else zeros


def read_context(
  model: Any,
  params: Any,
  cache: Cache,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
  *,
  causal: bool = False,
  head: layers.Head = lambda x_BTD, weight_VD: None,
) -> tuple[Cache, Any]:
  """Reads a context into slots 0 .. length; returns the cache and what `head` makes.

  Args:
    model: a Flax module.
    params: its parameters.
    cache: empty.
    tokens_BT: the contexts, padded at the end.
    lengths_B: tokens of each context.
    causal: each token sees those before it; else all of its context (Part A).
    head: see `layers.Head`; without one no logits [B, T, V] are computed.
  """
  B, T = tokens_BT.shape
  # Keys of padding are written, too, but into slots behind the row's context, which no
  # interval reaches before a generated token has overwritten them.
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  inside = positions < lengths_B[:, None]
  positions = jnp.where(inside, positions, 0)
  end = jnp.where(inside, positions + 1 if causal else lengths_B[:, None], 0)
  result, cache = model.apply(
    {'params': params},
    tokens_BT,
    positions,
    jnp.zeros_like(positions),
    Visibility(jnp.zeros_like(end), end),
    cache=cache,
    cache_start=jnp.zeros_like(lengths_B),
    head=head,
  )
  return cache, result


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
) -> tuple[Cache, jax.Array, jax.Array, jax.Array, jax.Array]:
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
    The cache, tokens [B, max_tokens], their number [B], the next free slot [B], and
    log-probabilities [B, max_tokens] of the tokens, and of a stop token behind them:
    those of the model among allowed tokens at the temperature of `sampling` (1 if greedy).
  """
  B, temperature = position_B.shape[0], sampling.temperature or 1.0

  def unfinished(carry):
    step, _, _, _, done_B, *_ = carry
    return (step < max_tokens) & ~done_B.all()

  # One token a row and iteration: reads the last one, samples the next. `count_B` is of
  # tokens kept, `done_B` of rows that met a stop token or do not take part.
  def advance(carry):
    step, cache, tokens, token_B, done_B, count_B, slot_B, log_probs = carry
    # Block positions begin at 1 inside a span; 0 is the context's.
    block_B = jnp.full_like(position_B, step + 1)
    cache, logits_BV = read_token(
      model, params, cache, token_B, position_B + step * stride_B, block_B, slot_B
    )
    # A finished row writes into a slot that is not its own yet, and moves no further.
    slot_B = slot_B + ~done_B
    logits_BV = jnp.where(allowed_V, logits_BV, -jnp.inf)
    token_B = sample(logits_BV, sampling, jax.random.fold_in(key, step))
    # Of the token that was chosen, a stop included; of a finished row nothing.
    chosen_B = jnp.take_along_axis(
      jax.nn.log_softmax(logits_BV / temperature), token_B[:, None], axis=-1
    )[:, 0]
    log_probs = log_probs.at[:, step].set(jnp.where(done_B, 0, chosen_B))
    # Once done, always done: a finished row goes on sampling, but nothing is kept of it.
    done_B |= jnp.isin(token_B, jnp.array(stop))
    tokens = tokens.at[:, step].set(jnp.where(done_B, 0, token_B))
    count_B += ~done_B
    return step + 1, cache, tokens, token_B, done_B, count_B, slot_B, log_probs

  start = (
    jnp.int32(0),
    cache,
    jnp.zeros((B, max_tokens), jnp.int32),
    first_B,
    ~active_B,
    jnp.zeros((B,), jnp.int32),
    slot_B,
    jnp.zeros((B, max_tokens), jnp.float32),
  )
  _, cache, tokens, _, _, count_B, slot_B, log_probs = jax.lax.while_loop(
    unfinished, advance, start
  )
  # Every process looks at what was generated, wherever its rows were.
  made = (tokens, count_B, slot_B, log_probs)
  return cache, *(nn.with_logical_constraint(x, (None,) * x.ndim) for x in made)


def end_span(
  model: Any,
  params: Any,
  cache: Cache,
  token_B: jax.Array,
  position_B: jax.Array,
  block_B: jax.Array,
  slot_B: jax.Array,
  cut_B: jax.Array,
) -> tuple[Cache, jax.Array]:
  """Reads the last token of spans that `max_tokens` cut, for later blanks to see.

  A span that a stop token ended has been read to its last token; one that was cut ends with
  a token that was sampled and not read. Of other rows nothing is kept: what is written
  lies behind their last slot.

  Args:
    model: a Flax module.
    params: its parameters.
    cache: context and spans so far.
    token_B: last token of each span.
    position_B: its first position.
    block_B: its second.
    slot_B: first free slot of each row.
    cut_B: rows whose span was cut.

  Returns:
    The cache and the next free slot [B].
  """
  cache, _ = read_token(model, params, cache, token_B, position_B, block_B, slot_B)
  return cache, slot_B + cut_B
