"""Random numbers as a function of (seed, example, purpose), in TensorFlow.

A counter-based generator (SplitMix64: Steele, Lea & Flood, OOPSLA 2014). Each example
has a 64-bit key made of the seed and its number in the stream, so its random numbers
do not depend on its batch, on the number of hosts, or on parallelism.
"""

from __future__ import annotations

import tensorflow as tf

from glm_jax.data.stream.hashing import GOLDEN, ROUNDS


def example_keys(seed: int | tf.Tensor, index: tf.Tensor) -> tf.Tensor:
  """A uint64 key for each example.

  Args:
    seed: int64 scalar.
    index: [B] int64.
  """
  seed = mix(tf.cast(seed, tf.uint64) + _constant(GOLDEN))
  key = mix(tf.cast(index, tf.uint64) * _constant(GOLDEN) + seed)
  return mix(tf.bitwise.bitwise_xor(key, seed))


def child_keys(keys: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
  """[D] uint64: a key for each part of an example, with numbers of its own.

  Args:
    keys: [D] uint64, of the examples.
    number: [D] int32, of the part in its example.
  """
  step = tf.cast(number + 1, tf.uint64) * _constant(GOLDEN)
  return mix(tf.bitwise.bitwise_xor(mix(keys), step))


def uniform(keys: tf.Tensor, purpose: int, count: int | tf.Tensor) -> tf.Tensor:
  """[B, count] float32 in [0, 1), independent for each key and each purpose.

  Args:
    keys: [B] uint64.
    purpose: a small number; calls with the same one return the same numbers.
    count: numbers an example, below 2**32.
  """
  # The purpose is in the high half of the counter and the number in the low one: no two
  # draws of a key share a counter.
  counter = tf.range(1, tf.cast(count, tf.int64) + 1, dtype=tf.int64) + (purpose << 32)
  counter = tf.cast(counter, tf.uint64) * _constant(GOLDEN)
  # The upper 24 bits: as many as a float32 holds exactly, so that 1.0 never comes up.
  bits = tf.bitwise.right_shift(mix(keys[:, None] + counter), _constant(40))
  return tf.cast(tf.cast(bits, tf.int32), tf.float32) * (2.0**-24)


def mix(z: tf.Tensor) -> tf.Tensor:
  """SplitMix64's finaliser: every input bit moves every output bit."""
  for shift, factor in ROUNDS:
    z = tf.bitwise.bitwise_xor(z, tf.bitwise.right_shift(z, _constant(shift)))
    z = z * _constant(factor)
  return tf.bitwise.bitwise_xor(z, tf.bitwise.right_shift(z, _constant(31)))


def _constant(value: int) -> tf.Tensor:
  return tf.constant(value, tf.uint64)
