"""The registered tasks: glm_blank, glm_document, glm_sentence and glm_mixture."""

from __future__ import annotations

import functools

import seqio

from glm_jax.batch import OBJECTIVES
from glm_jax.data import preprocessors
from glm_jax.data.objective_config import ObjectiveConfig
from glm_jax.data.rows import Rows
from glm_jax.data.source import IndexedRows
from glm_jax.text.vocabulary import Vocabulary

MIXTURE = 'glm_mixture'
NAMES = (*(f'glm_{name}' for name in OBJECTIVES), MIXTURE)


def register(
  rows: dict[str, Rows], vocabulary: Vocabulary, config: ObjectiveConfig
) -> None:
  """(Re-)registers the four tasks over these rows.

  They are seqio tasks like any other; their examples are whole batches, made by one
  batched op. A mixture of objectives is one task, since a seqio Mixture of three would
  read every document three times, with the same random numbers each time.
  """
  source = IndexedRows(rows)
  configs = {f'glm_{name}': config.only(name) for name in OBJECTIVES}
  configs[MIXTURE] = config
  for name, objective in configs.items():
    if name in seqio.TaskRegistry.names():
      seqio.TaskRegistry.remove(name)
    make = functools.partial(
      preprocessors.glm_mixture, vocabulary=vocabulary, config=objective
    )
    seqio.TaskRegistry.add(
      name,
      source=source,
      preprocessors=[make],
      output_features=preprocessors.output_features(vocabulary, rank=2),
      shuffle_buffer_size=None,  # the source has its own order, from the index alone
    )
