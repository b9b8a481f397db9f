"""Beam search with the numbers of THUDM/GLM (generation_utils.py, BeamSearchScorer).

`start`, `step` and `finish` know no model: they take log-probabilities and say which tokens
go on, and behind which. `search` does it with a model and its cache, one span of each row
at a time, all on the device.

What GLM's evaluation (tasks/seq2seq/evaluate.py, `--select-topk`) counts as what:

- The score of a text is the sum of its tokens' log-probabilities, that of the stop token
  among them, divided by length ** length_penalty; the length is without the stop token.
- Tokens that are forbidden, a stop before the least length or the last of a repeated
  n-gram, leave the probabilities of others as they are. n-grams are those of the span.
- A stop token among the `num_beams` best candidates ends a text. One further down does
  not, and as many texts go on as before.
- Texts that the most tokens cut have no stop token, and are compared with the others.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from glm_jax import configs
from glm_jax.batch import Visibility
from glm_jax.configs import at_least, within
from glm_jax.inference import decode
from glm_jax.inference.sampling import Sampling
from glm_jax.models import cache as kv_cache
from glm_jax.models.cache import Cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamConfig:
  """How texts are searched; the names are those of transformers' GenerationConfig.

  Attributes:
    num_beams: K, texts that are kept at each token; 1 is greedy.
    length_penalty: the power of its length that the log-probability of a text is divided
      by: more is longer, 0 compares plain log-probabilities.
    early_stopping: whether a row ends with its K-th text, rather than when no text that
      goes on is better, at the length that it has, than the worst of these.
    no_repeat_ngram_size: n-grams of this size stand in a span once; 0 for no such rule.
  """

  num_beams: Annotated[int, at_least(1).but('use 1 for greedy decoding')] = 1
  # A length to this power must stay finite in float32.
  length_penalty: Annotated[float, within('[-5, 5]')] = 1.0
  early_stopping: bool = False
  no_repeat_ngram_size: Annotated[int, at_least(0).but('use 0 for no such rule')] = 0

  def __post_init__(self):
    configs.check_fields(self)


def check_alone(sampling: Sampling, stops: bool) -> None:
  """Raises UserError for a search that is to sample, or to be stopped by others' texts."""
  configs.check(
    sampling == Sampling() and not stops,
    'beam search must be without temperature, top_k, top_p, min_p, repetition_penalty'
    ' and stop strings',
    str(sampling) if sampling != Sampling() else 'a stop string',
    'leave these out, or the beams',
  )


class Texts(NamedTuple):
  """K texts of each row.

  Attributes:
    score: float32 [B, K], of a text that goes on its log-probability, of one that has
      ended that by its length (see the module); -inf where there is none.
    length: int32 [B, K], tokens without a stop token.
    tokens: int32 [B, K, most].
    log_probs: float32 [B, K, most], of the tokens and, behind them, of the stop token; NaN
      where there is none.
  """

  score: jax.Array
  length: jax.Array
  tokens: jax.Array
  log_probs: jax.Array


class Beams(NamedTuple):
  """Where a search stands.

  Attributes:
    live: texts that go on, the best first, all equally long.
    ended: texts that have ended, the best first.
    done: bool [B], rows whose result is certain.
  """

  live: Texts
  ended: Texts
  done: jax.Array


def start(done_B: jax.Array, config: BeamConfig, most: int) -> Beams:
  """Nothing said yet, in rows that are not done; one text of each row goes on."""
  shape = (len(done_B), config.num_beams)
  none = Texts(
    score=jnp.full(shape, -jnp.inf),
    length=jnp.zeros(shape, jnp.int32),
    tokens=jnp.zeros((*shape, most), jnp.int32),
    log_probs=jnp.full((*shape, most), jnp.nan),
  )
  return Beams(none._replace(score=none.score.at[:, 0].set(0.0)), none, done_B)


def step(
  beams: Beams,
  count: jax.Array,
  log_probs_BKV: jax.Array,
  *,
  config: BeamConfig,
  stops: tuple[int, ...],
  least: Any,
) -> tuple[Beams, jax.Array]:
  """One more token.

  Args:
    beams: of texts of `count` tokens, fewer than `most`.
    count: int32.
    log_probs_BKV: float32, of each text's next token; -inf for one that is not allowed.
    config: how.
    stops: ids that end a text.
    least: int32, tokens before which no stop token is said.

  Returns:
    The beams, and int32 [B, K]: the text that each one goes on from.
  """
  live, ended, done_B = beams
  _, K, V = log_probs_BKV.shape
  is_stop_V = jnp.isin(jnp.arange(V), jnp.array(stops))
  forbidden_BKV = is_stop_V & (count < least)
  if config.no_repeat_ngram_size:
    repeated = _repeated(live.tokens, count, config.no_repeat_ngram_size, V)
    forbidden_BKV = forbidden_BKV | repeated
  scores_BKV = jnp.where(forbidden_BKV, -jnp.inf, live.score[..., None] + log_probs_BKV)
  # 1. As many candidates as leave K that go on, if each text has all its stop tokens there.
  flat = lambda x: x.reshape(len(x), K * V)
  C = min(K * (1 + len(stops)), K * V)
  scores_BC, index_BC = jax.lax.top_k(flat(scores_BKV), C)
  parent_BC, token_BC = index_BC // V, index_BC % V
  chosen_BC = jnp.take_along_axis(flat(log_probs_BKV), index_BC, axis=1)
  stopped_BC = jnp.isin(token_BC, jnp.array(stops))
  candidates = _of(live, parent_BC)
  put = lambda x, new: x.at[..., count].set(new)
  candidates = candidates._replace(log_probs=put(candidates.log_probs, chosen_BC))
  # 2. Texts that end here stand with those that have ended before.
  by_length_BC = scores_BC / _power(count, config)
  ends_BC = stopped_BC & (jnp.arange(C) < K)
  new = candidates._replace(score=jnp.where(ends_BC, by_length_BC, -jnp.inf))
  now_ended = _best(ended, new)
  # 3. The others go on.
  go_on = candidates._replace(
    score=jnp.where(stopped_BC, -jnp.inf, scores_BC),
    length=candidates.length + 1,
    tokens=put(candidates.tokens, token_BC),
  )
  index_BK = jax.lax.top_k(go_on.score, K)[1]
  now_live = _of(go_on, index_BK)
  parent_BK = jnp.take_along_axis(parent_BC, index_BK, axis=1)
  # 4. Are K texts as good as the best candidate is by now?
  worst_B = now_ended.score[:, -1]
  enough_B = config.early_stopping | (worst_B >= by_length_BC[:, 0])
  now_done = (worst_B > -jnp.inf) & enough_B
  # A row that is done keeps what it has.
  kept = lambda old, new: jax.tree.map(
    lambda x, y: jnp.where(done_B.reshape(-1, *[1] * (x.ndim - 1)), x, y), old, new
  )
  beams = Beams(kept(live, now_live), kept(ended, now_ended), done_B | now_done)
  return beams, kept(jnp.broadcast_to(jnp.arange(K), parent_BK.shape), parent_BK)


def finish(beams: Beams, config: BeamConfig) -> Texts:
  """The best texts, the best first; of rows that are not done also those that went on."""
  live, ended, done_B = beams
  score_BK = live.score / _power(live.length, config)
  cut = live._replace(score=jnp.where(done_B[:, None], -jnp.inf, score_BK))
  return _best(ended, cut)


def _power(length: jax.Array, config: BeamConfig) -> jax.Array:
  """What the log-probability of a text of this length is divided by."""
  return jnp.maximum(length, 1).astype(jnp.float32) ** config.length_penalty


def _of(texts: Texts, index_BN: jax.Array) -> Texts:
  """N of the texts of each row."""
  return jax.vmap(lambda of_row, index_N: jax.tree.map(lambda x: x[index_N], of_row))(
    texts, index_BN
  )


def _best(some: Texts, more: Texts) -> Texts:
  """As many texts as `some` are, the best of both."""
  both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), some, more)
  return _of(both, jax.lax.top_k(both.score, some.score.shape[1])[1])


def _repeated(tokens_BKT: jax.Array, count: jax.Array, n: int, V: int) -> jax.Array:
  """[B, K, V] bool: tokens that would end an n-gram that a text has already.

  Args:
    tokens_BKT: the texts.
    count: tokens of each.
    n: at least 1.
    V: tokens that there are.
  """
  B, K, T = tokens_BKT.shape
  starts = jnp.arange(T)
  # The n-gram that begins at each token, [B, K, T, n]; beyond `count` there are none.
  grams = jnp.take(tokens_BKT, starts[:, None] + jnp.arange(n), axis=2, mode='clip')
  # The last n - 1 tokens; with fewer than n tokens there is nothing to compare them with.
  last = jnp.take(tokens_BKT, count - n + 1 + jnp.arange(n - 1), axis=2, mode='clip')
  again = (grams[..., :-1] == last[:, :, None]).all(-1) & (starts + n <= count)
  batch, text = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
  ids = jnp.where(again, grams[..., -1], V)
  return jnp.zeros((B, K, V), bool).at[batch, text, ids].set(True, mode='drop')


class Openings(NamedTuple):
  """How the span opens that each row is to say; all [B].

  Attributes:
    token: int32, that opens it.
    position: int32, its first position.
    stride: int32, by which that grows with each token.
    slot: int32, that it is read into.
    done: bool, rows that say none.
  """

  token: Any
  position: Any
  stride: Any
  slot: Any
  done: Any


def spread(cache: Cache, K: int) -> Cache:
  """[L, B K, ...]: the contexts of B rows, each in K rows that stand together."""
  axis = kv_cache.rows_axis(cache)
  return jax.tree.map(lambda x: jnp.repeat(x, K, axis=axis), cache)


def search(
  model: Any,
  variables: Any,
  cache: Cache,
  openings: Openings,
  *,
  least: Any,
  most: int,
  config: BeamConfig,
  stops: tuple[int, ...],
  allowed_V: jax.Array,
) -> tuple[Cache, Texts]:
  """Searches one span of each row.

  Args:
    model: a Flax module.
    variables: its collections.
    cache: [L, B K, S, ...], what was read before; see `spread`. Of a row that is asked for
      a span there are `most` slots behind that of its first token.
    openings: of the spans of B rows.
    least: tokens of a span before a stop token is allowed.
    most: longest span.
    config: how.
    stops: ids that end a span (not kept).
    allowed_V: bool, tokens that may be said.

  Returns:
    The cache, which holds the first token of each span, and the texts.
  """
  K = config.num_beams
  of_beams = lambda x_B: jnp.repeat(x_B, K)
  token, position, stride, slot = map(of_beams, openings[:4])

  def unfinished(carry):
    count, _, beams = carry
    return (count < most) & ~beams.done.all()

  def one(carry):
    count, cache, beams = carry
    last = beams.live.tokens[..., jnp.maximum(count - 1, 0)].reshape(-1)
    cache, logits = decode.read_token(
      model,
      variables,
      cache,
      jnp.where(count == 0, token, last),
      position + stride * count,
      jnp.broadcast_to(1 + count, token.shape),
      slot + count,
    )
    logits = jnp.where(allowed_V, logits, -jnp.inf).reshape(-1, K, len(allowed_V))
    beams, parent_BK = step(
      beams,
      count,
      jax.nn.log_softmax(logits),
      config=config,
      stops=stops,
      least=least,
    )
    # What stands before the span is the same in all beams.
    cache = _reorder(cache, parent_BK, openings.slot + 1, most)
    return count + 1, cache, beams

  beams = start(openings.done, config, most)
  _, cache, beams = jax.lax.while_loop(unfinished, one, (jnp.int32(0), cache, beams))
  # Every process looks at what was found, wherever its rows were.
  whole = lambda x: nn.with_logical_constraint(x, (None,) * x.ndim)
  return cache, jax.tree.map(whole, finish(beams, config))


def _reorder(cache: Cache, parent_BK: jax.Array, slot_B: jax.Array, width: int) -> Cache:
  """The cache, in which `width` slots of each beam, from `slot_B` on, are its parent's."""
  axis = kv_cache.rows_axis(cache)
  before = (slice(None),) * axis

  def of_row(x_LKS, parent_K, slot):
    part = jax.lax.dynamic_slice_in_dim(x_LKS, slot, width, axis=axis + 1)
    part = part[*before, parent_K]
    return jax.lax.dynamic_update_slice_in_dim(x_LKS, part, slot, axis=axis + 1)

  def of_leaf(x):
    x_LBKS = x.reshape(*x.shape[:axis], *parent_BK.shape, *x.shape[axis + 1 :])
    # Beams of a row are on one device: so are their parents.
    return jax.vmap(of_row, (axis, 0, 0), axis)(x_LBKS, parent_BK, slot_B).reshape(x.shape)

  return jax.tree.map(of_leaf, cache)


def read_spans(
  model: Any,
  variables: Any,
  cache: Cache,
  openings: Openings,
  tokens_BT: jax.Array,
  lengths_B: jax.Array,
) -> Cache:
  """The cache after the text that was chosen of each span, in all of its row's beams.

  The beams that are left of a search are others than the best text, as a rule: what it
  said may have been written over long ago.

  Args:
    model: a Flax module.
    variables: its collections.
    cache: [L, B K, S, ...], as `search` leaves it.
    openings: of the spans that were searched.
    tokens_BT: the texts, padded at the end.
    lengths_B: tokens of each.
  """
  B, T = tokens_BT.shape
  K = kv_cache.shape(cache)[0] // B
  of_beams = lambda x: jnp.repeat(x, K, axis=0)
  count = 1 + jnp.arange(T)
  inside = count <= lengths_B[:, None]
  end = jnp.where(inside, openings.slot[:, None] + count + 1, 0)
  position = jnp.where(
    inside, openings.position[:, None] + openings.stride[:, None] * count, 0
  )
  _, cache = model.apply(
    variables,
    of_beams(tokens_BT),
    of_beams(position),
    of_beams(jnp.where(inside, 1 + count, 0)),
    Visibility(of_beams(jnp.zeros_like(end)), of_beams(end)),
    cache=cache,
    cache_start=of_beams(openings.slot + 1),
    head=lambda x_BTD, weight_VD: None,
  )
  return cache
