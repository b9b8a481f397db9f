"""Runs in several processes: the numbers, and the data, of one."""

import json
import socket
import time

import jax
import numpy as np
import pytest
import runs
import spy
from commands import in_process
from runs import STEPS

from glm_jax import checkpoints
from glm_jax.data import pipeline, prepare
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.training import writer

pytestmark = pytest.mark.slow


def _flags(count=2):
  """Of each of some processes that find each other."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'--coordinator_address=localhost:{free.getsockname()[1]}'
  number = f'--process_count={count}'
  return [[address, number, f'--process_index={i}'] for i in range(count)]


def test_two_processes_equal_one(text, tmp_path):
  drops = [
    'GLMConfig.output_dropout=0.0',
    'GLMConfig.attention_dropout=0.0',
    'GLMConfig.embedding_dropout=0.0',
  ]
  one, two = tmp_path / 'one', tmp_path / 'two'
  alone = runs.begin(text, one, *drops)
  both = [runs.begin(text, two, *drops, 'MeshConfig.fsdp=2', flags=f) for f in _flags()]
  runs.finish(alone)
  outputs = [runs.finish(process) for process in both]
  assert 'step' in outputs[0] and 'step' not in outputs[1]  # the leader speaks
  assert len(json.loads((two / 'summary.json').read_text())['filled']) == 1
  params = (jax.tree.leaves(runs.params(run)[0]) for run in (one, two))
  for a, b in zip(*params, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  # The run goes on in one process: its number of processes may change.
  longer = runs.arguments(text, two, *drops, f'TRAIN_STEPS={STEPS + 2}')
  done = in_process('train', *longer)
  assert f'resumed {two} at step {STEPS}' in done.stdout, done.stderr


def test_killed_on_one_process_the_data_goes_on_to_the_same_bits_on_two(text, tmp_path):
  """From shards, in mixture; what each process is given is written down, row by row."""
  shards = f"CorpusConfig.corpus='shards:{tmp_path}/shards'"
  make = [f'--output_dir={tmp_path}/shards', '--shards=3']
  made = in_process('make_shards', *make, *runs.arguments(text, tmp_path / 'x'))
  assert made.returncode == 0, made.stderr
  run = tmp_path / 'run'
  bindings = [shards, 'CheckpointConfig.every=3', 'EvaluationConfig.every=1000']

  def spied(number, *flags):
    seen = str(tmp_path / f'seen-{number}')
    return runs.begin(text, run, *bindings, flags=['--import=spy', *flags], SEEN=seen)

  process = spied(0)
  while process.poll() is None and not checkpoints.latest_step(str(run)):
    time.sleep(0.01)
  process.kill()
  process.communicate()
  step = checkpoints.latest_step(str(run))
  assert 0 < step < STEPS
  both = [spied(number, *flags) for number, flags in enumerate(_flags(), 1)]
  outputs = [runs.finish(process) for process in both]
  assert f'resumed {run} at step {step}' in outputs[0]
  seen = [(tmp_path / f'seen-{i}').read_text().splitlines() for i in range(3)]
  # The killed process may have left half a line.
  rows = [
    {int(line.split()[0]): line for line in lines if len(line.split()[-1]) == 64}
    for lines in seen
  ]
  resumed = {**rows[1], **rows[2]}
  # Each its own half, from the first row that was not trained on to the last.
  assert not rows[1].keys() & rows[2].keys()
  assert sorted(resumed) == list(range(8 * step, 8 * STEPS))
  # What the killed process had read ahead is read again, bit for bit.
  common = rows[0].keys() & resumed.keys()
  assert all(rows[0][i] == resumed[i] for i in common)
  # And all of it is what one process alone is given.
  length = {'tokens': 64}
  config = ObjectiveConfig(blank=0.5, document=0.3, sentence=0.2)
  corpus = CorpusConfig(corpus=f'shards:{tmp_path}/shards')
  prepare.prepare('glm_mixture', length, corpus, VocabularyConfig(), config)
  stream = pipeline.Stream('glm_mixture', length, batch_size=8, seed=0)
  for number in range(STEPS):
    batch = next(stream)
    for row, index in enumerate(batch.index):
      alone = rows[0] if number < step else resumed
      assert spy.line(batch, row) == alone[index]


def test_each_time_in_other_processes_it_is_the_run_of_one(text, tmp_path):
  """1, 2, 4 and 1 of them, started one after the other: the same rows, the same losses."""
  legs, each = (1, 2, 4, 1), 5
  bindings = [
    *(f'GLMConfig.{name}_dropout=0.0' for name in ('output', 'attention', 'embedding')),
    "OptimizerConfig.schedule='constant'",  # else it knows the total of steps
    'EvaluationConfig.every=1000',
    'EvaluationConfig.fill=0',
  ]

  def leg(run, count, steps):
    """Goes on to a step; what each process was given, by row."""
    own = [*bindings, f'TRAIN_STEPS={steps}', f'MeshConfig.fsdp={count}']
    told = [tmp_path / f'{run}-{steps}-{index}' for index in range(count)]
    begun = [
      runs.begin(text, tmp_path / run, *own, flags=['--import=spy', *flags], SEEN=str(seen))
      for flags, seen in zip(_flags(count) if count > 1 else [[]], told, strict=True)
    ]
    said, *_ = [runs.finish(process) for process in begun]
    lines = [line for seen in told for line in seen.read_text().splitlines()]
    return said, {int(line.split()[0]): line for line in lines}

  total = each * len(legs)
  _, straight = leg('straight', 1, total)
  seen = {}
  for number, count in enumerate(legs):
    said, rows = leg('changing', count, each * (number + 1))
    assert not number or f'at step {each * number}' in said
    # Rows that were read ahead, and not trained on, are given again.
    assert all(straight.get(i, line) == line for i, line in rows.items())
    seen |= rows
  assert {*range(8 * total)} <= seen.keys() & straight.keys()
  losses = [
    [(r['step'], r['loss']) for r in writer.read(str(tmp_path / run), 'train')]
    for run in ('straight', 'changing')
  ]
  assert [step for step, _ in losses[1]] == [*range(1, total + 1)]
  np.testing.assert_allclose(losses[1], losses[0], atol=1e-5, rtol=0)
