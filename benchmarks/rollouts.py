"""How fast does a policy answer and learn, beside transformers' `generate` and TRL's GRPO?

python -m benchmarks.rollouts [--trl=PYTHON] [--table]

A ChatGLM2 of 31 M parameters, random, float32, and its export. First 128 questions of
unlike lengths, half of them with short answers and half with long ones: `Rollouts.answers`
in turn with `generate`, each with a batch of its own best size. Then, if --trl names an
interpreter that has trl, torch and transformers, steps of GRPO (rollout, scoring, update)
in turn with TRL's `GRPOTrainer` of the same sizes, in a process of its own. Needs torch and
transformers (extra peers); no TensorFlow. Where others work on the machine, threads of both
sides wait for each other: `taskset -c 0` before the command gives both the same core.
Results are kept by device and date in benchmarks/rollouts/; --table only writes the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import decode, readme
from benchmarks.step import SMALL_CHATGLM2, about
from glm_jax import cli, sharding, startup
from glm_jax.inference.request import Request
from glm_jax.planning import stand_in
from glm_jax.recipes.grpo import GRPO
from glm_jax.recipes.questions import Query
from glm_jax.recipes.rewards import Judge
from glm_jax.recipes.rollouts import Rollouts, RolloutStream
from glm_jax.text.vocabulary import ByteVocabulary
from glm_jax.training import program, state
from glm_jax.training.config import TrainConfig
from glm_jax.training.recipe import REFERENCE

RESULTS = Path(__file__).parent / 'rollouts'
MODEL = dataclasses.replace(SMALL_CHATGLM2, max_positions=2048)
# Questions of so many tokens, drawn evenly; answers, in turn.
ASKED, ANSWERED = (16, 64), (8, 64)
SIZES = (8, 32, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
  """Sizes of GRPO, on both sides.

  Attributes:
    batch: answers, all of them of one update.
    group: answers to each question.
    asked: tokens of a question.
    answered: tokens of an answer.
    count: steps of a turn, of which the first is not counted.
  """

  batch: int = 32
  group: int = 8
  asked: int = 32
  answered: int = 64
  count: int = 4


def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
  """For both sides: how many of an answer's characters differ."""
  del prompts
  return [len(set(text)) / max(len(text), 1) for text in completions]


class Sized(Rollouts):
  """Answers as long as the questions' fields say: no token ends one."""

  def __init__(self, *arguments: Any):
    super().__init__(*arguments)
    self._stops, self._most = (-1,), {}

  def answers(self, variables: Any, questions: Sequence[Query], seed: int) -> Any:
    self._most = {i: q.fields.get('most') for i, q in enumerate(questions)}
    return super().answers(variables, questions, seed)

  def request(self, number: int, question: Query) -> Request:
    made = super().request(number, question)
    return dataclasses.replace(made, most=self._most.get(number))


def questions(model: Any, count: int, asked: tuple[int, int], answered: Any) -> list[Query]:
  """Of random tokens, each with how long its answer is to be."""
  rng = np.random.default_rng(0)
  size = min(model.vocab_size, ByteVocabulary().size)
  made = []
  for number in range(count):
    ids = rng.integers(3, size, rng.integers(*asked, endpoint=True)).tolist()
    made.append(Query(str(number), ids, {'most': answered[number % len(answered)]}))
  return made


def config(
  model: Any, length: int, most: int, rows: int, sizes: Steps, folder: Path = RESULTS
) -> TrainConfig:
  """A run of GRPO in which each rollout is one update."""
  recipe = GRPO(
    feature_lengths={'tokens': length},
    rewards={'benchmarks.rollouts.reward': 1.0},
    samples=sizes.group,
    rollout_size=sizes.batch,
    max_new_tokens=most,
    decoding_rows=rows,
    show_every=10**6,
  )
  return TrainConfig(
    model=model,
    recipe=recipe,
    batch_size=sizes.batch,
    train_steps=10**6,
    model_dir=str(folder),
    init_from='unset',
  )


def rollouts(run: TrainConfig, layout: sharding.Layout) -> Sized:
  """Of a run, judged by `reward`."""
  judge = Judge([f'{__name__}.reward'], 600.0)
  return Sized(run, layout, ByteVocabulary(), None, judge)


class Transformers:
  """`generate` of the export, sampled, each answer as long as it is to be."""

  def __init__(self, folder: Path):
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria

    class Long(StoppingCriteria):
      """Rows that have all of their tokens are done; a batch is, when all of them are."""

      def __init__(self, begin: int, most: Any):
        self.begin, self.most = begin, most

      def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        return ids.shape[1] - self.begin >= self.most

    self._torch, self._long = torch, Long
    self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    self._model.generation_config.eos_token_id = None

  def answers(self, asked: Sequence[Query], rows: int) -> list[list[int]]:
    """Of each question, in batches of so many rows."""
    torch, made = self._torch, []
    for first in range(0, len(asked), rows):
      part = asked[first : first + rows]
      longest = max(len(q.ids) for q in part)
      ids = torch.zeros(len(part), longest, dtype=torch.long)
      for row, q in enumerate(part):  # from the left, as answers follow
        ids[row, longest - len(q.ids) :] = torch.tensor(q.ids)
      mask = torch.arange(longest) >= torch.tensor([[longest - len(q.ids)] for q in part])
      most = torch.tensor([q.fields['most'] for q in part])
      with torch.inference_mode():
        out = self._model.generate(
          ids,
          attention_mask=mask.long(),
          max_new_tokens=int(most.max()),
          do_sample=True,
          top_k=0,
          pad_token_id=0,
          stopping_criteria=[self._long(longest, most)],
        )
      said = out[:, longest:].tolist()
      made += [s[: q.fields['most']] for s, q in zip(said, part, strict=True)]
    return made


def answers(
  model: Any,
  params: Any,
  exported: Path,
  *,
  count: int = 128,
  asked: tuple[int, int] = ASKED,
  answered: tuple[int, int] = ANSWERED,
  sizes: Sequence[int] = SIZES,
  rounds: int = 5,
) -> dict[str, Any]:
  """Tokens a second on both sides, as JSON.

  Args:
    model: configuration.
    params: of it.
    exported: folder that transformers reads.
    count: of the questions.
    asked: least and most tokens of a question.
    answered: tokens of the answers, in turn.
    sizes: of the batches that are tried.
    rounds: turns of each side.
  """
  layout = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  queries = questions(model, count, asked, answered)
  tokens = sum(q.fields['most'] for q in queries)
  theirs = Transformers(exported)
  runs = {}
  for size in sizes:
    run = config(model, asked[1] + max(answered), max(answered), size, Steps())
    made = rollouts(run, layout)
    runs['ours', size] = lambda m=made: [
      answer.spans[0] for answer in m.answers({'params': params}, queries, 0)
    ]
    runs['transformers', size] = lambda s=size: theirs.answers(queries, s)
  # One turn each, compiled before it, to find the best size; then these two in turn.
  tried = {}
  for name, answer in runs.items():
    if name[0] == 'ours':
      answer()
    began = time.perf_counter()
    said = answer()
    tried[name] = time.perf_counter() - began
    print(*name, f'{tokens / tried[name]:,.0f} tokens/s', flush=True)
    if [len(ids) for ids in said] != [q.fields['most'] for q in queries]:
      raise ValueError(f'{name}: answers of other lengths')
  best = {
    side: min(sizes, key=lambda size, s=side: tried[s, size])
    for side in ('ours', 'transformers')
  }
  taken: dict[str, list[float]] = {side: [] for side in best}
  for _ in range(rounds):
    for side, size in best.items():
      taken[side].append(_seconds(runs[side, size]))
  return {
    'questions': count,
    'tokens': tokens,
    'rows': best,
    'tokens_per_second': {k: tokens / statistics.median(t) for k, t in taken.items()},
    'ratios': _ratios(taken['ours'], taken['transformers']),
  }


def _seconds(run: Any) -> float:
  began = time.perf_counter()
  run()
  return time.perf_counter() - began


def _ratios(own: Sequence[float], other: Sequence[float]) -> list[float]:
  return [b / a for a, b in zip(own, other, strict=True)]


def steps(
  model: Any, params: Any, exported: Path, trl: str, sizes: Steps = Steps(), turns: int = 2
) -> dict[str, Any]:
  """Seconds of a step on both sides, as JSON.

  Args:
    model: configuration.
    params: of it.
    exported: folder that transformers reads.
    trl: the interpreter that has it.
    sizes: of the steps.
    turns: of each side.
  """
  own = _OwnSteps(model, params, sizes, exported)
  own(1)  # compiled
  taken: dict[str, list[list[float]]] = {'ours': [], 'TRL': []}
  command = [trl, '-m', 'benchmarks.trl_step', str(exported)]
  command.append(json.dumps(dataclasses.asdict(sizes)))
  versions = {}
  for _ in range(turns):
    taken['ours'].append(own(sizes.count)[1:])
    done = subprocess.run(
      command, check=True, stdout=subprocess.PIPE, text=True, cwd=readme.ROOT
    )
    said = json.loads(done.stdout.splitlines()[-1])
    taken['TRL'].append(said['seconds'][1:])
    versions = said['versions']
  medians = {side: [*map(statistics.median, t)] for side, t in taken.items()}
  return {
    **dataclasses.asdict(sizes),
    'versions': versions,
    'seconds': {
      side: statistics.median([*itertools.chain(*t)]) for side, t in taken.items()
    },
    'ratios': _ratios(medians['ours'], medians['TRL']),
  }


class _OwnSteps:
  """GRPO as `train` runs it."""

  def __init__(self, model: Any, params: Any, sizes: Steps, folder: Path):
    length = sizes.asked + sizes.answered
    run = config(model, length, sizes.answered, sizes.batch, sizes, folder)
    self._layout = sharding.make_mesh(run.mesh, jax.devices()[:1])
    self._made = rollouts(run, self._layout)
    with stand_in.present(run) as here:
      self._built = program.build(here, self._layout)
    self._frozen = {REFERENCE: params}
    # The state is donated; the reference stays.
    own = jax.tree.map(jnp.copy, params)
    self._current = state.begin(own, self._built.optimizer, self._built.state)
    queries = questions(model, 256, (sizes.asked, sizes.asked), (sizes.answered,))
    self._stream = RolloutStream(run, self._layout, self._made, queries, 0)
    self._stream.variables = lambda now: self._built.variables(now['params'], self._frozen)

  def __call__(self, count: int) -> list[float]:
    return [_seconds(self._step) for _ in range(count)]

  def _step(self) -> None:
    with sharding.active(self._layout):
      batch = self._stream(self._current).batch
      self._current, metrics = self._built.train_step(self._current, self._frozen, batch)
      jax.block_until_ready((self._current, metrics))


def table(results: dict[str, Any]) -> list[str]:
  """Markdown lines of a device's results.

  Example:
    >>> answers = {'questions': 4, 'tokens': 9, 'rows': {'ours': 8, 'transformers': 2}}
    >>> answers |= {'tokens_per_second': {'ours': 20.0, 'transformers': 10.0}}
    >>> of = {'device': 'here', 'date': '', 'jax': '', 'transformers': '', 'model': 'small'}
    >>> of |= {'cores': 1}
    >>> table(of | {'answers': answers | {'ratios': [2.0, 3.0]}})[-1]
    '| 4 questions, tok/s | 20 (8 a batch) | 10 (transformers, 2) | **2.50** (2.00–3.00) |'
  """
  row = lambda case, own, other, ratios: (
    f'| {case} | {own} | {other} | **{statistics.median(ratios):.2f}** '
    f'({min(ratios):.2f}–{max(ratios):.2f}) |'
  )
  a, s = results['answers'], results.get('steps')
  speed, rows = a['tokens_per_second'], a['rows']
  lines = [
    row(
      f'{a["questions"]} questions, tok/s',
      f'{speed["ours"]:,.0f} ({rows["ours"]} a batch)',
      f'{speed["transformers"]:,.0f} (transformers, {rows["transformers"]})',
      a['ratios'],
    )
  ]
  versions = f'transformers {results["transformers"]}'
  if s:
    versions += f', TRL {s["versions"]["trl"]}'
    case = f'a step of GRPO, {s["batch"]} answers, seconds'
    seconds = s['seconds']
    own, other = f'{seconds["ours"]:.2f}', f'{seconds["TRL"]:.2f} (TRL)'
    lines.append(row(case, own, other, s['ratios']))
  return [
    f'{results["device"]}, {results["date"]}; jax {results["jax"]}, {versions}; '
    f'{results["model"]}, float32, on {results["cores"]} core(s); questions of '
    f'{ASKED[0]} to {ASKED[1]} tokens, answers of {ANSWERED[0]} and {ANSWERED[1]} in turn, '
    'sampled; a step: 8 answers to each question, of 64 tokens each, scored and learnt '
    'from once; medians, and the least and the largest ratio of the turns:',
    '',
    '| case | ours | beside | ratio |',
    '|---|---|---|---|',
    *lines,
  ]


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = argparse.ArgumentParser(
    prog='python -m benchmarks.rollouts', description=__doc__.splitlines()[0]
  )
  flags.add_argument('--rounds', type=int, default=5, help='turns of each side')
  flags.add_argument(
    '--trl', default='', metavar='PYTHON', help='an interpreter that has trl, for the steps'
  )
  flags.add_argument('--table', action='store_true', help='only write the table')
  flags = flags.parse_args(argv)
  if not flags.table:
    import transformers

    layout = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    params = state.init_state(MODEL, decode.nothing(), layout, 0)['params']
    with tempfile.TemporaryDirectory() as folder:
      exported = decode.exported(Path(folder), params)
      results = {
        **about(),
        'transformers': transformers.__version__,
        'cores': len(os.sched_getaffinity(0)),
        'model': f'ChatGLM2, {MODEL.num_layers} layers of width {MODEL.hidden_size}',
        'answers': answers(MODEL, params, exported, rounds=flags.rounds),
      }
      print('\n'.join(table(results)), flush=True)
      if flags.trl:
        results['steps'] = steps(MODEL, params, exported, flags.trl)
        print(table(results)[-1])
    path = readme.path_of(RESULTS, results)
    path.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
  readme.write_results('rollouts', RESULTS, table, 'benchmarks.rollouts')


if __name__ == '__main__':
  startup.keep_memory()
  cli.main(main)
