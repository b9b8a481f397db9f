"""What a folder's files tell of a model, whatever folder and files are called by others."""

import json

import numpy as np
import pytest
from commands import in_process, refused, snapshot
from foreign import InMemory, arrays_of, config_json, write_safetensors
from released_vocabularies_test import MAKERS

from glm_jax import checkpoints
from glm_jax.interop import files, recognise
from glm_jax.text import loading, released, vocabulary
from glm_jax.text.released import ROLES

# Lines of the published programs that say what each does with the ratio.
DIVIDES = 'seq_idx = torch.arange(seq_len, dtype=dtype, device=device) / self.rope_ratio\n'
MULTIPLIES = 'base = base * self.rope_ratio\n'
STATES = 'self.rotary = RotaryEmbedding(dim, rope_ratio=config.rope_ratio)\n'
ROLES_IN_CODE = f'special_tokens = {["[MASK]", "[gMASK]", *ROLES]}\n'
NO_ROLES_IN_CODE = 'special_tokens = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]\n'


@pytest.fixture(scope='session')
def model():
  text = ['the quick brown fox jumps over the lazy dog. ' * 9, '语言模型在学习文字。' * 9]
  return vocabulary.train_sentencepiece(text, 512, bpe=True)


def _scaling(folder, config, **beside):
  """What a ChatGLM2 checkpoint in a folder with these files does with its ratio."""
  folder.mkdir(parents=True)
  for name, content in beside.items():
    (folder / name.replace('__', '.')).write_text(content)
  arrays, tensors = arrays_of('chatglm2')
  config = {**config_json('chatglm2', arrays), **config}
  source = files.Source(folder, 'huggingface', (InMemory(tensors),), config)
  return recognise.recognise(source, {}).config.rope_scaling


CODE = 'modeling_chatglm__py'
TOKENIZER = 'tokenization_chatglm__py'


@pytest.mark.parametrize(
  'name', ['THUDM/chatglm2-6b-32k', 'THUDM/chatglm3-6b-32k', './x', 7]
)
@pytest.mark.parametrize(
  'beside,right',
  [
    ({CODE: STATES + DIVIDES}, 'positions'),
    ({CODE: STATES + MULTIPLIES}, 'theta'),
    ({CODE: 'base = 10000 * rope_ratio'}, 'theta'),
    # A comment is no evidence.
    ({CODE: DIVIDES + '# base * self.rope_ratio'}, 'positions'),
    # Which computes what, if the tokenizer is another's.
    ({CODE: MULTIPLIES, TOKENIZER: NO_ROLES_IN_CODE}, 'theta'),
    ({TOKENIZER: ROLES_IN_CODE, 'tokenizer__model': 'pieces'}, 'theta'),
    ({TOKENIZER: NO_ROLES_IN_CODE, 'tokenizer__model': 'pieces'}, 'positions'),
    ({CODE: STATES, TOKENIZER: NO_ROLES_IN_CODE, 'tokenizer__model': 'p'}, 'positions'),
    ({'tokenizer__model': 'IQ== 0\n'}, 'theta'),  # GLM-4's
  ],
)
def test_the_rotary_scaling_is_told_by_code_and_vocabulary(tmp_path, name, beside, right):
  """And by no name, which a fine-tune or a copy rewrites."""
  for number, folder in enumerate(('chatglm2-6b-32k', 'chatglm3-6b-32k')):
    folder = tmp_path / str(number) / folder
    assert _scaling(folder, {'rope_ratio': 16, '_name_or_path': name}, **beside) == right


@pytest.mark.parametrize(
  'beside',
  [
    {},
    {CODE: STATES},
    {CODE: DIVIDES + MULTIPLIES},
    {CODE: 'print "of another Python" / self.rope_ratio'},
    {'tokenizer__model': 'pieces', 'tokenizer_config__json': '{}'},
  ],
)
def test_a_rotary_scaling_that_nothing_tells_is_demanded(tmp_path, beside):
  fields = {'rope_ratio': 16, '_name_or_path': 'THUDM/chatglm2-6b-32k'}
  with pytest.raises(
    ValueError, match=r'--set rope_scaling=theta or --set rope_scaling=pos'
  ):
    _scaling(tmp_path / 'chatglm2-6b-32k', fields, **beside)
  # Without a ratio there is nothing to tell.
  assert _scaling(tmp_path / 'a', {**fields, 'rope_ratio': 1}, **beside) == 'theta'


def test_a_demanded_scaling_is_given_kept_and_exported(tmp_path):
  arrays, tensors = arrays_of('chatglm2')
  config = {**config_json('chatglm2', arrays), 'rope_ratio': 16}
  write_safetensors(tmp_path / 'source', tensors, config)
  before = snapshot(tmp_path)
  refused(in_process('convert', tmp_path / 'source', tmp_path / 'a'), '--set rope_scaling')
  assert snapshot(tmp_path) == before
  for scaling in ('positions', 'theta'):
    given = in_process(
      'convert', tmp_path / 'source', tmp_path / scaling, f'--set=rope_scaling={scaling}'
    )
    assert given.returncode == 0, given.stderr
    # The export says it itself: nothing else in the folder does.
    for step in (
      (tmp_path / scaling, tmp_path / f'{scaling}-out'),
      (tmp_path / f'{scaling}-out', tmp_path / f'{scaling}-in'),
    ):
      assert in_process('convert', *step).returncode == 0
    meta = checkpoints.read_meta(checkpoints.find(str(tmp_path / f'{scaling}-in')))
    assert meta['model']['rope_scaling'] == scaling and meta['model']['rope_ratio'] == 16
  unclear = {**config, 'glm_jax_rope_scaling': 'ntk'}
  with pytest.raises(ValueError, match="must be 'theta' or 'positions', got 'ntk'"):
    _scaling(tmp_path / 'b', unclear)


@pytest.mark.parametrize(
  'scaling,code', [('positions', 'ChatGLM2-6B-32k'), ('theta', 'ChatGLM3-6B-32k or GLM-4')]
)
def test_an_export_says_whose_code_it_needs(tmp_path, scaling, code):
  arrays, tensors = arrays_of('chatglm2')
  config = {**config_json('chatglm2', arrays), 'rope_ratio': 16}
  write_safetensors(
    tmp_path / 'source', tensors, {**config, 'glm_jax_rope_scaling': scaling}
  )
  done = in_process('convert', tmp_path / 'source', tmp_path / 'out', '--to=chatglm2')
  assert f'those of {code}' in done.stdout
  write_safetensors(tmp_path / 'plain', tensors, {**config, 'rope_ratio': 1})
  done = in_process('convert', tmp_path / 'plain', tmp_path / 'again', '--to=chatglm2')
  assert done.returncode == 0 and 'those of' not in done.stdout


def test_a_scaling_is_said_to_the_user():
  arrays, tensors = arrays_of('chatglm2')
  config = {**config_json('chatglm2', arrays), 'rope_ratio': 50}
  for scaling, does in (('theta', 'multiplies'), ('positions', 'divides')):
    found = recognise.recognise(
      files.Source(
        files.Path('memory'),
        'huggingface',
        (InMemory(tensors),),
        {**config, 'glm_jax_rope_scaling': scaling},
      ),
      {},
    )
    assert found.config.rope_ratio == 50 and does in found.assumed[0]


# ChatGLM2 and ChatGLM3 have the same tokenizer.model.


@pytest.mark.parametrize(
  'beside,kind',
  [
    ({'tokenization_chatglm.py': ROLES_IN_CODE}, 'chatglm3'),
    ({'tokenization_chatglm.py': NO_ROLES_IN_CODE}, 'chatglm2'),
    (
      {'tokenizer_config.json': json.dumps({'added_tokens_decoder': {'9': ROLES[1]}})},
      'chatglm3',
    ),
    ({'special_tokens_map.json': json.dumps({'additional': [*ROLES]})}, 'chatglm3'),
    ({'tokenizer_config.json': '{"chat_template": "[Round 1]"}'}, 'chatglm2'),
    ({'generation_config.json': '{"eos_token_id": [2, 64795, 64797]}'}, 'chatglm3'),
    ({'config.json': '{"eos_token_id": [2, 64795]}'}, 'chatglm3'),
    ({'tokenizer_config.json': '{"glm_jax_vocabulary": "chatglm2"}'}, 'chatglm2'),
  ],
)
def test_chatglm3s_vocabulary_is_told_from_chatglm2s(tmp_path, model, beside, kind):
  (tmp_path / 'tokenizer.model').write_bytes(model)
  for name, content in beside.items():
    (tmp_path / name).write_text(content)
  found = loading.find(tmp_path, 'chatglm2', 640)
  assert found.kind == kind and ('<|user|>' in found.control) == (kind == 'chatglm3')


@pytest.mark.parametrize(
  'config',
  [{}, {'name_or_path': 'THUDM/chatglm2-6b', 'tokenizer_class': 'ChatGLMTokenizer'}],
)
def test_a_vocabulary_of_one_of_two_models_is_demanded(tmp_path, model, config):
  """Both releases' tokenizer_config.json says but the class, which has the same name."""
  arrays, tensors = arrays_of('chatglm2')
  rng, rows = np.random.default_rng(0), 640
  for name in ('embedding.word_embeddings', 'output_layer'):
    width = tensors[f'transformer.{name}.weight'].shape[1]
    tensors[f'transformer.{name}.weight'] = rng.normal(size=(rows, width)).astype('f4')
  folder = tmp_path / 'chatglm3-6b'
  write_safetensors(
    folder,
    tensors,
    {**config_json('chatglm2', arrays), 'padded_vocab_size': rows, 'eos_token_id': 2},
  )
  (folder / 'tokenizer.model').write_bytes(model)
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  before = snapshot(tmp_path)
  done = in_process('convert', folder, tmp_path / 'out')
  path = folder / 'tokenizer.model'
  refused(done, f'--vocabulary=chatglm2:{path}', f'--vocabulary=chatglm3:{path}')
  assert snapshot(tmp_path) == before
  given = in_process('convert', folder, tmp_path / 'out', f'--vocabulary=chatglm3:{path}')
  assert given.returncode == 0, given.stderr
  meta = checkpoints.read_meta(checkpoints.find(str(tmp_path / 'out')))
  assert meta['vocabulary']['kind'] == 'chatglm3'


@pytest.mark.parametrize(
  'beside,kind',
  [
    ({'added_tokens.json': {'[gMASK]': 50007, '<|endofpiece|>': 50007}}, 'cog'),
    ({'added_tokens.json': {'<|endofpiece|>': 50007, '[sMASK]': 50008}}, 'cog'),
    ({'added_tokens.json': {'[gMASK]': 50009, '<|endofpiece|>': 50007}}, 'cog-fixed'),
    (
      {
        'tokenizer_config.json': {
          'added_tokens_decoder': {
            '50007': {'content': '<|endofpiece|>'},
            '50009': {'content': '[gMASK]'},
          }
        }
      },
      'cog-fixed',
    ),
    ({}, None),
  ],
)
def test_glm_10b_chinese_is_told_from_glm_large_chinese(tmp_path, model, beside, kind):
  path = tmp_path / 'cog-pretrain.model'
  path.write_bytes(model)
  for name, content in beside.items():
    (tmp_path / name).write_text(json.dumps(content))
  if kind is None:
    with pytest.raises(ValueError, match=f'--vocabulary=cog:{path} or --voc.*cog-fixed:'):
      loading.find(tmp_path, 'glm-10b', 640)
  else:
    assert loading.find(tmp_path, 'glm-10b', 640).kind == kind


@pytest.mark.parametrize('decoder', [[1], {'7': 'x'}, {'seven': {'content': 'x'}}])
def test_added_tokens_that_are_none_are_named(tmp_path, model, decoder):
  (tmp_path / 'cog-pretrain.model').write_bytes(model)
  content = json.dumps({'added_tokens_decoder': decoder})
  (tmp_path / 'tokenizer_config.json').write_text(content)
  with pytest.raises(ValueError, match=r'added_tokens_decoder in .*fetch it again'):
    loading.find(tmp_path, 'glm-10b', 640)


@pytest.mark.parametrize(
  'said,rows,images',
  [
    # The first release does not say it; its table has room for both.
    (None, 150_528, True),
    (None, 150_656, True),  # with pieces that somebody added
    (None, 130_528, False),
    (0, 150_656, False),
    (20_000, 150_528, True),
  ],
)
def test_images_before_the_text_are_told_by_the_tokenizer_or_the_table(
  tmp_path, said, rows, images
):
  content = MAKERS['ice-130b']().files()['ice_text.model']
  small = released.IceVocabulary(content).size
  (tmp_path / 'ice_text.model').write_bytes(content)
  config = {} if said is None else {'num_image_tokens': said}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  # As many rows fewer as the small model has pieces fewer than 130,344 of the original.
  found = loading.find(tmp_path, 'chatglm', rows - 130_344 + small)
  assert found.images == (20_000 if images else 0)


# What is no model, or one inside another program's.


@pytest.mark.parametrize(
  'rename,words',
  [
    ('module.{}', ("take 'module.' off every name", 'DeepSpeed')),
    ('module.glm.{}', ("take 'module.' off every name",)),
    ('_orig_mod.{}', ("take '_orig_mod.' off every name",)),
    ('base_model.model.{}', ('merge_and_unload',)),
    ('transformer.prefix_encoder.{}', ('give the model that it was tuned on',)),
    ('prefix_encoder.{}', ('give the model that it was tuned on',)),
    ('bert.{}', ('give a checkpoint of the GLM family',)),
  ],
)
def test_tensors_of_another_module_are_named_with_what_to_do(tmp_path, rename, words):
  arrays, tensors = arrays_of('chatglm2')
  tensors = {rename.format(name): tensor for name, tensor in tensors.items()}
  write_safetensors(tmp_path / 'source', tensors, config_json('chatglm2', arrays))
  before = snapshot(tmp_path)
  refused(in_process('convert', tmp_path / 'source', tmp_path / 'out'), *words)
  assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
  'name,word',
  [
    ('adapter_config.json', '--base=DIR'),
    ('zero_to_fp32.py', 'python zero_to_fp32.py'),
    ('README.md', 'give the folder of a checkpoint'),
  ],
)
def test_a_folder_of_training_without_a_model_is_told_what_makes_one(tmp_path, name, word):
  (tmp_path / 'source').mkdir()
  (tmp_path / 'source' / name).write_text('{}')
  refused(in_process('convert', tmp_path / 'source', tmp_path / 'out'), word)


def test_folders_beside_released_weights_are_no_checkpoint(tmp_path):
  """Whatever somebody calls them."""
  arrays, tensors = arrays_of('chatglm2')
  write_safetensors(tmp_path / 'source', tensors, config_json('chatglm2', arrays))
  for name in ('checkpoints', 'params'):
    (tmp_path / 'source' / name).mkdir()
  done = in_process('convert', tmp_path / 'source', tmp_path / 'out')
  assert done.returncode == 0 and checkpoints.find(str(tmp_path / 'out')), done.stderr


def test_a_name_of_hugging_face_is_told_how_to_fetch_it(tmp_path):
  done = in_process('convert', 'THUDM/chatglm3-6b', 'out', cwd=tmp_path)
  refused(done, 'hf download THUDM/chatglm3-6b --local-dir chatglm3-6b')
  for path in (tmp_path / 'chatglm3-6b', 'a/b/c', 'chatglm3-6b', '../b'):
    done = in_process('convert', path, 'out', cwd=tmp_path)
    refused(done, 'SRC must be a folder with a checkpoint')
    assert 'hf download' not in done.stderr
  assert not list(tmp_path.iterdir())


def test_commands_that_want_a_checkpoint_point_to_convert(tmp_path):
  arrays, tensors = arrays_of('chatglm2')
  write_safetensors(tmp_path / 'source', tensors, config_json('chatglm2', arrays))
  done = in_process('generate', f'--checkpoint={tmp_path}/source', '--prompt=x')
  refused(done, f'python -m glm_jax.convert {tmp_path}/source DST')
  done = in_process(
    'train',
    '--gin_file=gin_configs/runs/continue.gin',
    f"--gin.INIT_FROM='{tmp_path}/source'",
    f"--gin.MODEL_DIR='{tmp_path}/run'",
    f"--gin.CORPUS='{tmp_path}/*.txt'",
  )
  refused(done, f'python -m glm_jax.convert {tmp_path}/source DST')
