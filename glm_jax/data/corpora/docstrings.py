"""Docstrings of the installed Python packages, read from their sources without running
them.

No TensorFlow here: worker processes import this module alone.
"""

from __future__ import annotations

import ast
import concurrent.futures
import inspect
import multiprocessing
import os
import pydoc_data.topics
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Characters; less is no document.
_SHORTEST = 300
# Words of a summary.
_FEWEST, _MOST = 3, 14
# Folders that are not walked: `site-packages` has a root of its own, and tests document
# nothing.
_SKIPPED = {
  'site-packages',
  'dist-packages',
  '__pycache__',
  'test',
  'tests',
  'testing',
  'idlelib',
  'glm_jax',
  'lib2to3',
}


class SourceDocs(NamedTuple):
  """The documentation of one source file.

  Attributes:
    package: top-level package or module.
    source: path below the library folder.
    text: docstrings in order, a blank line between.
  """

  package: str
  source: str
  text: str


class Summary(NamedTuple):
  """What a function is for.

  Attributes:
    package: top-level package or module.
    function: its name and arguments, 'get(key, default)'.
    text: the first sentence of its docstring.
  """

  package: str
  function: str
  text: str


def topics() -> list[SourceDocs]:
  """CPython's language reference, as `help()` shows it."""
  return [
    SourceDocs('pydoc_data', name, text.strip())
    for name, text in sorted(pydoc_data.topics.topics.items())
  ]


def sources() -> list[tuple[str, str]]:
  """(library folder, path below it) of every Python file, in a fixed order."""
  paths = sysconfig.get_paths()
  # Keyed by the path below a root: roots that are one folder, as purelib and platlib often
  # are, count once.
  root_of = {}
  for root in (paths['stdlib'], paths['purelib'], paths['platlib']):
    for folder, folders, files in os.walk(root):
      # In place, which is how os.walk is told not to descend.
      folders[:] = [name for name in folders if name not in _SKIPPED]
      for name in files:
        if name.endswith('.py'):
          path = Path(folder, name).relative_to(root)
          root_of[str(path)] = root
  return [(root_of[path], path) for path in sorted(root_of)]


def read(args: tuple[str, str]) -> SourceDocs | None:
  """The documentation of one file; None if it cannot be parsed."""
  tree = _parsed(args)
  if tree is None:
    return None
  parts = []
  for node in ast.walk(tree):
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
      # Docstrings have no NUL or lone surrogates in any encoding that is stored.
      text = (ast.get_docstring(node, clean=False) or '').encode('utf-8', 'ignore').decode()
      if text.strip():
        parts.append((getattr(node, 'lineno', 0), inspect.cleandoc(text).strip()))
  # ast.walk goes level by level; by line they are in the order of the file.
  return SourceDocs(_package(args), args[1], '\n\n'.join(text for _, text in sorted(parts)))


def read_summaries(args: tuple[str, str]) -> list[Summary]:
  """Those of one file, level by level; none if it cannot be parsed."""
  tree = _parsed(args)
  made = []
  for node in () if tree is None else ast.walk(tree):
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      continue
    text = _first_sentence(ast.get_docstring(node) or '')
    if text and not node.name.startswith('__'):
      names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
      arguments = ', '.join(name for name in names if name not in ('self', 'cls'))
      made.append(Summary(_package(args), f'{node.name}({arguments})', text))
  return made


def _first_sentence(text: str) -> str:
  """Of a docstring, on one line; '' if it is no sentence of a few words.

  Example:
    >>> _first_sentence('Returns the\\nlength. Never fails.\\n\\nArgs:')
    'Returns the length.'
  """
  paragraph = ' '.join(text.strip().partition('\n\n')[0].split())
  sentence = re.split(r'(?<=[.])\s', paragraph, maxsplit=1)[0]
  few = _FEWEST <= len(sentence.split()) <= _MOST
  return sentence if few and sentence.isascii() and sentence.endswith('.') else ''


def _package(args: tuple[str, str]) -> str:
  return Path(args[1]).parts[0].removesuffix('.py')


def _parsed(args: tuple[str, str]) -> ast.Module | None:
  try:
    # Parsing others' sources warns of their invalid escapes.
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      return ast.parse(Path(*args).read_text(encoding='utf-8'))
  except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
    return None


def documents() -> Iterator[SourceDocs | None]:
  """Topics, then one item a source file: None where it cannot be parsed.

  Items of less than 300 characters are left out.
  """
  yield from topics()
  for docs in _of_files(read):
    if docs is None or len(docs.text) >= _SHORTEST:
      yield docs


def summaries() -> Iterator[Summary]:
  """Those of all files, in order."""
  for made in _of_files(read_summaries):
    yield from made


def _of_files(function: Callable[[tuple[str, str]], Any]) -> Iterator[Any]:
  """A function of each file, in processes of their own."""
  files = sources()
  # Spawned, not forked: TensorFlow has threads in the parent by now.
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
    yield from pool.map(function, files, chunksize=64)
