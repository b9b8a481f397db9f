"""gin files and bindings -> the configuration of a run. The one module that knows gin.

gin binds configuration dataclasses and nothing else: the model is read in Python. Its files
run no code: each is found and read once, looked at, refused if it imports or registers
anything, and gin is handed the text that was looked at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from glm_jax import gin_files, slips
from glm_jax.configs import UserError, check, one_line


def load_config(
  kind: type,
  configurables: Sequence[type],
  files: Sequence[str],
  search_paths: str,
  bindings: Sequence[str],
  *,
  roots: Sequence[type] = (),
  placeholders: bool = False,
) -> tuple[Any, str]:
  """Builds a configuration from gin files and bindings.

  Args:
    kind: the dataclass to build.
    configurables: the dataclasses that gin may bind.
    files: gin files, later ones win.
    search_paths: comma-separated folders, which come before the current one.
    bindings: such as 'TRAIN_STEPS=3'; they win over files.
    roots: dataclasses besides `kind` that nothing refers to and that bindings may be of.
    placeholders: whether macros that are used and not set, such as the path of a corpus,
      become 'unset', for a command that does not need them.

  Returns:
    The instance of `kind`, and the operative configuration: gin text that alone gives
    the same instance again.

  Raises:
    UserError: whatever is wrong in them, in one message.
  """
  import gin

  # gin's state belongs to the process: what an earlier call bound must not remain.
  gin.clear_config()
  for configurable in configurables:
    if configurable.__name__ not in _registered:
      gin.external_configurable(configurable, configurable.__name__)
      _registered.add(configurable.__name__)
  reading = _Reading(search_paths)
  for file in files:
    reading.file(file)
  for binding in bindings:
    reading.binding(binding)
  _refuse_moved(reading.statements)
  _refuse_unknown(reading.statements, configurables)
  missing = _macros(reading.statements, configurables)
  _refuse_without_effect(reading.statements, [kind, *roots])
  missing, unset = _alternatives(reading.statements, missing)
  check(
    not missing or placeholders,
    'macros that a configuration uses must be set',
    'no ' + ', '.join(missing),
    'add ' + ' '.join(map(slips.example, missing)),
  )
  # A private list of gin: its own readers would look for the files again.
  gin.config._FILE_READERS[:] = [(reading.open, reading.texts.__contains__)]
  # No code of ours runs in here: whatever is raised is about the text.
  try:
    for file in files:
      gin.parse_config_file(file)
    # One by one, as each was looked at.
    placed = [f"{name} = 'unset'" for name in missing]
    for binding in [*bindings, *placed, *(f'{name} = None' for name in unset)]:
      gin.parse_config(binding)
    gin.finalize()
  except Exception as error:
    raise UserError(one_line(error)) from error
  try:
    config = gin.get_configurable(kind.__name__)()
  except (UserError, TypeError, RuntimeError) as error:
    # gin raises TypeError for a call that does not fit, and RuntimeError for a parameter
    # without a value; the same types from code of ours are defects.
    if not isinstance(error, UserError) and not _is_of_gin(error):
      raise
    raise UserError(slips.without_value(str(error)) or one_line(error)) from error
  return config, gin.operative_config_str()


# gin refuses to register a name twice, even after `clear_config`.
_registered: set[str] = set()


class _Reference(NamedTuple):
  """@name or @name() in a text that is only looked at."""

  name: str
  evaluate: bool

  @property
  def kind(self) -> str:
    return self.name.rsplit('/', 1)[-1].rsplit('.', 1)[-1]


class _Macro(NamedTuple):
  """%name in such a text."""

  name: str


class _Delegate:
  """Stands for every configurable while a text is looked at."""

  configurable_reference = staticmethod(_Reference)
  macro = staticmethod(_Macro)


@dataclasses.dataclass
class _Statement:
  """A binding, or the head of a block of bindings.

  Attributes:
    kind: name of the class, without modules and scopes; of the macro.
    field: '' for a macro, None for the head of a block.
    value: what it is bound to.
    scope: '' for none.
    where: ' (FILE line N)' for messages; '' for a flag.
  """

  kind: str
  field: str | None
  value: Any
  scope: str
  where: str

  @property
  def place(self) -> str:
    """Its file, whatever the line; '' for a flag."""
    return self.where.rpartition(' line ')[0]


class _Reading:
  """Files and bindings as they are looked at, in the order in which gin takes them.

  Attributes:
    texts: of files by the names that they are called by.
    statements: so far.
  """

  def __init__(self, search_paths: str):
    self._search_paths = search_paths
    self._open: list[Path] = []  # each includes the next
    self.texts: dict[str, str] = {}
    self.statements: list[_Statement] = []

  def open(self, name: str) -> Any:
    """The text of a file that was read, for gin."""
    text = io.StringIO(self.texts[name])
    text.name = name
    return contextlib.closing(text)

  def file(self, name: str) -> None:
    """Reads a file and what it includes.

    Raises:
      UserError: there is no such file, or it is no gin, or would run Python.
    """
    path = gin_files.find(name, self._search_paths)
    check(
      path not in self._open,
      'a gin file must not include itself',
      ' -> '.join(map(str, [*self._open, path])),
      'take one of these includes out',
    )
    if name not in self.texts:
      try:
        self.texts[name] = path.read_text(encoding='utf-8')
      except UnicodeDecodeError as error:
        raise UserError(
          f'a gin file must be UTF-8 text, got {path} ({error}); save it as UTF-8.'
        ) from error
    self._open.append(path)
    self._look_at(self.texts[name], path)
    self._open.pop()

  def binding(self, text: str) -> None:
    """Reads one NAME=value.

    Raises:
      UserError: it is no binding, or more than one.
    """
    before = len(self.statements)
    self._look_at(text, None)
    check(
      len(self.statements) == before + 1,
      'a --gin flag must hold one binding',
      repr(text),
      'write --gin.NAME=value, once for each',
    )

  def _look_at(self, text: str, path: Path | None) -> None:
    from gin import config_parser as gin_parser

    for statement in _parse(text, path):
      if isinstance(statement, gin_parser.IncludeStatement) and path:
        self.file(statement.filename)
      elif isinstance(statement, gin_parser.BindingStatement):
        scope, selector, field, value, location = statement
        where = f' ({path} line {location.line_num})' if path else ''
        kind = selector.rsplit('.', 1)[-1]
        self.statements.append(_Statement(kind, field, value, scope, where))
      elif isinstance(statement, gin_parser.BlockDeclaration):
        where = f' ({path} line {statement.location.line_num})' if path else ''
        kind = statement.selector.rsplit('.', 1)[-1]
        self.statements.append(_Statement(kind, None, None, statement.scope, where))
      else:
        what = getattr(statement, 'module', None) or statement.filename
        raise UserError(
          f'a gin file must not import modules, and a flag not include files, got {what!r}'
          f' in {path or repr(text)}; name modules of your own on the command line with '
          '--import, and files with --gin_file.'
        )


def _parse(text: str, path: Path | None) -> Iterator[Any]:
  """gin's statements; a UserError with a remedy for what it cannot read."""
  from gin import config_parser as gin_parser

  try:
    yield from gin_parser.ConfigParser(text, _Delegate())
  except (SyntaxError, ValueError, tokenize.TokenError) as error:
    if isinstance(error, UserError):
      raise
    line = getattr(error, 'lineno', None) or 1
    if isinstance(error, tokenize.TokenError):  # of a bracket that nothing closes
      line = error.args[1][0]
    lines = text.splitlines() or ['']
    shown = lines[min(line, len(lines)) - 1] if path else text
    where = f' ({path} line {line})' if path else ''
    rule, remedy = slips.of_line(shown, path is None) or (
      f'gin must be able to read a binding ({str(error.args[0]).splitlines()[0]})',
      'write NAME = value, with the values of Python',
    )
    raise UserError(f'{rule}, got {shown.strip()}{where}; {remedy}.') from error


def _refuse_moved(statements: Sequence[_Statement]) -> None:
  """Raises UserError for parameters under the names of an earlier version, all at once."""
  from glm_jax.recipes import MOVED, WIRED

  old = {f'{s.kind}.{s.field}': s.where for s in statements}
  old = {name: where for name, where in old.items() if name in MOVED}
  if old:
    new = [MOVED[name] for name in old]
    once = dict.fromkeys(WIRED[name.split('.')[0]] for name in new)
    places = ', '.join(f'{name}{where}' for name, where in old.items())
    raise UserError(
      f'a parameter must have its name of today, got {places}; write '
      f'{", ".join(new)} (and {", ".join(once)} once).'
    )


def _refuse_unknown(statements: Sequence[_Statement], kinds: Sequence[type]) -> None:
  """Raises UserError for classes and fields that there are not, and says which are near."""
  by_name = {kind.__name__: kind for kind in kinds}
  for statement in statements:
    if statement.field != '':
      _check_kind(statement.kind, statement, by_name)
    kind = by_name.get(statement.kind)
    if statement.field and dataclasses.is_dataclass(kind):
      fields = [field.name for field in dataclasses.fields(kind)]
      if statement.field not in fields:
        near = slips.fields_like(statement.kind, statement.field, kinds)
        raise UserError(
          f'a parameter must be a field of {statement.kind}, got {statement.field}'
          f'{statement.where}; {slips.meant(near, fields)}'
        )
    for reference in _within(statement.value, _Reference):
      _check_kind(reference.kind, statement, by_name)
      check(
        reference.evaluate,
        'a reference to a configuration must have brackets behind it',
        f'@{reference.name}{statement.where}',
        f'write @{reference.name}()',
      )


def _check_kind(name: str, statement: _Statement, kinds: dict[str, type]) -> None:
  import gin

  if name in kinds:
    return
  try:
    gin.get_configurable(name)  # a module of the user's may have registered it
  except ValueError as error:
    near = slips.fields_like(name, statement.field or '', [*kinds.values()])
    if name != statement.kind or not near:
      near = slips.nearest(name, kinds)
    raise UserError(
      f'a configuration must be one that gin may bind, got {name}{statement.where}; '
      f'{slips.meant(near, kinds)}'
    ) from error


def _macros(statements: Sequence[_Statement], kinds: Sequence[type]) -> list[str]:
  """Names of macros that are used and not set.

  Raises:
    UserError: one is set and never used, which is a misspelt one.
  """
  import gin

  used = {macro.name for s in statements for macro in _within(s.value, _Macro)}
  defined = {
    (f'{s.scope}/' if s.scope else '') + s.kind: s for s in statements if s.field == ''
  }
  for name in sorted(defined.keys() - used):
    near = slips.nearest(name, used) or slips.fields_like('', name, kinds)
    raise UserError(
      f'a macro must be used by something, got {name}{defined[name].where}, which nothing '
      f'refers to; {slips.meant(near, sorted(used))}'
    )
  # Later bindings win: of what they replaced no macro is needed.
  final = {(s.scope, s.kind, s.field): s for s in statements if s.field is not None}
  needed = {macro.name for s in final.values() for macro in _within(s.value, _Macro)}
  # Constants are written like macros: gin's own REQUIRED, and those of a user's module.
  constants = gin.config._CONSTANTS
  return sorted(n for n in needed - defined.keys() if not constants.matching_selectors(n))


def _alternatives(
  statements: Sequence[_Statement], missing: Sequence[str]
) -> tuple[list[str], list[str]]:
  """Of macros that stand for each other (`ALTERNATIVES`), the later one given counts.

  So a flag wins over a file, and a file over what it includes before.

  Args:
    statements: of the configuration.
    missing: macros that are used and not set.

  Returns:
    The macros that still are missing, and those that become None.

  Raises:
    UserError: two are given in one file, or as flags.
  """
  from glm_jax.recipes import ALTERNATIVES

  unset = []
  for pair in ALTERNATIVES:
    # None is as good as nothing: the operative configuration has one of them so.
    given = [
      s for s in statements if s.kind in pair and s.field == '' and s.value is not None
    ]
    for last in given[-1:]:
      before = next((s for s in reversed(given) if s.kind != last.kind), None)
      check(
        before is None or before.place != last.place,
        f'of {" and ".join(pair)} one must be given, not both',
        ' and '.join(f'{s.kind}={s.value}{s.where}' for s in (before, last) if s),
        'leave one of them out',
      )
      unset += [name for name in pair if name != last.kind]
    if not given:  # the first is asked for
      unset += pair[1:]
  return [name for name in missing if name not in unset], unset


def _refuse_without_effect(statements: Sequence[_Statement], roots: Sequence[type]) -> None:
  """Raises UserError for flags that bind what nothing of the configuration refers to.

  A file may hold more than one run needs. Whoever writes a flag means it: one of another
  model's class, or in a scope that is misspelt, would change nothing.
  """
  # Also in what a later flag replaced: a script's flags stand before those given to it.
  references = [r for s in statements for r in _within(s.value, _Reference)]
  kinds = {*(reference.kind for reference in references), *(r.__name__ for r in roots)}
  scopes = {part for reference in references for part in reference.name.split('/')[:-1]}
  for flag in (s for s in statements if s.field and not s.where):
    name = f'{flag.kind}.{flag.field}'
    check(
      flag.kind in kinds,
      'a flag must bind what the run uses',
      name,
      f'the run has no @{flag.kind}(), but {", ".join(sorted(kinds))}',
    )
    check(
      not flag.scope or scopes.issuperset(flag.scope.split('/')),
      'a flag must be of a scope that something refers to',
      f'{flag.scope}/{name}',
      f'there are {sorted(scopes) or "none"}',
    )


def _within(value: Any, kind: type) -> Iterator[Any]:
  """All of a type in a value of lists, tuples and dicts."""
  if isinstance(value, (_Reference, _Macro)):
    if isinstance(value, kind):
      yield value
  elif isinstance(value, dict):
    for pair in value.items():
      yield from _within([*pair], kind)
  elif isinstance(value, (list, tuple)):
    for item in value:
      yield from _within(item, kind)


def _is_of_gin(error: BaseException) -> bool:
  """Whether a call that gin made failed at once, so that no code of ours was reached."""
  trace = error.__traceback__
  while trace is not None and trace.tb_next is not None:
    trace = trace.tb_next
  return trace is None or trace.tb_frame.f_globals.get('__name__', '').startswith('gin.')
