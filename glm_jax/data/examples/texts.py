"""A few texts as examples of an objective, without a corpus around them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from glm_jax.batch import DTYPES, Batch
from glm_jax.data.examples import infilling
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.stream import stateless
from glm_jax.text.vocabulary import Vocabulary


def batch(
  documents: Sequence[Sequence[int]],
  vocabulary: Vocabulary,
  objective: str,
  seed: int,
  *,
  block_positions: bool,
) -> Batch:
  """Each document as an example of its own, with masks drawn from its number.

  Args:
    documents: token ids, prefix and suffix included.
    vocabulary: of the tokens.
    objective: of `glm_jax.batch.MIXED`.
    seed: of the masks.
    block_positions: see `ObjectiveConfig`.
  """
  s = vocabulary.specials
  config = ObjectiveConfig(
    task_masks=None not in (s.gmask, s.smask), block_positions=block_positions
  ).only(objective)
  count, longest = len(documents), max(map(len, documents))
  # As many spans as a row of its length has room for, whatever stands beside it.
  room = np.array([config.max_spans(len(ids)) for ids in documents], np.int32)
  tokens = np.zeros((count, longest), np.int32)
  scored = np.zeros((count, longest), bool)
  for row, ids in enumerate(documents):
    tokens[row, : len(ids)] = ids
    scored[row, len(vocabulary.prefix) : len(ids)] = True
  source = infilling.TextRows(
    tokens=tf.constant(tokens),
    lengths=tf.constant([len(ids) for ids in documents], tf.int32),
    scored=tf.constant(scored),
    keys=stateless.example_keys(seed, tf.range(count, dtype=tf.int64)),
    step=tf.fill([count], tf.constant(-1, tf.int64)),
    room=tf.constant(room),
  )
  length = longest + 2 * int(room.max())
  example = infilling.make_examples(source, length, config, vocabulary)
  # The index is not the objectives'.
  fields = zip(Batch._fields[:-1], DTYPES[:-1], strict=True)
  return Batch(**{name: np.asarray(example[name], dtype) for name, dtype in fields})
