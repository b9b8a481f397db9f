"""The objectives as seqio preprocessors, for the registered tasks and for your own.

Each takes a dataset of token sequences and yields examples of the batch contract. Two
kinds of dataset are understood:

- batches of indexed rows (`glm_jax.data.stream.source`): {tokens [B, N], lengths, scored,
  starts, keys, index, step, corpus}, which stay batches;
- single sequences from any seqio source: {tokens [n]} and, optionally, {scored [n]},
  as `tokenize` and `to_rows` below make them, which stay single examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import seqio
import tensorflow as tf

from glm_jax import configs
from glm_jax.batch import DTYPES, Batch
from glm_jax.data.examples import infilling, packed
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.rows.table import RowPlan
from glm_jax.data.stream import stateless
from glm_jax.text.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary

# Single sequences that are worked on together, since an op costs about the same for each
# call.
_GROUP = 32


def glm_mixture(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int],
  *,
  vocabulary: Vocabulary,
  config: ObjectiveConfig,
  plan: RowPlan | None = None,
) -> tf.data.Dataset:
  """Each example of an objective of its own, drawn with (alpha, beta, gamma).

  Args:
    dataset: see the module.
    sequence_length: {'tokens': L}.
    vocabulary: of the tokens.
    config: the objectives.
    plan: of the rows, if they are indexed.

  Returns:
    A dataset of {field of `Batch`: [B, L] or [L]}.
  """
  length = sequence_length['tokens']
  batched = dataset.element_spec['tokens'].shape.rank == 2

  @tf.autograph.experimental.do_not_convert
  def make(rows: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    if plan is not None and plan.packed:
      source, places = packed.take_apart(rows, plan)
      # Two positions a span, for the documents with the most room; shorter ones are padded
      # to this size until they are put together.
      size = source.tokens.shape[1] + 2 * packed.spans_of_longest(plan)
      examples = infilling.make_examples(source, size, config, vocabulary)
      count = rows['tokens'].shape[0]
      examples = packed.put_together(
        examples, places, count, length, vocabulary.specials.pad
      )
    else:
      names = ('tokens', 'lengths', 'scored', 'keys', 'step')
      source = infilling.TextRows(*(rows[name] for name in names))
      examples = infilling.make_examples(source, length, config, vocabulary)
    return {**examples, **{k: rows[k] for k in ('index', 'corpus') if k in rows}}

  if batched:
    return dataset.map(make, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

  # Single sequences: grouped, padded to rows, made into examples, and taken apart again.
  row_length = config.row_length(length)
  keyed = _add_key(dataset.map(_add_scored))

  @tf.autograph.experimental.do_not_convert
  def check(x: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    fits = tf.debugging.assert_less_equal(
      tf.size(x['tokens']),
      row_length,
      'a sequence is longer than its row; split documents with to_rows',
    )
    with tf.control_dependencies([fits]):
      unknown = tf.constant(-1, tf.int64)
      return {**x, 'lengths': tf.size(x['tokens']), 'index': unknown, 'step': unknown}

  padded = keyed.map(check).padded_batch(
    _GROUP,
    {
      **{name: [row_length] for name in ('tokens', 'scored')},
      **{name: [] for name in ('keys', 'lengths', 'index', 'step')},
    },
  )
  return padded.map(make, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).unbatch()


def blank_infilling(dataset, sequence_length, *, vocabulary, config=ObjectiveConfig()):
  """Token spans only; arguments as `glm_mixture`."""
  return glm_mixture(
    dataset, sequence_length, vocabulary=vocabulary, config=config.only('blank')
  )


def document(dataset, sequence_length, *, vocabulary, config=ObjectiveConfig()):
  """One long span only; arguments as `glm_mixture`."""
  return glm_mixture(
    dataset, sequence_length, vocabulary=vocabulary, config=config.only('document')
  )


def sentence(dataset, sequence_length, *, vocabulary, config=ObjectiveConfig()):
  """Whole sentences only; arguments as `glm_mixture`."""
  return glm_mixture(
    dataset, sequence_length, vocabulary=vocabulary, config=config.only('sentence')
  )


def tokenize(
  dataset: tf.data.Dataset, *, vocabulary: Vocabulary, key: str = 'text'
) -> tf.data.Dataset:
  """{key: text}, or bare text, to {tokens: prefix text <eos>}, for sources of your own.

  Raises:
    UserError: TensorFlow cannot compute the vocabulary.
  """
  prefix, eos = list(vocabulary.prefix), vocabulary.specials.eos
  encode = _encoder(vocabulary)

  @tf.autograph.experimental.do_not_convert
  def one(x: tf.Tensor | dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    text = x[key] if isinstance(x, dict) else x
    return {'tokens': tf.concat([tf.constant(prefix, tf.int32), encode(text), [eos]], 0)}

  return dataset.map(one, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def to_rows(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int],
  *,
  vocabulary: Vocabulary,
  config: ObjectiveConfig = ObjectiveConfig(),
) -> tf.data.Dataset:
  """Cuts longer sequences into rows that fit with their spans; each with a prefix."""
  prefix = tf.constant(list(vocabulary.prefix), tf.int32)
  body = config.row_length(sequence_length['tokens']) - len(vocabulary.prefix)

  @tf.autograph.experimental.do_not_convert
  def cut(x: dict[str, tf.Tensor]) -> tf.data.Dataset:
    rest = tf.data.Dataset.from_tensor_slices(x['tokens'][tf.size(prefix) :])
    return rest.batch(body).map(lambda row: {'tokens': tf.concat([prefix, row], 0)})

  return dataset.flat_map(cut)


def output_features(vocabulary: Vocabulary, rank: int = 1) -> dict[str, seqio.Feature]:
  """The features of the batch contract, for `seqio.Task(output_features=...)`.

  Args:
    vocabulary: of `tokens` and `targets`.
    rank: 1 for a task of single examples, 2 for one of whole batches.
  """
  words = SeqioVocabulary(vocabulary)
  numbers = seqio.PassThroughVocabulary(size=2**31 - 1)
  features = {}
  for name, dtype in zip(Batch._fields, DTYPES, strict=True):
    if name == 'index':
      continue
    features[name] = seqio.Feature(
      words if name in ('tokens', 'targets') else numbers,
      add_eos=False,
      dtype=tf.as_dtype(dtype),
      rank=rank,
    )
  return features


class SeqioVocabulary(seqio.PassThroughVocabulary):
  """A `glm_jax.text` vocabulary as seqio sees it; `.vocabulary` is the real one."""

  def __init__(self, vocabulary: Vocabulary):
    self.vocabulary = vocabulary
    super().__init__(size=vocabulary.size, eos_id=vocabulary.specials.eos)

  @property
  def pad_id(self) -> int:
    return self.vocabulary.specials.pad

  def _encode(self, s):
    return self.vocabulary.encode(s)

  def _decode(self, ids):
    return self.vocabulary.decode(list(ids))

  def __eq__(self, other) -> bool:
    return (
      isinstance(other, SeqioVocabulary)
      and self.vocabulary.fingerprint == other.vocabulary.fingerprint
    )


def _encoder(vocabulary: Vocabulary) -> Callable[[tf.Tensor], tf.Tensor]:
  """A TensorFlow function from a text to its ids."""
  # A subclass may spell text in its own way before sentencepiece sees it.
  overrides = type(vocabulary).encode_batch is not SentencePieceVocabulary.encode_batch
  if isinstance(vocabulary, SentencePieceVocabulary) and not overrides:
    import tensorflow_text

    return tensorflow_text.SentencepieceTokenizer(model=vocabulary.serialized).tokenize
  configs.check(
    isinstance(vocabulary, ByteVocabulary),
    'TensorFlow must be able to compute the vocabulary of a task with `tokenize`',
    f'one of kind {vocabulary.kind!r}',
    'use a glm_* task, whose rows are tokenised beforehand, or a source of tokens',
  )
  return lambda text: tf.cast(tf.io.decode_raw(text, tf.uint8), tf.int32)


@tf.autograph.experimental.do_not_convert
def _add_scored(x: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
  scored = x['scored'] if 'scored' in x else tf.ones_like(x['tokens'], tf.bool)
  return {'tokens': tf.cast(x['tokens'], tf.int32), 'scored': scored}


@seqio.map_over_dataset(num_seeds=1)
def _add_key(x: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
  """A key from seqio's seed and the content.

  seqio hands the same seeds to every process; the content tells their examples apart.
  """
  seed = stateless.mix(
    tf.cast(seed[0], tf.uint64) * (1 << 32) + tf.cast(seed[1], tf.uint64)
  )
  # Each token with its place in the high half, mixed and summed: a hash of the content. The
  # sum wraps, as int64 to the same bits as uint64.
  offsets = tf.range(tf.size(x['tokens'], out_type=tf.int64), dtype=tf.int64) * (1 << 32)
  content = stateless.mix(tf.cast(offsets + tf.cast(x['tokens'], tf.int64), tf.uint64))
  total = tf.reduce_sum(tf.bitcast(content, tf.int64))
  return {**x, 'keys': stateless.mix(seed + tf.bitcast(total, tf.uint64))}
