"""Chat templates as transformers and vLLM render them: the same ids as `chat.Template`.

They put a conversation into one text and look in it for the names of control pieces. So a
name in a message is either kept from being found, where the tokenizer.json is our own
(`fast.HOLD`), or refused: let through, it would be somebody else's turn.
"""

from __future__ import annotations

import json

from tokenizers import Tokenizer

from glm_jax.text import chat_tools
from glm_jax.text.chat import ChatGLM2Template, ChatGLM3Template, GLM4Template
from glm_jax.text.conversation import Template
from glm_jax.text.fast import HOLD

_ASKS = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


def jinja(template: Template, fast: Tokenizer | None, *, ends: bool = False) -> str:
  """The chat_template of an export.

  Args:
    template: of its model; not ChatGLM-6B's, which transformers has no class for.
    fast: of `fast_tokenizer`; None where the export has the model's own tokenizer.json.
    ends: the end of an answer stands behind a conversation with nothing else behind it, as
      in `Template.encode_masked`, for a reward model, which reads it there.
  """
  if isinstance(template, ChatGLM2Template):
    return _say(template, fast) + _rounds(template, ends)
  assert isinstance(template, GLM4Template)
  return _say(template, fast) + _turns(template) + (_ends(template) if ends else '')


def _ends(template: GLM4Template) -> str:
  # Behind a call, what the tool gives back comes next.
  return (
    "{% if messages[-1]['role'] == 'assistant' and not add_generation_prompt %}{{ "
    "'<|observation|>' if messages[-1].get('metadata') else "
    + _end_piece(template)
    + ' }}{% endif %}'
  )


def _end_piece(template: Template) -> str:
  return json.dumps(template.vocabulary.piece(template.stops[0]))


def _say(template: Template, fast: Tokenizer | None) -> str:
  """A macro for text that is nothing but text."""
  if fast is not None:
    names = [piece.content for piece in fast.get_added_tokens_decoder().values()]
    held = {name: name[0] + HOLD + name[1:] for name in names}
    replaced = (f'|replace({json.dumps(a)}, {json.dumps(b)})' for a, b in held.items())
    return '{% macro say(text) %}{{ text' + ''.join(replaced) + ' }}{% endmacro %}'
  listed = json.dumps([*template.vocabulary.control])
  return (
    '{% macro say(text) %}{% for name in ' + listed + ' %}{% if name in text %}'
    "{{ raise_exception('a message must not spell the piece ' + name) }}"
    '{% endif %}{% endfor %}{{ text }}{% endmacro %}'
  )


def _rounds(template: ChatGLM2Template, ends: bool) -> str:
  line = json.dumps(template.line)
  answer = "{{ say(message['content']) + " + line + ' }}'
  if ends:
    # Encoded apart from its question, the last answer has the space before a text.
    space = json.dumps(' ' if template.vocabulary.adds_space else '')
    last = '{{ ' + space + " + say(message['content']) + " + _end_piece(template) + ' }}'
    is_last = 'loop.last and not add_generation_prompt'
    answer = '{% if ' + is_last + ' %}' + last + '{% else %}' + answer + '{% endif %}'
  refuse = f'{template.family} knows no tools and no roles but user and assistant'
  return (
    '[gMASK]<sop>{% if tools %}{{ raise_exception(' + json.dumps(refuse) + ') }}{% endif %}'
    '{% set turn = namespace(n=' + str(template.first) + ') %}'
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[Round ' + turn.n|string + ']' + " + line + " + '问：' + say(message['content'])"
    ' + ' + line + " + '答：' }}{% set turn.n = turn.n + 1 %}"
    "{% elif message['role'] == 'assistant' %}"
    + answer
    + '{% else %}{{ raise_exception('
    + json.dumps(refuse)
    + ') }}{% endif %}{% endfor %}'
  )


def _turns(template: GLM4Template) -> str:
  # Two texts that are encoded apart each get the space that the vocabulary begins a text
  # with; in one text, the second one's has to be written.
  apart = isinstance(template, ChatGLM3Template) and template.vocabulary.adds_space
  line = json.dumps('\n ' if apart else '\n')
  refuse = json.dumps(f'{template.family} knows no roles but {", ".join(template.roles)}')
  if isinstance(template, ChatGLM3Template):
    tools = "'\\n' + tools|tojson(indent=4)"
    before = (
      "{% if tools and messages[0]['role'] != 'system' %}{{ '<|system|>' + " + line + ' + '
      f'say({json.dumps(chat_tools.CHATGLM3)} + {tools})' + ' }}{% endif %}'
    )
    more = f" + ({tools} if tools and loop.first and message['role'] == 'system' else '')"
  else:
    quote = lambda text: json.dumps(text, ensure_ascii=False)
    before = (
      "{% if tools %}{{ '<|system|>' + " + quote('\n' + template.preamble) + ' }}'
      '{% for tool in tools %}{% set function = tool.function if tool.function else tool %}'
      '{{ ' + quote(f'{template.gap}## ') + " + say(function['name']) + '\\n\\n'"
      " + say(function|tojson(indent=4)) + '\\n' + "
      + quote(chat_tools.CALL_WITH_JSON)
      + ' }}{% endfor %}{% endif %}'
    )
    more = ''
  behind = json.dumps(template.behind_metadata)
  return (
    '[gMASK]<sop>' + before + '{% for message in messages %}'
    f"{{% if message['role'] not in {[*template.roles]} %}}"
    '{{ raise_exception(' + refuse + ') }}{% endif %}'
    "{% set metadata = message.get('metadata') %}"
    "{{ '<|' + message['role'] + '|>' + (say(metadata) + "
    + behind
    + " if metadata else '')"
    ' + ' + line + " + say(message['content']" + more + ') }}{% endfor %}' + _ASKS
  )
