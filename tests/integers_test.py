"""ChatGLM's own integers, both ways; those of other programs are refused by name."""

import dataclasses
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import stored
from commands import in_process, refused, snapshot
from foreign import arrays_of, config_json, exported, imported, write_safetensors
from safetensors.numpy import load_file

from glm_jax import checkpoints, models
from glm_jax.checkpoints import slices
from glm_jax.interop import integers
from glm_jax.models import ChatGLM2Config, GLMConfig, quantized

GOLDEN = pathlib.Path(__file__).parent / 'golden'


def test_packing_and_scales_are_the_originals():
  golden = np.load(GOLDEN / 'integers.npz')
  np.testing.assert_array_equal(integers.unpack(golden['packed4']), golden['q4'])
  np.testing.assert_array_equal(
    integers.pack(golden['q4'].astype(ml_dtypes.int4)), golden['packed4']
  )
  for bits in (8, 4):
    # Ours are of [inputs, outputs], and their scales are not rounded to half precision.
    values, scales = quantized.quantize(golden['w'].T, 1, bits)
    np.testing.assert_array_equal(scales.astype(np.float16), golden[f's{bits}'])
    off = values.astype(int).T - golden[f'q{bits}']
    assert np.abs(off).max() <= (bits == 8) and np.count_nonzero(off) <= 2
    values, scales = golden[f'q{bits}'].T, golden[f's{bits}'].astype(np.float32)
    y = golden['x'].astype(np.float32) @ quantized.dequantize(values, scales, 1)
    np.testing.assert_allclose(y, golden[f'y{bits}'], atol=3e-3)


def test_every_byte_is_unpacked_and_packed_again():
  every = np.arange(-128, 128).astype(np.int8).reshape(8, 32)
  np.testing.assert_array_equal(integers.pack(integers.unpack(every)), every)


LINEAR = (
  *('query_key_value', 'attention.dense', 'self_attention.dense'),
  *('dense_h_to_4h', 'dense_4h_to_h'),
)


def _released(name, bits, embeddings=False):
  """Tensors and config.json of a golden model, as ChatGLM's quantization.py makes them."""
  arrays, tensors = arrays_of(name)
  result = {}
  for key, tensor in tensors.items():
    tensor = tensor.astype(np.float16)
    tables = embeddings and ('word_embeddings' in key or 'lm_head' in key)
    if not (tables or key.endswith(tuple(f'{linear}.weight' for linear in LINEAR))):
      result[key] = tensor
      continue
    scale = (np.abs(tensor).max(1) / (2 ** (bits - 1) - 1)).astype(np.float16)
    values = np.rint(tensor / scale[:, None]).astype(np.int8)
    result[key] = (
      (values[:, 0::2] << 4) | (values[:, 1::2] & 15) if bits == 4 else values
    ).astype(np.int8)
    result[f'{key}_scale'] = scale
  return result, {**config_json(name, arrays), 'quantization_bit': bits}


def _in_folder(folder):
  return {k: v for path in folder.glob('*.safetensors') for k, v in load_file(path).items()}


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('name', ['chatglm', 'chatglm2'])
def test_released_integers_come_in_and_go_out_byte_for_byte(tmp_path, name, bits):
  tensors, config_file = _released(name, bits)
  write_safetensors(tmp_path / 'source', tensors, config_file)
  ids = dict(bos_token_id=1, mask_token_id=2, gmask_token_id=3, eos_token_id=4)
  (tmp_path / 'source' / 'config.json').write_text(json.dumps({**config_file, **ids}))
  done = in_process('convert', tmp_path / 'source', tmp_path / 'in')
  assert done.returncode == 0, done.stderr
  done = in_process('convert', tmp_path / 'in', tmp_path / 'out')
  assert done.returncode == 0, done.stderr
  stored.same(_in_folder(tmp_path / 'out'), tensors)
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert written['quantization_bit'] == bits and written['torch_dtype'] == 'float16'
  # What it computes is what its dequantised weights do.
  meta = checkpoints.read_meta(checkpoints.find(str(tmp_path / 'in')))
  assert meta['quantized'] == {'bits': bits, 'group': 0}
  config = models.config.from_dict(meta['model'])
  found = stored.read(tmp_path / 'in', config)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(found['scales'])} == {'float32'}
  inputs = stored.inputs(config.vocab_size)
  got = stored.logits(config, found, inputs)
  plain = _plain(tensors, bits)
  same, params = imported(plain, {**config_file, 'quantization_bit': 0})
  assert same.config == config
  expected = stored.logits(config, {'params': params}, inputs)
  assert np.abs(got - expected).max() <= 1e-6 * np.abs(expected).max()


def _plain(tensors, bits):
  """Released integers as float32 weights."""
  plain = {}
  for key, tensor in tensors.items():
    if f'{key}_scale' in tensors:
      values = tensor.astype(np.int32)
      if bits == 4:
        low = (values & 15) - 16 * ((values & 15) > 7)
        values = np.stack([values >> 4, low], -1).reshape(len(values), -1)
      scale = tensors[f'{key}_scale'].astype(np.float32)
      plain[key] = values.astype(np.float32) * scale[:, None]
    elif not key.endswith('_scale'):
      plain[key] = tensor.astype(np.float32)
  return plain


def test_released_integers_are_read_from_files_of_pytorch(tmp_path):
  torch = pytest.importorskip('torch')
  tensors, config_file = _released('chatglm', 4)
  write_safetensors(tmp_path / 'safe', tensors, config_file)
  (tmp_path / 'bin').mkdir()
  shutil.copy(tmp_path / 'safe' / 'config.json', tmp_path / 'bin')
  content = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
  torch.save(content, tmp_path / 'bin' / 'pytorch_model.bin')
  for kind in ('safe', 'bin'):
    done = in_process('convert', kind, f'{kind}-in', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
  leaves = [slices.StoredLeaves(tmp_path / f'{kind}-in') for kind in ('safe', 'bin')]
  a, b = ({path: x.read(path, None) for path in x.specs} for x in leaves)
  stored.same(a, b)


@pytest.mark.parametrize('at', ['source', 'in'])
def test_integers_become_plain_weights(tmp_path, at):
  tensors, config_file = _released('chatglm2', 4)
  write_safetensors(tmp_path / 'source', tensors, config_file)
  for arguments in (
    ('source', 'in'),
    (at, 'plain', '--dequantize', '--to=chatglm2', '--dtype=float32'),
    (at, 'half', '--dequantize', '--to=checkpoint'),
    ('half', 'again', '--to=glm'),
  ):
    done = in_process('convert', *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
  stored.same(_in_folder(tmp_path / 'plain'), _plain(tensors, 4))
  written = json.loads((tmp_path / 'plain' / 'config.json').read_text())
  assert written['quantization_bit'] == 0 and written['torch_dtype'] == 'float32'
  leaves = slices.StoredLeaves(tmp_path / 'half')
  assert {spec.dtype.name for spec in leaves.specs.values()} == {'float16'}


def test_a_quantised_embedding_is_what_its_code_computes(tmp_path):
  tensors, config_file = _released('chatglm', 4, embeddings=True)
  tensors['lm_head.weight'] = tensors['transformer.word_embeddings.weight']
  tensors['lm_head.weight_scale'] = tensors['transformer.word_embeddings.weight_scale']
  found, tree = imported(tensors, {**config_file, 'quantization_embeddings': True})
  assert found.bits == 4 and found.repeats_head and found.config.tied_head
  name = 'transformer.word_embeddings.weight'
  expected = _plain({k: v for k, v in tensors.items() if name in k}, 4)[name]
  np.testing.assert_array_equal(tree['words']['weight'], expected.astype(np.float16))
  # Out again, the embedding is plain, and config.json says so.
  raw = {'quantization_bit': 4, 'quantization_embeddings': True}
  assert integers.fields(raw, 4) == {**raw, 'quantization_embeddings': False}
  made = exported(tree, 'chatglm', found.config)
  assert made[name].dtype == np.float16 and f'{name}_scale' not in made
  key = 'transformer.layers.0.mlp.dense_h_to_4h.weight'
  stored.same({key: made[key]}, {key: tensors[key]})


def test_integers_go_to_formats_that_have_them(tmp_path):
  config = ChatGLM2Config(
    num_layers=1,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    mlp_size=48,
    vocab_size=384,
    max_positions=64,
  )
  source = stored.checkpoint(tmp_path / 'source', config)
  for name, more in (('whole', ()), ('groups', ('--group=8',))):
    stored.quantize(source, tmp_path / name, '--bits=4', *more)
  odd = stored.checkpoint(tmp_path / 'odd-plain', dataclasses.replace(config, mlp_size=47))
  stored.quantize(odd, tmp_path / 'odd', '--bits=4')
  of_glm = GLMConfig(
    num_layers=1, hidden_size=32, num_heads=4, vocab_size=384, max_positions=64
  )
  stored.checkpoint(tmp_path / 'plain', of_glm)
  stored.quantize(tmp_path / 'plain', tmp_path / 'glm', '--bits=8')
  for arguments, words in (
    (('whole',), ('--to=glm', '--dequantize')),  # its default
    (('groups', '--to=chatglm2'), ('groups of 8', '--dequantize')),
    (('odd', '--to=chatglm2'), ('two columns', "'inner_size': 47", '--bits=8')),
    (('glm', '--to=megatron'), ('--to=megatron', '--dequantize')),
    (('source', '--dequantize'), ('which has plain ones',)),
  ):
    done = in_process('convert', arguments[0], 'out', *arguments[1:], cwd=tmp_path)
    refused(done, *words)
    assert not (tmp_path / 'out').exists()
  done = in_process('convert', 'whole', 'out', '--to=chatglm2', cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  found = _in_folder(tmp_path / 'out')
  key = 'transformer.encoder.layers.0.mlp.dense_4h_to_h.weight'
  assert found[key].dtype == np.int8 and found[key].shape == (32, 24)
  # A cast is of scales and plain weights, since integers have no other dtype.
  done = in_process(
    *('convert', 'whole', 'half', '--to=chatglm2', '--dtype=float16'), cwd=tmp_path
  )
  assert done.returncode == 0, done.stderr
  half = _in_folder(tmp_path / 'half')
  stored.same(
    half, {k: v if v.dtype == np.int8 else v.astype(np.float16) for k, v in found.items()}
  )
  # In again, to the bit, and from checkpoint to checkpoint.
  for arguments in (('out', 'back'), ('groups', 'copy', '--to=checkpoint')):
    done = in_process('convert', *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
  for a, b in (('whole', 'back'), ('groups', 'copy')):
    stored.same(stored.read(tmp_path / a, config), stored.read(tmp_path / b, config))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'quantization_bit': 0}, r'quantization_bit in .* must be 4 or 8 .*got 0'),
    ({'quantization_bit': 2}, r'must be 4 or 8 .*got 2'),
    ({'quantization_bit': 8}, r'must have shape'),
    ('scale', r'must have a scale .*dense_h_to_4h\.weight_scale'),
    ('weight', r'must have a scale .*dense_h_to_4h\.weight_scale'),
    ('format', r"integers are read of the formats .*'glm'"),
  ],
)
def test_integers_that_do_not_fit_are_named(change, message):
  tensors, config_file = _released('chatglm2', 4)
  name = 'transformer.encoder.layers.0.mlp.dense_h_to_4h.weight'
  if isinstance(change, dict):
    config_file |= change
  elif change == 'scale':
    del tensors[f'{name}_scale']
  elif change == 'weight':
    tensors[name] = arrays_of('chatglm2')[1][name]
  else:
    arrays, tensors = arrays_of('hf_glm')
    name = 'model.layers.0.mlp.down_proj.weight'
    scale = np.ones(len(tensors[name]), np.float16)
    tensors |= {name: tensors[name].astype(np.int8), f'{name}_scale': scale}
    config_file = {**config_json('hf_glm', arrays), 'quantization_bit': 8}
  with pytest.raises(ValueError, match=message):
    imported(tensors, config_file)


@pytest.mark.parametrize(
  ('config', 'names', 'word'),
  [
    ({'quantization_config': {'quant_method': 'awq', 'bits': 4}}, ['a.qweight'], 'awq'),
    ({'quantization_config': {'quant_method': 'gptq'}}, ['a.qweight'], 'gptq'),
    ({'quantization_config': {'load_in_4bit': True}}, ['a.weight'], 'bitsandbytes'),
    ({'quantization_config': {'quant_method': 'fp8'}}, ['a.weight'], 'fp8'),
    ({'quantization_config': 'nf4'}, ['a.weight'], 'nf4'),
    ({}, ['model.layers.0.mlp.down_proj.qweight'], 'GPTQ or AWQ'),
    ({}, ['model.layers.0.mlp.down_proj.SCB'], 'bitsandbytes'),
  ],
)
def test_integers_of_other_programs_are_refused_by_name(tmp_path, config, names, word):
  tensors = {name: np.zeros((2, 2), np.int32) for name in names}
  write_safetensors(tmp_path / 'source', tensors, config)
  _refused_by_name(tmp_path, word)


@pytest.mark.parametrize(
  ('name', 'word'), [('quantize_config.json', 'GPTQ'), ('quant_config.json', 'AWQ')]
)
def test_programs_that_name_their_files_otherwise_are_refused_by_name(tmp_path, name, word):
  (tmp_path / 'source').mkdir()
  for file in (name, 'gptq_model-4bit-128g.safetensors'):
    (tmp_path / 'source' / file).write_text('{}')
  _refused_by_name(tmp_path, word)


def _refused_by_name(tmp_path, word):
  before = snapshot(tmp_path)
  done = in_process('convert', tmp_path / 'source', tmp_path / 'out')
  refused(done, word, "one of ChatGLM's own", 'give the plain model')
  assert snapshot(tmp_path) == before
