"""Reward models for transformers: what is written, and what it scores there."""

import json

import numpy as np
import pytest
import stored
import tuned
from commands import in_process, refused, snapshot
from peers_test import _transformers
from safetensors.numpy import load_file

import glm_jax
from glm_jax import checkpoints
from glm_jax.configs import UserError
from glm_jax.interop import reward_models
from glm_jax.models import ChatGLM2Config
from glm_jax.text.chat import template_for
from glm_jax.text.conversation import Message

FAMILIES = {
  'chatglm2': 'GlmForSequenceClassification',
  'chatglm3': 'GlmForSequenceClassification',
  'glm4': 'GlmForSequenceClassification',
  'glm4-0414': 'Glm4ForSequenceClassification',
}
ROUNDS = [
  ['what is a fox?', 'a fox is quick.'],
  ['is it 7?', 'it is odd, so to say.', 'and </s> 8?', '狐狸 is even [gMASK].'],
  ['1?', 'one'],
]


def _conversations(family):
  # GLM-4's own tokenizer.json holds no text that spells a control piece.
  clean = lambda text: (
    text.replace('[gMASK]', '').replace('</s>', '') if '4' in family else text
  )
  return [
    [
      {'role': 'user' if i % 2 == 0 else 'assistant', 'content': clean(text)}
      for i, text in enumerate(texts)
    ]
    for texts in ROUNDS
  ]


def _trained(folder, family, *bindings, flags=()):
  """A run of two large steps, so that what it scores is far from 0."""
  kind = 'glm4' if family == 'glm4-0414' else family
  config, vocabulary = tuned.model(kind)
  if family == 'glm4-0414':
    config = ChatGLM2Config(**{**vars(config), 'sandwich_norms': True})
  base = stored.checkpoint(folder / 'base', config, vocabulary=vocabulary.to_dict())
  lines = [
    {'prompt': f'what is {n}?', 'chosen': 'an even one.', 'rejected': 'odd, that is.'}
    for n in range(40)
  ]
  small = [
    f"Reward.template='{family}'",
    "TASK_FEATURE_LENGTHS={'tokens': 128}",
    'BATCH_SIZE=4',
    'OptimizerConfig.learning_rate=0.05',
    'OptimizerConfig.clip_norm=1e9',
    'TRAIN_STEPS=3',
  ]
  done = tuned.of_stage(
    'reward',
    'train',
    folder,
    *small,
    *bindings,
    base=base,
    corpus=tuned.write(folder / 'ranked.jsonl', lines),
    flags=flags,
  )
  assert done.returncode == 0, done.stderr
  return folder / 'run'


def _convert(*arguments):
  done = in_process('convert', *map(str, arguments))
  assert done.returncode == 0, done.stderr
  return done


@pytest.mark.slow
@pytest.mark.parametrize(
  'family,way', [*((family, 'full') for family in FAMILIES), ('chatglm3', 'adapters')]
)
def test_transformers_scores_as_we_do(family, way, tmp_path):
  flags = ('--gin_file=gin_configs/runs/lora.gin',) if way == 'adapters' else ()
  run, conversations = _trained(tmp_path, family, flags=flags), _conversations(family)
  model = glm_jax.load(run)
  ours = model.reward(conversations, family)
  assert np.ptp(ours) > 0.01, ours
  form = 'glm4' if family == 'glm4-0414' else 'glm'
  done = _convert(run, tmp_path / 'exported', f'--to={form}')
  assert 'left out, which such a model has not: head/weight' in done.stdout
  made = _transformers(tmp_path / 'exported', scored=conversations)
  assert made['class'] == FAMILIES[family]
  assert not any(made['loading'].values()), made['loading']
  # The same ids, up to what ends an answer.
  template = template_for(model.vocabulary, family)
  asked = [[Message(**message) for message in messages] for messages in conversations]
  assert made['ids'] == [template.encode_masked(messages)[0] for messages in asked]
  for name in ('alone', 'left', 'right'):
    theirs = np.array(made[name], np.float32).reshape(-1)
    np.testing.assert_allclose(theirs, ours, atol=1e-5, err_msg=name)
  config = json.loads((tmp_path / 'exported' / 'config.json').read_text())
  assert config['pad_token_id'] not in model.vocabulary.stops
  tensors = load_file(tmp_path / 'exported' / 'model.safetensors')
  assert tensors['score.weight'].shape == (1, 32) and 'lm_head.weight' not in tensors
  # As a checkpoint it is all there, the head too.
  _convert(run, tmp_path / 'kept', '--to=checkpoint')
  kept = glm_jax.load(tmp_path / 'kept')
  np.testing.assert_allclose(kept.reward(conversations, family), ours, atol=1e-5)
  held = checkpoints.stored_leaves(checkpoints.find(str(tmp_path / 'kept')))
  assert ('head', 'weight') in held and not any('adapters' in path for path in held)


@pytest.mark.slow
def test_what_has_no_place_in_a_format_is_refused(tmp_path):
  run = _trained(tmp_path, 'chatglm')
  before = snapshot(tmp_path)
  for target in ([], ['--to=chatglm'], ['--to=glm-130b']):
    done = in_process('convert', str(run), str(tmp_path / 'exported'), *target)
    refused(done, 'holds a model alone, got value/weight besides; use --to=checkpoint')
  assert snapshot(tmp_path) == before


def _specs(config, *more):
  entries = reward_models.FORMATS['glm'].entries(config, 1)
  paths = {part.path for entry in entries for part in entry.parts}
  return dict.fromkeys([*paths, *more])


def test_leaves_of_an_export_are_those_that_its_format_has():
  config = tuned.MODELS['chatglm3'][0]
  score, critic = ('value', 'weight'), [('critic', 'vector'), ('critic', 'bias')]
  plain = _specs(config)
  assert reward_models.exported('glm', config, plain) == plain
  kept = reward_models.exported('glm', config, _specs(config, score))
  assert {*kept} == {*plain, score} - {('head', 'weight')}
  # PPO's critic is no reward: its policy is exported as a model that writes.
  assert reward_models.exported('glm', config, _specs(config, *critic)) == plain
  classifier = ('classifier', 'weight')
  for format, beside, words in (
    ('chatglm2', score, "value/weight besides; use one of \\['glm', 'glm4'\\]"),
    ('glm', classifier, 'classifier/weight besides; use --to=checkpoint'),
  ):
    with pytest.raises(UserError, match=words):
      reward_models.exported(format, config, _specs(config, beside))


def test_what_pads_a_conversation_ends_none():
  for family in tuned.MODELS:
    vocabulary = tuned.model(family)[1]
    assert reward_models.padding(vocabulary) not in vocabulary.stops
