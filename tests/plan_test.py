"""The planner: it compiles what trains, refuses what cannot be, and reads what it got."""

import dataclasses
import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, command, in_process, refused

from glm_jax import models, sharding
from glm_jax.inference import decode
from glm_jax.models import cache as kv_cache
from glm_jax.planning import hlo, prediction, suggest, table, topologies
from glm_jax.recipes.pretraining import Pretraining
from glm_jax.sharding import MeshConfig
from glm_jax.training import program, state
from glm_jax.training.config import TrainConfig


def _config(model, **changes):
  recipe = {'task': 'glm_mixture', 'feature_lengths': {'tokens': 48}}
  for field in dataclasses.fields(Pretraining):
    if field.name in changes:
      recipe[field.name] = changes.pop(field.name)
  return TrainConfig(
    **{
      'model': model,
      'recipe': Pretraining(**recipe),
      'batch_size': 16,
      'train_steps': 10,
      'model_dir': 'unset',
      'mesh': MeshConfig(data=2, fsdp=2, tensor=2),
      **changes,
    }
  )


def test_the_planned_step_is_the_step_that_trains(config, batch):
  """The same text is lowered for described arrays as for a run's state and batch."""
  run = _config(config)
  layout = sharding.make_mesh(run.mesh)
  _, planned = prediction.lower(run, layout)
  built = program.build(run, layout)
  current = state.init_state(run.model, built.optimizer, layout, run.seed)
  with sharding.active(layout):
    placed = sharding.place(batch._replace(index=None), layout)
    trained = built.train_step.lower(current, {}, placed)
  assert planned.as_text() == trained.as_text()
  # Every part of the state is given back in its own memory.
  donated = re.findall(r'jax.buffer_donor|tf.aliasing_output', planned.as_text())
  assert len(donated) == len(jax.tree.leaves(current))
  assert prediction.fingerprint(planned, 'cpu') == prediction.fingerprint(trained, 'cpu')
  other = dataclasses.replace(run, microbatches=2)
  _, differs = prediction.lower(other, layout)
  assert prediction.fingerprint(differs, 'cpu') != prediction.fingerprint(planned, 'cpu')


def test_a_dry_run_on_virtual_devices(tmp_path):
  done = command(
    'plan',
    f'--gin_file={ROOT}/gin_configs/glm_tiny.gin',
    '--gin.MeshConfig.fsdp=2',
    '--platform=cpu',
    '--cpu_devices=4',
    cwd=tmp_path,
  )
  assert done.returncode == 0, done.stderr
  for words in ('691,968', 'data 2 x fsdp 2', 'attention', 'dense', 'temporaries'):
    assert words in done.stdout
  assert 'MFU' not in done.stdout and 'predicted' not in done.stdout
  written = json.loads((tmp_path / 'plan.json').read_text())
  assert written['mesh'] == {'data': 2, 'fsdp': 2, 'sequence': 1, 'tensor': 1}
  assert written['fits'] and written['memory']['arguments'] > 691_968 * 12 / 4


@pytest.mark.parametrize(
  'arguments,words',
  [
    (['--topology=v9:2x2'], ('KIND:SHAPE', 'v9:2x2', 'v5p')),
    ([], ('--topology, or --platform=cpu',)),
    (['--platform=cpu', '--topology=v5e:2x2'], ('give one of them',)),
    (['--platform=cpu', '--gin.MeshConfig.tensor=3'], ('multiply to the 1 devices',)),
    (
      [
        '--platform=cpu',
        '--cpu_devices=4',
        '--gin.MeshConfig.sequence=4',
        '--gin.TASK_FEATURE_LENGTHS={"tokens": 60}',
      ],
      ('60 positions', 'sequence=4'),
    ),
    (
      ['--platform=cpu', "--gin.MeshConfig.overrides={'mlp': 'pipe'}"],
      ("'mlp': 'pipe'", 'fsdp'),
    ),
    (
      ['--platform=cpu', "--gin.ComputeConfig.attention='tpu_splash'"],
      ('tpu_splash', 'runs on tpu', 'cpu'),
    ),
    (['--platform=cpu', '--suggest'], ('--suggest must know', 'topology')),
    (['--platform=cpu', '--json=no/such/plan.json'], ('no/such/plan.json',)),
    (['--platform=cpu', '--json='], ('--json must be a file',)),
    (['--platform=cpu', '--slices=3'], ('--slices are of a TPU', '3')),
    (['--platform=cpu', '--import=no.such'], ('--import', 'no.such')),
  ],
)
def test_what_cannot_be_planned_is_refused(arguments, words, tmp_path):
  gin_file = f'--gin_file={ROOT}/gin_configs/glm_tiny.gin'
  done = in_process('plan', gin_file, *arguments, cwd=tmp_path)
  refused(done, *words)
  assert not list(tmp_path.iterdir())


def test_a_missing_compiler_is_named(monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='pip install libtpu'):
    topologies.devices('v5e:2x2')
  with pytest.raises(ValueError, match=r"pip install 'jax\[cuda12\]'"):
    topologies.devices('h100:1x1x8')


def _prediction(**changes):
  fields = dict(
    parameters=10,
    trained=10,
    devices=8,
    device_kind='TPU v5 lite',
    mesh={'data': 1, 'fsdp': 8, 'sequence': 1, 'tensor': 1},
    attention=('tpu_tokamax', 'best'),
    rows=8,
    tokens=8 * 48,
    memory={'limit': 16 * 2**30, 'peak': 20 * 2**30},
    fits=False,
    model_flops=1e15,
    compile_seconds=1.0,
    fingerprint='f',
    estimate=None,
    efficiency=None,
    visited=None,
  )
  return prediction.Prediction(**{**fields, **changes})


def test_what_does_not_fit_is_said_with_numbers(config):
  found = _prediction()
  assert 'does not fit: 20.00 of 16.00 GiB, 4.00 too many' in table.render(
    found, _config(config), 'v5e:2x4'
  )
  with pytest.raises(ValueError, match='16.00 GiB.*20.00 GiB, 4.00 too many.*--suggest'):
    prediction.check_fits(found)


def test_a_kernel_that_is_too_large_is_no_lack_of_hbm():
  class Lowered:
    def __init__(self, message):
      self.message = message

    def compile(self):
      raise RuntimeError(self.message)

  kernel = 'vmem. Scoped allocation with size 127.50M and limit 32.00M exceeded'
  with pytest.raises(ValueError, match="a core's 32 MiB of VMEM, got 128 MiB"):
    prediction.compile_or_measure(Lowered(kernel))
  step = 'memory required for HLO temporaries (38.04G) exceeds available HBM (31.25G), vmem'
  needed, compiled = prediction.compile_or_measure(Lowered(step))
  assert needed[1] == 31.25 * 2**30 and compiled is None


class _Chip:
  platform, device_kind, process_index = 'tpu', 'TPU v5 lite', 0


def test_suggestions_keep_the_fastest_that_fits(config, monkeypatch):
  """Candidates are compiled from the most promising on; too large ones are passed over."""
  tried = []

  def predict(changed, layout, *_):
    tried.append((changed.mesh.fsdp, changed.compute.remat, changed.batch_size))
    fits = len(tried) > 1
    seconds = dataclasses.replace(_ESTIMATE, tensorcore_seconds=float(len(tried)))
    return _prediction(fits=fits, estimate=seconds if fits else None)

  monkeypatch.setattr(prediction, 'predict', predict)
  monkeypatch.setattr(
    sharding, 'make_mesh', lambda mesh, devices: real(mesh, jax.devices()[:8])
  )
  lines = []
  found, changed = suggest.best(
    _config(config), [_Chip()] * 8, 4, lambda *words, **_: lines.append(words[0])
  )
  assert len(tried) == 4 and len({*tried}) == 4
  assert found.estimate.step_seconds == 2.0  # the second: the first did not fit
  assert (changed.mesh.fsdp, changed.compute.remat, changed.batch_size) == tried[1]
  assert 'does not fit' in lines[0] and '--gin.BATCH_SIZE=' in lines[-1]
  # The flags that are printed give the same run.
  before = _config(config, mesh=MeshConfig(data=2, tensor=4))
  after = suggest.apply(before, suggest.Candidate(8, 1, 1, 2, 'full'), 8)
  flags = dict(
    flag.removeprefix('--gin.').split('=', 1)
    for flag in suggest.bindings(before, after).split()
  )
  mesh = {k.split('.')[1]: int(v) for k, v in flags.items() if 'MeshConfig' in k}
  assert dataclasses.replace(before.mesh, **mesh) == after.mesh
  assert int(flags['BATCH_SIZE']) == 16 and flags['ComputeConfig.remat'] == '"\'full\'"'
  monkeypatch.setattr(prediction, 'predict', lambda *_: _prediction())
  with pytest.raises(ValueError, match='must fit 8 x TPU v5 lite'):
    suggest.best(_config(config), [_Chip()] * 8, 2, lambda *_, **__: None)


real = sharding.make_mesh
_ESTIMATE = prediction.estimate.Estimate(1.0, 0.0, 0.0, {}, {}, ())


def test_part_a_is_what_the_mixture_leaves(config):
  run = _config(config, objectives=prediction_objectives(blank=1.0))
  assert '85% of them Part A' in run.recipe.rows_in_words(run)
  mixed = _config(config, objectives=prediction_objectives(blank=0.5, document=0.5))
  left = mixed.recipe.visibility(mixed).key_end[0, 0] / 48
  assert left == pytest.approx(1 - (0.15 + 0.75) / 2, abs=0.5 / 48)
  end = run.recipe.visibility(run).key_end[0]
  assert end[0] == round(48 * 0.85) and end[-1] == 48
  causal = models.ChatGLM2Config(
    num_layers=1,
    hidden_size=8,
    num_heads=1,
    num_kv_heads=1,
    head_size=8,
    mlp_size=8,
    vocab_size=8,
    max_positions=48,
  )
  run = _config(causal)
  assert (run.recipe.visibility(run).key_end[0] == np.arange(48) + 1).all()


def prediction_objectives(**weights):
  from glm_jax.data.examples.objective_config import ObjectiveConfig

  return ObjectiveConfig(**{'blank': 0.0, **weights})


# From here on, compiled for real chips.

# Of a real model's width: the compiler may sum the gradients of a small one whole.
_LAYERS = dict(num_layers=2, hidden_size=2048, num_heads=16, vocab_size=65024)
_CAUSAL = models.ChatGLM2Config(
  **_LAYERS,
  num_kv_heads=2,
  head_size=128,
  mlp_size=5632,
  max_positions=8192,
)
_COMPUTE = models.ComputeConfig(dtype='bfloat16', remat='attention_qkv')


def _compiled(run, topology):
  layout = sharding.make_mesh(run.mesh, topologies.devices(topology))
  built, lowered = prediction.lower(run, layout)
  return built, lowered.compile()


@pytest.mark.slow
@pytest.mark.parametrize(
  'topology,mesh', [('v5e:2x4', dict(fsdp=8)), ('v5p:2x2x4', dict(fsdp=8, tensor=2))]
)
def test_what_moves_between_chips(topology, mesh, monkeypatch):
  """Collectives of fsdp, and of fsdp x tensor, at 8,192 positions."""
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  run = _config(
    _CAUSAL,
    compute=_COMPUTE,
    task='glm_causal',
    feature_lengths={'tokens': 8192},
    batch_size=16,
    mesh=MeshConfig(**mesh),
  )
  built, compiled = _compiled(run, topology)
  text = compiled.as_text()
  assert not hlo.has_square(text, 8192)
  assert not hlo.collective_permute_loops(text)
  step = hlo.read(text)
  kinds = {c.kind for c in step.collectives}
  assert {'all-gather', 'reduce-scatter'} <= kinds and 'all-to-all' not in kinds
  whole = 2 * state.count(built.state['params'])  # bytes in bfloat16
  table_bytes = 2 * 65024 * 2048
  for c in step.collectives:
    assert c.bytes < whole / 2, c  # never the whole model at once
    if c.bytes > 1e6:
      assert c.dtype == 'bf16', c
    if c.kind == 'all-reduce' and c.dtype == 'bf16' and mesh.get('tensor', 1) == 1:
      assert c.bytes < table_bytes / 2, c  # no gradient of a table is summed whole
  attention = {k.name for k in step.kernels if 'splash' in k.name}
  assert any('fwd' in name for name in attention) and any('dkv' in n for n in attention)


def test_the_peak_is_the_compilers_but_for_a_cpus():
  """A TPU's may be less than the block of its temporaries, in which others lie, too."""
  stats = types.SimpleNamespace(
    argument_size_in_bytes=7, temp_size_in_bytes=24, peak_memory_in_bytes=23
  )
  compiled = types.SimpleNamespace(memory_analysis=lambda: stats)
  assert prediction.peak(compiled, 'TPU v5') == 23
  assert prediction.peak(compiled, 'cpu') == 31


@pytest.mark.slow
def test_a_small_row_of_the_topologies_table():
  """Two layers on one v5p host: predicted with all parts; what does not fit is measured."""
  run = _config(
    _CAUSAL,
    compute=_COMPUTE,
    task='glm_causal',
    feature_lengths={'tokens': 8192},
    batch_size=4,
    mesh=MeshConfig(fsdp=4),
  )
  layout = sharding.make_mesh(run.mesh, topologies.devices('v5p:2x2x1'))
  found = prediction.predict(run, layout)
  assert found.fits and found.estimate.attention_calls == {'fwd': 2, 'dkv': 2}
  assert found.estimate.attention_seconds > 0 and not found.estimate.unknown_loops
  assert 0.1 < found.mfu < 0.8 and found.visited == pytest.approx(36 / 32, rel=0.01)
  text = table.render(found, run, 'v5p:2x2x1')
  assert 'tpu_splash' in text and 'calibrated' in text and 'reduce-scatter' in text
  # Sums of gradients in a loop, over which the compiler once stumbled.
  twice = dataclasses.replace(run, batch_size=8, microbatches=2)
  again = prediction.predict(twice, layout)
  assert again.fits and again.estimate.attention_calls == {'fwd': 4, 'dkv': 4}
  assert 1.8 < again.estimate.step_seconds / found.estimate.step_seconds < 2.2
  large = dataclasses.replace(run, batch_size=512)
  found = prediction.predict(large, layout)
  assert not found.fits and found.memory['peak'] > found.memory['limit'] > 90 * 2**30


@pytest.mark.slow
def test_an_h100_is_planned_without_one():
  run = _config(
    dataclasses.replace(_CAUSAL, num_layers=1),
    compute=_COMPUTE,
    task='glm_causal',
    feature_lengths={'tokens': 4096},
    batch_size=8,
    mesh=MeshConfig(fsdp=8),
  )
  layout = sharding.make_mesh(run.mesh, topologies.devices('h100:1x1x8'))
  found = prediction.predict(run, layout)
  assert found.attention[0] == 'gpu_tokamax' and found.memory['peak'] > 0
  text = table.render(found, run, 'h100:1x1x8')
  assert 'roofline' in text and 'predicted' not in text
  # XLA compiles for a GPU what it cannot hold.
  found = prediction.predict(dataclasses.replace(run, batch_size=4096), layout)
  assert not found.fits and found.memory['peak'] > found.memory['limit']


@pytest.mark.slow
def test_the_published_rows_are_of_this_code():
  """Fingerprints of the table's cheap rows; others only take longer to lower."""
  from benchmarks import topologies as published

  results = json.loads(published.RESULTS.read_text(encoding='utf-8'))
  assert {row.key for row in published.ROWS} == {*results}
  for row in published.ROWS:
    recorded = results[row.key]
    assert recorded['bindings'] == list(row.bindings)
    if 'ChatGLM2-6B' in row.model or recorded['jax'] != jax.__version__:
      continue
    found = published.lowered_fingerprint(*published.configure(row))
    assert found == recorded['fingerprint'], (
      f'{row.key} is of another program: run python -m benchmarks.topologies'
    )
  assert re.search(r'<!-- topologies -->\n\| model', (ROOT / 'README.md').read_text())


@pytest.mark.slow
def test_reading_a_context_holds_no_logits_and_little_memory(monkeypatch):
  """Two layers of ChatGLM2-6B's width, 8 rows of 4,096, on one v5p."""
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  config = dataclasses.replace(_CAUSAL, hidden_size=4096, num_heads=32, mlp_size=13696)
  model = models.build(config, models.ComputeConfig(dtype='bfloat16'))
  layout = sharding.make_mesh(MeshConfig(), topologies.devices('v5p:2x2x1')[:1])
  B, T = 8, 4096
  on_chip = lambda tree: jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(
      a.shape,
      jnp.bfloat16 if a.dtype == jnp.float32 else a.dtype,
      sharding=sharding.replicated(layout),
    ),
    tree,
  )
  params = on_chip(state.abstract_params(config, layout))
  read = functools.partial(decode.read_context, model, causal=True, dtype='bfloat16')
  with sharding.active(layout):
    cache = on_chip(jax.eval_shape(lambda: kv_cache.init(config, B, T, 'bfloat16')))
    ids = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((B, T), (B,), (B,))]

    def fill(variables, cache, tokens, lengths, rows):
      return kv_cache.put(cache, read(variables, tokens, lengths)[0], rows)

    arguments = ({'params': params}, cache, *on_chip(ids))
    compiled = jax.jit(fill, donate_argnums=1).lower(*arguments).compile()
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert f'{T},65024]' not in text.replace('65024,4096]', '')
  size = sum(2 * leaf.size for leaf in jax.tree.leaves((params, cache)))
  assert memory.peak_memory_in_bytes <= size + 3 * 2**30
  # The cache is given back in its own memory.
  assert memory.alias_size_in_bytes == sum(2 * a.size for a in jax.tree.leaves(cache))
