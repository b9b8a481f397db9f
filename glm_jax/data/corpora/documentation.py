"""A TFDS data set that needs no download: the documentation in this Python.

The language reference and the docstrings of the standard library and of all installed
packages, near-duplicates removed, split into training and validation by package.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from glm_jax.data.corpora import docstrings, overlap

# Of the characters.
_VALIDATION_SHARE = 0.05
# A package with a larger share of them is for training.
_LARGEST_HELD_OUT = 0.02
# Opens the lines that are for the user.
_SAYS = 'documentation: '
# 13-grams that a validation document may share with training.
_MOST_SHARED = 0.02


class Documentation(tfds.core.GeneratorBasedBuilder):
  """{text, package, source}; splits train and validation."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'Topics and docstrings.'}
  MANUAL_DOWNLOAD_INSTRUCTIONS = None

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {name: tfds.features.Text() for name in ('text', 'package', 'source')}
      ),
      description=__doc__,
      disable_shuffling=True,
    )

  def __init__(
    self, documents: Sequence[docstrings.SourceDocs] | None = None, **kwargs: Any
  ):
    """
    Args:
      documents: what to build from; None for what this Python has.
      **kwargs: as every TFDS builder has them.
    """
    self._documents = documents
    super().__init__(**kwargs)

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    documents = self._documents
    train, validation = split_by_package(_read() if documents is None else documents)
    return {
      'train': self._generate_examples(train),
      'validation': self._generate_examples(validation),
    }

  def _generate_examples(self, documents: Sequence[docstrings.SourceDocs]):
    for number, document in enumerate(documents):
      yield number, document._asdict()


def prepared(cache_dir: Path) -> Documentation:
  """The builder, its data made at first use (half a minute)."""
  return prepare(Documentation, cache_dir)


def prepare(kind: Callable[..., Any], cache_dir: Path) -> Any:
  """A builder of what this Python has, its data made at first use."""
  tfds.disable_progress_bar()
  make = functools.partial(kind, data_dir=str(cache_dir / 'tfds' / _environment()))
  builder = make()
  if not Path(builder.data_dir).exists():
    # TFDS reports what it does on stdout and stderr; only the lines of this module count.
    with contextlib.redirect_stdout(io.StringIO()) as said:
      try:
        builder.download_and_prepare()
      except FileExistsError:
        # Another command was done first: of one Python, with the same data.
        if not Path(builder.data_dir).exists():
          raise
        builder = make()
    print(
      ''.join(
        line for line in said.getvalue().splitlines(keepends=True) if line.startswith(_SAYS)
      ),
      end='',
      flush=True,
    )
  return builder


def held_out(cache_dir: Path) -> set[str]:
  """Names of the packages whose documentation is the validation split."""
  split = prepared(cache_dir).as_dataset(
    split='validation', read_config=tfds.ReadConfig(try_autocache=False)
  )
  return {example['package'].decode() for example in tfds.as_numpy(split)}


@functools.cache
def _environment() -> str:
  """Tells one Python and its packages from another."""
  # Each look at `metadata` parses a file, of hundreds, and `name` and `version` are such.
  about = (d.metadata for d in importlib.metadata.distributions())
  packages = {f'{of["Name"]} {of["Version"]}' for of in about}
  text = '\n'.join([sys.version, *sorted(packages)])
  return hashlib.sha256(text.encode('utf-8')).hexdigest()[:16]


def split_by_package(
  documents: Sequence[docstrings.SourceDocs],
) -> tuple[list[docstrings.SourceDocs], list[docstrings.SourceDocs]]:
  """(training, validation), near-duplicates removed; prints what became of them.

  Whole packages are held out, in an order given by their names, until they have 5 % of
  the characters; then what they share with training is removed.
  """
  # 1. Each text once.
  hashes = overlap.grams([document.text for document in documents])
  unique = ~overlap.near_duplicates(hashes)
  kept = [(d, h) for d, h, u in zip(documents, hashes, unique, strict=True) if u]
  # 2. Whole packages are held out, since modules of one package say similar things. The
  # order by a hash of the name is random, and the same for everyone.
  sizes: dict[str, int] = {}
  for document, _ in kept:
    sizes[document.package] = sizes.get(document.package, 0) + len(document.text)
  total, held_out, taken = sum(sizes.values()), set(), 0
  for package in sorted(sizes, key=lambda name: (zlib.crc32(name.encode()), name)):
    if taken < _VALIDATION_SHARE * total and sizes[package] < _LARGEST_HELD_OUT * total:
      held_out.add(package)
      taken += sizes[package]
  train = [(d, h) for d, h in kept if d.package not in held_out]
  validation = [(d, h) for d, h in kept if d.package in held_out]
  # 3. What a held-out document shares with training would be scored by memory.
  shares = overlap.shared([h for _, h in validation], [h for _, h in train])
  clean = shares <= _MOST_SHARED
  counts = np.array([len(h) for _, h in validation])
  remaining = float((shares * counts)[clean].sum() / max(counts[clean].sum(), 1))
  print(
    f'{_SAYS}{len(kept):,} documents, {total / 1e6:.1f} MB '
    f'({len(documents) - len(kept)} near-duplicates removed); validation: '
    f'{int(clean.sum())} documents of {len(held_out)} packages ({int((~clean).sum())} '
    f'removed), {remaining:.2%} of its 13-grams in training',
    flush=True,
  )
  return (
    [d for d, _ in train],
    [d for (d, _), c in zip(validation, clean, strict=True) if c],
  )


def _read() -> list[docstrings.SourceDocs]:
  """All documents; files that Python cannot parse are counted and reported."""
  documents, unreadable = [], 0
  for document in tqdm(
    docstrings.documents(),
    desc='reading documentation',
    unit=' files',
    leave=False,
    disable=None,
  ):
    if document is None:
      unreadable += 1
    else:
      documents.append(document)
  if unreadable:
    print(
      f'{_SAYS}{unreadable} Python files could not be parsed and are left out', flush=True
    )
  return documents
