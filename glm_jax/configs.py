"""Types of configuration fields, checked: gin itself lets any value through."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any


def check_types(config: Any) -> None:
  """Raises ValueError if a field of a dataclass is not of its annotated type.

  An int stands for a float; nothing else is converted. A bool is not an int.

  Args:
    config: an instance of a dataclass.

  Example:
    >>> @dataclasses.dataclass(frozen=True)
    ... class Config:
    ...   batch_size: int = 8
    >>> check_types(Config(batch_size=16))
    >>> check_types(Config(batch_size='16'))
    Traceback (most recent call last):
    ...
    ValueError: Config.batch_size must be int, got '16' (str); set it to an int.
  """
  hints = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    value, hint = getattr(config, field.name), hints[field.name]
    if not _matches(value, hint):
      name = f'{type(config).__name__}.{field.name}'
      kind = hint.__name__ if isinstance(hint, type) else str(hint)
      raise ValueError(
        f'{name} must be {kind}, got {value!r} ({type(value).__name__}); '
        f'set it to {"an" if kind[0] in "aeiou" else "a"} {kind}.'
      )


def check(condition: bool, rule: str, received: str, remedy: str) -> None:
  """Raises ValueError saying the rule, the value received and the remedy."""
  if not condition:
    raise ValueError(f'{rule}, got {received}; {remedy}.')


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object from a file.

  Raises:
    ValueError: it is none, in one message with the file's name.
  """
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} must be JSON, got {error}; fetch it again.') from error
  if not isinstance(content, dict):
    raise ValueError(
      f'{path} must be a JSON object, got {type(content).__name__}; fetch it again.'
    )
  return content


def check_finite(value: float, name: str, remedy: str) -> None:
  """Raises FloatingPointError for a NaN or an infinity."""
  if not math.isfinite(value):
    raise FloatingPointError(f'{name} must stay finite, got {value}; {remedy}.')


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
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  if hint is int:
    return isinstance(value, int) and not isinstance(value, bool)
  return isinstance(value, hint)
