"""Adapters: few parameters beside a model that stays as it is, in the one training loop."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import stored
from commands import TINY, gin, in_process, refused, snapshot
from flax import traverse_util

import glm_jax
from glm_jax import checkpoints
from glm_jax.configs import UserError
from glm_jax.models import GLMConfig
from glm_jax.training.adapters import LoRAConfig, PTuningConfig

LORA = [
  'TrainConfig.adapters=@LoRAConfig()',
  'LoRAConfig.rank=2',
  'LoRAConfig.alpha=8.0',
  'LoRAConfig.dropout=0.1',
]
# As `TINY` has it.
MODEL = GLMConfig(
  num_layers=1, hidden_size=32, num_heads=2, vocab_size=384, max_positions=64
)
TEXT = 'Document 3 says a [MASK] of plain words'


def _train(folder, run, text, *bindings):
  return in_process(
    'train',
    '--gin_file=gin_configs/glm_tiny.gin',
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


@pytest.mark.parametrize(
  ('bindings', 'words'),
  [
    (["LoRAConfig.targets='layer/.*'"], ("'layer/.*'", 'layers/attention/q/weight')),
    (["LoRAConfig.targets='words/weight'"], ("'words/weight'", 'must match')),
    (["LoRAConfig.targets='('"], ('regular expression', "'('")),
    (['LoRAConfig.rank=0'], ('LoRAConfig.rank must be positive', '0')),
    (['LoRAConfig.rank=33'], ('33 for layers/attention/', '32 x 32')),
    (["TrainConfig.init_from=''"], ('adapters must have a checkpoint',)),
    (["TrainConfig.init_adapters='merge'"], ('must be of an init_from with adapters',)),
    (["TrainConfig.trained='nothing'"], ("'nothing'", 'must match paths')),
    (
      ['TrainConfig.adapters=@PTuningConfig()', 'CorpusConfig.packed=True'],
      ('one document each', 'CorpusConfig.packed=False'),
    ),
  ],
)
def test_what_cannot_be_adapted_is_refused(runs, text, tmp_path, bindings, words):
  refused(_adapt(tmp_path, 'run', text, runs / 'base', *bindings), *words)
  assert not (tmp_path / 'run').exists()


def test_other_adapters_are_another_run(runs, text):
  before = snapshot(runs / 'straight')
  done = _adapt(runs, 'straight', text, runs / 'base', 'LoRAConfig.alpha=4.0')
  refused(done, 'adapters.alpha was 8.0 and is now 4.0')
  assert snapshot(runs / 'straight') == before


def test_adapters_of_another_base_are_refused(runs, tmp_path):
  other = shutil.copytree(runs / 'base', tmp_path / 'base')
  flags = (f'--adapters={runs}/straight', f'--prompt={TEXT}', '--max_new_tokens=2')
  same = in_process('generate', f'--checkpoint={other}', *flags)
  assert same.returncode == 0, same.stderr
  params = pathlib.Path(checkpoints.find(str(other))) / 'params'
  path = max((p for p in params.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  content = path.read_bytes()
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  words = (f'trained on, {runs / "base"}', 'whose parameters are others')
  refused(in_process('generate', f'--checkpoint={other}', *flags), *words)
  none = (f'--adapters={runs}/base', f'--prompt={TEXT}')
  refused(in_process('generate', f'--checkpoint={runs}/base', *none), 'that holds some')


def test_a_run_without_its_base_is_one_sentence(runs, text, tmp_path):
  shutil.copytree(runs / 'base', tmp_path / 'base')
  done = _adapt(tmp_path, 'run', text, tmp_path / 'base', 'TRAIN_STEPS=1')
  assert done.returncode == 0, done.stderr
  shutil.rmtree(tmp_path / 'base')
  with pytest.raises(UserError, match='which is gone; put it back'):
    glm_jax.load(tmp_path / 'run').logits(TEXT)


@pytest.mark.slow
def test_adapters_are_trained_on_or_merged_by_name(text, tmp_path):
  base = stored.checkpoint(tmp_path / 'base', MODEL)
  lora = LoRAConfig(rank=2, alpha=8.0, dropout=0.1)
  first = stored.adapted(tmp_path / 'first', base, MODEL, lora)
  still = ('TRAIN_STEPS=1', 'OptimizerConfig.learning_rate=1e-30')
  begin = lambda run, *more: _adapt(tmp_path, run, text, first, *still, *more)
  how = lambda choice: f"TrainConfig.init_adapters='{choice}'"
  refused(begin('neither'), 'what becomes of adapters', "'continue' or 'merge'")
  refused(begin('other', how('continue'), 'LoRAConfig.alpha=2.0'), 'one kind and scaling')
  targets = "LoRAConfig.targets='layers/mlp/.*'"
  words = ('must train what', 'adapters/layers/attention')
  refused(begin('other', how('continue'), targets), *words)
  assert not (tmp_path / 'other').exists()
  whole = ('TrainConfig.adapters=None', how('merge'), 'OptimizerConfig.weight_decay=0.0')
  for run, more in (('continue', ()), ('merge', ()), ('whole', whole)):
    done = begin(run, *(more or [how(run)]))
    assert done.returncode == 0, done.stderr
  before = glm_jax.load(first).logits(TEXT)
  assert _relative(glm_jax.load(base).logits(TEXT), before) > 1e-3
  for run in ('continue', 'merge', 'whole'):
    assert _relative(glm_jax.load(tmp_path / run).logits(TEXT), before) < 2e-6, run
  same = [_held(run) for run in (first, tmp_path / 'continue')]
  jax.tree.map(np.testing.assert_array_equal, *same)
  fresh = {p: v for p, v in _held(tmp_path / 'merge').items() if p[-1] == 'b'}
  assert fresh and max(np.abs(v).max() for v in fresh.values()) < 1e-20
  meta_of = lambda run: checkpoints.read_meta(checkpoints.find(str(run)))
  bases = [meta_of(tmp_path / run)['base']['folder'] for run in ('continue', 'merge')]
  assert bases == [str(base), str(first)] and 'adapters' not in meta_of(tmp_path / 'whole')


def test_merging_equals_computing_beside_and_merges_once(runs, tmp_path):
  before = glm_jax.load(runs / 'straight').logits(TEXT)
  for command, *more in (('convert', '--to=checkpoint'), ('quantize', '--bits=8')):
    done = in_process(command, runs / 'straight', tmp_path / command, *more)
    assert done.returncode == 0, done.stderr
  merged = glm_jax.load(tmp_path / 'convert')
  assert {*merged.variables} == {'params'}
  assert _relative(merged.logits(TEXT), before) < 1e-6
  assert 0 < _relative(glm_jax.load(tmp_path / 'quantize').logits(TEXT), before) < 0.05
  base = glm_jax.load(runs / 'base').logits(TEXT)
  assert _relative(base, before) > 1e-3


def _relative(a, b):
  return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


@pytest.mark.slow
def test_integers_are_adapted_and_what_was_trained_beside_is_merged(runs, text, tmp_path):
  """QLoRA, with the norms of the model trained besides, validated and reported."""
  done = in_process('quantize', runs / 'base', tmp_path / 'int4', '--bits=4')
  assert done.returncode == 0, done.stderr
  before = snapshot(tmp_path / 'int4')
  trained = "TrainConfig.trained='.*norm/.*'"
  for steps in (2, 4):
    more = (f'TRAIN_STEPS={steps}', 'EvaluationConfig.fill=1', trained)
    done = _adapt(tmp_path, 'run', text, tmp_path / 'int4', *more)
    assert done.returncode == 0, done.stderr
  assert 'resumed' in done.stdout and 'of held-out sentences' in done.stdout
  assert snapshot(tmp_path / 'int4') == before
  held = _held(tmp_path / 'run')
  assert {path[-1] for path in held} == {'a', 'b', 'scale', 'bias'}
  model = glm_jax.load(tmp_path / 'run')
  assert {*model.variables} == {'params', 'scales', 'adapters'}
  expected = model.logits(TEXT)
  assert _relative(glm_jax.load(tmp_path / 'int4').logits(TEXT), expected) > 1e-3
  flags = (tmp_path / 'run', tmp_path / 'merged', '--to=checkpoint')
  refused(in_process('convert', *flags), 'merged into plain weights', '--dequantize')
  assert in_process('convert', *flags, '--dequantize').returncode == 0
  assert _relative(glm_jax.load(tmp_path / 'merged').logits(TEXT), expected) < 5e-6
  # They are one: adapters alone would be another model.
  beside = (f'--checkpoint={tmp_path}/int4', f'--adapters={tmp_path}/run')
  refused(in_process('generate', *beside, f'--prompt={TEXT}'), 'trained beside adapters')
  # All parameters cannot be trained of integers.
  whole = (f"TrainConfig.init_from='{tmp_path}/int4'", "TrainConfig.trained='layers/.*'")
  refused(_train(tmp_path, 'whole', text, *whole), 'begin with plain weights')


@pytest.mark.slow
def test_virtual_tokens_are_trained_and_opened(runs, text, tmp_path):
  tokens = ('TrainConfig.adapters=@PTuningConfig()', 'PTuningConfig.tokens=4')
  tokens += ('CorpusConfig.packed=False', 'EvaluationConfig.fill=1')
  for run, ends in (('straight', [4]), ('stopped', [2, 4])):
    for end in ends:
      base = f"TrainConfig.init_from='{runs}/base'"
      done = _train(tmp_path, run, text, base, *tokens, f'TRAIN_STEPS={end}')
      assert done.returncode == 0, done.stderr
  both = [_held(tmp_path / run) for run in ('straight', 'stopped')]
  jax.tree.map(np.testing.assert_array_equal, *both)
  assert {*both[0]} == {('prefix', 'embedding')}
  # One layer of keys and values, 2 x 16 each.
  assert both[0]['prefix', 'embedding'].shape == (4, 64)
  model, base = (glm_jax.load(folder) for folder in (tmp_path / 'straight', runs / 'base'))
  assert model.logits(TEXT).shape == base.logits(TEXT).shape
  assert _relative(base.logits(TEXT), model.logits(TEXT)) > 1e-2
  merging = ('convert', tmp_path / 'straight', tmp_path / 'merged', '--to=checkpoint')
  refused(in_process(*merging), 'must be low-rank factors', 'virtual tokens')


@pytest.mark.parametrize('projection', [False, True])
@pytest.mark.parametrize('family', stored.FAMILIES)
def test_virtual_tokens_are_read_and_what_is_generated_sees_them(
  tmp_path, family, projection
):
  config = stored.FAMILIES[family]
  base = stored.checkpoint(tmp_path / 'base', config)
  tokens = PTuningConfig(tokens=3, projection=projection)
  run = stored.adapted(tmp_path / 'run', base, config, tokens)
  model, plain = glm_jax.load(run), glm_jax.load(base)
  assert {*model.variables} == {'params', 'prefix'}
  rows = model.rows(TEXT)
  expected = model.logits(rows)
  assert expected.shape == plain.logits(rows).shape
  assert _relative(plain.logits(rows), expected) > 1e-4
  beside = glm_jax.load(base, adapters=run)
  np.testing.assert_array_equal(beside.logits(rows), expected)
  # What is said greedily is what the logits say at the last token that is read.
  (answer,) = model.generate(TEXT, max_new_tokens=1, min_new_tokens=1)
  allowed = np.arange(config.vocab_size) < model.vocabulary.size
  allowed[list(model.vocabulary.names)] = config.causal
  allowed[list(model.vocabulary.stops)] = False
  last = int((rows.key_end[0] > 0).sum()) - 1
  said = np.where(allowed, expected[0, last], -np.inf).argmax()
  assert answer.tokens[0][0] == said
