"""Some parameters are trained; the others stay as they are and have no moments."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import optax
import pytest
import small
from commands import TINY, gin, in_process, refused, snapshot

from glm_jax import checkpoints, models, sharding
from glm_jax.checkpoints.slices import StoredLeaves, flat
from glm_jax.sharding import MeshConfig
from glm_jax.training import losses, state, step, trained

PATTERN = 'layers/attention/.*|final_norm/scale'


def _leaves(run):
  stored = StoredLeaves(checkpoints.find(str(run)))
  return {path: stored.read(path, None) for path in stored.specs}


@pytest.fixture(scope='session')
def start(tmp_path_factory, text):
  """start(folder, run, *bindings): `train` with a pattern, from a base made once."""
  made = tmp_path_factory.mktemp('trained')

  def train(folder, run, *bindings):
    return in_process(
      'train',
      '--gin_file=gin_configs/quickstart.gin',
      *gin(*TINY, 'CheckpointConfig.every=2', "OptimizerConfig.schedule='constant'"),
      *gin(f"CorpusConfig.corpus='{text}/*.txt'", f"CorpusConfig.cache_dir='{made}/cache'"),
      *gin('TrainConfig.log_every=1', f"MODEL_DIR='{folder}/{run}'", *bindings),
    )

  done = train(made, 'base', 'TRAIN_STEPS=2')
  assert done.returncode == 0, done.stderr

  def partly(folder, run, *bindings, base=made / 'base'):
    init_from = f"TrainConfig.init_from='{base}'"
    return train(folder, run, init_from, f"TrainConfig.trained='{PATTERN}'", *bindings)

  partly.base = made / 'base'
  return partly


def test_what_is_not_trained_is_bit_equal_and_in_no_checkpoint(start, tmp_path):
  done = start(tmp_path, 'run', 'TRAIN_STEPS=4')
  assert done.returncode == 0, done.stderr
  own = checkpoints.find(str(tmp_path / 'run'))
  before, after = _leaves(start.base), _leaves(tmp_path / 'run')
  assert {*before} == {*after}
  moved = {path for path in before if not np.array_equal(before[path], after[path])}
  chosen = {p for p in before if p[:2] == ('layers', 'attention')} | {
    ('final_norm', 'scale')
  }
  assert moved == chosen  # a key's bias moves by rounding and decay alone, but it moves
  size = sum(before[path].size for path in chosen)
  assert f'{size:,} of {sum(x.size for x in before.values()):,} parameters' in done.stdout
  held = sum(
    f.stat().st_size for f in pathlib.Path(own / 'params').rglob('*') if f.is_file()
  )
  assert held < 0.5 * sum(x.nbytes for x in before.values())


def test_it_goes_on_to_the_same_bits(start, tmp_path):
  for run, ends in (('straight', [4]), ('stopped', [2, 4])):
    for end in ends:
      done = start(tmp_path, run, f'TRAIN_STEPS={end}')
      assert done.returncode == 0, done.stderr
  assert 'resumed' in done.stdout
  jax.tree.map(
    np.testing.assert_array_equal,
    _leaves(tmp_path / 'straight'),
    _leaves(tmp_path / 'stopped'),
  )


@pytest.mark.slow
def test_a_run_may_begin_with_one_that_was_trained_in_part(start, tmp_path):
  """And one with that: bases of bases."""
  assert start(tmp_path, 'first').returncode == 0
  done = start(tmp_path, 'second', base=tmp_path / 'first')
  assert done.returncode == 0, done.stderr
  base, second = _leaves(start.base), _leaves(tmp_path / 'second')
  assert np.array_equal(base['words', 'weight'], second['words', 'weight'])
  done = in_process(
    'generate', f'--checkpoint={tmp_path}/second', '--prompt=a [MASK] b', '--max_tokens=3'
  )
  assert done.returncode == 0 and done.stdout.startswith('a'), done.stderr
  done = start(tmp_path, 'third', "TrainConfig.trained=''", base=tmp_path / 'second')
  assert done.returncode == 0, done.stderr


def test_a_base_that_is_gone_or_has_changed_is_one_sentence(start, tmp_path):
  shutil.copytree(start.base, tmp_path / 'base')
  base = tmp_path / 'base'
  assert start(tmp_path, 'run', base=base).returncode == 0
  before = snapshot(tmp_path / 'run')
  more = ('TRAIN_STEPS=4',)
  path = max(pathlib.Path(checkpoints.find(str(base)) / 'params').rglob('*'), key=_size)
  content = path.read_bytes()
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  refused(start(tmp_path, 'run', *more, base=base), 'base.fingerprint was')
  generate = ('generate', f'--checkpoint={tmp_path}/run', '--prompt=a [MASK]')
  refused(in_process(*generate), 'which has changed', 'put it back')
  path.write_bytes(content)
  base.rename(tmp_path / 'elsewhere')
  refused(start(tmp_path, 'run', *more, base=base), 'a checkpoint must be a folder')
  refused(in_process(*generate), 'which is gone')
  assert snapshot(tmp_path / 'run') == before
  (tmp_path / 'elsewhere').rename(base)
  assert start(tmp_path, 'run', *more, base=base).returncode == 0


def _size(path):
  return path.stat().st_size if path.is_file() else 0


@pytest.mark.parametrize(
  'bindings,words',
  [
    (["TrainConfig.trained='layer/.*'"], ("'layer/.*'", 'layers/attention/q/weight')),
    (["TrainConfig.trained='('"], ('regular expression', "'('")),
    (["TrainConfig.init_from=''"], ('trained=', 'set TrainConfig.init_from')),
    (['GLMConfig.max_positions=80'], ('64 there, 80 here', 'max_positions=64')),
  ],
)
def test_what_cannot_be_trained_in_part_is_refused(start, tmp_path, bindings, words):
  refused(start(tmp_path, 'run', *bindings), *words)
  assert not (tmp_path / 'run').exists()


def test_another_pattern_is_another_run(start, tmp_path):
  assert start(tmp_path, 'run').returncode == 0
  before = snapshot(tmp_path / 'run')
  other = "TrainConfig.trained='words/.*'"
  refused(start(tmp_path, 'run', other), f"trained was '{PATTERN}' and is now 'words/.*'")
  assert snapshot(tmp_path / 'run') == before


def test_a_plan_counts_both_and_fewer_flops(start, tmp_path):
  plan = lambda *bindings: in_process(
    'plan',
    '--gin_file=gin_configs/quickstart.gin',
    '--platform=cpu',
    f'--json={tmp_path}/plan.json',
    *gin(*TINY, "MODEL_DIR='x'", *bindings),
  )
  assert plan().returncode == 0
  whole = json.loads((tmp_path / 'plan.json').read_text())
  done = plan("TrainConfig.init_from='x'", "TrainConfig.trained='layers/mlp/.*/weight'")
  part = json.loads((tmp_path / 'plan.json').read_text())
  mlp = 2 * 32 * 128
  assert part['parameters'] == whole['parameters'] == whole['trained'], done.stderr
  assert part['trained'] == mlp and f'of which {mlp:,} are trained' in done.stdout
  # Attention's four weights and the head have no gradient: 2 FLOPs a token and weight.
  frozen = 4 * 32 * 32 + 384 * 32
  assert whole['model_flops'] - part['model_flops'] == 2 * frozen * whole['tokens']
  assert part['memory']['peak'] < whole['memory']['peak']


@pytest.fixture(scope='session')
def reference(config, batch):
  return _steps(config, batch, MeshConfig(data=1))


def _steps(config, batch, mesh, microbatches=1):
  """What is trained after three steps, and the optimizer's state."""
  layout = sharding.make_mesh(mesh, jax.devices()[: int(np.prod([*mesh.sizes.values()]))])
  optimizer = optax.adam(1e-3)
  abstract = state.abstract_state(config, optimizer, layout, pattern=PATTERN)
  whole = state.abstract_params(config, layout)
  placed = jax.tree.map(
    lambda x, a: jax.device_put(np.asarray(x), a.sharding), small.params(config), whole
  )
  params, frozen = trained.split(placed, PATTERN)
  current = state.begin(params, optimizer, abstract)
  train_step = jax.jit(
    step.make_train_step(
      losses.pretraining_loss(models.build(config)),
      optimizer,
      microbatches=microbatches,
      seed=0,
    ),
    donate_argnums=0,
  )
  with sharding.active(layout):
    for _ in range(3):
      rows = sharding.place(batch._replace(index=None), layout)
      current, _ = jax.block_until_ready(train_step(current, frozen, rows))
  return jax.device_get((current['params'], current['opt_state']))


@pytest.mark.parametrize(
  'mesh,microbatches,computed',
  [
    (MeshConfig(data=2, fsdp=2, tensor=2), 1, {}),
    (MeshConfig(data=1), 2, {'remat': 'full'}),
  ],
)
def test_meshes_micro_batches_and_remat_change_nothing(
  config, batch, reference, mesh, microbatches, computed
):
  again = _steps(dataclasses.replace(config, **computed), batch, mesh, microbatches)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
  jax.tree.map(close, again, reference)


def test_the_optimizer_holds_moments_of_what_is_trained_alone(config, reference):
  params, opt_state = reference
  whole = small.params(config)
  assert 0 < state.count(params) < 0.5 * state.count(whole)
  moments = [leaf for leaf in jax.tree.leaves(opt_state) if np.ndim(leaf)]
  assert sum(leaf.size for leaf in moments) == 2 * state.count(params)
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - b).max()), params, trained.split(whole, PATTERN)[0]
  )
  assert min(v for k, v in flat(moved).items() if k[-1] != 'bias') > 1e-4
