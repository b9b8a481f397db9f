"""What a task of an evaluation is: what it asks, and what becomes of the answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from glm_jax import configs
from glm_jax.configs import LOCAL, POSITIVE, SEED, UserError, at_least, one_of
from glm_jax.inference import prompts
from glm_jax.inference.candidates import Asked, Said
from glm_jax.text import asking, chat
from glm_jax.text.vocabulary import MASKS, Vocabulary

Record = dict[str, Any]
"""What is kept of an example: JSON, from which alone a table is made."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How a task is asked.

  Attributes:
    length: longest row in tokens; 0 for as many as the model has positions.
    stride: tokens that a window of a long text adds, and is scored on; 0 for half a row.
    unidirectional: a model that fills blanks reads no context at once, but goes on from
      the beginning (THUDM/GLM --unidirectional).
    mask: that a model fills; '' for the task's own.
    mask_ratios: shares of the words of a text that are blanked.
    shots: examples with their answers before each question.
    split: of a folder; '' for the one that is usually reported.
    limit: most examples; 0 for all.
    answers: a file of answers to the prompts, where these have none beside them.
    max_new_tokens: longest generated answer.
    template: the chat template that prompts are asked in, of `glm_jax.text.chat.FAMILIES`,
      or 'own', that of the model; '' asks them as they stand.
    blank: how a prompt is written for a model that fills blanks, see `text.asking`.
    seed: of what is blanked.
  """

  length: Annotated[int, at_least(0)] = 0
  stride: Annotated[int, at_least(0)] = 0
  unidirectional: bool = False
  mask: Annotated[str, one_of('', *MASKS)] = ''
  mask_ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5)
  shots: Annotated[int, at_least(0)] = 0
  split: str = ''
  limit: Annotated[int, at_least(0)] = 0
  answers: Annotated[str, LOCAL] = ''
  max_new_tokens: Annotated[int, POSITIVE] = 64
  template: Annotated[str, one_of('', 'own', *chat.FAMILIES)] = ''
  blank: str = f'{asking.PROMPT}[gMASK]'
  seed: Annotated[int, SEED] = 0

  def __post_init__(self):
    configs.check_fields(self)
    asking.check_pattern(self.blank)
    configs.check(
      bool(self.mask_ratios) and all(0 < ratio < 1 for ratio in self.mask_ratios),
      'mask ratios must be in (0, 1)',
      str(self.mask_ratios),
      'give such as 0.1,0.5',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
  """An example.

  Attributes:
    fields: of its record.
    question: whose candidates are read; None for one that is answered.
    prompt: that is answered.
    template: that it is a question in; '' for a text, see `Options.template`.
  """

  fields: Record
  question: Asked | None = None
  prompt: str = ''
  template: str = ''


class Task:
  """A task; see `patterns.register` for one of one's own.

  Attributes:
    name: of --task.
  """

  name: str

  def items(self, path: Path, asker: Asker, options: Options) -> Iterator[Item]:
    """Examples of a file or a folder.

    Raises:
      UserError: it is none of this task, with its place.
    """
    raise NotImplementedError

  def judged(self, fields: Record, said: Sequence[Said]) -> Record:
    """What the record has besides, of what is said of each candidate."""
    raise NotImplementedError

  def answered(self, fields: Record, spans: Sequence[str], text: str) -> Record:
    """What the record has besides, of generated spans and the text that they stand in."""
    raise NotImplementedError

  def table(self, records: Sequence[Record]) -> list[Record]:
    """Lines of the table; what is no number names a line."""
    raise NotImplementedError


class Asker:
  """Writes texts as one model reads them.

  Of a row that is too long, what is farthest from the blank is left out: of a context, its
  beginning.

  Attributes:
    config: of the model.
    vocabulary: of its tokens.
    length: tokens of the longest row.
    cut: rows of which something was left out.
  """

  def __init__(self, config: Any, vocabulary: Vocabulary, length: int = 0):
    self.config, self.vocabulary = config, vocabulary
    self.length = length or config.max_positions
    self.cut = 0
    configs.check(
      self.length <= config.max_positions + 1,
      f'--length must be at most {config.max_positions + 1}, the positions of the model',
      str(length),
      'give less, or leave it out',
    )

  def mask(self, *names: str) -> str:
    """The first of the masks that the vocabulary has."""
    known = asking.masks(self.vocabulary)
    return next(name for name in (*names, *MASKS) if name in known)

  def opened(self, mask: str) -> list[int]:
    """Ids of a row that has no text yet: what opens it, and a mask."""
    if self.config.causal:
      return [*self.vocabulary.prefix]
    return asking.around(self.vocabulary, [self.vocabulary.control[mask]])

  def encoded(self, text: str, *, before_mask: bool = False) -> list[int]:
    """Ids of what opens a text; the space before a mask is that of what fills it."""
    swallowed = (
      before_mask and not self.config.causal and self.vocabulary.takes_space_before
    )
    return self.vocabulary.encode(text.rstrip() if swallowed else text)

  def candidate(self, text: str, before: str, where: str) -> list[int]:
    """Ids of what fills the blank behind a text, or goes on with it.

    Raises:
      UserError: it has none.
    """
    ids = []
    if text:
      # Without a mask, the space before it stays in the text.
      before = before.rstrip() if self.config.causal else before
      ids = asking.encode_answer(self.vocabulary, text, before, inside=bool(before.strip()))
    configs.check(
      bool(ids), f'{where}: a candidate must hold some text', repr(text), 'mend'
    )
    return ids

  def question(
    self,
    before: str,
    candidates: Sequence[str],
    where: str,
    *,
    mask: str = '[MASK]',
    cut: bool = True,
  ) -> Asked:
    """A text, and what may stand at its end; see `of_ids`."""
    spans = [self.candidate(text, before, where) for text in candidates]
    ids = self.encoded(before, before_mask=True)
    return self.of_ids(ids, spans, where, mask=mask, cut=cut)

  def of_ids(
    self,
    before: Sequence[int],
    candidates: Sequence[Sequence[int]],
    where: str,
    *,
    mask: str = '[MASK]',
    behind: Sequence[int] = (),
    cut: bool = True,
  ) -> Asked:
    """The same of token ids.

    Args:
      before: what stands before a blank, or before what goes on with it.
      candidates: for it.
      where: the example stands, in words.
      mask: of a model that fills blanks.
      behind: what stands behind the blank.
      cut: leave something out of a text that is too long.

    Raises:
      UserError: it is too long.
    """
    c, v = self.config, self.vocabulary
    longest = max(map(len, candidates))
    if c.causal:
      ids = [*v.prefix, *before]
      # The last token of a row is only predicted.
      excess = len(ids) + longest - 1 - self.length
    else:
      ids = asking.around(v, [*before, v.control[mask], *behind])
      excess = len(ids) + 1 + longest - self.length
    if excess > 0:
      configs.check(
        cut and excess <= len(before),
        f'{where}: a question with its answer must fit a row of {self.length} tokens',
        str(self.length + excess),
        'ask with fewer --shots, or with a model that has more positions',
      )
      self.cut += 1
      before = before[excess:]
      return self.of_ids(before, candidates, where, mask=mask, behind=behind)
    configs.check(
      not c.causal or bool(ids), f'{where}: a context must hold some text', "''", 'give one'
    )
    return Asked(prompts.request(c, v, 0, ids), candidates)


def lines(
  path: Path, fields: Sequence[str], endings: Sequence[str] = ('.jsonl', '.txt')
) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """(place, object) of each line of a .jsonl; a line of a .txt is {its first field: line}.

  Args:
    path: of the file.
    fields: names that an object must have.
    endings: that the file may have.

  Raises:
    UserError: no such file, or a line that is no such object.
  """
  configs.check(
    path.suffix.lower() in endings and path.is_file(),
    f'a file of examples must be there and end in one of {endings}',
    repr(str(path)),
    'give such a file',
  )
  is_json = path.suffix.lower() != '.txt'
  for number, line in enumerate(
    path.read_bytes().removeprefix(b'\xef\xbb\xbf').splitlines(), 1
  ):
    place = f'{path}:{number}'
    if not line.strip():
      continue
    try:
      made = configs.parse_json(line) if is_json else {fields[0]: line.decode()}
      json.dumps(made, ensure_ascii=False).encode()
    except ValueError as error:
      kind = 'a line of JSON' if is_json else 'UTF-8 text'
      raise UserError(f'{place} must be {kind}, got {line[:80]!r}; mend it.') from error
    missing = (
      [name for name in fields if name not in made] if isinstance(made, dict) else ['']
    )
    configs.check(
      not missing,
      f'{place} must be an object with the fields {[*fields]}',
      repr(line[:80].decode(errors='replace')),
      'mend it, or choose the task or benchmark that it is of',
    )
    yield place, made


def text_of(made: Mapping[str, Any], name: str, place: str) -> str:
  """The text of a field.

  Raises:
    UserError: it is none, or empty.
  """
  value = made[name]
  configs.check(
    isinstance(value, str) and bool(value.strip()),
    f'{place}: the field {name!r} must hold some text',
    f'{value!r:.80}',
    'write some, or take the line out',
  )
  return value
