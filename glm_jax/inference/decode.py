"""What a device computes to read contexts and to generate: pure functions of a cache.

A context (Part A, or a causal text) is read once and attends to itself; then tokens are
generated one after the other into the slots behind it, each seeing all slots before its own
and itself. Rows are compact and independent: each has a length, positions, a limit and
random numbers of its own, so that it does not matter which rows stand beside it, nor when
it began.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from glm_jax.batch import Visibility
from glm_jax.inference import sampling as sampling_lib
from glm_jax.inference.sampling import Sampling
from glm_jax.models import cache as kv_cache
from glm_jax.models import layers, virtual
from glm_jax.models.cache import Cache
from glm_jax.models.stack import are_apart


class RowStates(NamedTuple):
  """Where each row of a batch stands in the span that it generates; all [B].

  Attributes:
    token: int32, to be read next: `[sop]`, or the last of a causal context, at first.
    position: int32, its first position.
    stride: int32, by which that grows with each token: 0 in a span of blanks, 1 where
      positions go on.
    block: int32, its second position.
    slot: int32, that it is read into: the first free one.
    count: int32, tokens of the span so far.
    least: int32, tokens before which no stop token is said.
    limit: int32, most tokens of the span.
    seed: uint32, from which the span's random numbers come.
    end: int32, the stop token that has ended the span; -1 without one.
    last: bool, whether nothing follows the span, so that its last token is not read.
    done: bool, whether the span has ended, or the row has none.
    tokens: int32 [B, most], of the span.
    log_probs: float32 [B, most + 1], theirs and, behind them, that of the stop token: those
      of the model among allowed tokens at the temperature of `Sampling` (1 if greedy).
  """

  token: Any
  position: Any
  stride: Any
  block: Any
  slot: Any
  count: Any
  least: Any
  limit: Any
  seed: Any
  end: Any
  last: Any
  done: Any
  tokens: Any
  log_probs: Any


def read_context(
  model: Any,
  variables: Any,
  tokens_RT: jax.Array,
  lengths_R: jax.Array,
  *,
  causal: bool = False,
  dtype: str = 'float32',
  head: layers.Head = lambda x_BTD, weight_VD: None,
) -> tuple[Cache, Any]:
  """Reads contexts into caches of their own; returns them and what `head` makes.

  A model with virtual tokens has these in the first slots, before the context.

  Args:
    model: a Flax module.
    variables: its collections.
    tokens_RT: the contexts, padded at the end.
    lengths_R: tokens of each.
    causal: each token sees those before it; else all of its context (Part A).
    dtype: of the cache.
    head: see `layers.Head`; without one no logits [R, T, V] are computed.
  """
  P = virtual.count(variables)
  tokens = virtual.opened(tokens_RT, 0, P)
  R, T = tokens.shape
  # Keys of padding are written, too, but into slots behind the row's context, which no
  # interval reaches before a generated token has overwritten them.
  slots = jnp.broadcast_to(jnp.arange(T), (R, T))
  inside = slots < P + lengths_R[:, None]
  end = jnp.where(inside, slots + 1 if causal else P + lengths_R[:, None], 0)
  result, cache = model.apply(
    variables,
    tokens,
    jnp.where(inside, slots - P, 0),
    jnp.zeros_like(tokens),
    Visibility(jnp.zeros_like(end), end),
    cache=kv_cache.init(model.config, R, T, dtype, apart=are_apart(variables)),
    head=head,
  )
  return cache, result


def read_into(
  model: Any,
  variables: Any,
  cache: Cache,
  tokens_RT: jax.Array,
  lengths_R: jax.Array,
  rows_R: jax.Array,
  *,
  causal: bool,
  dtype: str,
) -> Cache:
  """The cache of a batch, some of whose rows have read contexts.

  Args, besides those of `models.cache.put`: see `read_context`.
  """
  contexts, _ = read_context(
    model, variables, tokens_RT, lengths_R, causal=causal, dtype=dtype
  )
  return kv_cache.put(cache, contexts, rows_R)


def extend(
  model: Any,
  variables: Any,
  cache: Cache,
  tokens_RT: jax.Array,
  lengths_R: jax.Array,
  rows_R: jax.Array,
  start_R: jax.Array,
  head: layers.Head = lambda x_BTD, weight_VD: None,
) -> tuple[Cache, Any]:
  """Reads more of causal contexts, behind what their rows of the cache hold.

  Args:
    model: a Flax module of a causal family.
    variables: its collections.
    cache: of a batch.
    tokens_RT: what follows, padded at the end.
    lengths_R: tokens of each.
    rows_R: int32, the rows; B for one that is left out.
    start_R: first free slot of each.
    head: see `read_context`.

  Returns:
    The cache and what `head` makes.
  """
  own = kv_cache.take(cache, rows_R)
  t = jnp.arange(tokens_RT.shape[1])
  slots = start_R[:, None] + t
  inside = t < lengths_R[:, None]
  positions = jnp.where(inside, slots - virtual.count(variables), 0)
  end = jnp.where(inside, slots + 1, 0)
  result, own = model.apply(
    variables,
    tokens_RT,
    positions,
    jnp.zeros_like(positions),
    Visibility(jnp.zeros_like(end), end),
    cache=own,
    cache_start=start_R,
    head=head,
  )
  return kv_cache.put(cache, own, rows_R), result


def read_token(
  model: Any,
  variables: Any,
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
    variables,
    token_B[:, None],
    position_B[:, None],
    block_B[:, None],
    Visibility(jnp.zeros_like(end), end),
    cache=cache,
    cache_start=slot_B,
  )
  return cache, logits_BTV[:, 0]


def advance(
  model: Any,
  variables: Any,
  cache: Cache,
  had_BV: jax.Array | None,
  rows: RowStates,
  *,
  steps: Any,
  eager: Any,
  stops: tuple[int, ...],
  allowed_V: jax.Array,
  sampling: Sampling,
) -> tuple[Cache, jax.Array | None, RowStates]:
  """Generates up to `steps` tokens a row.

  A row reads every token that it keeps, so that what follows sees them all; the last before
  its limit, too, unless nothing follows. (THUDM/GLM generate_samples.py does not show the
  last token of a span that was cut to later blanks.)

  Args:
    model: a Flax module.
    variables: its collections.
    cache: of the rows.
    had_BV: bool, tokens that each row has, for a repetition penalty; None without one.
    rows: where they stand.
    steps: int32, most tokens.
    eager: bool, whether to return once a row has ended, so that its place can be taken.
    stops: ids that end a span (not kept).
    allowed_V: bool, tokens that may be generated.
    sampling: how they are chosen.
  """
  temperature = sampling.temperature or 1.0
  ended = rows.done.sum()

  def unfinished(carry):
    step, _, _, rows = carry
    waited_for = eager & (rows.done.sum() > ended)
    return (step < steps) & ~rows.done.all() & ~waited_for

  def one(carry):
    step, cache, had_BV, r = carry
    # 1. The token is read; a row that has ended writes into a slot that is not its own yet,
    # and moves no further.
    cache, logits_BV = read_token(
      model, variables, cache, r.token, r.position, r.block, r.slot
    )
    r = r._replace(
      slot=r.slot + ~r.done,
      position=r.position + jnp.where(r.done, 0, r.stride),
      block=r.block + ~r.done,
    )
    # 2. One that is at its limit had nothing left but to be read.
    done = r.done | (r.count >= r.limit)
    # 3. The next token.
    if had_BV is not None:
      logits_BV = sampling_lib.penalize(logits_BV, had_BV, sampling.repetition_penalty)
    ids = jnp.arange(len(allowed_V))
    early = (r.count < r.least)[:, None] & jnp.isin(ids, jnp.array(stops))
    logits_BV = jnp.where(allowed_V & ~early, logits_BV, -jnp.inf)
    key_of = lambda seed, count: jax.random.fold_in(jax.random.key(seed), count)
    token_B = sampling_lib.sample(logits_BV, sampling, jax.vmap(key_of)(r.seed, r.count))
    chosen_B = jnp.take_along_axis(
      jax.nn.log_softmax(logits_BV / temperature), token_B[:, None], axis=-1
    )[:, 0]
    # 4. A stop token ends the span, and is scored, but not kept.
    stopped = jnp.isin(token_B, jnp.array(stops))
    kept = ~done & ~stopped
    full = r.last & (r.count + kept >= r.limit)
    B = jnp.arange(len(token_B))
    put = lambda old, new, where: old.at[B, jnp.where(where, r.count, old.shape[1])].set(
      new, mode='drop'
    )
    r = r._replace(
      tokens=put(r.tokens, token_B, kept),
      log_probs=put(r.log_probs, chosen_B, ~done),
      token=jnp.where(kept, token_B, r.token),
      count=r.count + kept,
      end=jnp.where(~done & stopped, token_B, r.end),
      done=done | stopped | full,
    )
    if had_BV is not None:
      had_BV = had_BV.at[B, jnp.where(kept, token_B, len(allowed_V))].set(True, mode='drop')
    return step + 1, cache, had_BV, r

  start = (jnp.int32(0), cache, had_BV, rows)
  _, cache, had_BV, rows = jax.lax.while_loop(unfinished, one, start)
  # Every process looks at what was generated, wherever its rows were.
  whole = lambda x: nn.with_logical_constraint(x, (None,) * x.ndim)
  return cache, had_BV, jax.tree.map(whole, rows)
