"""Talks with a checkpoint in a terminal, or through a pipe: a message a line.

The phases, in order: model, template, conversation. A causal model reads only what is new.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glm_jax import cli, configs, startup

_HELP = """/reset          begin anew
/system TEXT    begin anew, and tell the model this first
/save FILE      write the conversation as JSON
/quit           leave (or Ctrl-D); Ctrl-C stops an answer"""


def talk(chat: Any, lines: Iterator[str], *, terminal: bool) -> None:
  """Answers messages until there are no more.

  Args:
    chat: an `inference.chatting.Chat`.
    lines: what is said, commands among it.
    terminal: whether somebody reads along.

  Raises:
    UserError: through a pipe, whatever is refused; in a terminal it is said, and the
      conversation goes on.
  """
  for line in lines:
    try:
      if line.startswith('/'):
        if line.strip() == '/quit':
          return
        _command(chat, line.strip())
      elif line.strip():
        _answer(chat, line)
    except configs.UserError as error:
      if not terminal:
        raise
      print(f'error: {error}', file=sys.stderr)


def _answer(chat: Any, line: str) -> None:
  began, left_out = time.perf_counter(), chat.left_out
  # A generator: closed, it keeps what was said.
  with contextlib.closing(chat.say(line)) as answer:
    try:
      for piece in answer:
        print(piece, end='', flush=True)
    except KeyboardInterrupt:
      print(' …', end='')
  print(flush=True)
  speed = chat.written / (time.perf_counter() - began)
  said = f'{chat.read} tokens read, {chat.written} written, {speed:.1f} tokens/s'
  gone = chat.left_out - left_out
  more = f'; {gone} messages left out, which do not fit the window' if gone else ''
  _note(said + more)
  if chat.wants == 'observation':
    _note(f'it calls {chat.messages[-1].metadata!r}; the next line is what that gives back')


def _note(text: str) -> None:
  """Tells a person what was done; answers alone are on stdout."""
  print(f'[{text}]', file=sys.stderr, flush=True)


def _command(chat: Any, line: str) -> None:
  name, _, rest = line.partition(' ')
  rest = rest.strip()
  if name == '/reset':
    chat.reset()
    _note('begun anew')
  elif name == '/system':
    chat.reset(rest)
    _note(f'begun anew, the model is told first: {rest!r}')
  elif name == '/save':
    configs.check(bool(rest), '/save must be given a file', "''", 'name one')
    try:
      chat.save(Path(rest).expanduser())
      _note(f'{len(chat.messages)} messages in {rest}')
    except OSError as error:
      raise configs.UserError(
        f'/save must be given a file that can be written, got {rest} '
        f'({error.strerror}); name another one.'
      ) from error
  else:
    configs.check(name == '/help', 'a command must be known', name, f'these are:\n{_HELP}')
    print(_HELP)


def _typed(chat: Any) -> Iterator[str]:
  """Lines from a terminal, each asked for by the role that is to speak."""
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401 - arrow keys and history in input()
  while True:
    try:
      yield input(f'{chat.wants}> ')
    except KeyboardInterrupt:
      print()
    except EOFError:
      print()
      return


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = _flags().parse_args(argv)

  # JAX only after the flags are known to be good.
  import jax

  from glm_jax import opening, sharding
  from glm_jax.inference.chatting import Chat
  from glm_jax.inference.filling import Filler
  from glm_jax.inference.sampling import Sampling
  from glm_jax.inference.session import Session
  from glm_jax.models import ComputeConfig
  from glm_jax.text import chat as templates

  fields = (field.name for field in dataclasses.fields(Sampling))
  sampling = Sampling(**{name: getattr(flags, name) for name in fields})
  configs.check_value('--seed', flags.seed, configs.SEED)
  for name in ('max_new_tokens', 'window'):
    if getattr(flags, name) is not None:
      configs.check_value(f'--{name}', getattr(flags, name), configs.POSITIVE)
  startup.find_devices()
  source = opening.find(flags.checkpoint, flags.adapters)
  family = flags.template or templates.family_of(source.config)
  template = templates.template_for(source.vocabulary, family)
  # One device: a conversation is a row of its own.
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1])
  with sharding.active(mesh):
    compute = ComputeConfig(dtype=flags.dtype)
    weights = source.read(mesh)
    filler = Filler(source.config, weights, source.vocabulary, compute, rows=1)
    chat = Chat(
      Session(filler.engine, flags.window),
      template,
      max_new_tokens=flags.max_new_tokens,
      sampling=sampling,
      seed=flags.seed,
      system=flags.system,
    )
    terminal = sys.stdin.isatty()
    if terminal:
      print(f'{template.family}; /help for commands')
    lines = _typed(chat) if terminal else (line.rstrip('\n') for line in sys.stdin)
    talk(chat, lines, terminal=terminal)


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'chat',
    'Talks with a checkpoint of ChatGLM-6B, ChatGLM2, ChatGLM3 or GLM-4, or one tuned so.',
    'python -m glm_jax.chat --checkpoint=runs/chatglm3 --temperature=0.8',
  )
  cli.add_checkpoint_flags(flags)
  flags.add_argument(
    '--template',
    default='',
    metavar='FAMILY',
    help="chatglm, chatglm2, chatglm3, glm4 or glm4-0414; by default the model's",
  )
  flags.add_argument('--system', default='', metavar='TEXT', help='what it is told first')
  flags.add_argument(
    '--max_new_tokens',
    type=int,
    metavar='N',
    help='longest answer (512, or half of a smaller window)',
  )
  flags.add_argument(
    '--window', type=int, default=8192, metavar='N', help='most tokens of history (8192)'
  )
  cli.add_sampling_flags(flags)
  return flags


if __name__ == '__main__':
  startup.keep_memory()
  cli.main(main)
