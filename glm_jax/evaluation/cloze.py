"""Clozes: their files, their ids, and the metrics of SuperGLUE and CLUE."""

from __future__ import annotations

import bisect
import collections
import difflib
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glm_jax import configs
from glm_jax.evaluation.patterns import BLANK, ClozePattern, Example, Short
from glm_jax.evaluation.task import Asker, Item, Options, Record, Task, lines
from glm_jax.inference.candidates import Said

# As SuperGLUE and CLUE name their files.
_FILES = {'train': ('train',), 'val': ('val', 'dev')}
_ENDINGS = ('.jsonl', '.json')

Lines = Callable[[str], Iterator[tuple[str, Mapping[str, Any]]]]
"""(where it stands, line) of each example of a split, 'train' or 'val'."""


def examples(
  source: Path | Lines, pattern: ClozePattern, split: str
) -> Iterator[tuple[str, Example]]:
  """(where it stands, example) of a split.

  Args:
    source: the folder of a benchmark, or what reads its lines.
    pattern: of it.
    split: 'train', 'val', or as a file of the folder is named.

  Raises:
    UserError: no such file, or a line that is of another benchmark.
  """
  for where, line in _lines(source, pattern, split):
    try:
      found = [*pattern.read(line, where)]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
      raise configs.UserError(
        f'{where} must be a line of {pattern.name}, got one that lacks or spoils '
        f'{error}; give the folder of that benchmark.'
      ) from error
    for example in found:
      configs.check(
        all(text.strip() for text in example.candidates) and bool(example.candidates),
        f'{where}: a candidate must hold some text',
        repr(example.candidates)[:80],
        'mend it',
      )
      yield where, example


def _lines(source: Path | Lines, pattern: ClozePattern, split: str) -> Iterator[Any]:
  if not isinstance(source, Path):
    for where, line in source(split):
      missing = [name for name in pattern.fields if name not in line]
      configs.check(
        not missing,
        f'{where} must have the fields {[*pattern.fields]}',
        f'{[*line]}',
        f'give the data set of {pattern.name}',
      )
      yield where, line
    return
  names = [f'{name}{end}' for name in _FILES.get(split, (split,)) for end in _ENDINGS]
  file = next((source / name for name in names if (source / name).is_file()), None)
  configs.check(
    file is not None,
    f'{pattern.name} must be a folder that holds one of {names}',
    repr(str(source)),
    'give that folder',
  )
  if pattern.is_document:
    yield _document(file, pattern.fields)
  else:
    yield from lines(file, pattern.fields, endings=_ENDINGS)


def _document(file: Path, fields: Sequence[str]) -> tuple[str, Any]:
  """A file that is one object."""
  try:
    content = configs.parse_json(file.read_bytes())
  except ValueError as error:
    raise configs.UserError(
      f'{file} must be JSON, got {str(error)[:80]}; fetch it again.'
    ) from error
  configs.check(
    isinstance(content, dict) and {*fields} <= {*content},
    f'{file} must be an object with the fields {[*fields]}',
    repr(content)[:80],
    'give the folder of that benchmark',
  )
  return str(file), content


class Ids(NamedTuple):
  """An example as token ids.

  Attributes:
    before: its blank.
    behind: it; nothing, where a causal model is to end there.
    candidates: for it.
    ends: that a candidate ends counts, too: not where each is one token, as for the
      original's single-token clozes, nor in a causal text, which goes on; but always where
      a model has to end it by itself.
  """

  before: list[int]
  behind: list[int]
  candidates: list[list[int]]
  ends: bool

  def spans(self, causal: bool) -> list[list[int]]:
    """What is predicted: to a causal model, what stands behind the blank is part of it."""
    return [[*ids, *self.behind] if causal else ids for ids in self.candidates]


def encode(asker: Asker, example: Example, where: str) -> Ids:
  """The ids of an example; the longest of its shortenable parts lose their ends.

  Args:
    asker: of the model; `cut` counts what was shortened.
    example: of a pattern.
    where: it stands, in words.

  Raises:
    UserError: it does not fit, however short these are.
  """
  v, place = asker.vocabulary, [*example.parts].index(BLANK)
  parts: list[list[int]] = []
  for i, part in enumerate(example.parts):
    if i == place:
      parts.append([])
      continue
    begins = i == 0 or (i == place + 1 and v.restarts)
    parts.append([*(v.encode if begins else v.encode_inside)(part)])
  candidates = [[*v.encode_inside(text)] for text in example.candidates]
  causal = asker.config.causal
  ends = not causal and any(len(ids) > 1 for ids in candidates)
  if example.generated:
    ends = True
    parts = parts[: place + 1] if causal else parts
  size = sum(map(len, parts)) + max(map(len, candidates))
  # What opens a row; a span is opened by one more, and the last token is only predicted.
  size += len(asker.opened(asker.mask(BLANK))) + (-1 if causal else 1)
  short = [i for i in range(len(parts)) if isinstance(example.parts[i], Short)]
  excess = size - asker.length
  configs.check(
    excess <= sum(len(parts[i]) for i in short),
    f'{where}: an example must fit {asker.length} tokens without its shortenable parts',
    str(size),
    'raise the length of a row',
  )
  asker.cut += excess > 0
  for _ in range(excess):
    parts[max(short, key=lambda i: len(parts[i]))].pop()
  before = [token for part in parts[:place] for token in part]
  behind = [token for part in parts[place:] for token in part]
  return Ids(before, behind, candidates, ends)


class PatternTask(Task):
  """A pattern as a task of `evaluate`: what is said is the most probable candidate, or what
  is generated."""

  def __init__(self, pattern: ClozePattern):
    self.name, self.pattern = pattern.name, pattern

  def items(self, source: Path | Lines, asker: Asker, options: Options) -> Iterator[Item]:
    mask = options.mask or asker.mask(BLANK)
    for where, example in examples(source, self.pattern, options.split or 'val'):
      if example.generated:
        yield asked(asker, example, where, mask, options.max_new_tokens)
      else:
        yield item(asker, example, where, mask)

  def judged(self, fields: Record, said: Sequence[Said]) -> Record:
    scores = []
    for one in said:
      counted = one.log_probs if fields['ends'] else one.log_probs[:-1]
      score = float(counted.sum(dtype=np.float64))
      scores.append(score / len(counted) ** self.pattern.length_penalty)
    return {'said': int(np.argmax(scores)), 'scores': scores}

  def answered(self, fields: Record, spans: Sequence[str], text: str) -> Record:
    return {'answer': ' '.join(spans).strip()}

  def table(self, records: Sequence[Record]) -> list[Record]:
    scores = {name: METRICS[name](records) for name in self.pattern.metrics}
    if 'said' not in records[0]:
      return [{'examples': len(records), **scores}]
    # That which runs of any benchmark are compared by.
    return [{'examples': len(records), **scores, 'accuracy': accuracy(records)}]


def item(asker: Asker, example: Example, where: str, mask: str) -> Item:
  """An example as it is asked."""
  ids = encode(asker, example, where)
  causal = asker.config.causal
  behind = [] if causal else ids.behind
  spans = ids.spans(causal)
  asked = asker.of_ids(ids.before, spans, where, mask=mask, behind=behind, cut=False)
  fields = {
    'candidates': [text.strip() for text in example.candidates],
    'right': [*example.right],
    'group': example.group,
    'answers': [*example.answers],
    'ends': ids.ends,
  }
  return Item(fields=fields, question=asked)


def asked(asker: Asker, example: Example, where: str, mask: str, most: int) -> Item:
  """An example as a prompt; its longest shortenable part loses its end.

  Args:
    asker: of the model; `cut` counts what was shortened.
    example: of a pattern.
    where: it stands, in words.
    mask: of a model that fills blanks.
    most: tokens of the answer, for which there must be room.

  Raises:
    UserError: it does not fit, however short that is.
  """
  place = [*example.parts].index(BLANK)
  parts = [*example.parts[:place]]
  behind = [] if asker.config.causal else [*example.parts[place + 1 :]]
  at = max(range(place), key=lambda i: len(parts[i]) * isinstance(parts[i], Short))
  whole, room = parts[at], asker.length - most - len(asker.opened(mask))

  def cut(count: int) -> list[str]:
    return [*parts[:at], whole[:count], *parts[at + 1 :]]

  size = lambda count: len(asker.encoded(''.join([*cut(count), *behind])))
  kept = bisect.bisect_right(range(len(whole) + 1), room, key=size) - 1
  configs.check(
    kept >= 0,
    f'{where}: a question must fit {asker.length} tokens with {most} of an answer',
    str(size(0) + asker.length - room),
    'ask for fewer --max_new_tokens, or a model that has more positions',
  )
  asker.cut += kept < len(whole)
  blank = [] if asker.config.causal else [mask]
  fields = {'group': example.group, 'answers': [*example.answers]}
  return Item(fields=fields, prompt=''.join([*cut(kept), *blank, *behind]))


def accuracy(records: Sequence[Record]) -> float:
  """Of the candidate that is said."""
  return 100 * float(np.mean([record['said'] in record['right'] for record in records]))


def f1_macro(records: Sequence[Record]) -> float:
  """The mean of the F1 of each label (CB)."""
  pairs = [(record['said'], record['right'][0]) for record in records]
  return float(np.mean([_f1(pairs, label) for label in sorted({*sum(pairs, ())})]))


def f1(records: Sequence[Record]) -> float:
  """Of the second label over all examples (MultiRC's F1a)."""
  return _f1([(record['said'], record['right'][0]) for record in records], 1)


def _f1(pairs: Sequence[tuple[int, int]], label: int) -> float:
  both = sum(pair == (label, label) for pair in pairs)
  said, right = (sum(side == label for side in sides) for sides in zip(*pairs, strict=True))
  return 100 * 2 * both / (said + right) if said + right else 0.0


def exact_match(records: Sequence[Record]) -> float:
  """Questions all of whose examples are right (MultiRC)."""
  groups = collections.defaultdict(list)
  for record in records:
    groups[record['group']].append(record['said'] in record['right'])
  return 100 * float(np.mean([all(group) for group in groups.values()]))


def normalized(text: str) -> str:
  """Without case, punctuation, articles and double spaces, as SQuAD compares answers.

  Example:
    >>> normalized('The  quick, brown fox!')
    'quick brown fox'
  """
  text = ''.join(c for c in text.lower() if c not in {*string.punctuation})
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def word_f1(records: Sequence[Record]) -> float:
  """Of words, with the answer that is nearest (ReCoRD)."""

  def of(said: str, answer: str) -> float:
    a, b = (normalized(text).split() for text in (said, answer))
    same = sum((collections.Counter(a) & collections.Counter(b)).values())
    return 2 * same / (len(a) + len(b)) if same else 0.0

  return _best(records, of)


def word_exact_match(records: Sequence[Record]) -> float:
  """Of answers that are one of those that are right (ReCoRD)."""
  return _best(records, lambda said, answer: float(normalized(said) == normalized(answer)))


def _best(records: Sequence[Record], compare: Callable[[str, str], float]) -> float:
  def best(record: Mapping[str, Any]) -> float:
    said = record.get('answer')
    said = record['candidates'][record['said']] if said is None else said
    return max((compare(said, answer) for answer in record['answers']), default=0.0)

  return 100 * float(np.mean([best(record) for record in records]))


# As CMRC 2018's evaluation leaves them out; two characters of '……' are none of these.
_PUNCTUATION = {*'-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』'}
# A character of Chinese; a number; a run of other letters and digits; what else there is.
_UNIT = re.compile(r'[\u4e00-\u9fa5]|\d+(?:[.,]\d+)+|(?:(?![\u4e00-\u9fa5])\w)+|[^\w\s]')


def _bare(text: str) -> str:
  return ''.join(c for c in text.lower().strip() if c not in _PUNCTUATION)


def character_f1(records: Sequence[Record]) -> float:
  """Of the longest run that the answer has in common with the nearest one that is right.

  In characters of Chinese, and words of other languages (cmrc2018_evaluate.py of
  ymcui/cmrc2018, which finds words by NLTK; here they are runs of letters and digits).

  Example:
    >>> round(character_f1([{'answer': '4分钟内。', 'answers': ['4分钟']}]), 2)
    85.71
  """

  def of(said: str, answer: str) -> float:
    a, b = (_UNIT.findall(_bare(text)) for text in (said, answer))
    same = difflib.SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size
    return 2 * same / (len(a) + len(b)) if same else 0.0

  return _best(records, of)


def character_exact_match(records: Sequence[Record]) -> float:
  """Of answers that are one of those that are right, but for punctuation (CMRC 2018)."""
  return _best(records, lambda said, answer: float(_bare(said) == _bare(answer)))


METRICS: dict[str, Callable[[Sequence[Record]], float]] = {
  made.__name__: made
  for made in (
    accuracy,
    f1_macro,
    f1,
    exact_match,
    word_f1,
    word_exact_match,
    character_f1,
    character_exact_match,
  )
}
"""In percent, by name."""
