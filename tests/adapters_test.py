"""Adapters: few parameters beside a model that stays as it is, in the one training loop."""

import json

import jax
import numpy as np
import pytest
from commands import TINY, gin, in_process, snapshot
from flax import traverse_util

import glm_jax
from glm_jax import checkpoints

LORA = [
  'TrainConfig.adapters=@LoRAConfig()',
  'LoRAConfig.rank=2',
  'LoRAConfig.alpha=8.0',
  'LoRAConfig.dropout=0.1',
]
TEXT = 'Document 3 says a [MASK] of plain words'


def _train(folder, run, text, *bindings):
  return in_process(
    'train',
    '--gin_file=gin_configs/quickstart.gin',
    *gin(*TINY, 'CheckpointConfig.every=2', "OptimizerConfig.schedule='constant'"),
    *gin('OptimizerConfig.learning_rate=0.01', 'TrainConfig.log_every=1'),
    *gin(f"CorpusConfig.corpus='{text}/*.txt'", f"CorpusConfig.cache_dir='{folder}/cache'"),
    *gin(f"MODEL_DIR='{folder}/{run}'", *bindings),
  )


def _adapt(folder, run, text, base, *bindings):
  return _train(folder, run, text, f"TrainConfig.init_from='{base}'", *LORA, *bindings)


@pytest.fixture(scope='session')
def runs(shared, text):
  """A base; a run of LoRA on it of four steps, and one that was stopped after two."""

  def make(folder):
    assert _train(folder, 'base', text, 'TRAIN_STEPS=2').returncode == 0
    (folder / 'before').write_text(json.dumps(snapshot(folder / 'base')))
    for run, ends in (('straight', [4]), ('stopped', [2, 4])):
      for end in ends:
        done = _adapt(folder, run, text, folder / 'base', f'TRAIN_STEPS={end}')
        assert done.returncode == 0, done.stderr
        (folder / f'{run}.txt').write_text(done.stdout)

  return shared('adapters', make)


def _held(run, item='params'):
  """What a checkpoint holds itself."""
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as reader:
    tree = reader.restore(checkpoints.find(str(run)) / item)
  return traverse_util.flatten_dict(jax.tree.map(np.asarray, tree))


def test_the_base_is_untouched_and_checkpoints_hold_adapters_alone(runs):
  assert snapshot(runs / 'base') == json.loads((runs / 'before').read_text())
  held = _held(runs / 'straight')
  assert {path[0] for path in held} == {'adapters'}
  names = {f'attention/{name}' for name in ('q', 'k', 'v', 'out')} | {'mlp/up', 'mlp/down'}
  assert {'/'.join(path[2:-1]) for path in held} == names
  size = sum(leaf.size for leaf in held.values())
  assert size == 2 * (4 * (32 + 32) + 2 * (32 + 128))
  whole = size + sum(leaf.size for leaf in _held(runs / 'base').values())
  assert f'{size:,} of {whole:,} parameters' in (runs / 'straight.txt').read_text()
  moments = [leaf for leaf in _held(runs / 'straight', 'optimizer').values() if leaf.ndim]
  assert sum(leaf.size for leaf in moments) == 2 * size
  # It describes itself.
  meta = checkpoints.read_meta(checkpoints.find(str(runs / 'straight')))
  own = {k: meta['adapters'][k] for k in ('kind', 'rank', 'alpha', 'targets', 'scaling')}
  assert own == dict(kind='lora', rank=2, alpha=8.0, targets='layers/.*', scaling=4.0)
  assert meta['base'] == checkpoints.describe(checkpoints.find(str(runs / 'base')))


def test_it_goes_on_to_the_same_bits(runs):
  assert 'resumed' in (runs / 'stopped.txt').read_text()
  for item in ('params', 'optimizer'):
    both = (_held(runs / run, item) for run in ('straight', 'stopped'))
    jax.tree.map(np.testing.assert_array_equal, *both)
  moved = [leaf for path, leaf in _held(runs / 'straight').items() if path[-1] == 'b']
  assert all(np.abs(leaf).max() > 1e-3 for leaf in moved)


def test_a_run_opens_with_its_base_and_beside_it(runs):
  base, own = glm_jax.load(runs / 'base'), glm_jax.load(runs / 'straight')
  beside = glm_jax.load(runs / 'base', adapters=runs / 'straight')
  expected = own.logits(TEXT)
  assert np.abs(expected - base.logits(TEXT)).max() > 1e-2
  np.testing.assert_array_equal(beside.logits(TEXT), expected)
  generate = ('generate', f'--prompt={TEXT}', '--max_new_tokens=5')
  answers = [
    in_process(*generate, *flags).stdout
    for flags in (
      [f'--checkpoint={runs}/straight'],
      [f'--checkpoint={runs}/base', f'--adapters={runs}/straight'],
    )
  ]
  assert answers[0] == answers[1] and answers[0].startswith('Document 3 says a')
