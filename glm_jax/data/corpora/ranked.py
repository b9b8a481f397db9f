"""An object of a file as answers to one question, of which people preferred one.

- HH-RLHF: {"chosen", "rejected"}, two transcripts of 'Human:' and 'Assistant:'
- TRL and UltraFeedback: {"prompt", "chosen", "rejected"}, each a text or messages; messages
  of an answer may open with those of the prompt, which may then be absent
- LLaMA-Factory: {"instruction", "input", "history", "system", "chosen", "rejected"}, and of
  ShareGPT {"conversations", "chosen": {"from", "value"}, "rejected"}
- scored answers: {"prompt", "answers": [{"text", "score"}, ...]}, or of UltraFeedback
  {"instruction", "completions": [{"response", "overall_score"}, ...]}; each two whose
  scores differ are a pair (InstructGPT, Ouyang et al., 2022, section 3.5)
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from glm_jax import configs
from glm_jax.data.corpora import turns
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.fields import Document
from glm_jax.text.chat import form_of
from glm_jax.text.conversation import Message, Template

_QUESTIONS = ('prompt', 'instruction', 'question', 'query')
_ANSWERS = ('answers', 'completions', 'responses')
_TEXTS = ('text', 'response', 'content', 'answer')
_SCORES = ('score', 'overall_score')
_SPEAKER = re.compile(r'\n\n(Human|Assistant):')
_SAID_BY = {'Human': 'user', 'Assistant': 'assistant'}

Conversation = tuple[Message, ...]


def document(
  content: Any, config: CorpusConfig, where: Callable[[], str] = str
) -> Document:
  """The pairs of an object, each two conversations that differ in their last answer.

  Answers that are equal or empty, that have equal scores, or that answer something else,
  are no pair: they are counted.

  Args:
    content: of the object.
    config: the family, and the names of fields.
    where: the object stands, in words; called for a message alone.

  Raises:
    UserError: no answers to compare, a score that is no number; see `turns.document`.

  Example:
    >>> config = CorpusConfig(corpus='*.jsonl', conversations='chatglm2', ranked=True)
    >>> line = {'prompt': '1 + 1?', 'chosen': '2', 'rejected': '3'}
    >>> [[m.content for m in side] for side in document(line, config).pairs[0]]
    [['1 + 1?', '2'], ['1 + 1?', '3']]
  """
  template = form_of(config.conversations)
  with turns.placed(where):
    present, tools = turns.opened(
      content,
      'answers that are compared must stand in an object',
      'write {"prompt": ..., "chosen": ..., "rejected": ...}',
    )
    answered = [
      (_whole(conversation, tools, template), score)
      for conversation, score in _answered(present, config, template)
    ]
  pairs, unranked = [], 0
  for one, other in itertools.combinations(answered, 2):
    (better, most), (worse, least) = sorted((one, other), key=lambda a: -a[1])
    if most > least and better and worse and _comparable(better, worse):
      pairs.append((better, worse))
    else:
      unranked += 1
  text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
  return Document(text, pairs=tuple(pairs), unranked=unranked, where=where)


def _comparable(better: Conversation, worse: Conversation) -> bool:
  same = better[:-1] == worse[:-1]
  return same and better[-1].content.strip() != worse[-1].content.strip()


def _whole(
  conversation: Sequence[Message], tools: Sequence[Any], template: Template
) -> Conversation:
  """It as its family reads it, only its last answer learnt; () for an empty answer."""
  configs.check(
    len(conversation) > 1 and conversation[-1].role == 'assistant',
    'what is compared must be an answer to a question',
    f'{[m.role for m in conversation]}',
    'end both conversations with an answer',
  )
  *asked, answer = conversation
  if isinstance(answer.content, str) and not answer.content.strip():
    return ()
  learnt = lambda m, yes: dataclasses.replace(m, without_loss=not yes)
  messages = (
    *(learnt(m, False) if m.role == 'assistant' else m for m in asked),
    learnt(answer, True),
  )
  return turns.checked(messages, tools, template)


def _answered(
  content: dict[str, Any], config: CorpusConfig, template: Template
) -> Iterator[tuple[list[Message], float]]:
  """Conversations that end with an answer, and its score."""
  several = next((name for name in _ANSWERS if name in content), None)
  if several is None and isinstance(content.get('output'), Sequence):
    # As LLaMA-Factory had it before there were names: the better one first.
    if not isinstance(content['output'], str) and len(content['output']) == 2:
      content['chosen'], content['rejected'] = content['output']
  if several is None:
    configs.check(
      'chosen' in content and 'rejected' in content,
      'answers that are compared must be named',
      f'the fields {sorted(map(str, content))}',
      'write {"prompt", "chosen", "rejected"}, or {"prompt", "answers": [{"text", '
      '"score"}]}',
    )
    answers = [content['chosen'], content['rejected']]
    names = ('score_chosen', 'score_rejected')
    scores = [_score(content[name]) for name in names if name in content]
    # Whoever has chosen has had the last word, unless the scores say that nobody could.
    scores = [0.0, 0.0] if len(scores) == 2 and scores[0] == scores[1] else [1.0, 0.0]
  else:
    given = content[several]
    configs.check(
      isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 1,
      f'the field {several!r} must be a list of two or more answers',
      f'{given!r:.80}',
      'write [{"text": ..., "score": ...}, ...]',
    )
    beside = content.get('scores')
    configs.check(
      beside is None or (isinstance(beside, list) and len(beside) == len(given)),
      'scores must be as many as answers',
      f'{beside!r:.80} for {len(given)}',
      'give each answer one',
    )
    answers, scores = [], []
    for i, answer in enumerate(given):
      fields = answer if isinstance(answer, Mapping) else {}
      answers.append(_field(fields, _TEXTS, answer))
      scores.append(_score(_field(fields, _SCORES, beside and beside[i])))
  question = [*asked(content, config, template)]
  for answer, score in zip(answers, scores, strict=True):
    yield _conversation(question, answer, template), score


def _conversation(asked: list[Message], answer: Any, template: Template) -> list[Message]:
  if isinstance(answer, Mapping):
    answer = [answer]
  if isinstance(answer, str):
    said = _transcript(answer)
    return said or [*asked, Message('assistant', answer)]
  configs.check(
    isinstance(answer, Sequence),
    'an answer must be a text or messages',
    f'{answer!r:.80}',
    'write "chosen": "..."',
  )
  said = [message for turn in answer for message in turns.turn(turn, template)]
  # An answer may be given as all of its conversation.
  whole = bool(said) and said[0].role in ('system', 'user')
  return said if whole else [*asked, *said]


def asked(
  content: dict[str, Any], config: CorpusConfig, template: Template
) -> Iterator[Message]:
  """What stands before the answers; nothing where they have it in them."""
  if system := content.get('system', ''):
    yield Message('system', system)
  name = next((name for name in turns.TURNS if name in content), None)
  names = (config.prompt_key,) if config.prompt_key else _QUESTIONS
  name = name or next((name for name in names if name in content), None)
  if name is None:
    return
  question = content[name]
  if not isinstance(question, str):
    for turn in turns.listed(question, name, 'write [{"role": ..., "content": ...}, ...]'):
      yield from turns.turn(turn, template)
    return
  yield from turns.past(content.get('history', ()))
  if said := _transcript(question):
    # The answer's own name ends it.
    yield from said if said[-1].content else said[:-1]
    return
  more = content.get('input', '') if name == 'instruction' else ''
  yield Message('user', '\n'.join(filter(None, (question, more))))


def _transcript(text: str) -> list[Message]:
  """Messages of a text in which people are named; [] for one in which none are."""
  if not text.lstrip().startswith('Human:'):
    return []
  _, *parts = _SPEAKER.split('\n\n' + text.lstrip())
  return [
    Message(_SAID_BY[who], said.strip())
    for who, said in zip(parts[::2], parts[1::2], strict=True)
  ]


def _field(fields: Mapping[str, Any], names: Sequence[str], otherwise: Any) -> Any:
  return next((fields[name] for name in names if name in fields), otherwise)


def _score(value: Any) -> float:
  ok = isinstance(value, int | float) and not isinstance(value, bool)
  configs.check(
    ok and math.isfinite(value),
    'a score must be a number',
    f'{value!r:.80}',
    'write it beside its answer, such as {"text": ..., "score": 4.5}',
  )
  return float(value)
