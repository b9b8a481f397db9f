"""Questions, rewards and small runs of policies."""

import json

import tuned
from commands import in_process

ANIMALS = ['fox', 'dog', 'cat', 'cow']
REWARDS = """
import time

def named(prompts, completions, right, **_):
  return [float(said == name) for said, name in zip(completions, right)]

def long(prompts, completions, **_):
  return [0.01 * len(said) for said in completions]

def raises(prompts, completions, **_):
  return [1 / (1 - ('cat' in prompt)) for prompt in prompts]

def later(prompts, completions, **_):
  later.calls += 1
  return [0.0 if later.calls < 3 else float('nan')] * len(prompts)

later.calls = 0

def few(prompts, completions, **_):
  return [0.0]

def words(prompts, completions, **_):
  return ['good' for _ in prompts]

def slowly_raises(prompts, completions, **_):
  time.sleep(0.3)
  raise KeyError('no such thing')

def sleeps(prompts, completions, **_):
  time.sleep(30)
"""


def prepare(folder):
  """Models of fresh parameters, questions, and rewards that --import finds."""
  for family in ('chatglm3', 'chatglm', 'glm'):
    tuned.checkpoint(folder, family)
  questions = [
    {
      'prompt': f'{n} {ANIMALS[n % 4]}?',
      'right': ANIMALS[n % 4],
      'response': f'a {ANIMALS[n % 3]}',
    }
    for n in range(400)
  ]
  tuned.write(folder / 'questions.jsonl', questions)
  (folder / 'own_rewards.py').write_text(REWARDS)


def run(command, folder, *bindings, **where):
  """A command on runs/grpo.gin or runs/ppo.gin, see `arguments`."""
  return in_process(command, *arguments(folder, *bindings, **where))


def arguments(folder, *bindings, stage='grpo', flags=(), corpus=None, **where):
  """Of a command on runs/grpo.gin or runs/ppo.gin."""
  name = stage.upper()
  small = [
    "TASK_FEATURE_LENGTHS={'tokens': 32}",
    'BATCH_SIZE=8',
    'OptimizerConfig.learning_rate=1e-3',
    f'{name}.rollout_size=16',
    f'{name}.max_new_tokens=8',
    f"{name}.rewards={{'own_rewards.long': 1.0}}",
    *(['GRPO.samples=4'] if stage == 'grpo' else []),
    'EvaluationConfig.at_start=False',
  ]
  return tuned.arguments(
    stage,
    folder,
    *small,
    *bindings,
    corpus=corpus or folder / 'questions.jsonl',
    flags=('--import=own_rewards', *flags),
    **where,
  )


def rolled(run):
  """What rollouts/ holds, by the number of the rollout."""
  return {
    int(path.stem): [json.loads(line) for line in path.read_text().splitlines()]
    for path in sorted((run / 'rollouts').iterdir())
  }
