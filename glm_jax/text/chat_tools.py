"""Tools in a conversation: what a system message says of them, and what a call says."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glm_jax.configs import UserError, check, parse_json

# PROMPT.md of ChatGLM3; the chat_template of GLM-4-9B-chat, and of GLM-4-0414.
CHATGLM3 = (
  'Answer the following questions as best as you can. You have access to the following '
  'tools:'
)
GLM4 = (
  '你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，'
  '你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具'
)
GLM4_0414 = '# 可用工具\n'
CALL_WITH_JSON = '在调用上述函数时，请使用 Json 格式表示调用的参数。'


def is_name(text: Any) -> bool:
  """Whether a text can be a tool's name: letters, digits, and _ . / : -"""
  return isinstance(text, str) and bool(re.fullmatch(r'[\w./:-]+', text))


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
  """Raises UserError for a tool without a name that a call can have."""
  for tool in tools:
    check(
      isinstance(tool, Mapping) and is_name(_function(tool).get('name')),
      'a tool must be an object with a name of letters, digits, and _ . / : -',
      f'{tool!r:.80}',
      'give {"name": …, "description": …, "parameters": …}',
    )


def describe(preamble: str, gap: str, tools: Sequence[Mapping[str, Any]]) -> str:
  """GLM-4's system message of tools: a preamble, and behind a gap a section each."""
  sections = (
    f'{gap}## {function["name"]}\n\n{to_json(function)}\n{CALL_WITH_JSON}'
    for function in map(_function, tools)
  )
  return preamble + ''.join(sections)


def call_arguments(content: str) -> dict[str, Any]:
  """Arguments of a tool that a model calls, by name; nothing of it is executed.

  Args:
    content: of its message: JSON from GLM-4, and from ChatGLM3 Python,
      tool_call(city='Beijing'), between lines of ```.

  Raises:
    UserError: it is neither.

  Example:
    >>> call_arguments("```python\\ntool_call(x=[1, 'a'])\\n```")
    {'x': [1, 'a']}
  """
  lines = content.strip().split('\n')
  if lines[0].startswith('```'):
    lines = lines[1:-1] if lines[-1].startswith('```') else lines[1:]
  text = '\n'.join(lines).strip()
  try:
    if text.startswith('{'):
      return parse_json(text)
    call = ast.parse(text, mode='eval').body
    # What ** gives has no name; a literal holds no call.
    if isinstance(call, ast.Call) and not call.args and all(k.arg for k in call.keywords):
      return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
  except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
    pass  # said below
  raise UserError(
    'a call of a tool must be an object in JSON or tool_call(name=value, …), got '
    f'{text!r:.80}; show it to the user, or let the model answer again.'
  )


def in_python(arguments: Mapping[str, Any]) -> str:
  """ChatGLM3's way to write a call (PROMPT.md), which `call_arguments` reads.

  Example:
    >>> in_python({'city': '北京', 'days': 2})
    "```python\\ntool_call(city='北京', days=2)\\n```"
  """
  named = ', '.join(f'{name}={value!r}' for name, value in arguments.items())
  return f'```python\ntool_call({named})\n```'


def to_json(value: Any) -> str:
  """As transformers' templates write it with tojson(indent=4)."""
  return json.dumps(value, ensure_ascii=False, indent=4)


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
  """The description itself, which OpenAI's form has in an object of its own."""
  function = tool.get('function', tool)
  return function if isinstance(function, Mapping) else {}
