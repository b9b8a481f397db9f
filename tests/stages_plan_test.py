"""A plan of a policy: its step, and what it computes between updates, all on one mesh."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import pytest
import tuned
from commands import ROOT, gin, in_process, refused

from benchmarks import stages_plan as published
from glm_jax import checkpoints, sharding
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.inference import decode
from glm_jax.models import ComputeConfig
from glm_jax.planning import between, prediction, stand_in
from glm_jax.recipes import questions as asked
from glm_jax.recipes import rollouts
from glm_jax.recipes.grpo import GRPO
from glm_jax.recipes.ppo import PPO
from glm_jax.recipes.rewards import Judge
from glm_jax.text import chat
from glm_jax.training import program
from glm_jax.training.adapters import LoRAConfig
from glm_jax.training.config import TrainConfig

GIB = 2**30
NAMES = ['step', 'scoring', 'reading questions', 'generating']
MESH = sharding.MeshConfig(data=2, fsdp=2, tensor=2)


def _run(folder, kind=PPO, **changes):
  """A policy's run of a fresh model in a folder."""
  recipe = kind(
    feature_lengths={'tokens': 64},
    rewards={'own_rewards.long': 1.0},
    max_new_tokens=8,
    rollout_size=16,
    temperature=0.7,
  )
  fields = dict(
    model=tuned.MODELS['chatglm3'][0],
    recipe=recipe,
    compute=ComputeConfig(dtype='bfloat16'),
    mesh=MESH,
    batch_size=8,
    train_steps=1,
    model_dir='none',
    init_from=str(folder / 'chatglm3_base'),
  )
  return TrainConfig(**{**fields, **changes})


def _seen(monkeypatch, module, name, pick):
  """What a function is traced with from now on, as shapes, dtypes and shardings."""
  original, seen = getattr(module, name), []

  def spied(*arguments, **named):
    seen.append(jax.tree.map(lambda a: (a.shape, str(a.dtype)), pick(*arguments, **named)))
    return original(*arguments, **named)

  monkeypatch.setattr(module, name, spied)
  return seen


@pytest.mark.slow
@pytest.mark.parametrize(
  'kind,changes', [(PPO, {}), (GRPO, {'adapters': LoRAConfig(rank=2)})], ids=['PPO', 'LoRA']
)
def test_what_is_planned_is_what_a_run_computes(tmp_path, monkeypatch, kind, changes):
  """Weights, caches and rows have the same shapes and dtypes, and all fit the estimate."""
  tuned.checkpoint(tmp_path, 'chatglm3')
  config = _run(tmp_path, kind, **changes)
  layout = sharding.make_mesh(MESH)
  advanced = _seen(
    monkeypatch, decode, 'advance', lambda m, v, cache, _, rows, **__: (v, cache, rows)
  )
  read = _seen(
    monkeypatch, decode, 'read_into', lambda m, v, cache, tokens, *_, **__: (v, cache)
  )
  scored = _seen(monkeypatch, rollouts, 'score', lambda c, a, m, v, rows: (v, rows))
  # As a run does it.
  built = program.build(config, layout)
  zeros = lambda tree: jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), tree
  )
  current, frozen = zeros(built.state), zeros(built.frozen)
  variables = built.variables(current['params'], frozen)
  _, vocabulary = tuned.model('chatglm3')
  template = chat.template_for(vocabulary)
  made = rollouts.Rollouts(config, layout, vocabulary, template, Judge({}, 1.0))
  lines = [{'prompt': f'{n} ' + 'x' * 30} for n in range(30)]
  source = CorpusConfig(corpus=str(tuned.write(tmp_path / 'q.jsonl', lines)))
  room = config.recipe.room(config)
  reader = asked.PromptReader(config.model, vocabulary, template, '', room)
  queries = reader.read(source)['train'][:16]
  made.said(variables, made.rows(queries, made.answers(variables, queries, 0)))
  ran = advanced.pop(), read.pop(), scored.pop()
  for seen in (advanced, read, scored):
    seen.clear()
  # As it is planned.
  found = between.predict(config, layout)
  assert (advanced.pop(), read.pop(), scored.pop()) == ran
  assert [*found.programs] == NAMES
  # What is there whichever runs, to the byte.
  stream = rollouts.RolloutStream(config, layout, made, queries, 0)
  kept = zeros(stream.kept)
  here = sum(
    array.addressable_shards[0].data.nbytes
    for array in jax.tree.leaves((current, frozen, kept))
  )
  assert found.memory['resident'] == here < min(found.programs.values())
  assert found.memory['peak'] == max(found.programs.values())
  estimated = between.from_shapes(config, layout)
  assert [*estimated.programs] == NAMES
  assert estimated.memory['resident'] == here


def test_more_answers_at_a_time_need_more(tmp_path):
  tuned.checkpoint(tmp_path, 'chatglm3')
  layout = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])

  @functools.cache
  def needed(**changes):
    config = _run(tmp_path, mesh=sharding.MeshConfig())
    recipe = dataclasses.replace(config.recipe, **changes)
    return between.from_shapes(dataclasses.replace(config, recipe=recipe), layout)

  few, many = needed(decoding_rows=4), needed(decoding_rows=16)
  for name in NAMES:
    more = many.programs[name] - few.programs[name]
    assert (more > 0) == (name in NAMES[2:]), name
  # Without a reference, its weights are nowhere.
  alone = needed(kl=0.0)
  model = sum(a.size for a in jax.tree.leaves(program.parts(_run(tmp_path), None, None)[0]))
  assert needed().memory['resident'] - alone.memory['resident'] > model


POLICY = [
  f'--gin_file={ROOT}/gin_configs/runs/grpo.gin',
  f'--gin_file={ROOT}/gin_configs/models/chatglm2_6b.gin',
  f'--gin_file={ROOT}/gin_configs/runs/lora.gin',
  *gin("GRPO.rewards={'my_rewards.reward': 1.0}", 'TrainConfig.microbatches=4'),
  *gin('ChatGLM2Config.num_layers=2'),
  '--no-compile',
]


def test_a_policy_is_planned_without_a_checkpoint_or_a_compiler(tmp_path):
  plan = lambda *more: in_process(
    'plan', *POLICY, '--topology=h100:1x1x1', *more, cwd=tmp_path
  )
  done = plan()
  assert done.returncode == 0, done.stderr
  assert 'of programs' in done.stdout and 'reading questions ~' in done.stdout
  written = json.loads((tmp_path / 'plan.json').read_text())
  assert [*written['programs']] == NAMES
  assert written['memory']['peak'] == written['programs']['reading questions']
  # The step alone would fit such a card.
  limit = (written['programs']['step'] + written['memory']['peak']) / 2 / GIB
  words = ('reading questions must fit into', 'decoding_rows', 'too many')
  refused(plan(f'--memory_gib={limit}'), *words)
  # A reward model would be there, too, and its sizes stand in its checkpoint.
  refused(plan(*gin("GRPO.reward_model='nowhere'")), 'nowhere')
  tuned.checkpoint(tmp_path, 'chatglm3')
  done = plan(*gin(f"GRPO.reward_model='{tmp_path}/chatglm3_base'"))
  assert done.returncode == 0, done.stderr
  more = json.loads((tmp_path / 'plan.json').read_text())
  parameters = program.parts(_run(tmp_path, mesh=sharding.MeshConfig()), None, None)[0]
  of_model = {k: v for k, v in parameters.items() if k != 'critic'}
  expected = 4 * sum(a.size for a in jax.tree.leaves(of_model))
  # And what it gives each answer of a rollout.
  expected += 4 * 128
  assert more['memory']['resident'] - written['memory']['resident'] == expected


def test_a_checkpoint_that_is_not_here_has_a_stand_in(tmp_path):
  tuned.checkpoint(tmp_path, 'chatglm3')
  here = _run(tmp_path)
  with stand_in.present(here) as config:
    assert config is here
  with stand_in.present(_run(tmp_path / 'nowhere')) as config:
    vocabulary = checkpoints.read_meta(checkpoints.find(config.init_from))['vocabulary']
    assert vocabulary['kind'] == 'bytes'
  with pytest.raises(ValueError, match='must be a folder'):
    checkpoints.find(config.init_from)


def test_the_published_table_is_of_this_code():
  """Its rows as they are bound; estimates from shapes now, beside what was compiled."""
  results = json.loads(published.RESULTS.read_text(encoding='utf-8'))
  assert {row.key for row in published.ROWS} == {*results}
  text = (ROOT / 'launch' / 'README.md').read_text(encoding='utf-8')
  for row in published.ROWS:
    result = results[row.key]
    assert result['bindings'] == list(row.bindings) and result['fits']
    assert published.line(row, result) in text, 'run python -m benchmarks.stages_plan'
  for row in (row for row in published.ROWS if row.topology.startswith('h100')):
    compiled = results[row.key]
    estimated = published.estimate(row)
    assert estimated['peak'] == pytest.approx(compiled['memory']['peak'], rel=0.08)
    for name, peak in compiled['programs'].items():
      assert estimated['programs'][name] == pytest.approx(peak, rel=0.08), name


# From here on, with the compilers.


@pytest.mark.slow
def test_a_policy_on_a_pod_is_near_its_estimate(monkeypatch):
  """Two layers of ChatGLM2-6B's width, PPO of all parameters on 8 chips."""
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  [row] = [row for row in published.ROWS if row.stage.startswith('PPO')]
  small = (
    'ChatGLM2Config.num_layers=2',
    'MeshConfig.fsdp=8',
    'BATCH_SIZE=32',
    'PPO.rollout_size=64',
    'PPO.decoding_rows=64',
  )
  row = row._replace(topology='v5e:2x4', bindings=(*row.bindings, *small))
  result = published.predict(row)
  assert result['fits'] and [*result['programs']] == NAMES
  for name, peak in result['programs'].items():
    assert result['estimated']['programs'][name] == pytest.approx(peak, rel=0.35), name
  limited = prediction.GIB
  assert result['memory']['resident'] < min(result['programs'].values()) < 16 * limited
