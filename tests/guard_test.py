"""Updates that are left out: what decides, what stays as it was, what a run says of it."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from runs import write_words

from glm_jax import configs, sharding
from glm_jax.checkpoints import CheckpointConfig
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.models import ChatGLM2Config
from glm_jax.recipes.pretraining import Pretraining
from glm_jax.train import train
from glm_jax.training import guard, program, state, step, writer
from glm_jax.training.config import EvaluationConfig, TrainConfig
from glm_jax.training.guard import GuardConfig
from glm_jax.training.optimizer import OptimizerConfig, schedule

CONFIG = GuardConfig()
NAN, INF = math.nan, math.inf


def _after(norms, config=CONFIG, history=None, loss=1.0):
  """Which updates are applied, and the history behind them all."""
  judge, applied = jax.jit(guard.judge, static_argnums=0), []
  history = guard.fresh() if history is None else history
  for norm in norms:
    one, history = judge(config, history, jnp.float32(loss), jnp.float32(norm))
    applied.append(bool(one))
  return applied, jax.device_get(history)


def _calm(count=100, seed=0):
  return np.exp(np.random.default_rng(seed).normal(size=count) * 0.1) * 3


@pytest.mark.parametrize('bad', [NAN, INF, 1e4])
def test_what_is_left_out_does_not_enter_the_history(bad):
  calm = _calm()
  applied, history = _after(calm)
  assert all(applied)
  refused, after = _after([bad] * 3, history=history)
  assert not any(refused)
  names = ('mean', 'variance', 'seen')
  assert {k: after[k] for k in names} == {k: history[k] for k in names}
  assert after['in_a_row'] == after['skipped'] == 3
  # The healthy step behind them is applied at once, and only the count in all remains.
  (healthy,), end = _after([3.0], history=after)
  assert healthy and end['in_a_row'] == 0 and end['skipped'] == 3


def test_the_history_is_of_recent_logarithms():
  """Against numpy: a mean of all up to the window, exponential behind it."""
  norms = _calm(40)
  _, history = _after(norms)
  assert history['mean'] == pytest.approx(np.log(norms).mean(), abs=1e-5)
  assert history['variance'] == pytest.approx(np.log(norms).var(), rel=1e-3)
  # Another level, reached in small steps, is what is usual after a while.
  applied, history = _after(np.exp(np.linspace(0, 4, 1000)))
  assert all(applied) and 3.5 < history['mean'] < 4


def test_a_spike_is_far_in_deviations_and_in_size():
  _, history = _after(_calm())  # deviations of 0.1: six are a factor of 1.8
  last = lambda norm, **fields: _after([norm], GuardConfig(**fields), history)[0][0]
  assert last(3 * 3.5) and not last(3 * 5)
  assert last(3 * 5, deviations=20) and last(1e30, deviations=0)
  assert not last(NAN, deviations=0)
  # Of a restless run, the deviations count.
  _, history = _after(np.exp(np.random.default_rng(1).normal(size=100)))
  assert last(20) and not last(1e4)


def test_a_run_that_begins_is_not_compared():
  applied, _ = _after([1.0] * 10 + [1000.0])
  assert all(applied)


def test_norms_of_zero_are_applied_and_say_nothing():
  _, history = _after([0.0] * 200)
  assert history['seen'] == 0 and history['mean'] == 0
  applied, _ = _after([5.0] * 100 + [0.0] * 100 + [5.0])
  assert all(applied)


def test_a_loss_that_is_not_finite_is_refused_whatever_the_gradient():
  applied, _ = _after([1.0], loss=NAN)
  assert applied == [False]


def _linear(variables, batch, key, counts):
  w = variables['params']['w']['weight']
  error = (batch['x'] @ w - batch['y']) ** 2
  return error.sum(), {'loss': (error.sum(), jnp.float32(error.size))}


def _batches(count):
  rng = np.random.default_rng(0)
  return [
    {'x': rng.normal(size=(8, 4)).astype('f'), 'y': rng.normal(size=8).astype('f')}
    for _ in range(count)
  ]


def _steps(batches, microbatches=1, mesh=None, guarded=CONFIG):
  """States and metrics of some steps of Adam."""
  optimizer = optax.adam(0.1)
  params = {'w': {'weight': jnp.zeros(4)}}
  current = {'step': jnp.int32(0), 'params': params, 'opt_state': optimizer.init(params)}
  current[guard.NAME] = guard.fresh()
  train_step = jax.jit(
    step.make_train_step(
      _linear, optimizer, microbatches=microbatches, seed=0, guarded=guarded
    )
  )
  states, metrics = [], []
  for batch in batches:
    placed = jax.device_put(batch, mesh) if mesh else batch
    current, found = jax.block_until_ready(train_step(current, {}, placed))
    states.append(jax.device_get(current))
    metrics.append(jax.device_get(found))
  return states, metrics


def _same(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


@pytest.mark.parametrize('microbatches', [1, 2])
@pytest.mark.parametrize('bad', [NAN, INF, 1e30])
def test_a_step_that_is_left_out_changes_neither_parameters_nor_moments(bad, microbatches):
  """One bad number in one row; 1e30, whose square is none, too."""
  batches = _batches(4)
  poisoned = {**batches[2], 'x': batches[2]['x'].copy()}
  poisoned['x'][5, 1] = bad
  states, metrics = _steps([*batches[:2], poisoned, batches[3]], microbatches)
  for name in ('params', 'opt_state'):
    assert _same(states[2][name], states[1][name])
  assert [int(s['step']) for s in states] == [1, 2, 3, 4]
  assert [int(s[guard.NAME]['skipped']) for s in states] == [0, 0, 1, 1]
  # As if it had never been; and nothing of it is in any mean.
  straight, _ = _steps([*batches[:2], batches[3]], microbatches)
  assert _same(states[3]['params'], straight[2]['params'])
  assert {k: v for k, v in metrics[2].items() if guard.NAME not in k} == {
    'loss': (0, 0),
    'gradient_norm': (0, 0),
  }


def test_all_devices_leave_out_the_same():
  batches = _batches(3)
  batches[1]['x'][7] = NAN  # a row of the last device alone
  mesh = jax.sharding.NamedSharding(
    jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)),
    jax.sharding.PartitionSpec('data'),
  )
  states, _ = _steps(batches, mesh=mesh)
  one, _ = _steps(batches)
  assert int(states[-1][guard.NAME]['skipped']) == 1
  np.testing.assert_allclose(
    states[-1]['params']['w']['weight'], one[-1]['params']['w']['weight'], rtol=1e-5
  )


def test_a_state_without_a_guard_is_not_guarded():
  optimizer = optax.sgd(0.1)
  params = {'w': {'weight': jnp.zeros(4)}}
  current = {'step': jnp.int32(0), 'params': params, 'opt_state': optimizer.init(params)}
  train_step = step.make_train_step(_linear, optimizer, microbatches=1, seed=0)
  batch = _batches(1)[0]
  batch['x'][0] = NAN
  new, found = jax.jit(train_step)(current, {}, batch)
  assert {*new} == {*current} and {*found} == {'loss', 'gradient_norm'}
  assert np.isnan(new['params']['w']['weight']).all()


STEPS = 8


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp('guarded')
  write_words(folder, 20)
  return folder


def _config(corpus, run, **fields):
  sizes = dict(num_layers=1, hidden_size=16, num_heads=2, num_kv_heads=1, head_size=4)
  recipe = Pretraining(
    task='glm_causal',
    feature_lengths={'tokens': 32},
    corpus=CorpusConfig(corpus=f'{corpus}/*.txt', cache_dir=str(corpus / 'cache')),
    vocabulary=VocabularyConfig(path='bytes'),
  )
  return TrainConfig(
    **{
      'model': ChatGLM2Config(**sizes, mlp_size=16, vocab_size=384, max_positions=32),
      'recipe': recipe,
      'optimizer': OptimizerConfig(learning_rate=0.01, warmup_steps=1, decay_steps=STEPS),
      'evaluation': EvaluationConfig(every=100, examples=4, fill=0),
      'checkpoint': CheckpointConfig(every=2),
      'mesh': sharding.MeshConfig(data=1),
      'batch_size': 4,
      'train_steps': STEPS,
      'model_dir': str(run),
      'log_every': 1,
      **fields,
    }
  )


def _nans(weights):
  return weights * NAN


@pytest.fixture
def runs(corpus, tmp_path, monkeypatch):
  """runs(name, poisoned, **fields): a run whose batches are bad in some steps."""
  one, make_mesh, build = jax.devices()[:1], sharding.make_mesh, program.build
  monkeypatch.setattr(sharding, 'make_mesh', lambda c, devices=one: make_mesh(c, devices))

  def run(name, poisoned=(), bad=_nans, **fields):
    def built(*arguments):
      made = build(*arguments)

      def train_step(current, frozen, batch):
        if int(current['step']) + 1 in poisoned:
          batch = batch._replace(loss_weights=bad(batch.loss_weights))
        return made.train_step(current, frozen, batch)

      return made._replace(train_step=train_step)

    monkeypatch.setattr(program, 'build', built)
    folder = tmp_path / name
    train(_config(corpus, folder, **fields), '')
    return folder

  return run


def _saved(folder, number):
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with ocp.StandardCheckpointer() as reader:

    def read(item):
      path = folder / 'checkpoints' / str(number) / item
      tree = reader.metadata(path).item_metadata.tree
      shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one)
      return jax.device_get(reader.restore(path, jax.tree.map(shape, tree)))

    return {'params': read('params'), **read('optimizer')}


def _steps_saved(folder):
  return sorted(int(path.name) for path in (folder / 'checkpoints').iterdir())


def test_a_run_goes_on_behind_a_bad_batch_and_says_so(runs, capsys):
  folder = runs('bad', poisoned=[4])
  said = capsys.readouterr().out
  assert 'step 4: the update was left out, for the loss was nan (rows 12 to 15' in said
  assert said.count('left out') == 1
  found = _saved(folder, STEPS)
  assert int(found[guard.NAME]['skipped']) == 1
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found['params']))
  records = [json.loads(line) for line in (folder / 'metrics.jsonl').open()]
  of_step = {r['step']: r for r in records if r['kind'] == 'train'}
  assert 'loss' not in of_step[4] and of_step[4]['skipped_so_far'] == 1
  assert of_step[5]['skipped_so_far'] == 1 and 'skipped_so_far' not in of_step[3]


def _rates(first, end):
  rate = schedule(
    OptimizerConfig(learning_rate=0.01, warmup_steps=1, decay_steps=STEPS), STEPS
  )
  return [float(rate(update)) for update in range(first, end)]


@pytest.mark.slow
def test_a_step_left_out_is_one_that_is_skipped(runs, tmp_path):
  """The data of others stay where they were; the moments, too."""
  bad = _saved(runs('bad', poisoned=[4, 5]), STEPS)
  skipped = _saved(runs('skipped', skip_steps=((4, 5),)), STEPS)
  for name in ('params', 'opt_state'):
    assert _same(bad[name], skipped[name])
  assert bad[guard.NAME]['skipped'] == skipped[guard.NAME]['skipped'] == 2
  rates = [
    [r['learning_rate'] for r in writer.read(str(tmp_path / name), 'train')[5:]]
    for name in ('bad', 'skipped')
  ]
  # The schedule goes on where the updates are.
  assert rates[0] == rates[1] == [pytest.approx(rate, abs=1e-6) for rate in _rates(3, 6)]
  straight = _saved(runs('straight'), STEPS)
  assert not _same(straight['params'], skipped['params'])


def _exploding(weights):
  """Of a finite loss: they sum to little, by which the gradient is divided."""
  return weights * jnp.where(jnp.arange(weights.shape[1]) % 2, 1, -0.99)


@pytest.mark.parametrize(
  'bad,saved', [pytest.param(_nans, [2], marks=pytest.mark.slow), (_exploding, [2, 4])]
)
def test_too_many_in_a_row_stop_the_run(runs, bad, saved, monkeypatch, tmp_path):
  """What computes a finite loss is saved, and goes on; what does not, is not."""
  monkeypatch.setattr(guard, '_WINDOW', 1)
  settings = dict(guard=GuardConfig(most=2, deviations=1.0))
  with pytest.raises(guard.TooManyLeftOut, match='steps 3 to 4 .rows 8 to 15') as error:
    runs('run', [3, 4], bad, **settings)
  assert error.value.sound == (bad is _exploding)
  assert _steps_saved(tmp_path / 'run') == saved
  if bad is _exploding:
    # One more would be too many still: what it has to leave out stands in the message.
    assert 'TrainConfig.skip_steps=((5, 6),)' in str(error.value)
    assert _same(
      _saved(tmp_path / 'run', 4)['params'], _saved(tmp_path / 'run', 2)['params']
    )
  done = runs('run', **settings)
  assert int(_saved(done, STEPS)[guard.NAME]['in_a_row']) == 0


@pytest.mark.slow
def test_killed_between_two_that_are_left_out_it_stops_at_the_same_step(runs, monkeypatch):
  """The count in a row stands in the checkpoint."""
  monkeypatch.setattr(guard, '_WINDOW', 1)
  settings = dict(guard=GuardConfig(most=2, deviations=1.0))
  settings['checkpoint'] = CheckpointConfig(every=1)
  runs('run', [3], _exploding, train_steps=3, **settings)
  with pytest.raises(guard.TooManyLeftOut, match='steps 3 to 4'):
    runs('run', [4], _exploding, **settings)


@pytest.mark.slow
def test_a_checkpoint_from_before_goes_on_with_a_fresh_history(runs, monkeypatch):
  """Its optimizer has none: the state is otherwise the same."""
  before = state.init_state
  without = lambda *a: {k: v for k, v in before(*a).items() if k != guard.NAME}
  with monkeypatch.context() as patch:
    patch.setattr(state, 'init_state', without)
    folder = runs('old', train_steps=4)
  assert guard.NAME not in _saved(folder, 4)
  found = _saved(runs('old'), STEPS)
  assert int(found[guard.NAME]['seen']) == 4
  assert _same(found['params'], _saved(runs('straight'), STEPS)['params'])


@pytest.mark.parametrize('pairs', [((0, 3),), ((5, 4),), ((1, 2), (-3, -1))])
def test_stretches_that_are_none_are_refused(corpus, tmp_path, pairs):
  with pytest.raises(configs.UserError, match='pairs of a first and a last step'):
    _config(corpus, tmp_path, skip_steps=pairs)
