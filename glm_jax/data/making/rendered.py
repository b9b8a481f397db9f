"""Conversations and asked pairs as their model reads them: whole documents of packed rows.

What carries loss is an answer and the token that ends it. The ids are those of
`glm_jax.chat`, of `generate` and of an exported chat template: the same code writes them.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

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


def ranked(
  documents: Iterable[Document],
  vocabulary: Vocabulary,
  plan: RowPlan,
  rule: str,
  counts: dict[str, int],
) -> Iterator[tuple[Piece, Piece]]:
  """Pairs of answers, with as much of what was asked as lets both fit one row.

  What is too long loses its beginning, the same in both: whole turns first, then of the
  last question as little as is enough, which is counted in characters by a chat template
  and in tokens around a blank. Its answers and their ends are never cut: a pair that has no
  room for any of the question is left out.

  Args:
    documents: in order.
    vocabulary: of the tokens.
    plan: of the rows; with a blank, of a model without a chat template.
    rule: of `CorpusConfig.too_long`.
    counts: see `tokenized.part_rows`.

  Raises:
    UserError: one that is no pair; one too long, with the rule 'error'; several turns
      where there is no chat template.
  """
  template = chat.template_for(vocabulary, plan.template) if plan.template else None
  # Behind both, there is one token more.
  longest = plan.longest - 1

  def encode(messages: Sequence[Message], cut: int) -> tuple[list[int], list[bool]]:
    if template is not None:
      return template.encode_masked(messages)
    prompt, answer = (message.content for message in messages)
    room = len(prompt.encode()) + len(answer.encode()) + longest
    ids, unscored, _ = asking.encode_pair(vocabulary, plan.blank, prompt, answer, room)
    if cut:
      room = len(ids) - cut
      ids, unscored, _ = asking.encode_pair(vocabulary, plan.blank, prompt, answer, room)
    return ids, [i >= unscored for i in range(len(ids))]

  for number, document in enumerate(documents, 1):
    where = document.where() or f' in document {number}'
    configs.check(
      bool(document.pairs) or document.unranked > 0,
      'preferences must be read from objects: .jsonl, .json, .csv or .parquet',
      f'a text{where}',
      'write {"prompt": ..., "chosen": ..., "rejected": ...} in a line each',
    )
    counts['unranked'] += document.unranked
    for pair in document.pairs:
      configs.check(
        template is not None or len(pair[0]) == 2,
        'a model without a chat template must be asked a single question',
        f'{len(pair[0])} messages{where}',
        'leave out what was said before, or name a template',
      )
      asked = pair[0][:-1]
      both = lambda asked, cut=0: [encode([*asked, side[-1]], cut) for side in pair]
      size = lambda sides: sum(len(ids) for ids, _ in sides)
      sides = both(asked)  # the preferred one first
      excess = size(sides) - longest
      if excess > 0:
        _refuse(rule, size(sides), longest, where)
        if rule != 'drop' and template is None:
          sides = both(asked, -(-excess // 2))
        elif rule != 'drop':
          sides = both(_end_of(asked, lambda some: size(both(some)) <= longest))
      if size(sides) > longest:
        counts['dropped'] += 1
        continue
      counts['documents'] += 1
      counts['tokens'] += size(sides)
      counts['shortened'] += excess > 0
      # The last token of a row is a target alone: behind the end of the other answer stands
      # one more, so that a model reads that end as it does the first one's.
      sides[1] = sides[1][0] + [vocabulary.specials.pad], sides[1][1] + [False]
      first, second = (
        (np.array(ids, np.int32), np.array(scored, bool)) for ids, scored in sides
      )
      yield first, second


def _end_of(
  asked: Sequence[Message], fits: Callable[[Sequence[Message]], bool]
) -> Sequence[Message]:
  """The end of what was asked that fits, behind what opens it; all where none does.

  It begins with a question: if not even the last one fits, with as much of that as does.
  """
  opens = [*itertools.takewhile(lambda m: m.role == 'system', asked)]
  starts = [i for i, message in enumerate(asked) if message.role == 'user']
  for start in starts:
    if fits(kept := (*opens, *asked[start:])):
      return kept
  question, behind = asked[starts[-1]], asked[starts[-1] + 1 :]
  text = question.content
  end_from = lambda at: (
    *opens,
    dataclasses.replace(question, content=text[at:]),
    *behind,
  )
  # White space alone asks nothing.
  size = len(text.rstrip())
  at = bisect.bisect_left(range(size), True, key=lambda at: fits(end_from(at)))
  return end_from(at) if at < size else asked


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
    f'with too_long={rule!r}, a conversation or pair must fit a row, {longest} tokens',
    f'{tokens} tokens{where}',
    'raise TASK_FEATURE_LENGTHS, or choose another rule',
  )
