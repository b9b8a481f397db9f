"""The registered tasks: of pretraining, glm_blank, glm_document, glm_sentence, glm_mixture
and glm_causal; of fine-tuning, glm_conversations, glm_pairs and glm_cloze; of preferences,
glm_ranked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from glm_jax.batch import MIXED
from glm_jax.data import preprocessors
from glm_jax.data.examples import candidates
from glm_jax.data.examples.answers import MixedText, answers
from glm_jax.data.examples.causal import causal
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.stream.source import Corpus, IndexedRows
from glm_jax.text.vocabulary import Vocabulary

MIXTURE = 'glm_mixture'
CAUSAL = 'glm_causal'
NAMES = (*(f'glm_{name}' for name in MIXED), MIXTURE, CAUSAL)
CONVERSATIONS, PAIRS = 'glm_conversations', 'glm_pairs'
CLOZE, RANKED = 'glm_cloze', 'glm_ranked'
ANSWERS = (CONVERSATIONS, PAIRS, CLOZE, RANKED)
EVALUATION = '_evaluation'
"""Ends the names of tasks whose losses can be compared between runs."""


def register(
  corpora: Sequence[Corpus],
  vocabulary: Vocabulary,
  config: ObjectiveConfig,
  evaluation: ObjectiveConfig,
) -> None:
  """(Re-)registers the tasks of objectives over these rows.

  They are seqio tasks like any other; their examples are whole batches, made by one
  batched op. A mixture of objectives is one task, since a seqio Mixture of three would
  read every document three times, with the same random numbers each time.

  Args:
    corpora: of the rows.
    vocabulary: of the tokens.
    config: of the objectives trained on: `glm_mixture`, `glm_blank` ...
    evaluation: of those validated: `glm_blank_evaluation` ...
  """
  configs = {f'glm_{name}': config.only(name) for name in MIXED}
  configs[MIXTURE] = config
  for name, objective in configs.items():
    _register_objectives(name, corpora, 'train', vocabulary, objective)
  # Rows that are validated may be planned for other objectives than those trained on.
  held_out = _held_out(corpora)
  for name in MIXED if held_out else ():
    objective = evaluation.only(name).for_evaluation()
    _register_objectives(
      f'glm_{name}{EVALUATION}', held_out, 'validation', vocabulary, objective
    )


def register_causal(corpora: Sequence[Corpus], vocabulary: Vocabulary) -> None:
  """(Re-)registers the task of next tokens over these rows, and that of validation."""
  make = functools.partial(causal, pad=vocabulary.specials.pad)
  _register(CAUSAL, corpora, vocabulary, make)
  if held_out := _held_out(corpora):
    _register(f'{CAUSAL}{EVALUATION}', held_out, vocabulary, make)


def register_answers(
  name: str,
  corpora: Sequence[Corpus],
  vocabulary: Vocabulary,
  *,
  causal: bool,
  two_positions: bool,
  text: MixedText | None,
) -> None:
  """(Re-)registers a task of answers over these rows, and that of validation.

  Args:
    name: of `ANSWERS`.
    corpora: of the rows.
    vocabulary: of the tokens.
    causal: whether the model is.
    two_positions: whether it has two positions.
    text: the corpus that is text, if one is.
  """
  how = dict(vocabulary=vocabulary, causal=causal, two_positions=two_positions)
  _register(name, corpora, vocabulary, functools.partial(answers, text=text, **how))
  if held_out := _held_out(corpora):
    if text is not None:
      # Shards of another corpus may lack the split.
      names = [corpus.name for corpus in held_out]
      number = names.index(text.name) if text.name in names else -1
      text = text._replace(number=number, config=text.config.for_evaluation())
    make = functools.partial(answers, text=text, **how)
    _register(f'{name}{EVALUATION}', held_out, vocabulary, make)


def register_clozes(
  name: str,
  corpora: Sequence[Corpus],
  vocabulary: Vocabulary,
  *,
  causal: bool,
  two_positions: bool,
  most: int,
  negatives: int,
) -> None:
  """(Re-)registers a task of candidates over these rows, and that of validation.

  Args:
    name: of it.
    corpora: of rows that hold a context and its candidates.
    vocabulary: of the tokens.
    causal: whether the model is.
    two_positions: whether it has two positions.
    most: see `examples.candidates`.
    negatives: see `examples.candidates`.
  """

  @tf.autograph.experimental.do_not_convert
  def make(dataset: tf.data.Dataset, sequence_length: Mapping[str, int]) -> tf.data.Dataset:
    rows = dataset.map(
      lambda rows: candidates.documents(
        rows, sequence_length['tokens'], most=most, negatives=negatives
      ),
      num_parallel_calls=tf.data.AUTOTUNE,
      deterministic=True,
    )
    how = dict(vocabulary=vocabulary, causal=causal, two_positions=two_positions)
    return answers(rows, sequence_length, **how)

  _register(name, corpora, vocabulary, make)
  if held_out := _held_out(corpora):
    _register(f'{name}{EVALUATION}', held_out, vocabulary, make)


def _held_out(corpora: Sequence[Corpus]) -> list[Corpus]:
  """Those that have a validation split, which shards may lack, with that alone."""
  return [
    dataclasses.replace(c, rows={'validation': c.rows['validation']})
    for c in corpora
    if 'validation' in c.rows
  ]


def _register_objectives(name, corpora, split, vocabulary, config) -> None:
  make = functools.partial(
    preprocessors.glm_mixture,
    vocabulary=vocabulary,
    config=config,
    plan=corpora[0].rows[split].plan,
  )
  _register(name, corpora, vocabulary, make)


def _register(
  name: str,
  corpora: Sequence[Corpus],
  vocabulary: Vocabulary,
  make: Callable[..., Any],
) -> None:
  # seqio refuses a second task of a name, but a process may prepare more than one run.
  if name in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(name)
  seqio.TaskRegistry.add(
    name,
    source=IndexedRows(corpora),
    preprocessors=[make],
    output_features=preprocessors.output_features(vocabulary, rank=2),
    # The source has an order of its own, from the index alone.
    shuffle_buffer_size=None,
  )
