"""Data: corpora, rows, objectives, seqio tasks and batches.

The only room that imports TensorFlow and seqio; it knows no model. The way through:
`corpora` (documents) -> `making` (documents to rows) -> `rows` (tables and files of tokens)
-> `stream` (which row of which corpus is example g) -> `examples` (what is masked, what the
model sees) -> `preprocessors` and `tasks` (as seqio has them) -> `pipeline` (batches).
`prepare` wires them for a run; `making.shard_job` and its runners make shards of large
corpora, without TensorFlow where the text needs none.
"""

import os

# TensorFlow by default asks Google Cloud Storage for 64 MB to read a few rows; this is more
# than a block of them.
os.environ.setdefault('GCS_READAHEAD_BUFFER_SIZE_BYTES', str(2**18))
