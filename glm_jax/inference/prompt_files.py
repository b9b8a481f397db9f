"""Prompts from a file, and answers in one, with which an interrupted command goes on."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from glm_jax import configs, storage
from glm_jax.configs import UserError

ENDINGS = ('.txt', '.jsonl')
# What an answer has besides its prompt's fields.
_OURS = ('number', 'sample', 'text', 'spans', 'log_prob')


class Prompt(NamedTuple):
  """A line of a file.

  Attributes:
    text: the prompt.
    place: FILE:LINE, for a message.
    fields: all of the line, {'prompt': text} and whatever stands beside it.
  """

  text: str
  place: str
  fields: dict[str, Any]


def read(path: Path) -> list[Prompt]:
  """The prompts of a file: a line each of a .txt, {"prompt": ...} a line of a .jsonl.

  Raises:
    UserError: no such file, none in it, or a line that is none, with its number.
  """
  configs.check(
    path.suffix.lower() in ENDINGS and path.is_file(),
    f'a file of prompts must be there and end in one of {ENDINGS}',
    repr(str(path)),
    'give such a file',
  )
  return parse(path.read_bytes(), str(path), path.suffix.lower() == '.jsonl')


def parse(content: bytes, name: str, is_json: bool = False) -> list[Prompt]:
  """The same of a file's content.

  Args:
    content: of the file.
    name: of the file, for messages.
    is_json: whether its lines are JSON.
  """
  lines = content.removeprefix(b'\xef\xbb\xbf').split(b'\n')
  # What follows the last line break is no line if it is empty.
  lines = lines if lines[-1] else lines[:-1]
  configs.check(bool(lines), f'{name} must hold a prompt', 'an empty file', 'write some')
  prompts = []
  for number, line in enumerate(lines, 1):
    place = f'{name}:{number}'
    try:
      text = line.removesuffix(b'\r').decode()
      fields = configs.parse_json(text) if is_json and text.strip() else {'prompt': text}
      # Escapes in JSON can spell what no file can hold.
      json.dumps(fields, ensure_ascii=False).encode()
    except ValueError as error:
      kind = 'a line of JSON' if is_json else 'UTF-8 text'
      reason = str(error).splitlines()[0][:80]
      raise UserError(f'{place} must be {kind}, got {reason}; mend it.') from error
    prompt = fields.get('prompt') if isinstance(fields, dict) else None
    configs.check(
      isinstance(prompt, str) and bool(prompt.strip()),
      f'{place} must hold a prompt' + ' {"prompt": TEXT}' * is_json,
      repr(text[:80]),
      'write one, or take the line out',
    )
    taken = sorted({*fields} & {*_OURS})
    configs.check(
      not taken,
      f'{place} must leave the names {_OURS} to the answers',
      str(taken),
      'give these fields other names',
    )
    prompts.append(Prompt(prompt, place, fields))
  return prompts


def record(fields: Mapping[str, Any], answer: Any) -> str:
  """An answer as a line of JSON.

  Args:
    fields: of the prompt.
    answer: a `glm_jax.library.Completion`.
  """
  made = {**fields, **{name: getattr(answer, name) for name in _OURS}}
  # More digits are those of the batch that it happened to be in.
  made['log_prob'] = round(made['log_prob'], 4)
  return json.dumps(made, ensure_ascii=False) + '\n'


class Answers:
  """A .jsonl of answers, in the order in which they are done until all are there.

  Beside it, a file tells what they were made with. A command that is started again goes on
  with its own answers, and with nobody else's.

  Attributes:
    done: (number, sample) of the answers that are there.
  """

  def __init__(self, path: Path, identity: Mapping[str, Any]):
    """Reads what is there; writes nothing.

    Args:
      path: of the file.
      identity: what the answers depend on.

    Raises:
      UserError: a file of something else, or of answers that were made otherwise.
    """
    self._path, self._beside = path, path.with_name(path.name + '.made_with')
    self._identity, self._kept = dict(identity), b''
    self.done: set[tuple[int, int]] = set()
    if self._beside.exists():
      before = configs.read_json(self._beside)
      changed = [k for k, v in self._identity.items() if before.get(k) != v]
      configs.check(
        not changed,
        f'{path} holds answers that were made otherwise, and must be as it was',
        ', '.join(f'{k} {self._identity[k]!r} (was {before.get(k)!r})' for k in changed),
        'choose another --output',
      )
    elif path.exists() and path.stat().st_size:
      raise UserError(
        f'--output must not exist, or be what this command was writing, got {str(path)!r} '
        f'without {self._beside.name}; choose another file.'
      )
    if not path.exists():
      return
    content = path.read_bytes()
    # A line that was not written to its end is made again.
    self._kept = content[: content.rfind(b'\n') + 1]
    self.done = {*self._order(self._kept)}

  def __enter__(self) -> Answers:
    """Begins to write."""
    text = json.dumps(self._identity, ensure_ascii=False, indent=2) + '\n'
    storage.Folder(str(self._path.parent)).write(self._beside.name, text.encode())
    self._file = self._path.open('ab')
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
        f'--output must be written by one command, got {str(self._path)!r}, which another '
        'one is writing; choose another file.'
      ) from error
    self._file.truncate(len(self._kept))
    return self

  def __exit__(self, *error: object) -> None:
    self._file.close()

  def add(self, line: str) -> None:
    """Writes an answer, see `record`."""
    self._file.write(line.encode())
    self._file.flush()

  def finish(self) -> None:
    """All are there: puts them in the order of their prompts."""
    content = self._path.read_bytes()
    order = self._order(content)
    lines = [line + b'\n' for line in content.split(b'\n')[:-1]]
    ordered = [line for _, line in sorted(zip(order, lines, strict=True))]
    if ordered != lines:
      storage.Folder(str(self._path.parent)).write(self._path.name, b''.join(ordered))

  def _order(self, content: bytes) -> list[tuple[int, int]]:
    """(number, sample) of each line."""
    found = []
    for number, line in enumerate(content.split(b'\n')[:-1], 1):
      try:
        answer = configs.parse_json(line)
        found.append((int(answer['number']), int(answer['sample'])))
      except (ValueError, KeyError, TypeError) as error:
        raise UserError(
          f'{self._path}:{number} must be an answer of this command, got {line[:80]!r}; '
          'take the line out, or choose another --output.'
        ) from error
    return found
