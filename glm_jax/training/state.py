"""The training state: a plain nested dict of arrays, born sharded."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from glm_jax import configs, models, sharding
from glm_jax.batch import prefix_visibility
from glm_jax.models import config as model_config
from glm_jax.training import checkpoint

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


def params_from(path: str, config: Any, vocabulary: str, fresh: Any) -> Any:
  """Parameters of another checkpoint, for a new run to begin with.

  A position table that is longer here keeps its fresh rows behind the others, as
  THUDM/GLM train_utils.py does.

  Args:
    path: a checkpoint or a MODEL_DIR.
    config: of the new model.
    vocabulary: fingerprint of the new run's.
    fresh: the new run's parameters, on their shardings.

  Raises:
    ValueError: another vocabulary, or shapes that differ in more than positions.
  """
  folder = checkpoint.find(path)
  meta = checkpoint.read_meta(folder)
  theirs = model_config.from_dict(meta['model'])
  configs.check(
    meta['run']['vocabulary'] == vocabulary,
    'init_from must be a checkpoint of the same vocabulary',
    f'{meta["run"]["vocabulary"]} there, {vocabulary} here',
    'set VocabularyConfig.path to the one it was trained with',
  )
  shared = dataclasses.replace(
    config, max_positions=min(config.max_positions, theirs.max_positions)
  )
  configs.check(
    theirs.max_positions <= config.max_positions,
    'init_from must not have more positions than the model',
    f'{theirs.max_positions} there, {config.max_positions} here',
    'raise GLMConfig.max_positions',
  )
  mesh = jax.tree.leaves(fresh)[0].sharding.mesh
  params = checkpoint.read_params(folder, abstract_params(shared, mesh))

  def extend(old: jax.Array, new: jax.Array) -> jax.Array:
    if old.shape == new.shape:
      return old
    merge = jax.jit(
      lambda old, new: new.at[: old.shape[0]].set(old), out_shardings=new.sharding
    )
    return merge(old, new)

  return jax.tree.map(extend, params, fresh)


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
