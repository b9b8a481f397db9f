"""Conversations and asked pairs as their model reads them: whole documents of packed rows.

What carries loss is an answer and the token that ends it. The ids are those of
`glm_jax.chat`, of `generate` and of an exported chat template: the same code writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from glm_jax import configs
from glm_jax.data.corpora.fields import Document
from glm_jax.data.rows.table import Piece, RowPlan
from glm_jax.text import asking, chat
from glm_jax.text.conversation import Message, Template
from glm_jax.text.vocabulary import Vocabulary


def pieces(
  documents: Iterable[Document],
  vocabulary: Vocabulary,
  plan: RowPlan,
  rule: str,
  counts: dict[str, int],
) -> Iterator[Piece]:
  """Documents of a corpus by `plan.template` or `plan.blank`, each short enough for a row.

  Args:
    documents: in order.
    vocabulary: of the tokens.
    plan: of the rows.
    rule: of `CorpusConfig.too_long`, for a document that is longer.
    counts: see `tokenized.part_rows`; a conversation in rounds counts once for each answer.

  Raises:
    UserError: one that is no conversation or pair; one too long, with the rule 'error'.
  """
  template = chat.template_for(vocabulary, plan.template) if plan.template else None
  for number, document in enumerate(documents, 1):
    where = document.where() or f' in document {number}'
    if template is None:
      found = [_pair(document, vocabulary, plan, rule, where)] if document.text else []
    else:
      configs.check(
        bool(document.messages),
        'fine-tuning on conversations must read objects: .jsonl, .json, .csv or .parquet',
        f'a text{where}',
        'write {"messages": [...]} in a line each, or mix text in by Finetuning.text',
      )
      examples = template.examples(document.messages)
      found = [_conversation(e, template, plan.longest, rule, where) for e in examples]
    if not found:
      counts['skipped'] += 1
    for ids, scored, shortened in found:
      if not ids:
        counts['dropped'] += 1
        continue
      counts['documents'] += 1
      counts['tokens'] += len(ids)
      counts['shortened'] += shortened
      yield np.array(ids, np.int32), np.array(scored, bool)


_Fitted = tuple[list[int], list[bool], bool]
"""Ids, which carry loss, and whether something was left out; no ids if all was."""


def _conversation(
  messages: tuple[Message, ...], template: Template, longest: int, rule: str, where: str
) -> _Fitted:
  ids, scored = template.encode_masked(messages)
  if len(ids) <= longest:
    return ids, scored, False
  _refuse(rule, len(ids), longest, where)
  if rule == 'drop':
    return [], [], True
  # Whole rounds from the left.
  kept = template.fit(messages, longest)[0]
  if kept:
    return *template.encode_masked(kept), True
  if rule == 'truncate_answer':
    last = max(i for i, message in enumerate(messages) if message.role == 'user')
    rounds = [m for i, m in enumerate(messages) if i >= last or m.role == 'system']
    ids, scored = template.encode_masked(rounds)
    # The last answer loses its end, and what ends it stays.
    asked = len(template.encode(rounds[:-1], opening=False))
    if template.vocabulary.decode(ids[asked : longest - 1]).strip():
      return [*ids[: longest - 1], ids[-1]], [*scored[: longest - 1], True], True
  return [], [], True


def _pair(
  document: Document, vocabulary: Vocabulary, plan: RowPlan, rule: str, where: str
) -> _Fitted:
  prompt, answer, longest = document.prompt, document.text, plan.longest
  configs.check(
    bool(prompt.strip()),
    'a pair must have a prompt',
    f'none{where}',
    'name its field with CorpusConfig.prompt_key, or mix text in by Finetuning.text',
  )
  ids, unscored, cut = asking.encode_pair(vocabulary, plan.blank, prompt, answer, longest)
  total = len(ids) + cut
  if total > longest:
    _refuse(rule, total, longest, where)
    if rule == 'truncate_answer':
      ids, unscored, _ = asking.encode_pair(vocabulary, plan.blank, prompt, answer, total)
      ids = [*ids[: longest - 1], ids[-1]]
    if rule == 'drop' or len(ids) > longest or unscored >= len(ids) - 1:
      return [], [], True
  return ids, [i >= unscored for i in range(len(ids))], total > longest


def _refuse(rule: str, tokens: int, longest: int, where: str) -> None:
  configs.check(
    rule != 'error',
    f'with CorpusConfig.too_long, a conversation or pair must fit a row, {longest} tokens',
    f'{tokens} tokens{where}',
    'raise TASK_FEATURE_LENGTHS, or choose another rule',
  )
