"""Checks of configurations, and the error of whoever wrote one.

gin lets any value through. A configuration says in the types of its fields what they may
be, `Annotated[int, POSITIVE]`, and calls `check_fields` when it is made; only relations
between fields are sentences of their own (`check`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

LARGEST_JSON = 2**27
"""In bytes: several times a vocabulary, an index of a large model, or a long book."""
# Python's own limit differs between versions, and is more than other code can walk down.
_DEEPEST_JSON = 100
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"|[][{}]', re.DOTALL)


class UserError(ValueError):
  """Something that a user can mend: a command says it in one line, without a traceback.

  The message states the rule, the value received and the remedy. Any other exception is
  a defect of the program and keeps its traceback.
  """


class ResourceError(OSError):
  """What the system has no more of, or does not allow: disk, memory, a bucket."""


@dataclasses.dataclass(frozen=True)
class Rule:
  """What the value of a field must be, beyond its type.

  Attributes:
    words: behind 'must be '.
    holds: whether a value is so.
    remedy: what to do about one that is not.
  """

  words: str
  holds: Callable[[Any], bool]
  remedy: str

  def but(self, remedy: str) -> Rule:
    """The same rule with a remedy of the field's own."""
    return dataclasses.replace(self, remedy=remedy)


def at_least(least: float) -> Rule:
  """A finite number that is not smaller.

  Example:
    >>> at_least(1).words, at_least(1).holds(0)
    ('1 or more', False)
  """
  # The bound above refuses NaN, too, of which every comparison is false.
  return Rule(f'{least} or more', lambda x: least <= x < math.inf, f'give {least} or more')


def at_most(most: int) -> Rule:
  """A number that is not larger.

  Example:
    >>> at_most(8).words, at_most(8).holds(9)
    ('8 or less', False)
  """
  return Rule(f'{most} or less', lambda x: x <= most, f'give {most} or less')


def within(interval: str) -> Rule:
  """A number in an interval, written as in mathematics: '[' holds its bound, '(' does not.

  Example:
    >>> [within('(0, 1]').holds(x) for x in (0, 0.5, 1)]
    [False, True, True]
  """
  low, high = (float(bound) for bound in interval[1:-1].split(','))

  def holds(x: float) -> bool:
    above = low <= x if interval[0] == '[' else low < x
    return above and (x <= high if interval[-1] == ']' else x < high)

  return Rule(f'in {interval}', holds, f'give a number in {interval}')


def one_of(*choices: str) -> Rule:
  """One of some words."""
  return Rule(f'one of {choices}', lambda x: x in choices, 'choose one of these')


POSITIVE = Rule('positive', lambda x: 0 < x < math.inf, 'give a number above 0')
INT32 = at_most(2**31 - 1)
NOT_EMPTY = Rule('some text', bool, 'give one')
SEED = Rule('a number of 32 bits', lambda x: 0 <= x < 2**32, 'give one from 0 on')
LOCAL = Rule(
  'a path on this machine',
  lambda path: not _scheme(path) and '\0' not in path,
  'mount the bucket (gcsfuse, mountpoint-s3), or copy what is there',
)
READABLE = Rule(
  'here or in gs://',
  lambda path: _scheme(path) in ('', 'gs') and '\0' not in path,
  'mount other storage, or copy what is there',
)
"""Of what is read and written in a bucket as well: text, shards, runs."""


def _scheme(path: str) -> str:
  """Of an address such as gs://bucket/name, also behind a kind; '' for a path.

  Example:
    >>> [_scheme(path) for path in ('a/b', 's3://a', 'shards:gs://a', 'gs:/a', 'bytes:/a')]
    ['', 's3', 'gs', 'gs', '']
  """
  # pathlib makes gs:/ of gs://, and a kind may stand before a path: bytes:/home/me.
  match = re.search(r'([a-z][\w+.-]*)://|\b(gs|s3|https?|hdfs|file):/', path.lower())
  return match[1] or match[2] if match else ''


def check_fields(config: Any) -> None:
  """Raises UserError if a field of a dataclass breaks its type or a rule beside it.

  An int stands for a float; nothing else is converted. A bool is not an int.

  Args:
    config: an instance of a dataclass.

  Example:
    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...   rows: typing.Annotated[int, POSITIVE] = 8
    >>> check_fields(Config(rows=16))
    >>> check_fields(Config(rows='a'))
    Traceback (most recent call last):
    ...
    glm_jax.configs.UserError: Config.rows must be int, got 'a' (str); set it to an int.
    >>> check_fields(Config(rows=0))
    Traceback (most recent call last):
    ...
    glm_jax.configs.UserError: Config.rows must be positive, got 0; give a number above 0.
  """
  for field, hint, rules in typed_fields(type(config)):
    value, name = getattr(config, field.name), f'{type(config).__name__}.{field.name}'
    if not _matches(value, hint):
      raise UserError(
        f'{name} must be {type_words(hint)}, got {value!r} ({type(value).__name__}); '
        f'{_remedy(value, hint)}.'
      )
    # Where a field may be None, its rules are of other values.
    for rule in rules if value is not None else ():
      check_value(name, value, rule)


def typed_fields(kind: type) -> Iterator[tuple[dataclasses.Field, Any, Sequence[Rule]]]:
  """Each field of a dataclass, its type without `Annotated`, and the rules beside it."""
  # `from __future__ import annotations` leaves the types as text: they are evaluated here.
  hints = typing.get_type_hints(kind, include_extras=True)
  for field in dataclasses.fields(kind):
    hint, rules = hints[field.name], ()
    if typing.get_origin(hint) is typing.Annotated:
      hint, *rules = typing.get_args(hint)
    yield field, hint, rules


def check_value(name: str, value: Any, rule: Rule) -> None:
  """Raises UserError if the value of a field or a flag breaks a rule."""
  check(rule.holds(value), f'{name} must be {rule.words}', repr(value), rule.remedy)


def check_pattern(name: str, pattern: str) -> None:
  """Raises UserError for a pattern of paths of parameters that cannot be read."""
  try:
    re.compile(pattern)
  except re.error as error:
    raise UserError(
      f'{name} must be a regular expression, got {pattern!r} ({error}); '
      "write one such as 'layers/attention/.*'."
    ) from error


def check(condition: bool, rule: str, received: str, remedy: str) -> None:
  """Raises UserError saying the rule, the value received and the remedy."""
  if not condition:
    raise UserError(f'{rule}, got {received}; {remedy}.')


def one_line(error: BaseException) -> str:
  """An error for a terminal, without the configurables that gin was in."""
  # str(error) would begin with '[Errno 2]'.
  if isinstance(error, OSError) and error.strerror and error.filename:
    return f'{error.filename}: {error.strerror}'
  text = re.split(r'\n\s*In call to configurable', str(error).strip())[0].strip()
  return re.sub(r'\s*\n\s*', ' ', text)


def parse_json(
  content: str | bytes, *, most: int = LARGEST_JSON, once: bool = False
) -> Any:
  """JSON that somebody else may have written: of a size and a depth that nothing fails at.

  Args:
    content: text, or bytes of UTF-8, -16 or -32.
    most: characters or bytes that it may have.
    once: whether an object may have each name only once; else its last value counts.

  Raises:
    ValueError: it is no JSON, larger, or nested deeper than 100.

  Example:
    >>> parse_json(b'{"a": [1]}')
    {'a': [1]}
    >>> parse_json('[' * 101 + ']' * 101)
    Traceback (most recent call last):
    ...
    ValueError: JSON nested deeper than 100
  """
  if len(content) > most:
    raise ValueError(f'JSON of more than {most:,} bytes')
  if isinstance(content, bytes):
    content = content.decode(json.detect_encoding(content))
  # Most content has fewer brackets than that at all, whether in strings or not.
  if content.count('[') + content.count('{') > _DEEPEST_JSON:
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(content):
      depth += (token[0] in '[{') - (token[0] in ']}')
      if depth > _DEEPEST_JSON:
        raise ValueError(f'JSON nested deeper than {_DEEPEST_JSON}')
  return json.loads(content, object_pairs_hook=_each_once if once else None)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  made = dict(pairs)
  if len(made) < len(pairs):
    raise ValueError('a name twice in one object')
  return made


def read_json(path: Any, remedy: str = 'fetch it again') -> dict[str, Any]:
  """A JSON object from a file, see `parse_json`.

  Args:
    path: of the file, here or in a bucket.
    remedy: of what is none.

  Raises:
    UserError: it is none, in one message with the file's name.
  """
  try:
    with path.open('rb') as file:
      content = parse_json(file.read(LARGEST_JSON + 1), most=LARGEST_JSON)
  except (FileNotFoundError, ValueError) as error:
    raise UserError(f'{path} must be readable JSON, got {error}; {remedy}.') from error
  if not isinstance(content, dict):
    raise UserError(
      f'{path} must be a JSON object, got {type(content).__name__}; {remedy}.'
    )
  return content


def check_finite(value: float, name: str, remedy: str) -> None:
  """Raises FloatingPointError for a NaN or an infinity."""
  if not math.isfinite(value):
    raise FloatingPointError(f'{name} must stay finite, got {value}; {remedy}.')


def type_words(hint: Any) -> str:
  """A type as one says it.

  Example:
    >>> type_words(int | None), type_words(dict[str, int])
    ('int or None', 'dict[str, int]')
  """
  if typing.get_origin(hint) in (types.UnionType, typing.Union):
    return ' or '.join(map(type_words, typing.get_args(hint)))
  if hint is type(None):
    return 'None'
  # A tuple's arguments belong to it, and str() has them.
  return (
    hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
  )


def _remedy(value: Any, hint: Any) -> str:
  """What to write instead of a value of a wrong type."""
  kinds = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
  if len(kinds) == 2 and kinds[1] is type(None):
    hint = kinds[0]
  if kind := next((k for k in kinds if dataclasses.is_dataclass(k)), None):
    return f'write @{kind.__name__}(), and bind its fields'
  if hint is int and isinstance(value, float) and value.is_integer():
    return f'write {int(value)}'
  if hint in (int, float) and isinstance(value, str):
    with contextlib.suppress(ValueError):
      return f'write {hint(value)}, without quotes'
  if typing.get_origin(hint) is tuple and isinstance(value, list):
    return f'write {tuple(value)!r}'
  words = type_words(hint)
  return f'set it to {"an" if words[0] in "aeiou" else "a"} {words}'


def _matches(value: Any, hint: Any) -> bool:
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any:
    return True
  if origin in (types.UnionType, typing.Union):
    return any(_matches(value, arg) for arg in args)
  if origin is typing.Literal:
    return value in args
  if origin is tuple:
    if not isinstance(value, tuple):
      return False
    # tuple[int, ...] is of any length, tuple[int, str] of that one.
    if len(args) == 2 and args[1] is Ellipsis:
      return all(_matches(item, args[0]) for item in value)
    return len(value) == len(args) and all(map(_matches, value, args))
  if origin is dict:
    key, item = args
    return isinstance(value, dict) and all(
      _matches(k, key) and _matches(v, item) for k, v in value.items()
    )
  if hint is type(None):
    return value is None
  if hint is float:
    # bool is a subclass of int.
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  if hint is int:
    return isinstance(value, int) and not isinstance(value, bool)
  return isinstance(value, hint)
