"""Fills blanks or continues texts with a trained checkpoint.

Prompts come from a flag, from a file, through a pipe, or from whoever sits at the
terminal. Everything is checked before weights are read, and before anything is written.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_jax import cli, configs, startup
from glm_jax.configs import UserError

_SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')
_BEAM = ('num_beams', 'length_penalty', 'early_stopping', 'no_repeat_ngram_size')
_GENERATION = ('samples', 'gmask', 'max_new_tokens', 'min_new_tokens', 'seed')


def main(argv: Sequence[str]) -> None:
  """The command: check, load, and answer wherever the prompts are."""
  flags = _flags().parse_args(argv)

  # JAX only after the flags are known to be good.
  import jax

  from glm_jax import library, opening, sharding
  from glm_jax.inference import prompt_files
  from glm_jax.inference import prompts as prompt_lib
  from glm_jax.inference.generation import Generation
  from glm_jax.models.cache import DTYPES

  how = {name: getattr(flags, name) for name in (*_SAMPLING, *_BEAM, *_GENERATION)}
  how['stop_strings'] = tuple(flags.stop_strings)
  Generation.of(**how)
  configs.check_value('--batch_size', flags.batch_size, configs.at_least(1))
  if flags.cache_dtype:
    configs.check_value('--cache_dtype', flags.cache_dtype, configs.one_of(*DTYPES))
  configs.check_value('--checkpoint', flags.checkpoint, configs.READABLE)
  output = _output(flags)

  # The prompts: None for whoever sits at the terminal.
  prompts = None
  if flags.input is not None:
    configs.check_value('--input', flags.input, configs.LOCAL)
    prompts = prompt_files.read(Path(flags.input))
  elif flags.prompt is not None:
    prompts = [prompt_files.Prompt(flags.prompt, '--prompt', {})]
  elif not sys.stdin.isatty():
    prompts = prompt_files.parse(sys.stdin.buffer.read(), 'stdin')

  startup.find_devices()
  source = opening.find(flags.checkpoint, flags.adapters)
  for prompt in prompts or ():
    try:
      prompt_lib.encode(source.config, source.vocabulary, prompt.text, flags.gmask)
    except UserError as error:
      # A flag needs no other place.
      if prompt.place == '--prompt':
        raise
      raise UserError(f'{prompt.place}: {error}') from error
  answers = None
  if output is not None:
    answers = prompt_files.Answers(output, _identity(source, prompts, how, flags))

  # One device: a prompt is a row of a batch that one device has room for.
  layout = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1])
  model = library.LanguageModel(
    source,
    layout,
    dtype=flags.dtype,
    batch_size=flags.batch_size,
    cache_dtype=flags.cache_dtype,
  )
  if prompts is None:
    _converse(model, how)
  elif answers is not None:
    _to_file(model, prompts, how, answers, output)
  else:
    texts = [prompt.text for prompt in prompts]
    if flags.input is not None:
      for answer in model.answers(texts, **how):
        line = prompt_files.record(prompts[answer.number].fields, answer)
        print(line, end='', flush=True)
    else:
      for answer in model.generate(texts, **how):
        print(answer.text)


def _output(flags: argparse.Namespace) -> Path | None:
  """The file for answers, if there is to be one."""
  configs.check(
    flags.prompt is None or flags.input is None,
    'prompts must come from one place',
    '--prompt and --input',
    'leave one out',
  )
  if flags.output is None:
    return None
  configs.check(
    flags.input is not None and flags.output.lower().endswith('.jsonl'),
    '--output must end in .jsonl, and is for the prompts of --input',
    repr(flags.output),
    'give both',
  )
  return cli.output_file('--output', flags.output)


def _identity(
  source: Any, prompts: Any, how: dict[str, Any], flags: argparse.Namespace
) -> dict[str, Any]:
  """What answers depend on; not the number of rows that are worked on at a time."""
  fields = json.dumps([prompt.fields for prompt in prompts])
  return {
    'checkpoint': source.fingerprint(),
    'prompts': hashlib.sha256(fields.encode()).hexdigest()[:16],
    **how,
    'stop_strings': list(how['stop_strings']),
    'dtype': flags.dtype,
    'cache_dtype': flags.cache_dtype,
  }


def _to_file(
  model: Any, prompts: Any, how: dict[str, Any], answers: Any, output: Path
) -> None:
  """Writes the answers that are not there yet."""
  from tqdm import tqdm

  from glm_jax.inference import prompt_files

  texts = [prompt.text for prompt in prompts]
  total, before = len(texts) * how['samples'], len(answers.done)
  # Asked first: what it refuses is refused before anything is written.
  made = model.answers(texts, skip=answers.done, **how)
  with answers:
    for answer in tqdm(
      made, 'answers', total, leave=False, disable=None, initial=before, unit=''
    ):
      answers.add(prompt_files.record(prompts[answer.number].fields, answer))
    answers.finish()
  there = f' ({before} were there)' if before else ''
  print(f'{total} answers to {len(texts)} prompts{there}: {output}')


def _converse(model: Any, how: dict[str, Any]) -> None:
  """Answers prompts as they are typed, until there are no more."""
  with contextlib.suppress(ImportError):
    import readline  # noqa: F401 - arrow keys and history in input()
  print('a prompt a line; Ctrl-D ends')
  while True:
    try:
      prompt = input('> ')
    except EOFError:
      print()
      return
    if not prompt.strip():
      continue
    try:
      for answer in model.generate([prompt], **how):
        print(answer.text)
    except UserError as error:
      print(f'error: {configs.one_line(error)}', file=sys.stderr)


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'generate',
    'Fills the blanks of texts, or continues them, with a checkpoint. Without --prompt and '
    '--input,\nprompts are read from the terminal or from a pipe, one a line.',
    "python -m glm_jax.generate --checkpoint=runs/quickstart --prompt='Return the [MASK] "
    "of a list.'\n"
    '  python -m glm_jax.generate --checkpoint=runs/quickstart --input=prompts.txt '
    '--output=answers.jsonl',
  )
  cli.add_checkpoint_flags(flags)
  flags.add_argument(
    '--prompt',
    metavar='TEXT',
    help='text with [MASK] (a few words), [sMASK] (a sentence) or [gMASK] (the rest)',
  )
  flags.add_argument(
    '--input',
    metavar='FILE',
    help='a .txt with a prompt a line, or a .jsonl with {"prompt": TEXT}, whose other '
    'fields are kept',
  )
  flags.add_argument(
    '--output',
    metavar='FILE',
    help='a .jsonl for the answers to --input; the same command again goes on with it '
    '(by default they are printed)',
  )
  flags.add_argument('--gmask', action='store_true', help='continue the text instead')
  flags.add_argument('--samples', type=int, default=1, help='answers a prompt (1)')
  flags.add_argument('--max_new_tokens', type=int, default=64, help='longest span (64)')
  flags.add_argument(
    '--min_new_tokens', type=int, default=0, help='tokens before a span may end (0)'
  )
  cli.add_sampling_flags(flags)
  flags.add_argument(
    '--num_beams', type=int, default=1, help='texts that beam search keeps; 1: none (1)'
  )
  flags.add_argument(
    '--length_penalty',
    type=float,
    default=1.0,
    help='of beam search: more is longer, 0 compares plain log-probabilities (1)',
  )
  flags.add_argument(
    '--early_stopping',
    action='store_true',
    help='beam search ends with as many texts as it keeps',
  )
  flags.add_argument(
    '--no_repeat_ngram_size',
    type=int,
    default=0,
    help='n-grams of this size stand in a span once; 0: no such rule (0)',
  )
  flags.add_argument(
    '--stop_strings',
    action='append',
    default=[],
    metavar='TEXT',
    help='a text that ends a span, and is left out of it; may be repeated',
  )
  flags.add_argument(
    '--batch_size', type=int, default=8, help='prompts that are worked on at a time (8)'
  )
  flags.add_argument(
    '--cache_dtype',
    default='',
    help='of keys and values: float32, bfloat16 or int8 (as --dtype)',
  )
  return flags


if __name__ == '__main__':
  startup.keep_memory()
  cli.main(main)
