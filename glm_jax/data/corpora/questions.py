"""An object of a file as a question that a run finds answers to, and what judges these.

- {"prompt"}, "instruction", "question" or "query": a text, or messages; beside it "input",
  "history" and "system", as `glm_jax.data.corpora.turns` knows them
- {"messages"} or {"conversations"}: all up to the last question

An answer of the object's own is what a last turn says, or the field "response", "output",
"completion" or "answer", if that is text. Whatever else it holds is for the reward.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from glm_jax import configs
from glm_jax.data.corpora import ranked, turns
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.fields import PAIRS, Document
from glm_jax.text.chat import form_of


def document(
  content: Any, config: CorpusConfig, where: Callable[[], str] = str
) -> Document:
  """The question of an object, checked as its family reads it.

  Args:
    content: of the object.
    config: the family, and the name of the question's field.
    where: the object stands, in words; called for a message alone.

  Raises:
    UserError: no question; see `turns.document`.

  Example:
    >>> config = CorpusConfig(corpus='*.jsonl', conversations='chatglm2', asked=True)
    >>> found = document({'prompt': '1 + 1?', 'right': '2'}, config)
    >>> found.messages[0].content, found.fields['right'], found.answer
    ('1 + 1?', '2', '')
  """
  template = form_of(config.conversations)
  with turns.placed(where):
    rule, remedy = 'a question must stand in an object', 'write {"prompt": ...}'
    present, tools = turns.opened(content, rule, remedy)
    messages = [*ranked.asked(present, config, template)]
    names = (config.answer_key,) if config.answer_key else [name for _, name in PAIRS]
    answer = next((present[name] for name in names if name in present), '')
    while messages and messages[-1].role == 'assistant':
      answer = messages.pop().content
    configs.check(
      bool(messages),
      'an object must ask a question',
      f'the fields {sorted(map(str, content))}',
      'write {"prompt": ...}, or name its field with CorpusConfig.prompt_key',
    )
    asked = turns.checked(messages, tools, template)
  text = json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)
  answer = answer if isinstance(answer, str) else ''
  return Document(text, messages=asked, answer=answer, fields=present, where=where)
