"""Runs as users start them: killed and resumed, in two processes, with own tasks."""

import hashlib
import json
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from commands import ROOT, command, environment, gin, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from glm_jax import checkpoints
from glm_jax.data import pipeline, prepare
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.data.examples.objective_config import ObjectiveConfig

pytestmark = pytest.mark.slow

STEPS = 12
TINY = [
  "VocabularyConfig.path='bytes'",
  'GLMConfig.num_layers=2',
  'GLMConfig.hidden_size=64',
  'GLMConfig.num_heads=2',
  'GLMConfig.vocab_size=384',
  'GLMConfig.max_positions=64',
  "TASK_FEATURE_LENGTHS={'tokens':64}",
  f'TRAIN_STEPS={STEPS}',
  'BATCH_SIZE=8',
  'EvaluationConfig.examples=8',
  'EvaluationConfig.every=6',
  'EvaluationConfig.fill=1',
  'OptimizerConfig.warmup_steps=1',
  'TrainConfig.microbatches=2',
  'CheckpointConfig.every=2',
  'TrainConfig.log_every=1',
  'GLMConfig.output_dropout=0.1',
  'GLMConfig.attention_dropout=0.1',
  'GLMConfig.embedding_dropout=0.1',
]


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp('text')
  for number in range(40):
    (folder / f'{number:02}.txt').write_text(
      f'Document {number} says a number of plain words in one sentence. ' * 8
    )
  return folder


def _start(text, run, *bindings, flags=(), **more):
  places = [
    f"MODEL_DIR='{run}'",
    f"CorpusConfig.corpus='{text}/*.txt'",
    f"CorpusConfig.cache_dir='{text}/cache'",
  ]
  return start(
    'train',
    '--gin_file=gin_configs/quickstart.gin',
    *flags,
    *gin(*TINY, *places, *bindings),
    PYTHONPATH=f'{ROOT}:{text}',
    PYTHONUNBUFFERED='1',
    **more,
  )


def _finish(process, seconds=300):
  output, _ = process.communicate(timeout=seconds)
  assert process.returncode == 0, output
  return output


def _params(run):
  """Parameters and optimizer of the last checkpoint, whoever wrote it."""
  folder = checkpoints.find(str(run))
  assert folder.name == str(STEPS)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with ocp.StandardCheckpointer() as reader:

    def read(item):
      found = reader.metadata(folder / item).item_metadata.tree
      target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), found
      )
      return reader.restore(folder / item, target)

    return jax.tree.map(np.asarray, [read('params'), read('optimizer')])


def _equal(a, b):

  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.fixture(scope='module')
def straight(text, tmp_path_factory):
  """An uninterrupted run."""
  run = tmp_path_factory.mktemp('runs') / 'straight'
  _finish(_start(text, run))
  return run


def test_killed_anywhere_a_run_continues_to_the_same_bits(text, straight, tmp_path):
  """kill -9 between steps, and inside saves, whose temporary folders are waited for."""
  run = tmp_path / 'killed'
  kills = inside = 0
  for attempt in range(30):
    process = _start(text, run)
    before = checkpoints.latest_step(str(run)) or 0
    while process.poll() is None and not (kills >= 4 and inside):
      folders = [path.name for path in (run / 'checkpoints').glob('*')]
      saving = any('tmp' in name for name in folders)
      done = checkpoints.latest_step(str(run)) or 0
      # Odd attempts aim inside a save, even ones after one.
      if (done > before and (attempt % 2 == 0 or saving)) or (saving and attempt % 2):
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        kills, inside = kills + 1, inside + saving
        break
      time.sleep(0.002)
    output, _ = process.communicate(timeout=300)
    if process.returncode == 0:
      break
    assert process.returncode == -signal.SIGKILL, output
  assert process.returncode == 0 and kills >= 3 and inside >= 1, (kills, inside)
  _equal(_params(run), _params(straight))
  records = [
    json.loads(line)
    for line in (run / 'metrics.jsonl').read_text().splitlines()
    if line.endswith('}')
  ]
  by_step = {r['step']: r['loss'] for r in records if r['kind'] == 'train'}
  wanted = {
    json.loads(line)['step']: json.loads(line)['loss']
    for line in (straight / 'metrics.jsonl').read_text().splitlines()
    if json.loads(line)['kind'] == 'train'
  }
  assert by_step == wanted


def test_two_processes_equal_one(text, straight, tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  drops = [
    'GLMConfig.output_dropout=0.0',
    'GLMConfig.attention_dropout=0.0',
    'GLMConfig.embedding_dropout=0.0',
  ]
  one = tmp_path / 'one'
  alone = _start(text, one, *drops)
  two = tmp_path / 'two'
  both = [
    _start(
      text,
      two,
      *drops,
      'MeshConfig.fsdp=2',
      flags=[
        f'--coordinator_address={address}',
        '--process_count=2',
        f'--process_index={i}',
      ],
    )
    for i in range(2)
  ]
  _finish(alone)
  outputs = [_finish(process) for process in both]
  assert 'step' in outputs[0] and 'step' not in outputs[1]  # the leader speaks
  assert len(json.loads((two / 'summary.json').read_text())['filled']) == 1

  for a, b in zip(*(jax.tree.leaves(_params(run)[0]) for run in (one, two)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  # The run goes on in one process: its number of processes may change.
  output = _finish(_start(text, two, *drops, f'TRAIN_STEPS={STEPS + 2}'))
  assert f'resumed {two} at step {STEPS}' in output


def test_killed_on_one_process_the_data_goes_on_to_the_same_bits_on_two(text, tmp_path):
  """From shards, in mixture; what each process is given is written down, row by row."""
  (text / 'spy.py').write_text("""
import hashlib, os
from glm_jax.data import pipeline

init, following = pipeline.Stream.__init__, pipeline.Stream.__next__

def noted(self, task, lengths, **reading):
  init(self, task, lengths, **reading)
  self.is_training = task == 'glm_mixture' and reading.get('train', True)

def note(self):
  batch = following(self)
  if self.is_training:
    with open(os.environ['SEEN'], 'a') as file:
      for row, index in enumerate(batch.index):
        row_bytes = b''.join(field[row].tobytes() for field in batch[:-1])
        print(index, hashlib.sha256(row_bytes).hexdigest(), file=file)
  return batch

pipeline.Stream.__init__, pipeline.Stream.__next__ = noted, note
""")
  make = [
    *('--gin_file=gin_configs/quickstart.gin', '--shards=3', f'--output_dir={text}/shards'),
    *gin(*TINY, f"CorpusConfig.corpus='{text}/*.txt'", "MODEL_DIR='x'"),
  ]
  assert command('make_shards', *make).returncode == 0
  run = tmp_path / 'run'
  places = [
    f"CorpusConfig.corpus='shards:{text}/shards'",
    'CheckpointConfig.every=3',
    'EvaluationConfig.every=1000',
  ]

  def spied(number, *flags):
    seen = str(tmp_path / f'seen-{number}')
    return _start(text, run, *places, flags=['--import=spy', *flags], SEEN=seen)

  process = spied(0)
  while process.poll() is None and not checkpoints.latest_step(str(run)):
    time.sleep(0.01)
  process.kill()
  process.communicate()
  step = checkpoints.latest_step(str(run))
  assert 0 < step < STEPS
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'--coordinator_address=localhost:{free.getsockname()[1]}'
  both = [
    spied(i + 1, address, '--process_count=2', f'--process_index={i}') for i in range(2)
  ]
  outputs = [_finish(p) for p in both]
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
  corpus = CorpusConfig(corpus=f'shards:{text}/shards')
  prepare.prepare('glm_mixture', length, corpus, VocabularyConfig(), config)
  stream = pipeline.Stream('glm_mixture', length, batch_size=8, seed=0)
  for number in range(STEPS):
    batch = next(stream)
    for row, index in enumerate(batch.index):
      content = b''.join(field[row].tobytes() for field in batch[:-1])
      line = f'{index} {hashlib.sha256(content).hexdigest()}'
      assert line == (rows[0] if number < step else resumed)[index]


def test_a_finished_run_says_so_and_changes_nothing(text, straight):
  before = {path: path.stat().st_mtime_ns for path in (straight / 'checkpoints').rglob('*')}
  output = _finish(_start(text, straight))
  assert f'resumed {straight} at step {STEPS}' in output and 'step  ' not in output
  assert before == {
    path: path.stat().st_mtime_ns for path in (straight / 'checkpoints').rglob('*')
  }


def test_the_folder_holds_what_a_person_looks_for(straight):
  names = {path.name for path in straight.iterdir()}
  assert {
    'config.gin',
    'run.json',
    'metrics.jsonl',
    'tensorboard',
    'checkpoints',
    'summary.json',
    'loss.png',
  } <= names
  summary = json.loads((straight / 'summary.json').read_text())
  assert len(summary['filled']) == 1
  for name in ('blank', 'document', 'sentence'):
    assert summary['baselines'][name]['bigram'] < summary['baselines'][name]['unigram']
    assert f'loss/{name}' in summary['validation']
  board = EventAccumulator(str(straight / 'tensorboard'), {'tensors': 0}).Reload()
  assert [event.step for event in board.Tensors('train/loss')] == [*range(1, STEPS + 1)]


def test_a_new_run_begins_from_anothers_parameters(text, straight, tmp_path):
  """Longer position tables keep the old rows; the step and the optimizer are new."""
  run = tmp_path / 'next'
  output = _finish(
    _start(
      text,
      run,
      f"TrainConfig.init_from='{straight}'",
      'TRAIN_STEPS=1',
      'GLMConfig.max_positions=100',
      'OptimizerConfig.learning_rate=1e-9',
      'OptimizerConfig.schedule="constant"',
      'OptimizerConfig.warmup_steps=0',
    )
  )
  assert 'parameters from' in output
  with ocp.StandardCheckpointer() as reader:
    new = reader.restore(checkpoints.find(str(run)) / 'params')
  old = _params(straight)[0]
  assert new['positions']['weight'].shape[0] == 101
  np.testing.assert_allclose(
    new['positions']['weight'][:65], old['positions']['weight'], atol=1e-6
  )
  np.testing.assert_allclose(new['words']['weight'], old['words']['weight'], atol=1e-6)
  refused = _start(
    text, tmp_path / 'bad', f"TrainConfig.init_from='{straight}'", 'GLMConfig.num_layers=3'
  )
  output, _ = refused.communicate(timeout=300)
  assert refused.returncode == 65 and 'init_from must hold the same model' in output
  assert not (tmp_path / 'bad').exists()


def test_a_task_of_ones_own_trains_through_the_command(text, tmp_path):
  (text / 'own_tasks.py').write_text("""
import functools
import seqio, tensorflow as tf
from glm_jax.data import preprocessors
from glm_jax.text.vocabulary import ByteVocabulary

vocabulary = ByteVocabulary()
def source(split, shuffle_files, seed=None):
  return tf.data.Dataset.from_tensor_slices({'text': ['A sentence of my own. ' * 5] * 64})
steps = (preprocessors.tokenize, preprocessors.to_rows, preprocessors.blank_infilling)
seqio.TaskRegistry.add(
  'my_task', source=seqio.FunctionDataSource(source, splits=('train', 'validation')),
  preprocessors=[functools.partial(step, vocabulary=vocabulary) for step in steps],
  output_features=preprocessors.output_features(vocabulary), shuffle_buffer_size=8)
""")
  output = _finish(
    _start(
      text,
      tmp_path / 'run',
      'MIXTURE_OR_TASK_NAME="my_task"',
      'TRAIN_STEPS=4',
      flags=['--import=own_tasks'],
    )
  )
  assert 'validation loss' in output and 'done: 4 steps' in output


def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(text, tmp_path):
  """A limit on the size of a file stands for a full disk: writing fails alike."""
  run = tmp_path / 'full'
  _finish(_start(text, run, 'TRAIN_STEPS=2'))
  places = [
    f"MODEL_DIR='{run}'",
    f"CorpusConfig.corpus='{text}/*.txt'",
    f"CorpusConfig.cache_dir='{text}/cache'",
    'TRAIN_STEPS=6',
  ]
  arguments = ' '.join(f'"--gin.{b}"' for b in [*TINY, *places])
  done = subprocess.run(
    [
      'bash',
      '-c',
      f'ulimit -f 64; trap "" XFSZ; exec {sys.executable} -m glm_jax.train '
      f'--gin_file=gin_configs/quickstart.gin {arguments}',
    ],
    cwd=ROOT,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 74, done.stdout + done.stderr
  assert 'error: ' in done.stderr and 'Traceback' not in done.stderr
  assert checkpoints.latest_step(str(run)) == 2


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path):
  process = _start(
    text,
    tmp_path / 'run',
    'OptimizerConfig.learning_rate=1e30',
    'OptimizerConfig.clip_norm=1e30',
    'OptimizerConfig.schedule="constant"',
    'CheckpointConfig.every=100',
  )
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 70 and 'must stay finite' in output
  assert checkpoints.latest_step(str(tmp_path / 'run')) is None
