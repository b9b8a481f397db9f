"""Answers to what is held out, by the model in training: scores of them, and a file."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np

from glm_jax import configs, distributed, sharding, storage
from glm_jax.configs import POSITIVE, at_least
from glm_jax.evaluation import metrics
from glm_jax.inference.filling import Filler
from glm_jax.text.conversation import Template, in_text
from glm_jax.training.config import TrainConfig

PREDICTIONS = 'predictions.jsonl'
"""In MODEL_DIR, of the last validation: a prompt, an answer and a reference a line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerConfig:
  """Answers at each validation.

  Attributes:
    examples: held-out questions that are answered; 0 for none (extra: answers).
    max_new_tokens: longest answer.
  """

  examples: Annotated[int, at_least(0)] = 0
  max_new_tokens: Annotated[int, POSITIVE] = 128

  def __post_init__(self):
    configs.check_fields(self)
    if self.examples:
      metrics.check_libraries('set AnswerConfig.examples=0')


class Question(NamedTuple):
  """Ids of what is read before an answer, and of the answer without its end."""

  prompt: list[int]
  answer: list[int]


class Answering:
  """Asks what stands in validation rows, as training reads it."""

  def __init__(
    self,
    config: TrainConfig,
    layout: sharding.Layout,
    vocabulary: Any,
    template: Template | None,
    rows: Sequence[Any],
    answers: AnswerConfig,
  ):
    """
    Args:
      config: of the run.
      layout: of the devices.
      vocabulary: of the tokens.
      template: of conversations; None for pairs.
      rows: validation rows of each corpus of answers (`StoredRows`).
      answers: how many, how long.
    """
    self._config, self._layout, self._vocabulary = config, layout, vocabulary
    self._template, self._answers = template, answers
    each = -(-answers.examples // max(len(rows), 1))
    found = [q for part in rows for q in _chosen(part, each, not config.model.causal)]
    self.questions = found[: answers.examples]
    self._filler: Filler | None = None

  def __call__(self, variables: Mapping[str, Any]) -> dict[str, float]:
    """Scores of the model's answers, in percent; the leader writes `PREDICTIONS`.

    All processes take part: the collections stay where they are on the mesh.
    """
    if not self.questions:
      return {}
    # A token at a time is no length to be cut.
    with sharding.active(self._layout.replace(act_length=None)):
      if self._filler is None:
        self._filler = Filler(
          self._config.model, variables, self._vocabulary, self._config.compute
        )
      else:
        # What was compiled is kept from one validation to the next; the weights are new.
        self._filler.engine.variables = variables
      spans = self._filler.fill(
        [question.prompt for question in self.questions],
        max_new_tokens=self._answers.max_new_tokens,
      )
      # Nothing of them is kept: the next step's program writes to their memory.
      self._filler.engine.variables = {}
    text = lambda ids: text_of(ids, self._vocabulary, self._template)
    said = [text(made[0]) for made in spans]
    wanted = [text(question.answer) for question in self.questions]
    if distributed.is_leader():
      lines = [
        {
          'prompt': self._vocabulary.decode(question.prompt, control=True),
          'answer': answer,
          'reference': reference,
        }
        for question, answer, reference in zip(self.questions, said, wanted, strict=True)
      ]
      content = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)
      folder = storage.Folder(self._config.model_dir)
      folder.write(PREDICTIONS, content.encode('utf-8'))
    return metrics.score(said, wanted)


def text_of(ids: Sequence[int], vocabulary: Any, template: Template | None) -> str:
  """An answer as a person reads it.

  Args:
    ids: of it, without what ended it.
    vocabulary: of the tokens.
    template: of the conversation; None for what fills a blank.
  """
  if template is None:
    return vocabulary.decode(ids).strip()
  return in_text(template.decode_answer(ids))


def _chosen(rows: Any, count: int, prefix: bool) -> Iterator[Question]:
  """Questions from all over a split, the same whoever asks."""
  # Packing puts the longest first: rows are taken at even distances, then documents by lot.
  places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
  found = [q for place in places for q in questions(rows.read(int(place), 1), prefix)]
  order = np.random.default_rng(0).permutation(len(found))
  return (found[i] for i in order[:count])


def questions(table: Any, prefix: bool) -> Iterator[Question]:
  """The last answer of each document of some rows.

  Args:
    table: a `RowTable`.
    prefix: of a prefix model, whose `[sop]` before an answer is not read with the prompt.
  """
  for tokens, scored, starts, length in zip(*table, strict=True):
    bounds = [*np.flatnonzero(starts[:length]), length]
    for first, end in itertools.pairwise(bounds):
      learnt = np.flatnonzero(scored[first:end]) + first
      last = int(learnt[-1])
      # From where on all up to the last is learnt.
      gaps = np.flatnonzero(~scored[first:last])
      begin = first + int(gaps[-1]) + 1
      prompt = tokens[first : begin - prefix]
      yield Question(prompt.tolist(), tokens[begin:last].tolist())
