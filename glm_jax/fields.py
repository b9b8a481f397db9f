"""Lists what gin files and --gin flags may set: fields, macros, and the files there are."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from glm_jax import cli, configs, gin_files, slips, startup


class Line(NamedTuple):
  """Of a field, a macro or a file.

  Attributes:
    name: as gin has it.
    value: its type, the rules beside it, and its default; '' for a file.
    doc: what it is.
  """

  name: str
  value: str
  doc: str

  def __str__(self) -> str:
    return '  '.join(part for part in self if part)


class Section(NamedTuple):
  """The fields of a class, all macros, or all files.

  Attributes:
    name: of the class, 'macros' or 'gin_configs'.
    doc: a sentence.
    lines: in the order of the class, or by name.
  """

  name: str
  doc: str
  lines: list[Line]


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = _flags().parse_args(argv)
  # Not above: --help must not wait for JAX.
  from glm_jax.recipes import CONFIGURABLES
  from glm_jax.training.search import TuneConfig

  kinds = (*CONFIGURABLES, TuneConfig, *startup.import_modules(flags.imports))
  # As --import takes classes, gin may bind more than dataclasses, which have no fields.
  kinds = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
  sections = [*map(of_class, kinds), macros(kinds), files()]
  for name in flags.names:
    _refuse_unknown(name, sections, kinds)
  # Whoever greps has a field on a line.
  width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
  print('\n\n'.join(_text(s, width) for s in chosen(sections, flags.names)))


def docs(kind: type) -> dict[str, str]:
  """What a dataclass says of its fields: 'Attributes' of its docstring and its bases'.

  Args:
    kind: the class.

  Returns:
    {field: its doc, on one line}; without those of which nothing is said.

  Example:
    >>> class Config:
    ...   '''Rows.
    ...
    ...   Attributes:
    ...     rows: of a batch,
    ...       whatever the mesh.
    ...   '''
    >>> docs(Config)
    {'rows': 'of a batch, whatever the mesh.'}
  """
  said = {}
  for base in reversed(kind.__mro__):
    _, _, attributes = inspect.cleandoc(base.__doc__ or '').partition('\nAttributes')
    lines = re.findall(r'^  (\w+): (.+(?:\n    .+)*)', attributes, re.MULTILINE)
    said |= {name: ' '.join(doc.split()) for name, doc in lines}
  return said


def of_class(kind: type) -> Section:
  """The fields of a dataclass.

  Example:
    >>> from glm_jax.training.optimizer import OptimizerConfig
    >>> print(of_class(OptimizerConfig).lines[1])
    OptimizerConfig.learning_rate  float, positive = 0.0004  its peak, after the warm-up.
  """
  said = docs(kind)
  lines = [
    Line(
      f'{kind.__name__}.{field.name}',
      ', '.join([configs.type_words(hint), *(rule.words for rule in rules)])
      + _default(field),
      said.get(field.name, ''),
    )
    for field, hint, rules in configs.typed_fields(kind)
  ]
  return Section(kind.__name__, inspect.cleandoc(kind.__doc__ or '').split('\n')[0], lines)


def macros(kinds: Sequence[type]) -> Section:
  """The macros of gin_configs/, each with the fields that it sets.

  Args:
    kinds: the dataclasses that have these fields; of a macro that sets several, the first
      says what it is.
  """
  sets = {
    pair
    for name in gin_files.packaged()
    for pair in re.findall(r'^(\w+\.\w+) = %(\w+)$', _read(name), re.MULTILINE)
  }
  fields = [line for kind in kinds for line in of_class(kind).lines]
  lines = []
  for macro in sorted({macro for _, macro in sets}):
    of = [line for line in fields if (line.name, macro) in sets]
    value = of[0].value.partition(' = ')[0].removesuffix(', required')
    names = ', '.join(line.name for line in of)
    lines.append(Line(macro, value, f'sets {names}: {of[0].doc}'))
  return Section('macros', 'such as --gin.TRAIN_STEPS=1000, of the files below.', lines)


def files() -> Section:
  """The gin files that come with the package, each with the first sentence of its head."""
  lines = []
  for name in gin_files.packaged():
    text = ' '.join(_read(name).removeprefix('# ').replace('\n# ', '\n').split())
    sentence = re.match(r'.*?[.?]"?(?= )', text)
    lines.append(Line(name, '', sentence[0] if sentence else ''))
  doc = f'for --gin_file and include, in {gin_files.PACKAGED}.'
  return Section('gin_configs', doc, lines)


def chosen(sections: Sequence[Section], names: Sequence[str]) -> Iterator[Section]:
  """Sections with the lines that any of the names is of; all without names.

  A name is that of a section or of a line, or else a word with which one of the words of
  a line begins.

  Example:
    >>> rate = Line('OptimizerConfig.learning_rate', 'float', 'the peak.')
    >>> sections = [Section('OptimizerConfig', 'AdamW.', [rate])]
    >>> [len([*chosen(sections, [name])]) for name in ('rate', 'peak', 'ate')]
    [1, 1, 0]
  """
  exact = {name for s in sections for name in (s.name, *(line.name for line in s.lines))}
  for section in sections:
    lines = [
      line
      for line in section.lines
      if not names
      or any(
        name in (section.name, line.name)
        if name in exact
        else re.search(rf'(?<![a-z0-9]){re.escape(name)}', str(line), re.IGNORECASE)
        for name in names
      )
    ]
    if lines:
      yield section._replace(lines=lines)


def _refuse_unknown(name: str, sections: Sequence[Section], kinds: Sequence[type]) -> None:
  """Raises UserError for a name that nothing is of, and says which are near."""
  if any(chosen(sections, [name])):
    return
  kind, _, field = name.rpartition('.')
  known = [n for s in sections for n in (s.name, *(line.name for line in s.lines))]
  guesses = [slips.nearest(name, known), slips.fields_like(kind, field, kinds)]
  if kind in known:  # another field of the class, rather than a name that looks alike
    guesses.reverse()
  near = guesses[0] or guesses[1]
  raise configs.UserError(
    'a name must be of a class, a field, a macro or a file, or a word about one, got '
    f'{name!r}; {slips.meant(near, (s.name for s in sections))}'
  )


def _read(name: str) -> str:
  return (gin_files.PACKAGED / name).read_text(encoding='utf-8')


def _default(field: dataclasses.Field[Any]) -> str:
  """As gin writes it, behind an equals sign."""
  if field.default_factory is not dataclasses.MISSING:
    return f' = {field.default_factory()!r}'
  if field.default is dataclasses.MISSING:
    return ', required'
  if dataclasses.is_dataclass(field.default):
    return f' = @{type(field.default).__name__}()'
  return f' = {field.default!r}'


def _text(section: Section, width: int) -> str:
  """A section for a terminal that has so many columns; 0 for none to be broken."""
  lines = [f'{section.name}: {section.doc}', *map(str, section.lines)]
  if width:
    fill = textwrap.TextWrapper(
      width, subsequent_indent='    ', break_long_words=False, break_on_hyphens=False
    ).fill
    lines = [fill(line) for line in lines]
  return '\n'.join(lines)


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'fields',
    'Lists what a gin file or a --gin flag may set, with types, defaults and docs.',
    'python -m glm_jax.fields OptimizerConfig CorpusConfig.packed TRAIN_STEPS dropout',
  )
  flags.add_argument(
    'names',
    nargs='*',
    metavar='NAME',
    help='only a class, a field such as OptimizerConfig.beta2, a macro, gin_configs (the '
    'files), or what a word is about',
  )
  cli.add_import_flag(flags)
  return flags


if __name__ == '__main__':
  cli.main(main)
