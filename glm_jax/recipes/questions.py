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
from glm_jax.text.conversation import Template
from glm_jax.text.vocabulary import Vocabulary

# Whose roles objects are read in where a model has no chat template.
_PLAIN = 'chatglm'


class Query(NamedTuple):
  """What is asked.

  Attributes:
    text: of it.
    ids: as `prompts.encode` gives them.
    fields: of its line.
  """

  text: str
  ids: list[int]
  fields: Mapping[str, Any]


class PromptReader:
  """Reads the questions of a corpus.

  Attributes:
    lost: how many were too long and left out.
  """

  def __init__(
    self,
    model: Any,
    vocabulary: Vocabulary,
    template: Template | None,
    blank: str,
    room: int,
  ):
    """
    Args:
      model: configuration of the model that is asked.
      vocabulary: of the tokens.
      template: of conversations; None where questions are asked by `blank`.
      blank: see `asking.check_pattern`.
      room: most ids of a question.
    """
    self._model, self._vocabulary, self._template = model, vocabulary, template
    self._blank, self._room, self.lost = blank, room, 0

  def read(self, source: CorpusConfig) -> dict[str, list[Query]]:
    """The questions of 'train' and of 'validation', in the order of the corpus.

    Raises:
      UserError: none to train on; one that cannot be asked, or, with the rule 'error' of
        `CorpusConfig.too_long`, that is too long.
    """
    from glm_jax.data.corpora import corpus

    family = self._template.family if self._template else _PLAIN
    asked = dataclasses.replace(source, conversations=family, asked=True)
    found: dict[str, list[Query]] = {'train': [], 'validation': []}
    for split, questions in found.items():
      for document in corpus.documents(asked, split):
        where = document.where()
        text = '\n'.join(message.content for message in document.messages)
        ids = self._encode(document.messages, source.too_long, where)
        configs.check(
          len(ids) <= self._room or source.too_long != 'error',
          f'a question must fit {self._room} tokens',
          f'{len(ids)}{where}',
          "raise TASK_FEATURE_LENGTHS, or set CorpusConfig.too_long='drop'",
        )
        if len(ids) > self._room:
          self.lost += 1
        else:
          questions.append(Query(text, ids, document.fields))
    configs.check(
      bool(found['train']),
      'the corpus must hold a question to train on',
      f'none in {source.corpus!r}, with {self.lost} too long',
      'give some, or raise TASK_FEATURE_LENGTHS',
    )
    return found

  def _encode(self, messages: Sequence[Any], rule: str, where: str) -> list[int]:
    """Ids of a question; of one that is too long, its first turns may be left out."""
    if self._template is None:
      return self._in_blank(messages, where)
    ids = self._template.encode(messages, opening=True)
    if len(ids) > self._room and rule.startswith('truncate'):
      kept = self._template.fit(messages, self._room)[0]
      ids = self._template.encode(kept, opening=True) if kept else ids
    # What opens an answer is not read with the question by a model that fills blanks.
    return ids if self._model.causal else ids[:-1]

  def _in_blank(self, messages: Sequence[Any], where: str) -> list[int]:
    configs.check(
      len(messages) == 1,
      'a model without a chat template must be asked a single question',
      f'{len(messages)} messages{where}',
      'leave out what was said before, or name a template',
    )
    text = self._blank.replace(asking.PROMPT, messages[0].content)
    ids = prompts.encode(self._model, self._vocabulary, text)
    configs.check(
      len(prompts.blanks(self._vocabulary, ids)) == 1,
      'a question must have one blank',
      f'{text!r:.80}{where}',
      'leave names of masks out of the questions',
    )
    return ids


def fingerprint(questions: Mapping[str, Sequence[Query]]) -> str:
  """Tells questions, and what judges their answers, from others."""
  digest = hashlib.sha256()
  for split in questions.values():
    for question in split:
      digest.update(json.dumps([question.ids, question.fields], default=str).encode())
    digest.update(b'\n')
  return digest.hexdigest()[:16]
