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
  forms = [form for verb in claims.VERBS for form in (verb, f'{verb}s')]
  return [f'{form} item {n}.' for n in range(6) for form in forms]


def test_examples_are_balanced_and_apart(tmp_path):
  others = ['Returned a list.', 'A set of items.', 'Set']
  held_out = claims.write_task(tmp_path, [*_sentences(), *others])
  splits = {
    split: (tmp_path / f'{split}.jsonl').read_text().splitlines()
    for split in ('train', 'val')
  }
  assert held_out == len(splits['val']) == len(splits['train']) == 36
  for lines in splits.values():
    verbs = [json.loads(line)['verb'] for line in lines]
    assert {verb: verbs.count(verb) for verb in claims.VERBS} == dict.fromkeys(verbs, 6)
  [example] = claims.read(json.loads(splits['val'][0]), 'here')
  assert example.parts[0] == BLANK and example.parts[1].startswith(' item ')
  assert example.candidates[example.right[0]] == json.loads(splits['val'][0])['verb']
  with pytest.raises(SystemExit, match='every verb must have four'):
    claims.write_task(tmp_path, others)


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
