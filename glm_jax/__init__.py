"""glm_jax: training the GLM family in JAX, from a laptop to a TPU pod.

The way through, one room a step:

  text         vocabularies: text <-> tokens
  data         corpora -> rows of tokens -> stream -> examples, as seqio tasks
  batch        the batch contract and `Visibility`, shared by everything below
  attention    one function over intervals of keys
  models       configurations, products, layers, one file a family
  sharding     the mesh and its rule table
  training     configuration, losses, optimizer, state, step, reports
  checkpoints  written and read on any mesh; the folder of a run
  inference    the key/value cache and decoding
  interop      the weights of released models, in and out
  performance  chips, FLOPs, compiler flags
  planning     what only `plan` needs: compiled programs read, predictions

Commands: `python -m glm_jax.train`, `.preview`, `.generate`, `.convert`, `.make_shards`,
`.tune`, `.plan`; each has `--help`.
"""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
  raise SystemExit(
    'glm_jax needs Python 3.11, 3.12 or 3.13 (TensorFlow Text has no wheels for '
    f'others); this is Python {sys.version.split()[0]}.'
  )

__version__ = '0.1.0'
