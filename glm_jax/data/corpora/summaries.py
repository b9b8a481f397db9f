"""A TFDS data set of questions about functions, answered by the first line of docstrings.

Read from the sources of this Python and its packages. Questions about the packages whose
documentation is held out (`documentation`) are held out, too, so that a model which was
pretrained on it is asked about what it never saw.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import tensorflow_datasets as tfds

from glm_jax.data.corpora import docstrings, documentation


class Summaries(tfds.core.GeneratorBasedBuilder):
  """{prompt, response, package}; splits train and validation."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Functions and methods.'}
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
        {name: tfds.features.Text() for name in ('prompt', 'response', 'package')}
      ),
      description=__doc__,
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    held_out = documentation.held_out(self._cache_dir)
    made = [*docstrings.summaries()]
    train = [s for s in made if s.package not in held_out]
    # An answer that is learnt is no test, whatever function it is of.
    known = {s.text for s in train}
    validation = [s for s in made if s.package in held_out and s.text not in known]
    return {
      'train': self._generate_examples(train),
      'validation': self._generate_examples(validation),
    }

  def _generate_examples(self, summaries: Iterable[docstrings.Summary]):
    # Each answer once, at the first function that it is of.
    first = {}
    for summary in summaries:
      first.setdefault(summary.text, summary)
    for number, summary in enumerate(first.values()):
      yield (
        number,
        {
          'prompt': f'What does {summary.function} do?',
          'response': summary.text,
          'package': summary.package,
        },
      )


def prepared(cache_dir: Path) -> Summaries:
  """The builder, its data made at first use (a minute)."""
  return documentation.prepare(functools.partial(Summaries, cache_dir), cache_dir)
