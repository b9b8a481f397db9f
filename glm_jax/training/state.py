"""The training state: a plain nested dict of arrays, born sharded."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from glm_jax import configs, models, sharding
from glm_jax.batch import prefix_visibility
from glm_jax.sharding import Layout

State = dict[str, Any]
"""{'step': int32, 'params': tree, 'opt_state': the optimizer's}"""


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
  config = dataclasses.replace(config, attention='dense')  # weights are the same
  params = models.build(config).init(key, ids, ids, ids, visibility)['params']
  taken = sorted({*params} & {*leaves})
  configs.check(
    not taken,
    f"a recipe's leaves must not have the names of the model's parameters {sorted(params)}",
    str(taken),
    'give them others',
  )
  for name, init in leaves.items():
    # By name: another leaf more does not change this one.
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    params = {**params, name: init(own)}
  return params


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
) -> State:
  """The same for the whole state."""
  boxed = jax.eval_shape(lambda: _init(config, optimizer, 0, leaves))
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


def with_params(state: State, params: Any) -> State:
  """A fresh state that begins from other parameters."""
  return {**state, 'params': params}


def count(params: Any) -> int:
  """Number of parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _init(
  config: Any, optimizer: optax.GradientTransformation, seed: int, leaves: Leaves
) -> State:
  params = init_params(config, jax.random.key(seed), leaves)
  # Boxes are tree nodes, so the optimizer's moments inherit the logical axes.
  return {
    'step': jnp.zeros((), jnp.int32),
    'params': params,
    'opt_state': optimizer.init(params),
  }


def _abstract(boxed: Any, layout: Layout | None) -> Any:
  plain = nn.unbox(boxed)
  if layout is None:
    return plain
  shardings = sharding.shardings(nn.get_partition_spec(boxed), plain, layout)
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), plain, shardings
  )
