"""Watching a run: its profile, what it has taken, when it ends, and how long it is."""

import dataclasses
import gzip
import json
import re
import types

import jax
import numpy as np
import pytest
from commands import TINY, gin, in_process, refused, snapshot

from glm_jax import checkpoints, sharding
from glm_jax.checkpoints import Checkpoints
from glm_jax.configs import UserError
from glm_jax.models import GLMConfig
from glm_jax.recipes.pretraining import Pretraining
from glm_jax.training import meter as meters
from glm_jax.training import profiling, program, start, writer
from glm_jax.training.config import TrainConfig
from glm_jax.training.optimizer import OptimizerConfig

BASE = [binding for binding in TINY if not binding.startswith('TRAIN_STEPS')]
BASE += ["MIXTURE_OR_TASK_NAME='glm_blank'"]
# A rate that moves no weight: no validation is better than the one before the first step,
# and the third that is not ends the run.
STILL = (
  *('OptimizerConfig.learning_rate=1e-30', 'TRAIN_STEPS=20', 'TrainConfig.log_every=1'),
  *('CheckpointConfig.every=2', 'EvaluationConfig.every=2'),
  *('EvaluationConfig.at_start=True', 'EvaluationConfig.patience=3'),
)


@pytest.fixture
def train(tmp_path, text):
  """train(run, *bindings, flags=()): a run over the text."""

  def command(run, *bindings, flags=()):
    return in_process(
      'train',
      '--gin_file=gin_configs/glm_tiny.gin',
      *gin(*BASE, f"CorpusConfig.corpus='{text}/*.txt'", f"MODEL_DIR='{tmp_path}/{run}'"),
      *gin(f"CorpusConfig.cache_dir='{tmp_path}/cache'"),
      *gin(*bindings),
      *flags,
    )

  return command


def _ok(done):
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def _meta(run):
  return checkpoints.read_meta(checkpoints.find(str(run)))


def _records(run, kind):
  """Without what the clock says, and the rate, which a start's first record has not."""
  timed = {'tokens_per_second', 'seconds_left', 'input_stall', 'learning_rate', 'goodput'}
  records = writer.read(str(run), kind)
  return [{k: v for k, v in record.items() if k not in timed} for record in records]


@pytest.mark.slow
def test_a_run_stops_early_at_the_same_step_when_it_was_killed(
  train, tmp_path, monkeypatch
):
  run = tmp_path / 'straight'
  said = _ok(train('straight', *STILL))
  assert 'stopped early at step 6: loss has not improved in 3 validations' in said
  assert 'done: 6 steps' in said and checkpoints.latest_step(str(run)) == 6
  validated = writer.read(str(run), 'validation')
  assert [record['step'] for record in validated] == [0, 2, 4, 6]
  assert len({record['loss'] for record in validated}) == 1

  # Killed behind its second checkpoint, it goes on to the same end.
  def save(self, *arguments, save=Checkpoints.save):
    save(self, *arguments)
    self._manager.wait_until_finished()

  def write(self, step, *arguments, write=writer.Writer.write):
    if step == 5:
      raise KeyboardInterrupt
    write(self, step, *arguments)

  monkeypatch.setattr(Checkpoints, 'save', save)
  with monkeypatch.context() as killed:
    killed.setattr(writer.Writer, 'write', write)
    assert train('killed', *STILL).returncode == 130
  said = _ok(train('killed', *STILL))
  assert 'at step 4' in said and 'stopped early at step 6: loss' in said
  one, other = _meta(run), _meta(tmp_path / 'killed')
  for name in ('stopping', 'so_far', 'step'):
    assert one[name] == other[name], name
  assert (one['stopping']['step'], one['stopping']['since']) == (0, 3)
  for kind in ('train', 'validation'):
    assert _records(run, kind) == _records(tmp_path / 'killed', kind) != []
  # What it has taken is of all of its steps, before and after it was killed.
  taken = [(r['tokens_so_far'], r['flops_so_far']) for r in _records(run, 'train')]
  assert len(taken) == 6 and (np.diff(taken, axis=0) > 0).all()
  assert 0 < taken[0][0] and taken[-1][0] <= 6 * 4 * 64
  assert (*one['so_far'].values(),) == taken[-1]
  text = (tmp_path / 'killed' / 'metrics.jsonl').read_text()
  assert text.count('"step": 0') == 1  # only a new run validates what it begins with

  # The same command again says so and does nothing; more patience goes on.
  before = snapshot(run)
  said = _ok(train('straight', *STILL))
  assert 'has stopped early at step 6: loss has' in said and 'patience=3, or' in said
  refused(train('straight', *STILL, flags=['--profile=5:6']), 'behind step 6, got 5:6')
  assert snapshot(run) == before
  said = _ok(train('straight', *STILL, 'EvaluationConfig.patience=4'))
  assert 'resumed' in said and 'stopped early at step 8' in said
  summary = json.loads((run / 'summary.json').read_text())
  assert summary['steps'] == 8
  assert {k: summary[k] for k in ('tokens', 'flops')} == _meta(run)['so_far']


def _check_profile(run, said):
  """Of steps 2 and 3, with the scopes of the program."""
  (traced,) = run.glob('tensorboard/plugins/profile/*/perfetto_trace.json.gz')
  assert f'profile of steps 2 to 3: open {traced} in' in said
  events = json.loads(gzip.open(traced).read())['traceEvents']
  steps = [event for event in events if event.get('name') == 'train']
  assert [event['args']['step_num'] for event in steps] == ['2', '3']
  work = [e for e in events if 'dot' in e.get('name', '') and 'dur' in e]
  assert len(work) > 2 and min(e['ts'] for e in work) > steps[0]['ts']
  (plane,) = traced.parent.glob('*.xplane.pb')
  assert all(scope in plane.read_bytes() for scope in (b'optimizer/', b'(loss)/'))


def test_epochs_are_the_steps_that_their_rows_make(train, tmp_path):
  """The same run, rate and all, though its file has a number of steps; and profiled."""
  logged = 'TrainConfig.log_every=1'
  said = _ok(train('epochs', logged, 'TRAIN_EPOCHS=0.03'))
  rows, steps = re.search(r'0.03 epochs of (\d+) rows: (\d+) steps\n', said).groups()
  assert int(steps) == round(0.03 * int(rows) / 4) == 3 and 'done: 3 steps' in said
  profiled = _ok(train('steps', logged, 'TRAIN_STEPS=3', flags=['--profile=2:3']))
  _check_profile(tmp_path / 'steps', profiled)
  runs = [tmp_path / name for name in ('epochs', 'steps')]
  for kind in ('train', 'validation'):
    assert _records(runs[0], kind) == _records(runs[1], kind) != []
  rates = [[r.get('learning_rate') for r in writer.read(str(f), 'train')] for f in runs]
  assert rates[0] == rates[1] and rates[0][1] > 0
  identities = [json.loads((run / 'run.json').read_text()) for run in runs]
  assert identities[0] == identities[1]
  before = snapshot(runs[0])
  refused(train('epochs', 'TRAIN_EPOCHS=0.03', flags=['--profile=4:4']), 'which has 3')
  again = _ok(train('epochs', logged, 'TRAIN_EPOCHS=0.03'))
  assert 'nothing is left to train; raise TRAIN_STEPS or TRAIN_EPOCHS' in again
  assert snapshot(runs[0]) == before


def _config(**more):
  sizes = dict(num_layers=1, hidden_size=8, num_heads=1, vocab_size=64, max_positions=64)
  recipe = Pretraining(task='glm_blank', feature_lengths={'tokens': 64})
  base = {'model': GLMConfig(**sizes), 'recipe': recipe, 'batch_size': 4, 'model_dir': 'x'}
  return TrainConfig(**{**base, **more})


@pytest.mark.parametrize(
  'epochs,rows,batch,steps',
  [(2, 1234, 32, 77), (1, 100, 16, 6), (1.0, 24, 16, 2), (0.001, 10, 8, 1), (3, 8, 8, 3)],
)
def test_epochs_are_of_all_rows_to_the_nearest_step(epochs, rows, batch, steps):
  config = _config(batch_size=batch, train_epochs=epochs)
  said = []
  of = lambda rows: start.in_steps(config, types.SimpleNamespace(rows=rows), said.append)
  found = of(rows)
  assert found == dataclasses.replace(config, train_steps=steps, train_epochs=None)
  unit = 'epoch' if epochs == 1 else 'epochs'
  assert said == [f'{epochs:g} {unit} of {rows:,} rows: {steps:,} steps']
  with pytest.raises(UserError, match=r'a task of your own.*give TRAIN_STEPS, or make sh'):
    of(None)
  with pytest.raises(UserError, match='TRAIN_STEPS or TRAIN_EPOCHS, and not both'):
    dataclasses.replace(config, train_steps=1)
  with pytest.raises(UserError, match='got train_steps=None, train_epochs=None'):
    dataclasses.replace(config, train_epochs=None)


def test_what_a_plan_compiles_does_not_wait_for_the_rows_of_an_epoch():
  layout = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
  of_epochs = _config(train_epochs=2, optimizer=OptimizerConfig(warmup_steps=10))
  of_steps = dataclasses.replace(of_epochs, train_epochs=None, train_steps=100)
  one, other = (program.build(config, layout) for config in (of_epochs, of_steps))
  assert one.state == other.state and one.batch == other.batch


def test_a_metric_that_nothing_measures_is_refused_before_anything_is_written(
  train, tmp_path
):
  for more, words in (
    (["CheckpointConfig.best_metric='nope'"], ("got 'nope'", 'choose among loss, loss/')),
    # Of a corpus that the run does not have.
    (["CheckpointConfig.best_metric='corpus/web/loss'"], ("got 'corpus/web/loss'",)),
  ):
    refused(train('run', 'TRAIN_STEPS=2', *more), *words)
    assert not (tmp_path / 'run').exists()
  # What no row of this run is scored by, its first validation shows.
  causal = "CheckpointConfig.best_metric='loss/causal'"
  refused(train('run', 'TRAIN_STEPS=2', causal), 'choose among loss, loss/blank')
  assert checkpoints.latest_step(str(tmp_path / 'run')) is None


def test_a_mixture_is_validated_by_corpus_too(train, tmp_path, text):
  mixed = (
    f"MixtureConfig.corpora={{'web': '{text}/*.txt', 'books': '{text}/1*.txt'}}",
    'EvaluationConfig.examples=0',
    "CheckpointConfig.best_metric='corpus/books/loss'",
    'TRAIN_STEPS=2',
  )
  said = _ok(train('run', *mixed))
  (record,) = writer.read(str(tmp_path / 'run'), 'validation')
  web, books = (record[f'corpus/{name}/loss'] for name in ('web', 'books'))
  assert min(web, books) <= record['loss'] <= max(web, books)
  assert f'(corpora: web {web:.3f}  books {books:.3f})' in said
  assert _meta(tmp_path / 'run')['stopping']['best'] == pytest.approx(books, abs=1e-6)
  board = b''.join(f.read_bytes() for f in (tmp_path / 'run').glob('tensorboard/events*'))
  assert b'validation/corpus/books/loss' in board and b'train/tokens_so_far' in board


def test_memory_is_that_of_the_fullest_device_where_devices_tell(monkeypatch):
  of = lambda stats: types.SimpleNamespace(memory_stats=lambda: stats)
  devices = [of({'peak_bytes_in_use': 3 * 2**30}), of({'peak_bytes_in_use': 5 * 2**30})]
  monkeypatch.setattr(meters.jax, 'local_devices', lambda: [*devices, of({}), of(None)])
  meter = meters.Meter(0, 10)
  assert meter.taken() == {'tokens_so_far': 0, 'flops_so_far': 0, 'peak_memory_gib': 5}
  line = meters.progress_line(1, 10, {'loss': 1.0, **meter.taken()})
  assert line == 'step     1/10  loss 1.000  5.0 GiB'
  monkeypatch.setattr(meters.jax, 'local_devices', lambda: [of(None), of({})])
  # A run that began before they were counted has no sums of all of it.
  meter = meters.Meter(5, 10, {})
  meter.count(30, 1000)
  assert meter.taken() == meter.so_far == {}


@pytest.mark.parametrize(
  'text', ['5', '5:', ':5', '5-6', 'a:b', '0:3', '7:6', '-1:3', '1.0:2', '1:2:3', ' 1:2']
)
def test_ranges_that_are_none_are_refused(text):
  with pytest.raises(UserError, match='must be START:STOP.*write it such as'):
    profiling.parse(text)
  assert profiling.parse('') is None and profiling.parse('7:7') == (7, 7)


def test_a_profile_is_of_steps_that_the_run_has_and_still_trains(tmp_path):
  said = []
  profile = profiling.Profile((5, 8), str(tmp_path), said.append)
  for steps, saved in ((8, None), (9, 7), (None, None), (None, 4)):
    profile.check(steps, saved)
  for steps, saved, words in (
    (7, None, 'which has 7, got 5:8'),
    (20, 8, 'behind step 8, got 5:8'),
    (None, 100, 'behind step 100'),
  ):
    with pytest.raises(UserError, match=words):
      profile.check(steps, saved)
  assert [n for n in range(1, 12) if profile.is_bound(n)] == [4, 8]
  with pytest.raises(UserError, match="of this machine, got MODEL_DIR='gs://b/run'"):
    profiling.Profile((5, 8), 'gs://b/run', said.append)
  none = profiling.Profile(None, 'gs://b/run', said.append)
  none.check(1, 1)
  assert not any(map(none.is_bound, range(9)))


def test_a_profile_is_written_wherever_the_run_ends(tmp_path, monkeypatch):
  """Within it, by an error or early, or before it: the profiler is never left running."""
  calls = []
  monkeypatch.setattr(
    profiling.jax.profiler, 'start_trace', lambda *_, **__: calls.append('start')
  )
  monkeypatch.setattr(profiling.jax.profiler, 'stop_trace', lambda: calls.append('stop'))
  (tmp_path / 'tensorboard/plugins/profile/now').mkdir(parents=True)

  def run(first, last, error=None):
    said = []
    with profiling.Profile((5, 8), str(tmp_path), said.append) as profile:
      for number in range(first, last + 1):
        with profile.step(number):
          if number == error:
            raise FloatingPointError
        profile.ended(number)
    return said

  for first, last, traced in ((1, 20, '5 to 8'), (7, 20, '7 to 8'), (1, 6, '5 to 6')):
    (said,) = run(first, last)
    assert said.startswith(f'profile of steps {traced}: open {tmp_path}/tensorboard/')
    assert calls == ['start', 'stop']
    calls.clear()
  with pytest.raises(FloatingPointError):
    run(1, 20, error=6)
  assert calls == ['start', 'stop']
  assert run(1, 3) == ['no profile: the run ended before step 5'] and len(calls) == 2
