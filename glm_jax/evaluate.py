"""Judges a model: perplexity, last words, blanks, multiple choice, answers, cloze tasks.

Every example is asked once, and its record written as soon as it is there: the same command
again goes on where it was stopped. The table is made from the records alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_jax import cli, configs, startup


def main(argv: Sequence[str]) -> None:
  """The command: check, read the examples, load, judge, and print the table."""
  flags = _flags().parse_args(argv)
  startup.use_cpu_devices(flags.cpu_devices)

  # JAX only after the flags are known to be good.
  from glm_jax import evaluation, library, opening, sharding
  from glm_jax.evaluation import running
  from glm_jax.evaluation.task import Asker, Options
  from glm_jax.inference import prompt_files

  startup.import_modules(flags.imports)
  tasks = evaluation.tasks()
  configs.check_value('--task', flags.task, configs.one_of(*tasks))
  task = tasks[flags.task]
  flags.mask_ratios = _ratios(flags.mask_ratios)
  names = [field.name for field in dataclasses.fields(Options)]
  options = Options(**{name: getattr(flags, name) for name in names})
  configs.check_value('--batch_size', flags.batch_size, configs.at_least(1))
  configs.check_value('--checkpoint', flags.checkpoint, configs.READABLE)
  configs.check_value('--input', flags.input, configs.LOCAL)
  output = _output(flags)

  startup.find_devices()
  source = opening.find(flags.checkpoint, flags.adapters)
  asker = Asker(source.config, source.vocabulary, options.length)
  items = [*task.items(_source(flags, task), asker, options)]
  items = items[: options.limit or None]
  configs.check(bool(items), f'{flags.input} must hold an example', 'none', 'give another')
  identity = _identity(source, items, flags, options)
  answers = None if output is None else prompt_files.Answers(output, identity)

  mesh = sharding.MeshConfig(fsdp=flags.fsdp, tensor=flags.tensor)
  model = library.LanguageModel(
    source, sharding.make_mesh(mesh), dtype=flags.dtype, batch_size=flags.batch_size
  )
  done = set() if answers is None else {number for number, _ in answers.done}
  made = running.judged(
    model, task, items, done, size=flags.batch_size, most=options.max_new_tokens
  )
  records = _kept(made, answers, output, len(items), len(done))
  table = task.table(records)
  print(running.in_words(table))
  cut = f'{asker.cut} of {len(items)} rows were longer than {asker.length} tokens'
  if asker.cut:
    print(f'{cut}: what is farthest from the blank was left out')
  if output is not None:
    content = {'table': table, 'cut': asker.cut, **identity}
    path = output.with_suffix('.json')
    text = json.dumps(content, ensure_ascii=False, indent=2) + '\n'
    path.write_text(text, encoding='utf-8')
    print(f'{output}, {path}')


def _source(flags: argparse.Namespace, task: Any) -> Any:
  """A path, or what reads a data set of TFDS."""
  if not flags.input.startswith('tfds:'):
    return Path(flags.input)
  from glm_jax.data.corpora import super_glue
  from glm_jax.data.corpora.config import CorpusConfig
  from glm_jax.evaluation import PatternTask

  configs.check(
    isinstance(task, PatternTask),
    '--input=tfds:NAME must be asked as a cloze',
    f'--task={task.name}',
    'give a file or a folder, or a --task such as boolq',
  )
  corpus = CorpusConfig(corpus=flags.input, tfds_data_dir=flags.tfds_data_dir)
  return super_glue.lines(corpus)


def _kept(
  made: Any, answers: Any, output: Path | None, total: int, before: int
) -> list[dict[str, Any]]:
  """All records in their order, after those that are made have been written."""
  from tqdm import tqdm

  bar = tqdm(made, 'examples', total, leave=False, disable=None, initial=before, unit='')
  if answers is None:
    return sorted(bar, key=lambda record: record['number'])
  with answers:
    for record in bar:
      answers.add(json.dumps(record, ensure_ascii=False) + '\n')
    answers.finish()
  return [json.loads(line) for line in output.read_bytes().splitlines()]


def _ratios(text: str) -> tuple[float, ...]:
  try:
    return tuple(float(part) for part in text.split(','))
  except ValueError as error:
    raise configs.UserError(
      f'--mask_ratios must be numbers, got {text!r}; give such as 0.1,0.5.'
    ) from error


def _output(flags: argparse.Namespace) -> Path | None:
  if flags.output is None:
    return None
  configs.check(
    flags.output.lower().endswith('.jsonl'),
    '--output must end in .jsonl',
    repr(flags.output),
    'name it so; the table stands beside it, in a .json',
  )
  return cli.output_file('--output', flags.output)


def _identity(source: Any, items: Any, flags: Any, options: Any) -> dict[str, Any]:
  """What the records depend on; not how many are worked on at a time, nor where."""
  digest = hashlib.sha256()
  for item in items:
    asked = item.prompt if item.question is None else item.question
    digest.update(f'{json.dumps(item.fields)} {asked}'.encode())
  return {
    'checkpoint': source.fingerprint(),
    'model': flags.checkpoint,
    'adapters': flags.adapters,
    'task': flags.task,
    'input': flags.input,
    'examples': len(items),
    'asked': digest.hexdigest()[:16],
    'dtype': flags.dtype,
    **dataclasses.asdict(options),
    'mask_ratios': [*options.mask_ratios],
  }


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'evaluate',
    'Judges a model by what it says of texts, questions and blanks.',
    'python -m glm_jax.evaluate --checkpoint=runs/quickstart --task=perplexity '
    '--input=held_out.txt\n'
    '  python -m glm_jax.evaluate --checkpoint=runs/chatglm3 --task=ceval --shots=5 '
    '--input=ceval/ --output=ceval.jsonl',
  )
  cli.add_checkpoint_flags(flags)
  flags.add_argument(
    '--task',
    required=True,
    metavar='NAME',
    help='perplexity, lambada and blanks: a .txt or a .jsonl with {"text"}; mmlu, ceval '
    'and cmmlu: a folder of csv files; answers: a .jsonl with {"prompt", "answer"}; or a '
    'cloze, such as boolq, or cmrc: the folder of the benchmark, or tfds:super_glue/boolq',
  )
  flags.add_argument('--input', required=True, metavar='PATH', help='what --task reads')
  flags.add_argument(
    '--tfds_data_dir',
    default='',
    metavar='DIR',
    help="where data sets of TFDS are (TFDS's own default)",
  )
  flags.add_argument(
    '--output',
    metavar='FILE',
    help='a .jsonl for what was said to each example, beside which a .json has the table; '
    'the same command again goes on with it',
  )
  flags.add_argument(
    '--limit', type=int, default=0, metavar='N', help='the first N examples alone (0: all)'
  )
  flags.add_argument(
    '--length',
    type=int,
    default=0,
    metavar='N',
    help='longest row in tokens; of a longer text, what is farthest from the blank is left '
    'out, and counted (0: as many as the model has positions)',
  )
  flags.add_argument(
    '--stride',
    type=int,
    default=0,
    metavar='N',
    help='of perplexity: tokens that each window is scored on; what else it holds precedes '
    'them (0: half a row)',
  )
  flags.add_argument(
    '--unidirectional',
    action='store_true',
    help='of perplexity and lambada: a model that fills blanks goes on from the beginning',
  )
  flags.add_argument(
    '--mask', default='', help="[MASK], [sMASK] or [gMASK] (the task's own)"
  )
  flags.add_argument(
    '--mask_ratios',
    default='0.1,0.2,0.3,0.4,0.5',
    metavar='R,R',
    help='of blanks: shares of the words (0.1,0.2,0.3,0.4,0.5)',
  )
  flags.add_argument(
    '--shots',
    type=int,
    default=0,
    metavar='N',
    help='of multiple choice: examples with answers before each question (0)',
  )
  flags.add_argument(
    '--split', default='', help='of a folder (the one that is usually reported)'
  )
  flags.add_argument(
    '--answers',
    default='',
    metavar='FILE',
    help='of answers: a file of them, if they do not stand beside the prompts',
  )
  flags.add_argument(
    '--template',
    default='',
    metavar='NAME',
    help="of answers: the chat template that prompts are asked in, 'own' for the model's; "
    'without it they are asked as they stand',
  )
  flags.add_argument(
    '--blank',
    default='{prompt}[gMASK]',
    metavar='PATTERN',
    help='of answers: how a model that fills blanks is asked ({prompt}[gMASK])',
  )
  flags.add_argument(
    '--max_new_tokens', type=int, default=64, help='longest generated answer (64)'
  )
  flags.add_argument('--seed', type=int, default=0, help='of what is blanked (0)')
  cli.add_dtype_flag(flags)
  flags.add_argument(
    '--batch_size', type=int, default=8, help='examples that are worked on at a time (8)'
  )
  flags.add_argument(
    '--fsdp', type=int, default=1, help='devices that weights are spread over (1)'
  )
  flags.add_argument(
    '--tensor', type=int, default=1, help='devices that heads are spread over (1)'
  )
  cli.add_cpu_devices_flag(flags)
  cli.add_import_flag(flags)
  return flags


if __name__ == '__main__':
  startup.keep_memory()
  cli.main(main)
