"""Some parameters are trained; the others stay as they are and have no moments."""

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


def _train(folder, run, text, *bindings):
  return in_process(
    'train',
    '--gin_file=gin_configs/glm_tiny.gin',
    *gin(*TINY, 'CheckpointConfig.every=2', "OptimizerConfig.schedule='constant'"),
    *gin(f"CorpusConfig.corpus='{text}/*.txt'", f"CorpusConfig.cache_dir='{folder}/cache'"),
    *gin('TrainConfig.log_every=1', f"MODEL_DIR='{folder}/{run}'", *bindings),
  )


def _partly(folder, run, text, base, *bindings):
  init_from = f"TrainConfig.init_from='{base}'"
  return _train(folder, run, text, init_from, f"TrainConfig.trained='{PATTERN}'", *bindings)


@pytest.fixture(scope='session')
def runs(shared, text):
  """A base; a run from it of four steps, and one that was stopped after two."""

  def make(folder):
    assert _train(folder, 'base', text, 'TRAIN_STEPS=2').returncode == 0
    for run, ends in (('straight', [4]), ('stopped', [2, 4])):
      for end in ends:
        done = _partly(folder, run, text, folder / 'base', f'TRAIN_STEPS={end}')
        assert done.returncode == 0, done.stderr
        (folder / f'{run}.txt').write_text(done.stdout)

  return shared('trained', make)


def test_what_is_not_trained_is_bit_equal_and_in_no_checkpoint(runs):
  before, after = _leaves(runs / 'base'), _leaves(runs / 'straight')
  assert {*before} == {*after}
  moved = {path for path in before if not np.array_equal(before[path], after[path])}
  chosen = {p for p in before if p[:2] == ('layers', 'attention')}
  chosen.add(('final_norm', 'scale'))
  # Of attention's biases, that of keys has no gradient but for rounding.
  assert chosen - {('layers', 'attention', 'k', 'bias')} <= moved <= chosen
  size = sum(before[path].size for path in chosen)
  whole = sum(x.size for x in before.values())
  assert f'{size:,} of {whole:,} parameters' in (runs / 'straight.txt').read_text()
  own = checkpoints.find(str(runs / 'straight'))
  held = sum(map(_size, pathlib.Path(own / 'params').rglob('*')))
  assert held < 0.5 * sum(x.nbytes for x in before.values())


def test_it_goes_on_to_the_same_bits(runs):
  assert 'resumed' in (runs / 'stopped.txt').read_text()
  both = (_leaves(runs / run) for run in ('straight', 'stopped'))
  jax.tree.map(np.testing.assert_array_equal, *both)


def test_another_pattern_is_another_run(runs, text):
  before = snapshot(runs / 'straight')
  other = "TrainConfig.trained='words/.*'"
  done = _partly(runs, 'straight', text, runs / 'base', other)
  refused(done, f"trained was '{PATTERN}' and is now 'words/.*'")
  assert snapshot(runs / 'straight') == before


def test_a_base_that_is_gone_or_has_changed_is_one_sentence(runs, text, tmp_path):
  base = shutil.copytree(runs / 'base', tmp_path / 'base')
  again = lambda: _partly(tmp_path, 'run', text, base, 'TRAIN_STEPS=1')
  assert again().returncode == 0
  before = snapshot(tmp_path / 'run')
  generate = ('generate', f'--checkpoint={tmp_path}/run', '--prompt=a [MASK]')
  params = pathlib.Path(checkpoints.find(str(base))) / 'params'
  path = max(params.rglob('*'), key=_size)
  content = path.read_bytes()
  path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  refused(again(), 'base.fingerprint was')
  refused(in_process(*generate), 'which has changed', 'put it back')
  path.write_bytes(content)
  elsewhere = base.rename(tmp_path / 'elsewhere')
  refused(again(), 'a checkpoint must be a folder')
  refused(in_process(*generate), 'which is gone')
  elsewhere.rename(base)
  assert snapshot(tmp_path / 'run') == before
  done = in_process(*generate, '--max_new_tokens=3')
  assert done.returncode == 0 and done.stdout.startswith('a'), done.stderr


@pytest.mark.slow
def test_a_run_may_begin_with_one_that_was_trained_in_part(runs, text, tmp_path):
  """And one with that: bases of bases."""
  done = _partly(tmp_path, 'second', text, runs / 'straight')
  assert done.returncode == 0, done.stderr
  base, second = _leaves(runs / 'base'), _leaves(tmp_path / 'second')
  assert np.array_equal(base['words', 'weight'], second['words', 'weight'])
  all_of_it = "TrainConfig.trained=''"
  done = _partly(tmp_path, 'third', text, tmp_path / 'second', all_of_it)
  assert done.returncode == 0, done.stderr


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
def test_what_cannot_be_trained_in_part_is_refused(runs, text, tmp_path, bindings, words):
  refused(_partly(tmp_path, 'run', text, runs / 'base', *bindings), *words)
  assert not (tmp_path / 'run').exists()


def test_a_plan_counts_both_and_fewer_flops(tmp_path):
  plan = lambda *bindings: in_process(
    'plan',
    '--gin_file=gin_configs/glm_tiny.gin',
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


def _steps(config, batch, mesh, microbatches=1, remat='none'):
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
      losses.pretraining_loss(models.build(config, models.ComputeConfig(remat=remat))),
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
  'mesh,microbatches,remat',
  [
    (MeshConfig(data=2, fsdp=2, tensor=2), 1, 'none'),
    (MeshConfig(data=1), 2, 'full'),
  ],
)
def test_meshes_micro_batches_and_remat_change_nothing(
  config, batch, reference, mesh, microbatches, remat
):
  again = _steps(config, batch, mesh, microbatches, remat)
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
