"""Adapters of other programs: into a checkpoint, out for peft, and back."""

import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import policies
import pytest
import stored
import tuned
from commands import ROOT, in_process, refused
from flax import traverse_util
from foreign import arrays_of, config_json, write_safetensors
from safetensors.numpy import load_file, save_file

import glm_jax
from glm_jax import checkpoints, convert, models
from glm_jax.models import virtual
from glm_jax.training import adapters
from glm_jax.training.adapters import LoRAConfig

TEXTS = ['one two three four five', 'short']


def _convert(*arguments):
  convert.main([str(argument) for argument in arguments])


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
  folder = tmp_path_factory.mktemp('bases')
  made = {k: stored.checkpoint(folder / k, c) for k, c in stored.FAMILIES.items()}
  # transformers has no vocabulary of bytes.
  bare = stored.checkpoint(folder / 'bare', stored.FAMILIES['chatglm2'], vocabulary=None)
  return {**made, 'bare': bare}


def _held(folder):
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as reader:
    tree = reader.restore(checkpoints.find(str(folder)) / 'params')
  return traverse_util.flatten_dict(jax.tree.map(np.asarray, tree))


def _logits(folder, **more):
  return glm_jax.load(folder, **more).logits(TEXTS)


def _by_peft(folder, rows):
  """What peft makes of rows with a folder's adapters, beside its model and merged."""
  done = subprocess.run(
    [sys.executable, ROOT / 'tests/peft_peer.py', folder / 'glm', folder / 'peft'],
    input=json.dumps({'ids': rows.tokens.tolist(), 'merged': str(folder / 'theirs')}),
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  return {k: np.array(v, np.float32) for k, v in json.loads(done.stdout).items()}


def _relative(a, b):
  return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize(
  ('family', 'format', 'changes'),
  [
    ('chatglm2', 'glm', {}),
    ('chatglm2', 'chatglm2', {'rank_stabilized': True}),
    ('chatglm2', 'chatglm2', {'targets': 'layers/attention/(q|v)/weight'}),
    ('glm', 'glm-10b', {'targets': 'layers/(attention|mlp)/(k|out|up)/.*'}),
  ],
)
def test_out_for_peft_and_back_is_the_same_to_the_bit(
  bases, tmp_path, family, format, changes
):
  lora = LoRAConfig(**{'rank': 3, 'alpha': 12.0, 'dropout': 0.1, **changes})
  run = stored.adapted(tmp_path / 'run', bases[family], stored.FAMILIES[family], lora)
  _convert(run, tmp_path / 'peft', '--peft', f'--to={format}')
  _convert(tmp_path / 'peft', tmp_path / 'back', f'--base={bases[family]}')
  before, after = _held(run), _held(tmp_path / 'back')
  assert {*before} == {*after}
  for path, array in before.items():
    np.testing.assert_array_equal(after[path], array)
  metas = [
    checkpoints.read_meta(checkpoints.find(str(f))) for f in (run, tmp_path / 'back')
  ]
  names = ('kind', 'rank', 'alpha', 'dropout', 'rank_stabilized', 'scaling')
  there, here = ({name: meta['adapters'][name] for name in names} for meta in metas)
  assert there == pytest.approx(here)
  assert metas[0]['base'] == metas[1]['base']
  # What was read trains on, and computes the same.
  np.testing.assert_array_equal(_logits(tmp_path / 'back'), _logits(run))


def test_what_peft_is_told_is_what_its_files_hold(bases, tmp_path):
  run = stored.adapted(
    tmp_path / 'run',
    bases['chatglm2'],
    stored.FAMILIES['chatglm2'],
    LoRAConfig(rank=3, alpha=12.0),
  )
  _convert(run, tmp_path / 'peft', '--peft', '--to=chatglm2')
  config = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
  assert config['r'] == 3 and config['lora_alpha'] == 12
  assert config['rank_pattern'] == {'query_key_value': 9, 'dense_h_to_4h': 6}
  assert config['alpha_pattern'] == {'query_key_value': 36, 'dense_h_to_4h': 24}
  names = ['dense', 'dense_4h_to_h', 'dense_h_to_4h', 'query_key_value']
  assert config['target_modules'] == names
  tensors = load_file(tmp_path / 'peft' / 'adapter_model.safetensors')
  for name, rank in (('query_key_value', 9), ('dense', 3)):
    at = f'base_model.model.transformer.encoder.layers.1.self_attention.{name}'
    A, B = (tensors[f'{at}.lora_{x}.weight'] for x in 'AB')
    assert A.shape == (rank, 32) and B.shape[1] == rank


@pytest.mark.parametrize('format', ['glm', 'chatglm2'])
def test_factors_that_peft_has_trained_are_read_by_their_own_rule(bases, tmp_path, format):
  """Dense blocks in fused projections, patterns, and layers without any."""
  base = bases['chatglm2']
  _convert(bases['bare'], tmp_path / 'plain', f'--to={format}')
  weights = load_file(tmp_path / 'plain' / 'model.safetensors')
  fused = {'glm': 'gate_up_proj', 'chatglm2': 'query_key_value'}[format]
  out = {'glm': 'o_proj', 'chatglm2': 'dense'}[format]
  modules = [k.removesuffix('.weight') for k in weights if k.endswith('weight')]
  rng, tensors = np.random.default_rng(5), {}
  for module in modules:
    last = module.rpartition('.')[2]
    if last == fused or (last == out and '.0.' in module):
      rank, alpha = (4, 6.0) if last == fused else (2, 4.0)
      rows, columns = weights[f'{module}.weight'].shape
      A, B = (rng.normal(0, 0.1, s).astype('f4') for s in ((rank, columns), (rows, rank)))
      for name, factor in (('A', A), ('B', B)):
        tensors[f'base_model.model.{module}.lora_{name}.weight'] = factor
      weights[f'{module}.weight'] = weights[f'{module}.weight'] + alpha / rank * B @ A
  (tmp_path / 'peft').mkdir()
  save_file(tensors, tmp_path / 'peft' / 'adapter_model.safetensors')
  content = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4, 'target_modules': [fused, out]}
  content |= {'rank_pattern': {fused: 4}, 'alpha_pattern': {fused: 6}, 'bias': 'none'}
  (tmp_path / 'peft' / 'adapter_config.json').write_text(json.dumps(content))
  _convert(tmp_path / 'peft', tmp_path / 'run', f'--base={base}')
  save_file(weights, tmp_path / 'plain' / 'model.safetensors')
  _convert(tmp_path / 'plain', tmp_path / 'merged', '--vocabulary=bytes')
  found, expected = _logits(tmp_path / 'run'), _logits(tmp_path / 'merged')
  # Factors are added up in another order; processors round 1e-6 apart.
  assert _relative(found, expected) < 3e-6
  assert _relative(_logits(base), expected) > 1e-3


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'peft_type': 'PREFIX_TUNING'}, ("peft_type='LORA'", "'PREFIX_TUNING'")),
    ({'use_dora': True}, ('use_dora=False', 'merge them')),
    ({'modules_to_save': ['lm_head']}, ('modules_to_save=None', 'lm_head')),
  ],
)
def test_other_kinds_of_peft_are_refused(bases, tmp_path, fields, words):
  lora = LoRAConfig(rank=2)
  run = stored.adapted(
    tmp_path / 'run', bases['chatglm2'], stored.FAMILIES['chatglm2'], lora
  )
  _convert(run, tmp_path / 'peft', '--peft', '--to=glm')
  path = tmp_path / 'peft' / 'adapter_config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
  again = lambda base: in_process(
    'convert', tmp_path / 'peft', tmp_path / 'new', f'--base={base}'
  )
  refused(again(bases['chatglm2']), *words)
  assert not (tmp_path / 'new').exists()


def test_adapters_of_another_model_are_refused(bases, tmp_path):
  lora = LoRAConfig(rank=2)
  run = stored.adapted(
    tmp_path / 'run', bases['chatglm2'], stored.FAMILIES['chatglm2'], lora
  )
  _convert(run, tmp_path / 'peft', '--peft', '--to=glm')
  new = tmp_path / 'new'
  refused(
    in_process('convert', tmp_path / 'peft', new, f'--base={bases["glm"]}'),
    "beside weights of the base's layers",
    'give the base',
  )
  refused(in_process('convert', tmp_path / 'peft', new), 'adapters of PEFT', '--base=DIR')
  refused(in_process('convert', run, new, '--peft'), "['chatglm2', 'glm', 'glm4']")
  refused(in_process('convert', bases['glm'], new, '--peft', '--to=glm-10b'), 'none in')
  assert not new.exists()


def test_integers_and_adapters_are_merged_as_plain_weights(bases, tmp_path):
  config = stored.FAMILIES['chatglm2']
  stored.quantize(bases['chatglm2'], tmp_path / 'int4', '--bits=4')
  run = stored.adapted(tmp_path / 'run', tmp_path / 'int4', config, LoRAConfig(rank=2))
  meta = checkpoints.read_meta(checkpoints.find(str(run)))
  assert meta['quantized'] == {'bits': 4, 'group': 0}
  expected = _logits(run)
  assert _relative(_logits(tmp_path / 'int4'), expected) > 1e-3
  done = in_process('convert', run, tmp_path / 'merged', '--to=checkpoint')
  refused(done, 'merged into plain weights', '--dequantize')
  _convert(run, tmp_path / 'merged', '--to=checkpoint', '--dequantize')
  assert _relative(_logits(tmp_path / 'merged'), expected) < 5e-6


@pytest.mark.parametrize('kind', ['ptuning', 'ptuning_proj'])
@pytest.mark.parametrize('name', ['chatglm', 'chatglm2'])
def test_virtual_tokens_of_thudm_are_read(name, kind, tmp_path):
  torch = pytest.importorskip('torch')
  arrays, tensors = arrays_of(name)
  write_safetensors(tmp_path / 'source', tensors, config_json(name, arrays))
  _convert(tmp_path / 'source', tmp_path / 'base')
  golden = np.load(ROOT / 'tests' / 'golden' / 'ptuning.npz')
  at = f'{name}/{kind}/prefix_encoder.'
  own = {k.removeprefix(at): golden[k] for k in golden.files if k.startswith(at)}
  (tmp_path / 'theirs').mkdir()
  named = {f'transformer.prefix_encoder.{k}': torch.tensor(v) for k, v in own.items()}
  torch.save(named, tmp_path / 'theirs' / 'pytorch_model.bin')
  _convert(tmp_path / 'theirs', tmp_path / 'run', f'--base={tmp_path}/base')
  meta = checkpoints.read_meta(checkpoints.find(str(tmp_path / 'run')))
  model = models.config.from_dict(meta['model'])
  layers = {'hidden': 'trans.0', 'out': 'trans.2'} if kind == 'ptuning_proj' else {}
  encoder = {'embedding': own['embedding.weight']} | {
    ours: {'weight': own[f'{k}.weight'].T, 'bias': own[f'{k}.bias']}
    for ours, k in layers.items()
  }
  held = traverse_util.unflatten_dict(_held(tmp_path / 'run'))
  found = adapters.beside(adapters.from_dict(meta['adapters']), model, held)['prefix']
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
  jax.tree.map(close, found, virtual.prefix(model, encoder))
  assert meta['adapters']['tokens'] == 5
  refused(
    in_process('convert', tmp_path / 'run', tmp_path / 'new', '--to=checkpoint'),
    'low-rank factors',
    'virtual tokens',
  )


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('peft'), reason='peft is not installed')
def test_peft_computes_and_merges_the_same(bases, tmp_path):
  """Ours, out, merged by peft, saved by transformers, and back."""
  lora = LoRAConfig(rank=3, alpha=12.0)
  run = stored.adapted(
    tmp_path / 'run', bases['chatglm2'], stored.FAMILIES['chatglm2'], lora
  )
  _convert(bases['bare'], tmp_path / 'glm', '--to=glm')
  _convert(run, tmp_path / 'peft', '--peft', '--to=glm')
  model = glm_jax.load(run)
  rows = model.rows(TEXTS[:1])
  expected = model.logits(rows)
  theirs = _by_peft(tmp_path, rows)
  for kind in ('beside', 'merged'):
    assert _relative(theirs[kind], expected) < 5e-6
  _convert(tmp_path / 'theirs', tmp_path / 'back', '--vocabulary=bytes')
  assert _relative(glm_jax.load(tmp_path / 'back').logits(rows), expected) < 5e-6
  assert _relative(_logits(bases['chatglm2']), _logits(run)) > 1e-3


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('peft'), reason='peft is not installed')
@pytest.mark.parametrize('stage', ['dpo', 'ppo'])
def test_what_alignment_has_trained_is_loaded_by_peft(tmp_path, stage, monkeypatch):
  """Factors of DPO, and of PPO, whose critic stays behind."""
  policies.prepare(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  base, lora = tmp_path / 'chatglm3_base', ('--gin_file=gin_configs/runs/lora.gin',)
  rate = 'OptimizerConfig.learning_rate=0.1'
  if stage == 'ppo':
    done = policies.run('train', tmp_path, rate, stage='ppo', run='run', flags=lora)
  else:
    pairs = [
      {'prompt': f'what is {n}?', 'chosen': 'an even one.', 'rejected': 'odd, that is.'}
      for n in range(60)
    ]
    corpus = tuned.write(tmp_path / 'pairs.jsonl', pairs)
    small = ("TASK_FEATURE_LENGTHS={'tokens': 128}", 'BATCH_SIZE=8', rate)
    done = tuned.of_stage('dpo', 'train', tmp_path, *small, corpus=corpus, flags=lora)
  assert done.returncode == 0, done.stderr
  run = tmp_path / 'run'
  _convert(base, tmp_path / 'glm', '--to=glm')
  _convert(run, tmp_path / 'peft', '--peft', '--to=glm')
  model = glm_jax.load(run)
  rows = model.rows(['what is a quick brown fox?'])
  expected = model.logits(rows)
  np.testing.assert_allclose(
    glm_jax.load(base, adapters=run).logits(rows), expected, atol=1e-5
  )
  assert _relative(glm_jax.load(base).logits(rows), expected) > 1e-3
  # Padding of the table behind the vocabulary is the model's, too.
  assert _relative(_by_peft(tmp_path, rows)['beside'], expected) < 5e-6
