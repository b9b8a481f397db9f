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

In Python, `model = glm_jax.load(PATH)` (library) has `config`, `vocabulary`, `params`,
`variables` and

  generate, answers   blanks filled or texts continued: all of them, or as they are done
  fill                the most probable fillings of a text
  score               log-probabilities of candidates for a blank
  loss                the training loss of texts
  rows, logits        texts as the model reads them; what it says at each token

Commands: `python -m glm_jax.train`, `.preview`, `.generate`, `.chat`, `.convert`,
`.quantize`, `.make_shards`, `.tune`, `.plan`, `.fields`; each has `--help`.
"""

import importlib
import sys
from typing import Any

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
  raise SystemExit(
    'glm_jax needs Python 3.11, 3.12 or 3.13 (TensorFlow Text has no wheels for '
    f'others); this is Python {sys.version.split()[0]}.'
  )

__version__ = '0.1.0'

# What is loaded when it is asked for, and where it is: JAX takes a second to import.
_LAZY = {
  'load': 'glm_jax.library',
  'LanguageModel': 'glm_jax.library',
  'MeshConfig': 'glm_jax.sharding',
  'UserError': 'glm_jax.configs',
}
__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
  if name not in _LAZY:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *_LAZY})
