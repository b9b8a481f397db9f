"""Conversations as the chat models read them: messages to token ids, and answers back.

  template = template_for(vocabulary)
  template.encode([Message('user', 'Hello')], opening=True)

Two shapes. ChatGLM-6B and ChatGLM2-6B read one text, in which rounds are counted
(`build_inputs` of their modeling_chatglm.py, `build_prompt` of their tokenizers).
ChatGLM3 and GLM-4 read turns that control pieces open (`build_single_message` of
tokenization_chatglm.py; the chat_template of GLM-4-9B-chat and of GLM-4-0414). Whatever a
message holds, no control piece comes from its text. `glm_jax.text.chat_jinja` writes the
same for transformers and vLLM.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from glm_jax.configs import check
from glm_jax.text import chat_tools
from glm_jax.text.conversation import Message, Template
from glm_jax.text.vocabulary import Vocabulary


class ChatGLM2Template(Template):
  """One text, in which rounds are counted from 1."""

  roles = ('user', 'assistant')
  first, line = 1, '\n\n'

  def text(self, messages: Sequence[Message]) -> str:
    """What stands in the text for messages; an answer may follow a question's end."""
    # Questions and answers alternate, see `_FOLLOWS`.
    return ''.join(
      f'{message.content}{self.line}'
      if message.role == 'assistant'
      else self._question(i // 2, message)
      for i, message in enumerate(messages)
    )

  def _question(self, i: int, message: Message) -> str:
    return f'[Round {self.first + i}]{self.line}问：{message.content}{self.line}答：'

  def examples(self, messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    answers = range(1, len(messages), 2)
    return [(*messages[: i + 1],) for i in answers if not messages[i].without_loss]

  def _encode(self, messages: Sequence[Message], opening: bool) -> list[int]:
    return [*self.vocabulary.prefix, *self.vocabulary.encode(self.text(messages))]

  def _encode_next(self, messages: Sequence[Message], read: int) -> list[int]:
    # As `build_stream_inputs` of ChatGLM2: what follows an answer opens with its break.
    text = self.line + self._question(read // 2, messages[-1])
    return self.vocabulary.encode_inside(text)

  def _encode_masked(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    context = self._encode(messages[:-1], True)
    # Apart from the question, as in ptuning/main.py.
    answer = [*self.vocabulary.encode(messages[-1].content), self.stops[0]]
    return context + answer, [False] * len(context) + [True] * len(answer)


class ChatGLMTemplate(ChatGLM2Template):
  """One text, in which rounds are counted from 0, a first question alone; then [gMASK]."""

  first, line = 0, '\n'
  reads_again = True

  def text(self, messages: Sequence[Message]) -> str:
    return messages[0].content if len(messages) == 1 else super().text(messages)

  def _encode(self, messages: Sequence[Message], opening: bool) -> list[int]:
    ids, vocabulary = super()._encode(messages, opening), self.vocabulary
    if opening:
      ids += [vocabulary.control['[gMASK]'], *vocabulary.suffix, vocabulary.specials.sop]
    return ids


class GLM4Template(Template):
  """Turns, each a role's piece, metadata and a line break, and content."""

  roles = ('system', 'user', 'assistant', 'observation')
  preamble, gap = chat_tools.GLM4, '\n\n'
  behind_metadata = ''

  def turn(self, message: Message) -> list[int]:
    """Ids of one message."""
    head = self._head(message)
    return [self._role(message.role), *self.vocabulary.encode(head + message.content)]

  def _head(self, message: Message) -> str:
    return f'{message.metadata}{self.behind_metadata if message.metadata else ""}\n'

  def _role(self, role: str) -> int:
    return self.vocabulary.control[f'<|{role}|>']

  def examples(self, messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    answers = [i for i, message in enumerate(messages) if _is_learnt(message)]
    return [(*messages[: answers[-1] + 1],)] if answers else []

  def decode_answer(self, ids: Sequence[int]) -> tuple[Message, ...]:
    parts: list[list[int]] = [[]]
    for token in map(int, ids):
      if token == self._role('assistant'):
        parts.append([])
      else:
        parts[-1].append(token)
    return tuple(self._answer(self.vocabulary.decode(part)) for part in parts)

  def _answer(self, text: str) -> Message:
    # Its first line is metadata: nothing, or the name of a tool. Of a model that forgets
    # the line break, it is what it says.
    head, line_break, content = text.partition('\n')
    head = head.strip()
    if line_break and (not head or chat_tools.is_name(head)):
      return Message('assistant', content.strip(), head)
    return Message('assistant', text.strip())

  def _encode(self, messages: Sequence[Message], opening: bool) -> list[int]:
    turns = itertools.chain(*map(self.turn, messages))
    answer = [self._role('assistant')] if opening else []
    return [*self.vocabulary.prefix, *turns, *answer]

  def _encode_next(self, messages: Sequence[Message], read: int) -> list[int]:
    return self._encode(messages[read:], True)[len(self.vocabulary.prefix) :]

  def _encode_masked(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    ids = [*self.vocabulary.prefix]
    scored = [False] * len(ids)
    ends = False
    for message in messages:
      turn = self.turn(message)
      ids += turn
      # The piece of the next role is what ends an answer (finetune_hf.py of ChatGLM3).
      learnt = _is_learnt(message)
      scored += [ends] + [learnt] * (len(turn) - 1)
      ends = learnt
    # Behind a call, what the tool gives back comes next.
    end = self._role('observation') if messages[-1].calls else self.stops[0]
    return [*ids, end], [*scored, ends]

  def _with_tools(
    self, messages: tuple[Message, ...], tools: Sequence[Mapping[str, Any]]
  ) -> tuple[Message, ...]:
    # In front of a system message of the user's own.
    content = chat_tools.describe(self.preamble, self.gap, tools)
    return (Message('system', content), *messages)


class GLM40414Template(GLM4Template):
  """The same with fewer words, and a space behind the name of a tool that is called."""

  preamble, gap = chat_tools.GLM4_0414, '\n'
  behind_metadata = ' '


class ChatGLM3Template(GLM4Template):
  """The same, metadata and content encoded apart."""

  def turn(self, message: Message) -> list[int]:
    head = self.vocabulary.encode(self._head(message))
    return [self._role(message.role), *head, *self.vocabulary.encode(message.content)]

  def call(self, name: str, arguments: Mapping[str, Any]) -> Message:
    return Message('assistant', chat_tools.in_python(arguments), name)

  def _with_tools(
    self, messages: tuple[Message, ...], tools: Sequence[Mapping[str, Any]]
  ) -> tuple[Message, ...]:
    said, rest = chat_tools.CHATGLM3, messages
    if messages and messages[0].role == 'system':
      said, rest = messages[0].content, messages[1:]
    return (Message('system', f'{said}\n{chat_tools.to_json(tools)}'), *rest)


def _is_learnt(message: Message) -> bool:
  return message.role == 'assistant' and not message.without_loss


# Each with the kinds of vocabularies that it can be written in; the first kind's default.
# A vocabulary of one's own has no conversations of its own, so a family must be named.
FAMILIES = {
  'chatglm': (ChatGLMTemplate, ('ice', 'sentencepiece', 'bytes')),
  'chatglm2': (ChatGLM2Template, ('chatglm2',)),
  'chatglm3': (ChatGLM3Template, ('chatglm3',)),
  'glm4': (GLM4Template, ('glm4',)),
  'glm4-0414': (GLM40414Template, ('glm4',)),
}


def form_of(family: str) -> Template:
  """A family's template without a vocabulary: for `check`, `with_tools` and `call`."""
  return FAMILIES[family][0](family, None)


def family_of(model: Any) -> str:
  """The family of a model's configuration where its vocabulary does not tell; else ''."""
  return 'glm4-0414' if getattr(model, 'sandwich_norms', False) else ''


def template_for(vocabulary: Vocabulary, family: str = '') -> Template:
  """The template of a model.

  Args:
    vocabulary: of the model.
    family: a key of `FAMILIES`; by default that of the vocabulary. GLM-4-0414 has GLM-4's
      vocabulary, so it must be named, see `family_of`.

  Raises:
    UserError: no such family, a vocabulary without conversations, or the template of
      another model.
  """
  if not family:
    family = next((n for n, (_, k) in FAMILIES.items() if k[0] == vocabulary.kind), '')
    check(
      bool(family),
      'a conversation must be had with a model of a family that has a chat template, '
      f'{(*FAMILIES,)}',
      f'one with a vocabulary {vocabulary.kind!r}',
      "use glm_pairs and generate, or name the template (a model tuned on 'chatglm')",
    )
  check(
    family in FAMILIES,
    f'a chat template must be one of {(*FAMILIES,)}',
    repr(family),
    'choose one of these',
  )
  template, kinds = FAMILIES[family]
  check(
    vocabulary.kind in kinds,
    f'the chat template {family!r} must be used with a vocabulary of {kinds}',
    repr(vocabulary.kind),
    'leave the template out: that of the model is taken',
  )
  return template(family, vocabulary)
