"""Data: corpora, rows, objectives, seqio tasks and batches.

The only room that imports TensorFlow and seqio; it knows no model. The way through:
`corpus` (documents) -> `rows` (tokens) -> `source` (example g of the stream) ->
`spans` and `objectives` (what is masked, what the model sees) -> `preprocessors` and
`tasks` (as seqio has them) -> `pipeline` (batches). `prepare` wires them for a run.
"""
