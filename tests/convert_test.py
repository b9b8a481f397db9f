"""Conversion: every layout there and back, damaged and hostile files, training on."""

import json
import os
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from commands import in_process, refused
from foreign import arrays_of, config_json, exported, imported, write_safetensors
from safetensors.numpy import load_file, save_file

from glm_jax import checkpoints, convert, models, sharding
from glm_jax.batch import Batch
from glm_jax.checkpoints import slices
from glm_jax.interop import files
from glm_jax.sharding import MeshConfig
from glm_jax.text import vocabulary as vocabularies
from glm_jax.text.released import ChatGLM3Vocabulary
from glm_jax.training import losses, start, state, step
from glm_jax.training.optimizer import OptimizerConfig, make_optimizer

ROOT = pathlib.Path(__file__).parent.parent
HUGGING_FACE = ('chatglm', 'chatglm2', 'hf_glm', 'glm4_0414')


def _tensors_in(folder):
  return {k: v for path in folder.glob('*.safetensors') for k, v in load_file(path).items()}


def _same(found, wanted):
  """Names, dtypes and bytes."""
  assert set(found) == set(wanted)
  for name, array in wanted.items():
    assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
    assert found[name].tobytes() == array.tobytes(), name


def _source(name):
  arrays, tensors = arrays_of(name)
  return tensors, config_json(name, arrays)


# There and back, in memory: every layout.


@pytest.mark.parametrize('name', ['glm', 'glm_130b', *HUGGING_FACE])
@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_every_layout_comes_back_byte_for_byte(name, dtype):
  tensors, config = _source(name)
  kind = convert.DTYPES[dtype]
  tensors = {k: v if 'layernorm' in k else v.astype(kind) for k, v in tensors.items()}
  megatron = not config
  found, tree = imported(
    tensors,
    config,
    'megatron' if megatron else 'huggingface',
    **({'num_heads': 4} if megatron else {}),
  )
  assert tree['words']['weight'].dtype == kind  # the source's own, nothing is cast
  buffers = {
    k: [tensors[k].dtype.name, tensors[k].astype(float).tolist()] for k in found.buffers
  }
  _same(exported(tree, found.format, found.config, buffers=buffers), tensors)
  # Without the source's own, computed frequencies stand in their place.
  made = exported(tree, found.format, found.config)
  assert set(made) == set(tensors)
  for buffer in found.buffers:
    np.testing.assert_allclose(
      made[buffer].astype(float), tensors[buffer].astype(float), rtol=1e-2
    )


def test_prefixed_names_and_repeated_heads_come_back():
  tensors, _ = _source('glm')
  prefixed = {f'glm.{name}': tensor for name, tensor in tensors.items()}
  found, tree = imported(prefixed, {'num_attention_heads': 4})
  assert (found.format, found.prefix) == ('glm-10b', 'glm.')
  _same(exported(tree, 'glm-10b', found.config, prefix='glm.'), prefixed)
  tensors, config = _source('chatglm')
  tensors['lm_head.weight'] = tensors['transformer.word_embeddings.weight'].copy()
  found, tree = imported(tensors, config)
  assert found.repeats_head and 'head' not in tree
  buffers = {k: ['float32', tensors[k].tolist()] for k in found.buffers}
  _same(
    exported(tree, 'chatglm', found.config, repeats_head=True, buffers=buffers), tensors
  )
  # What a file says is not tied is not, even where the two are equal.
  found, tree = imported(tensors, {**config, 'tie_word_embeddings': False})
  assert not found.config.tied_head and 'head' in tree


def _split(name, tensor, parts, gated):
  """One tensor as tensor-parallel parts, as change_mp.py and convert_tp.py cut it."""
  if 'query_key_value' in name and not gated:
    thirds = [np.split(third, parts) for third in np.split(tensor, 3)]
    return [np.concatenate([third[i] for third in thirds]) for i in range(parts)]
  if 'dense_h_to_4h' in name and gated:
    halves = [np.split(half, parts) for half in np.split(tensor, 2)]
    return [np.concatenate([half[i] for half in halves]) for i in range(parts)]
  if 'query_key_value' in name or 'dense_h_to_4h' in name or 'word_embeddings' in name:
    return np.split(tensor, parts)
  if name.endswith(('attention.dense.weight', 'dense_4h_to_h.weight')):
    return np.split(tensor, parts, axis=1)
  return [tensor] * parts


@pytest.mark.parametrize('name,parts', [('glm', 2), ('glm', 4), ('glm_130b', 2)])
def test_parts_of_a_model_are_put_together_and_cut_again(name, parts):
  tensors, _ = _source(name)
  cut = [{} for _ in range(parts)]
  for key, tensor in tensors.items():
    for part, piece in zip(
      cut, _split(key, tensor, parts, name == 'glm_130b'), strict=True
    ):
      part[key] = piece
  found, whole = imported(tensors, {}, 'megatron', num_heads=4)
  again, tree = imported(cut, {}, 'megatron', num_heads=4)
  assert again.config == found.config
  jax.tree.map(np.testing.assert_array_equal, tree, whole)
  for rank in range(parts):
    made = exported(tree, found.format, found.config, rank=rank, parts=parts)
    _same(made, cut[rank])
  cut[1]['transformer.final_layernorm.weight'] = np.zeros_like(
    cut[0]['transformer.final_layernorm.weight']
  )
  with pytest.raises(ValueError, match=r'final_layernorm.*must be the same in every part'):
    imported(cut, {}, 'megatron', num_heads=4)


@pytest.mark.parametrize('name', HUGGING_FACE)
def test_sizes_that_config_json_leaves_out_are_those_of_the_tensors(name):
  tensors, config = _source(name)
  found, _ = imported(tensors, config)
  sizes = (
    'num_layers',
    'num_hidden_layers',
    'hidden_size',
    'vocab_size',
    'ffn_hidden_size',
  )
  sizes += ('inner_hidden_size', 'intermediate_size', 'padded_vocab_size', 'attention_bias')
  less = {k: v for k, v in config.items() if k not in sizes}
  assert len(less) < len(config) and imported(tensors, less)[0].config == found.config


def test_a_missing_head_is_missing_unless_it_is_said_to_be_tied():
  for name, head in (
    ('chatglm2', 'transformer.output_layer'),
    ('hf_glm', 'lm_head'),
    ('glm4_0414', 'lm_head'),
  ):
    tensors, config = _source(name)
    del tensors[f'{head}.weight']
    for ties in (None, False):
      with pytest.raises(ValueError, match=f'lacks {head}'):
        imported(tensors, {**config, 'tie_word_embeddings': ties})
    found, tree = imported(tensors, {**config, 'tie_word_embeddings': True})
    assert found.config.tied_head and 'head' not in tree


@pytest.mark.parametrize('name', HUGGING_FACE)
def test_a_config_json_must_be_there(name):
  with pytest.raises(ValueError, match=r'must have a config\.json'):
    imported(_source(name)[0], {}, num_heads=4)


@pytest.mark.parametrize(
  'name,change,message',
  [
    ('chatglm2', {'num_layers': 4}, r'num_layers=4 must hold .* lacks .*layers\.3'),
    ('chatglm2', {'num_layers': 2}, r'has .*layers\.2.* besides'),
    ('chatglm2', {'ffn_hidden_size': 80}, r'mlp_size of the config disagrees'),
    ('chatglm2', {'padded_vocab_size': 256}, r'\(256, .*vocab_size of the config'),
    ('chatglm2', {'multi_query_group_num': 4}, r'num_heads, num_kv_heads, head_size'),
    ('chatglm2', {'rmsnorm': False}, r'rmsnorm in .* must be True'),
    ('chatglm2', {'quantization_bit': 4}, r'quantization_bit in .* must be 0'),
    ('chatglm2', {'num_attention_heads': '4'}, r'must be int'),
    ('chatglm2', {'num_attention_heads': 0}, r'must be positive'),
    ('chatglm', {'hidden_size': 64}, r'hidden_size of the config disagrees'),
    ('hf_glm', {'model_type': 'glm4'}, r"model_type in .* must be 'glm'"),
    # Two programs, told apart by their norms.
    ('glm4_0414', {'model_type': 'glm'}, r"model_type in .* must be 'glm4'"),
    ('hf_glm', {'model_type': 'glm4_moe'}, r"must be 'glm' .* got 'glm4_moe'; such a mod"),
    ('hf_glm', {'rope_parameters': {'rope_type': 'yarn'}}, r"rope_type .* 'default'"),
    ('hf_glm', {'rope_parameters': 'yarn'}, 'must be an object'),
    (
      'hf_glm',
      {'rope_parameters': None, 'rope_scaling': {'type': 'dynamic', 'factor': 2.0}},
      r"type in .* 'linear'",
    ),
  ],
)
def test_a_config_that_does_not_fit_its_tensors_is_named(name, change, message):
  tensors, config = _source(name)
  with pytest.raises(ValueError, match=message):
    imported(tensors, {**config, **change})


def test_tensors_that_are_missing_or_unknown_are_all_listed():
  tensors, config = _source('chatglm2')
  wrong = dict(tensors)
  del wrong['transformer.encoder.final_layernorm.weight']
  wrong['transformer.prefix_encoder.embedding.weight'] = np.zeros(3)
  with pytest.raises(ValueError, match=r'lacks .*final_layernorm.*has .*prefix_encoder'):
    imported(wrong, config)
  with pytest.raises(ValueError, match='must be named as one of'):
    imported({'bert.weight': np.zeros(3)}, {})


# On disk, through the command.


def _convert(*arguments):
  convert.main([str(argument) for argument in arguments])


@pytest.fixture(scope='session')
def vocabulary():
  text = ['the quick brown fox jumps over the lazy dog. ' * 4, '语言模型在学习文字。' * 8]
  return ChatGLM3Vocabulary(vocabularies.train_sentencepiece(text, 512, bpe=True))


@pytest.fixture(scope='session')
def released(tmp_path_factory, vocabulary):
  """ChatGLM3's layout in two shards, float16, with a tokenizer; its checkpoint."""
  folder = tmp_path_factory.mktemp('released')
  arrays, tensors = arrays_of('chatglm2')
  rng = np.random.default_rng(0)
  rows = -(-vocabulary.size // 128) * 128
  for name in ('embedding.word_embeddings', 'output_layer'):
    table = rng.normal(0, 0.5, (rows, tensors[f'transformer.{name}.weight'].shape[1]))
    tensors[f'transformer.{name}.weight'] = table
  tensors = {k: v.astype(np.float16) for k, v in tensors.items()}
  config = {**config_json('chatglm2', arrays), 'padded_vocab_size': rows}
  write_safetensors(folder / 'source', tensors, config, shards=2)
  (folder / 'source' / 'tokenizer.model').write_bytes(vocabulary.model)
  (folder / 'source' / 'tokenization_chatglm.py').write_text("roles = ['<|user|>']")
  _convert(folder / 'source', folder / 'checkpoint')
  return folder, tensors


def test_a_released_model_becomes_a_checkpoint_and_comes_back(released, tmp_path):
  folder, tensors = released
  meta = checkpoints.read_meta(checkpoints.find(str(folder / 'checkpoint')))
  assert meta['vocabulary']['kind'] == 'chatglm3'
  leaves = slices.StoredLeaves(folder / 'checkpoint')
  assert {spec.dtype for spec in leaves.specs.values()} == {np.dtype(np.float16)}
  _convert(folder / 'checkpoint', tmp_path / 'again', '--shard_size=4e-5')
  assert len(list((tmp_path / 'again').glob('model-*.safetensors'))) > 2
  _same(_tensors_in(tmp_path / 'again'), tensors)
  source = json.loads((folder / 'source' / 'config.json').read_text())
  made = json.loads((tmp_path / 'again' / 'config.json').read_text())
  assert {k: made[k] for k in source} == source and made['torch_dtype'] == 'float16'
  assert (tmp_path / 'again' / 'tokenizer.model').read_bytes() == (
    folder / 'source' / 'tokenizer.model'
  ).read_bytes()
  # And from there once more: what is written is what is read.
  _convert(tmp_path / 'again', tmp_path / 'twice')
  twice = checkpoints.read_meta(checkpoints.find(str(tmp_path / 'twice')))
  assert twice['vocabulary'] == meta['vocabulary'] and twice['model'] == meta['model']
  again = slices.StoredLeaves(tmp_path / 'twice')
  for path, spec in leaves.specs.items():
    for layer in range(spec.shape[0]) if path[0] == 'layers' else (None,):
      np.testing.assert_array_equal(leaves.read(path, layer), again.read(path, layer))


def test_casts_are_explicit(released, tmp_path):
  folder, tensors = released
  _convert(folder / 'checkpoint', tmp_path / 'brain', '--dtype=bfloat16', '--to=chatglm2')
  found = _tensors_in(tmp_path / 'brain')
  wanted = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
  _same(found, wanted)


def test_the_export_for_transformers_is_complete(released, tmp_path, vocabulary):
  folder, _ = released
  _convert(folder / 'checkpoint', tmp_path / 'glm', '--to=glm')
  read = lambda name: json.loads((tmp_path / 'glm' / name).read_text(encoding='utf-8'))
  config, generation = read('config.json'), read('generation_config.json')
  assert config['model_type'] == 'glm' and config['rms_norm_eps'] == 1e-5
  assert config['rope_parameters']['partial_rotary_factor'] == 0.5
  assert config['attention_bias'] is True and config['tie_word_embeddings'] is False
  control = vocabulary.control
  stops = [2, control['<|user|>'], control['<|observation|>']]
  assert config['eos_token_id'] == generation['eos_token_id'] == stops
  assert config['pad_token_id'] == 0
  assert read('tokenizer.json')['model']['type'] == 'BPE'
  assert '<|assistant|>' in read('tokenizer_config.json')['chat_template']
  _convert(tmp_path / 'glm', tmp_path / 'checkpoint')
  meta = checkpoints.read_meta(checkpoints.find(str(tmp_path / 'checkpoint')))
  theirs = checkpoints.read_meta(checkpoints.find(str(folder / 'checkpoint')))
  assert meta['model'] == theirs['model'] and meta['vocabulary'] == theirs['vocabulary']


def test_an_interrupted_conversion_goes_on(released, tmp_path, monkeypatch, capsys):
  folder, _ = released
  read, calls = files._read, []

  def failing(name, spec):
    calls.append(name)
    if len(calls) == failing.limit:
      raise OSError('the disk went away')
    return read(name, spec)

  monkeypatch.setattr(files, '_read', failing)
  failing.limit = 15
  with pytest.raises(OSError, match='went away'):
    _convert(folder / 'source', tmp_path / 'checkpoint')
  assert not (tmp_path / 'checkpoint').exists()
  failing.limit, before = 0, len(calls)
  _convert(folder / 'source', tmp_path / 'checkpoint')
  assert 'going on with' in capsys.readouterr().out
  again = [name for name in calls[before:] if 'layers.0' in name]
  assert not again and len(calls) > before  # the first layer was finished
  leaves = [slices.StoredLeaves(at / 'checkpoint') for at in (folder, tmp_path)]
  for path in leaves[0].specs:
    np.testing.assert_array_equal(*(found.read(path, None) for found in leaves))
  assert sorted(os.listdir(tmp_path)) == ['checkpoint']
  # Another source under the same name begins anew.
  (tmp_path / '.other.partial').mkdir()
  (tmp_path / '.other.partial' / 'conversion.json').write_text('{}')
  _convert(folder / 'source', tmp_path / 'other')
  assert 'going on with' not in capsys.readouterr().out


def test_every_fused_tensor_is_read_once(released, tmp_path, monkeypatch):
  """Three leaves of one tensor follow each other, and the latest tensor is kept."""
  read, names = files._read, []
  monkeypatch.setattr(
    files, '_read', lambda name, spec: names.append(name) or read(name, spec)
  )
  _convert(released[0] / 'source', tmp_path / 'checkpoint')
  counts = {name: names.count(name) for name in names if 'layers' in name}
  assert set(counts.values()) == {1}


def test_a_converted_checkpoint_is_read_onto_a_mesh(released):
  mesh = MeshConfig(data=2, fsdp=2, tensor=2)
  folder, _ = released
  leaves = slices.StoredLeaves(folder / 'checkpoint')
  found = checkpoints.find(str(folder / 'checkpoint'))
  config = models.config.from_dict(checkpoints.read_meta(found)['model'])
  size = mesh.fsdp * mesh.tensor * max(mesh.data, 1)
  built = sharding.make_mesh(mesh, jax.devices()[:size])
  params = checkpoints.read_params(found, state.abstract_params(config, built))
  for path, leaf in slices.flat(params).items():
    assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(leaf, leaves.read(path, None).astype(np.float32))


@pytest.mark.parametrize('name', ['chatglm2', 'glm4_0414'])
def test_training_begins_at_the_imported_models_loss_and_it_falls(name, tmp_path):
  """Of a checkpoint in its layout; the loss is that of the released code."""
  arrays, tensors = arrays_of(name)
  write_safetensors(tmp_path / 'source', tensors, config_json(name, arrays))
  _convert(tmp_path / 'source', tmp_path / 'checkpoint')
  meta = checkpoints.read_meta(checkpoints.find(str(tmp_path / 'checkpoint')))
  config = models.config.from_dict(meta['model'])
  mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
  optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=1), 100)
  fresh = state.init_state(config, optimizer, mesh, 0)
  params = start.params_from(str(tmp_path / 'checkpoint'), config, '', fresh['params'])
  ids, labels = arrays['in/ids'][:, :-1], arrays['in/labels'][:, 1:]
  t = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
  zeros = np.zeros_like(t)
  batch = Batch(
    tokens=ids,
    targets=np.maximum(labels, 0),
    loss_weights=(labels >= 0).astype(np.float32),
    positions=t,
    block_positions=zeros,
    key_start=zeros,
    key_end=t + 1,
    objective=zeros + 3,
  )
  train_step = jax.jit(
    step.make_train_step(
      losses.pretraining_loss(models.build(config)), optimizer, microbatches=1, seed=0
    )
  )
  current, values = state.with_params(fresh, params), []
  for _ in range(12):
    current, found = train_step(current, {}, batch)
    values.append(float(found['loss'][0] / found['loss'][1]))
  np.testing.assert_allclose(values[0], arrays['out/loss'], rtol=1e-5)
  assert values[-1] < values[0] - 0.2


# Bad input, as a user meets it.


def _everything(folder):
  return {
    str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob('*')
  }


FIRST = 'model-00001-of-00002.safetensors'


def _truncate(folder):
  content = (folder / FIRST).read_bytes()
  (folder / FIRST).write_bytes(content[:-100])


def _garble(folder):
  content = bytearray((folder / FIRST).read_bytes())
  content[8:40] = b'x' * 32
  (folder / FIRST).write_bytes(content)


def _index(folder, change):
  path = folder / 'model.safetensors.index.json'
  index = json.loads(path.read_text())
  change(index['weight_map'])
  path.write_text(json.dumps(index))


def _point_outside(folder):
  shutil.copy(folder / FIRST, folder.parent / 'outside.safetensors')
  _index(
    folder,
    lambda where: where.update(
      {k: '../outside.safetensors' for k, v in where.items() if v == FIRST}
    ),
  )


def _integers(folder):
  tensors = load_file(folder / FIRST)
  name = sorted(tensors)[0]
  save_file({**tensors, name: tensors[name].astype(np.int8)}, folder / FIRST)


def _no_config(folder):
  (folder / 'config.json').unlink()


def _other_tokenizer(folder):
  rng = np.random.default_rng(0)
  words = [bytes(rng.integers(97, 123, rng.integers(3, 9))).decode() for _ in range(400)]
  lines = [' '.join(rng.choice(words, 12)) for _ in range(900)]
  model = vocabularies.train_sentencepiece(lines, 1200, bpe=True)
  (folder / 'tokenizer.model').write_bytes(model)


@pytest.mark.parametrize(
  'damage,words',
  [
    (_truncate, (FIRST, 'transformer.', 'ends before')),
    (_garble, (FIRST, 'header')),
    (lambda folder: (folder / FIRST).unlink(), (FIRST, 'must name files that exist')),
    (_point_outside, ('../outside.safetensors', 'of its own folder')),
    (
      lambda folder: _index(folder, lambda where: where.popitem()),
      ('must hold what model.safetensors.index.json says',),
    ),
    (_integers, ('quantization_bit', 'must be 4 or 8', 'before it was quantised')),
    (_no_config, ('config.json', 'num_attention_heads')),
    (
      lambda folder: (folder / FIRST).write_text(
        'version https://git-lfs.github.com/spec/v1'
      ),
      ('pointer of git-lfs', FIRST),
    ),
    (
      lambda folder: (folder / 'tokenizer_config.json').write_text('[]'),
      ('tokenizer_config.json', 'JSON object'),
    ),
    (lambda folder: (folder / 'config.json').write_text('{'), ('config.json', 'JSON')),
    (_other_tokenizer, ("fit the model's embedding table", '--vocabulary')),
    (
      lambda folder: (folder / 'tokenizer.model').write_bytes(b'none'),
      ('tokenizer.model', 'must be a sentencepiece model'),
    ),
  ],
)
def test_a_damaged_checkpoint_is_named_and_nothing_is_written(
  released, tmp_path, damage, words
):
  shutil.copytree(released[0] / 'source', tmp_path / 'source')
  damage(tmp_path / 'source')
  before = _everything(tmp_path)
  refused(in_process('convert', tmp_path / 'source', tmp_path / 'checkpoint'), *words)
  assert _everything(tmp_path) == before


def test_flags_and_folders_that_are_wrong_are_refused(released, tmp_path):
  folder, _ = released
  checkpoint_, out = folder / 'checkpoint', tmp_path / 'out'
  (tmp_path / 'taken').mkdir()
  (tmp_path / 'nothing').mkdir()
  for arguments, words in (
    ((folder / 'source', tmp_path / 'taken'), ('DST must not exist', 'taken')),
    ((tmp_path / 'nowhere', out), ('must be a folder', 'nowhere')),
    ((tmp_path / 'nothing', out), ('must hold model.safetensors',)),
    ((checkpoint_, out, '--to=megatron'), ('chatglm2', 'megatron')),
    ((checkpoint_, out, '--parts=2'), ('--parts', 'megatron')),
    ((folder / 'source', out, '--set=num_heads'), ('FIELD=VALUE',)),
    ((folder / 'source', out, '--set=layers=3'), ('layers', 'num_layers')),
    ((folder / 'source', out, '--vocabulary=bert:x.txt'), ('x.txt',)),
  ):
    before = _everything(tmp_path)
    refused(in_process('convert', *arguments), *words)
    assert _everything(tmp_path) == before


def test_a_full_disk_is_noticed_before_anything_is_written(released, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(OSError, match=r'needs .* GB free in .*nothing was written'):
    _convert(released[0] / 'source', tmp_path / 'checkpoint')
  assert not list(tmp_path.iterdir())


def test_without_torch_its_files_are_refused_with_a_remedy(tmp_path, monkeypatch):
  (tmp_path / 'source').mkdir()
  (tmp_path / 'source' / 'pytorch_model.bin').write_bytes(b'PK')
  monkeypatch.setitem(sys.modules, 'torch', None)
  done = in_process('convert', tmp_path / 'source', tmp_path / 'out')
  refused(done, 'PyTorch must be installed', 'pip install torch')
