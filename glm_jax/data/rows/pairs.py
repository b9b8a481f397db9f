"""Pairs of a prompt and an answer that are longer than a packed row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from glm_jax import configs
from glm_jax.data.rows.table import Encoded, RowPlan

RULES = ('truncate_prompt_left', 'truncate_answer', 'drop', 'error')


def fit(
  documents: Iterable[Encoded],
  prefix: tuple[int, ...],
  plan: RowPlan,
  rule: str,
  counts: dict[str, int],
) -> Iterator[Encoded]:
  """The documents, pairs shortened or left out so that each fits a row whole.

  The end token always follows, so room is kept for it. A text without a prompt passes: it
  is cut into parts later. So does everything where rows are cut from a stream.

  Args:
    documents: of a corpus.
    prefix: opens every document.
    plan: of the rows.
    rule: for a pair that is too long: its prompt loses its beginning, or its answer its
      end; it is left out, as where nothing of a prompt or an answer would remain; or it
      is an error.
    counts: 'shortened' and 'dropped' are added to; what is left out no longer counts
      among 'documents' and 'tokens'.

  Raises:
    UserError: a pair is too long, with the rule 'error'.

  Example:
    >>> plan, counts = RowPlan(6, 6, tuple(range(7))), {'tokens': 6, 'shortened': 0}
    >>> [*fit([([1, 2, 3, 4], [5, 6])], (), plan, 'truncate_prompt_left', counts)], counts
    ([([2, 3, 4], [5, 6])], {'tokens': 5, 'shortened': 1})
  """
  # Without the prefix and the end token.
  most = plan.longest - len(prefix) - 1
  for number, (prompt, answer) in enumerate(documents, 1):
    size = len(prompt) + len(answer)
    if not plan.packed or not len(prompt) or size <= most:
      yield prompt, answer
      continue
    configs.check(
      rule != 'error',
      f'with CorpusConfig.too_long, a pair must fit a row, {most} tokens',
      f'{size} tokens in document {number}',
      f'raise TASK_FEATURE_LENGTHS, or choose another of {RULES[:-1]}',
    )
    excess = size - most
    if rule == 'truncate_prompt_left' and excess < len(prompt):
      counts['shortened'] += 1
      counts['tokens'] -= excess
      yield prompt[excess:], answer
    elif rule == 'truncate_answer' and excess < len(answer):
      counts['shortened'] += 1
      counts['tokens'] -= excess
      yield prompt, answer[:-excess]
    else:
      counts['dropped'] += 1
      counts['documents'] -= 1
      counts['tokens'] -= size
