"""A recipe of a user's own, through the ordinary commands."""

import json

import pytest
from commands import TINY, gin, in_process, refused, snapshot

from glm_jax.training import writer

OWN = '''
import dataclasses

import jax.numpy as jnp

from glm_jax.recipes.pretraining import Pretraining
from glm_jax.training.losses import cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tempered(Pretraining):
  """Logits over a temperature that is learnt; long rows weigh no more than short ones."""

  start: float = 2.0

  def leaves(self, config):
    return {'temperature': lambda key: {'scale': jnp.full((1,), self.start)}}

  def counts(self, batch):
    return {'rows': (batch.loss_weights.sum(1) > 0).sum()}

  def loss(self, config, model):
    def loss(variables, batch, key, counts):
      logits, _ = model.apply(
        variables, batch.tokens, batch.positions, batch.block_positions, batch.visibility,
        deterministic=key is None, rngs=None if key is None else {'dropout': key},
      )
      scale = variables['params']['temperature']['scale']
      weights = batch.loss_weights
      weights = weights / jnp.maximum(weights.sum(1, keepdims=True), 1) / counts['rows']
      total = (cross_entropy(logits / scale, batch.targets) * weights).sum()
      return total, {'loss': (total, weights.sum())}

    return loss

  def report(self, config, data, variables, validated, say):
    scale = float(variables['params']['temperature']['scale'][0])
    say(f'temperature {scale:.3f}')
    return {'temperature': scale}


CONFIGURABLES = (Tempered,)
'''

REMEMBERS = '''
import dataclasses

import jax
import jax.numpy as jnp

import own_recipe
from glm_jax import sharding
from glm_jax.training.recipe import WorkStream


class Remembering(WorkStream):
  """Weighs a batch by what was seen before it."""

  def __init__(self, stream, layout):
    self.stream = stream
    self.kept = {'seen': jax.device_put(jnp.zeros(()), sharding.replicated(layout))}

  def __call__(self, state):
    work = self.stream(state)
    weights = work.batch.loss_weights * (1 + jnp.sin(self.kept['seen']))
    self.kept = {'seen': self.kept['seen'] + 1 + state['params']['temperature']['scale'][0]}
    return work._replace(batch=work.batch._replace(loss_weights=weights))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remembers(own_recipe.Tempered):
  def prepare(self, config, vocabulary, layout):
    data = super().prepare(config, vocabulary, layout)
    stream = data.stream
    data.stream = lambda step: Remembering(stream(step), layout)
    return data

  def validate(self, config, data, variables):
    return {'warmth': float(variables['params']['temperature']['scale'][0])}


CONFIGURABLES = (Remembers,)
'''

DROPOUTS = ('embedding', 'attention', 'output')


@pytest.fixture
def start(tmp_path, text):
  """start(command, folder, *bindings): a command on the recipe of a module of one's own."""
  (tmp_path / 'own_recipe.py').write_text(OWN)
  fields = {
    'task': '%MIXTURE_OR_TASK_NAME',
    'feature_lengths': '%TASK_FEATURE_LENGTHS',
    'corpus': '@CorpusConfig()',
    'vocabulary': '@VocabularyConfig()',
    'objectives': '@ObjectiveConfig()',
  }

  def command(module, run, *bindings, flags=(), imports='own_recipe', name='Tempered'):
    return in_process(
      module,
      f'--import={imports}',
      '--gin_file=gin_configs/glm_tiny.gin',
      *gin(f'TrainConfig.recipe=@{name}()'),
      *gin(*(f'{name}.{field}={value}' for field, value in fields.items())),
      *gin(*TINY, 'CheckpointConfig.every=2', 'TrainConfig.log_every=1'),
      *gin("OptimizerConfig.schedule='constant'", f"CorpusConfig.corpus='{text}/*.txt'"),
      *gin(f"CorpusConfig.cache_dir='{tmp_path}/cache'", f"MODEL_DIR='{tmp_path}/{run}'"),
      *gin(
        *(f'GLMConfig.{name}_dropout=0.0' for name in ('embedding', 'attention', 'output'))
      ),
      *gin(*bindings),
      *flags,
      cwd=tmp_path,
      PYTHONPATH=str(tmp_path),
    )

  return command


def _losses(run):
  return {record['step']: record['loss'] for record in writer.read(str(run), 'train')}


def test_it_trains_validates_goes_on_and_reports(start, tmp_path):
  for run, ends in (('straight', [4]), ('stopped', [2, 4])):
    for end in ends:
      done = start('train', run, f'TRAIN_STEPS={end}', 'TrainConfig.microbatches=2')
      assert done.returncode == 0, done.stderr
  assert 'resumed' in done.stdout and 'temperature ' in done.stdout
  losses = [_losses(tmp_path / run) for run in ('straight', 'stopped')]
  assert losses[0] == losses[1] and {*losses[0]} == {1, 2, 3, 4}
  # What counts over the whole batch divided, though its halves came one after the other.
  assert start('train', 'whole', 'TRAIN_STEPS=4').returncode == 0
  assert _losses(tmp_path / 'whole') == pytest.approx(losses[0], abs=1e-5)
  assert 'validation' in (tmp_path / 'straight' / 'metrics.jsonl').read_text()
  summary = json.loads((tmp_path / 'stopped' / 'summary.json').read_text())
  assert summary['temperature'] != 2.0 and summary['steps'] == 4


def test_a_stream_remembers_and_a_recipe_measures(start, tmp_path):
  (tmp_path / 'remembers.py').write_text(REMEMBERS)
  own = dict(imports='remembers', name='Remembers')
  best = ("CheckpointConfig.best_metric='warmth'", "CheckpointConfig.best_mode='max'")
  for run, ends in (('straight', [4]), ('stopped', [2, 4])):
    for end in ends:
      done = start('train', run, f'TRAIN_STEPS={end}', *best, **own)
      assert done.returncode == 0, done.stderr
  losses = [_losses(tmp_path / run) for run in ('straight', 'stopped')]
  assert losses[0] == losses[1] and {*losses[0]} == {1, 2, 3, 4}
  measured = [r['warmth'] for r in writer.read(str(tmp_path / 'straight'), 'validation')]
  assert measured and measured[-1] != 2.0 and 'warmth' in done.stdout


def test_it_is_planned_and_previewed(start, tmp_path):
  done = start('plan', 'unused', flags=['--platform=cpu'])
  assert done.returncode == 0, done.stderr
  plain = json.loads((tmp_path / 'plan.json').read_text())['parameters']
  other = start(
    'plan', 'unused', 'TrainConfig.recipe=@Pretraining()', flags=['--platform=cpu']
  )
  assert other.returncode == 0, other.stderr
  assert plain == json.loads((tmp_path / 'plan.json').read_text())['parameters'] + 1
  done = start('preview', 'unused', flags=['--examples=1'])
  assert done.returncode == 0 and 'Part A' in done.stdout, done.stderr


def test_another_recipe_does_not_go_on(start, tmp_path):
  assert start('train', 'run').returncode == 0
  before = snapshot(tmp_path / 'run')
  refused(
    start('train', 'run', 'TrainConfig.recipe=@Pretraining()'),
    "recipe was 'Tempered' and is now 'Pretraining'",
  )
  assert snapshot(tmp_path / 'run') == before


def test_what_is_no_recipe_is_refused(start, tmp_path):
  refused(
    start('train', 'run', 'TrainConfig.recipe=@CorpusConfig()'),
    'TrainConfig.recipe must be Recipe, got CorpusConfig',
  )
  assert not (tmp_path / 'run').exists()


def test_a_mistake_in_it_keeps_its_traceback_and_leaves_no_folder(start, tmp_path):
  (tmp_path / 'broken.py').write_text(
    OWN.replace('Tempered', 'Broken').replace(
      'cross_entropy(logits', 'cross_entropi(logits'
    )
  )
  with pytest.raises(NameError, match='cross_entropi'):
    start('train', 'run', imports='broken', name='Broken')
  assert not (tmp_path / 'run').exists()


def test_a_leaf_cannot_take_the_name_of_a_parameter(start, tmp_path):
  (tmp_path / 'taken.py').write_text(
    OWN.replace('Tempered', 'Taken').replace("'temperature': lambda", "'words': lambda")
  )
  refused(
    start('train', 'run', imports='taken', name='Taken'),
    'must not have the names',
    "['words']",
  )
  assert not (tmp_path / 'run').exists()
