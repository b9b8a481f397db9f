"""The registered tasks: glm_blank, glm_document, glm_sentence, glm_mixture, glm_causal."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import seqio

from glm_jax.batch import MIXED
from glm_jax.data import preprocessors
from glm_jax.data.causal import causal
from glm_jax.data.objective_config import ObjectiveConfig
from glm_jax.data.rows import Rows
from glm_jax.data.source import IndexedRows
from glm_jax.text.vocabulary import Vocabulary

MIXTURE = 'glm_mixture'
CAUSAL = 'glm_causal'
NAMES = (*(f'glm_{name}' for name in MIXED), MIXTURE, CAUSAL)


def register(
  rows: dict[str, Rows], vocabulary: Vocabulary, config: ObjectiveConfig
) -> None:
  """(Re-)registers the four tasks of objectives over these rows.

  They are seqio tasks like any other; their examples are whole batches, made by one
  batched op. A mixture of objectives is one task, since a seqio Mixture of three would
  read every document three times, with the same random numbers each time.
  """
  configs = {f'glm_{name}': config.only(name) for name in MIXED}
  configs[MIXTURE] = config
  for name, objective in configs.items():
    make = functools.partial(
      preprocessors.glm_mixture, vocabulary=vocabulary, config=objective
    )
    _register(name, rows, vocabulary, make)


def register_causal(rows: dict[str, Rows], vocabulary: Vocabulary) -> None:
  """(Re-)registers the task of next tokens over these rows."""
  _register(CAUSAL, rows, vocabulary, functools.partial(causal, vocabulary=vocabulary))


def _register(
  name: str, rows: dict[str, Rows], vocabulary: Vocabulary, make: Callable[..., Any]
) -> None:
  if name in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(
    name,
    source=IndexedRows(rows),
    preprocessors=[make],
    output_features=preprocessors.output_features(vocabulary, rank=2),
    shuffle_buffer_size=None,  # the source has its own order, from the index alone
  )
