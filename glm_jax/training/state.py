"""The training state: a plain nested dict of arrays, born sharded."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from glm_jax import configs, models, sharding
from glm_jax.batch import prefix_visibility
from glm_jax.sharding import Layout
from glm_jax.training import guard, trained

State = dict[str, Any]
"""{'step': int32, 'params': tree, 'opt_state': the optimizer's, 'guard': its history}"""


Leaves = Mapping[str, Callable[[jax.Array], Any]]
"""Parameters that are not the model's: name -> key -> tree, boxed or plain arrays."""


def init_params(config: Any, key: jax.Array, leaves: Leaves = MappingProxyType({})) -> Any:
  """Fresh float32 parameters, boxed with their logical axes.

  Args:
    config: of a model.
    key: of all of them.
    leaves: what a recipe adds beside the model's, under names that the model has not.
  """
  # Parameters do not depend on the batch: the smallest is traced fastest.
  ids = jnp.zeros((1, 2), jnp.int32)
  visibility = prefix_visibility(jnp.array([1]), jnp.array([2]), 2)
  plain = models.build(config, models.ComputeConfig(attention='dense'))
  params = plain.init(key, ids, ids, ids, visibility)['params']
  taken = sorted({*params} & {*leaves})
  configs.check(
    not taken,
    f"a recipe's leaves must not have the names of the model's parameters {sorted(params)}",
    str(taken),
    'give them others',
  )
  return {**params, **{name: _leaf(name, init, key) for name, init in leaves.items()}}


def _leaf(name: str, init: Callable[[jax.Array], Any], key: jax.Array) -> Any:
  # By name: another leaf more does not change this one.
  return init(jax.random.fold_in(key, zlib.crc32(name.encode())))


def abstract_params(
  config: Any, layout: Layout | None = None, leaves: Leaves = MappingProxyType({})
) -> Any:
  """Shapes, dtypes and (given a layout) shardings of the parameters; no memory."""
  boxed = jax.eval_shape(lambda: init_params(config, jax.random.key(0), leaves))
  return _abstract(boxed, layout)


def abstract_state(
  config: Any,
  optimizer: optax.GradientTransformation,
  layout: Layout,
  leaves: Leaves = MappingProxyType({}),
  pattern: str | None = '',
) -> State:
  """The same for the whole state, of the parameters that `pattern` says are trained."""
  boxed = jax.eval_shape(lambda: _init(config, optimizer, 0, leaves, pattern))
  return _abstract(boxed, layout)


def init_state(
  config: Any,
  optimizer: optax.GradientTransformation,
  layout: Layout,
  seed: int,
  leaves: Leaves = MappingProxyType({}),
) -> State:
  """A fresh state. No device ever holds more than its own part of it."""
  abstract = abstract_state(config, optimizer, layout, leaves)
  shardings = jax.tree.map(lambda a: a.sharding, abstract)
  # With `out_shardings`, XLA computes on each device the part that it keeps.
  init = jax.jit(
    lambda: nn.unbox(_init(config, optimizer, seed, leaves)), out_shardings=shardings
  )
  return init()


def init_leaves(leaves: Leaves, abstract: Any, seed: int) -> Any:
  """Those of a recipe alone, as `init_state` has them; `abstract` holds their shardings."""
  shardings = jax.tree.map(lambda a: a.sharding, {name: abstract[name] for name in leaves})
  init = lambda: {n: _leaf(n, f, jax.random.key(seed)) for n, f in leaves.items()}
  return jax.jit(lambda: nn.unbox(init()), out_shardings=shardings)()


def begin(params: Any, optimizer: optax.GradientTransformation, abstract: State) -> State:
  """A fresh state of parameters that are there, with the shardings of `abstract`."""
  shardings = jax.tree.map(lambda a: a.sharding, abstract)
  rest = {name: s for name, s in shardings.items() if name != 'params'}
  fresh = jax.jit(lambda params: _beside(params, optimizer), out_shardings=rest)
  return {'params': params, **fresh(params)}


def complete(restored: State, abstract: State) -> State:
  """The state of a checkpoint; one from before there was a guard gets a fresh history."""
  if guard.NAME in restored:
    return restored
  shardings = jax.tree.map(lambda a: a.sharding, abstract[guard.NAME])
  return {**restored, guard.NAME: jax.jit(guard.fresh, out_shardings=shardings)()}


@functools.partial(jax.jit, donate_argnums=0)
def skip(state: State) -> State:
  """The state behind a step that is not trained on."""
  skipped = {**state, 'step': state['step'] + 1}
  if guard.NAME in state:
    history = state[guard.NAME]
    skipped[guard.NAME] = {**history, 'skipped': history['skipped'] + 1}
  return skipped


def with_params(state: State, params: Any) -> State:
  """A fresh state that begins from other parameters."""
  return {**state, 'params': params}


def count(params: Any) -> int:
  """Number of parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


@functools.lru_cache
def frozen_weights(model: Any, pattern: str | None) -> int:
  """Weights of matmuls that are not trained: their gradients are not computed.

  Args:
    model: a model configuration.
    pattern: of `TrainConfig.pattern`.
  """
  if pattern == '':
    return 0
  params = abstract_params(model)
  _, frozen = trained.split(params, pattern)
  flat = traverse_util.flatten_dict(frozen, sep='/')
  # A head of its own, or the embedding.
  head = 'head/weight' if 'head' in params else 'words/weight'
  return sum(
    leaf.size
    for path, leaf in flat.items()
    if path == head or (path.startswith('layers/') and path.endswith('/weight'))
  )


def _init(
  config: Any,
  optimizer: optax.GradientTransformation,
  seed: int,
  leaves: Leaves,
  pattern: str | None = '',
) -> State:
  params = init_params(config, jax.random.key(seed), leaves)
  params, _ = trained.split(params, pattern, leaves)
  # Boxes are tree nodes, so the optimizer's moments inherit the logical axes.
  return {'params': params, **_beside(params, optimizer)}


def _beside(params: Any, optimizer: optax.GradientTransformation) -> State:
  """What a fresh state holds beside its parameters."""
  return {
    'step': jnp.zeros((), jnp.int32),
    'opt_state': optimizer.init(params),
    guard.NAME: guard.fresh(),
  }


def _abstract(boxed: Any, layout: Layout | None) -> Any:
  # Under a mesh, `nn.unbox` would constrain shapes as if they were arrays.
  is_box = lambda node: isinstance(node, nn.meta.AxisMetadata)
  plain = jax.tree.map(
    lambda node: node.unbox(apply_constraint=False) if is_box(node) else node,
    boxed,
    is_leaf=is_box,
  )
  if layout is None:
    return plain
  shardings = sharding.shardings(nn.get_partition_spec(boxed), plain, layout)
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), plain, shardings
  )
