"""What is said of a checkpoint that is not as it was saved."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from glm_jax.configs import UserError


class Damaged(UserError):
  """A checkpoint is not as it was saved.

  Attributes:
    folder: of it.
    reason: in a few words.
  """

  def __init__(self, folder: Any, reason: str):
    super().__init__(
      f'a checkpoint must be complete and undamaged, got {folder} ({reason}); use another '
      'one (python -m glm_jax.checkpoints lists those of a run).'
    )
    self.folder, self.reason = folder, reason


@contextlib.contextmanager
def unreadable(folder: Any, item: str) -> Iterator[None]:
  """Orbax and TensorStore raise many kinds of errors for a damaged item of a checkpoint.

  Raises:
    Damaged: in place of theirs, which are kilobytes of JSON.
  """
  try:
    yield
  except UserError:
    raise  # a refusal, which says more
  except Exception as error:
    # Of an index that leads nowhere, Orbax returns None and stumbles over it later.
    stumbled = isinstance(error, AttributeError | KeyError | TypeError)
    why = '' if stumbled else f': {type(error).__name__}'
    raise Damaged(folder, f'a file of {item} cannot be read{why}') from error


@functools.cache
def tell(line: str) -> None:
  """Says something of a checkpoint to whoever reads it, once."""
  print(f'note: {line}', file=sys.stderr, flush=True)


def not_compared(folder: Any) -> str:
  """Of a checkpoint from before there were digests."""
  return f'{folder} has no digests: what is read is not compared with what was saved'
