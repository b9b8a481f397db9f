"""What a run writes down is of the step that it says: one small run, and what it left."""

import contextlib
import dataclasses
import io
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import write_words

from glm_jax import checkpoints, models, sharding
from glm_jax.checkpoints import CheckpointConfig, Checkpoints
from glm_jax.data import pipeline
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.data.pipeline import Process
from glm_jax.models import ChatGLM2Config
from glm_jax.models import config as model_config
from glm_jax.recipes.pretraining import Pretraining
from glm_jax.text import loading
from glm_jax.text.vocabulary import ByteVocabulary
from glm_jax.train import train
from glm_jax.training import guard, losses, metrics, optimizer, program, state, writer
from glm_jax.training import meter as meters
from glm_jax.training.config import EvaluationConfig, TrainConfig
from glm_jax.training.optimizer import OptimizerConfig

STEPS, LENGTHS = 8, {'tokens': 32}


def _config(folder, **fields):
  """Validates after steps 4 and 8, saves after 3, 6 and 8, reports on 1, 3, 6 and 8."""
  return TrainConfig(
    **{
      'model': ChatGLM2Config(
        num_layers=1,
        hidden_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_size=4,
        mlp_size=16,
        vocab_size=384,
        max_positions=32,
      ),
      'recipe': Pretraining(
        task='glm_causal',
        feature_lengths=LENGTHS,
        corpus=CorpusConfig(
          corpus=str(folder / '*.txt'),
          cache_dir=str(folder / 'cache'),
          validation_fraction=0.3,
        ),
        vocabulary=VocabularyConfig(path='bytes'),
      ),
      'optimizer': OptimizerConfig(learning_rate=0.01, warmup_steps=4),
      'evaluation': EvaluationConfig(every=4, examples=12, fill=0),
      'checkpoint': CheckpointConfig(every=3, keep=2, keep_best=1),
      'batch_size': 8,
      'train_steps': STEPS,
      'model_dir': str(folder / 'run'),
      'seed': 5,
      'log_every': 3,
      **fields,
    }
  )


def _data(config):
  one = sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])
  return config.recipe.prepare(config, None, one)


class _Watched:
  """What a run does, as seen from outside: its steps, what they counted, what it saved."""

  def __init__(self, patch):
    self.steps, self.counted, self.saved = [], [], []
    build, count, save = program.build, meters.Meter.count, Checkpoints.save

    def built(*arguments):
      made = build(*arguments)

      def train_step(current, frozen, batch):
        batch_here, before = jax.device_get(batch), jax.device_get(current)
        current, found = made.train_step(current, frozen, batch)
        self.steps.append((before, batch_here, jax.device_get(found)))
        return current, found

      return made._replace(train_step=train_step)

    def counts(meter, tokens, flops):
      self.counted.append((tokens, flops))
      count(meter, tokens, flops)

    def saves(checkpoints, current, meta, scores, *more):
      self.saved.append((int(current['step']), meta, dict(scores)))
      save(checkpoints, current, meta, scores, *more)

    patch.setattr(program, 'build', built)
    patch.setattr(meters.Meter, 'count', counts)
    patch.setattr(Checkpoints, 'save', saves)


def _train(config):
  """What a run does and says; on one device, since a step is then compiled in no time."""
  config = dataclasses.replace(config, mesh=sharding.MeshConfig(data=1))
  one, words = jax.devices()[:1], io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(words):
    make_mesh = sharding.make_mesh
    patch.setattr(sharding, 'make_mesh', lambda c, devices=one: make_mesh(c, devices))
    watched = _Watched(patch)
    train(config, 'the configuration')
  return watched, words.getvalue()


@pytest.fixture(scope='session')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('records')
  write_words(folder, 30)
  config = _config(folder)
  watched, said = _train(config)
  return config, folder, watched, said


def _records(folder, kind):
  lines = (folder / 'run' / 'metrics.jsonl').read_text().splitlines()
  return [record for record in map(json.loads, lines) if record['kind'] == kind]


def _means(steps):
  """{name: mean} over some steps, each token alike; norms, each step alike."""
  names = {name for _, _, found in steps for name in found if guard.NAME not in name}
  sums = {k: [sum(float(f[k][i]) for *_, f in steps) for i in (0, 1)] for k in names}
  return {k: total / count for k, (total, count) in sums.items() if count}


def _counted(watched, steps):
  """Tokens and FLOPs of the first steps together."""
  return pytest.approx(
    [sum(column) for column in zip(*watched.counted[:steps], strict=True)]
  )


def _so_far(record):
  return [record['tokens_so_far'], record['flops_so_far']]


def test_each_record_is_the_mean_of_the_steps_since_the_last(run):
  _, folder, watched, _ = run
  records = _records(folder, 'train')
  assert [record['step'] for record in records] == [1, 3, 6, 8]
  last = 0
  for record in records:
    wanted = _means(watched.steps[last : record['step']])
    assert {k: record[k] for k in wanted} == pytest.approx(wanted, abs=2e-6)
    assert {*wanted} == {'loss', 'loss/causal', 'gradient_norm'}
    last = record['step']
    assert _so_far(record) == _counted(watched, last)
    if last == 1:  # the compiler's time is no speed
      sums = {'tokens_so_far', 'flops_so_far'}
      assert {*record} == {'step', 'kind', *wanted, *sums}
      continue
    # Of the last of these steps: four of warm-up from 0, then down to a tenth.
    rate = 0.01 * (last - 1) / 4
    if last > 5:
      rate = 0.001 + 0.009 * (1 + math.cos(math.pi * (last - 5) / 4)) / 2
    assert record['learning_rate'] == pytest.approx(rate, abs=2e-6)
    assert {'tokens_per_second', 'seconds_left', 'input_stall'} <= {*record}


def test_the_recorded_rate_is_the_one_that_moved_the_weights(run):
  """Of a parameter without decay: Adam's first steps have the size of the rate."""
  config, _, watched, _ = run
  rate = optimizer.schedule(config.optimizer, STEPS)
  scale = lambda current: np.asarray(current['params']['final_norm']['scale'])
  states = [before for before, _, _ in watched.steps]
  np.testing.assert_array_equal(scale(states[1]), scale(states[0]))  # the rate is 0
  moved = np.abs(scale(states[2]) - scale(states[1])).max()
  assert moved == pytest.approx(float(rate(1)), rel=0.05)


def test_steps_read_the_stream_in_order_and_work_is_counted(run):
  config, _, watched, _ = run
  _data(config)  # registers its task, whose name other runs of this process have, too
  stream = pipeline.batches('glm_causal', LENGTHS, batch_size=8, seed=5)
  for number, (before, batch, _) in enumerate(watched.steps):
    wanted = next(stream)
    assert int(before['step']) == number
    for name, found in batch._asdict().items():
      if name != 'index':
        np.testing.assert_array_equal(found, getattr(wanted, name), err_msg=name)
    tokens = (wanted.key_end > 0).sum()
    assert watched.counted[number] == config.recipe.work(config, wanted.visibility)
    assert watched.counted[number][0] == tokens
    assert tokens == wanted.visibility.mask(32).any(-1).sum()


def test_validation_is_of_the_weights_of_its_step(run):
  config, folder, watched, _ = run
  records = _records(folder, 'validation')
  assert [record['step'] for record in records] == [4, 8]
  loss_fn = jax.jit(losses.pretraining_loss(models.build(config.model)))
  total = {}
  for batch in _data(config).validation['causal']():
    params, rows = watched.steps[4][0]['params'], batch._replace(index=None)
    total = metrics.add(total, loss_fn({'params': params}, rows, None)[1])
  wanted = metrics.averages(total)
  assert {k: records[0][k] for k in wanted} == pytest.approx(wanted, rel=1e-5)
  summary = json.loads((folder / 'run' / 'summary.json').read_text())
  assert summary['validation'] == records[1]


def test_a_checkpoint_has_the_score_of_its_own_step_or_none(run):
  """Saved after 3, 6 and 8, of which 8 alone was validated."""
  config, folder, watched, _ = run
  assert [step for step, _, _ in watched.saved] == [3, 6, 8]
  assert [meta['step'] for _, meta, _ in watched.saved] == [3, 6, 8]
  scores = [scores for _, _, scores in watched.saved]
  assert scores[:2] == [{}, {}]
  last = _records(folder, 'validation')[-1]
  assert scores[2] == pytest.approx(
    {k: v for k, v in last.items() if k.startswith('loss')}, abs=1e-6
  )
  kept = sorted(int(path.name) for path in (folder / 'run/checkpoints').iterdir())
  assert kept == [6, 8]
  for number in kept:
    meta = checkpoints.read_meta(folder / 'run/checkpoints' / str(number))
    assert meta['step'] == number and meta['config'] == 'the configuration'
    assert model_config.from_dict(meta['model']) == config.model
    assert loading.from_dict(meta['vocabulary']).fingerprint == ByteVocabulary().fingerprint
    identity = json.loads((folder / 'run/run.json').read_text())['identity']
    assert meta['run'] == identity and identity['seed'] == 5


def test_what_is_said_first_is_counted(run):
  _, _, watched, said = run
  n = state.count(watched.steps[0][0]['params'])
  assert f'{n:,} parameters on 1 cpu device(s)' in said
  assert f'done: {STEPS} steps' in said


def test_a_resumed_run_repeats_its_steps_and_records_show_the_last_try(run):
  """Step 6 is the newest checkpoint that is left; 7 and 8 are done once more."""
  config, folder, watched, _ = run
  again_in = folder / 'again'
  shutil.copytree(folder / 'run', again_in)
  shutil.rmtree(again_in / 'checkpoints/8')
  path = again_in / 'metrics.jsonl'
  spoilt = [json.loads(line) for line in path.read_text().splitlines()]
  for record in spoilt:  # as if the first try had been another
    if record['step'] > 6:
      record['loss'] = 99.0
  path.write_text(''.join(json.dumps(record) + '\n' for record in spoilt) + '{"step": 7\n')
  again, said = _train(dataclasses.replace(config, model_dir=str(again_in)))
  assert 'resumed' in said and 'at step 6' in said
  assert [int(before['step']) for before, *_ in again.steps] == [6, 7]
  for (_, batch, found), (_, old_batch, old) in zip(
    again.steps, watched.steps[6:], strict=True
  ):
    jax.tree.map(np.testing.assert_array_equal, (batch, found), (old_batch, old))
  for kind, steps in (('train', [1, 3, 6, 7, 8]), ('validation', [4, 8])):
    read = writer.read(str(again_in), kind)
    assert [record['step'] for record in read] == steps
    assert read[-1]['loss'] < 99
  first = next(r for r in writer.read(str(again_in), 'train') if r['step'] == 7)
  assert first['loss'] == pytest.approx(_means(again.steps[:1])['loss'], abs=2e-6)
  assert _so_far(first) == _counted(watched, 7)
  summary = json.loads((again_in / 'summary.json').read_text())
  assert [summary['tokens'], summary['flops']] == _counted(watched, 8)


# Without a run.


def test_the_last_try_of_a_step_is_read_whatever_else_is_between(tmp_path):
  for tries in range(3):
    written = writer.Writer(str(tmp_path), enabled=True)
    for step in (10, 20, 30)[tries:]:
      written.write(step, 'train', {'loss': step + tries / 4})
      written.write(step, 'validation', {'loss/blank': -step - tries / 4})
    written.close()
  writer.Writer(str(tmp_path), enabled=False).write(40, 'train', {'loss': 0.0})
  train, validation = (writer.read(str(tmp_path), k) for k in ('train', 'validation'))
  assert [(r['step'], r['loss']) for r in train] == [(10, 10), (20, 20.25), (30, 30.5)]
  assert [r['loss/blank'] for r in validation] == [-10, -20.25, -30.5]


def test_the_best_is_of_its_metric_and_of_those_that_have_one(tmp_path):
  scores = [
    {'loss': 1.0, 'loss/blank': 9.0},
    {'loss': 5.0, 'loss/blank': 2.0},
    {},
    {'loss': 6.0, 'loss/blank': 3.0},
    {},
    {},
  ]
  written = Checkpoints(
    str(tmp_path), CheckpointConfig(keep=1, keep_best=2, best_metric='loss/blank')
  )
  current = {'params': {'w': jnp.ones(2)}, 'opt_state': {'m': jnp.zeros(2)}}
  for number, values in enumerate(scores, 1):
    written.save({**current, 'step': jnp.int32(number)}, {}, values)
  written.close()
  kept = sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
  assert kept == [2, 4, 6]


@pytest.mark.parametrize('mode,sign', [('min', 1), ('max', -1)])
def test_the_best_stays_when_the_run_is_started_again(mode, sign, tmp_path):
  """By another process, which has not seen its validation."""
  config = CheckpointConfig(keep=1, keep_best=1, best_mode=mode)
  current = {'params': {'w': jnp.ones(2)}, 'opt_state': {'m': jnp.zeros(2)}}
  for scores in ({1: 3.0, 2: 1.0, 3: 5.0}, {4: 1.0, 5: None}, {6: math.nan, 7: 2.0}):
    written = Checkpoints(str(tmp_path), config)
    for number, loss in scores.items():
      values = {} if loss is None else {'loss': sign * loss}
      written.save({**current, 'step': jnp.int32(number)}, {}, values)
    written.close()
    kept = sorted(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
    # Of two that are equal, the one on which the other did not improve.
    assert kept == [2, number]


@pytest.mark.parametrize(
  'name,value',
  [('loss', math.nan), ('gradient_norm', math.nan), ('gradient_norm', math.inf)],
)
def test_a_number_that_is_not_finite_stops_the_run_and_nothing_more_is_saved(
  run, name, value, monkeypatch, tmp_path
):
  """In the second step, which neither reports nor saves."""
  config, _, watched, _ = run
  build, saved = program.build, []

  def built(*arguments):
    made = build(*arguments)

    def train_step(current, frozen, batch):
      step = int(current['step']) + 1
      found = {'loss': (1.0, 1.0), 'gradient_norm': (1.0, 1.0)}
      if step == 2:
        found[name] = (value, 1.0)
      return {**current, 'step': jnp.int32(step)}, {
        k: tuple(map(jnp.float32, pair)) for k, pair in found.items()
      }

    return made._replace(train_step=train_step)

  fresh = watched.steps[0][0]
  monkeypatch.setattr(program, 'build', built)
  monkeypatch.setattr(state, 'init_state', lambda *_: fresh)
  monkeypatch.setattr(Checkpoints, 'save', lambda self, current, *_: saved.append(current))
  one, make_mesh = jax.devices()[:1], sharding.make_mesh
  monkeypatch.setattr(sharding, 'make_mesh', lambda c, devices=one: make_mesh(c, devices))
  words = name.replace('_', ' ')
  with pytest.raises(FloatingPointError, match=f'{words} at step 2 must stay finite'):
    train(dataclasses.replace(config, model_dir=str(tmp_path / 'new')), '')
  assert not saved


def test_validation_masks_are_the_same_for_every_run(run):
  """Whatever its seed, and on however many processes."""
  config, *_ = run
  read = lambda seed, process: [
    *_data(dataclasses.replace(config, seed=seed))._held_out('glm_causal', process)()
  ]
  reading = []
  original = pipeline.batches

  def batches(task, lengths, **more):
    reading.append(more)
    return original(task, lengths, **more)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline, 'batches', batches)
    first, second = read(0, Process()), read(17, Process())
    half = read(17, Process(index=1, count=2))
  for a, b, c in zip(first, second, half, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    np.testing.assert_array_equal(c.tokens, a.tokens[4:])
  assert len({more['seed'] for more in reading}) == 1
  for more in reading:
    assert (more['split'], more['train'], more['max_rows']) == ('validation', False, 12)
  assert sum((b.index >= 0).sum() for b in first) == 12
