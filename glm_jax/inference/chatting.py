"""A chat: messages in, answers out a piece at a time, over one session."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from glm_jax import configs
from glm_jax.inference.sampling import Sampling
from glm_jax.inference.session import Session
from glm_jax.text.conversation import Message, Template, in_text
from glm_jax.text.vocabulary import Vocabulary

_BROKEN = '\ufffd'
# Tokens of an answer, unless the caller or a small window says fewer.
_MOST = 512


class Chat:
  """A conversation with a model.

  Attributes:
    messages: so far, without the system's.
    system: what the model is told before all else; '' for nothing.
    left_out: messages that no longer fit into the window.
    written: tokens of the last answer.
  """

  def __init__(
    self,
    session: Session,
    template: Template,
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    system: str = '',
  ):
    """
    Args:
      session: of the model.
      template: of its family.
      max_new_tokens: longest answer; None for 512, or half of a smaller window.
      sampling: how tokens are chosen.
      seed: of sampling; each answer has random numbers of its own.
      system: see above.

    Raises:
      UserError: a window without room for an answer and a question.
    """
    if max_new_tokens is None:
      max_new_tokens = min(_MOST, (session.window + 1) // 2)
    configs.check(
      1 <= max_new_tokens < session.window,
      f'--max_new_tokens must leave room in a window of {session.window} tokens',
      str(max_new_tokens),
      'ask for a shorter answer',
    )
    self._session, self._template = session, template
    self._most, self._sampling, self._seed = max_new_tokens, sampling, seed
    self.system = system
    self.reset()

  @property
  def read(self) -> int:
    """Tokens that were read for the last answer."""
    return self._session.read

  def reset(self, system: str | None = None) -> None:
    """Begins anew, with what the model is told before all else, if given."""
    self.messages: list[Message] = []
    self.left_out = self.written = self._turn = 0
    # Ids that the model has read and written, as long as they can be gone on from.
    self._ids: list[int] = []
    self._known = 0
    if system is not None:
      self.system = system

  @property
  def wants(self) -> str:
    """The role of the next message: 'observation' behind a call of a tool."""
    called = self.messages and self.messages[-1].calls
    return 'observation' if called else 'user'

  def say(self, content: str) -> Iterator[str]:
    """Adds a message, and yields the answer to it, whole characters at a time.

    An answer that nobody hears to its end is kept as far as it was said; of an empty one,
    its question is not kept either.

    Raises:
      UserError: a message that the template refuses, or that does not fit the window.
    """
    before = (list(self.messages), self._ids, self._known)
    self.messages.append(Message(self.wants, content))
    try:
      ids = self._encode()
    except configs.UserError:
      self.messages.pop()
      raise
    mask = 0
    if self._template.reads_again:
      gmask = self._template.vocabulary.control['[gMASK]']
      mask = len(ids) - 1 - ids[::-1].index(gmask)
    seed = np.random.SeedSequence([self._seed, self._turn]).generate_state(1)[0]
    self._turn += 1
    made: list[int] = []
    told = ''
    answering = self._session.answer(
      ids, most=self._most, mask=mask, sampling=self._sampling, seed=int(seed)
    )
    try:
      for made in answering:
        text = whole_characters(self._template.vocabulary, made)
        if text.startswith(told) and text != told:
          yield text[len(told) :]
          told = text
    finally:
      # Also where the listener has gone.
      self.written = len(made)
      answers = self._heard(made)
      if answers:
        self.messages += answers
        self._ids, self._known = [*ids, *made], len(self.messages)
      else:
        self.messages, self._ids, self._known = before

  def _heard(self, ids: list[int]) -> list[Message]:
    """An answer as messages that a conversation can go on from; none if it is empty."""
    said = self._template.decode_answer(ids)
    # A first line that could be a tool's name is text where no tool was described; so is
    # what follows a call, or an answer, without having been asked for.
    called = bool(self.system) and all(message.content for message in said if message.calls)
    if called and all(message.calls for message in said[1:]):
      return [message for message in said if message.content]
    text = in_text(said)
    return [Message('assistant', text)] if text else []

  def _encode(self) -> list[int]:
    """Ids of the conversation: what the model has of it, and what is new."""
    template, room = self._template, self._session.window - self._most
    if self._known and not template.reads_again:
      messages = self._with_system(self.messages)
      known = self._known + len(messages) - len(self.messages)
      ids = [*self._ids, *template.encode_next(messages, known)]
      if len(ids) <= room:
        return ids
    # Once turns are left out, they stay so: what is read would change with every turn. What
    # then is the first one may have to hold what the model is told, and is counted again.
    said, gone = list(self.messages), True
    while gone:
      messages = self._with_system(said)
      kept, gone = template.fit(messages, room)
      if not kept:
        self._refuse(room)
      said = said[gone:]
    self.left_out += len(self.messages) - len(said)
    self.messages = said
    return template.encode(kept, opening=True)

  def _refuse(self, room: int) -> None:
    """Raises UserError for a last question that does not fit even without all before it."""
    count = lambda messages: len(self._template.encode(messages, opening=True))
    last = max(i for i, message in enumerate(self.messages) if message.role == 'user')
    # Behind a call stands what the tool gave back.
    turn, what = self.messages[last:], 'a message'
    if len(turn) > 1:
      what = 'a question with what was said and called since'
    alone, more = count(turn), ''
    if self.system:
      told = count(self._with_system(turn)) - alone
      more = f' and {told} of what the model is told first (/system)'
    raise configs.UserError(
      f'{what} must fit into {room} tokens, the window without its answer, got {alone} '
      f'tokens{more}; shorten it, or begin anew (/reset).'
    )

  def _with_system(self, messages: list[Message]) -> list[Message]:
    if not self.system:
      return messages
    if 'system' in self._template.roles:
      return [Message('system', self.system), *messages]
    # A family without that role is told in front of the first question.
    first = messages[0]
    told = Message(first.role, f'{self.system}\n{first.content}')
    return [told, *messages[1:]]

  def save(self, path: Any) -> None:
    """Writes the conversation as JSON, as OpenAI's and ChatGLM3's tools read it."""
    said = [Message('system', self.system)] if self.system else []
    messages = [
      {k: v for k, v in vars(message).items() if v} for message in [*said, *self.messages]
    ]
    text = json.dumps({'messages': messages}, ensure_ascii=False, indent=1)
    with open(path, 'w', encoding='utf-8') as file:
      file.write(text + '\n')


def whole_characters(vocabulary: Vocabulary, ids: list[int]) -> str:
  """Text of ids, without the bytes of a character that is not complete."""
  text = vocabulary.decode(ids)
  return text.rstrip(_BROKEN) if vocabulary.ends_within_character(ids) else text
