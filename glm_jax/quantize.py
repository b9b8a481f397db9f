"""Makes integers of the weights of a checkpoint's layers.

The phases, in order: what SRC is, what DST becomes, checks (groups, room on the disk),
writing beside DST, and the renaming that makes it DST. Embeddings, the head, norms and
biases stay as they are. An interrupted call goes on where it stopped when the same command
is run again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from glm_jax import checkpoints, cli, configs, opening
from glm_jax.checkpoints import beside, slices, verifying
from glm_jax.models import config as model_config
from glm_jax.models import quantized


class IntegerLeaves:
  """The leaves of a checkpoint, with integers and their scales in place of weights.

  Attributes:
    specs: shape and dtype by path; scales stand behind their weight.
  """

  def __init__(self, leaves: slices.Merged, bits: int, group: int):
    """
    Args:
      leaves: of a plain checkpoint.
      bits: see `glm_jax.models.quantized.quantize`.
      group: likewise.

    Raises:
      UserError: the group does not divide the inputs of a product.
    """
    self._leaves, self._bits, self._group = leaves, bits, group
    self._last: tuple = (None, None)
    self.specs: dict[slices.LeafPath, slices.LeafSpec] = dict(leaves.specs)
    for path, inputs in quantized.products(leaves.specs):
      layers, *shape = leaves.specs[path].shape
      quantized.check_group(group, int(np.prod(shape[:inputs])))
      of_scales = (layers, *quantized.scales_shape(tuple(shape), inputs, group))
      # Taken out and put back, so that nothing is between the two: see `read`.
      spec = self.specs.pop(path)._replace(dtype=quantized.DTYPES[bits])
      self.specs |= {
        path: spec,
        quantized.scale_of(path): slices.LeafSpec(of_scales, np.dtype(np.float32)),
      }

  def read(self, path: slices.LeafPath, layer: int | None) -> np.ndarray:
    """A leaf, or one layer of a stacked one."""
    of_scales = path[-1] == quantized.SCALE
    weight = (*path[:-1], 'weight') if of_scales else path
    inputs = quantized.inputs_of(weight)
    if not inputs:
      return self._leaves.read(path, layer)
    # Both are made at once, and asked for one after the other.
    if self._last[0] != (weight, layer):
      values = self._leaves.read(weight, layer)
      pair = quantized.quantize(values, inputs, self._bits, self._group)
      self._last = ((weight, layer), pair)
    return self._last[1][of_scales]


def quantize(flags: argparse.Namespace) -> None:
  """The command.

  Args:
    flags: src, dst, bits, group.

  Raises:
    UserError: anything about the files and the flags that a user can mend.
    ResourceError: no room.
  """
  began = time.perf_counter()
  for name, path in (('SRC', flags.src), ('DST', flags.dst)):
    configs.check_value(name, path, configs.LOCAL)
  dst = Path(flags.dst)
  beside.check_free(dst)

  # What SRC is; what a run did not train is in the checkpoint that it began with.
  folder = verifying.find(flags.src)
  meta = checkpoints.read_meta(folder)
  configs.check(
    not meta.get('quantized'),
    'SRC must hold plain weights',
    f'{flags.src!r}, which is quantised to {meta.get("quantized", {}).get("bits")} bits',
    'give the checkpoint that it was made from',
  )
  stored = slices.StoredLeaves(folder)
  opening.check_shapes(model_config.from_dict(meta['model']), stored.specs, folder)
  leaves = slices.Merged(stored, stored)

  # What DST becomes; a group that does not divide is refused here.
  made = IntegerLeaves(leaves, flags.bits, flags.group)
  kind = {'bits': flags.bits, 'group': flags.group}
  content = {
    'model': meta['model'],
    'vocabulary': meta['vocabulary'],
    'source': meta.get('source') or {},
    'step': int(meta.get('step', 0)),
    'quantized': kind,
  }
  before, after = (
    sum(spec.nbytes for spec in specs.values()) for specs in (leaves.specs, made.specs)
  )

  # Writing, beside DST.
  with beside.written(
    dst,
    {'files': beside.files_of(Path(folder)), **kind},
    room=after,
    total=after,
    doing='quantising',
  ) as (partial, progress):
    slices.write(partial, made.specs, made.read, content, progress)
  print(
    f'{flags.bits} bits: {slices.count(made.specs):,} parameters, {before / 1e6:,.1f} MB '
    f'before and at most {after / 1e6:,.1f} MB now, in {dst} '
    f'({time.perf_counter() - began:.0f} s)'
  )


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = _flags().parse_args(argv)
  # In host memory: accelerators are left to whoever trains on them.
  jax.config.update('jax_platforms', 'cpu')
  quantize(flags)


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'quantize',
    "Makes integers of the weights of a checkpoint's layers.",
    'python -m glm_jax.quantize runs/mine runs/mine-int4 --bits=4 --group=128',
  )
  flags.add_argument('src', metavar='SRC', help='a MODEL_DIR or one checkpoint folder')
  flags.add_argument('dst', metavar='DST', help='a folder that does not exist yet')
  flags.add_argument(
    '--bits', type=int, choices=quantized.BITS, required=True, help='of an integer'
  )
  flags.add_argument(
    '--group',
    type=int,
    default=0,
    metavar='N',
    help='neighbouring inputs that share a scale, such as 128; more of them are nearer to '
    'the weights and slower (0: one scale for each output)',
  )
  return flags


if __name__ == '__main__':
  cli.main(main)
