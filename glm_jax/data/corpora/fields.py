"""An object of a file or a data set, by the names of its fields, as a document.

What stands in the text's field carries loss, what stands in the prompt's does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.text.conversation import Message

PAIRS = (
  ('instruction', 'output'),  # alpaca, whose `input` belongs to the prompt
  ('prompt', 'response'),
  ('prompt', 'completion'),
  ('prompt', 'answer'),
  ('question', 'answer'),
  ('query', 'response'),
  ('content', 'summary'),  # ADGEN, of ChatGLM-6B's fine-tuning
)
"""(prompt, answer): the names by which pairs are recognised, in this order."""

CONVERSATIONS = ('messages', 'conversations', 'conversation', 'history')
"""Fields of several turns, which are no pair."""


class Document(NamedTuple):
  """What a corpus is made of.

  Attributes:
    text: what is learnt; of a conversation, all of it as JSON, by which it is held out.
    prompt: what precedes the text without being learnt.
    ids: tokens, of a document that has them.
    messages: of a conversation.
    pairs: two conversations each that differ in their last answer, the preferred one first.
    unranked: how often two answers were no pair: tied, equal, one of them empty, or to
      different questions.
    answer: of an object that asks a question: its own answer to it, if it has one.
    fields: of an object that asks a question: all of it, for whoever judges an answer.
    where: it stands, in words, for what is found wrong with it later.
  """

  text: str
  prompt: str = ''
  ids: Sequence[int] | None = None
  messages: tuple[Message, ...] = ()
  pairs: tuple[tuple[tuple[Message, ...], tuple[Message, ...]], ...] = ()
  unranked: int = 0
  answer: str = ''
  fields: Mapping[str, Any] = MappingProxyType({})
  where: Callable[[], str] = str


def document(
  fields: Any, config: CorpusConfig, where: Callable[[], str] = lambda: ''
) -> Document:
  """The document of an object.

  Args:
    fields: of the object; anything else is refused.
    config: the names of its fields.
    where: the object stands, in words; called for a message alone.

  Raises:
    UserError: no field of text, or one that is no text.

  Example:
    >>> names = CorpusConfig(corpus='*.jsonl')
    >>> document({'instruction': 'Add.', 'input': '1 and 2', 'output': '3'}, names)[:2]
    ('3', 'Add.\\n1 and 2')
    >>> document({'prompt': '', 'text': 'Once.'}, names)[:2]
    ('Once.', '')
  """
  if not isinstance(fields, Mapping):
    raise UserError(
      'a document must be an object with a field of text, got '
      f'{_short(fields)}{where()}; write {{"text": "..."}} there.'
    )

  def text(name: str, *, missing: str | None = None) -> str:
    value = fields.get(name)
    if value is None and missing is not None:
      return missing
    if isinstance(value, bytes):  # of TensorFlow
      value = value.decode('utf-8', config.errors)
    if not isinstance(value, str):
      raise UserError(
        f'the field {name!r} must be text, got {_short(value)}{where()}; write it as '
        'text, or name another field (CorpusConfig.text_key, prompt_key, answer_key).'
      )
    _check_characters(value, where)
    return value

  prompt_key = config.prompt_key or 'prompt'
  if config.answer_key:
    _check_has(fields, (prompt_key, config.answer_key), where)
    return Document(text(config.answer_key), text(prompt_key))
  if config.text_key not in fields:
    known = _known_pair(fields, where)
    if known:
      first, answer = known
      rest = text('input', missing='') if first == 'instruction' else ''
      return Document(text(answer), '\n'.join(filter(None, (text(first), rest))))
  _check_has(fields, (config.text_key,), where)
  return Document(text(config.text_key), text(prompt_key, missing=''))


def _known_pair(
  fields: Mapping[str, Any], where: Callable[[], str]
) -> tuple[str, str] | None:
  """The names of a pair that is recognised; UserError for several turns."""
  # A file may have an empty history with each pair.
  turns = next((name for name in CONVERSATIONS if fields.get(name)), None)
  configs.check(
    turns is None,
    'a document must be a text or a pair; conversations are for fine-tuning',
    f'the field {turns!r}{where()}',
    'use gin_configs/runs/sft.gin, or write {"prompt", "text"}, or name the fields of a '
    'pair with CorpusConfig.prompt_key and answer_key',
  )
  return next((pair for pair in PAIRS if {*pair} <= {*fields}), None)


def _check_has(
  fields: Mapping[str, Any], names: Sequence[str], where: Callable[[], str]
) -> None:
  missing = [name for name in names if name not in fields]
  configs.check(
    not missing,
    f'a document must have the field {" and ".join(map(repr, missing))}',
    f'the fields {sorted(map(str, fields))}{where()}',
    'name the fields of your text with CorpusConfig.text_key, or those of pairs with '
    'prompt_key and answer_key',
  )


def _check_characters(value: str, where: Callable[[], str]) -> None:
  # A lone surrogate can be written in JSON but is no character.
  try:
    value.encode('utf-8')
  except UnicodeEncodeError as error:
    raise UserError(
      f'text must be Unicode characters, got a lone surrogate{where()}; remove it.'
    ) from error


def _short(value: Any) -> str:
  try:
    text = json.dumps(value, ensure_ascii=False)
  except (TypeError, ValueError, RecursionError):
    text = type(value).__name__
  return text if len(text) <= 80 else text[:80] + '...'
