"""A conversation, and what every chat template can do with one.

The families' own templates stand in `glm_jax.text.chat`, which is where to begin.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glm_jax.configs import check
from glm_jax.text import chat_tools
from glm_jax.text.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn of a conversation, which is a sequence of them.

  Attributes:
    role: 'system', 'user', 'assistant', or 'observation': what a tool gave back.
    content: its text.
    metadata: of an assistant's turn that calls a tool, the tool's name.
    without_loss: of an assistant's turn that is read in training and not learnt.
  """

  role: str
  content: str
  metadata: str = ''
  without_loss: bool = False

  @property
  def calls(self) -> bool:
    """Whether it calls a tool."""
    return self.role == 'assistant' and bool(self.metadata)


def in_text(messages: Sequence[Message]) -> str:
  """What an answer's messages say, for a person: names of tools, and contents, a line each.

  Example:
    >>> in_text([Message('assistant', '{"city": "Rome"}', 'weather')])
    'weather\\n{"city": "Rome"}'
  """
  return '\n'.join(text for m in messages for text in (m.metadata, m.content) if text)


# Which turns may follow which, by role; 'call' is an assistant's turn that calls a tool.
_FOLLOWS = {
  'start': ('system', 'user'),
  'system': ('system', 'user'),
  'user': ('assistant', 'call'),
  # A model may say what it is about to do before it calls a tool.
  'assistant': ('user', 'call'),
  'call': ('observation', 'call'),
  'observation': ('assistant', 'call', 'observation'),
}


class Template:
  """How one family of models reads a conversation.

  Attributes:
    family: its name in `FAMILIES`.
    vocabulary: of the model; None where nothing is encoded, see `chat.form_of`.
    roles: that the family knows.
    reads_again: a prefix model, which reads a conversation anew for each answer; what it
      has read and answered cannot be continued by `encode_next`.
  """

  roles: tuple[str, ...]
  reads_again = False

  def __init__(self, family: str, vocabulary: Vocabulary | None):
    self.family = family
    self.vocabulary: Any = vocabulary

  @property
  def stops(self) -> tuple[int, ...]:
    """Ids that end an answer."""
    return self.vocabulary.stops

  def encode(self, messages: Sequence[Message], *, opening: bool) -> list[int]:
    """Token ids of a conversation, from the pieces that open every text on.

    Args:
      messages: in an order that `check` allows.
      opening: with what an answer begins behind, for a model to write it.

    Raises:
      UserError: see `check`; an opening behind an answer.
    """
    self.check(messages)
    if opening:
      self._check_last(messages, 'user', 'observation')
    return self._encode(messages, opening)

  def encode_next(self, messages: Sequence[Message], read: int) -> list[int]:
    """Ids that go on behind an answer which the model has just written.

    Args:
      messages: all of them, the last a question or an observation.
      read: how many the model has read or written, without the piece that stopped it.

    Returns:
      Those of the others, with what an answer begins with.

    Raises:
      UserError: see `encode`.
    """
    assert not self.reads_again and 0 < read < len(messages)
    self.check(messages)
    self._check_last(messages, 'user', 'observation')
    return self._encode_next(messages, read)

  def encode_masked(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """A conversation to learn from: ids, and which of them are an answer's.

    The piece that ends an answer is one of them, that which opens it is not. Of a
    conversation in rounds only the last answer is: earlier ones have no end in what the
    model reads. `examples` gives what to call this with for each answer once. Answers
    without loss are no answers here.

    Args:
      messages: the last is an answer.

    Raises:
      UserError: see `check`; the last message is no answer.
    """
    self.check(messages)
    self._check_last(messages, 'assistant')
    return self._encode_masked(messages)

  def examples(self, messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """Conversations for `encode_masked` in which each answer of one is scored once.

    Each ends with an answer that is learnt; there is none where no answer is.
    """
    raise NotImplementedError

  def call(self, name: str, arguments: Mapping[str, Any]) -> Message:
    """The turn that calls a tool, as the family was taught to write it."""
    return Message('assistant', json.dumps(arguments, ensure_ascii=False), name)

  def fit(self, messages: Sequence[Message], limit: int) -> tuple[tuple[Message, ...], int]:
    """The end of a conversation that has room, whole, behind its system messages.

    Turns are left out from the left, up to the next question. Counted are the ids of
    `encode_masked` if the last message is an answer, else of `encode` with an opening.

    Args:
      messages: in an order that `check` allows.
      limit: ids that there is room for.

    Returns:
      What is left, () if not even the last question fits, and how many messages are not.

    Raises:
      UserError: see `check`.
    """
    self.check(messages)
    system = [*itertools.takewhile(lambda m: m.role == 'system', messages)]
    starts = [i for i, message in enumerate(messages) if message.role == 'user']

    def fits(start: int) -> bool:
      rest = [*system, *messages[start:]]
      if rest[-1].role == 'assistant':
        return len(self._encode_masked(rest)[0]) <= limit
      return len(self._encode(rest, True)) <= limit

    # The fewer turns, the fewer ids.
    first = bisect.bisect_left(starts, True, key=fits)
    if first == len(starts):
      return (), len(messages)
    kept = (*system, *messages[starts[first] :])
    return kept, len(messages) - len(kept)

  def with_tools(
    self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
  ) -> tuple[Message, ...]:
    """A conversation whose system message describes tools, as the family was told of them.

    Args:
      messages: of the conversation.
      tools: descriptions in JSON: name, description, parameters, also as the 'function' of
        an object.

    Raises:
      UserError: a family that knows no tools, or a tool without a name.
    """
    if not tools:
      return tuple(messages)
    check(
      'observation' in self.roles,
      f'a conversation with {self.family} must be without tools, which it does not know',
      f'{len(tools)}',
      'leave them out, or use ChatGLM3 or GLM-4',
    )
    chat_tools.check_tools(tools)
    return self._with_tools(tuple(messages), tools)

  def decode_answer(self, ids: Sequence[int]) -> tuple[Message, ...]:
    """What a model wrote behind an opening, with or without the piece that stopped it.

    Returns:
      One message, or several: a tool may be called behind a sentence, or two at once.
    """
    return (Message('assistant', self.vocabulary.decode(ids).strip()),)

  def check(self, messages: Sequence[Message]) -> None:
    """Raises UserError for what this family cannot read.

    That is no message, an unknown role, roles out of order, content that is empty or no
    text, and metadata that is not the name of a tool.
    """
    check(bool(messages), 'a conversation must have a message', 'none', 'ask something')
    tools, last = 'observation' in self.roles, 'start'
    for number, message in enumerate(messages, 1):
      role, at = message.role, f'message {number} of a conversation'
      check(
        role in self.roles,
        f'{at} must have a role that {self.family} knows, {self.roles}',
        repr(role),
        self._remedy(role),
      )
      check(
        isinstance(message.content, str) and bool(message.content),
        f'{at} must have some text as its content',
        repr(message.content),
        'leave the message out, or say something',
      )
      check(
        not re.search('[\ud800-\udfff]', message.content),
        f'{at} must be Unicode characters',
        'a lone surrogate',
        'remove it',
      )
      check(
        not message.metadata
        or (message.calls and tools and chat_tools.is_name(message.metadata)),
        f'metadata of {at} must be the name of a tool that an assistant calls',
        f'{message.metadata!r} from {role!r} with {self.family}',
        'leave it out',
      )
      turn = 'call' if message.calls else role
      known = (*self.roles, 'call') if tools else self.roles
      allowed = [name for name in _FOLLOWS[last] if name in known]
      check(
        turn in allowed,
        f'{at} must be one of {allowed} behind {last!r}',
        repr(turn),
        'put the messages in order',
      )
      last = turn

  def _check_last(self, messages: Sequence[Message], *roles: str) -> None:
    last = messages[-1].role
    check(
      last in roles,
      f'the last message of this conversation must be of {" or ".join(roles)}',
      repr(last),
      'add one' if 'assistant' in roles else 'ask something',
    )

  def _remedy(self, role: str) -> str:
    if role == 'system':
      return 'put it in front of the first question'
    return "call what a tool gave back 'observation'" if role == 'tool' else 'rename it'

  # What a family is, behind the checks of the methods above.

  def _encode(self, messages: Sequence[Message], opening: bool) -> list[int]:
    raise NotImplementedError

  def _encode_next(self, messages: Sequence[Message], read: int) -> list[int]:
    raise NotImplementedError

  def _encode_masked(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    raise NotImplementedError

  def _with_tools(
    self, messages: tuple[Message, ...], tools: Sequence[Mapping[str, Any]]
  ) -> tuple[Message, ...]:
    raise NotImplementedError
