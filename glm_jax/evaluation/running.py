"""A task and a model: every example judged once, however often that is interrupted."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

from glm_jax.evaluation.task import Item, Record, Task


def judged(
  model: Any,
  task: Task,
  items: Sequence[Item],
  done: Container[int],
  *,
  size: int,
  most: int,
) -> Iterator[Record]:
  """Records of the examples that are not done yet, as they come.

  Args:
    model: a `glm_jax.library.LanguageModel`.
    task: of the examples.
    items: all of them.
    done: numbers of those that are not wanted.
    size: examples that are worked on at a time.
    most: longest generated answer.
  """
  yield from read(model.reader, task, items, size, done)
  rest = [i for i, item in enumerate(items) if item.question is None]
  prompts = [items[i].prompt for i in rest]
  how = {
    'skip': {(place, 0) for place, number in enumerate(rest) if number in done},
    'max_new_tokens': most,
  }
  # Of a task, either all are questions of a conversation or none is.
  template = items[rest[0]].template if rest else ''
  answers: Iterable[Any] = ()
  if template:
    asked = [[{'role': 'user', 'content': prompt}] for prompt in prompts]
    answers = model.replies(asked, template.removeprefix('own'), **how)
  elif rest:
    answers = model.answers(prompts, **how)
  for answer in answers:
    number = rest[answer.number]
    fields = items[number].fields
    yield _record(number, fields, task.answered(fields, answer.spans, answer.text))


def read(
  reader: Any, task: Task, items: Sequence[Item], size: int, done: Container[int] = ()
) -> Iterator[Record]:
  """Those of the examples whose candidates are read, by a `candidates.Reader`."""
  asked = [i for i, item in enumerate(items) if item.question is not None]
  # Of like lengths, so that little is padding; those that are done are read again with the
  # rest of their batch, whose sums then have the same last bits.
  key = lambda i: (len(items[i].question.request.context), i)
  for batch in _batched(sorted(asked, key=key), size):
    if all(number in done for number in batch):
      continue
    made = reader([items[number].question for number in batch])
    for number, said in zip(batch, made, strict=True):
      if number not in done:
        fields = items[number].fields
        yield _record(number, fields, task.judged(fields, said))


def _record(number: int, fields: Record, more: Record) -> Record:
  # `sample` is what `prompt_files.Answers` tells answers apart by.
  return {'number': number, 'sample': 0, **fields, **more}


def _batched(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
  return (numbers[i : i + size] for i in range(0, len(numbers), size))


def in_words(table: Sequence[Record]) -> str:
  """The table for a person.

  Example:
    >>> print(in_words([{'subject': 'law', 'examples': 12, 'accuracy': 25.0}]))
    subject  examples  accuracy
    law            12   25.0000
  """
  names = [*dict.fromkeys(itertools.chain.from_iterable(table))]
  shown = lambda value: f'{value:.4f}' if isinstance(value, float) else str(value)
  rows = [names, *([shown(line.get(name, '')) for name in names] for line in table)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  is_text = [isinstance(table[0].get(name, ''), str) for name in names]
  lines = [
    '  '.join(
      cell.ljust(width) if text else cell.rjust(width)
      for cell, width, text in zip(row, widths, is_text, strict=True)
    ).rstrip()
    for row in rows
  ]
  return '\n'.join(lines)
