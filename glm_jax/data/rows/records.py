"""StoredRows of shards by number, in TensorFlow ops alone.

No Python function runs in the pipeline (one that does can hang at the process's exit,
and cannot be checkpointed). Files on this machine are mapped into memory; others are
read in runs of consecutive rows, many at a time, so that each costs storage one request.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from glm_jax.data.rows.shards import HEAD, TAIL, RecordLayout, StoredRows

# A batch takes from each mapped file in an op of its own: with more, runs are cheaper.
_MOST_MAPPED = 64
_AT_ONCE = 32  # runs read at a time, since each waits for storage


def reader(rows: StoredRows) -> Callable[[tf.Tensor], tf.Tensor]:
  """A function from row numbers, [B] int64, to their records, [B, record_bytes] uint8."""
  mapped = '://' not in str(rows.folder) and len(rows.files) <= _MOST_MAPPED
  files = [file for file in rows.files if file.rows]
  paths = [str(rows.folder / file.name) for file in files]
  counts = [file.rows for file in files]
  return (_mapped if mapped else _runs)(paths, counts, rows.layout)


def decode(records: tf.Tensor, layout: RecordLayout) -> dict[str, tf.Tensor]:
  """The fields of records.

  Args:
    records: [B, record_bytes] uint8.
    layout: of a record.

  Returns:
    tokens [B, N] int32, lengths [B] int32, scored and starts [B, N] bool.
  """
  N, size = layout.row_length, layout.token_bytes
  at = 4 + N * size
  tokens = tf.reshape(records[:, 4:at], [-1, N, size])
  tokens = tf.cast(tf.bitcast(tokens, tf.uint16 if size == 2 else tf.int32), tf.int32)
  bits = tf.constant([1 << i for i in range(8)], tf.uint8)

  def bitmap(first: int) -> tf.Tensor:
    packed = records[:, first : first + layout.bitmap_bytes, None]
    flags = tf.bitwise.bitwise_and(packed, bits) > 0
    return tf.reshape(flags, [-1, 8 * layout.bitmap_bytes])[:, :N]

  return {
    'tokens': tokens,
    'lengths': tf.bitcast(records[:, :4], tf.int32),
    'scored': bitmap(at),
    'starts': bitmap(at + layout.bitmap_bytes),
  }


def _mapped(
  paths: list[str], counts: list[int], layout: RecordLayout
) -> Callable[[tf.Tensor], tf.Tensor]:
  files = [
    tf.raw_ops.ImmutableConst(
      dtype=tf.uint8, shape=[count, layout.stride], memory_region_name=path
    )
    for path, count in zip(paths, counts, strict=True)
  ]
  if len(files) == 1:
    return lambda numbers: tf.gather(files[0], numbers)[:, HEAD:-TAIL]

  def read(numbers: tf.Tensor) -> tf.Tensor:
    which, place = _place(numbers, counts)
    order = tf.range(tf.shape(numbers)[0])
    parts = tf.dynamic_partition(order, which, len(files))
    found = [
      tf.gather(file, tf.gather(place, part))
      for file, part in zip(files, parts, strict=True)
    ]
    return tf.dynamic_stitch(parts, found)[:, HEAD:-TAIL]

  return read


def _runs(
  paths: list[str], counts: list[int], layout: RecordLayout
) -> Callable[[tf.Tensor], tf.Tensor]:
  names, size, stride = tf.constant(paths), layout.record_bytes, layout.stride

  @tf.autograph.experimental.do_not_convert
  def read_run(which: tf.Tensor, first: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    # Records of fixed length would be read from the beginning of the file; TFRecords can
    # be begun anywhere.
    run = tf.raw_ops.TFRecordDatasetV2(
      filenames=names[which][None],
      compression_type='',
      buffer_size=count * stride,
      byte_offsets=first[None] * stride,
    )
    run = tf.data.experimental.from_variant(run, tf.TensorSpec([], tf.string))
    return tf.strings.reduce_join(run.take(count).batch(count).get_single_element())

  def read_some(numbers: tf.Tensor) -> tf.Tensor:
    which, place = _place(numbers, counts)
    joined = (which[:-1] == which[1:]) & (place[:-1] + 1 == place[1:])
    at = tf.where(tf.concat([[True], ~joined], 0))[:, 0]
    count = tf.shape(numbers, tf.int64)
    lengths = tf.concat([at[1:], count], 0) - at
    runs = (tf.gather(which, at), tf.gather(place, at), lengths)
    parts = tf.data.Dataset.from_tensor_slices(runs).map(
      read_run, num_parallel_calls=_AT_ONCE, deterministic=True
    )
    # No more runs than rows: a batch of this size holds them all.
    data = tf.strings.reduce_join(parts.batch(count[0]).get_single_element())
    return tf.reshape(tf.io.decode_raw(data, tf.uint8), [-1, size])

  def read(numbers: tf.Tensor) -> tf.Tensor:
    return tf.cond(
      tf.size(numbers) > 0,
      lambda: read_some(numbers),
      lambda: tf.zeros([0, size], tf.uint8),
    )

  return read


def _place(numbers: tf.Tensor, counts: list[int]) -> tuple[tf.Tensor, tf.Tensor]:
  """The file of each row, and its number there."""
  ends = np.cumsum(counts)
  which = tf.searchsorted(tf.constant(ends, tf.int64), numbers, side='right')
  return which, numbers - tf.gather(tf.constant(ends - counts, tf.int64), which)
