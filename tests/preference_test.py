"""Preferences through the commands, and their losses beside NumPy's."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tuned
from commands import gin, refused, snapshot
from runs import params

from glm_jax import checkpoints, sharding
from glm_jax.batch import Batch
from glm_jax.models import ComputeConfig, build
from glm_jax.planning import shapes
from glm_jax.recipes.preference import Preference
from glm_jax.training import program, state, writer
from glm_jax.training.adapters import LoRAConfig
from glm_jax.training.config import TrainConfig
from glm_jax.training.losses import LossConfig

LN2 = math.log(2)


def _lines(count, first=0):
  """What is preferred says whether the number is even."""
  found = []
  for n in range(first, first + count):
    answers = ['an even one.', 'an odd one, that is.']
    better, worse = answers if n % 2 == 0 else answers[::-1]
    line = {'prompt': f'what is {n}?', 'chosen': better, 'rejected': worse}
    found.append(line)
  return found


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp('preferred')
  for family in ('chatglm3', 'chatglm', 'glm'):
    tuned.checkpoint(folder, family)
  tuned.write(folder / 'ranked.jsonl', _lines(120))
  tuned.write(folder / 'even.jsonl', _lines(240)[::2])
  tuned.write(folder / 'lines.jsonl', tuned.lines(60))
  same = [{**line, 'rejected': line['chosen']} for line in _lines(60)]
  tuned.write(folder / 'same.jsonl', same)
  return folder


def _run(command, folder, *bindings, corpus=None, **where):
  """A command on runs/dpo.gin."""
  small = [
    "TASK_FEATURE_LENGTHS={'tokens': 128}",
    'BATCH_SIZE=8',
    'OptimizerConfig.learning_rate=1e-3',
  ]
  corpus = corpus or folder / 'ranked.jsonl'
  return tuned.of_stage('dpo', command, folder, *small, *bindings, corpus=corpus, **where)


LORA = ('--gin_file=gin_configs/runs/lora.gin',)
CONTINUED = (*LORA, *gin("TrainConfig.init_adapters='continue'"))


@pytest.fixture(scope='module')
def adapted(place):
  """A run of fine-tuning whose adapters have learnt something."""
  rate = 'OptimizerConfig.learning_rate=0.1'
  done = tuned.run('train', place, rate, run='adapted', flags=LORA)
  assert done.returncode == 0, done.stderr
  return place / 'adapted'


def _begins_at_its_reference(run):
  """The losses of pairs are convex: their mean is ln 2 at no other margins than 0."""
  for record in (writer.read(str(run), 'validation')[0], writer.read(str(run), 'train')[0]):
    assert record['loss'] == pytest.approx(LN2, abs=1e-6)
    assert record['accuracy'] == 0.5
    for name in ('margin', 'reward/chosen', 'reward/rejected'):
      assert record[name] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('family', ['chatglm', 'glm'])
def test_a_prefix_model_begins_at_its_reference(place, family):
  named = {
    'glm': "Preference.blank='{prompt} [MASK]'",
    'chatglm': "Preference.template='chatglm'",
  }
  done = _run(
    'train',
    place,
    named[family],
    base=place / f'{family}_base',
    corpus=place / 'even.jsonl',
    run=f'prefix_{family}',
  )
  assert done.returncode == 0, done.stderr
  _begins_at_its_reference(place / f'prefix_{family}')
  losses = [r['loss'] for r in writer.read(str(place / f'prefix_{family}'), 'validation')]
  assert losses[-1] < losses[0]


@pytest.mark.slow
def test_adapters_of_fine_tuning_are_their_own_reference(place, adapted):
  """And not the model without them, which says something else."""
  done = _run('train', place, base=adapted, run='continued', flags=CONTINUED)
  assert done.returncode == 0, done.stderr
  _begins_at_its_reference(place / 'continued')
  learnt = [leaf for leaf in _trained(adapted) if np.abs(leaf).max() > 1e-3]
  assert learnt


def _trained(run):
  folder = checkpoints.find(str(run))
  held = checkpoints.stored_leaves(folder)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = {}
  for path, leaf in held.items():
    if path[-1] == 'b':
      inner = shapes
      for name in path[:-1]:
        inner = inner.setdefault(name, {})
      inner[path[-1]] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
  found = checkpoints.read_params(folder, shapes, some=True, merge=False)
  return jax.tree.leaves(jax.tree.map(np.asarray, found))


@pytest.mark.slow
@pytest.mark.parametrize('way', ['full', 'adapters'])
def test_a_stopped_run_goes_on_to_the_bit(place, adapted, monkeypatch, way):
  """Its reference is read again from where it began, not from where it stands."""
  base, flags = (None, ()) if way == 'full' else (adapted, CONTINUED)
  bindings = ("OptimizerConfig.schedule='constant'", 'CheckpointConfig.every=2')
  for run, ends in ((f'straight_{way}', [4]), (f'stopped_{way}', [2, 4])):
    for end in ends:
      steps = f'TRAIN_STEPS={end}'
      done = _run('train', place, *bindings, steps, base=base, run=run, flags=flags)
      assert done.returncode == 0, done.stderr
  assert 'resumed' in done.stdout
  straight, stopped = place / f'straight_{way}', place / f'stopped_{way}'
  of = lambda run: {r['step']: r['loss'] for r in writer.read(str(run), 'train')}
  assert of(straight) == of(stopped) and {*of(stopped)} == {1, 2, 3, 4}
  monkeypatch.setattr('runs.STEPS', 4)
  for a, b in zip(*(jax.tree.leaves(params(r)) for r in (straight, stopped)), strict=True):
    np.testing.assert_array_equal(a, b)
  if way == 'full':
    other = ("Preference.kind='ipo'",)
    done = _run('train', place, *bindings, *other, 'TRAIN_STEPS=5', run='straight_full')
    refused(done, 'preference.kind', "was 'sigmoid' and is now 'ipo'")
    # Nor may it be held against something else than it began with.
    steps = 'TRAIN_STEPS=5'
    done = _run('train', place, *bindings, steps, base=stopped, run='straight_full')
    refused(done, 'reference.fingerprint was')


@pytest.mark.slow
def test_devices_and_micro_batches_change_nothing(place, monkeypatch):
  """A pair is one row: nothing parts it. Terms of pairs and of tokens add up alike."""
  found, make_mesh = {}, sharding.make_mesh
  for name, count, bindings in (
    ('one', 1, ()),
    ('parts', 1, ('TrainConfig.microbatches=4',)),
    ('eight', 8, ('MeshConfig.fsdp=4', 'MeshConfig.tensor=2')),
  ):
    here = jax.devices()[:count]
    monkeypatch.setattr(sharding, 'make_mesh', lambda c, d=None: make_mesh(c, d or here))
    more = ('Preference.sft_weight=0.5', 'TRAIN_STEPS=5')
    done = _run('train', place, *bindings, *more, run=name)
    assert done.returncode == 0, done.stderr
    assert f'on {count} cpu' in done.stdout
    found[name] = writer.read(str(place / name), 'train')
  names = ('loss', 'sft_loss', 'margin', 'accuracy', 'reward/chosen', 'gradient_norm')
  for other in ('parts', 'eight'):
    for a, b in zip(found['one'], found[other], strict=True):
      for name in names:
        assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-4), (other, name)


@pytest.mark.slow
def test_what_is_preferred_is_learnt_and_held_out_pairs_show_it(place):
  held_out = tuned.write(place / 'held_out.jsonl', _lines(24, first=300))
  done = _run(
    'train',
    place,
    f"CorpusConfig.validation='{held_out}'",
    'TRAIN_STEPS=120',
    'OptimizerConfig.learning_rate=3e-3',
    'EvaluationConfig.examples=0',
    'TrainConfig.log_every=40',
    run='learnt',
  )
  assert done.returncode == 0, done.stderr
  first, last = writer.read(str(place / 'learnt'), 'validation')
  assert first['accuracy'] == 0.5 and last['accuracy'] >= 0.9, (first, last)
  assert last['reward/chosen'] > last['reward/rejected']


@pytest.mark.slow
def test_shards_train_as_their_files_do(place):
  assert _run('train', place, run='files').returncode == 0
  flags = [f'--output_dir={place}/shards', '--processes=1', '--shards=2']
  done = _run('make_shards', place, run='unused', flags=flags)
  assert done.returncode == 0, done.stderr
  of = lambda run: [r['loss'] for r in writer.read(str(place / run), 'train')]
  done = _run('train', place, corpus=f'shards:{place}/shards', run='sharded')
  assert done.returncode == 0 and of('files') == of('sharded'), done.stderr
  done = tuned.run('train', place, corpus=f'shards:{place}/shards', run='other')
  refused(done, 'must be of what this run reads, chatglm3', 'ranked answers to chatglm3')


def test_preview_shows_pairs(place):
  flags = [f'--output={place}/mask.png', '--examples=1']
  done = _run('preview', place, flags=flags)
  assert done.returncode == 0, done.stderr
  assert re.search(r'chosen 0\.\.\d+: .*\?<\|assistant\|>⟦↵ an .*</s>⟧', done.stdout)
  assert re.search(r'rejected \d+\.\.\d+: .*\?<\|assistant\|>⟦↵ an .*</s>⟧', done.stdout)


REFUSED = [
  (('Preference.beta=0',), {}, ['Preference.beta must be']),
  (("Preference.kind='kto'",), {}, ['Preference.kind must be one of']),
  (
    ('Preference.smoothing=0.1', "Preference.kind='ipo'"),
    {},
    ["must be of the kind 'sigmoid'"],
  ),
  (("CorpusConfig.too_long='truncate_answer'",), {}, ['must be whole']),
  (('CorpusConfig.packed=False',), {}, ['must hold two documents']),
  (('LossConfig.z_loss=1e-4',), {}, ['must be 0 where answers are compared']),
  (
    ('TrainConfig.adapters=@LoRAConfig()', 'LoRAConfig.dropout=0.1'),
    {},
    ['without dropout', '0.1'],
  ),
  (("Preference.blank='{prompt} [MASK]'",), {}, ['of a model that fills them']),
  (
    ("Preference.blank='{prompt} [MASK]'", "Preference.template='chatglm'"),
    {},
    ['by a chat template or a blank'],
  ),
  (('TrainConfig.adapters=@PTuningConfig()',), {}, ['a row of preferences holds two']),
  ((), {'corpus': 'same'}, ['must hold a document', 'with tied, equal or empty answers']),
  ((), {'corpus': 'lines'}, ['must be named', 'lines.jsonl line 1']),
  (("TASK_FEATURE_LENGTHS={'tokens': 24}",), {}, ['longer than a row left out']),
  (
    ("TASK_FEATURE_LENGTHS={'tokens': 24}", "CorpusConfig.too_long='error'"),
    {},
    ['must fit a row', 'ranked.jsonl line '],
  ),
  (
    ("VocabularyConfig.path='bytes'", "Preference.template='chatglm'"),
    {},
    ["must be of the model's family"],
  ),
]


@pytest.mark.parametrize('bindings,how,words', REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_compared_is_refused_and_nothing_is_written(
  place, bindings, how, words
):
  corpus = place / f'{how.get("corpus", "ranked")}.jsonl'
  before = snapshot(place)
  done = _run('train', place, *bindings, corpus=corpus, run='refused')
  refused(done, *words)
  assert snapshot(place) == before and not (place / 'refused').exists()


B, T, V = 3, 9, 5


class _Table:
  """A model whose parameters are its logits [B, T, V]."""

  def apply(self, variables, *_, head=None, deterministic, rngs):
    assert deterministic and rngs is None
    logits = variables['params']['logits']
    return (logits if head is None else head(logits, jnp.eye(V)), None)


def _batch():
  rng = np.random.default_rng(0)
  start = np.array([[0] * 4 + [4] * 5, [0] * 5 + [5] * 3 + [0], [0] * 9])
  weights = np.zeros((B, T), np.float32)
  weights[0, 2:4] = weights[0, 6:9] = weights[1, 1:5] = weights[1, 6:7] = 1
  targets = rng.integers(0, V, (B, T))
  zeros = np.zeros((B, T), np.int32)
  return Batch(zeros, targets, weights, zeros, zeros, start, zeros, zeros)


def _in_numpy(logits, began, batch, recipe):
  """The mean loss of the two pairs, and its gradient in the logits, by hand."""
  softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
  onehot = np.eye(V)[batch.targets]
  log_p = lambda x: np.log((softmax(x) * onehot).sum(-1))
  first = [(2, 4), (1, 5)]
  second = [(6, 9), (6, 7)]
  total, gradient = 0.0, np.zeros_like(logits)
  tokens = sum(b - a for a, b in first)
  gained = log_p(logits) - log_p(began)
  # d log p / d logits
  slope = onehot - softmax(logits)
  for i, ((a, b), (c, d)) in enumerate(zip(first, second, strict=True)):
    n, m = (b - a, d - c) if recipe.length_normalised else (1, 1)
    margin = recipe.beta * (gained[i, a:b].sum() / n - gained[i, c:d].sum() / m)
    e, sigmoid = recipe.smoothing, lambda x: 1 / (1 + np.exp(-x))
    if recipe.kind == 'sigmoid':
      total += -(1 - e) * np.log(sigmoid(margin)) - e * np.log(sigmoid(-margin))
      by_margin = -(1 - e) * sigmoid(-margin) + e * sigmoid(margin)
    elif recipe.kind == 'hinge':
      total += max(0, 1 - margin)
      by_margin = -float(margin < 1)
    else:
      total += (margin / recipe.beta - 1 / (2 * recipe.beta)) ** 2
      by_margin = 2 * (margin / recipe.beta - 1 / (2 * recipe.beta)) / recipe.beta
    gradient[i, a:b] += by_margin * recipe.beta / n * slope[i, a:b]
    gradient[i, c:d] -= by_margin * recipe.beta / m * slope[i, c:d]
    # Two pairs: what is divided by them is a mean over tokens.
    total += recipe.sft_weight * -log_p(logits)[i, a:b].sum() * 2 / tokens
    gradient[i, a:b] -= recipe.sft_weight * slope[i, a:b] * 2 / tokens
  return total / 2, gradient / 2


KINDS = [
  {},
  {'smoothing': 0.2, 'beta': 0.5},
  {'kind': 'ipo', 'beta': 0.5},
  {'kind': 'ipo', 'length_normalised': True, 'beta': 0.4},
  {'kind': 'hinge', 'beta': 0.3},
  {'sft_weight': 0.7, 'length_normalised': True},
]


@pytest.mark.parametrize('settings', KINDS, ids=str)
@pytest.mark.parametrize('chunks', [0, 2])
def test_losses_and_gradients_are_those_of_numpy(settings, chunks):
  recipe = Preference(
    feature_lengths={'tokens': T},
    loss_config=LossConfig(vocab_chunks=chunks),
    **settings,
  )
  batch, rng = _batch(), np.random.default_rng(1)
  logits, began = rng.normal(size=(2, B, T, V))
  loss = recipe.loss(None, _Table())
  counts = recipe.counts(batch)
  assert (int(counts['pairs']), int(counts['chosen'])) == (2, 6)

  def mean(logits):
    of = lambda x: {'params': {'logits': x}}
    variables = {**of(logits), 'reference': of(jnp.asarray(began))}
    total, metrics = loss(variables, batch, None, counts)
    return total / metrics['loss'][1], metrics

  with jax.enable_x64(True):
    (value, metrics), gradient = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(logits))
  expected, slope = _in_numpy(logits, began, batch, recipe)
  assert float(value) == pytest.approx(expected, abs=1e-6)
  np.testing.assert_allclose(gradient, slope, atol=1e-6)
  # The row that fills up the batch counts nowhere.
  assert float(metrics['accuracy'][1]) == 2
  assert {'sft_loss'} <= {*metrics} if recipe.sft_weight else 'sft_loss' not in metrics


def test_a_plan_counts_the_reference_as_it_is_kept():
  """Weights in the dtype of the computation, and nothing of what is not trained."""
  config = TrainConfig(
    model=tuned.MODELS['chatglm3'][0],
    recipe=Preference(feature_lengths={'tokens': 64}),
    compute=ComputeConfig(dtype='bfloat16'),
    batch_size=8,
    train_steps=1,
    model_dir='none',
    init_from='none',
  )
  layout = sharding.make_mesh(sharding.MeshConfig())
  built = program.build(config, layout)
  kept, params = built.frozen['reference'], built.state['params']
  assert jax.tree.map(lambda a: a.shape, kept) == jax.tree.map(lambda a: a.shape, params)
  assert kept['words']['weight'].dtype == jnp.bfloat16
  assert kept['words']['weight'].sharding == params['words']['weight'].sharding
  assert program.count_frozen(built) == 0
  config = dataclasses.replace(config, adapters=LoRAConfig(rank=2))
  built = program.build(config, layout)
  assert {*built.frozen['reference']} == {'adapters'} == {*built.state['params']}
  assert program.count_frozen(built) == state.count(params)
  memory = shapes.memory(config, built, layout)
  without = built._replace(frozen={**built.frozen, 'reference': {}})
  leaves = jax.tree.leaves(built.frozen['reference'])
  kept = sum(a.size * a.dtype.itemsize for a in leaves)
  more = memory['frozen'] - shapes.memory(config, without, layout)['frozen']
  assert 0 < more <= kept


def test_the_loss_holds_a_quarter_of_the_logits_at_most():
  """At ChatGLM2's vocabulary, in the program that is compiled, backward pass included."""
  V, B, T = 65024, 2, 64
  config = dataclasses.replace(tuned.MODELS['chatglm3'][0], vocab_size=V)
  rows = jax.ShapeDtypeStruct((B, T), jnp.int32)
  batch = Batch(*[rows] * 8)._replace(loss_weights=jax.ShapeDtypeStruct((B, T), float))
  recipe = Preference(feature_lengths={'tokens': T}, loss_config=LossConfig(vocab_chunks=8))
  loss = recipe.loss(None, build(config, ComputeConfig()))

  def gradient(params, reference, batch):
    def of(params):
      variables = {'params': params, 'reference': {'params': reference}}
      return loss(variables, batch, None, recipe.counts(batch))[0]

    return jax.grad(of)(params)

  params = state.abstract_params(config)
  text = jax.jit(gradient).lower(params, params, batch).as_text()
  assert re.search(rf'tensor<{B}x{T}x{V // 8}xf32>', text)
  assert f'tensor<{B}x{T}x{V}x' not in text
