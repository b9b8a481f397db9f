"""From corpora of conversations or pairs to a registered task of answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from glm_jax import configs
from glm_jax.data import prepare, tasks
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.examples.answers import MixedText
from glm_jax.data.examples.objective_config import ObjectiveConfig, causal_packing
from glm_jax.data.prepare import Prepared
from glm_jax.data.rows.table import RowPlan
from glm_jax.data.stream.mixing import MixtureConfig
from glm_jax.data.stream.source import Corpus
from glm_jax.text.vocabulary import Vocabulary

TEXT = 'text'
"""Name of the corpus of pretraining text that is mixed in."""


def plan_answers(
  length: int, *, template: str = '', blank: str = '', packed: bool = True
) -> RowPlan:
  """The plan of rows of answers, see `RowPlan`; of one document each if not `packed`.

  Example:
    >>> plan_answers(8, packed=False).room
    (9, 9, 9, 9, 9, 9, 9, 9, 9, 9)
  """
  plan = dataclasses.replace(causal_packing(length), template=template, blank=blank)
  if not packed:
    # A document is given all of a row.
    plan = dataclasses.replace(plan, room=(plan.positions,) * len(plan.room))
  return plan


def plan_ranked(length: int, *, template: str = '', blank: str = '') -> RowPlan:
  """The plan of rows of two answers each, the preferred one first; see `RowPlan`."""
  plan = plan_answers(length, template=template, blank=blank)
  return dataclasses.replace(plan, ranked=True)


def plan_text(length: int, objectives: ObjectiveConfig, *, causal: bool) -> RowPlan:
  """The plan of rows of text between them, which are of the same size."""
  plan = causal_packing(length)
  if causal:
    return plan
  # A document has room for its spans.
  return dataclasses.replace(objectives.packing(length), row_length=plan.row_length)


def prepare_answers(
  task: str,
  corpora: Mapping[str, CorpusConfig],
  plans: Mapping[str, RowPlan],
  vocabulary: Vocabulary,
  *,
  mixture: MixtureConfig,
  text_share: float,
  objectives: ObjectiveConfig,
  causal: bool,
  two_positions: bool,
  packed: bool = True,
) -> Prepared:
  """Makes, or finds, the rows of a run, and registers its task.

  Args:
    task: of `tasks.ANSWERS`.
    corpora: by name; the one called `TEXT` is of pretraining.
    plans: of their rows.
    vocabulary: of the tokens.
    mixture: shares of the corpora of answers.
    text_share: of the rows, which are of `TEXT`.
    objectives: for it, of a prefix model.
    causal: whether the model is.
    two_positions: whether it has two positions.
    packed: several documents a row.

  Raises:
    UserError: see `prepare.prepare`.
  """
  rows = {
    name: prepare.rows_of(
      source, vocabulary, dict.fromkeys(('train', 'validation'), plans[name])
    )
    for name, source in corpora.items()
  }
  for name, found in rows.items():
    stored = found['train'].layout.row_length
    configs.check(
      stored == plans[name].row_length,
      f'shards of this run must have rows of {plans[name].row_length} tokens',
      f'{stored} in {corpora[name].corpus!r}',
      'set TASK_FEATURE_LENGTHS to one less than theirs, or make them again',
    )
  sizes = {name: len(r['train']) for name, r in rows.items() if name != TEXT}
  left = 1 - text_share * (TEXT in rows)
  shares = {name: share * left for name, share in mixture.shares(sizes).items()}
  shares |= {TEXT: text_share} if TEXT in rows else {}
  read = [Corpus(name, rows[name], share) for name, share in shares.items() if share]
  text = None
  if TEXT in rows:
    number = [corpus.name for corpus in read].index(TEXT)
    text = MixedText(TEXT, number, objectives, rows[TEXT]['train'].plan)
  tasks.register_answers(
    task, read, vocabulary, causal=causal, two_positions=two_positions, text=text
  )
  has_validation = any('validation' in corpus.rows for corpus in read)
  notes = [prepare.left_out(corpora[c.name], c.rows['train'].stats) for c in read]
  return Prepared(
    vocabulary=vocabulary,
    fingerprint=prepare.fingerprint(read),
    evaluation_tasks={'answer': f'{task}{tasks.EVALUATION}'} if has_validation else {},
    corpora=tuple(read),
    packed=packed,
    notes=tuple(filter(None, notes)),
  )
