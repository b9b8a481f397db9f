"""Tiny checkpoints that are fine-tuned, lines of conversations, and runs on them."""

import functools
import json
import random

import stored
from chat_test import _vocabulary as vocabulary
from commands import gin, in_process

from glm_jax.models import ChatGLM2Config, ChatGLMConfig, GLMConfig

_SIZES = dict(num_layers=2, hidden_size=32, num_heads=4, max_positions=256, init_std=0.1)
_ROTARY = dict(_SIZES, mlp_size=48, num_kv_heads=2, head_size=8)
# family -> the model, its vocabulary by the names of chat_test.
MODELS = {
  'chatglm': (
    ChatGLMConfig(**_SIZES, mlp_size=48, deepnorm_layers=2, vocab_size=384),
    'bytes',
  ),
  'chatglm2': (ChatGLM2Config(**_ROTARY, vocab_size=1024), 'chatglm2 spaced'),
  'chatglm3': (ChatGLM2Config(**_ROTARY, vocab_size=1024), 'chatglm3 spaced'),
  'glm4': (ChatGLM2Config(**_ROTARY, vocab_size=1024), 'glm4'),
  'glm': (
    GLMConfig(
      **_SIZES,
      vocab_size=384,
      embedding_dropout=0.0,
      attention_dropout=0.0,
      output_dropout=0.0,
    ),
    'bytes',
  ),
}


@functools.cache
def model(family):
  """(its configuration, its vocabulary)."""
  config, name = MODELS[family]
  return config, vocabulary(name)


def checkpoint(folder, family):
  """A folder that holds one of fresh parameters."""
  config, words = model(family)
  return stored.checkpoint(folder / f'{family}_base', config, vocabulary=words.to_dict())


def write(path, lines):
  path.parent.mkdir(parents=True, exist_ok=True)
  text = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)
  path.write_text(text, encoding='utf-8')
  return path


def lines(count, seed=0):
  """Conversations of one to three rounds, about animals."""
  rng = random.Random(seed)
  animals = ['fox', 'dog', 'cat', 'cow', '狐狸']
  found = []
  for number in range(count):
    turns = []
    for _ in range(rng.randint(1, 3)):
      animal = rng.choice(animals)
      turns.append({'role': 'user', 'content': f'{number} what is a {animal}?'})
      turns.append({'role': 'assistant', 'content': f'a {animal} is quick.'})
    found.append({'messages': turns})
  return found


def run(command, folder, *bindings, **where):
  """A command on runs/sft.gin, see `of_stage`."""
  small = [
    "TASK_FEATURE_LENGTHS={'tokens': 96}",
    'BATCH_SIZE=4',
    'EvaluationConfig.at_start=False',
  ]
  return of_stage('sft', command, folder, *small, *bindings, **where)


def of_stage(stage, command, folder, *bindings, **where):
  """A command on the gin file of a stage, see `arguments`."""
  return in_process(command, *arguments(stage, folder, *bindings, **where))


def arguments(stage, folder, *bindings, base=None, run='run', corpus=None, flags=()):
  """Of a command on the gin file of a stage, for a model and a corpus of a folder."""
  places = [
    f"MODEL_DIR='{folder}/{run}'",
    f"INIT_FROM='{base or folder / 'chatglm3_base'}'",
    f"CORPUS='{corpus or folder / 'lines.jsonl'}'",
    f"CorpusConfig.cache_dir='{folder}/cache'",
    "ComputeConfig.dtype='float32'",
    'TRAIN_STEPS=2',
    'OptimizerConfig.warmup_steps=1',
    'EvaluationConfig.examples=8',
    'TrainConfig.log_every=1',
  ]
  file = f'--gin_file=gin_configs/runs/{stage}.gin'
  return [file, *flags, *gin(*places, *bindings)]
