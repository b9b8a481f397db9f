"""Data: corpora, rows, objectives, seqio tasks and batches.

The only room that imports TensorFlow and seqio; it knows no model. The way through:
`corpus` (documents) -> `rows` (tokens) -> `shards` (files of them) -> `source` (example g
of the stream, `mixing` corpora) -> `spans`, `objectives` and `packed` (what is masked, what
the model sees) -> `preprocessors` and `tasks` (as seqio has them) -> `pipeline` (batches).
`prepare` wires them for a run; `shard_job` and its runners make shards of large corpora,
without TensorFlow where the text needs none.
"""
