"""The commands that measure, on sizes that take a moment."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import rows, step
from glm_jax import cli
from glm_jax.batch import OBJECTIVES
from glm_jax.models import GLMConfig

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
  assert '| tiny, 0 M | 2 × 32 prefix, 2 packed | dense |' in text


def test_without_pytorch_the_command_says_what_to_install(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert cli.exit_code(step.main, []) == cli.EXIT_DATA
  assert 'pip install torch' in capsys.readouterr().err
