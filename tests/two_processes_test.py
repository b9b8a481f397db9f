"""Runs in two processes: the numbers, and the data, of one."""

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

pytestmark = pytest.mark.slow


def _flags():
  """Of each of two processes that find each other."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'--coordinator_address=localhost:{free.getsockname()[1]}'
  return [[address, '--process_count=2', f'--process_index={i}'] for i in range(2)]


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
