"""What a model says of texts that may follow a context, which is read once for all."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import attention, models, sharding
from glm_jax.batch import Visibility
from glm_jax.inference import decode, engine, scoring
from glm_jax.inference.request import Request
from glm_jax.models import cache as kv_cache
from glm_jax.models import layers, virtual
from glm_jax.text.vocabulary import Vocabulary

# Contexts and candidates are padded to multiples of these, so that few shapes are compiled.
_CONTEXT, _CANDIDATE = 32, 8
# Candidates of a question that are read at a time, each with a copy of the context's cache.
_AT_ONCE = 4
_FIELDS = ('tokens', 'targets', 'positions', 'blocks')
# Positions of a candidate whose logits exist at a time.
_PIECE = 64


class Asked(NamedTuple):
  """A context and what may stand behind it, as token ids.

  Attributes:
    request: with the first of whose spans candidates are read.
    candidates: at least one, each of at least one token.
  """

  request: Request
  candidates: Sequence[Sequence[int]]


class Said(NamedTuple):
  """What a model says at the n tokens of a candidate, and where it ends.

  Attributes:
    log_probs: [n + 1] float32, of its tokens and of that which ends it, in nats.
    stops: [n + 1] float32, that a stop token is said there.
    greedy: [n + 1] bool, nothing is more probable.
  """

  log_probs: np.ndarray
  stops: np.ndarray
  greedy: np.ndarray


class Reader:
  """A model on a mesh that reads candidates."""

  def __init__(
    self,
    config: Any,
    variables: Any,
    vocabulary: Vocabulary,
    compute: models.ComputeConfig,
    layout: sharding.Layout,
  ):
    """
    Args:
      config: of the model.
      variables: its collections.
      vocabulary: that it was trained with.
      compute: of it.
      layout: the mesh that they are on.
    """
    self._config, self._variables, self._vocabulary = config, variables, vocabulary
    # A candidate is no length to be cut.
    self._layout = layout.replace(act_length=None)
    self._compute = compute

  def __call__(
    self, questions: Sequence[Asked], allowed: np.ndarray | None = None
  ) -> list[list[Said]]:
    """What is said of each candidate of each question, all in one batch.

    Args:
      questions: at least one.
      allowed: [V] bool, tokens that compete; None for all.
    """
    parts = self._layout.count('act_batch')
    R = -(-len(questions) // parts) * parts
    contexts = [question.request.context for question in questions]
    contexts += [[]] * (R - len(contexts))
    T = _up(max(map(len, contexts)), _CONTEXT)
    device, P = self._layout.devices.flat[0], virtual.count(self._variables)
    backend, _ = attention.choose(self._config, self._compute, device, P + T)
    compute = dataclasses.replace(self._compute, attention=backend)
    if allowed is None:
      allowed = np.ones(self._config.vocab_size, bool)
    most = max(len(question.candidates) for question in questions)
    N = min(most, _AT_ONCE)
    said: list[list[Said]] = [[] for _ in questions]
    with sharding.active(self._layout):
      tokens, lengths = self._spread(engine.padded(contexts, R, T))
      cache = _contexts(self._config, compute, self._variables, tokens, lengths)
      for first in range(0, most, N):
        chosen = [question.candidates[first : first + N] for question in questions]
        fields, counts = self._fields(questions, chosen, R, N)
        fields = self._spread(fields)
        results = _said(
          *(self._config, compute, self._variables, cache, lengths, fields, allowed),
          stops=self._vocabulary.stops,
        )
        results = [*map(np.asarray, results)]
        for place, count in counts.items():
          one = Said(*(x[place, :count] for x in results))
          said[place // N].append(one)
    return said

  def _spread(self, arrays: Any) -> Any:
    """Arrays that every process has whole, over the mesh by rows."""

    def put(x: np.ndarray) -> jax.Array:
      spread = sharding.batch_sharding(self._layout, x.ndim)
      return jax.make_array_from_callback(x.shape, spread, x.__getitem__)

    return jax.tree.map(put, arrays)

  def _fields(
    self, questions: Sequence[Asked], chosen: Sequence[Any], R: int, N: int
  ) -> tuple[dict[str, np.ndarray], dict[int, int]]:
    """Fields of `scoring.Row` [R * N, C] behind the contexts, and tokens of each row.

    Row r * N + i is a candidate i of the question r; the others are empty.
    """
    rows = {}
    for r, (question, texts) in enumerate(zip(questions, chosen, strict=True)):
      n = len(question.request.context)
      for i, ids in enumerate(texts):
        row = scoring.lay_out(self._config, self._vocabulary, question.request, [ids])
        rows[r * N + i] = {name: getattr(row, name)[n:] for name in _FIELDS}
    counts = {place: len(row['tokens']) for place, row in rows.items()}
    C = max(counts.values())
    C = _up(C, _CANDIDATE if C <= _PIECE else _PIECE)
    fields = {name: np.zeros((R * N, C), np.int32) for name in _FIELDS}
    for place, row in rows.items():
      for name, values in row.items():
        fields[name][place, : len(values)] = values
    return fields, counts


def _up(count: int, step: int) -> int:
  """The next multiple; at least one."""
  return max(1, -(-count // step)) * step


@functools.partial(jax.jit, static_argnums=(0, 1))
def _contexts(
  config: Any, compute: Any, variables: Any, tokens_RT: jax.Array, lengths_R: jax.Array
) -> Any:
  """Their cache."""
  model = models.build(config, compute)
  read = functools.partial(decode.read_context, causal=config.causal, dtype=compute.dtype)
  return read(model, variables, tokens_RT, lengths_R)[0]


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames='stops')
def _said(
  config: Any,
  compute: Any,
  variables: Any,
  cache: Any,
  lengths_R: jax.Array,
  fields: dict[str, jax.Array],
  allowed_V: jax.Array,
  *,
  stops: tuple[int, ...],
) -> tuple[jax.Array, ...]:
  """Fields of `Said` [R * N, C], of candidates behind N copies of each context."""
  rows, C = fields['tokens'].shape
  N = rows // len(lengths_R)
  axis = kv_cache.rows_axis(cache)

  def copied(x):  # [L, R, P + T, ...], with slots for the candidates
    slots = [(0, C if i == axis + 1 else 0) for i in range(x.ndim)]
    return jnp.repeat(jnp.pad(x, slots), N, axis)

  start = virtual.count(variables) + jnp.repeat(lengths_R, N)
  # Padding of a candidate stands behind it, where nothing of its row looks.
  end = start[:, None] + jnp.arange(C) + 1
  result, _ = models.build(config, compute).apply(
    variables,
    fields['tokens'],
    fields['positions'],
    fields['blocks'],
    Visibility(jnp.zeros_like(end), end),
    cache=jax.tree.map(copied, cache),
    cache_start=start,
    head=functools.partial(
      _compared, targets_BT=fields['targets'], allowed_V=allowed_V, stops=stops
    ),
  )
  # All of it on every process.
  return tuple(nn.with_logical_constraint(x, (None,) * x.ndim) for x in result)


def _compared(
  x_BTD: jax.Array,
  weight_VD: jax.Array,
  *,
  targets_BT: jax.Array,
  allowed_V: jax.Array,
  stops: tuple[int, ...],
) -> tuple[jax.Array, ...]:
  """Fields of `Said` [B, T], a few positions at a time."""

  def piece(part):
    x, targets = part
    logits = jnp.where(allowed_V, layers.logits(x, weight_VD), -jnp.inf)
    total = jax.nn.logsumexp(logits, axis=-1)
    # A sum with one term: to take one entry of a sharded axis, XLA would gather the axis.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target = jnp.where(is_target, logits, 0).sum(-1)
    ends = jax.nn.logsumexp(logits[..., jnp.array(stops)], axis=-1)
    return target - total, ends - total, target >= logits.max(-1)

  B, T = targets_BT.shape
  if T <= _PIECE:
    return piece((x_BTD, targets_BT))
  # [B, T, ...] -> [T / piece, B, piece, ...] and back.
  cut = lambda x: jnp.moveaxis(x.reshape(B, T // _PIECE, _PIECE, *x.shape[2:]), 1, 0)
  parts = jax.lax.map(piece, (cut(x_BTD), cut(targets_BT)))
  return tuple(jnp.moveaxis(x, 0, 1).reshape(B, T) for x in parts)
