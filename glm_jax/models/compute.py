"""How a model is computed: what a run may change without becoming another model."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from glm_jax import configs
from glm_jax.attention import BACKENDS
from glm_jax.configs import at_least, one_of

REMAT_POLICIES = (
  'none',
  'full',
  'attention',
  'attention_qkv',
  'projections',
  'offload',
  'dots',
  'dots_no_batch',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
  """How a model of any family is computed; no checkpoint's model depends on it.

  Attributes:
    dtype: of activations; parameters are float32.
    remat: what the backward pass recomputes of a layer: nothing ('none'), all ('full'),
      all but the output of attention ('attention'), and but queries, keys and values
      ('attention_qkv'), and but the MLP's gate and up and the output projection
      ('projections'); the same without gate and up, and all but attention's output kept in
      the host's memory ('offload', TPU and GPU); all but its matmuls ('dots'), all but
      its weight matmuls ('dots_no_batch').
    attention: of `glm_jax.attention.BACKENDS`; 'auto' is the best for the device.
    unroll: layers in one turn of the loop over layers, or fewer in the last; 0 for all,
      which then is no loop. One turn compiles fastest; without a loop nothing that the
      backward pass needs is copied, which pays on a GPU (`python -m benchmarks.step`), and
      a little on a CPU (`python -m benchmarks.adapters`).
  """

  dtype: Annotated[str, one_of('float32', 'bfloat16')] = 'float32'
  remat: Annotated[str, one_of(*REMAT_POLICIES)] = 'none'
  attention: Annotated[str, one_of(*BACKENDS)] = 'auto'
  unroll: Annotated[int, at_least(0).but('use 0 for all layers')] = 1

  def __post_init__(self):
    configs.check_fields(self)
