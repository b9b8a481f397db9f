"""Writes down the rows that a run trains on, one by one; it takes this by --import."""

import hashlib
import os

from glm_jax.data import pipeline


def line(batch, row):
  """'INDEX HASH' of a row of a batch."""
  content = b''.join(field[row].tobytes() for field in batch[:-1])
  return f'{batch.index[row]} {hashlib.sha256(content).hexdigest()}'


def _noted(stream, task, lengths, *, init=pipeline.Stream.__init__, **reading):
  init(stream, task, lengths, **reading)
  stream.is_training = task == 'glm_mixture' and reading.get('train', True)


def _note(stream, following=pipeline.Stream.__next__):
  batch = following(stream)
  if stream.is_training:
    with open(os.environ['SEEN'], 'a') as file:
      for row in range(len(batch.index)):
        print(line(batch, row), file=file)
  return batch


if 'SEEN' in os.environ:
  pipeline.Stream.__init__, pipeline.Stream.__next__ = _noted, _note
