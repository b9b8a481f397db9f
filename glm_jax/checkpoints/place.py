"""Where a stream that is not a function of its step stands, beside the checkpoint.

Only tasks of a user's own have such a place: a file of each process, which only as many
processes can go on from.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from glm_jax import configs

ITEM = 'place'


class PlaceHandler(ocp.CheckpointHandler):
  """Writes and reads the item `place`: every process its own file."""

  def save(self, directory: epath.Path, args: SavePlace) -> None:
    args.stream.save(str(directory / _name(jax.process_index(), jax.process_count())))

  def restore(self, directory: epath.Path, args: RestorePlace) -> None:
    # A stream saves a TensorFlow checkpoint: NAME.index, with NAME.data-* beside it.
    matches = [
      re.fullmatch(r'process-\d+-of-(\d+)\.index', f.name) for f in directory.iterdir()
    ]
    counts = {int(match[1]) for match in matches if match}
    count = jax.process_count()
    configs.check(
      counts == {count},
      'a task that is not indexed goes on with as many processes as it had',
      f'{sorted(counts)} then and {count} now for {directory}',
      "start as many again, or make shards of it (make_shards, corpus='task:NAME')",
    )
    args.stream.restore(str(directory / _name(jax.process_index(), count)))


# Orbax finds the handler of a Composite's item by the type of its arguments.
@ocp.args.register_with_handler(PlaceHandler, for_save=True)
@dataclasses.dataclass
class SavePlace(ocp.args.CheckpointArgs):
  """`stream` is a `glm_jax.data.pipeline.Stream`."""

  stream: Any


@ocp.args.register_with_handler(PlaceHandler, for_restore=True)
@dataclasses.dataclass
class RestorePlace(ocp.args.CheckpointArgs):
  """`stream` is taken to its place."""

  stream: Any


def _name(index: int, count: int) -> str:
  return f'process-{index}-of-{count}'
