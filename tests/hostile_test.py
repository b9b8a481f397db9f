"""Files that were made to harm: refused in a sentence, before anything large is there."""

import json
import struct
import zipfile

import numpy as np
import pytest
import stored
from commands import gin, in_process, refused, snapshot

from glm_jax import configs
from glm_jax.checkpoints import damage, digests, folder, verifying
from glm_jax.configs import UserError
from glm_jax.data.rows import shards
from glm_jax.evaluation import cloze, task
from glm_jax.inference import prompt_files
from glm_jax.interop import files
from glm_jax.models import config as model_config
from glm_jax.text import loading
from glm_jax.training import writer

DEEP = '{"a": ' * 100_000


# JSON.


@pytest.mark.parametrize('brackets', ['[]', '{}'])
def test_json_is_read_to_a_depth_and_what_stands_in_strings_has_none(brackets):
  inner = '"' + brackets[0] * 500 + '\\"' + brackets[0] * 500 + '"'
  opening = brackets[0] if brackets == '[]' else '{"a": '
  nested = lambda depth: opening * depth + inner + brackets[1] * depth
  for encoding in (None, 'utf-8', 'utf-16'):
    made = [text.encode(encoding) if encoding else text for text in map(nested, (99, 101))]
    assert configs.parse_json(made[0]) == json.loads(made[0])
    with pytest.raises(ValueError, match='deeper than 100'):
      configs.parse_json(made[1])
  wide = json.dumps([[{}]] * 1000)
  assert configs.parse_json(wide) == json.loads(wide)


def test_json_has_a_size_and_names_may_be_asked_to_be_there_once():
  assert configs.parse_json('[1, 2]', most=6) == [1, 2]
  with pytest.raises(ValueError, match='more than 6 bytes'):
    configs.parse_json('[1, 2] ', most=6)
  twice = '{"a": {"b": 1, "b": 2}}'
  assert configs.parse_json(twice) == {'a': {'b': 2}}
  with pytest.raises(ValueError, match='twice'):
    configs.parse_json(twice, once=True)


def test_a_file_of_json_is_not_read_beyond_its_size(tmp_path, monkeypatch):
  monkeypatch.setattr(configs, 'LARGEST_JSON', 100)
  (tmp_path / 'config.json').write_text('{"a": "' + 'x' * 100 + '"}')
  with pytest.raises(
    UserError, match='config.json must be readable JSON, got JSON of more'
  ):
    configs.read_json(tmp_path / 'config.json')


READERS = {
  'run.json': lambda path: folder.check_same(str(path.parent), {}, {}),
  'index.json': lambda path: shards.load(str(path.parent)),
  'vocabulary.json': lambda path: configs.read_json(path, 'make the shards again'),
  'prompts.jsonl': prompt_files.read,
  'task.jsonl': lambda path: [*task.lines(path, ['a'])],
  'cmrc.json': lambda path: cloze._document(path, ['a']),
  'tokenizer.json': lambda path: loading.load(f'glm4:{path}'),
  'vocab.json': lambda path: loading.load(f'gpt2:{path.parent}'),
  'added_tokens.json': lambda path: loading.added_tokens(path.parent),
}


@pytest.mark.parametrize('name', READERS)
def test_every_reader_of_json_refuses_what_is_nested_too_deep(name, tmp_path):
  (tmp_path / 'merges.txt').write_text('')
  (tmp_path / name).write_text(DEEP)
  with pytest.raises(UserError) as caught:
    READERS[name](tmp_path / name)
  assert len(str(caught.value)) < 400


def test_a_damaged_line_of_metrics_is_left_out(tmp_path):
  lines = ['{"kind": "train", "step": 1}', '[]', '7', '{}', DEEP, '{"kind": "train", "st']
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines))
  assert writer.read(str(tmp_path), 'train') == [{'kind': 'train', 'step': 1}]


@pytest.mark.parametrize(
  'name', ['config.json', 'model.safetensors.index.json', 'adapter_config.json']
)
def test_a_command_says_so(name, tmp_path):
  source = tmp_path / 'source'
  source.mkdir()
  (source / name).write_text(DEEP)
  base = []
  if name.startswith('adapter'):
    stored.checkpoint(tmp_path / 'base', stored.FAMILIES['glm'])
    base = [f'--base={tmp_path / "base"}']
  before = snapshot(tmp_path)
  done = in_process('convert', source, tmp_path / 'out', *base)
  refused(done, name, 'JSON nested deeper than 100')
  assert snapshot(tmp_path) == before and not (tmp_path / 'out').exists()


# safetensors.

NAME, OTHER = 'model.norm.weight', 'model.embed_tokens.weight'


def _entry(shape, first, last, dtype='F16'):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [first, last]}


@pytest.mark.parametrize(
  'header,words',
  [
    ({NAME: _entry([10**30], 0, 64)}, 'a header that is none'),
    ({NAME: _entry([10**30, 0], 0, 0)}, 'a header that is none'),
    ({NAME: _entry([2**32, 2**32], 0, 0)}, f'must have {2**65} bytes'),
    ({NAME: _entry([-1, -32], 0, 64)}, 'a header that is none'),
    ({NAME: _entry([32.0], 0, 64)}, 'a header that is none'),
    ({NAME: _entry(['32'], 0, 64)}, 'a header that is none'),
    ({NAME: _entry([1] * 100_000 + [32], 0, 64)}, 'a header that is none'),
    ({NAME: _entry([32], 0, 64, [])}, 'must be of'),
    ({NAME: _entry([32], 10**30, 10**30 + 64)}, 'ends before the end of'),
    ({NAME: _entry([32], -64, 0)}, 'must have 64 bytes'),
    ({NAME: _entry([16], 0, 32), OTHER: _entry([16], 0, 32)}, 'in another one'),
    ({NAME: _entry([16], 0, 32), OTHER: _entry([24], 16, 64)}, 'in another one'),
    ({NAME: _entry([16], 0, 32), OTHER: _entry([8], 48, 64)}, 'behind a gap'),
    ({NAME: _entry([16], 32, 64)}, 'behind a gap'),
    ({NAME: _entry([16], 0, 32)}, '32 bytes more'),
    ('{"a": 1, "a": 1}', 'a name twice'),
    (DEEP, 'deeper than 100'),
    ('[]', 'a header that is none'),
    ('7', 'a header that is none'),
  ],
)
def test_a_header_that_lies_is_refused(header, words, tmp_path):
  text = (header if isinstance(header, str) else json.dumps(header)).encode()
  path = tmp_path / 'model.safetensors'
  path.write_bytes(struct.pack('<Q', len(text)) + text + bytes(64))
  with pytest.raises(UserError) as caught:
    files.tensors(path)
  assert words in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize('length', [0, 2**62, 2**64 - 1])
def test_a_header_has_a_length_that_fits(length, tmp_path):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(struct.pack('<Q', length) + bytes(64))
  with pytest.raises(UserError, match='header does not fit'):
    files.tensors(path)


def test_empty_tensors_and_any_order_are_read(tmp_path):
  header = {
    NAME: _entry([16], 32, 64),
    'a': _entry([0, 4], 32, 32),
    OTHER: _entry([16], 0, 32),
  }
  text = json.dumps({'__metadata__': {'format': 'pt'}, **header}).encode()
  path = tmp_path / 'model.safetensors'
  values = np.arange(32, dtype=np.float16)
  path.write_bytes(struct.pack('<Q', len(text)) + text + values.tobytes())
  tensors = files.tensors(path)
  np.testing.assert_array_equal(tensors.read(OTHER), values[:16])
  np.testing.assert_array_equal(tensors.read(NAME), values[16:])
  assert tensors.read('a').shape == (0, 4)


# Pickles.


@pytest.fixture
def weights(tmp_path):
  torch = pytest.importorskip('torch')

  def save(**tensors):
    torch.save({'a': torch.zeros(4), **tensors}, tmp_path / 'pytorch_model.bin')
    return tmp_path / 'pytorch_model.bin'

  return save


def _packed(path, compression, zeros):
  """The same archive, its parts compressed, with one more of zeros."""
  with zipfile.ZipFile(path) as archive:
    parts = {name: archive.read(name) for name in archive.namelist()}
  root = next(iter(parts)).split('/')[0]
  with zipfile.ZipFile(path, 'w', compression) as archive:
    for name, content in {**parts, f'{root}/data/7': bytes(zeros)}.items():
      archive.writestr(name, content)


def test_parts_that_unpack_to_more_than_the_file_are_not_unpacked(weights):
  path = weights()
  _packed(path, zipfile.ZIP_DEFLATED, 2**24)
  assert path.stat().st_size < 2**18
  with pytest.raises(UserError, match='must hold its parts as they are, .* compressed'):
    files.tensors(path)
  _packed(path, zipfile.ZIP_STORED, 8)
  assert files.tensors(path).read('a').shape == (4,)


def test_values_that_are_not_in_the_file_are_refused(weights):
  torch = pytest.importorskip('torch')
  for tensor in (
    torch.zeros(1).expand(10**6, 10**6),
    torch.zeros(3, 3).to_sparse(),
    torch.zeros(3, 3, device='meta'),
  ):
    with pytest.raises(UserError, match="'b' in .* must have all of its values there"):
      files.tensors(weights(b=tensor))


# Checkpoints of ours, sealed anew as whoever changes one would do it.


@pytest.fixture
def checkpoint(tmp_path):
  damage.tell.cache_clear()
  return stored.checkpoint(tmp_path / 'checkpoint', stored.FAMILIES['chatglm2'])


def _change(checkpoint, **fields):
  path = checkpoint / 'meta' / 'metadata'
  content = {**json.loads(path.read_text()), **fields}
  whole = {k: v for k, v in content.items() if k != 'sha256'}
  path.write_text(json.dumps({**content, 'sha256': digests.of_json(whole)}))


@pytest.mark.parametrize('family', stored.FAMILIES)
def test_sizes_of_a_model_have_bounds(family):
  config = model_config.to_dict(stored.FAMILIES[family])
  sizes = [k for k, v in config.items() if isinstance(v, int) and not isinstance(v, bool)]
  assert len(sizes) > 5
  for name in sizes:
    for wrong in (10**12, 10**30, -1, 1.5, 'x', float('nan')):
      with pytest.raises(UserError, match=f'{name} must be'):
        model_config.from_dict({**config, name: wrong})


@pytest.mark.parametrize(
  'fields',
  [
    {'model': []},
    {'model': None},
    {'vocabulary': []},
    {'vocabulary': {'kind': ['x']}},
    {'vocabulary': {'kind': 'sentencepiece'}},
    {'vocabulary': {'kind': 'sentencepiece', 'model': 7}},
    {'adapters': [1]},
    {'adapters': {'scaling': 'x'}},
    {'base': 7},
    {'base': {'folder': 7}},
    {'digests': 7},
    {'digests': None},
    {'digests': {'params': 7}},
    {'step': 'x'},
  ],
)
def test_a_description_of_another_kind_is_refused(fields, checkpoint):
  _change(checkpoint, **fields)
  before = snapshot(checkpoint)
  flags = [f'--checkpoint={checkpoint}', '--prompt=a [MASK]', '--max_new_tokens=1']
  refused(in_process('generate', *flags), next(iter(fields)).rstrip('s'))
  assert snapshot(checkpoint) == before


def test_an_array_of_another_shape_is_not_read(checkpoint, monkeypatch):
  leaf = next(iter((checkpoint / 'params').glob('*/.zarray')))
  content = json.loads(leaf.read_text())
  content['shape'] = [10**15] * len(content['shape'])
  leaf.write_text(json.dumps(content))
  with pytest.raises(damage.Damaged, match='was saved as'):
    verifying.verify(checkpoint)


@pytest.mark.parametrize('module', ['convert', 'quantize'])
def test_a_model_that_its_arrays_are_not_of_is_not_converted(module, checkpoint, tmp_path):
  model = model_config.to_dict(stored.FAMILIES['chatglm2'])
  _change(checkpoint, model={**model, 'mlp_size': 2**20})
  flags = ['--bits=4'] if module == 'quantize' else []
  refused(in_process(module, checkpoint, tmp_path / 'out', *flags), 'layers/mlp', '1048576')
  assert not (tmp_path / 'out').exists()


def test_rows_have_a_longest_length(tmp_path):
  flags = gin(f"MODEL_DIR='{tmp_path}/run'", "TASK_FEATURE_LENGTHS={'tokens': 1000000000}")
  done = in_process('train', '--gin_file=gin_configs/quickstart.gin', *flags)
  refused(done, 'TASK_FEATURE_LENGTHS', '1000000000')
  assert not list(tmp_path.iterdir())
