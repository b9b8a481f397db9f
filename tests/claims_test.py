"""The method's claims, on a model and a task that take a moment."""

import json

import pytest

from benchmarks import claims
from glm_jax import cli
from glm_jax.evaluation.patterns import BLANK, PATTERNS

TINY = (
  'TrainConfig.model=@ChatGLMConfig()',
  'ChatGLMConfig.num_layers=1',
  'ChatGLMConfig.hidden_size=16',
  'ChatGLMConfig.num_heads=2',
  'ChatGLMConfig.mlp_size=32',
  'ChatGLMConfig.vocab_size=384',
  'ChatGLMConfig.max_positions=64',
  'ChatGLMConfig.deepnorm_layers=1',
  "VocabularyConfig.path='bytes'",
)
ARMS = (('masked 15%', 'cloze'), (claims.FRESH, 'classifier'))


def _sentences():
  return [f'Item {n} {word} 2 others.' for n in range(12) for word in claims.WORDS]


def test_examples_are_balanced_and_apart(tmp_path):
  # The first word and the last one are never missing.
  others = ['Of a list.', 'the', 'A set that it belongs to']
  held_out = claims.write_task(tmp_path, [*_sentences(), *others])
  splits = {
    split: (tmp_path / f'{split}.jsonl').read_text().splitlines()
    for split in ('train', 'val')
  }
  assert held_out == len(splits['val']) == len(splits['train']) == 36
  for lines in splits.values():
    words = [json.loads(line)['word'] for line in lines]
    assert {word: words.count(word) for word in claims.WORDS} == dict.fromkeys(words, 6)
  line = json.loads(splits['val'][0])
  [example] = claims.read(line, 'here')
  before, blank, behind = example.parts
  assert before.startswith('Item ') and blank == BLANK and behind == ' 2 others.'
  assert example.candidates[example.right[0]] == f' {line["word"]}'
  with pytest.raises(SystemExit, match='every word must have four'):
    claims.write_task(tmp_path, others)


def test_what_is_read_of_a_long_sentence(tmp_path):
  long = [
    f'{n} a b c d e f g {word} 1 2 3 4 5 6 7 8 9' for n in range(4) for word in claims.WORDS
  ]
  claims.write_task(tmp_path, long)
  line = json.loads((tmp_path / 'val.jsonl').read_text().splitlines()[0])
  assert line == {'before': 'b c d e f g', 'behind': '1 2 3 4 5 6 7 8', 'word': 'and'}


@pytest.mark.slow
def test_a_stopped_command_goes_on_with_the_same_table(tmp_path, monkeypatch, capsys):
  text = tmp_path / 'text'
  text.mkdir()
  for number in range(20):
    (text / f'{number}.txt').write_text(f'Return the {number} quick foxes. ' * 12)
  pretraining = (
    *claims.PRETRAINING,
    *TINY,
    f"CorpusConfig.corpus='{text}/*.txt'",
    'BATCH_SIZE=8',
    'EvaluationConfig.examples=8',
  )
  finetuning = (*claims.FINETUNING, 'BATCH_SIZE=8', 'EvaluationConfig.examples=8')
  for name, value in {
    'PRETRAINING': (*pretraining, 'EvaluationConfig.fill=0'),
    'FINETUNING': (*finetuning, 'OptimizerConfig.warmup_steps=1'),
    'ARMS': ARMS,
    'RATES': ('1e-2',),
    'sentences': _sentences,
  }.items():
    monkeypatch.setattr(claims, name, value)
  monkeypatch.setitem(PATTERNS, claims.BENCHMARK, None)  # forgotten afterwards
  argv = ['--seeds=1', '--steps=2', '--finetuning_steps=2']
  argv += [f'--runs={tmp_path}/runs', f'--folder={tmp_path}/results']
  assert cli.exit_code(claims.main, argv) == 0, capsys.readouterr().err
  [path] = (tmp_path / 'results').iterdir()
  results = json.loads(path.read_text())
  rows = results['rows']
  assert [(row['pretraining'], row['head']) for row in rows] == [*ARMS]
  assert all({*by} == {'0'} for row in rows for by in row['rates'].values())
  # A run that was killed before its summary is gone on with; the others are only read.
  removed = tmp_path / 'runs' / 'masked_15-cloze-1e-2-0' / 'summary.json'
  before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'runs').rglob('summary.json')}
  removed.unlink()
  assert cli.exit_code(claims.main, argv) == 0
  assert json.loads(path.read_text()) == results
  after = {p: p.stat().st_mtime_ns for p in (tmp_path / 'runs').rglob('summary.json')}
  assert {p for p in before if after[p] != before[p]} == {removed}
  with pytest.raises(SystemExit, match='has 2 steps and not 3'):
    claims.main([*argv, '--finetuning_steps=3'])
  lines = claims.table(results)
  mean, spread, rate = claims.best(rows[0])
  assert lines[4].startswith(f'| masked 15% | cloze | {mean:.1f}% | {spread:.1f} | +0.0 |')
  assert rate in lines[4] and '36 others' in lines[-1]
