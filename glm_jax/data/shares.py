"""What a run trains on, in numbers: shares of examples, tokens and loss."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glm_jax.batch import OBJECTIVES
from glm_jax.data import pipeline
from glm_jax.data.stream.source import Corpus

# Rows that are counted, about.
_ROWS = 2048


def table(
  task: str,
  feature_lengths: Mapping[str, int],
  corpora: Sequence[Corpus],
  *,
  batch_size: int,
  seed: int,
  step: int,
  train_steps: int,
) -> list[str]:
  """Lines of a table, by corpus and objective, over some two thousand rows from a step on.

  Args:
    task: an indexed task.
    feature_lengths: {'tokens': L}.
    corpora: that it reads.
    batch_size: of the global batch.
    seed: of the run.
    step: first global batch that is counted.
    train_steps: of the run, for the epochs of each corpus.
  """
  stream = pipeline.dataset(
    task, feature_lengths, batch_size=batch_size, seed=seed, start_step=step
  ).as_numpy_iterator()
  batches = list(itertools.islice(stream, max(1, _ROWS // batch_size)))
  batch = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
  counts = count(batch, len(corpora))
  totals = np.maximum(counts.sum((0, 1)), 1e-9)
  lines = [
    f'{"trained on":<22}{"examples":>9}{"tokens":>9}{"targets":>9}{"loss":>8}'
    f'{"rows":>14}{"epochs":>9}'
  ]
  for i, corpus in enumerate(corpora):
    n = len(corpus.rows['train'])
    epochs = train_steps * batch_size * corpus.share / n
    size = f'{n:>14,}{epochs:>9.2f}'
    for name, sums in zip(OBJECTIVES, counts[i], strict=True):
      if sums[0]:
        label = f'{corpus.name} {name}'.strip()
        shares = sums / totals
        lines.append(
          f'  {label:<20}{shares[0]:>9.1%}{shares[1]:>9.1%}{shares[2]:>9.1%}'
          f'{shares[3]:>8.1%}{size}'
        )
        # Rows and epochs are of a corpus: they stand in its first line alone.
        size = ''
  if not counts[..., 2].any():
    lines.append('  nothing is scored: none of these rows has a target')
  padding = 1 - totals[1] / batch['tokens'].size
  lines.append(f'  of {len(batch["tokens"]):,} rows, {padding:.1%} of which is padding')
  return lines


def count(batch: Mapping[str, Any], corpora: int) -> np.ndarray:
  """[corpora, objectives, 4]: examples, tokens, target tokens, and their loss weights.

  Args:
    batch: [B, L] arrays of the batch contract, and `corpus`, [B].
    corpora: how many there are.
  """
  inside = batch['key_end'] > 0
  t = np.arange(inside.shape[1])
  # An example sees nothing before itself, so its first token is the one that sees from
  # itself on.
  opens = inside & (batch['key_start'] == t)
  group = batch['corpus'][:, None] * len(OBJECTIVES) + batch['objective']
  sums = [
    np.bincount(group.ravel(), weights.ravel(), corpora * len(OBJECTIVES))
    for weights in (opens, inside, batch['loss_weights'] > 0, batch['loss_weights'])
  ]
  return np.stack(sums, axis=-1).reshape(corpora, len(OBJECTIVES), 4)
