"""A TFDS data set of prose: the paragraphs of `documentation` that are sentences.

Documentation is mostly layout, code and numbers. A small model that reads whole sentences
alone learns words, and what it fills in can be read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from glm_jax.data.corpora import documentation

_LEAST_WORDS = 8
# Of the words of a paragraph, those that are no names, numbers or code.
_LEAST_PLAIN = 0.9
_PLAIN = re.compile(r'["\'(`]*([A-Za-z][A-Za-z\'/-]*|\d+)["\')`]*[.,;:]*')


class Prose(tfds.core.GeneratorBasedBuilder):
  """{text, package}; splits train and validation, those of `documentation`."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Paragraphs of plain sentences.'}
  MANUAL_DOWNLOAD_INSTRUCTIONS = None

  def __init__(self, cache_dir: Path, **kwargs):
    """
    Args:
      cache_dir: where the documentation is, or is made.
      **kwargs: as every TFDS builder has them.
    """
    self._cache_dir = cache_dir
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {name: tfds.features.Text() for name in ('text', 'package')}
      ),
      description=__doc__,
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    builder = documentation.prepared(self._cache_dir)
    reading = tfds.ReadConfig(try_autocache=False)
    known: set[str] = set()
    # Training first: a paragraph that is learnt is not held out.
    return {
      split: self._generate_examples(
        tfds.as_numpy(builder.as_dataset(split=split, read_config=reading)), known
      )
      for split in ('train', 'validation')
    }

  def _generate_examples(self, documents, known: set[str]):
    for number, document in enumerate(documents):
      # Each paragraph once, of a document and of all.
      made = [*dict.fromkeys(paragraphs(document['text'].decode()))]
      made = [paragraph for paragraph in made if paragraph not in known]
      known.update(made)
      if made:
        yield number, {'text': '\n'.join(made), 'package': document['package']}


def prepared(cache_dir: Path) -> Prose:
  """The builder, its data made at first use (a minute)."""
  return documentation.prepare(functools.partial(Prose, cache_dir), cache_dir)


def paragraphs(text: str) -> Iterator[str]:
  """Those of a text that are sentences, each as one line.

  Its lines are all indented alike, it begins with a capital and ends with a full stop, and
  nine of ten words are plain.

  Example:
    >>> text = 'Opens the door of\\nthe house for all who knock.\\n\\n>>> open()'
    >>> [*paragraphs(text)]
    ['Opens the door of the house for all who knock.']
  """
  for block in re.split(r'\n\s*\n', text):
    lines = [line for line in block.split('\n') if line.strip()]
    if len({len(line) - len(line.lstrip()) for line in lines}) != 1:
      continue
    words = block.split()
    whole = words[0][0].isupper() and words[-1].endswith('.')
    if not whole or len(words) < _LEAST_WORDS:
      continue
    if sum(bool(_PLAIN.fullmatch(word)) for word in words) >= _LEAST_PLAIN * len(words):
      yield ' '.join(words)
