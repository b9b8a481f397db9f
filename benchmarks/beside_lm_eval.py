"""Are our numbers those of lm-eval? One checkpoint here, and its export there.

python -m benchmarks.beside_lm_eval --checkpoint=runs/chatglm2_tiny [--examples=200]

asks last words of sentences of the documentation, and multiple choice among them, of a
causal checkpoint by `python -m glm_jax.evaluate`; exports it by `convert --to=glm`, and has
lm-eval ask the same by its own code, transformers and PyTorch, in a process of its own. It
ends with an error if a prediction differs, or a log-probability by more than 1e-3.
Needs the extra lm_eval. A minute on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from glm_jax import cli, convert, evaluate
from glm_jax.data.corpora import parts
from glm_jax.data.corpora.config import CorpusConfig

LETTERS = 'ABCD'
OPENING = 'The following are multiple choice questions (with answers) about words.\n\n'
# PyTorch and TensorFlow do not bear each other in one process.
THEIRS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
folder = sys.argv[1]
made = lm_eval.simple_evaluate(
  model='hf',
  model_args={'pretrained': f'{folder}/export', 'dtype': 'float32'},
  tasks=['last_words', 'letters'],
  task_manager=TaskManager(include_path=folder, include_defaults=False),
  device='cpu',
  batch_size=8,
  bootstrap_iters=0,
)
# Of each example, (log-probability, whether it is greedy) of each text that was asked for.
said = {
  name: [s['filtered_resps'] for s in sorted(samples, key=lambda s: s['doc_id'])]
  for name, samples in made['samples'].items()
}
with open(f'{folder}/theirs.json', 'w') as file:
  json.dump({'said': said, 'results': made['results']}, file, default=str)
"""
TASK = {
  'dataset_path': 'json',
  'test_split': 'test',
  'metadata': {'version': 1},
}


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  flags.add_argument('--checkpoint', required=True)
  flags.add_argument('--examples', type=int, default=200)
  options = flags.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    sentences = _sentences(options.examples)
    _write_words(folder, sentences)
    _write_letters(folder, sentences)
    _run(convert, options.checkpoint, f'{folder}/export', '--to=glm')
    tables = {}
    for ours, path in (('lambada', 'words.jsonl'), ('mmlu', 'mmlu')):
      _run(
        evaluate,
        f'--checkpoint={options.checkpoint}',
        f'--task={ours}',
        f'--input={folder / path}',
        f'--output={folder}/{ours}.jsonl',
      )
      tables[ours] = json.loads((folder / f'{ours}.json').read_text())['table'][-1]
    subprocess.run([sys.executable, '-c', THEIRS, name], check=True)
    _compare(folder, tables)


def _run(command: Any, *arguments: str) -> None:
  code = cli.exit_code(command.main, [*arguments])
  if code:
    raise SystemExit(code)


def _sentences(count: int) -> list[str]:
  """Sentences of the documentation, of 6 to 20 words, by lot."""
  config = CorpusConfig()
  found = dict.fromkeys(
    ' '.join(sentence.split())
    for part in parts.find(config, parts.PART_BYTES)
    for split, document in parts.read(config, part)
    if split == 'validation'
    for sentence in document.text.split('. ')
    if 6 <= len(sentence.split()) <= 20 and sentence.isascii()
  )
  return random.Random(0).sample([*found], count)


def _write_words(folder: Path, sentences: list[str]) -> None:
  lines = [json.dumps({'text': sentence}) + '\n' for sentence in sentences]
  (folder / 'words.jsonl').write_text(''.join(lines))
  task = {
    **TASK,
    'task': 'last_words',
    'dataset_kwargs': {'data_files': {'test': f'{folder}/words.jsonl'}},
    'output_type': 'loglikelihood',
    'doc_to_text': "{{text.split(' ')[:-1] | join(' ')}}",
    'doc_to_target': " {{text.split(' ')[-1]}}",
    'metric_list': [{'metric': name} for name in ('perplexity', 'acc')],
  }
  # JSON is YAML.
  (folder / 'last_words.yaml').write_text(json.dumps(task))


def _write_letters(folder: Path, sentences: list[str]) -> None:
  """Which of four words ends a sentence, as csv and as lm-eval's lines."""
  rng = random.Random(1)
  words = [sentence.split()[-1] for sentence in sentences]
  rows, lines = [], []
  for sentence in sentences:
    before, _, last = sentence.rpartition(' ')
    choices = [last, *rng.sample([word for word in words if word != last], 3)]
    rng.shuffle(choices)
    answer = choices.index(last)
    rows.append([before, *choices, LETTERS[answer]])
    listed = ''.join(f'\n{k}. {v}' for k, v in zip(LETTERS, choices, strict=True))
    prompt = f'{OPENING}{before}{listed}\nAnswer:'
    lines.append(json.dumps({'prompt': prompt, 'answer': answer}) + '\n')
  path = folder / 'mmlu' / 'test' / 'words_test.csv'
  path.parent.mkdir(parents=True)
  with path.open('w', newline='', encoding='utf-8') as file:
    csv.writer(file).writerows(rows)
  (folder / 'letters.jsonl').write_text(''.join(lines))
  task = {
    **TASK,
    'task': 'letters',
    'dataset_kwargs': {'data_files': {'test': f'{folder}/letters.jsonl'}},
    'output_type': 'multiple_choice',
    'target_delimiter': ' ',
    'doc_to_text': '{{prompt}}',
    'doc_to_target': 'answer',
    'doc_to_choice': [*LETTERS],
    'metric_list': [{'metric': 'acc'}],
  }
  (folder / 'letters.yaml').write_text(json.dumps(task))


def _compare(folder: Path, tables: dict[str, Any]) -> None:
  theirs = json.loads((folder / 'theirs.json').read_text())
  read = lambda name: [
    json.loads(line) for line in (folder / f'{name}.jsonl').read_text().splitlines()
  ]
  words, letters = read('lambada'), read('mmlu')
  of = lambda name, metric: theirs['results'][name][f'{metric},none']
  rows = [
    ('last words, accuracy', tables['lambada']['accuracy'], 100 * of('last_words', 'acc')),
    (
      'last words, perplexity',
      tables['lambada']['perplexity'],
      of('last_words', 'perplexity'),
    ),
    ('letters, accuracy', tables['mmlu']['accuracy'], 100 * of('letters', 'acc')),
  ]
  print(f'{"":<24}{"glm_jax":>12}{"lm-eval":>12}')
  for name, ours, other in rows:
    print(f'{name:<24}{ours:>12.4f}{other:>12.4f}')
  pairs, same = [], []
  for ours, [(log_prob, greedy)] in zip(words, theirs['said']['last_words'], strict=True):
    pairs.append((ours['log_prob'], log_prob))
    same.append(ours['right'] == greedy)
  for ours, others in zip(letters, theirs['said']['letters'], strict=True):
    log_probs = [log_prob for log_prob, _ in others]
    pairs += zip(ours['log_probs'], log_probs, strict=True)
    same.append(LETTERS.index(ours['said']) == log_probs.index(max(log_probs)))
  apart = max(abs(ours - other) for ours, other in pairs)
  print(f'log-probabilities differ by at most {apart:.1e} nats')
  if apart > 1e-3 or not all(same):
    raise SystemExit(f'{apart:.1e} nats, {same.count(False)} predictions are not the same')


if __name__ == '__main__':
  main()
