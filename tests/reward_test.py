"""Reward models: through the command, beside NumPy, and in Python."""

import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tuned
from commands import refused
from preference_test import T, _batch, _lines

import glm_jax
from glm_jax import checkpoints, sharding
from glm_jax.batch import Batch
from glm_jax.configs import UserError
from glm_jax.recipes.reward import Reward, at_end, correlation
from glm_jax.training import metrics, writer

LN2 = math.log(2)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp('rewarded')
  for family in ('chatglm3', 'chatglm'):
    tuned.checkpoint(folder, family)
  tuned.write(folder / 'ranked.jsonl', _lines(160))
  tuned.write(folder / 'held_out.jsonl', _lines(24, first=300))
  return folder


def _run(folder, *bindings, family='chatglm3', **where):
  """A run on runs/reward.gin."""
  small = [
    f"CorpusConfig.validation='{folder / 'held_out.jsonl'}'",
    "TASK_FEATURE_LENGTHS={'tokens': 128}",
    'BATCH_SIZE=8',
    'TRAIN_STEPS=4',
    'OptimizerConfig.learning_rate=3e-3',
    'EvaluationConfig.examples=0',
    'EvaluationConfig.every=100',
  ]
  return tuned.of_stage(
    'reward',
    'train',
    folder,
    *small,
    *bindings,
    base=folder / f'{family}_base',
    corpus=folder / 'ranked.jsonl',
    **where,
  )


def _conversations(lines, name):
  return [
    [
      {'role': 'user', 'content': line['prompt']},
      {'role': 'assistant', 'content': line[name]},
    ]
    for line in lines
  ]


@pytest.mark.slow
@pytest.mark.parametrize('family', ['chatglm3', 'chatglm'])
def test_a_reward_is_what_was_validated(place, family):
  """Answers that shared a row in training are apart here: what is packed leaks nothing."""
  bindings = [f"Reward.template='{family}'", 'TRAIN_STEPS=120', 'TrainConfig.log_every=40']
  done = _run(place, *bindings, family=family, run=family)
  assert done.returncode == 0, done.stderr
  first, *_, last = writer.read(str(place / family), 'validation')
  assert first['loss'] == pytest.approx(LN2, abs=1e-6) and first['accuracy'] == 0.5
  assert last['accuracy'] >= 0.9, last
  model = glm_jax.load(place / family)
  lines = _lines(24, first=300)
  chosen, rejected = (
    model.reward(_conversations(lines, name), family) for name in ('chosen', 'rejected')
  )
  assert chosen.mean() == pytest.approx(last['reward/chosen'], abs=1e-4)
  assert rejected.mean() == pytest.approx(last['reward/rejected'], abs=1e-4)
  assert (chosen > rejected).mean() == pytest.approx(last['accuracy'])
  # One at a time is the same: nothing depends on what stands beside it.
  one = model.reward(_conversations(lines[3:4], 'chosen'), family)
  np.testing.assert_allclose(one, chosen[3:4], atol=1e-5)


@pytest.mark.slow
def test_devices_and_micro_batches_balance_the_same_batch(place, monkeypatch):
  found, make_mesh = {}, sharding.make_mesh
  for name, count, more in (
    ('one', 1, ()),
    ('parts', 1, ('TrainConfig.microbatches=4',)),
    ('eight', 8, ('MeshConfig.fsdp=4', 'MeshConfig.tensor=2')),
  ):
    here = jax.devices()[:count]
    monkeypatch.setattr(sharding, 'make_mesh', lambda c, d=None: make_mesh(c, d or here))
    done = _run(place, 'Reward.length_balanced=True', *more, run=name)
    assert done.returncode == 0 and f'on {count} cpu' in done.stdout, done.stderr
    found[name] = [r['loss'] for r in writer.read(str(place / name), 'train')]
  for name in ('parts', 'eight'):
    np.testing.assert_allclose(found[name], found['one'], rtol=1e-4)


@pytest.mark.slow
def test_adapters_and_the_vector_are_trained_and_read(place):
  lora = ('--gin_file=gin_configs/runs/lora.gin',)
  done = _run(place, run='adapted', flags=lora)
  assert done.returncode == 0, done.stderr
  model = glm_jax.load(place / 'adapted')
  assert np.abs(model.reward(_conversations(_lines(2), 'chosen'))).min() > 0


class _Values:
  """A model that makes of each token what it is worth, [B, T, 1]."""

  def apply(self, variables, *_, head, deterministic, rngs):
    return head(variables['params']['worth'][..., None], None), None


SETTINGS = [{}, {'margin': 0.5}, {'squares': 0.1}, {'length_balanced': True}]


@pytest.mark.parametrize('settings', SETTINGS, ids=str)
def test_losses_and_gradients_are_those_of_numpy(settings):
  recipe = Reward(feature_lengths={'tokens': T}, **settings)
  batch = _batch()
  # A third pair, alike in length to none of the others.
  weights, start = batch.loss_weights.copy(), batch.key_start.copy()
  weights[2, 1:3], weights[2, 5:6], start[2] = 1, 1, [0] * 4 + [4] * 5
  batch = batch._replace(loss_weights=weights, key_start=start)
  worth = np.random.default_rng(1).normal(size=batch.tokens.shape)
  loss, counts = recipe.loss(None, _Values()), recipe.counts(batch)
  # Behind the last target of each; better answers have 2, 4, 2 tokens, others 3, 1, 1.
  ends = np.array([[4, 9], [5, 7], [3, 6]])
  # The end of the second answer of the first row is not read: its row is full.
  ends[0, 1] = -1

  def mean(worth):
    variables = {'params': {'worth': worth, 'value': {'weight': jnp.ones(1)}}}
    total, metrics = loss(variables, batch, None, counts)
    return total / metrics['loss'][1], metrics

  with jax.enable_x64(True):
    run = jax.value_and_grad(mean, has_aux=True)
    (value, metrics), gradient = run(jnp.asarray(worth))
  of = lambda i, j: worth[i, ends[i, j]] if ends[i, j] >= 0 else 0.0
  share = [1.5 / 1, 1.5 / 2, 1.5 / 2] if recipe.length_balanced else [1, 1, 1]
  expected, slope, right = 0.0, np.zeros_like(worth), []
  for i in range(3):
    a, b = of(i, 0), of(i, 1)
    d = a - b - recipe.margin
    expected += share[i] * (np.log1p(np.exp(-d)) + recipe.squares * (a * a + b * b)) / 3
    for j, (sign, x) in enumerate(((1, a), (-1, b))):
      if ends[i, j] >= 0:
        by = -sign / (1 + np.exp(d)) + 2 * recipe.squares * x
        slope[i, ends[i, j]] += share[i] * by / 3
    right.append(float(a > b))
  assert float(value) == pytest.approx(expected, abs=1e-6)
  np.testing.assert_allclose(gradient, slope, atol=1e-6)
  means = {k: float(s) / float(n) for k, (s, n) in metrics.items()}
  assert means['accuracy'] == pytest.approx(np.mean(right))
  assert means['accuracy/shorter'] == right[0]
  assert means['accuracy/longer'] == pytest.approx(np.mean(right[1:]))


def _scored_batch(rng, slope):
  """Pairs of random lengths, one row of padding, and what each token is worth."""
  rows, length = 9, 48
  start, weights = np.zeros((2, rows, length), np.int32)
  sizes = rng.integers(1, 20, (rows, 2))
  sizes[-1] = 0
  worth = rng.normal(size=(rows, length)) + 3
  for i, (first, second) in enumerate(sizes):
    weights[i, 2 : 2 + first] = weights[i, 26 : 26 + second] = 1
    start[i, 24:] = 24
    worth[i, [2 + first, 26 + second]] += slope * np.array([first, second])
  scores = worth[np.arange(rows)[:, None], sizes + np.array([2, 26])]
  zeros = np.zeros_like(start)
  batch = Batch(zeros, zeros, weights.astype(np.float32), zeros, zeros, start, zeros, zeros)
  return batch, worth.astype(np.float32), scores[:-1].ravel(), sizes[:-1].ravel()


@pytest.mark.parametrize('slope', [-0.3, 0.0, 0.02, 1.0])
def test_the_correlation_of_score_and_length_is_that_of_numpy(slope):
  """Over several batches: of moments, and not a mean of the batches' own."""
  recipe = Reward(feature_lengths={'tokens': T})
  loss, rng, total, found = recipe.loss(None, _Values()), np.random.default_rng(3), {}, []
  for _ in range(4):
    batch, worth, scores, sizes = _scored_batch(rng, slope)
    variables = {'params': {'worth': worth, 'value': {'weight': jnp.ones(1)}}}
    total = metrics.add(total, loss(variables, batch, None, recipe.counts(batch))[1])
    found.append((scores, sizes))
  told = recipe.told(metrics.averages(total))
  expected = np.corrcoef(*map(np.concatenate, zip(*found, strict=True)))[0, 1]
  assert told['length_correlation'] == pytest.approx(expected, abs=1e-4)
  assert abs(expected) > 0.8 if abs(slope) > 0.2 else abs(expected) < 0.3
  # Moments are nobody's to read.
  assert {*told} == {
    'loss',
    'accuracy',
    'accuracy/longer',
    'accuracy/shorter',
    'ahead',
    'length_correlation',
    'reward/chosen',
    'reward/rejected',
  }


def test_scores_that_are_all_the_same_have_no_correlation():
  assert correlation(0, 5, 0, 26, 0) == correlation(2, 5, 4 + 1e-7, 26, 10) == 0


def _biased(count, longer, kind, first=0):
  """Of these shares, the better answer is the longer one, and the one that is kind."""
  rng, found = random.Random(first), []
  for n in range(first, first + count):
    better, worse = ('a kind one', 'a rude one')[:: 1 if rng.random() < kind else -1]
    words = ['', ', so to say, as it were'][:: 1 if rng.random() < longer else -1]
    better, worse = better + words[1] + '.', worse + words[0] + '.'
    found.append({'prompt': f'is it {n}?', 'chosen': better, 'rejected': worse})
  return found


@pytest.mark.slow
def test_length_that_tells_is_reported_and_balanced_away(place):
  """Most better answers are the longer ones; of what is held out, every other is."""
  tuned.write(place / 'biased.jsonl', _biased(640, longer=0.85, kind=0.7))
  tuned.write(place / 'fair.jsonl', _biased(80, longer=0.5, kind=1, first=700))
  last = {}
  for balanced in (False, True):
    run = f'biased_{balanced}'
    done = tuned.of_stage(
      'reward',
      'train',
      place,
      f"CorpusConfig.validation='{place / 'fair.jsonl'}'",
      f'Reward.length_balanced={balanced}',
      "TASK_FEATURE_LENGTHS={'tokens': 128}",
      'BATCH_SIZE=16',
      'TRAIN_STEPS=80',
      'OptimizerConfig.learning_rate=3e-3',
      'EvaluationConfig.examples=0',
      'TrainConfig.log_every=40',
      base=place / 'chatglm3_base',
      corpus=place / 'biased.jsonl',
      run=run,
    )
    assert done.returncode == 0, done.stderr
    assert 'length_correlation' in done.stdout and 'moment' not in done.stdout
    last[balanced] = writer.read(str(place / run), 'validation')[-1]
  biased, fair = last[False], last[True]
  assert biased['accuracy/longer'] - biased['accuracy/shorter'] > 0.8, biased
  assert biased['length_correlation'] > 0.6, biased
  assert fair['accuracy/longer'] - fair['accuracy/shorter'] < 0.2, fair
  assert abs(fair['length_correlation']) < 0.3, fair
  assert fair['accuracy'] > biased['accuracy'] + 0.3


@pytest.mark.slow
def test_accuracy_is_told_by_corpus(place):
  """Of a mixture in which nine of ten want kind answers, and the tenth a rude one."""
  for name, kind in (('many', 1), ('few', 0)):
    tuned.write(place / f'{name}.jsonl', _biased(200, longer=0.5, kind=kind))
  files = {name: f'{place}/{name}.jsonl' for name in ('many', 'few')}
  bindings = (
    f'MixtureConfig.corpora={files}',
    "MixtureConfig.rates={'many': 0.9, 'few': 0.1}",
    'CorpusConfig.validation_fraction=0.1',
    'TRAIN_STEPS=60',
  )
  done = tuned.of_stage(
    'reward',
    'train',
    place,
    *bindings,
    "TASK_FEATURE_LENGTHS={'tokens': 128}",
    'BATCH_SIZE=8',
    'OptimizerConfig.learning_rate=3e-3',
    'EvaluationConfig.examples=0',
    "CheckpointConfig.best_metric='corpus/few/accuracy'",
    base=place / 'chatglm3_base',
    run='mixed',
  )
  assert done.returncode == 0, done.stderr
  *_, last = records = writer.read(str(place / 'mixed'), 'validation')
  many, few = (last[f'corpus/{name}/accuracy'] for name in ('many', 'few'))
  assert many > 0.9 and few < 0.1, last
  assert f'(accuracy of corpora: many {many:.3f}  few {few:.3f})' in done.stdout
  names = {name for name in last if name not in ('step', 'kind')}
  whole = {name for name in names if not name.startswith('corpus/')}
  assert {'accuracy/shorter', 'length_correlation', 'reward/chosen'} < whole
  assert names - whole == {f'corpus/{name}/{k}' for name in files for k in whole}
  meta = checkpoints.read_meta(checkpoints.find(str(place / 'mixed')))
  assert meta['stopping']['metric'] == 'corpus/few/accuracy'
  best = max(record['corpus/few/accuracy'] for record in records)
  assert meta['stopping']['best'] == pytest.approx(best)
  done = _run(place, "CheckpointConfig.best_metric='corpus/none/accuracy'", run='no_such')
  refused(done, "got 'corpus/none/accuracy'; choose among accuracy, ")
  assert not (place / 'no_such').exists()


def test_a_row_that_fills_up_a_batch_has_no_end():
  weights = jnp.array([[0.0, 1, 1, 0], [0, 0, 0, 0]])
  assert at_end(weights).tolist() == [[False, False, False, True], [False] * 4]


def test_what_has_no_reward_is_refused(place):
  model = glm_jax.load(place / 'chatglm3_base')
  with pytest.raises(UserError, match='must be those of a reward model'):
    model.reward(_conversations(_lines(1), 'chosen'))
  done = _run(place, "CorpusConfig.too_long='truncate_answer'", run='refused')
  refused(done, 'must be whole')
  assert not (place / 'refused').exists()
