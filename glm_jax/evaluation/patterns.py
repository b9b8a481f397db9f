"""Tasks of understanding as clozes: patterns, and what may fill them.

SuperGLUE's are THUDM/GLM's (tasks/superglue/pvp.py, with the pattern that its
configurations choose; GLM paper, section 3.1), after PET (Schick and Schütze, 2021). Those
of CLUE are in our own words. A folder holds a file a split, as the benchmarks publish it.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from glm_jax.configs import check

BLANK = '[MASK]'
"""In a pattern: what is to be filled."""


class Short(str):
  """A part of a pattern; in a row that is too short, its end is left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """A pattern that has been filled in but for its blank.

  Attributes:
    parts: texts that follow each other; one is `BLANK`.
    candidates: for it, each with the space that it begins with.
    right: numbers of the candidates that are.
    trained: whether it is learnt from, by the first of `right`.
    group: examples that are one question.
    answers: texts that are right, for the metrics of words.
    generated: the blank is filled freely when it is judged; the candidate is the answer
      that is learnt.
  """

  parts: Sequence[str]
  candidates: Sequence[str]
  right: Sequence[int]
  trained: bool = True
  group: str = ''
  answers: Sequence[str] = ()
  generated: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClozePattern:
  """A benchmark as a cloze.

  Attributes:
    name: of it.
    fields: that a line must have.
    read: (line, where it stands) -> its examples.
    metrics: names in `evaluation.cloze.METRICS`; the first is the main one.
    loss: of training, see `recipes.cloze`.
    negatives: most wrong candidates beside the right one in training; 0 for all.
    length_penalty: p, scores are divided by the number of tokens ** p.
    is_document: a file is one JSON value, which is read as a line would be.
  """

  name: str
  fields: Sequence[str]
  read: Callable[[Mapping[str, Any], str], Iterator[Example]]
  metrics: Sequence[str] = ('accuracy',)
  loss: str = 'cross_entropy'
  negatives: int = 0
  length_penalty: float = 0.0
  is_document: bool = False


def chosen(
  parts: Sequence[str], words: Mapping[str, str], label: Any, where: str, group: str = ''
) -> Example:
  """An example whose labels have words.

  Args:
    parts: see `Example`.
    words: of each label.
    label: of this one; True is 'true'.
    where: it stands, in words.
    group: see `Example`.

  Raises:
    UserError: no word is of the label.
  """
  label = str(label).lower() if isinstance(label, bool) else str(label)
  check(
    label in words,
    f'{where}: a label must be one of {[*words]}',
    repr(label),
    'mend it, or give words for it in a pattern of your own (--import)',
  )
  right = ([*words].index(label),)
  return Example(parts=parts, candidates=[*words.values()], right=right, group=group)


def _without_stop(text: str) -> str:
  return text.rstrip(string.punctuation)


def _choice(text: str) -> str:
  return _without_stop(text[:1].lower() + text[1:])


def _copa(line, where):
  one, two = _choice(line['choice1']), _choice(line['choice2'])
  links = {'cause': ' because', 'effect': ', so'}
  check(
    line['question'] in links and line['label'] in (0, 1),
    f'{where}: COPA asks for a cause or an effect, which is choice 0 or 1',
    f'{line["question"]!r}, {line["label"]!r}',
    'mend it',
  )
  premise = Short(' ' + _without_stop(line['premise']))
  link = links[line['question']]
  parts = ['"', one, '" or "', two, '"?', premise, link, BLANK, '.']
  yield Example(parts=parts, candidates=[f' {one}', f' {two}'], right=[line['label']])


def _marked(line, where):
  """The text with its pronoun between asterisks, and the spans."""
  target = line['target']
  words, place = line['text'].split(), target['span2_index']
  check(
    0 <= place < len(words),
    f'{where}: the index of a pronoun must be that of a word',
    f'{place} of {len(words)} words',
    'mend it',
  )
  words[place] = f'*{words[place]}*'
  return ' '.join(words), target['span1_text'], target['span2_text']


def _wsc(line, where):
  check(
    bool(line.get('candidates')),
    f'{where}: WSC is learnt and judged beside other nouns of the text, which must be its '
    'field "candidates"',
    'none',
    'add them, or choose wsc_words, which asks Yes or No',
  )
  text, noun, pronoun = _marked(line, where)
  others = [other for other in dict.fromkeys(line['candidates']) if other != noun]
  ask = f" Question: In the passage above, what does the pronoun '*{pronoun}*' refer to?"
  yield Example(
    parts=[Short(text), f'{ask} Answer:', BLANK, '.'],
    candidates=[f' {noun}', *(f' {other}' for other in others)],
    # That it is not this noun is right where another one is more probable.
    right=[0] if line['label'] else [*range(1, len(others) + 1)],
    trained=bool(line['label']),
  )


def _wsc_words(line, where):
  text, noun, pronoun = _marked(line, where)
  ask = f" Question: In the passage above, does the pronoun '*{pronoun}*' refer to {noun}?"
  parts = [Short(text), f'{ask} Answer:', BLANK, '.']
  yield chosen(parts, _YES, line['label'], where)


def _record(line, where):
  passage = line['passage']
  text = passage['text']
  entities = [text[e['start'] : e['end'] + 1] for e in passage['entities']]
  candidates = [*dict.fromkeys(entities)]
  for number, question in enumerate(line['qas']):
    before, found, behind = question['query'].partition('@placeholder')
    check(
      bool(found),
      f'{where}: a query must have a @placeholder',
      repr(before[:60]),
      'mend it',
    )
    answers = [*dict.fromkeys(answer['text'] for answer in question['answers'])]
    yield Example(
      parts=[
        Short(text.replace('@highlight\n', '- ')),
        f' {before.rstrip()}',
        BLANK,
        behind,
      ],
      candidates=[f' {text}' for text in candidates],
      right=[i for i, text in enumerate(candidates) if text in answers],
      group=f'{where}.{number}',
      answers=answers,
    )


_YES = {'false': ' No', 'true': ' Yes'}


def _rte(line, where):
  hypothesis = Short(_without_stop(line['hypothesis']))
  parts = ['"', hypothesis, '" ?', BLANK, ', "', Short(line['premise']), '"']
  words = {'not_entailment': ' No', 'entailment': ' Yes'}
  yield chosen(parts, words, line['label'], where)


def _cb(line, where):
  hypothesis = Short(_without_stop(line['hypothesis']))
  parts = [hypothesis, '?', BLANK, '.', Short(f' {line["premise"]}')]
  words = {'contradiction': ' No', 'entailment': ' Yes', 'neutral': ' Maybe'}
  yield chosen(parts, words, line['label'], where)


def _boolq(line, where):
  question = Short(f' {line["question"]}')
  parts = ['Based on the following passage ', question, '?', BLANK, '.']
  yield chosen([*parts, Short(f' {line["passage"]}')], _YES, line['label'], where)


def _multirc(line, where):
  text = Short(_without_stop(line['passage']['text'].rstrip()))
  for number, asked in enumerate(line['passage']['questions']):
    question = _without_stop(asked['question'].rstrip())
    for answer in asked['answers']:
      said = f' {answer["text"]}'
      parts = [text, '. Question:', f' {question}', '? Is it', said, '?', BLANK, '.']
      words = {'0': ' No', '1': ' Yes'}
      yield chosen(parts, words, answer['label'], where, f'{where}.{number}')


def _wic(line, where):
  ask = f' Does {line["word"]} have the same meaning in both sentences?'
  parts = [Short(line['sentence1']), Short(f' {line["sentence2"]}'), ask, BLANK]
  yield chosen(parts, _YES, line['label'], where)


_TOPICS = {
  **{'100': '故事', '101': '文化', '102': '娱乐', '103': '体育', '104': '财经'},
  **{'106': '房产', '107': '汽车', '108': '教育', '109': '科技', '110': '军事'},
  **{'112': '旅游', '113': '国际', '114': '股票', '115': '农业', '116': '游戏'},
}


def _tnews(line, where):
  parts = [Short(line['sentence']), '，这是一条关于', BLANK, '的新闻。']
  yield chosen(parts, _TOPICS, line['label'], where)


def _afqmc(line, where):
  parts = ['“', Short(line['sentence1']), '”和“', Short(line['sentence2'])]
  words = {'0': '否', '1': '是'}
  yield chosen([*parts, '”意思相同吗？', BLANK, '。'], words, line['label'], where)


def _cluewsc(line, where):
  target = line['target']
  ask = f'其中“{target["span2_text"]}”指的是“{target["span1_text"]}”吗？'
  words = {'false': '否', 'true': '是'}
  yield chosen([Short(line['text']), ask, BLANK, '。'], words, line['label'], where)


def _cmrc(content, where):
  for article in content['data']:
    for paragraph in article['paragraphs']:
      for asked in paragraph['qas']:
        answers = [*dict.fromkeys(answer['text'] for answer in asked['answers'])]
        check(
          bool(answers),
          f'{where}: question {asked["id"]} must have an answer',
          'none',
          'give a split with answers',
        )
        yield Example(
          parts=[Short(paragraph['context']), f'请问，{asked["question"]}', BLANK, '。'],
          candidates=answers[:1],
          right=[0],
          group=str(asked['id']),
          answers=answers,
          generated=True,
        )


PATTERNS: dict[str, ClozePattern] = {}
"""By name."""


def register(pattern: ClozePattern) -> None:
  """Adds a pattern of one's own, in a module that --import names."""
  PATTERNS[pattern.name] = pattern


def _superglue(name: str, fields: str, read: Any, **more: Any) -> None:
  register(ClozePattern(name=name, fields=(*fields.split(), 'label'), read=read, **more))


_superglue('copa', 'premise choice1 choice2 question', _copa)
_superglue('wsc', 'text target', _wsc, loss='mix', negatives=10, length_penalty=1.0)
_superglue('wsc_words', 'text target', _wsc_words)
_superglue('rte', 'premise hypothesis', _rte)
_superglue('cb', 'premise hypothesis', _cb, metrics=('accuracy', 'f1_macro'))
_superglue('boolq', 'question passage', _boolq)
_superglue('wic', 'word sentence1 sentence2', _wic)
register(
  ClozePattern(
    name='multirc', fields=('passage',), read=_multirc, metrics=('f1', 'exact_match')
  )
)
register(
  ClozePattern(
    name='record',
    fields=('passage', 'qas'),
    read=_record,
    metrics=('word_f1', 'word_exact_match'),
    negatives=10,
  )
)
_superglue('tnews', 'sentence label_desc', _tnews)
_superglue('afqmc', 'sentence1 sentence2', _afqmc)
_superglue('cluewsc', 'text target', _cluewsc)
register(
  ClozePattern(
    name='cmrc',
    fields=('data',),
    read=_cmrc,
    metrics=('character_f1', 'character_exact_match'),
    loss='generative',
    is_document=True,
  )
)
