"""What fits my card: released models, what is trained of them, and the GPU that it takes.

python -m benchmarks.memory

counts each row from shapes, seconds each, and writes the table of launch/README.md. No
compiler and no GPU are needed, but the packages of `pip install -e '.[plan]'` are: without
tokamax, the attention that a GPU would be given needs more.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks import readme
from glm_jax.checkpoints import variables
from glm_jax.performance.chips import CHIPS
from glm_jax.planning import topologies

MODELS = {
  'GLM-Large': 'glm-large',
  'ChatGLM-6B': 'chatglm-6b',
  # Of the same sizes.
  'ChatGLM2-6B, ChatGLM3-6B': 'chatglm3-6b',
  'GLM-4-9B': 'glm-4-9b',
  'GLM-10B': 'glm-10b',
}

# What is trained, and how -> bindings.
WAYS: dict[str, tuple[str, ...]] = {
  'all, AdamW': (),
  'all, both moments in bfloat16': (
    "OptimizerConfig.first_moment_dtype='bfloat16'",
    "OptimizerConfig.second_moment_dtype='bfloat16'",
  ),
  'all, Adafactor without momentum': (
    "OptimizerConfig.algorithm='adafactor'",
    'OptimizerConfig.beta1=0.0',
  ),
  'attention': ("TrainConfig.trained='layers/attention/.*'",),
  'norms': ("TrainConfig.trained='.*norm/.*'",),
  'LoRA': ('TrainConfig.adapters=@LoRAConfig()',),
  'QLoRA, int4': ('TrainConfig.adapters=@LoRAConfig()',),
}
# Bits of what is not trained; else it is bfloat16.
BITS = {'QLoRA, int4': variables.of_channels(4)}

# By memory; of two with as much, both are named.
CARDS = ('rtx4090', 'a100-40', 'a100-80', 'h100', 'h200')
# One card, and as many as a host often has.
DEVICES = (1, 8)
# An estimate so near to a card's memory does not tell: see tests/fits_test.py.
_UNSURE = 0.08


class Need(NamedTuple):
  """Bytes of a device: of state and of the whole step at its peak."""

  state: int
  peak: int


def main() -> None:
  readme.write_section('memory', lines())


def need(released_name: str, way: str, devices: int) -> Need:
  """What a run of a released model needs on each of some GPUs."""
  topologies.prepare_environment()
  from glm_jax import bindings, sharding
  from glm_jax.planning import prediction, released
  from glm_jax.recipes import CONFIGURABLES
  from glm_jax.training.config import TrainConfig

  def load(*bound: str) -> TrainConfig:
    files = released.files(released_name)
    return bindings.load_config(
      TrainConfig, CONFIGURABLES, files, '', bound, placeholders=True
    )[0]

  config = load(*released.bindings(load().model, devices), *WAYS[way])
  # The kind of GPU changes nothing that is counted here.
  described = topologies.devices(f'h100:1x1x{devices}', compiler=False)
  layout = sharding.make_mesh(config.mesh, described)
  stored = prediction.Frozen(released.STORED, BITS.get(way))
  memory = prediction.from_shapes(config, layout, stored=stored).memory
  held = ('parameters', 'frozen', 'optimizer')
  return Need(sum(memory.get(kind, 0) for kind in held), memory['peak'])


def cards(peak: int) -> str:
  """The smallest cards that hold so many bytes, for a person.

  Example:
    >>> cards(30 * 2**30), cards(22 * 2**30), cards(2**50)
    ('a100-40', 'rtx4090?', 'none')
  """
  sizes = {name: CHIPS[name].hbm_bytes for name in CARDS}
  size = min((size for size in sizes.values() if size >= peak), default=None)
  if size is None:
    return 'none'
  doubt = '?' if peak > (1 - _UNSURE) * size else ''
  return ', '.join(name + doubt for name, own in sizes.items() if own == size)


def lines() -> list[str]:
  """The table."""
  table = [
    '| model | trained | state, GiB | step, GiB | smallest card | on 8 cards, GiB each |',
    '|---|---|---|---|---|---|',
  ]
  for model, name in MODELS.items():
    for way in WAYS:
      one, eight = (need(name, way, devices) for devices in DEVICES)
      print(model, way, flush=True)
      table.append(
        f'| {model} | {way} | {one.state / 2**30:.1f} | ~{one.peak / 2**30:.1f} | '
        f'{cards(one.peak)} | ~{eight.peak / 2**30:.1f} |'
      )
  return [
    *table,
    '',
    'Batches of 8 rows of 1,024 tokens (GLM-Large: 512), bfloat16, full remat; on 8 cards '
    '`MeshConfig.fsdp=8`. State: parameters and moments, exact, and what is not trained in '
    'bfloat16, or int4. LoRA: rank 8 beside every product of a layer. Step: with gradients '
    'and activations at the peak, from shapes; a `?` is too near to tell. (Written by '
    '`python -m benchmarks.memory`.)',
  ]


if __name__ == '__main__':
  main()
