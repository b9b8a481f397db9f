"""Answers that a policy gives itself, judged, and as rows that it learns from.

A rollout is made with the weights that the run then has, on its mesh, by the decoder that
`generate` uses; several updates learn from it. What they need stands in arrays on the mesh,
which checkpoints hold: a run that was killed between two updates of a rollout goes on with
it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import attention, distributed, models, sharding, storage
from glm_jax.batch import Batch, Visibility
from glm_jax.inference import prompts, scoring
from glm_jax.inference.engine import Engine
from glm_jax.inference.request import Answer, Request
from glm_jax.inference.sampling import Sampling
from glm_jax.recipes.answering import text_of
from glm_jax.recipes.experience import Experience, from_dict, shapes, to_dict
from glm_jax.recipes.questions import Query
from glm_jax.recipes.rewards import Judge, Sample
from glm_jax.text.vocabulary import Vocabulary
from glm_jax.training import log_probs, recipe, step
from glm_jax.training.config import TrainConfig
from glm_jax.training.recipe import REFERENCE

# Different random numbers of one seed: questions, their answers, the order of updates.
_ORDER, _ANSWERS, _UPDATES = range(3)
# Samples that a table shows.
_SHOWN = 4


class Rollouts:
  """Answers of a policy to questions, on its run's mesh."""

  def __init__(
    self,
    config: TrainConfig,
    layout: sharding.Layout,
    vocabulary: Vocabulary,
    template: Any,
    judge: Judge,
  ):
    """
    Args:
      config: of the run, whose recipe is a `glm_jax.recipes.policy.Policy`.
      layout: of the devices.
      vocabulary: of the tokens.
      template: of conversations; None for a model that is asked blanks.
      judge: of the answers.
    """
    self._config, self._layout, self._recipe = config, layout, config.recipe
    self._vocabulary, self._template, self._judge = vocabulary, template, judge
    self._stops = template.stops if template else vocabulary.stops
    self.allowed = prompts.allowed(config.model, vocabulary)
    # Of one shape, however long the questions of a rollout are: one program for all. No
    # slot is spared: a cache is as long as the next power of two.
    self._slots = config.recipe.length
    self._engine: Engine | None = None
    backend, _ = attention.choose(
      config.model, config.compute, layout.devices.flat[0], config.recipe.length
    )
    compute = dataclasses.replace(config.compute, attention=backend)
    model = models.build(config.model, compute)
    self._said = jax.jit(functools.partial(score, config, self.allowed, model))
    self._cast = jax.jit(functools.partial(_cast, dtype=config.compute.dtype))

  def answers(
    self, variables: Mapping[str, Any], questions: Sequence[Query], seed: int
  ) -> list[Answer]:
    """An answer to each, in their order.

    Args:
      variables: the model's collections, on the mesh.
      questions: of which one may stand there several times.
      seed: of the answers.
    """
    c, recipe_ = self._config, self._recipe
    params = {k: v for k, v in variables['params'].items() if k not in recipe_.leaves(c)}
    own = {name: tree for name, tree in variables.items() if name != REFERENCE}
    # Once, and not with every token.
    own = self._cast({**own, 'params': params})
    # A token at a time is no length to be cut.
    with sharding.active(self._layout.replace(act_length=None)):
      if self._engine is None:
        self._engine = Engine(
          c.model,
          own,
          stops=self._stops,
          allowed=self.allowed,
          compute=c.compute,
          rows=recipe_.decoding_rows,
        )
      else:
        self._engine.variables = own
      made = self._engine.generate(
        [self.request(i, question) for i, question in enumerate(questions)],
        most=recipe_.max_new_tokens,
        sampling=Sampling(temperature=recipe_.temperature),
        seed=seed,
        slots=self._slots,
      )
      made = sorted(made, key=lambda answer: answer.number)
    # Nothing of them is kept: the next update's program writes to their memory.
    self._engine.variables = {}
    return made

  def request(self, number: int, question: Query) -> Request:
    return prompts.request(self._config.model, self._vocabulary, number, question.ids)

  def judged(
    self, questions: Sequence[Query], answers: Sequence[Answer]
  ) -> tuple[list[Sample], np.ndarray, np.ndarray]:
    """Samples, what each judge gives them [n, judges], and their rewards [n], float32.

    An answer without an end loses the penalty; with `less_own`, all lose what their
    questions' own answers get.
    """
    samples = [*map(self._sample, questions, answers)]
    given, r = self._judge(samples), self._recipe
    weights = np.array([*r.judges.values()], np.float32)
    rewards = given @ weights - np.float32(r.unfinished_penalty) * ~ended(answers)
    if r.less_own:
      # Each once, however many answers its question has.
      once = {id(question): question for question in questions}
      of_own = self._judge([self._sample(q, _own(q)) for q in once.values()])
      found = dict(zip(once, of_own @ weights, strict=True))
      rewards -= np.array([found[id(question)] for question in questions])
    return samples, given, rewards

  def _sample(self, question: Query, answer: Answer) -> Sample:
    ids, end = answer.spans[0], answer.ends[0]
    text = text_of(ids, self._vocabulary, self._template)
    request = self.request(answer.number, question)
    ids = [*ids, end] if end >= 0 else ids
    return Sample(question.text, text, question.fields, request, ids)

  def own_rows(self, questions: Sequence[Query]) -> Batch:
    """[n, T] numpy: the questions with their own answers, as they are learnt."""
    return self.rows(questions, [*map(_own, questions)])

  def rows(self, questions: Sequence[Query], answers: Sequence[Answer]) -> Batch:
    """[n, T] numpy: what was asked and answered, as it is learnt from."""
    c, v, made = self._config, self._vocabulary, []
    for question, answer in zip(questions, answers, strict=True):
      request, end = self.request(0, question), answer.ends[0]
      row = scoring.lay_out(c.model, v, request, answer.spans)
      # What has ended an answer is one of several; one that was cut short has no end.
      targets = [*row.targets[:-1], end if end >= 0 else v.specials.pad]
      made.append(row._replace(targets=targets, scored=[*row.scored[:-1], end >= 0]))
    rows = scoring.batch(made, 'answer', v.specials.pad)
    return scoring.padded(rows, len(made), self._recipe.length)

  def said(
    self, variables: Mapping[str, Any], rows: Batch
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n, T] float32 each: log-probabilities, the reference's, and values, 0 elsewhere.

    Args:
      variables: the model's collections, the reference's among them.
      rows: see `rows`.
    """
    size, count = self._config.batch_size // self._config.microbatches, len(rows.tokens)
    rows = scoring.padded(rows, -(-count // size) * size, self._recipe.length)
    parts = []
    with sharding.active(self._layout):
      for first in range(0, count, size):
        part = jax.tree.map(lambda x, i=first: x[i : i + size], rows)
        placed = sharding.place_whole(part, self._layout)
        parts.append(jax.tree.map(np.asarray, self._said(variables, placed)))
    return tuple(np.concatenate(arrays)[:count] for arrays in zip(*parts, strict=True))

  def written(
    self,
    number: int,
    samples: Sequence[Sample],
    given: np.ndarray,
    rewards: np.ndarray,
    kl: np.ndarray,
    ended: np.ndarray,
  ) -> None:
    """The leader writes a rollout to rollouts/ in MODEL_DIR, and prints some of it."""
    if not distributed.is_leader():
      return
    lines = [
      {
        'prompt': sample.prompt,
        'completion': sample.answer,
        'reward': float(reward),
        'rewards': dict(zip(self._recipe.judges, map(float, own), strict=True)),
        'kl': float(nats),
        'ended': bool(end),
      }
      for sample, own, reward, nats, end in zip(
        samples, given, rewards, kl, ended, strict=True
      )
    ]
    content = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)
    name = f'rollouts/{number:06}.jsonl'
    storage.Folder(self._config.model_dir).write(name, content.encode('utf-8'))
    apart = f', KL {kl.mean():.3f} nats an answer' if self._recipe.reference else ''
    print(
      f'rollout {number}: reward {rewards.mean():.3f}{apart}, {ended.mean():.0%} ended '
      f'({name})'
    )
    for i in np.unique(np.linspace(0, len(samples) - 1, _SHOWN).astype(int)):
      prompt, answer = (_short(text) for text in (samples[i].prompt, samples[i].answer))
      print(f'  {rewards[i]:7.3f}  {prompt} -> {answer}', flush=True)


class RolloutStream(recipe.WorkStream):
  """Updates of one rollout after the other."""

  def __init__(
    self,
    config: TrainConfig,
    layout: sharding.Layout,
    rollouts: Rollouts,
    questions: Sequence[Query],
    first: int,
  ):
    """
    Args:
      config: of the run.
      layout: of the devices.
      rollouts: answers, and judges.
      questions: that are asked, in an order of the run's seed.
      first: the step that the run stands at.
    """
    self._config, self._layout, self._recipe = config, layout, config.recipe
    self._rollouts, self._questions, self._step = rollouts, questions, first
    rank = lambda a: sharding.batch_sharding(layout, len(a.shape))
    sizes = (self._recipe.length, len(self._recipe.judges), self._recipe.sft_weight > 0)
    rows = shapes(self._recipe.rollout_size, *sizes)
    spread = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rank(a))
    # Until the first rollout, what a checkpoint is read into.
    self.kept = to_dict(jax.tree.map(spread, rows))
    batch = jax.tree.map(rank, shapes(config.batch_size, *sizes))
    self._take = jax.jit(
      lambda kept, ids: jax.tree.map(lambda x: x[ids], from_dict(kept)),
      out_shardings=batch,
    )
    self._last_kl = jax.jit(
      lambda kept: (
        kept['kl_weight'][0],
        (kept['old_log_probs'] - kept['reference_log_probs']).sum(1).mean(),
      ),
      out_shardings=sharding.replicated(layout),
    )
    self._seen: Visibility | None = None

  def __call__(self, state: Any) -> recipe.Work:
    c, r = self._config, self._recipe
    number, update = divmod(self._step, r.updates(c))
    if not update:
      self._roll(number, self.variables(state))
    epoch, part = divmod(update, r.rollout_size // c.batch_size)
    # Each epoch in an order of its own; answers to one question stay in one update.
    order = np.random.default_rng([c.seed, _UPDATES, number, epoch])
    groups = order.permutation(r.rollout_size // r.samples)
    ids = (groups[:, None] * r.samples + np.arange(r.samples)).ravel()
    ids = ids[part * c.batch_size :][: c.batch_size]
    if self._seen is None:
      whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(self._layout))
      seen = (self.kept['key_start'], self.kept['key_end'])
      self._seen = Visibility(*map(np.asarray, whole(seen)))
    self._step += 1
    tokens, flops = r.work(c, Visibility(*(x[ids] for x in self._seen)))
    return recipe.Work(self._take(self.kept, ids), tokens, flops)

  def _roll(self, number: int, variables: Mapping[str, Any]) -> None:
    c, r = self._config, self._recipe
    chosen = [q for q in self._asked(number) for _ in range(r.samples)]
    seed = np.random.SeedSequence([c.seed, _ANSWERS, number]).generate_state(1)[0]
    answers = self._rollouts.answers(variables, chosen, int(seed))
    samples, given, rewards = self._rollouts.judged(chosen, answers)
    rows = self._rollouts.rows(chosen, answers)
    log_probs_NT, reference_NT, values_NT = self._rollouts.said(variables, rows)
    kl_N = (log_probs_NT - reference_NT).sum(1)
    kl_weight = self._kl_weight()
    advantages_NT, returns_NT = r.advantages(
      rewards, kl_weight * (log_probs_NT - reference_NT), values_NT, rows.loss_weights > 0
    )
    ends = ended(answers)
    of_all = lambda x: np.full(len(rows.tokens), x, np.float32)
    made = Experience(
      rows._replace(index=None),
      log_probs_NT,
      reference_NT,
      advantages_NT.astype(np.float32),
      returns_NT.astype(np.float32),
      values_NT,
      rewards.astype(np.float32),
      tuple(given.T),
      ends.astype(np.float32),
      of_all(kl_weight),
      of_all(_explained(returns_NT, values_NT, rows.loss_weights > 0)),
    )
    if r.sft_weight:
      own = self._rollouts.own_rows(chosen)._replace(index=None)
      made = made._replace(own=own)
    self._seen = rows.visibility
    self.kept = to_dict(sharding.place_whole(made, self._layout))
    if number % r.show_every == 0:
      self._rollouts.written(number, samples, given, rewards, kl_N, ends)

  def _asked(self, number: int) -> list[Query]:
    """The questions of a rollout; each is asked again when all have been."""
    count, n = self._recipe.rollout_size // self._recipe.samples, len(self._questions)
    places = range(number * count, (number + 1) * count)
    orders = {
      again: np.random.default_rng([self._config.seed, _ORDER, again]).permutation(n)
      for again in {place // n for place in places}
    }
    return [self._questions[orders[place // n][place % n]] for place in places]

  def _kl_weight(self) -> float:
    """That of a rollout, from the KL of the one before it (Ziegler et al., 2019, 2.2)."""
    kept, r = self.kept, self._recipe
    first = isinstance(kept['kl_weight'], jax.ShapeDtypeStruct)
    if first or r.kl_target is None:
      return r.kl
    weight, kl = map(float, map(np.asarray, self._last_kl(kept)))
    return weight * (1 + 0.1 * float(np.clip(kl / r.kl_target - 1, -0.2, 0.2)))


def score(
  config: TrainConfig,
  allowed: np.ndarray,
  model: Any,
  variables: Mapping[str, Any],
  rows: Batch,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """[B, T] float32 each: what `Rollouts.said` has of a few rows.

  Args:
    config: of the run.
    allowed: [V] bool, tokens that may be said.
    model: a Flax module.
    variables: its collections, the reference's among them.
    rows: to be read.
  """
  scored = rows.loss_weights > 0
  own = {name: tree for name, tree in variables.items() if name != REFERENCE}
  own = _cast(own, config.compute.dtype)
  of = lambda collections: log_probs.said(
    model,
    collections,
    rows,
    allowed_V=jnp.asarray(allowed),
    temperature=config.recipe.temperature,
    chunks=config.recipe.chunks,
  )
  said = of(own)
  began = said
  if REFERENCE in variables:
    began = of(_cast(variables[REFERENCE], config.compute.dtype))
  values = config.recipe.values(config, model, own, said.states, rows)
  # Every process has them all.
  whole = lambda x: nn.with_logical_constraint(jnp.where(scored, x, 0), (None, None))
  return whole(said.log_probs), whole(began.log_probs), whole(values)


def ended(answers: Sequence[Answer]) -> np.ndarray:
  """[n] bool, of answers of one span each."""
  return np.array([answer.ends[0] >= 0 for answer in answers])


def _own(question: Query) -> Answer:
  """A question's own answer, as if it had been generated."""
  return Answer(number=0, spans=[question.own[:-1]], ends=[question.own[-1]])


def _cast(variables: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  """As a step casts them: scales of integers, too, have leaves called weights."""
  return {**variables, 'params': step.cast(variables['params'], dtype)}


def _explained(returns: np.ndarray, values: np.ndarray, scored: np.ndarray) -> float:
  """1 - var(returns - values) / var(returns); 0 where returns do not vary."""
  variance = float(returns[scored].var())
  return 1 - float((returns - values)[scored].var()) / variance if variance else 0.0


def _short(text: str) -> str:
  text = ' '.join(text.split())
  return text if len(text) <= 60 else text[:57] + '...'
