"""Multiple choice in csv files: C-Eval, MMLU and CMMLU, as their authors ask it.

A folder holds one folder a split, and a file a subject: FOLDER/val/law_val.csv. The letter
of an answer is scored; examples with answers before a question are those of `dev`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glm_jax import configs
from glm_jax.evaluation.task import Asker, Item, Options, Record, Task
from glm_jax.inference.candidates import Said

_LETTERS = ('A', 'B', 'C', 'D')


class Benchmark(NamedTuple):
  """How a benchmark writes its files and its questions.

  Attributes:
    split: that is usually reported.
    header: columns of the question, the four choices and the answer; () without a header.
    opening: of a prompt, with {subject}.
    question: how one stands in a prompt, behind which its answer stands.
    answer: how the letter of an answer does.
  """

  split: str
  header: tuple[str, ...]
  opening: str
  question: str
  answer: str


_CHOICES = '\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n'
BENCHMARKS = {
  # hendrycks/test evaluate.py
  'mmlu': Benchmark(
    'test',
    (),
    'The following are multiple choice questions (with answers) about {subject}.\n\n',
    '{question}' + _CHOICES + 'Answer:',
    ' {}',
  ),
  # hkust-nlp/ceval, the prompt of answers alone
  'ceval': Benchmark(
    'val',
    ('question', *_LETTERS, 'answer'),
    '以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。\n\n',
    '{question}' + _CHOICES + '答案：',
    '{}',
  ),
  # haonan-li/CMMLU
  'cmmlu': Benchmark(
    'test',
    ('Question', *_LETTERS, 'Answer'),
    '以下是关于{subject}的单项选择题，请直接给出正确答案的选项。\n\n',
    '题目：{question}' + _CHOICES + '答案是：',
    '{}',
  ),
}


class Choices(Task):
  """Of one benchmark; a line a subject, of all questions, and the mean of the subjects."""

  def __init__(self, name: str):
    self.name, self._benchmark = name, BENCHMARKS[name]

  def items(self, path: Path, asker: Asker, options: Options) -> Iterator[Item]:
    how = self._benchmark
    split = options.split or how.split
    files = sorted((path / split).glob('*.csv'))
    configs.check(
      bool(files),
      f'{self.name} must be a folder that holds {split}/SUBJECT.csv',
      repr(str(path)),
      'give that folder, or another --split',
    )
    mask = options.mask or asker.mask('[MASK]')
    for file in files:
      subject = file.stem.removesuffix(f'_{split}')
      opening = how.opening.format(subject=subject.replace('_', ' '))
      for row in self._shots(path, subject, options.shots):
        opening += how.question.format(**row) + how.answer.format(row['answer']) + '\n\n'
      for number, row in enumerate(self._rows(file), 1):
        place = f'{file} question {number}'
        answers = [how.answer.format(letter) for letter in _LETTERS]
        # Of what is asked, nothing may be left out.
        question = asker.question(
          opening + how.question.format(**row), answers, place, mask=mask, cut=False
        )
        fields = {'subject': subject, 'question': number, 'answer': row['answer']}
        yield Item(fields=fields, question=question)

  def _shots(self, path: Path, subject: str, count: int) -> list[dict[str, str]]:
    if not count:
      return []
    names = (f'{subject}_dev.csv', f'{subject}.csv')
    file = next(
      (f for n in names if (f := path / 'dev' / n).is_file()), path / 'dev' / names[0]
    )
    rows = self._rows(file) if file.is_file() else []
    configs.check(
      len(rows) >= count,
      f'{file} must have an example for each of --shots={count}',
      f'{len(rows)}',
      'ask with fewer',
    )
    return rows[:count]

  def _rows(self, file: Path) -> list[dict[str, str]]:
    """Questions of a file, under the names of `Benchmark.question`."""
    try:
      table = [*csv.reader(file.read_text(encoding='utf-8-sig').splitlines(True))]
    except (UnicodeDecodeError, csv.Error) as error:
      raise configs.UserError(
        f'{file} must be a csv file in UTF-8, got {str(error)[:80]}; fetch it again.'
      ) from error
    header, names = self._benchmark.header, ('question', *_LETTERS, 'answer')
    columns = [*range(len(names))]
    if header:
      first = table.pop(0) if table else []
      missing = [name for name in header if name not in first]
      configs.check(
        not missing,
        f'a csv of {self.name} must have the columns {header}',
        f'{file} without {missing}',
        'give the --task that it is of, or a --split with answers',
      )
      columns = [first.index(name) for name in header]
    rows = []
    for number, row in enumerate(table, 1):
      inside = len(row) > max(columns) and (header or len(row) == len(names))
      values = [row[column].strip() for column in columns] if inside else []
      configs.check(
        bool(values) and values[-1] in _LETTERS and all(values),
        f'a question of {self.name} must have a text, four choices and one of {_LETTERS}',
        f'{row!r:.80} in {file} question {number}',
        'give the --task that it is of, or mend it',
      )
      rows.append(dict(zip(names, values, strict=True)))
    return rows

  def judged(self, fields: Record, said: Sequence[Said]) -> Record:
    log_probs = [float(one.log_probs[:-1].sum(dtype=np.float64)) for one in said]
    return {'said': _LETTERS[int(np.argmax(log_probs))], 'log_probs': log_probs}

  def table(self, records: Sequence[Record]) -> list[Record]:
    right = lambda group: 100 * float(np.mean([r['said'] == r['answer'] for r in group]))
    made = []
    for subject in sorted({record['subject'] for record in records}):
      group = [record for record in records if record['subject'] == subject]
      made.append({'subject': subject, 'examples': len(group), 'accuracy': right(group)})
    mean = float(np.mean([line['accuracy'] for line in made]))
    return [
      *made,
      {'subject': 'mean of subjects', 'examples': len(records), 'accuracy': mean},
      {'subject': 'all questions', 'examples': len(records), 'accuracy': right(records)},
    ]
