"""A run's step and what its stage computes between updates: does each fit beside the rest?

A policy answers questions and reads its answers with the weights that it trains: while one
of these programs runs, the others' arrays stay where they are. What a run needs is the
largest of its programs and all that is there beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from glm_jax import models, sharding
from glm_jax.checkpoints import variables as collections
from glm_jax.inference import engine
from glm_jax.inference.sampling import Sampling
from glm_jax.performance.chips import Chip
from glm_jax.planning import decoding, prediction, shapes
from glm_jax.planning.prediction import Frozen, Prediction
from glm_jax.training import adapters, program, state, trained
from glm_jax.training.config import TrainConfig
from glm_jax.training.recipe import REFERENCE, Between
from glm_jax.training.step import cast

STEP = 'step'
"""Among the programs of a run, the one that trains."""


class Part(NamedTuple):
  """A program that runs between updates.

  Attributes:
    name: for a person.
    lower: for its devices.
    arguments: shapes of all that it is given.
    own: of these, what is there for it alone.
    work: estimates the bytes of a device that it needs besides.
  """

  name: str
  lower: Callable[[], Any]
  arguments: Any
  own: Any
  work: Callable[[], float]


def predict(
  config: TrainConfig,
  layout: sharding.Layout,
  card: Chip | None = None,
  stored: Frozen = Frozen(),
) -> Prediction:
  """Compiles all programs of a run; see `prediction.predict`.

  Raises:
    UserError: the configuration does not fit the mesh or the chip's kernels.
  """
  return _with_parts(config, layout, prediction.predict, _compiled, card, stored)


def from_shapes(
  config: TrainConfig,
  layout: sharding.Layout,
  card: Chip | None = None,
  stored: Frozen = Frozen(),
) -> Prediction:
  """The same in seconds, estimated; see `prediction.from_shapes`."""
  of_part = lambda part, _: shapes.local_bytes(part.own) + part.work()
  return _with_parts(config, layout, prediction.from_shapes, of_part, card, stored)


def _compiled(part: Part, layout: sharding.Layout) -> float:
  """Bytes of a device that a program needs besides what is there without it."""
  # The GPU kernels ask which GPU they are traced for.
  with jax.default_device(layout.devices.flat[0]):
    lowered = part.lower()
  needed, compiled = prediction.compile_or_measure(lowered)
  kind = layout.device_kind
  peak = needed[0] if compiled is None else prediction.peak(compiled, kind)
  # What it is given twice is there once.
  return peak - shapes.local_bytes(part.arguments) + shapes.local_bytes(part.own)


def _with_parts(
  config: TrainConfig,
  layout: sharding.Layout,
  of_step: Callable[..., Prediction],
  of_part: Callable[[Part, sharding.Layout], float],
  card: Chip | None,
  stored: Frozen,
) -> Prediction:
  step = of_step(config, layout, card, stored)
  between = config.recipe.programs(config)
  if between is None:
    return step
  began = time.perf_counter()
  built = prediction.build(config, layout, stored)
  others = [state.abstract_params(model, layout) for model in between.others]
  beside = shapes.local_bytes((spread(between.kept, layout), others))
  resident = beside + shapes.local_bytes((built.state, built.frozen))
  programs = {STEP: step.memory['peak'] + beside}
  for part in parts(config, between, built, layout, stored):
    programs[part.name] = int(resident + of_part(part, layout))
  peak, limit = max(programs.values()), step.memory['limit']
  return dataclasses.replace(
    step,
    memory={**step.memory, 'resident': resident, 'peak': peak},
    programs=programs,
    fits=step.fits and (not limit or peak <= limit),
    compile_seconds=step.compile_seconds + time.perf_counter() - began,
  )


def spread(rows: Any, layout: sharding.Layout) -> Any:
  """Shapes of rows, over the devices as a batch is."""
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=sharding.batch_sharding(layout, len(a.shape))
    ),
    rows,
  )


def parts(
  config: TrainConfig,
  between: Between,
  built: program.Program,
  layout: sharding.Layout,
  stored: Frozen,
) -> list[Part]:
  """What is to be compiled: scoring, reading questions, generating.

  Args:
    config: of the run, its model resolved.
    between: of its recipe.
    built: its program.
    layout: the mesh.
    stored: see `Frozen`.
  """
  # Only where they are asked for: they take seconds.
  needed = functools.cache(
    lambda: shapes.rows(config, built.attention[0], stored.quantized)
  )
  return [
    _scoring(config, between, built, layout, needed),
    *_generating(config, between, built, layout, stored, needed),
  ]


def _scoring(
  config: TrainConfig,
  between: Between,
  built: program.Program,
  layout: sharding.Layout,
  needed: Callable[[], shapes.Rows],
) -> Part:
  params, frozen = built.state['params'], built.frozen
  rows = spread(between.rows, layout)
  compute = dataclasses.replace(config.compute, attention=built.attention[0])
  module = models.build(config.model, compute)

  def score(params: Any, frozen: Any, rows: Any) -> Any:
    return between.score(module, built.variables(params, frozen), rows)

  def lower() -> Any:
    with sharding.active(layout):
      return jax.jit(score).lower(params, frozen, rows)

  def work() -> float:
    dtype = config.compute.dtype
    share = between.rows.tokens.shape[0] / layout.count('act_batch')
    copies = sum(shapes.copied_bytes(tree, dtype) for tree in (params, frozen))
    return copies + shapes.forward(config, layout, needed(), share)

  return Part('scoring', lower, (params, frozen, rows), rows, work)


def _generating(
  config: TrainConfig,
  between: Between,
  built: program.Program,
  layout: sharding.Layout,
  stored: Frozen,
  needed: Callable[[], shapes.Rows],
) -> list[Part]:
  model, dtype = config.model, config.compute.dtype
  # A token at a time is no length to be cut.
  layout = layout.replace(act_length=None)
  whole = _own(config, built, stored)
  weights = jax.eval_shape(lambda tree: cast(tree, dtype), whole)
  # What has its dtype already is not copied.
  copied = lambda a, b: b.update(sharding=a.sharding)
  weights = jax.tree.map(copied, whole, weights)
  copy = [
    b
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(weights), strict=True)
    if a.dtype != b.dtype
  ]
  with sharding.active(layout):
    rows = engine.batch_rows(between.asked, between.at_a_time)
  longest = between.context + between.most + 1
  slots = engine.bucket(max(longest, between.slots))
  cache = decoding.abstract_cache(model, layout, rows, slots, dtype)
  length = engine.bucket(min(between.context, engine.PIECE if model.causal else slots))
  length = min(length, slots)
  compute = engine.with_kernel(model, config.compute, layout.devices.flat[0])
  module = models.build(model, compute)
  sampling = Sampling(temperature=between.temperature)
  arguments, own = (weights, cache), (copy, cache)
  # Gathered for all rows, where it is spread.
  head = 0.0
  if layout.count('embed') > 1:
    head, _ = shapes.gathered(config, layout.count('act_heads'))

  def reading() -> float:
    contexts, share = length / slots, rows / layout.count('act_batch')
    work = shapes.layer_work(config, layout, needed(), length)
    return shapes.local_bytes(cache) * contexts + share * work + head

  return [
    Part(
      'reading questions',
      lambda: decoding.lower_reading(module, layout, weights, cache, length, dtype),
      arguments,
      own,
      reading,
    ),
    Part(
      'generating',
      lambda: decoding.lower_loop(module, layout, weights, cache, between.most, sampling),
      arguments,
      own,
      lambda: shapes.local_bytes(cache) + head,
    ),
  ]


def _own(config: TrainConfig, built: program.Program, stored: Frozen) -> dict[str, Any]:
  """Shapes of the collections that a policy generates with, as they are kept."""
  rest = {name: tree for name, tree in built.frozen.items() if name != REFERENCE}
  whole = trained.merge(built.state['params'], rest)
  leaves = config.recipe.leaves(config)
  beside = {name: tree for name, tree in whole.items() if name in adapters.NAMES}
  of_model = {k: v for k, v in whole.items() if k not in beside and k not in leaves}
  return collections.split(of_model, stored.quantized) | beside
