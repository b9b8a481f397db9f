"""The commands that measure, on sizes that take a moment."""

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import ROOT, environment

from benchmarks import rows, step, train_on_card
from glm_jax import checkpoints, cli
from glm_jax.batch import OBJECTIVES
from glm_jax.models import GLMConfig
from glm_jax.models import config as model_config
from glm_jax.training.optimizer import OptimizerConfig

TINY = GLMConfig(
  num_layers=1,
  hidden_size=32,
  num_heads=2,
  vocab_size=64,
  max_positions=64,
  embedding_dropout=0.0,
  attention_dropout=0.0,
  output_dropout=0.0,
)


@pytest.mark.parametrize('documents', [1, 3])
def test_rows_have_glms_layout(documents):
  batch = rows.prefix(2, 64, 50, documents=documents)
  t = np.arange(64)
  part_b = batch.block_positions > 0
  assert (np.diff(batch.key_start, axis=1) >= 0).all()
  assert all(len(set(row)) == documents for row in batch.key_start)
  # Part B is seen causally, and Part A whole: up to where the document's Part B begins.
  assert (batch.key_end[part_b] == np.broadcast_to(t + 1, part_b.shape)[part_b]).all()
  for row, start in np.argwhere(np.diff(batch.key_start, prepend=-1, axis=1)):
    whole = batch.key_end[row, start]
    assert not part_b[row, start:whole].any() and part_b[row, whole]
  assert (batch.loss_weights == part_b).all()
  assert (batch.positions + batch.key_start <= t).all()
  assert set(batch.objective.flat) == {OBJECTIVES.index('blank')}


def test_a_step_is_timed_and_makes_a_row_of_the_table():
  case = step.Case(name='tiny', model=TINY, rows=2, length=32, documents=2, peers=False)
  result = json.loads(json.dumps(step.measure(case, rounds=2, seconds=0.0)))
  assert result['seconds']['ours']['least'] > 0
  assert result['first_loss']['ours'] == pytest.approx(np.log(64), rel=0.05)
  text = '\n'.join(
    step.table({'device': 'here', 'date': '', 'jax': '', 'torch': '', 'rows': [result]})
  )
  assert '| tiny, 0 M | 2 × 32 prefix, 2 packed | cpu_dense |' in text


def test_without_pytorch_the_command_says_what_to_install(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert cli.exit_code(step.main, []) == cli.EXIT_DATA
  assert 'pip install torch' in capsys.readouterr().err


@pytest.fixture
def kept_run(tmp_path):
  """Flags of `train_on_card` whose batches are six of random tokens."""
  train_on_card.keep(
    tmp_path / 'batches.npz',
    [rows.prefix(8, 32, 64, seed=seed) for seed in range(6)],
    [rows.prefix(8, 32, 64, seed=6)],
  )
  about = {
    'model': model_config.to_dict(TINY),
    'optimizer': dataclasses.asdict(OptimizerConfig()),
    'batch_size': 8,  # the tests' devices
    'positions': 32,
    'steps': 6,
  }
  (tmp_path / 'run.json').write_text(json.dumps(about), encoding='utf-8')
  return argparse.Namespace(batches=tmp_path)


@pytest.mark.slow
def test_a_run_on_kept_batches_is_the_same_run_when_it_is_killed(kept_run, monkeypatch):
  whole = train_on_card.run(kept_run, f'{kept_run.batches}/whole')
  assert whole['losses'].keys() == set('123456')
  assert whole['validation']['loss/blank'] == pytest.approx(np.log(64), rel=0.1)
  read = train_on_card.KeptData._batch

  def killed(self, split, number):
    if split == 'train' and number == 3:
      # Unlike a process that is killed, this one goes on to write what it has begun to.
      while checkpoints.latest_step(f'{kept_run.batches}/killed') != 2:
        time.sleep(0.05)
      raise KeyboardInterrupt
    return read(self, split, number)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(train_on_card.KeptData, '_batch', killed)
    train_on_card.run(kept_run, f'{kept_run.batches}/killed')
  resumed = train_on_card.run(kept_run, f'{kept_run.batches}/killed')
  assert resumed['parameters'] == whole['parameters']
  results = {'device': 'card', 'date': '', 'jax': '', 'cpu': whole, 'card': resumed}
  lines = train_on_card.table({**results, 'killed_after': 2, 'same_bits': True})
  assert any(line.startswith('| validation, loss/blank |') for line in lines)


def test_without_the_batches_the_card_says_how_to_write_them(tmp_path, capsys):
  argv = [f'--batches={tmp_path}']
  assert cli.exit_code(train_on_card.main, argv) == cli.EXIT_DATA
  assert '--write' in capsys.readouterr().err


@pytest.mark.slow
def test_answers_of_a_policy_are_timed_beside_transformers(tmp_path):
  pytest.importorskip('transformers')
  from benchmarks import rollouts

  # Both sides give answers of the same lengths, or it raises.
  done = subprocess.run(
    [sys.executable, ROOT / 'tests/rollouts_peer.py', tmp_path],
    env=environment(),
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  assert result['tokens'] == 3 * (2 + 4) and len(result['ratios']) == 2
  assert {*result['rows'].values()} <= {2, 4} and min(result['ratios']) > 0
  about = dict(device='here', date='', jax='', transformers='', model='tiny', cores=1)
  assert '| 6 questions, tok/s |' in rollouts.table({**about, 'answers': result})[-1]


@pytest.mark.slow
def test_a_step_of_grpo_is_timed_and_learns(tmp_path):
  """Rollout, scoring and update: each step has weights of its own."""
  import jax

  from benchmarks import rollouts
  from glm_jax.models import ChatGLM2Config
  from glm_jax.training import state

  model = ChatGLM2Config(
    num_layers=1,
    hidden_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_size=16,
    mlp_size=32,
    vocab_size=512,
    max_positions=64,
  )
  params = jax.tree.map(
    lambda a: jax.random.normal(jax.random.key(1), a.shape, a.dtype),
    state.abstract_params(model),
  )
  sizes = rollouts.Steps(batch=4, group=2, asked=4, answered=4)
  own = rollouts._OwnSteps(model, params, sizes, tmp_path)
  assert min(own(2)) > 0
  now = own._current
  assert int(now['step']) == 2
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), now['params'], params)
  assert any(jax.tree.leaves(changed))
  # Of each rollout all answers, as long as they are to be.
  kept = np.asarray(own._stream.kept['loss_weights'])
  assert kept.sum(1).tolist() == [4.0] * 4


def test_what_killed_runs_and_little_data_cost_is_told_in_tables():
  """Of results as they are kept: shares that sum to all, gains in points."""
  from benchmarks import finetuning, kill

  about = dict(device='here', date='', jax='')
  shares = {'steps': 0.5, 'start': 0.25, 'lost': 0.25}
  result = {
    **about,
    'kills': {'save, both': 2, 'save, process 0': 1, 'step, process 1': 2},
    'steps': 40,
    'equal': True,
    'goodput': shares,
    'goodput_alone': {'steps': 1.0},
    'restarts': 5,
  }
  text = '\n'.join(kill.table(result))
  assert (
    '5 times SIGKILL to one or both (save 3, step 2), 5 restarts: the same bits' in text
  )
  assert '| steps done again behind a checkpoint | 25.0% | 0.0% |' in text
  assert '| all | 100.0% | 100.0% |' in text
  assert '**other bits**' in '\n'.join(kill.table({**result, 'equal': False}))

  told = lambda top1: {'top1': top1, 'loss': 1.0}
  base = {'pretrained': [told(0.3), told(0.32)], 'untrained': [told(0.2), told(0.2)]}
  both = {'text': told(0.1), 'answers': told(0.2)}
  result = {**about, 'seeds': 2, 'sizes': {'1000': base}, 'zero_shot': told(0.21)}
  text = '\n'.join(finetuning.table({**result, 'forgetting': {'before': both}}))
  assert '| 1,000 | 31.0% ±1.4% | 1.00 | 20.0% ±0.0% | 1.00 | +11.0 |' in text
  assert '| none | 21.0% | 1.00 | | | |' in text and '| before | 1.00 | 1.00 |' in text


def test_what_a_save_costs_is_told_by_both_clocks():
  """Medians of the rounds, and shares of the steps between two saves."""
  from benchmarks import saving

  each = {'digest': [0.1, 0.2], 'save': [0.3, 0.4], 'step': [0.5, 1.0]}
  rounds = [{**each, 'write': [more, 2 * more]} for more in (0.5, 0.1, 9.0)]
  about = dict(device='here', date='', jax='', parameters=25e6, tokens=8, rounds=rounds)
  predicted = {'row': 'a model', 'seconds': 0.02, 'step_seconds': 2.0}
  text = '\n'.join(saving.table({**about, 'predicted': predicted}))
  assert '| 20 steps | 10.00 | 20.00 |' in text
  assert '| a save in all | 0.80 (8.0%) | 1.40 (7.0%) |' in text
  assert 'take 20 ms, 0.0010% of 1,000 steps of 2.0 s' in text


@pytest.mark.parametrize(
  'text,steps', [('[0] step   20/40 x\n', [20]), ('[1] steps\n', [])]
)
def test_steps_of_a_log_are_found_behind_a_place(text, steps, tmp_path):
  from benchmarks import kill

  run = kill.Run.__new__(kill.Run)
  run._log = tmp_path / 'log'
  run._log.write_text('[0] step   10/40  loss\n' + text)
  assert run.steps(run._log.read_text().index('\n') + 1) == steps
