"""An object of a file as a conversation, whatever form its turns are in.

- ChatGLM3: {"conversations": [{"role", "content", "loss"}], "tools"}, where the role 'tool'
  holds a call and what came of it: {"name", "parameters", "observation"}
- OpenAI and TRL: {"messages": [{"role", "content", "tool_calls"}], "tools"}
- ShareGPT: {"conversations": [{"from", "value"}], "system", "tools"}
- ChatGLM2: {"prompt", "response", "history": [[question, answer], ...]}, whose history is
  read and not learnt: the answers in it have lines of their own
- pairs, by the names that `glm_jax.data.corpora.fields` knows or is told: one round
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from glm_jax import configs
from glm_jax.configs import UserError
from glm_jax.data.corpora import fields
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.fields import Document
from glm_jax.text.chat import form_of
from glm_jax.text.conversation import Message, Template

TURNS = ('messages', 'conversations', 'conversation')
# Of ShareGPT and OpenAI -> ours.
_ROLES = {'human': 'user', 'gpt': 'assistant', 'function': 'observation'}
_ROLES |= {'tool': 'observation'}


def document(
  content: Any, config: CorpusConfig, where: Callable[[], str] = str
) -> Document:
  """The conversation of an object, checked as its family reads it.

  Args:
    content: of the object.
    config: the family, and the names of fields of pairs.
    where: the object stands, in words; called for a message alone.

  Raises:
    UserError: no conversation, roles that are unknown or out of order, an empty turn, tools
      without a schema.

  Example:
    >>> config = CorpusConfig(corpus='*.jsonl', conversations='chatglm2')
    >>> line = {'prompt': 'And 2?', 'response': '4', 'history': [['1?', '1']]}
    >>> [m.content for m in document(line, config).messages if not m.without_loss]
    ['1?', 'And 2?', '4']
  """
  template = form_of(config.conversations)
  with placed(where):
    rule, remedy = 'a conversation must be an object', 'write {"messages": [...]}'
    present, described = opened(content, rule, remedy)
    messages = checked([*_messages(present, config, template)], described, template)
  text = json.dumps([vars(message) for message in messages], ensure_ascii=False)
  return Document(text, messages=messages, where=where)


@contextlib.contextmanager
def placed(where: Callable[[], str]) -> Iterator[None]:
  """A user's mistake that is found inside says where its object stands."""
  try:
    yield
  except UserError as error:
    raise UserError(f'{str(error).removesuffix(".")}{where()}.') from error


def opened(content: Any, rule: str, remedy: str) -> tuple[dict[str, Any], list[Any]]:
  """The fields that an object has, but for its tools, and these.

  Args:
    content: of the object.
    rule: that it must be one.
    remedy: for what is none.
  """
  configs.check(isinstance(content, Mapping), rule, type(content).__name__, remedy)
  # A table has null where a row lacks a field.
  present = {k: v for k, v in content.items() if v is not None}
  return present, tools(present.pop('tools', None))


def checked(
  messages: Sequence[Message], described: Sequence[Any], template: Template
) -> tuple[Message, ...]:
  """Messages in an order that their family knows, told of the tools."""
  template.check(messages)
  told = template.with_tools(messages, described)
  template.check(told)
  return told


def _messages(
  content: dict[str, Any], config: CorpusConfig, template: Template
) -> Iterator[Message]:
  if system := content.pop('system', ''):
    yield Message('system', system)
  name = next((name for name in TURNS if name in content), None)
  if name is not None:
    for said in listed(content[name], name, 'write [{"role": ..., "content": ...}, ...]'):
      yield from turn(said, template)
    return
  yield from past(content.pop('history', ()))
  pair = fields.document(content, config)
  configs.check(
    bool(pair.prompt),
    'a conversation must have a question',
    f'the fields {sorted(map(str, content))}',
    'name its fields with CorpusConfig.prompt_key and answer_key',
  )
  yield from (Message('user', pair.prompt), Message('assistant', pair.text))


def past(history: Any) -> Iterator[Message]:
  """The messages of rounds that were, in order."""
  for one in listed(history, 'history', 'write [[question, answer]]'):
    configs.check(
      isinstance(one, Sequence) and not isinstance(one, str) and len(one) == 2,
      'a round of a history must be a question and its answer',
      f'{one!r:.80}',
      'write [question, answer]',
    )
    yield Message('user', one[0])
    yield Message('assistant', one[1], without_loss=True)


def turn(given: Any, template: Template) -> Iterator[Message]:
  """The messages that one turn says, in order."""
  configs.check(
    isinstance(given, Mapping) and ('role' in given or 'from' in given),
    'a turn must be an object with a role',
    f'{given!r:.80}',
    'write {"role": ..., "content": ...}',
  )
  said = {k: v for k, v in given.items() if v is not None}
  role, text = str(said.get('role', said.get('from'))), said.get('content', '')
  text = said.get('value', text)
  learnt = said.get('loss', bool(said.get('weight', 1)))
  configs.check(
    isinstance(learnt, bool),
    'the loss of a turn must be true or false',
    repr(learnt),
    'say',
  )
  unlearnt = {'without_loss': not learnt}
  if role == 'function_call' or 'parameters' in said:
    call = said if role != 'function_call' else _parsed(text, 'a call of a tool')
    yield _call(call, template, unlearnt)
    if 'observation' in said:
      seen = said['observation']
      yield Message('observation', seen if isinstance(seen, str) else _json(seen))
    return
  role = _ROLES.get(role, role)
  calls = said.get('tool_calls', ())
  if role == 'assistant':
    if text or not calls:
      yield Message(role, text, said.get('metadata', ''), **unlearnt)
    for call in listed(calls, 'tool_calls', 'write a list'):
      function = call.get('function', call) if isinstance(call, Mapping) else call
      yield _call(function, template, unlearnt)
  else:
    yield Message(role, text)


def _call(call: Any, template: Template, unlearnt: dict[str, bool]) -> Message:
  arguments = None
  if isinstance(call, Mapping):
    arguments = call.get('arguments', call.get('parameters', {}))
    if isinstance(arguments, str):
      arguments = _parsed(arguments, 'arguments of a tool')
  configs.check(
    isinstance(arguments, Mapping) and isinstance(call.get('name'), str),
    'a call of a tool must have its name, and arguments by name',
    f'{call!r:.80}',
    'write {"name": ..., "arguments": {...}}',
  )
  said = template.call(call['name'], arguments)
  return Message(said.role, said.content, said.metadata, **unlearnt)


def tools(given: Any) -> list[Any]:
  """The tools of an object, checked."""
  if isinstance(given, str):
    given = _parsed(given, 'tools')
  given = [*listed(given or (), 'tools', 'write a list')]
  for tool in given:
    function = tool.get('function', tool) if isinstance(tool, Mapping) else {}
    configs.check(
      isinstance(function, Mapping) and isinstance(function.get('parameters'), Mapping),
      'a tool must have a schema: an object with its name and parameters',
      f'{tool!r:.80}',
      'give {"name": …, "description": …, "parameters": {…}}',
    )
  return given


def listed(value: Any, name: str, remedy: str) -> Sequence[Any]:
  """A field's value; UserError unless it is a list."""
  configs.check(
    isinstance(value, Sequence) and not isinstance(value, str),
    f'the field {name!r} must be a list',
    f'{value!r:.80}',
    remedy,
  )
  return value


def _parsed(text: Any, what: str) -> Any:
  try:
    return configs.parse_json(text)
  except (TypeError, ValueError) as error:
    raise UserError(f'{what} must be JSON, got {text!r:.80}; mend it.') from error


def _json(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False)
