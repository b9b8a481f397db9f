"""What generating a token needs on devices one need not have."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from glm_jax import models, sharding
from glm_jax.checkpoints import variables
from glm_jax.inference import decode
from glm_jax.inference.sampling import Sampling
from glm_jax.models import cache as kv_cache
from glm_jax.models import quantized as integers
from glm_jax.performance.chips import Chip, of_device_kind
from glm_jax.planning import estimate, hlo, prediction, shapes
from glm_jax.training import state

GIB = 2**30
# Tokens between two looks of the host: what a device's program generates at a time.
_STEPS = 64


@dataclasses.dataclass(frozen=True)
class DecodePlan:
  """A token of each row.

  Attributes:
    rows: B.
    slots: S, of the cache.
    memory: bytes of a device: weights, cache, and the peak of a program that generates many
      tokens; limit.
    roofline_seconds: to read weights and cache once; None for an unknown chip.
    predicted_seconds: by the compiler's cycles; None where it has none, and of what does
      not fit.
    compile_seconds: of both programs.
  """

  rows: int
  slots: int
  memory: dict[str, int]
  roofline_seconds: float | None
  predicted_seconds: float | None
  compile_seconds: float

  def in_words(self, where: str) -> str:
    """A table for a person, one fact a line."""
    m = {kind: size / GIB for kind, size in self.memory.items()}
    of = f' of {m["limit"]:.2f}' if m['limit'] else ''
    lines = [
      ('topology', where),
      ('batch', f'{self.rows} rows, a cache of {self.slots:,} tokens each'),
      (
        'HBM a device',
        f'weights {m["weights"]:.2f}, cache {m["cache"]:.2f}, peak {m["peak"]:.2f}{of} GiB',
      ),
    ]
    for name, seconds in (
      ('memory roofline', self.roofline_seconds),
      ('predicted', self.predicted_seconds),
    ):
      if seconds:
        speed = f'{self.rows / seconds:,.0f} tokens/s'
        lines.append((name, f'{seconds * 1e3:.2f} ms a token of each row, {speed}'))
    lines.append(('compiled in', f'{self.compile_seconds:.0f} s'))
    width = max(len(name) for name, _ in lines)
    return '\n'.join(f'{name:<{width}}  {value}' for name, value in lines)


def predict(
  model: Any,
  layout: sharding.Layout,
  *,
  rows: int,
  slots: int,
  quantized: Mapping[str, int] | None = None,
  dtype: str = 'bfloat16',
  card: Chip | None = None,
) -> DecodePlan:
  """Compiles what generates with a model on these devices.

  Args:
    model: its configuration.
    layout: the mesh of the devices.
    rows: B.
    slots: S.
    quantized: {'bits', 'group'} of integers; None for weights of `dtype`.
    dtype: of activations, the cache, and weights that are no integers.
    card: what is known of the devices, if it is not what their kind says.

  Raises:
    UserError: a group that does not divide the inputs of a product.
  """
  began = time.perf_counter()
  token, loop, arguments = lower(model, layout, rows, slots, quantized, dtype)
  chip = card or of_device_kind(layout.device_kind)
  weights, cache = map(shapes.local_bytes, arguments)
  limit, predicted = chip.hbm_bytes if chip else 0, None
  # What is too large is a result, too: the compiler says by how much.
  needed, compiled = prediction.compile_or_measure(loop)
  if compiled is None:
    peak, limit = needed
  else:
    peak = prediction.peak(compiled, layout.device_kind)
    if chip and chip.clock_hz:
      step = hlo.read(token.compile().as_text())
      predicted = estimate.estimate(step, chip).step_seconds
  return DecodePlan(
    rows=rows,
    slots=slots,
    memory={
      'weights': weights,
      'cache': cache,
      'peak': peak,
      'limit': limit,
    },
    roofline_seconds=(weights + cache) / chip.hbm_bandwidth if chip else None,
    predicted_seconds=predicted,
    compile_seconds=time.perf_counter() - began,
  )


def lower(
  model: Any,
  layout: sharding.Layout,
  rows: int,
  slots: int,
  quantized: Mapping[str, int] | None,
  dtype: str,
) -> tuple[Any, Any, tuple[Any, Any]]:
  """One token a row, and a loop over many, lowered; and shapes of weights and cache."""
  params = state.abstract_params(model, layout)
  leaves = traverse_util.flatten_dict(params)
  for path, inputs in integers.products([*leaves]) if quantized else ():
    rows_in = math.prod(leaves[path].shape[1 : 1 + inputs])
    integers.check_group(quantized['group'], rows_in)
  abstract = variables.abstract(params, quantized)
  flat = traverse_util.flatten_dict(abstract)
  for path, leaf in flat.items():
    if leaf.dtype == jnp.float32 and path[-1] == 'weight' and path[0] == 'params':
      flat[path] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
  abstract = traverse_util.unflatten_dict(flat)
  module = models.build(model, models.ComputeConfig(dtype=dtype))
  ids = _whole(layout, jnp.int32, rows)
  cache = abstract_cache(model, layout, rows, slots, dtype)
  with sharding.active(layout):
    read = jax.jit(functools.partial(decode.read_token, module), donate_argnums=1)
    token = read.lower(abstract, cache, ids, ids, ids, ids)
  loop = lower_loop(module, layout, abstract, cache, _STEPS, Sampling())
  return token, loop, (abstract, cache)


def abstract_cache(
  model: Any, layout: sharding.Layout, rows: int, slots: int, dtype: str
) -> Any:
  """Shapes, dtypes and shardings of a cache."""
  with sharding.active(layout):
    cache = jax.eval_shape(lambda: kv_cache.init(model, rows, slots, dtype))
    spread = jax.NamedSharding(layout.mesh, kv_cache.spec(model, rows))
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=spread), cache
  )


def lower_loop(
  module: Any,
  layout: sharding.Layout,
  abstract: Any,
  cache: Any,
  most: int,
  sampling: Sampling,
) -> Any:
  """The program that generates up to `most` tokens a row, lowered.

  Args:
    module: a Flax module.
    layout: the mesh.
    abstract: shapes of the model's collections.
    cache: see `abstract_cache`.
    most: tokens.
    sampling: how they are chosen.
  """
  rows, _ = kv_cache.shape(cache)
  of = functools.partial(_whole, layout)
  ids = of(jnp.int32, rows)
  states = decode.RowStates(
    *[ids] * 8,
    seed=of(jnp.uint32, rows),
    end=ids,
    last=of(jnp.bool_, rows),
    done=of(jnp.bool_, rows),
    tokens=of(jnp.int32, rows, most),
    log_probs=of(jnp.float32, rows, most + 1),
  )
  advance = functools.partial(decode.advance, module, stops=(0,), sampling=sampling)
  with sharding.active(layout):
    return jax.jit(advance, donate_argnums=1).lower(
      abstract,
      cache,
      None,
      states,
      steps=of(jnp.int32),
      eager=of(jnp.bool_),
      allowed_V=of(jnp.bool_, module.config.vocab_size),
    )


def lower_reading(
  module: Any,
  layout: sharding.Layout,
  abstract: Any,
  cache: Any,
  length: int,
  dtype: str,
) -> Any:
  """The program in which all rows read contexts of up to `length` tokens, lowered."""
  rows, _ = kv_cache.shape(cache)
  of = functools.partial(_whole, layout, jnp.int32)
  read = functools.partial(
    decode.read_into, module, causal=module.config.causal, dtype=dtype
  )
  with sharding.active(layout):
    return jax.jit(read, donate_argnums=1).lower(
      abstract, cache, of(rows, length), of(rows), of(rows)
    )


def _whole(layout: sharding.Layout, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
  """What every device has all of."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(layout))
