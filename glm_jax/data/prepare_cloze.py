"""From clozes as token ids to a registered task: an example is a row of candidates.

What is stored of an example is its context, once, and all its candidates; which of these
become the documents of a row is drawn as it is read (`examples.candidates`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from glm_jax import configs
from glm_jax.data import prepare, tasks
from glm_jax.data.examples.objective_config import causal_packing
from glm_jax.data.making import tokenized
from glm_jax.data.prepare import Prepared
from glm_jax.data.rows import shards
from glm_jax.data.rows.table import Piece, grouped_rows
from glm_jax.data.stream.source import Corpus
from glm_jax.text.vocabulary import Vocabulary


def prepare_clozes(
  task: str,
  splits: Mapping[str, Sequence[Sequence[Piece]]],
  vocabulary: Vocabulary,
  *,
  length: int,
  negatives: int,
  cache_dir: str,
  corpus: str,
  causal: bool,
  two_positions: bool,
) -> Prepared:
  """Makes, or finds, the rows of a run, and registers its task.

  Args:
    task: its name.
    splits: examples of 'train' and 'validation', each the pieces of a row: a context and
      its candidates, of which the first is right.
    vocabulary: of the tokens.
    length: L, positions of a row.
    negatives: most wrong candidates in a row, see `examples.candidates`.
    cache_dir: where rows are kept.
    corpus: what they are from, for a reader.
    causal: whether the model is.
    two_positions: whether it has two positions.
  """
  rows = {}
  for split, examples in splits.items():
    configs.check(
      bool(examples),
      f'the {split} split must hold an example that can be learnt from',
      f'none in {corpus!r}',
      'give more',
    )
    longest = max(sum(len(tokens) for tokens, _ in pieces) for pieces in examples)
    plan = dataclasses.replace(causal_packing(length), row_length=longest)
    table = grouped_rows(examples, longest)
    records = shards.layout_of(vocabulary, longest).encode(table)
    key = hashlib.sha256(
      json.dumps([vocabulary.fingerprint, split, length, longest]).encode()
    )
    key.update(records.tobytes())
    folder = Path(cache_dir).expanduser() / 'rows' / key.hexdigest()[:16]
    if not (folder / shards.INDEX).exists():
      counts = tokenized.new_counts()
      counts |= {'documents': len(examples), 'tokens': int(table.lengths.sum())}
      # Examples are shuffled alone.
      about = {'corpus': corpus}
      tokenized.store(folder, split, records, counts, vocabulary, plan, 1, about)
    rows[split] = shards.load(str(folder), vocabulary)[split]
  read = [Corpus('', rows)]
  tasks.register_clozes(
    task,
    read,
    vocabulary,
    causal=causal,
    two_positions=two_positions,
    most=max(len(pieces) for examples in splits.values() for pieces in examples) - 1,
    negatives=negatives,
  )
  return Prepared(
    vocabulary=vocabulary,
    fingerprint=prepare.fingerprint(read),
    evaluation_tasks={'answer': f'{task}{tasks.EVALUATION}'},
    corpora=tuple(read),
    packed=True,
  )
