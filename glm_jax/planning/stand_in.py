"""A checkpoint for a plan of a run whose `init_from` is not here, and what is of one."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from etils import epath

from glm_jax import checkpoints
from glm_jax.checkpoints import slices
from glm_jax.configs import UserError
from glm_jax.models import config as model_config
from glm_jax.text.vocabulary import ByteVocabulary
from glm_jax.training.config import TrainConfig


@contextlib.contextmanager
def present(config: TrainConfig) -> Iterator[TrainConfig]:
  """The run, with a checkpoint in place of an `init_from` that is not here.

  It has the vocabulary of bytes, since a recipe may ask which tokens are said, and no
  parameters: neither changes a size.

  Args:
    config: of a run, its model resolved.
  """
  if not config.init_from or _found(config.init_from):
    yield config
    return
  with tempfile.TemporaryDirectory() as folder:
    spec = slices.LeafSpec((1,), np.dtype('float32'))
    meta = {
      'model': model_config.to_dict(config.model),
      'vocabulary': ByteVocabulary().to_dict(),
    }
    read = lambda path, layer: np.zeros(1, np.float32)
    slices.write(Path(folder), {('none',): spec}, read, meta, lambda _: None)
    yield dataclasses.replace(config, init_from=folder)


def stored_dtype(config: TrainConfig) -> str | None:
  """That of most parameters in a run's `init_from`, by name; None if it is not here."""
  folder = _found(config.init_from) if config.init_from else None
  if folder is None:
    return None
  sizes = collections.Counter[str]()
  for spec in slices.StoredLeaves(folder).specs.values():
    # Integers have bits of their own.
    if jnp.issubdtype(spec.dtype, jnp.floating):
      sizes[spec.dtype.name] += spec.size
  return sizes.most_common(1)[0][0]


def _found(path: str) -> epath.Path | None:
  """The folder of a checkpoint; None if it is not here."""
  try:
    return checkpoints.find(path)
  except UserError:
    return None
