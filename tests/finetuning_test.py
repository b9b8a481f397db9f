"""Fine-tuning through the commands."""

import json

import pytest
import tuned


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tuned')
  for family in ('chatglm3', 'chatglm', 'glm'):
    tuned.checkpoint(folder, family)
  tuned.write(folder / 'lines.jsonl', tuned.lines(120))
  return folder


def test_a_checkpoint_is_tuned_on_conversations_and_answers(place):
  answers = ('AnswerConfig.examples=6', 'AnswerConfig.max_new_tokens=8')
  done = tuned.run('train', place, *answers)
  assert done.returncode == 0, done.stderr
  assert 'validation loss  answer ' in done.stdout and 'rougeL' in done.stdout
  lines = (place / 'run' / 'predictions.jsonl').read_text(encoding='utf-8').splitlines()
  assert len(lines) == 6
  for line in map(json.loads, lines):
    assert line['prompt'].endswith('?<|assistant|>')
    assert line['reference'].endswith(' is quick.')
