"""GLM-4-0414 and Z1 from a folder to a checkpoint and back, vocabulary and template too."""

import json
import shutil

import numpy as np
import pytest
from commands import in_process, refused, snapshot
from foreign import GOLDEN, arrays_of, config_json, write_safetensors
from safetensors.numpy import load_file

from glm_jax import checkpoints
from glm_jax.text.released import GLM4Vocabulary

# Z1's prompt ends with an open thought, which no other GLM's does.
TEMPLATE = "[gMASK]<sop>{{ messages[0]['content'] }}<|assistant|>\\n<think>\\n"


def _convert(*arguments):
  done = in_process('convert', *arguments)
  assert done.returncode == 0, done.stderr


@pytest.fixture(scope='module')
def released(tmp_path_factory):
  """A folder as published: config.json, weights, tokenizer.json, and a template."""
  folder = tmp_path_factory.mktemp('released')
  arrays, tensors = arrays_of('glm4_0414')
  ranks = json.loads((GOLDEN / 'tiktoken.json').read_text())['model'].encode()
  vocabulary = GLM4Vocabulary.from_ranks(ranks, {})
  rng, rows = np.random.default_rng(0), 768
  for name in ('model.embed_tokens.weight', 'lm_head.weight'):
    table = rng.normal(0, 0.5, (rows, tensors[name].shape[1]))
    tensors[name] = table.astype(np.float32)
  ids = {'eos_token_id': [*vocabulary.stops], 'pad_token_id': vocabulary.specials.pad}
  config = {**config_json('glm4_0414', arrays), **ids, 'vocab_size': rows}
  config |= {'architectures': ['Glm4ForCausalLM'], 'rope_theta': 10000.0}
  write_safetensors(folder / 'source', tensors, config, shards=2)
  content = vocabulary.files()['tokenizer.json']
  (folder / 'source' / 'tokenizer.json').write_bytes(content)
  (folder / 'source' / 'tokenizer_config.json').write_text(
    json.dumps({'chat_template': TEMPLATE})
  )
  _convert(folder / 'source', folder / 'checkpoint')
  return folder, tensors, config, vocabulary


def test_it_comes_back_byte_for_byte_with_its_template(released, tmp_path):
  folder, tensors, config, vocabulary = released
  meta = checkpoints.read_meta(checkpoints.find(str(folder / 'checkpoint')))
  assert meta['model']['sandwich_norms'] and meta['vocabulary']['kind'] == 'glm4'
  _convert(folder / 'checkpoint', tmp_path / 'out')  # in the layout that it came in
  found = load_file(tmp_path / 'out' / 'model.safetensors')
  assert {k: v.tobytes() for k, v in found.items()} == {
    k: v.tobytes() for k, v in tensors.items()
  }
  read = lambda name: json.loads((tmp_path / 'out' / name).read_text())
  assert {k: read('config.json')[k] for k in config} == config
  assert read('generation_config.json')['eos_token_id'] == [*vocabulary.stops]
  assert read('tokenizer_config.json')['chat_template'] == TEMPLATE
  source = (folder / 'source' / 'tokenizer.json').read_bytes()
  assert (tmp_path / 'out' / 'tokenizer.json').read_bytes() == source


def test_a_template_in_a_file_of_its_own_is_kept_too(released, tmp_path):
  folder, *_ = released
  source = tmp_path / 'source'
  shutil.copytree(folder / 'source', source)
  (source / 'tokenizer_config.json').unlink()
  (source / 'chat_template.jinja').write_text(TEMPLATE)
  _convert(source, tmp_path / 'out', '--to=glm4')
  config = json.loads((tmp_path / 'out' / 'tokenizer_config.json').read_text())
  assert config['chat_template'] == TEMPLATE


def test_layouts_without_its_norms_are_refused(released, tmp_path):
  folder, *_ = released
  before = snapshot(tmp_path)
  for target in ('glm', 'chatglm2'):
    done = in_process('convert', folder / 'checkpoint', tmp_path / 'x', f'--to={target}')
    refused(done, 'sandwich_norms=False', 'use --to=glm4')
  assert snapshot(tmp_path) == before


def test_it_generates(released):
  folder, *_ = released
  generate = ('generate', f'--checkpoint={folder}/checkpoint', '--prompt=the quick')
  first, again = (in_process(*generate, '--max_new_tokens=8') for _ in range(2))
  assert first.returncode == 0, first.stderr
  assert first.stdout == again.stdout and first.stdout.strip()
