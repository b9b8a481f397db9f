"""The program of a run: what `train` compiles, and what `plan` compiles without a chip."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from flax import traverse_util

from glm_jax import attention, models, sharding
from glm_jax.checkpoints import variables as collections
from glm_jax.models import quantized as integers
from glm_jax.models import virtual
from glm_jax.performance import flags
from glm_jax.training import adapters, optimizer, state, step, trained
from glm_jax.training.config import TrainConfig
from glm_jax.training.losses import LossFn
from glm_jax.training.recipe import REFERENCE


class Program(NamedTuple):
  """A run's computation on a mesh.

  Attributes:
    train_step: jitted, (state, frozen, batch) -> (state, metrics); the state is donated.
    eval_step: (variables, batch) -> metrics, without dropout.
    variables: (what is trained, frozen) -> the collections of the model.
    optimizer: of optax.
    state: shapes, dtypes and shardings of the training state.
    frozen: likewise, of the parameters that are not trained, were they float32, or
      integers and their scales; and, under `recipe.REFERENCE`, of what is trained as the
      run began, where the recipe asks for it. Else {}.
    batch: likewise, of a batch.
    attention: the backend, and why it was chosen.
  """

  train_step: Any
  eval_step: Any
  variables: Callable[[Any, Any], dict[str, Any]]
  optimizer: optax.GradientTransformation
  state: state.State
  frozen: Any
  batch: Any
  attention: tuple[str, str]


def in_words(built: Program, config: TrainConfig, layout: sharding.Layout) -> str:
  """Parameters, devices and positions, for a person."""
  backend, why = built.attention
  count = state.count(built.state['params'])
  of_all = f' of {count + count_frozen(built):,}' if config.in_part else ''
  return (
    f'{count:,}{of_all} parameters on {layout.size} '
    f'{layout.device_kind} device(s), mesh {layout.shape}; {config.batch_size} x '
    f'{config.recipe.length} positions a step; attention: {backend} ({why})'
  )


def build(
  config: TrainConfig,
  layout: sharding.Layout,
  quantized: Mapping[str, int] | None = None,
) -> Program:
  """Builds it; nothing is computed or allocated.

  Args:
    config: of a run, its model resolved.
    layout: the mesh, of devices that are here or only described.
    quantized: bits and group of the integers that what is not trained is stored in.

  Raises:
    UserError: the configuration does not fit the mesh or the device.
  """
  recipe = config.recipe
  length = recipe.length + adapters.virtual_tokens(config.adapters)
  sharding.check_fits(config.model, config.batch_size, config.microbatches, length, layout)
  # Not jax.devices(): those of the layout may only be described.
  device = layout.devices.flat[0]
  backend, why = attention.choose(config.model, config.compute, device, length)
  # 'auto' is resolved for the program alone; the run's configuration keeps it, so that
  # resuming on another device is the same run.
  compute = dataclasses.replace(config.compute, attention=backend)
  loss_fn, variables = computation(config, compute, quantized)
  # How many steps epochs are, the data say: until then, that it fits is all one can ask.
  update = optimizer.make_optimizer(config.optimizer, config.train_steps or 1)
  train_step = step.make_train_step(
    loss_fn,
    update,
    microbatches=config.microbatches,
    seed=config.seed,
    dtype=compute.dtype,
    counts=recipe.counts,
    variables=variables,
    guarded=config.guard,
  )
  leaves = all_leaves(config)
  abstract = state.abstract_state(config.model, update, layout, leaves, config.pattern)
  return Program(
    train_step=jax.jit(
      train_step,
      donate_argnums=0,
      compiler_options=flags.compiler_options(device.device_kind),
    ),
    eval_step=step.make_eval_step(loss_fn, recipe.counts),
    variables=variables,
    optimizer=update,
    state=abstract,
    frozen=parts(config, layout, quantized)[1],
    batch=jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(
        a.shape, a.dtype, sharding=sharding.batch_sharding(layout, a.ndim)
      ),
      recipe.batch(config),
    ),
    attention=(backend, why),
  )


def count_frozen(built: Program) -> int:
  """Number of parameters that are not trained; scales of integers are none."""
  flat = traverse_util.flatten_dict(built.frozen)
  return sum(
    leaf.size
    for path, leaf in flat.items()
    if path[-1] != integers.SCALE and path[0] != REFERENCE
  )


def all_leaves(config: TrainConfig) -> dict[str, Any]:
  """What is trained beside the model's own parameters, of the recipe and of adapters."""
  return config.recipe.leaves(config) | adapters.leaves(config.adapters, config.model)


def parts(
  config: TrainConfig, layout: sharding.Layout | None, quantized: Mapping[str, int] | None
) -> tuple[Any, Any]:
  """Shapes, dtypes and (given a layout) shardings of what is trained, and of the rest."""
  leaves = all_leaves(config)
  params = state.abstract_params(config.model, layout, leaves)
  params, frozen = trained.split(params, config.pattern, leaves)
  frozen = collections.stored(frozen, quantized)
  if config.recipe.reference:
    frozen = {**frozen, REFERENCE: _as_began(config, params)}
  return params, frozen


def _as_began(config: TrainConfig, params: Any) -> Any:
  """Shapes of the copy that a reference is, of those of what is trained."""
  own = {k: v for k, v in params.items() if k not in config.recipe.leaves(config)}
  dtypes = jax.eval_shape(lambda tree: step.cast(tree, config.compute.dtype), own)
  return jax.tree.map(
    lambda a, cast: jax.ShapeDtypeStruct(a.shape, cast.dtype, sharding=a.sharding),
    own,
    dtypes,
  )


def computation(
  config: TrainConfig, compute: models.ComputeConfig, quantized: Mapping[str, int] | None
) -> tuple[LossFn, Callable[[Any, Any], dict[str, Any]]]:
  """The loss, and the collections that it takes of (what is trained, frozen)."""
  loss = config.recipe.loss(config, models.build(config.model, compute))
  P = adapters.virtual_tokens(config.adapters)

  def opened(variables: Any, batch: Any, *rest: Any) -> Any:
    return loss(variables, virtual.opened_batch(batch, P), *rest)

  def variables(params: Any, frozen: Any) -> dict[str, Any]:
    rest = {name: tree for name, tree in frozen.items() if name != REFERENCE}

    def of(trees: Any) -> dict[str, Any]:
      whole = trained.merge(trees, rest)
      return adapters.variables(config.adapters, config.model, whole, quantized)

    began = {k: of(frozen[k]) for k in (REFERENCE,) if k in frozen}
    return {**of(params), **began}

  return opened if P else loss, variables
