"""Policies through the commands: their rollouts, their steps, what they learn."""

import dataclasses
import functools
import random
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import policies
import pytest
import tuned
from commands import gin, in_process, refused, snapshot
from runs import params

import glm_jax
from glm_jax import checkpoints, models, sharding
from glm_jax.batch import OBJECTIVES
from glm_jax.configs import UserError
from glm_jax.inference import prompts, scoring
from glm_jax.inference.request import Answer
from glm_jax.models import ComputeConfig
from glm_jax.recipes import questions as asked
from glm_jax.recipes import rollouts
from glm_jax.recipes.grpo import GRPO
from glm_jax.recipes.policy import Policy
from glm_jax.recipes.ppo import PPO
from glm_jax.recipes.rewards import Judge, RewardModel, Sample
from glm_jax.recipes.rollouts import Rollouts
from glm_jax.text import chat
from glm_jax.training import adapters, state, writer
from glm_jax.training.adapters import LoRAConfig
from glm_jax.training.config import TrainConfig


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp('policies')
  policies.prepare(folder)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(folder)
    yield folder


@pytest.fixture(scope='module')
def answering(place):
  """A model that has learnt to name an animal, any of the four, whatever it is asked."""
  rng = random.Random(0)
  lines = [
    {
      'messages': [
        {'role': 'user', 'content': f'{n} {rng.choice(policies.ANIMALS)}?'},
        {'role': 'assistant', 'content': rng.choice(policies.ANIMALS)},
      ]
    }
    for n in range(400)
  ]
  done = tuned.run(
    'train',
    place,
    'TRAIN_STEPS=200',
    'BATCH_SIZE=16',
    'OptimizerConfig.learning_rate=3e-3',
    'TrainConfig.log_every=100',
    run='answering',
    corpus=tuned.write(place / 'any.jsonl', lines),
  )
  assert done.returncode == 0, done.stderr
  return place / 'answering'


@functools.cache
def _of(family, folder, *, blank='', kind=PPO, **settings):
  """(configuration, variables with a reference, rollouts, questions) of a fresh model."""
  model, vocabulary = tuned.model(family)
  recipe = kind(
    feature_lengths={'tokens': 48},
    rewards={'own_rewards.long': 1.0},
    max_new_tokens=8,
    rollout_size=16,
    blank=blank,
    **settings,
  )
  config = TrainConfig(
    model=model,
    recipe=recipe,
    compute=ComputeConfig(dtype='float32'),
    batch_size=8,
    train_steps=1,
    model_dir=str(folder / 'none'),
    init_from=str(folder / f'{family}_base'),
  )
  layout = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  template = None if blank else chat.template_for(vocabulary, _template(family))
  import own_rewards  # noqa: F401

  judge = Judge(['own_rewards.long'], 5.0)
  made = Rollouts(config, layout, vocabulary, template, judge)
  leaves = recipe.leaves(config)
  fresh = state.init_state(model, _Nothing(), layout, 3, leaves)['params']
  # An end is as likely as it is where models have learnt something.
  table = fresh['head' if 'head' in fresh else 'words']
  table['weight'] = table['weight'].at[np.array(vocabulary.stops)].multiply(8.0)
  variables = {'params': fresh, 'reference': {'params': fresh}}
  reader = asked.PromptReader(model, vocabulary, template, blank, 30)
  from glm_jax.data.corpora.config import CorpusConfig

  source = CorpusConfig(corpus=str(folder / 'questions.jsonl'))
  return config, variables, made, reader.read(source)['train']


class _Nothing:
  """An optimizer without a state."""

  def init(self, params):
    return {}


def _template(family):
  return '' if family == 'chatglm3' else family


FAMILIES = [('chatglm3', ''), ('chatglm', ''), ('glm', '{prompt} [MASK]')]


@pytest.mark.parametrize('family,blank', FAMILIES, ids=str)
def test_a_policy_says_what_it_was_sampled_with(place, family, blank):
  """At any temperature, ends included; and begins without any KL."""
  _, variables, made, queries = _of(family, place, blank=blank, temperature=0.7)
  chosen = queries[:16]
  answers = made.answers(variables, chosen, seed=5)
  rows = made.rows(chosen, answers)
  log_probs, reference, values = made.said(variables, rows)
  np.testing.assert_array_equal(log_probs, reference)
  assert not values.any()
  ended = 0
  for answer, row, weights, targets, tokens in zip(
    answers, log_probs, rows.loss_weights, rows.targets, rows.tokens, strict=True
  ):
    np.testing.assert_allclose(row[weights > 0], answer.log_probs[0], atol=1e-4)
    end = [answer.ends[0]] if answer.ends[0] >= 0 else []
    assert targets[weights > 0].tolist() == [*answer.spans[0], *end]
    assert len(end) or len(answer.spans[0]) == 8
    # Each target but an end is what is read next.
    at = np.flatnonzero(weights)
    assert tokens[at[1:]].tolist() == targets[at[:-1]].tolist()
    ended += len(end)
  assert ended
  assert (rows.objective == OBJECTIVES.index('answer')).any()


@pytest.mark.parametrize('family,blank', FAMILIES, ids=str)
def test_the_longest_question_and_its_answer_fill_a_row(place, family, blank):
  """And the slots of a cache: one more would make it twice as long."""
  config, variables, made, queries = _of(family, place, blank=blank, temperature=0.7)
  ids, room = queries[0].ids, config.recipe.room(config)
  longest = queries[0]._replace(ids=[ids[0]] * (room - len(ids)) + ids)
  [answer] = made.answers(variables, [longest], seed=5)
  request = made.request(0, longest)
  assert made._engine._slots(request, 8) == config.recipe.length
  row = scoring.lay_out(config.model, made._vocabulary, request, [[5] * 8])
  assert len(row.tokens) == config.recipe.length
  assert made.rows([longest], [answer]).loss_weights.sum() > 0


def test_answers_to_one_question_differ_and_a_seed_repeats_them(place):
  _, variables, made, queries = _of('chatglm3', place)
  spans = lambda seed: [a.spans[0] for a in made.answers(variables, [queries[0]] * 8, seed)]
  first = spans(1)
  assert len({*map(tuple, first)}) > 4
  assert first == spans(1) and first != spans(2)


def test_one_program_serves_questions_of_all_lengths(place):
  _, variables, made, queries = _of('chatglm3', place, epochs=3)
  for part in (queries[:16], queries[100:116], queries[300:316]):
    answers = made.answers(variables, part, 0)
    made.said(variables, made.rows(part, answers))
  assert made._said._cache_size() == 1
  assert made._engine._advance._cache_size() == 1


@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_a_run_shows_what_it_does_and_its_model_answers(place, stage):
  done = policies.run(
    'train', place, 'TRAIN_STEPS=4', f'{stage.upper()}.show_every=1', stage=stage, run=stage
  )
  assert done.returncode == 0, done.stderr
  assert 'step     1/4  ' in done.stdout and '  reward 0.' in done.stdout
  assert 'rollout 0: reward 0.' in done.stdout and ' -> ' in done.stdout
  records = writer.read(str(place / stage), 'train')
  first = records[0]
  assert first['kl'] == pytest.approx(0, abs=1e-9) and first['clip_fraction'] == 0
  assert 1 <= first['answer_length'] <= 9 and 0 <= first['ended'] <= 1
  assert first['entropy'] > 1
  # GRPO's advantages of a group add up to nothing, and so does the first loss.
  if stage == 'grpo':
    assert abs(first['policy_loss']) < 1e-6
  shown = policies.rolled(place / stage)
  assert {*shown} == ({0, 1} if stage == 'grpo' else {0})
  mean = np.mean([line['reward'] for line in shown[0]])
  both = [r['reward'] for r in records[:2]]
  assert np.mean(both) == pytest.approx(mean, abs=1e-6) and mean % 1 > 0
  if stage == 'grpo':
    # The second rollout is of other questions.
    assert {line['prompt'] for line in shown[0]}.isdisjoint(
      {line['prompt'] for line in shown[1]}
    )
    assert len({line['prompt'] for line in shown[0]}) == 4
  validated = writer.read(str(place / stage), 'validation')[-1]
  assert {'reward', 'kl', 'answer_length', 'ended'} <= {*validated}
  [answer] = glm_jax.load(place / stage).generate('what?', max_new_tokens=2)
  assert answer.tokens


PREFIX = [('chatglm', "template='chatglm'"), ('glm', "blank='{prompt} [MASK]'")]


@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
@pytest.mark.parametrize('family,binding', PREFIX, ids=str)
def test_prefix_models_learn_too(place, family, binding, stage):
  """Of what they are asked, targets are padding, which is never said."""
  binding = f'{stage.upper()}.{binding}'
  where = {'stage': stage, 'base': place / f'{family}_base', 'run': f'{family}_{stage}'}
  done = policies.run('train', place, binding, 'TRAIN_STEPS=3', **where)
  assert done.returncode == 0, done.stderr
  first, *_, last = writer.read(str(place / f'{family}_{stage}'), 'train')
  assert first['kl'] == pytest.approx(0, abs=1e-9) and first['clip_fraction'] == 0
  assert np.isfinite([last['loss'], last['kl'], last['gradient_norm']]).all()
  assert last['gradient_norm'] > 0


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_integers_in_bfloat16_begin_at_their_reference(place, stage):
  """What samples, scores and learns reads the same scales and the same weights."""
  done = in_process(
    'quantize', place / 'chatglm3_base', place / f'int8_{stage}', '--bits=8'
  )
  assert done.returncode == 0, done.stderr
  run = f'bfloat16_{stage}'
  done = policies.run(
    'train',
    place,
    "ComputeConfig.dtype='bfloat16'",
    'LoRAConfig.rank=2',
    stage=stage,
    base=place / f'int8_{stage}',
    run=run,
    flags=('--gin_file=gin_configs/runs/qlora.gin',),
  )
  assert done.returncode == 0, done.stderr
  first = writer.read(str(place / run), 'train')[0]
  # The step's program rounds otherwise than that of a rollout, by bfloat16's last bits.
  assert first['clip_fraction'] == 0 and first['kl'] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_a_run_stopped_within_a_rollout_goes_on_to_the_bit(place, monkeypatch, stage):
  """Its experience stands in the checkpoint; nothing is sampled anew."""
  name = stage.upper()
  bindings = (
    "OptimizerConfig.schedule='constant'",
    'CheckpointConfig.every=1',
    f'{name}.epochs=2',
    f'{name}.kl_target=0.5',
    f'{name}.sft_weight=0.1',
    f'{name}.show_every=1',
  )
  for run, ends in (('straight', [6]), ('stopped', [3, 5, 6])):
    for end in ends:
      done = policies.run(
        'train',
        place,
        *bindings,
        f'TRAIN_STEPS={end}',
        stage=stage,
        run=f'{run}_{stage}',
      )
      assert done.returncode == 0, done.stderr
  assert 'resumed' in done.stdout
  straight, stopped = place / f'straight_{stage}', place / f'stopped_{stage}'
  of = lambda run: {
    r['step']: [r[k] for k in ('loss', 'reward', 'kl', 'kl_weight')]
    for r in writer.read(str(run), 'train')
  }
  assert of(straight) == of(stopped) and {*of(stopped)} == {*range(1, 7)}
  # Four updates a rollout: KL was adapted once.
  weights = [values[3] for values in of(straight).values()]
  assert len({*weights[:4]}) == 1 and weights[4] != weights[0]
  assert policies.rolled(straight) == policies.rolled(stopped)
  monkeypatch.setattr('runs.STEPS', 6)
  for a, b in zip(*(jax.tree.leaves(params(r)) for r in (straight, stopped)), strict=True):
    np.testing.assert_array_equal(a, b)
  done = policies.run(
    'train',
    place,
    *bindings,
    f'{name}.clip=0.1',
    'TRAIN_STEPS=7',
    stage=stage,
    run=f'stopped_{stage}',
  )
  refused(done, 'policy.clip', 'was 0.2 and is now 0.1')


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_devices_and_micro_batches_change_nothing(place, monkeypatch, stage):
  found, make_mesh = {}, sharding.make_mesh
  name = stage.upper()
  for kind, count, bindings in (
    ('one', 1, ()),
    ('parts', 1, ('TrainConfig.microbatches=4', f'{name}.chunks=0')),
    ('eight', 8, ('MeshConfig.fsdp=2', 'MeshConfig.sequence=2', 'MeshConfig.tensor=2')),
  ):
    here = jax.devices()[:count]
    monkeypatch.setattr(
      sharding, 'make_mesh', lambda c, d=None, here=here: make_mesh(c, d or here)
    )
    more = (f'{name}.entropy_weight=0.01', f'{name}.epochs=2', 'TRAIN_STEPS=5')
    more += (f'{name}.sft_weight=0.5', *(['PPO.less_own=True'] if stage == 'ppo' else []))
    run = f'{kind}_{stage}'
    done = policies.run('train', place, *bindings, *more, stage=stage, run=run)
    assert done.returncode == 0, done.stderr
    assert f'on {count} cpu' in done.stdout
    found[kind] = writer.read(str(place / run), 'train')
  names = ('loss', 'reward', 'kl', 'entropy', 'answer_length', 'sft_loss')
  names += ('gradient_norm',)
  for other in ('parts', 'eight'):
    for a, b in zip(found['one'], found[other], strict=True):
      for name in names:
        assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-4), (other, name)


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['grpo', 'ppo'])
def test_a_reward_that_depends_on_the_question_is_learnt(place, answering, stage):
  """Of four animals, one is right: whoever names always the same is right in a quarter."""
  name = stage.upper()
  done = policies.run(
    'train',
    place,
    'TRAIN_STEPS=160',
    'BATCH_SIZE=64',
    f"{name}.rewards={{'own_rewards.named': 1.0}}",
    f'{name}.rollout_size={64 if stage == "grpo" else 128}',
    *(['PPO.epochs=2', 'PPO.lam=1.0', 'PPO.value_weight=0.5'] if stage == 'ppo' else []),
    f'{name}.chunks=0',
    'CorpusConfig.validation_fraction=0.2',
    'EvaluationConfig.examples=0',
    'EvaluationConfig.at_start=True',
    'TrainConfig.log_every=40',
    stage=stage,
    base=answering,
    run=f'learnt_{stage}',
  )
  assert done.returncode == 0, done.stderr
  records = writer.read(str(place / f'learnt_{stage}'), 'validation')
  first, last = records[0], records[-1]
  assert first['reward'] <= 0.35 and last['reward'] >= 0.8, (first, last)
  # Whoever says the right one of four equally likely words is ln 4 away from whom it was.
  assert last['kl'] <= 2.5 and last['ended'] >= 0.95, last


@pytest.mark.slow
def test_adapters_are_trained_and_their_start_is_the_reference(place):
  """Also of a run whose adapters say something else than the model without them."""
  lora = ('--gin_file=gin_configs/runs/lora.gin',)
  rate = 'OptimizerConfig.learning_rate=0.1'
  done = tuned.run(
    'train',
    place,
    rate,
    run='adapted',
    flags=lora,
    corpus=tuned.write(place / 'lines.jsonl', tuned.lines(60)),
  )
  assert done.returncode == 0, done.stderr
  flags = (*lora, *gin("TrainConfig.init_adapters='continue'"))
  for stage, bindings, kept in (
    ('grpo', (), {'adapters'}),
    ('ppo', (), {'adapters', 'critic'}),
    ('ppo', ('PPO.critic_rank=2',), {'adapters', 'critic', 'critic_factors'}),
  ):
    run = f'adapted_{stage}_{len(bindings)}'
    where = {'stage': stage, 'base': place / 'adapted', 'run': run, 'flags': flags}
    done = policies.run('train', place, *bindings, **where)
    assert done.returncode == 0, done.stderr
    first = writer.read(str(place / run), 'train')[0]
    assert first['kl'] == pytest.approx(0, abs=1e-9)
    held = checkpoints.stored_leaves(checkpoints.find(str(place / run)))
    assert {path[0] for path in held} == kept
    of_model = glm_jax.load(place / run).generate('what?', max_new_tokens=3)
    beside = glm_jax.load(place / 'chatglm3_base', adapters=place / run)
    assert of_model[0].text == beside.generate('what?', max_new_tokens=3)[0].text


def test_factors_of_a_critic_are_moved_by_its_loss_alone(monkeypatch):
  """And those of the policy by what it says alone."""
  model, _ = tuned.model('chatglm3')
  monkeypatch.setattr(Policy, '_allowed', lambda self, c: np.ones(model.vocab_size, bool))
  recipe = PPO(
    feature_lengths={'tokens': 10}, rewards={'a.b': 1.0}, max_new_tokens=4, critic_rank=2
  )
  config = TrainConfig(
    model=model,
    recipe=recipe,
    adapters=LoRAConfig(rank=3),
    batch_size=2,
    train_steps=1,
    model_dir='x',
    init_from='x',
  )
  leaves = recipe.leaves(config) | adapters.leaves(config.adapters, model)
  params = nn.unbox(state.init_params(model, jax.random.key(0), leaves))
  rng = np.random.default_rng(0)
  # Away from 0, where one of the two factors of a product has no gradient.
  drawn = lambda tree: jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape), tree)
  own = {name: drawn(params[name]) for name in leaves}
  shapes = recipe.batch(config)
  e = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), shapes)
  t = jnp.broadcast_to(jnp.arange(10), (2, 10))
  rows = e.rows._replace(
    tokens=t,
    targets=t,
    positions=t,
    key_start=0 * t,
    key_end=t + 1,
    loss_weights=t * 0 + 1.0,
  )
  loss = recipe.loss(config, models.build(model, ComputeConfig()))

  def parts(own):
    variables = adapters.variables(config.adapters, model, {**params, **own})
    return loss(variables, e._replace(rows=rows), None, {})[1]

  of = lambda name: jax.grad(lambda own: parts(own)[name][0])(own)
  moved = lambda tree: any(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(tree))
  by_value, by_policy = of('value_loss'), of('policy_loss')
  assert moved(by_value['critic_factors']) and moved(by_value['critic'])
  assert not moved(by_value['adapters'])
  assert moved(by_policy['adapters']) and not moved(by_policy['critic_factors'])


@pytest.mark.slow
def test_a_reward_model_judges_as_it_does_by_itself(place):
  """In a run as through the library: the same text is worth the same."""
  ranked = [
    {'prompt': f'what is {n}?', 'chosen': f'{n}, yes', 'rejected': 'I do not know.'}
    for n in range(60)
  ]
  done = tuned.of_stage(
    'reward',
    'train',
    place,
    "TASK_FEATURE_LENGTHS={'tokens': 128}",
    'BATCH_SIZE=8',
    'OptimizerConfig.learning_rate=1e-2',
    'TRAIN_STEPS=10',
    corpus=tuned.write(place / 'ranked.jsonl', ranked),
    run='rewarding',
  )
  assert done.returncode == 0, done.stderr
  bindings = (
    f"PPO.reward_model='{place}/rewarding'",
    'PPO.reward_model_weight=2.0',
    'PPO.rewards={}',
  )
  done = policies.run('train', place, *bindings, stage='ppo', run='rewarded')
  assert done.returncode == 0, done.stderr
  model, vocabulary = tuned.model('chatglm3')
  template = chat.template_for(vocabulary)
  said, samples = [], []
  for n in range(5):
    said.append(
      [
        {'role': 'user', 'content': f'what is {n}?'},
        {'role': 'assistant', 'content': 'yes, ' * n + 'a cat'},
      ]
    )
    messages = [chat.Message(**message) for message in said[-1]]
    ids, scored = template.encode_masked(messages)
    first = scored.index(True)
    request = prompts.request(model, vocabulary, 0, ids[:first])
    samples.append(Sample('', '', {}, request, ids[first:]))
  layout = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  judge = RewardModel(
    str(place / 'rewarding'), model, vocabulary, ComputeConfig(), layout, 2, 64
  )
  expected = glm_jax.load(place / 'rewarding').reward(said)
  np.testing.assert_allclose(judge(samples), expected, atol=1e-5)
  assert np.ptp(expected) > 1e-3
  rewards = {line['reward'] for line in policies.rolled(place / 'rewarded')[0]}
  assert len(rewards) > 8
  done = policies.run(
    'train', place, f"PPO.reward_model='{place}/chatglm3_base'", stage='ppo', run='none'
  )
  refused(done, 'a reward model must be one')
  done = policies.run(
    'train',
    place,
    f"PPO.reward_model='{place}/rewarding'",
    "PPO.template='chatglm'",
    stage='ppo',
    base=place / 'chatglm_base',
    run='none',
  )
  refused(done, "must have the policy's vocabulary")


REFUSED = [
  ('grpo', ('GRPO.samples=1',), ['GRPO.samples must be']),
  ('grpo', ('GRPO.samples=5',), ['must be a multiple of GRPO.samples', '8 and 5']),
  ('grpo', ('BATCH_SIZE=6',), ['must be a multiple of BATCH_SIZE']),
  ('grpo', ('GRPO.rewards={}',), ['must have rewards or a reward_model']),
  ('grpo', ("GRPO.rewards={'long': 1.0}",), ["function's name behind its module's"]),
  ('grpo', ("GRPO.rewards={'own_rewards.no': 1.0}",), ["'own_rewards.no'"]),
  ('ppo', ('PPO.max_new_tokens=32',), ['must leave room for a question']),
  ('ppo', ('PPO.kl=0.0', 'PPO.kl_target=1.0'), ['must adapt a kl above 0']),
  ('ppo', ("PPO.blank='{prompt} [MASK]'",), ['of a model that fills them']),
  ('ppo', ("PPO.blank='{prompt}'", "PPO.template='glm4'"), ['template or a blank']),
  ('ppo', ("PPO.template='chatglm'",), ['must be used with a vocabulary of']),
  ('ppo', ('TrainConfig.adapters=@PTuningConfig()',), ['with low-rank factors']),
  (
    'ppo',
    ('TrainConfig.adapters=@LoRAConfig()', 'LoRAConfig.dropout=0.1'),
    ['without dropout'],
  ),
  (
    'ppo',
    ("TASK_FEATURE_LENGTHS={'tokens': 12}",),
    ['none in', 'are longer than 4 tokens'],
  ),
  (
    'ppo',
    ("TASK_FEATURE_LENGTHS={'tokens': 12}", "CorpusConfig.too_long='error'"),
    ['must fit 4 tokens', 'questions.jsonl line 1'],
  ),
  ('ppo', ("PPO.reward_model='nowhere'",), ['nowhere']),
  ('grpo', ('GRPO.less_own=True',), ['less_own must be of PPO']),
  ('ppo', ("TASK_FEATURE_LENGTHS={'tokens': 512}",), ["must fit the model's positions"]),
  ('ppo', ('PPO.critic_rank=2',), ['beside a base that is not trained']),
  ('grpo', ("GRPO.rewards={'own_rewards.raises': 1.0}",), ['ZeroDivisionError', 'sample']),
  ('grpo', ("GRPO.rewards={'own_rewards.words': 1.0}",), ['finite number', "'good'"]),
  ('grpo', ("GRPO.rewards={'own_rewards.few': 1.0}",), ['for each of 16', '1 of them']),
]


@pytest.mark.parametrize('stage,bindings,words', REFUSED, ids=lambda v: str(v)[:50])
def test_what_cannot_be_is_one_sentence_and_nothing_is_saved(place, stage, bindings, words):
  before = snapshot(place)
  run = f'refused_{abs(hash(bindings))}'
  done = policies.run('train', place, *bindings, stage=stage, run=run)
  refused(done, *words)
  # A reward is first asked when the folder is the run's.
  assert checkpoints.latest_step(str(place / run)) is None
  others = lambda files: {path for path in files if run not in str(path)}
  assert others(snapshot(place)) == others(before)


def test_a_reward_that_hangs_is_left_in_time(place):
  began = time.monotonic()
  bindings = ("GRPO.rewards={'own_rewards.sleeps': 1.0}", 'GRPO.reward_seconds=0.5')
  refused(
    policies.run('train', place, *bindings, run='hung'),
    'must answer within 0.5 s',
    'sample',
  )
  assert time.monotonic() - began < 25
  # One that has raised in time says what it has raised, found or not at which sample.
  bindings = ("GRPO.rewards={'own_rewards.slowly_raises': 1.0}", 'GRPO.reward_seconds=0.4')
  done = policies.run('train', place, *bindings, run='raised')
  refused(done, "KeyError: 'no such thing'", 'one of 16 samples')


def test_what_was_learnt_before_a_reward_fails_is_kept(place):
  """And the run goes on from there once it is mended."""
  named = "GRPO.rewards={'own_rewards.later': 1.0}"
  more = ('TRAIN_STEPS=8', 'EvaluationConfig.every=100')
  done = policies.run('train', place, named, *more, run='failing')
  refused(done, 'must return a finite number', 'nan for sample 0')
  assert checkpoints.latest_step(str(place / 'failing')) == 4
  # The module is imported: what it counts goes on.
  import own_rewards

  own_rewards.later.calls = -9
  done = policies.run('train', place, named, *more, run='failing')
  assert done.returncode == 0 and 'at step 4' in done.stdout, done.stderr
  # Nor is it lost where the reward fails in a validation.
  more = ('TRAIN_STEPS=8', 'EvaluationConfig.every=3', 'CheckpointConfig.every=100')
  done = policies.run('train', place, named, *more, run='validating')
  refused(done, 'must return a finite number', 'nan for sample 0')
  assert checkpoints.latest_step(str(place / 'validating')) == 3
  # Another algorithm has nothing to go on with here.
  done = policies.run('train', place, 'TRAIN_STEPS=9', stage='ppo', run='failing')
  refused(done, "recipe was 'GRPO' and is now 'PPO'")


def test_questions_are_read_with_all_that_judges_them(place, tmp_path):
  _, vocabulary = tuned.model('chatglm3')
  template = chat.template_for(vocabulary)
  from glm_jax.data.corpora.config import CorpusConfig

  turns = [
    {'role': 'user', 'content': 'a much longer question than the last one'},
    {'role': 'assistant', 'content': 'yes'},
    {'role': 'user', 'content': 'and?'},
    {'role': 'assistant', 'content': 'no'},
  ]
  lines = [{'prompt': f'{n}?', 'level': n} for n in range(30)]
  lines += [{'messages': turns, 'level': 'deep'}, {'instruction': 'Add', 'input': '1, 2'}]
  lines[-1]['output'] = '3'
  source = CorpusConfig(corpus=str(tuned.write(tmp_path / 'q.jsonl', lines)))
  model = tuned.MODELS['chatglm3'][0]

  def read(room, answer=0, **more):
    reader = asked.PromptReader(model, vocabulary, template, '', room, answer)
    return reader.read(dataclasses.replace(source, **more))

  found = {q.text: q for part in read(99).values() for q in part}
  assert found['3?'].fields == {'prompt': '3?', 'level': 3}
  # The answer that the line has is not asked.
  deep = found['a much longer question than the last one\nyes\nand?']
  assert deep.fields['level'] == 'deep' and 'Add\n1, 2' in found
  messages = [chat.Message(t['role'], t['content']) for t in turns[:3]]
  assert deep.ids == template.encode(messages, opening=True)
  # Its first round is left out where there is no room for it.
  short = read(30)
  [cut] = [q for part in short.values() for q in part if q.fields.get('level') == 'deep']
  assert cut.ids == template.encode(messages[2:], opening=True)
  dropped = [q for part in read(30, too_long='drop').values() for q in part]
  assert len(dropped) == 31
  prints = {asked.fingerprint(read(99)), asked.fingerprint(short)}
  lines[0]['level'] = 7
  tuned.write(tmp_path / 'q.jsonl', lines)
  assert len(prints | {asked.fingerprint(read(99))}) == 3
  # Answers of the lines' own are asked for where they are needed.
  with pytest.raises(UserError, match='must have an answer of its own.*line 1'):
    read(99, answer=9)
  tuned.write(tmp_path / 'q.jsonl', [{**lines[-2]}, *[lines[-1]] * 30])
  held = [q for part in read(99, answer=9).values() for q in part]
  for question, (messages, answer) in {
    'and?': (turns[:3], turns[3]),
    'Add\n1, 2': (
      [{'role': 'user', 'content': 'Add\n1, 2'}],
      {'role': 'assistant', 'content': '3'},
    ),
  }.items():
    [query, *_] = [q for q in held if q.text.endswith(question)]
    whole, _ = template.encode_masked([chat.Message(**m) for m in [*messages, answer]])
    assert [*query.ids, *query.own] == whole
  assert not [q for q in held if q.text.endswith('and?')][1:]
  # The longer of the two answers has no room, and neither has been cut.
  with pytest.raises(UserError, match='31 have own answers longer than'):
    read(99, answer=len(query.own) - 1)


def test_updates_of_an_epoch_learn_from_each_answer_once(place):
  config, variables, made, queries = _of('chatglm3', place, kind=GRPO, samples=4, epochs=2)
  stream = rollouts.RolloutStream(config, made._layout, made, queries, 0)
  stream.variables = lambda state: variables
  seen = []
  with sharding.active(made._layout):
    for _ in range(4):
      batch = stream(None).batch
      seen.append(np.asarray(batch.rows.tokens))
  rows = lambda parts: sorted(map(tuple, np.concatenate(parts)))
  assert rows(seen[:2]) == rows(seen[2:]) and len(rows(seen[:2])) == 16
  assert not np.array_equal(seen[0], seen[2])
  # Four answers to each question, in groups side by side.
  kept = np.asarray(stream.kept['tokens'])[:, :6].reshape(4, 4, 6)
  assert (kept == kept[:, :1]).all()
  # Advantages of a group are those of its own rewards.
  scored = np.asarray(stream.kept['loss_weights']) > 0
  better = np.asarray(stream.kept['advantages'])
  each = np.where(scored, better, 0).sum(1) / scored.sum(1)
  np.testing.assert_allclose(each.reshape(4, 4).sum(1), 0, atol=1e-5)
  rewards = np.asarray(stream.kept['reward']).reshape(4, 4)
  for group, own in zip(rewards, each.reshape(4, 4), strict=True):
    assert (np.argsort(group, kind='stable') == np.argsort(own, kind='stable')).all()


@pytest.mark.parametrize('family', ['chatglm', 'chatglm3'])
def test_a_question_that_just_fits_is_not_cut(place, tmp_path, family):
  model, vocabulary = tuned.model(family)
  template = chat.template_for(vocabulary, _template(family))
  turns = ['what is it?', 'a cat', 'which one?']
  roles = ['user', 'assistant', 'user']
  messages = [chat.Message(*pair) for pair in zip(roles, turns, strict=True)]
  said = [{'role': m.role, 'content': m.content} for m in messages]
  lines = [{'messages': said, 'number': n} for n in range(30)]
  from glm_jax.data.corpora.config import CorpusConfig

  source = CorpusConfig(corpus=str(tuned.write(tmp_path / 'q.jsonl', lines)))
  whole = template.encode(messages, opening=True)
  room = len(whole) - (not model.causal)
  read = lambda room: asked.PromptReader(model, vocabulary, template, '', room).read(source)
  assert read(room)['train'][0].ids == whole[:room]
  assert len(read(room - 1)['train'][0].ids) < room - 1


def test_preview_shows_what_is_asked(place):
  flags = [f'--output={place}/mask.png', '--examples=1']
  done = policies.run('preview', place, flags=flags)
  assert done.returncode == 0, done.stderr
  assert '0 fox?<|assistant|>⟦' in done.stdout


def test_an_answer_cut_short_has_no_end_to_learn(place):
  _, _, made, queries = _of('chatglm3', place)
  cut = Answer(number=0, spans=[[7, 8]], ends=[-1], log_probs=[[-1.0, -1.0]])
  end = made._stops[-1]
  whole = dataclasses.replace(cut, ends=[end], log_probs=[[-1.0] * 3])
  rows = made.rows([queries[0]] * 2, [cut, whole])
  assert rows.loss_weights.sum(1).tolist() == [2, 3]
  at = np.flatnonzero(rows.loss_weights[1])[-1]
  assert rows.targets[1, at] == end and len(made._stops) > 1
  np.testing.assert_array_equal(rows.tokens[0], rows.tokens[1])


def test_an_unfinished_answer_loses_its_penalty_and_floats_stay_floats(place):
  _, _, made, queries = _of('chatglm3', place, unfinished_penalty=0.25)
  import own_rewards  # noqa: F401

  made._judge = Judge(['own_rewards.long'], 5.0)
  ids = made._vocabulary.encode('abcdef')
  of = lambda end: Answer(number=0, spans=[ids], ends=[end], log_probs=[[]])
  samples, given, rewards = made.judged([queries[0]] * 2, [of(made._stops[0]), of(-1)])
  assert samples[0].answer == 'abcdef' and samples[0].ids == [*ids, made._stops[0]]
  np.testing.assert_allclose(given, [[0.06]] * 2, atol=1e-6)
  np.testing.assert_allclose(rewards, [0.06, 0.06 - 0.25], atol=1e-6)


def test_rewards_less_those_of_own_answers(place):
  """Each question's own, judged as what the policy says is."""
  _, _, made, _ = _of('chatglm3', place, less_own=True)
  import own_rewards  # noqa: F401

  made._judge = Judge(['own_rewards.long'], 5.0)
  encode, end = made._vocabulary.encode, made._stops[0]
  query = lambda own: asked.Query('?', encode('a question?'), {}, [*encode(own), end])
  queries = [query('ab'), query('abcd')]
  chosen = [queries[0], queries[0], queries[1]]
  said = [Answer(number=0, spans=[encode(x)], ends=[end]) for x in ('abc', 'a', 'abcdef')]
  _, given, rewards = made.judged(chosen, said)
  np.testing.assert_allclose(given[:, 0], [0.03, 0.01, 0.06], atol=1e-6)
  np.testing.assert_allclose(rewards, [0.01, -0.01, 0.02], atol=1e-6)
  rows = made.own_rows(chosen)
  assert rows.targets[2][rows.loss_weights[2] > 0].tolist() == queries[1].own
