"""Adapters: few parameters that are trained beside a model that stays as it is.

LoRA (Hu et al., 2021), on integers also QLoRA (Dettmers et al., 2023), and P-tuning v2
(Liu et al., 2022). What is trained of them lies in the state's parameters as the trees
`adapters` and `prefix`; `variables` makes of these what the modules of `glm_jax.models`
read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from glm_jax import configs
from glm_jax.checkpoints import variables as collections
from glm_jax.configs import POSITIVE, within
from glm_jax.models import quantized as integers
from glm_jax.models import virtual
from glm_jax.training import state

FACTORS, PREFIX = NAMES = ('adapters', 'prefix')
"""Trees of what is trained: LoRA's factors, and P-tuning's encoder of virtual tokens."""

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
  """Factors a and b beside weights of layers: `x w + scaling (x a) b`.

  Attributes:
    rank: of each product a b.
    alpha: the scaling is alpha / rank.
    dropout: on the inputs of a.
    targets: pattern of the paths of weights, matched whole as `TrainConfig.trained` is:
      'layers/.*' for all products of layers, 'layers/attention/(q|v)/weight' for two.
    rank_stabilized: the scaling is alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski,
      2023), with which a higher rank does not learn more slowly.
  """

  rank: Annotated[int, POSITIVE] = 8
  alpha: Annotated[float, POSITIVE] = 16.0
  dropout: Annotated[float, within('[0, 1)')] = 0.0
  targets: str = 'layers/.*'
  rank_stabilized: bool = False

  def __post_init__(self):
    configs.check_fields(self)
    configs.check_pattern('LoRAConfig.targets', self.targets)

  @property
  def scaling(self) -> float:
    return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTuningConfig:
  """Virtual tokens before each row's document, with keys and values of their own.

  Attributes:
    tokens: P, how many; a row is so much longer.
    projection: whether keys and values are computed from embeddings by two layers, as
      ChatGLM's `prefix_projection` has it, or are themselves what is learnt.
  """

  tokens: Annotated[int, POSITIVE] = 128
  projection: bool = False

  def __post_init__(self):
    configs.check_fields(self)


Adapters = LoRAConfig | PTuningConfig
KINDS = {'lora': LoRAConfig, 'ptuning': PTuningConfig}


def to_dict(config: Adapters) -> dict[str, Any]:
  """As JSON, for run.json and checkpoints."""
  kind = next(name for name, known in KINDS.items() if type(config) is known)
  # What merges factors need not know how they were trained.
  scaling = {'scaling': config.scaling} if isinstance(config, LoRAConfig) else {}
  return {'kind': kind, **dataclasses.asdict(config), **scaling}


def from_dict(content: Mapping[str, Any]) -> Adapters:
  """The inverse of `to_dict`; raises UserError for what it never gives."""
  try:
    kind = KINDS[content['kind']]
    values = {field.name: content[field.name] for field in dataclasses.fields(kind)}
  except (KeyError, TypeError) as error:
    raise configs.UserError(
      f'adapters of a checkpoint must be of a kind in {tuple(KINDS)}, with its fields, got '
      f'{content!r:.80}; use the version that wrote it.'
    ) from error
  return kind(**values)


def leaves(config: Adapters | None, model: Any) -> dict[str, Any]:
  """What is trained of adapters, as `state.Leaves`.

  Args:
    config: of a run; None for one without.
    model: its configuration.

  Raises:
    UserError: `targets` matches no product, or the rank is no less than a matrix's.
  """
  if config is None:
    return {}
  if isinstance(config, PTuningConfig):
    return {PREFIX: functools.partial(_encoder, config, model)}
  ranks = dict.fromkeys(_targets(config, model), config.rank)
  return {FACTORS: factors(model, ranks)}


def stored(
  content: Mapping[str, Any], model: Any, held: Mapping[Path, Any]
) -> dict[str, Any]:
  """`leaves` of the adapters in a checkpoint, whose ranks may differ by weight.

  Args:
    content: what it says of them.
    model: its configuration.
    held: what it holds, see `glm_jax.checkpoints.stored_leaves`.
  """
  config = from_dict(content)
  if isinstance(config, PTuningConfig):
    return leaves(config, model)
  ranks = {
    (*path[1:-1], 'weight'): leaf.shape[-1]
    for path, leaf in held.items()
    if path[0] == FACTORS and path[-1] == 'a'
  }
  return {FACTORS: factors(model, ranks)}


def _targets(config: LoRAConfig, model: Any) -> list[Path]:
  weights = _products(model)
  chosen = [path for path in weights if re.fullmatch(config.targets, '/'.join(path))]
  configs.check(
    bool(chosen),
    "LoRAConfig.targets must match paths of layers' weights",
    f'{config.targets!r}, and there are {", ".join(map("/".join, weights))}',
    "write one that matches, such as 'layers/attention/.*'",
  )
  for path in chosen:
    inputs, outputs = _sizes(path, weights[path][0])
    configs.check(
      config.rank <= min(inputs, outputs),
      'LoRAConfig.rank must not be above that of a matrix',
      f'{config.rank} for {"/".join(path)} of {inputs} x {outputs}',
      'lower it',
    )
  return chosen


def _sizes(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
  """Inputs and outputs of a layer's product."""
  count = integers.inputs_of(path)
  return math.prod(shape[1 : 1 + count]), math.prod(shape[1 + count :])


@functools.lru_cache
def _products(model: Any) -> dict[Path, tuple[tuple[int, ...], tuple[str, ...]]]:
  """Shape and logical axes of each weight that factors may stand beside."""
  boxed = jax.eval_shape(lambda: state.init_params(model, jax.random.key(0)))
  flat = traverse_util.flatten_dict(boxed)
  return {p: (flat[p].value.shape, flat[p].names) for p, _ in integers.products(flat)}


def factors(model: Any, ranks: Mapping[Path, int]) -> Any:
  """key -> the tree of a [L, *inputs, rank] and b [L, rank, *outputs], boxed.

  As peft begins (tuners/lora/layer.py, reset_lora_parameters): a is uniform within
  1 / sqrt(inputs), Kaiming's with a negative slope of sqrt(5), and b is 0, so that the
  model is what it was.

  Args:
    model: its configuration.
    ranks: by the path of the weight.
  """

  def init(key: jax.Array) -> Any:
    flat = {}
    for path, rank in ranks.items():
      shape, axes = _products(model)[path]
      cut = 1 + integers.inputs_of(path)
      bound = 1 / math.sqrt(_sizes(path, shape)[0])
      # By name: another target more does not change this one.
      own = jax.random.fold_in(key, zlib.crc32('/'.join(path).encode()))
      a = jax.random.uniform(own, (*shape[:cut], rank), minval=-bound, maxval=bound)
      b = jnp.zeros((shape[0], rank, *shape[cut:]))
      flat[(*path[:-1], 'a')] = nn.LogicallyPartitioned(a, (*axes[:cut], None))
      flat[(*path[:-1], 'b')] = nn.LogicallyPartitioned(b, (axes[0], None, *axes[cut:]))
    return traverse_util.unflatten_dict(flat)

  return init


def _encoder(config: PTuningConfig, model: Any, key: jax.Array) -> Any:
  """See `virtual.prefix`; sizes and beginning as in PrefixEncoder of ChatGLM's code."""
  P, D = config.tokens, model.hidden_size
  out = 2 * model.num_layers * model.num_kv_heads * model.head_size
  keys = jax.random.split(key, 5)
  if not config.projection:
    return {'embedding': jax.random.normal(keys[0], (P, out))}
  # ChatGLM2's and ChatGLM3's embed in the width of what comes out.
  E = out if model.causal else D

  def linear(keys: Any, inputs: int, outputs: int, axes: Any) -> Any:
    # As torch.nn.Linear begins.
    bound = 1 / math.sqrt(inputs)
    draw = lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    weight = nn.LogicallyPartitioned(draw(keys[0], (inputs, outputs)), axes)
    return {'weight': weight, 'bias': draw(keys[1], (outputs,))}

  return {
    'embedding': jax.random.normal(keys[0], (P, E)),
    'hidden': linear(keys[1:3], E, D, (None, 'embed')),
    'out': linear(keys[3:5], D, out, ('embed', None)),
  }


def variables(
  config: Adapters | None,
  model: Any,
  params: Mapping[str, Any],
  quantized: Mapping[str, int] | None = None,
) -> dict[str, Any]:
  """The collections of a model, of all of its parameters, trained and frozen.

  Args:
    config: of the run's adapters.
    model: a model configuration.
    params: with the trees of `leaves`, and scales beside integers.
    quantized: see `glm_jax.checkpoints.variables`.
  """
  rest = {name: tree for name, tree in params.items() if name not in NAMES}
  return collections.split(rest, quantized) | beside(config, model, params)


def beside(
  config: Adapters | None, model: Any, params: Mapping[str, Any]
) -> dict[str, Any]:
  """The collections of adapters alone; see `variables`."""
  result = {}
  if PREFIX in params:
    result[PREFIX] = virtual.prefix(model, params[PREFIX])
  if FACTORS in params:
    flat = traverse_util.flatten_dict(params[FACTORS])
    for path in [path for path in flat if path[-1] == 'b']:
      flat[path] *= config.scaling
      if config.dropout:
        rate = jnp.full((len(flat[path]),), config.dropout, jnp.float32)
        flat[(*path[:-1], 'rate')] = rate
    result[FACTORS] = traverse_util.unflatten_dict(flat)
  return result


def virtual_tokens(config: Adapters | None) -> int:
  """P, positions by which a row is longer than its recipe's."""
  return config.tokens if isinstance(config, PTuningConfig) else 0


@functools.lru_cache
def weights(config: Adapters | None, model: Any) -> int:
  """Weights of adapters that a token is multiplied with."""
  if not isinstance(config, LoRAConfig):
    return 0
  shapes = _products(model)
  sizes = [(shapes[p][0][0], *_sizes(p, shapes[p][0])) for p in _targets(config, model)]
  return sum(L * config.rank * (inputs + outputs) for L, inputs, outputs in sizes)


def check_data(config: Adapters | None, decided: Mapping[str, Any]) -> None:
  """Raises UserError for rows that adapters cannot be trained on.

  Args:
    config: of the run's.
    decided: of its `recipe.Data`.
  """
  configs.check(
    not virtual_tokens(config) or not decided.get('packed'),
    'virtual tokens open rows of one document each',
    'rows that several documents are packed into',
    'set CorpusConfig.packed=False, or use LoRAConfig',
  )
