"""Questions of a corpus as a policy is asked them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from glm_jax import configs
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.inference import prompts
from glm_jax.text import asking
from glm_jax.text.conversation import Message, Template
from glm_jax.text.vocabulary import Vocabulary

# Whose roles objects are read in where a model has no chat template.
_PLAIN = 'chatglm'


class Query(NamedTuple):
  """What is asked.

  Attributes:
    text: of it.
    ids: as `prompts.encode` gives them.
    fields: of its line.
    own: ids of the line's own answer and its end; none where nobody needs it.
  """

  text: str
  ids: list[int]
  fields: Mapping[str, Any]
  own: Sequence[int] = ()


class PromptReader:
  """Reads the questions of a corpus.

  Attributes:
    lost: questions that were too long and left out, of both splits.
    lost_answers: questions whose own answers were.
  """

  def __init__(
    self,
    model: Any,
    vocabulary: Vocabulary,
    template: Template | None,
    blank: str,
    room: int,
    answer: int = 0,
  ):
    """
    Args:
      model: configuration of the model that is asked.
      vocabulary: of the tokens.
      template: of conversations; None where questions are asked by `blank`.
      blank: see `asking.check_pattern`.
      room: most ids of a question.
      answer: most ids of its line's own answer; 0 if that is not needed.
    """
    self._model, self._vocabulary, self._template = model, vocabulary, template
    self._blank, self._room, self._most = blank, room, answer
    self.lost = self.lost_answers = 0

  def read(self, source: CorpusConfig) -> dict[str, list[Query]]:
    """The questions of 'train' and of 'validation', in the order of the corpus.

    Raises:
      UserError: none to train on; one that cannot be asked, or has no answer of its own
        where that is needed, or, with the rule 'error' of `CorpusConfig.too_long`, that is
        too long.
    """
    from glm_jax.data.corpora import corpus

    family = self._template.family if self._template else _PLAIN
    asked = dataclasses.replace(source, conversations=family, asked=True)
    found: dict[str, list[Query]] = {'train': [], 'validation': []}
    for split, questions in found.items():
      for document in corpus.documents(asked, split):
        where = document.where()
        text = '\n'.join(message.content for message in document.messages)
        ids, own = self._encode(document, source.too_long, where)
        fits = len(ids) <= self._room and len(own) <= self._most
        answered = f', and its answer {self._most}' if self._most else ''
        configs.check(
          fits or source.too_long != 'error',
          f'a question must fit {self._room} tokens{answered}',
          f'{len(ids)}{f" and {len(own)}" if own else ""}{where}',
          "raise TASK_FEATURE_LENGTHS, or set CorpusConfig.too_long='drop'",
        )
        if fits:
          questions.append(Query(text, ids, document.fields, own))
        elif len(ids) > self._room:
          self.lost += 1
        else:
          self.lost_answers += 1
    configs.check(
      bool(found['train']),
      'the corpus must hold a question to train on',
      f'none in {source.corpus!r}: {"; ".join(self.in_words()) or "it is empty"}',
      'give some, or raise TASK_FEATURE_LENGTHS or max_new_tokens',
    )
    return found

  def in_words(self) -> list[str]:
    """Lines that say what was left out."""
    words = (
      (self.lost, f'questions are longer than {self._room} tokens and left out'),
      (self.lost_answers, f'have own answers longer than {self._most} and are left out'),
    )
    return [f'{count:,} {what}' for count, what in words if count]

  def _encode(self, document: Any, rule: str, where: str) -> tuple[list[int], list[int]]:
    """Ids of a question, whose first turns may be left out, and of its own answer."""
    messages, answer = document.messages, document.answer
    configs.check(
      bool(answer.strip()) or not self._most,
      'a question must have an answer of its own, to be learnt or compared with',
      f'none{where}',
      'write {"prompt": ..., "response": ...}, or leave sft_weight and less_own out',
    )
    if self._template is None:
      return self._in_blank(messages, answer, where)
    ids = self._template.encode(messages, opening=True)
    # A prefix model's ids end with what opens an answer, which has room of its own.
    room = self._room + (not self._model.causal)
    if len(ids) > room and rule.startswith('truncate'):
      messages = self._template.fit(messages, room)[0] or messages
      ids = self._template.encode(messages, opening=True)
    own = []
    if self._most:
      said = Message('assistant', answer)
      whole, scored = self._template.encode_masked([*messages, said])
      # The last of them: earlier answers of the conversation may carry loss, too.
      own = whole[len(scored) - scored[::-1].index(False) :]
    # What opens an answer is not read with the question by a model that fills blanks.
    return (ids if self._model.causal else ids[:-1]), own

  def _in_blank(
    self, messages: Sequence[Message], answer: str, where: str
  ) -> tuple[list[int], list[int]]:
    v = self._vocabulary
    configs.check(
      len(messages) == 1,
      'a model without a chat template must be asked a single question',
      f'{len(messages)} messages{where}',
      'leave out what was said before, or name a template',
    )
    text = self._blank.replace(asking.PROMPT, messages[0].content)
    ids = prompts.encode(self._model, v, text)
    configs.check(
      len(prompts.blanks(v, ids)) == 1,
      'a question must have one blank',
      f'{text!r:.80}{where}',
      'leave names of masks out of the questions',
    )
    if not self._most:
      return ids, []
    [span] = prompts.encode_answers(self._model, v, text, [answer])
    return ids, [*span, v.specials.eop]


def fingerprint(questions: Mapping[str, Sequence[Query]]) -> str:
  """Tells questions, and what judges their answers, from others."""
  digest = hashlib.sha256()
  for split in questions.values():
    for question in split:
      told = [question.ids, question.own, question.fields]
      digest.update(json.dumps(told, default=str).encode())
    digest.update(b'\n')
  return digest.hexdigest()[:16]
