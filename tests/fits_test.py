"""What fits a card: memory from shapes, released models by name, cards by their numbers."""

import dataclasses
import json

import jax
import pytest
import stored
from commands import ROOT, in_process, refused

from benchmarks import memory as published
from glm_jax import bindings, models, sharding
from glm_jax.performance.chips import CHIPS
from glm_jax.planning import prediction, released, shapes, stand_in, table, topologies
from glm_jax.recipes import CONFIGURABLES
from glm_jax.recipes.pretraining import Pretraining
from glm_jax.sharding import MeshConfig
from glm_jax.training import program, state
from glm_jax.training.config import TrainConfig
from glm_jax.training.optimizer import OptimizerConfig

GIB = 2**30
QUICKSTART = f'--gin_file={ROOT}/gin_configs/glm_tiny.gin'
CARD = '--topology=rtx4090:1x1x1'
ATTENTION = "TrainConfig.trained='layers/attention/.*'"


def _run(config, **changes):
  recipe = Pretraining(task='glm_mixture', feature_lengths={'tokens': 48})
  fields = dict(model=config, recipe=recipe, batch_size=16, train_steps=10, model_dir='x')
  return TrainConfig(**{**fields, **changes})


def _released(name, *bound, devices=1):
  load = lambda *more: bindings.load_config(
    TrainConfig, CONFIGURABLES, released.files(name), '', more, placeholders=True
  )[0]
  return load(*released.bindings(load().model, devices), *bound)


def _from_shapes(config, topology, stored=prediction.Frozen()):
  devices = topologies.devices(topology, compiler=False)
  layout = sharding.make_mesh(config.mesh, devices)
  return prediction.from_shapes(config, layout, stored=stored)


@pytest.mark.parametrize(
  'mesh,moment', [(dict(data=1), 'float32'), (dict(data=2, fsdp=2, tensor=2), 'bfloat16')]
)
def test_the_state_is_counted_to_the_byte(config, mesh, moment):
  """As much as the arrays of a run's state have on a device."""
  run = _run(
    config,
    mesh=MeshConfig(**mesh),
    optimizer=OptimizerConfig(first_moment_dtype=moment),
  )
  devices = jax.devices()[: 8 if len(mesh) > 1 else 1]
  layout = sharding.make_mesh(run.mesh, devices)
  counted = prediction.from_shapes(run, layout).memory
  built = program.build(run, layout)
  held = state.init_state(run.model, built.optimizer, layout, 0)

  def here(tree):
    arrays = (leaf.addressable_shards[0].data for leaf in jax.tree.leaves(tree))
    return sum(array.nbytes for array in arrays)

  assert counted['parameters'] == here(held['params'])
  assert counted['optimizer'] == here(held['opt_state'])
  assert counted['gradients'] == counted['parameters'] and 'copies' not in counted
  assert counted['peak'] == sum(
    size for kind, size in counted.items() if kind not in ('peak', 'limit')
  )


def test_what_is_not_trained_has_no_moments_and_its_own_dtype(config):
  part = _run(config, trained='layers/attention/.*', init_from='x')
  layout = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  whole = prediction.from_shapes(_run(config), layout)
  full = prediction.from_shapes(part, layout)
  half = prediction.from_shapes(part, layout, stored=prediction.Frozen('bfloat16'))
  trained, rest = full.trained, whole.parameters - full.trained
  assert 0 < trained < rest
  assert full.memory['parameters'] == 4 * trained == full.memory['gradients']
  assert full.memory['frozen'] == 4 * rest and half.memory['frozen'] == 2 * rest
  assert full.memory['peak'] < whole.memory['peak']
  # Computed with in bfloat16, weights that are stored so are not copied.
  part = dataclasses.replace(part, compute=models.ComputeConfig(dtype='bfloat16'))
  built = program.build(part, layout)
  copies = shapes.memory(part, built, layout)['copies']
  half = prediction.from_shapes(part, layout, stored=prediction.Frozen('bfloat16'))
  halves = half.memory['copies']
  assert 0 < halves < copies / 2


def test_activations_follow_rows_and_remat(config):
  layout = sharding.make_mesh(MeshConfig(), jax.devices()[:1])

  def activations(remat='full', **changes):
    run = _run(config, compute=models.ComputeConfig(remat=remat), **changes)
    return prediction.from_shapes(run, layout).memory['activations']

  least = activations('full')
  assert least < activations('projections') < activations('none')
  assert activations(batch_size=64) > 3 * least
  # One micro-batch at a time; what their gradients are summed in is no activation.
  assert activations(batch_size=64, microbatches=4) == least


# Compiled by XLA for one H100 (8 in the last): GiB at the peak, `plan --compile`.
_COMPILED = [
  ('chatglm2-6b', 29.37, 1, ['ChatGLM2Config.num_layers=6', 'BATCH_SIZE=4']),
  ('chatglm3-6b', 28.10, 1, [ATTENTION]),
  ('glm-10b', 30.04, 1, ["TrainConfig.trained='.*norm/.*'"]),
  ('glm-10b', 20.20, 8, []),
]


@pytest.mark.parametrize('name,compiled,devices,bound', _COMPILED)
def test_an_estimate_is_near_the_compiler(name, compiled, devices, bound):
  if 'num_layers' in ''.join(bound):
    bound = [*bound, "TASK_FEATURE_LENGTHS={'tokens': 4096}"]
  config = _released(name, *bound, devices=devices)
  found = _from_shapes(config, f'h100:1x1x{devices}', prediction.Frozen(released.STORED))
  assert found.memory['peak'] / GIB == pytest.approx(compiled, rel=0.08)


@pytest.mark.parametrize('name', released.names())
def test_every_released_model_has_a_run(name):
  config = _released(name, ATTENTION, devices=4)
  assert config.recipe.length <= config.model.max_positions
  assert config.trained and config.mesh.fsdp == 4 and config.batch_size == 8


def test_a_released_model_is_planned_without_a_compiler(tmp_path, monkeypatch):
  """In seconds, with no gin file; the flags of a card replace what its kind has."""
  monkeypatch.setattr(topologies.importlib.util, 'find_spec', lambda name: None)
  plan = lambda *arguments: in_process(
    'plan', '--released=THUDM/GLM-Large', CARD, *arguments, cwd=tmp_path
  )
  written = lambda: json.loads((tmp_path / 'plan.json').read_text())
  done = plan()
  assert done.returncode == 0, done.stderr
  for words in (
    '334,688,256',
    'HBM a device',
    '~',
    '22.35 GiB',
    '8 rows of 512',
    'assumed',
  ):
    assert words in done.stdout
  assert 'compiled in' not in done.stdout and 'compiling' not in done.stdout
  of_kind = written()
  assert of_kind['fits'] and of_kind['memory']['limit'] == CHIPS['rtx4090'].hbm_bytes
  done = plan('--memory_gib=4', '--peak_tflops=10', '--bandwidth_gbs=100')
  refused(done, 'must fit into 4.00 GiB', '~', 'too many')
  of_card = written()
  assert not of_card['fits'] and of_card['memory']['limit'] == 4 * GIB
  assert of_card['memory']['peak'] == of_kind['memory']['peak']
  # 2.1e12 FLOPs at 10 TFLOP/s; at the kind's peak, its memory is slower.
  assert of_card['least_seconds'] == pytest.approx(of_card['model_flops'] / 10e12)
  held = of_kind['memory']['parameters'] + of_kind['memory']['optimizer']
  assert of_kind['least_seconds'] == pytest.approx(
    max(2 * held / 1008e9, of_kind['model_flops'] / 165.2e12)
  )


def test_a_frozen_base_is_counted_as_it_is_stored(config, tmp_path):
  """As the checkpoint that is begun with says, or in bfloat16 where there is none."""
  plain = stored.checkpoint(tmp_path / 'plain', stored.FAMILIES['glm'])
  half = tmp_path / 'half'
  done = in_process('convert', plain, half, '--to=checkpoint', '--dtype=bfloat16')
  assert done.returncode == 0, done.stderr
  of = lambda path: stand_in.stored_dtype(_run(config, init_from=str(path)))
  assert [of(plain), of(half), of(tmp_path / 'none')] == ['float32', 'bfloat16', None]
  frozen = {}
  for path in (plain, tmp_path / 'none'):
    part = (
      "--gin.TrainConfig.trained='layers/.*'",
      f"--gin.TrainConfig.init_from='{path}'",
    )
    done = in_process(
      'plan', QUICKSTART, *part, '--platform=cpu', '--no-compile', cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert ('assumed: what is not trained is stored in' in done.stdout) == (path != plain)
    memory = json.loads((tmp_path / 'plan.json').read_text())['memory']
    frozen[path] = memory['frozen']
  assert frozen[plain] == 2 * frozen[tmp_path / 'none'] > 0


def test_a_gin_file_from_shapes_too(tmp_path):
  done = in_process('plan', QUICKSTART, '--platform=cpu', '--no-compile', cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert '691,968' in done.stdout and 'from shapes' in done.stdout


def test_what_jax_keeps_from_a_run_is_said(config):
  """A step of more than three quarters of a GPU fits, and JAX would not give it as much."""
  run = _run(config)
  found = _from_shapes(run, 'h100:1x1x1')
  words = lambda peak: table.render(
    dataclasses.replace(found, memory={**found.memory, 'peak': int(peak)}),
    run,
    'h100:1x1x1',
  )
  assert 'MEM_FRACTION' in words(70 * GIB) and 'MEM_FRACTION' not in words(50 * GIB)
  assert 'h100, h200, a100-80' in words(70 * GIB) and 'none' in words(500 * GIB)


@pytest.mark.parametrize(
  'arguments,words',
  [
    ([CARD], ('--gin_file', '--released', 'chatglm3-6b')),
    (['--compile'], ('--gin_file', '--released')),
    ([QUICKSTART, '--released=glm-base', CARD], ('give one of them',)),
    (['--released=chatglm9', CARD], ('chatglm9', 'chatglm3-6b', 'glm-10b')),
    (['--released=', CARD], ('--released',)),
    (
      ['--released=glm-base', '--topology=rtx9:1x1x1'],
      ('rtx9', 'rtx4090', 'h200', '--memory_gib'),
    ),
    (['--released=glm-base', '--topology=rtx4090'], ('KIND:SHAPE', 'rtx4090')),
    (['--released=glm-base', '--topology=h100:8'], ('PARTITIONSxHOSTSxDEVICES', 'h100:8')),
    (['--released=glm-base', '--topology=h100:0x1x8'], ('KIND:SHAPE', 'h100:0x1x8')),
    (['--released=glm-base', CARD, '--memory_gib=0'], ('--memory_gib must be positive',)),
    (['--released=glm-base', CARD, '--memory_gib=nan'], ('must be positive', 'nan')),
    (['--released=glm-base', CARD, '--peak_tflops=-1'], ('--peak_tflops', '-1.0')),
    (['--released=glm-base', CARD, '--bandwidth_gbs=x'], ('--bandwidth_gbs', "'x'")),
    ([QUICKSTART, '--platform=cpu', '--memory_gib=9'], ('--memory_gib', 'nearest kind')),
    ([QUICKSTART, CARD, '--suggest', '--no-compile'], ('--suggest', '--no-compile')),
    (['--released=glm-base', CARD, '--slices=2'], ('GPUs have no slices',)),
    (['--released=glm-base', CARD, '--gin.TrainConfig.trained="heads"'], ("'heads'",)),
  ],
)
def test_what_cannot_be_asked_is_refused(arguments, words, tmp_path):
  refused(in_process('plan', *arguments, cwd=tmp_path), *words)
  assert not list(tmp_path.iterdir())


def test_the_published_table_is_of_this_code():
  """Its cheapest row; the others are longer to count."""
  one, eight = (published.need('glm-large', 'all, AdamW', n) for n in (1, 8))
  row = (
    f'| GLM-Large | all, AdamW | {one.state / GIB:.1f} | ~{one.peak / GIB:.1f} | '
    f'{published.cards(one.peak)} | ~{eight.peak / GIB:.1f} |'
  )
  text = (ROOT / 'launch' / 'README.md').read_text(encoding='utf-8')
  assert row in text, 'run python -m benchmarks.memory'
  for model in published.MODELS:
    assert text.count(f'| {model} | ') >= len(published.WAYS)


# From here on, with the compilers.


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['a100-40', 'a100-80', 'h100', 'h200', 'rtx4090'])
def test_a_described_card_is_the_compilers(kind):
  described = topologies.devices(f'{kind}:1x1x2', compiler=False)
  known = topologies.devices(f'{kind}:1x1x2')
  assert len(described) == len(known) == 2
  for field in ('device_kind', 'compute_capability', 'platform', 'process_index'):
    assert getattr(described[0], field) == getattr(known[0], field)
  assert known[0].device_kind in CHIPS[kind].device_kinds


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['full', 'projections', 'none'])
@pytest.mark.parametrize('kind', ['a100-40', 'rtx4090'])
def test_an_estimate_is_near_what_is_compiled_now(kind, remat):
  bound = ['ChatGLM2Config.num_layers=2', f"ComputeConfig.remat='{remat}'"]
  config = _released('chatglm3-6b', *bound)
  estimated = _from_shapes(config, f'{kind}:1x1x1')
  layout = sharding.make_mesh(config.mesh, topologies.devices(f'{kind}:1x1x1'))
  compiled = prediction.predict(config, layout)
  assert compiled.attention == estimated.attention
  assert estimated.memory['peak'] == pytest.approx(compiled.memory['peak'], rel=0.1)


@pytest.mark.slow
def test_estimates_are_near_the_published_compiles():
  """Every row of the topologies' table: meshes of up to 4,096 chips, and all families."""
  from benchmarks import topologies as rows

  results = json.loads(rows.RESULTS.read_text(encoding='utf-8'))
  for row in rows.ROWS:
    config, layout = rows.configure(row)
    peak = prediction.from_shapes(config, layout).memory['peak']
    assert peak == pytest.approx(results[row.key]['memory']['peak'], rel=0.09), row.key
