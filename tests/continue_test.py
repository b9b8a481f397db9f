"""Training on from released weights, by the commands: ChatGLM-6B's blanks, and refusals."""

import json

import numpy as np
import pytest
from commands import gin, in_process, refused
from foreign import arrays_of, config_json, write_safetensors
from released_vocabularies_test import MAKERS
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope='session')
def chatglm(tmp_path_factory):
  """ChatGLM-6B's layout with a small ice_text.model, its checkpoint, and some text."""
  folder = tmp_path_factory.mktemp('chatglm')
  vocabulary = MAKERS['ice']()
  arrays, tensors = arrays_of('chatglm')
  rng = np.random.default_rng(0)
  width = tensors['lm_head.weight'].shape[1]
  table = rng.normal(0, 0.02, (vocabulary.size, width)).astype(np.float32)
  for name in ('transformer.word_embeddings.weight', 'lm_head.weight'):
    tensors[name] = table.copy()
  config = {**config_json('chatglm', arrays), 'vocab_size': vocabulary.size}
  write_safetensors(folder / 'source', tensors, config)
  for name, content in vocabulary.files().items():
    (folder / 'source' / name).write_bytes(content)
  (folder / 'text').mkdir()
  for number in range(40):
    text = f'the quick brown fox {number} jumps over a lazy dog. 语言模型在学习文字。\n' * 6
    (folder / 'text' / f'{number:02}.txt').write_text(text, encoding='utf-8')
  done = in_process('convert', folder / 'source', folder / 'checkpoint')
  assert done.returncode == 0, done.stderr
  assert 'vocabulary ice' in done.stdout
  return folder


def _continue(folder, run, *bindings):
  return in_process(
    'train',
    '--gin_file=gin_configs/runs/continue.gin',
    f"--gin.MODEL_DIR='{folder}/{run}'",
    f"--gin.CORPUS='{folder}/text/*.txt'",
    f"--gin.CorpusConfig.cache_dir='{folder}/cache'",
    "--gin.TASK_FEATURE_LENGTHS={'tokens':48}",
    "--gin.ComputeConfig.dtype='float32'",
    '--gin.EvaluationConfig.examples=32',
    '--gin.OptimizerConfig.warmup_steps=2',
    '--gin.OptimizerConfig.learning_rate=1e-3',
    '--gin.TRAIN_STEPS=12',
    *gin(*bindings),
  )


def test_chatglm_learns_blanks_generates_and_goes_back_to_its_layout(chatglm):
  from_there = f"INIT_FROM='{chatglm}/checkpoint'"
  mixed = (from_there, "MIXTURE_OR_TASK_NAME='glm_mixture'")
  done = _continue(chatglm, 'run', *mixed)
  assert done.returncode == 0, done.stderr
  lines = (chatglm / 'run' / 'metrics.jsonl').read_text().splitlines()
  assert all(name in lines[-1] for name in ('loss/blank', 'loss/document'))
  losses = [json.loads(line)['loss'] for line in lines]
  assert losses[-1] < losses[0] - 0.1
  generate = ('generate', f'--checkpoint={chatglm}/run', '--max_new_tokens=8')
  filled = in_process(*generate, '--prompt=the quick [MASK] fox')
  assert filled.returncode == 0 and filled.stdout.startswith('the quick'), filled.stderr
  assert in_process(*generate, '--prompt=the quick', '--gmask').returncode == 0
  done = in_process('convert', chatglm / 'run', chatglm / 'exported')
  assert done.returncode == 0, done.stderr
  before = load_file(chatglm / 'source' / 'model.safetensors')
  after = load_file(chatglm / 'exported' / 'model.safetensors')
  assert set(before) == set(after)  # the tied head is there twice, as it was
  np.testing.assert_array_equal(
    after['lm_head.weight'], after['transformer.word_embeddings.weight']
  )
  assert (after['lm_head.weight'] != before['lm_head.weight']).any()
  assert (chatglm / 'exported' / 'ice_text.model').is_file()
  # The same command goes on where it stopped.
  again = _continue(chatglm, 'run', *mixed, 'TRAIN_STEPS=14')
  assert again.returncode == 0 and 'at step 12' in again.stdout, again.stderr


@pytest.mark.parametrize(
  'bindings,words',
  [
    (["INIT_FROM='{}/checkpoint'"], ('glm_causal for a causal model', 'ChatGLMConfig')),
    (["INIT_FROM='{}/nowhere'"], ('must be a folder with params and meta',)),
    ([], ('INIT_FROM',)),
    (
      ["INIT_FROM='{}/checkpoint'", "VocabularyConfig.path='bytes'"],
      ('must be a checkpoint of the same vocabulary',),
    ),
    (
      [
        "INIT_FROM='{}/checkpoint'",
        "MIXTURE_OR_TASK_NAME='glm_mixture'",
        'ObjectiveConfig.block_positions=False',
      ],
      ("block_positions must be the model's two_positions",),
    ),
    (
      ["INIT_FROM='{}/checkpoint'", "TASK_FEATURE_LENGTHS={{'tokens': 4096}}"],
      ('max_positions',),
    ),
    (
      ["INIT_FROM='{}/checkpoint'", "TASK_FEATURE_LENGTHS={{'tokens': 0}}"],
      ("'tokens'",),
    ),
  ],
)
def test_what_does_not_go_on_is_refused(chatglm, bindings, words):
  mixed = () if 'glm_causal' in words[0] else ("MIXTURE_OR_TASK_NAME='glm_mixture'",)
  done = _continue(chatglm, 'refused', *mixed, *(b.format(chatglm) for b in bindings))
  refused(done, *words)
  assert not (chatglm / 'refused').exists()
