"""What the tables of integers and of plans say, on models that take a moment."""

import json

import numpy as np
import pytest
import runs
import small
import stored
from commands import in_process

from benchmarks import decode_plan, quality, rows, stages_plan
from glm_jax import cli

CONFIG = stored.FAMILIES['chatglm2']
KINDS = {
  'float32': ('float32', ()),
  'int8, bfloat16': ('bfloat16', ('--bits=8',)),
  'int4, groups': ('float32', ('--bits=4', '--group=16')),
}


def test_integers_are_measured_beside_the_model_that_they_were_made_of(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(quality, 'KINDS', KINDS)
  monkeypatch.setattr(quality, 'NEW', 4)
  path = stored.checkpoint(tmp_path / 'plain', CONFIG)
  batches, logits = [], []
  for seed in range(2):
    batch = rows.causal(4, 24, CONFIG.vocab_size, seed)
    inputs = (batch.tokens, batch.positions, batch.block_positions, batch.visibility)
    logits.append(np.asarray(small.logits(CONFIG, small.params(CONFIG), *inputs)))
    # Half of the tokens count, and some are what the model takes to be the next.
    batch.loss_weights[:, ::2] = 0
    targets = batch.targets.copy()
    targets[:, 1:7] = logits[-1].argmax(-1)[:, 1:7]
    batches.append(batch._replace(targets=targets))
  measured = quality.measure('tiny', path, batches, rounds=1)
  kinds = json.loads(json.dumps(measured))['kinds']
  targets = np.stack([b.targets for b in batches])[..., 1::2]
  logits = np.stack(logits)[..., 1::2, :]
  scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  loss = -np.take_along_axis(scores, targets[..., None], -1).mean()
  plain = kinds['float32']
  assert plain['loss'] == pytest.approx(loss, rel=1e-5)
  assert plain['perplexity'] == pytest.approx(np.exp(loss), rel=1e-4)
  assert plain['top1'] == (logits.argmax(-1) == targets).mean() >= 0.25
  eight, four = kinds['int8, bfloat16'], kinds['int4, groups']
  off = [abs(r['loss'] - loss) for r in (eight, four)]
  assert 0 < off[0] < off[1]
  assert four['bytes_an_integer'] < eight['bytes_an_integer'] < 4
  assert four['megabytes'] < eight['megabytes'] < plain['megabytes']
  assert all(r['tokens_per_second'] > 0 for r in kinds.values())
  results = {'device': 'here', 'date': '', 'jax': '', 'rows': [measured]}
  first = f'| tiny | float32 | {plain["perplexity"]:.3f} | +0.00% | {plain["top1"]:.2%} |'
  assert quality.table(results)[4].startswith(first)


@pytest.mark.slow
def test_held_out_is_what_the_run_validated_on(tmp_path):
  text = tmp_path / 'text'
  text.mkdir()
  for number in range(40):
    (text / f'{number}.txt').write_text(f'the {number} quick brown foxes. ' * 12)
  done = in_process('train', *runs.arguments(text, tmp_path / 'run'))
  assert done.returncode == 0, done.stderr
  run = quality.trained('run', tmp_path)
  name, batches = quality.held_out(run)
  validated = json.loads((run / 'summary.json').read_text())['validation']
  model = quality.glm_jax.load(run)
  assert quality.told(model, batches)['loss'] == pytest.approx(
    validated[f'loss/{name}'], abs=1e-4
  )


def test_a_plan_of_what_does_not_fit_says_so():
  case = ('v5e', 8, 1024)
  plans = {
    decode_plan.key(*case, 'int4'): {
      'memory': {'peak': 4 * 2**30, 'limit': 16 * 2**30},
      'predicted_seconds': 0.0251,
      'roofline_seconds': 0.00507,
    },
    decode_plan.key(*case, 'bfloat16'): {
      'memory': {'peak': 17 * 2**30, 'limit': 16 * 2**30},
      'predicted_seconds': None,
      'roofline_seconds': 0.02,
    },
  }
  lines = decode_plan.table(plans)
  assert lines[2] == (
    '| v5e, 16.0 | 8 | 1,024 | does not fit: 17.0 GiB |  | 4.0 GiB, 25 ms (5.1) |'
  )


def test_runs_that_were_not_asked_for_keep_their_rows(tmp_path, monkeypatch, capsys):
  measured = {'perplexity': 2.0, 'top1': 0.5, 'megabytes': 1.0, 'bytes_a_weight': 4.0}
  monkeypatch.setattr(quality, 'trained', lambda name, runs: runs / name)
  monkeypatch.setattr(quality, 'held_out', lambda run: ('causal', []))
  monkeypatch.setattr(
    quality,
    'measure',
    lambda name, run, batches, rounds: {
      'model': name,
      'kinds': {'float32': {**measured, 'tokens_per_second': rounds}},
    },
  )
  for only, rounds in (('25m', 7), ('quickstart', 8), ('25m', 9)):
    argv = [f'--only={only}', f'--rounds={rounds}', f'--folder={tmp_path}']
    assert cli.exit_code(quality.main, argv) == 0
  [path] = tmp_path.iterdir()
  found = json.loads(path.read_text())['rows']
  assert [row['model'] for row in found] == ['quickstart', 'chatglm2_25m']
  assert [row['kinds']['float32']['tokens_per_second'] for row in found] == [8, 9]


def test_tables_are_written_without_measuring(tmp_path, monkeypatch):
  written = []
  monkeypatch.setattr(
    quality.readme, 'write_section', lambda name, lines: written.append(name)
  )
  for command in (quality, decode_plan, stages_plan):
    assert cli.exit_code(command.main, ['--table']) == 0
  assert written == ['quality', 'decode plan', 'stages plan']
