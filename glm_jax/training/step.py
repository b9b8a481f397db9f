"""One training step, one evaluation step: pure functions of state and batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glm_jax.training import guard, trained
from glm_jax.training.guard import GuardConfig
from glm_jax.training.losses import LossFn, Metrics, Variables
from glm_jax.training.state import State


def _all_params(params: Any, frozen: Any) -> Variables:
  return {'params': trained.merge(params, frozen)}


def make_train_step(
  loss: LossFn,
  optimizer: optax.GradientTransformation,
  *,
  microbatches: int,
  seed: int,
  dtype: str = 'float32',
  counts: Callable[[Any], dict[str, jax.Array]] = lambda batch: {},
  variables: Callable[[Any, Any], Variables] = _all_params,
  guarded: GuardConfig = GuardConfig(),
) -> Callable[[State, Any, Any], tuple[State, Metrics]]:
  """(state, frozen, batch) -> (state, metrics), to be jitted with the state donated.

  `frozen` holds the parameters that the state does not, which are not differentiated; {}
  if it holds all of them.

  The gradient is that of `sum(w ce) / sum(w)` over the whole batch, whatever the
  number of micro-batches: their sums are added and divided once. Dropout depends on
  (seed, step) alone, so a resumed run repeats it.

  An update that `guarded` leaves out changes nothing but the step and the history of the
  guard, and its metrics count nothing.

  Args:
    loss: see `LossFn`.
    optimizer: any optax transformation.
    microbatches: parts of the batch worked on one after the other to save memory.
    seed: of dropout.
    dtype: of the computation. Weights are cast to it once, before the layers, so that
      what moves between devices, gradients included, is of this size; sums over
      micro-batches and the optimizer are in float32.
    counts: of a whole batch, for the loss of each of its parts.
    variables: (what is trained, frozen) -> the collections that the loss takes.
    guarded: which updates are left out; none is of a state without `guard`.
  """

  def loss_of(params: Any, frozen: Any, *rest: Any) -> tuple[jax.Array, Metrics]:
    return loss(variables(params, frozen), *rest)

  differentiate = jax.value_and_grad(loss_of, has_aux=True)

  def train_step(state: State, frozen: Any, batch: Any) -> tuple[State, Metrics]:
    # Dropout's keys must differ from the key that initialised the parameters.
    key = jax.random.fold_in(jax.random.key(seed), 1)
    key = jax.random.fold_in(key, state['step'])
    # Differentiated with respect to the cast weights, so that gradients, and what devices
    # exchange of them, have their dtype.
    weights, others = cast(state['params'], dtype), cast(frozen, dtype)
    sums = counts(batch)
    if microbatches == 1:
      (_, metrics), gradients = differentiate(weights, others, batch, key, sums)
    else:
      metrics, gradients = _accumulate(
        functools.partial(differentiate, weights, others), batch, key, sums, microbatches
      )
    # The loss is a sum; this is the one division by the weights of the whole batch. A batch
    # without targets has gradients of 0.
    total = metrics['loss'][1]
    scale = 1 / jnp.where(total > 0, total, 1)
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, gradients)
    with jax.named_scope('optimizer'):
      updates, opt_state = optimizer.update(gradients, state['opt_state'], state['params'])
      params = optax.apply_updates(state['params'], updates)
    # The norm before clipping, whose growth announces that training diverges.
    norm = optax.tree.norm(gradients)
    metrics['gradient_norm'] = (norm, jnp.ones(()))
    new = {'step': state['step'] + 1, 'params': params, 'opt_state': opt_state}
    return _guarded(guarded, state, new, metrics, norm)

  return train_step


def _guarded(
  config: GuardConfig, old: State, new: State, metrics: Metrics, norm: jax.Array
) -> tuple[State, Metrics]:
  """The new state, or but for its step the old one; metrics of what was applied."""
  if guard.NAME not in old:
    return new, metrics
  total, count = metrics['loss']
  applied, history = guard.judge(config, old[guard.NAME], total, norm)
  kept = jax.tree.map(
    lambda a, b: jnp.where(applied, a, b),
    {k: new[k] for k in ('params', 'opt_state')},
    {k: old[k] for k in ('params', 'opt_state')},
  )
  # A sum that is not finite would stay in every mean that it enters.
  counted = jax.tree.map(lambda x: jnp.where(applied, x, 0), metrics)
  counted |= guard.metrics(history, total / jnp.where(count > 0, count, 1), norm)
  return {**new, **kept, guard.NAME: history}, counted


def make_eval_step(
  loss: LossFn, counts: Callable[[Any], dict[str, jax.Array]] = lambda batch: {}
) -> Callable[[Any, Any], Metrics]:
  """(variables, batch) -> metrics, without dropout."""

  def eval_step(variables: Variables, batch: Any) -> Metrics:
    return loss(variables, batch, None, counts(batch))[1]

  return eval_step


def cast(params: Any, dtype: str) -> Any:
  """Weight matrices in `dtype`; biases and norms, which are small, as they are.

  So are integers, and adapters, which modules cast.
  """

  def cast_leaf(path: Any, leaf: jax.Array) -> jax.Array:
    name = path[-1].key if isinstance(path[-1], jax.tree_util.DictKey) else ''
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(dtype) if name == 'weight' and is_float else leaf

  return jax.tree_util.tree_map_with_path(cast_leaf, params)


def _accumulate(differentiate, batch, key, sums, parts):
  """Sums of metrics and gradients over parts of the batch, one after the other."""
  # Rows are dealt like cards: part i holds rows i, i + parts, ... Devices hold neighbouring
  # rows, so that each has an equal share of every part and no row moves: of 8 rows in 2
  # parts, devices (0 1 2 3) and (4 5 6 7) first work on (0 2) and (4 6). Cut into blocks,
  # part 0 would be all of the first device's rows.
  # [B, ...] -> [B / parts, parts, ...] -> [parts, B / parts, ...]
  split = jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch
  )

  def add_part(carry, args):
    i, part = args
    # Dropout differs from part to part.
    (_, metrics), gradients = differentiate(part, jax.random.fold_in(key, i), sums)
    # Behind a barrier: XLA's TPU compiler stumbles over sums of gradients that it could
    # move behind the loop (while_loop_all_reduce_code_motion).
    gradients = jax.lax.optimization_barrier(gradients)
    # The sum is float32; what is added to it may be smaller, so there is no second copy.
    add = lambda a, b: a + b.astype(a.dtype)
    return jax.tree.map(add, carry, (metrics, gradients)), None

  # Every sum begins at 0 in float32, with the shapes of one part's results.
  first = jax.tree.map(lambda x: x[0], split)
  (_, metrics), gradients = jax.eval_shape(differentiate, first, key, sums)
  zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (metrics, gradients))
  (metrics, gradients), _ = jax.lax.scan(add_part, zeros, (jnp.arange(parts), split))
  return metrics, gradients
