"""Prompts with the answers that are wanted: exact match, ROUGE and BLEU of what is said."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from glm_jax import configs
from glm_jax.evaluation import metrics
from glm_jax.evaluation.task import Asker, Item, Options, Record, Task, lines, text_of
from glm_jax.text import asking


class Replies(Task):
  """A .jsonl with {"prompt", "answer"} a line, or the answers in a file of their own."""

  name = 'answers'

  def items(self, path: Path, asker: Asker, options: Options) -> Iterator[Item]:
    metrics.check_libraries('choose another --task')
    apart = bool(options.answers)
    prompts = [*lines(path, ['prompt'] if apart else ['prompt', 'answer'])]
    answers = [*lines(Path(options.answers), ['answer'])] if apart else prompts
    configs.check(
      len(prompts) == len(answers),
      'answers must be as many as prompts',
      f'{len(answers)} in {options.answers} for {len(prompts)} in {path}',
      'give an answer for each',
    )
    for (place, made), (other, answer) in zip(prompts, answers, strict=True):
      prompt = text_of(made, 'prompt', place)
      if not asker.config.causal and not options.template:
        prompt = options.blank.replace(asking.PROMPT, prompt)
      fields = {'prompt': prompt, 'reference': text_of(answer, 'answer', other).strip()}
      yield Item(fields=fields, prompt=prompt, template=options.template)

  def answered(self, fields: Record, spans: Sequence[str], text: str) -> Record:
    return {'answer': ' '.join(spans).strip()}

  def table(self, records: Sequence[Record]) -> list[Record]:
    texts = ([r[name] for r in records] for name in ('answer', 'reference'))
    return [{'examples': len(records), **metrics.score(*texts)}]
