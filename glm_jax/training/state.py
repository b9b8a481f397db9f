"""The training state: a plain nested dict of arrays, born sharded."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from glm_jax import models, sharding
from glm_jax.batch import prefix_visibility

State = dict[str, Any]
"""{'step': int32, 'params': tree, 'opt_state': the optimizer's}"""


def init_params(config: Any, key: jax.Array) -> Any:
  """Fresh parameters, boxed with their logical axes."""
  ids = jnp.zeros((1, 2), jnp.int32)
  visibility = prefix_visibility(jnp.array([1]), jnp.array([2]), 2)
  return models.build(config).init(key, ids, ids, ids, visibility)['params']


def abstract_params(config: Any, mesh: Mesh | None = None) -> Any:
  """Shapes, dtypes and (given a mesh) shardings of the parameters; no memory."""
  boxed = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  return _abstract(boxed, mesh)


def abstract_state(
  config: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> State:
  """The same for the whole state."""
  return _abstract(jax.eval_shape(lambda: _init(config, optimizer, 0)), mesh)


def init_state(
  config: Any, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> State:
  """A fresh state. No device ever holds more than its own part of it."""
  abstract = abstract_state(config, optimizer, mesh)
  shardings = jax.tree.map(lambda a: a.sharding, abstract)
  init = jax.jit(lambda: nn.unbox(_init(config, optimizer, seed)), out_shardings=shardings)
  with sharding.active(mesh):
    return init()


def with_params(state: State, params: Any) -> State:
  """A fresh state that begins from other parameters."""
  return {**state, 'params': params}


def count(params: Any) -> int:
  """Number of parameters."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _init(config: Any, optimizer: optax.GradientTransformation, seed: int) -> State:
  params = init_params(config, jax.random.key(seed))
  # Boxes are tree nodes, so the optimizer's moments inherit the logical axes.
  return {
    'step': jnp.zeros((), jnp.int32),
    'params': params,
    'opt_state': optimizer.init(params),
  }


def _abstract(boxed: Any, mesh: Mesh | None) -> Any:
  plain = nn.unbox(boxed)
  if mesh is None:
    return plain
  placed = sharding.shardings(nn.get_partition_spec(boxed), mesh)
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), plain, placed
  )
