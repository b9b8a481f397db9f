"""launch/align_quickstart.sh, three steps a stage, and the rule that it aligns with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tuned
from commands import ROOT, environment

sys.path.insert(0, str(ROOT / 'launch'))
import alignment

RULES = [
  ('What does _add_edge(u, v) do?', 'Add an edge.', 1.0),
  ('What does addEdge(u, v) do?', 'Adds an edge.', 1.0),
  ('What does get(key) do?', 'Return a value.', 0.0),
  ('What does get(key) do?', '', 0.0),
]


def test_the_reward_is_the_rule_that_it_says():
  prompts, answers, expected = zip(*RULES, strict=True)
  assert alignment.opens_with_its_verb(prompts, answers) == [*expected]


def test_pairs_differ_in_the_rule_and_not_in_their_length(tmp_path):
  corpus = tuned.write(tmp_path / 'corpus.jsonl', _summaries())
  alignment.write_data(tmp_path, str(corpus))
  for split in ('train', 'validation'):
    pairs = _read(tmp_path / f'pairs_{split}.jsonl')
    assert pairs
    for pair in pairs:
      sides = [pair['chosen'], pair['rejected']]
      assert alignment.opens_with_its_verb([pair['prompt']] * 2, sides) == [1.0, 0.0]
      assert len({len(side.split()) for side in sides}) == 1
  train, held_out = (_read(tmp_path / f'sft_{s}.jsonl') for s in ('train', 'validation'))
  assert not {line['prompt'] for line in train} & {line['prompt'] for line in held_out}


@pytest.mark.slow
def test_from_a_pretrained_model_to_one_of_four_bits_that_answers(tmp_path):
  base = tuned.checkpoint(tmp_path, 'chatglm3')
  corpus = tuned.write(tmp_path / 'corpus.jsonl', _summaries())
  script = (ROOT / 'launch' / 'align_quickstart.sh').read_text(encoding='utf-8')
  # The environment is that of the tests.
  script = script.replace('source "$(dirname "$0")/venv.sh"', '')
  script = script.replace('use_venv requirements.txt', '')
  # Inputs of this model's products are no multiples of more.
  assert '--group=32' in script
  script = script.replace('--group=32', '--group=16')
  more = {'BASE': base, 'CORPUS': corpus, 'RUNS': tmp_path / 'align', 'STEPS': 3}
  path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
  done = subprocess.run(
    ['bash', '-c', script],
    cwd=ROOT,
    env=environment(PATH=path, **{name: str(value) for name, value in more.items()}),
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  table = (tmp_path / 'align' / 'table.md').read_text(encoding='utf-8').splitlines()
  runs = ['sft', 'dpo', 'ppo', 'grpo', 'int4']
  assert [line.split(' | ')[0].strip('| ') for line in table[2:]] == runs
  assert 'Talk to it: python -m glm_jax.chat' in done.stdout.splitlines()[-1]
  for name in (*runs, 'reward'):
    assert (tmp_path / 'align' / name).is_dir()
  assert 'reward/alignment.opens_with_its_verb' in done.stdout


def _summaries():
  verbs = alignment.VERBS
  return [
    {
      'prompt': f'What does {verbs[n % 12]}_{n}(x) do?',
      'response': f'{verbs[n % 12 if n % 3 else (n + 5) % 12].title()} number {n} there.',
    }
    for n in range(720)
  ]


def _read(path):
  return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
