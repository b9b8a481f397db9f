"""Rows of shards by number, in TensorFlow ops alone.

No Python function runs in the pipeline (one that does can hang at the process's exit,
and cannot be checkpointed). Files on this machine are mapped into memory, small corpora
from elsewhere are fetched whole; others are read in runs of consecutive rows, many at a
time, so that each costs storage one request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from glm_jax.data.rows import shards
from glm_jax.data.rows.shards import HEAD, TAIL, File, RecordLayout, StoredRows

# A batch takes from each mapped file in an op of its own: with more files, runs are
# cheaper.
_MOST_MAPPED = 64
# Runs that are read at a time. Each spends its time waiting for storage, not computing.
_RUNS_AT_ONCE = 32


def reader(rows: StoredRows) -> Callable[[tf.Tensor], tf.Tensor]:
  """A function from row numbers, [B] int64, to their records, [B, record_bytes] uint8."""
  # Only a file of this machine can be mapped; storage is addressed as scheme://path. From
  # there a small corpus is read whole, since its rows are asked for one by one.
  here = '://' not in str(rows.folder)
  in_memory = len(rows.files) <= _MOST_MAPPED and (here or rows.block == 1)
  # A shard that no row fell to is an empty file, which cannot be mapped.
  files = [file for file in rows.files if file.rows]
  counts = [file.rows for file in files]
  if in_memory:
    load = _mapped if here else _fetched
    return _in_memory([load(rows, file) for file in files], counts)
  paths = [str(rows.folder / file.name) for file in files]
  return _runs(paths, counts, rows.layout)


def decode(records: tf.Tensor, layout: RecordLayout) -> dict[str, tf.Tensor]:
  """The fields of records.

  Args:
    records: [B, record_bytes] uint8.
    layout: of a record.

  Returns:
    tokens [B, N] int32, lengths [B] int32, scored and starts [B, N] bool.
  """
  N, size = layout.row_length, layout.token_bytes
  # The frame of `shards`: a length of 4 bytes, the tokens, two bitmaps.
  end = 4 + N * size
  # [B, N, size] bytes; a bitcast takes the last axis away.
  tokens = tf.reshape(records[:, 4:end], [-1, N, size])
  tokens = tf.cast(tf.bitcast(tokens, tf.uint16 if size == 2 else tf.int32), tf.int32)
  # Bit i of a byte is flag i of its eight: NumPy's bitorder='little'.
  bits = tf.constant([1 << i for i in range(8)], tf.uint8)

  def bitmap(first: int) -> tf.Tensor:
    packed = records[:, first : first + layout.bitmap_bytes, None]
    # [B, bytes, 8]; the last byte may hold more flags than the row has tokens.
    flags = tf.bitwise.bitwise_and(packed, bits) > 0
    return tf.reshape(flags, [-1, 8 * layout.bitmap_bytes])[:, :N]

  return {
    'tokens': tokens,
    'lengths': tf.bitcast(records[:, :4], tf.int32),
    'scored': bitmap(end),
    'starts': bitmap(end + layout.bitmap_bytes),
  }


def _mapped(rows: StoredRows, file: File) -> tf.Tensor:
  """[rows, stride] uint8 of a file of this machine."""
  # Nothing is read until a page of it is touched, and processes of one machine share the
  # pages. No public function wraps the op.
  return tf.raw_ops.ImmutableConst(
    dtype=tf.uint8,
    shape=[file.rows, rows.layout.stride],
    memory_region_name=str(rows.folder / file.name),
  )


def _fetched(rows: StoredRows, file: File) -> tf.Tensor:
  """The same of a file from elsewhere."""
  content = (rows.folder / file.name).read_bytes()
  shards.check_content(rows.folder, file, hashlib.sha256(content).hexdigest())
  data = np.frombuffer(content, np.uint8)
  return tf.constant(data.reshape(file.rows, rows.layout.stride))


def _in_memory(
  files: list[tf.Tensor], counts: list[int]
) -> Callable[[tf.Tensor], tf.Tensor]:
  if len(files) == 1:
    return lambda numbers: tf.gather(files[0], numbers)[:, HEAD:-TAIL]

  def read(numbers: tf.Tensor) -> tf.Tensor:
    shard, row = _locate(numbers, counts)
    # Each file is asked once for its rows of the batch; stitching by the places in the
    # batch restores the order asked for.
    order = tf.range(tf.shape(numbers)[0])
    parts = tf.dynamic_partition(order, shard, len(files))
    framed = [
      tf.gather(file, tf.gather(row, part)) for file, part in zip(files, parts, strict=True)
    ]
    return tf.dynamic_stitch(parts, framed)[:, HEAD:-TAIL]

  return read


def _runs(
  paths: list[str], counts: list[int], layout: RecordLayout
) -> Callable[[tf.Tensor], tf.Tensor]:
  names, size, stride = tf.constant(paths), layout.record_bytes, layout.stride

  @tf.autograph.experimental.do_not_convert
  def read_run(shard: tf.Tensor, first: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    # FixedLengthRecordDataset would read the file from its beginning; TFRecords can be
    # begun anywhere, but only the raw op takes `byte_offsets`. The buffer is as large as
    # the run, so that storage sees a single request.
    run = tf.raw_ops.TFRecordDatasetV2(
      filenames=names[shard][None],
      compression_type='',
      buffer_size=count * stride,
      byte_offsets=first[None] * stride,
    )
    # The raw op yields a variant; this makes it a Dataset again.
    run = tf.data.experimental.from_variant(run, tf.TensorSpec([], tf.string))
    return tf.strings.reduce_join(run.take(count).batch(count).get_single_element())

  def read_runs(numbers: tf.Tensor) -> tf.Tensor:
    shard, row = _locate(numbers, counts)
    # A run goes on where a row follows the one before it, in the same file.
    joined = (shard[:-1] == shard[1:]) & (row[:-1] + 1 == row[1:])
    run_starts = tf.where(tf.concat([[True], ~joined], 0))[:, 0]
    count = tf.shape(numbers, tf.int64)
    lengths = tf.concat([run_starts[1:], count], 0) - run_starts
    runs = (tf.gather(shard, run_starts), tf.gather(row, run_starts), lengths)
    parts = tf.data.Dataset.from_tensor_slices(runs).map(
      read_run, num_parallel_calls=_RUNS_AT_ONCE, deterministic=True
    )
    # There are no more runs than rows, so a batch of `count` holds them all.
    data = tf.strings.reduce_join(parts.batch(count[0]).get_single_element())
    return tf.reshape(tf.io.decode_raw(data, tf.uint8), [-1, size])

  def read(numbers: tf.Tensor) -> tf.Tensor:
    # A corpus of a mixture may have no row in this batch, and then there is no run to join.
    return tf.cond(
      tf.size(numbers) > 0,
      lambda: read_runs(numbers),
      lambda: tf.zeros([0, size], tf.uint8),
    )

  return read


def _locate(numbers: tf.Tensor, counts: list[int]) -> tuple[tf.Tensor, tf.Tensor]:
  """The file of each row, [B] int32, and its number in that file, [B] int64."""
  ends = np.cumsum(counts)
  # side='right': row number ends[i] is the first of the next file.
  shard = tf.searchsorted(tf.constant(ends, tf.int64), numbers, side='right')
  return shard, numbers - tf.gather(tf.constant(ends - counts, tf.int64), shard)
