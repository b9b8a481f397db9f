"""Advantages and losses of policies, beside their definitions in NumPy."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tuned

from glm_jax.batch import Batch
from glm_jax.models import ComputeConfig, build
from glm_jax.recipes import advantages, rewards
from glm_jax.recipes.experience import Experience
from glm_jax.recipes.grpo import GRPO
from glm_jax.recipes.policy import Policy
from glm_jax.recipes.ppo import PPO
from glm_jax.training import log_probs, state

B, T, V = 4, 9, 6
SPANS = [(2, 6), (3, 4), (1, 9), (0, 0)]  # the last row only fills the batch up
ALLOWED = np.array([True, True, False, True, True, True])
RNG = np.random.default_rng(0)


def _experience(kl_weight=0.3, own=False):
  weights = np.zeros((B, T))
  for row, (a, b) in enumerate(SPANS):
    weights[row, a:b] = 1
  zeros = np.zeros((B, T), np.int32)
  # What is asked, and what fills rows up, may be what is never said.
  targets = RNG.choice(np.flatnonzero(ALLOWED), (B, T))
  targets = np.where(weights > 0, targets, np.flatnonzero(~ALLOWED)[0])
  rows = Batch(zeros, targets, weights, zeros, zeros, zeros, zeros, zeros)
  near = lambda scale: scale * RNG.normal(size=(B, T)) * weights
  learnt = (RNG.uniform(size=(B, T)) < 0.5) * 1.0
  return Experience(
    rows,
    old_log_probs=near(0.5) - 1.5 * weights,
    reference_log_probs=near(0.5) - 1.5 * weights,
    advantages=near(1.0),
    returns=near(1.0),
    old_values=near(1.0),
    reward=RNG.normal(size=B),
    rewards=(RNG.normal(size=B),),
    ended=np.array([1.0, 0, 1, 0]),
    kl_weight=np.full(B, kl_weight),
    explained=np.full(B, 0.25),
    own=rows._replace(loss_weights=learnt) if own else None,
  )


class _Table:
  """A model whose parameters are its logits [B, T, V]; a critic reads them."""

  def apply(self, variables, *_, head=None, deterministic, rngs):
    assert deterministic and rngs is None
    logits = variables['params']['logits']
    return (logits if head is None else head(logits, jnp.eye(V))), None


def _in_numpy(logits, weight, bias, e, recipe):
  """(the mean loss, numbers that are reported), token by token."""
  total, count, spoken, clipped, entropies, kls = 0.0, 0.0, 0, 0, 0.0, 0.0
  for row, (a, b) in enumerate(SPANS):
    if a == b:
      continue
    per = getattr(recipe, 'per', 'token')
    w = {'token': 1.0, 'answer': 1 / (b - a), 'limit': 1 / recipe.max_new_tokens}[per]
    count += b - a if per == 'token' else 1
    for t in range(a, b):
      z = logits[row, t][ALLOWED] / recipe.temperature
      p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
      target = np.flatnonzero(ALLOWED).tolist().index(e.rows.targets[row, t])
      log_p, entropy = np.log(p[target]), -(p * np.log(p)).sum()
      ratio = np.exp(log_p - e.old_log_probs[row, t])
      gain = e.advantages[row, t]
      bounded = min(max(ratio, 1 - recipe.clip), 1 + recipe.clip)
      loss = -min(ratio * gain, bounded * gain) - recipe.entropy_weight * entropy
      apart = e.reference_log_probs[row, t] - log_p
      kl = np.exp(apart) - apart - 1
      if isinstance(recipe, GRPO):
        loss += e.kl_weight[row] * kl
      else:
        value = logits[row, t] @ weight + bias
        old, goal = e.old_values[row, t], e.returns[row, t]
        error = (value - goal) ** 2
        if recipe.value_clip:
          near = min(max(value, old - recipe.value_clip), old + recipe.value_clip)
          error = max(error, (near - goal) ** 2)
        loss += 0.5 * recipe.value_weight * error
      total += w * loss
      spoken += 1
      clipped += abs(ratio - 1) > recipe.clip
      entropies += entropy
      kls += kl
  told = {'clip_fraction': clipped, 'entropy': entropies, 'kl': kls}
  mean = total / count
  if recipe.sft_weight:
    # Over all tokens, without a temperature, and whatever the policy's loss counts.
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    of_targets = np.take_along_axis(p, e.own.targets[..., None], -1)[..., 0]
    learnt = e.own.loss_weights
    mean += recipe.sft_weight * -(np.log(of_targets) * learnt).sum() / learnt.sum()
  return mean, {name: x / spoken for name, x in told.items()}


RECIPES = [
  (PPO, {}),
  (PPO, {'entropy_weight': 0.1, 'temperature': 0.7, 'value_clip': 0.0, 'clip': 0.4}),
  (PPO, {'value_weight': 1.0, 'chunks': 0}),
  (GRPO, {}),
  (GRPO, {'per': 'token', 'temperature': 1.5, 'entropy_weight': 0.2}),
  (GRPO, {'per': 'limit', 'scaled': False, 'chunks': 3}),
  (GRPO, {'sft_weight': 0.7, 'chunks': 2, 'temperature': 0.6}),
  (PPO, {'sft_weight': 0.3, 'chunks': 0}),
]


@pytest.mark.parametrize('kind,settings', RECIPES, ids=str)
def test_losses_and_gradients_are_those_of_numpy(kind, settings, monkeypatch):
  monkeypatch.setattr(Policy, '_allowed', lambda self, config: ALLOWED)
  recipe = kind(
    feature_lengths={'tokens': 32}, rewards={'a.b': 1.0}, max_new_tokens=8, **settings
  )
  logits, e = RNG.normal(size=(B, T, V)), _experience(own=recipe.sft_weight > 0)
  weight, bias = RNG.normal(size=V), 0.3
  with jax.enable_x64(True):
    loss = recipe.loss(None, _Table())

    def mean(logits, weight, bias):
      value = {'vector': weight, 'bias': bias}
      critic = {'critic': value} if kind is PPO else {}
      variables = {'params': {'logits': logits, **critic}}
      total, metrics = loss(variables, e, None, recipe.counts(e))
      return total / metrics['loss'][1], metrics

    arguments = tuple(map(jnp.asarray, (logits, weight, bias)))
    both = jax.value_and_grad(mean, argnums=(0, 1, 2), has_aux=True)
    (value, metrics), gradients = both(*arguments)
  expected, told = _in_numpy(logits, weight, bias, e, recipe)
  assert float(value) == pytest.approx(expected, abs=1e-6)
  for name, number in told.items():
    total, count = map(float, metrics[name])
    assert total / count == pytest.approx(number, abs=1e-6), name
  # Rows are counted, and the one that fills the batch up is none.
  reward, rows = map(float, metrics['reward'])
  assert rows == 3 and reward == pytest.approx(e.reward[:3].sum(), abs=1e-6)
  parts = [name for name in metrics if name.endswith('_loss') and name != 'sft_loss']
  by_name = sum(float(metrics[name][0]) for name in parts) / float(metrics['loss'][1])
  if recipe.sft_weight:
    by_name += recipe.sft_weight * float(metrics['sft_loss'][0] / metrics['sft_loss'][1])
  assert by_name == pytest.approx(float(value), abs=1e-6)
  # Central differences, at places drawn by lot and at all of the critic.
  h = 1e-6

  def slope(which, place):
    ends = []
    for sign in (1, -1):
      moved = [np.array(logits), np.array(weight), np.array(bias)]
      moved[which][place] += sign * h
      ends.append(_in_numpy(moved[0], moved[1], float(moved[2]), e, recipe)[0])
    return (ends[0] - ends[1]) / (2 * h)

  places = [(0, *RNG.integers((B, T, V))) for _ in range(40)]
  places += [(0, row, t, v) for row, t in ((0, 5), (1, 3), (2, 8)) for v in range(V)]
  places += [(1, v) for v in range(V)] + [(2,)]
  for which, *place in places:
    found = np.asarray(gradients[which])[tuple(place)]
    assert found == pytest.approx(slope(which, tuple(place)), abs=1e-6), (which, place)
  # What may not be said is not moved by the policy, nor is what was asked.
  if kind is GRPO and not recipe.sft_weight:
    assert not np.asarray(gradients[0])[:, :, ~ALLOWED].any()
    assert not np.asarray(gradients[0])[0, :2].any()


@pytest.mark.parametrize('discount,lam', [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0), (0.9, 0.5)])
def test_generalised_advantages_are_sums_of_errors(discount, lam):
  scored = np.zeros((B, T), bool)
  for row, (a, b) in enumerate(SPANS):
    scored[row, a:b] = True
  given, values = RNG.normal(size=(2, B, T))
  found = advantages.estimated(
    np.where(scored, given, 0), values, scored, discount=discount, lam=lam
  )
  for row, (a, b) in enumerate(SPANS):
    for t in range(a, b):
      value = lambda i, row=row, b=b: values[row, i] if i < b else 0.0
      errors = [given[row, i] + discount * value(i + 1) - value(i) for i in range(t, b)]
      expected = sum((discount * lam) ** k * x for k, x in enumerate(errors))
      assert found[row, t] == pytest.approx(expected, abs=1e-9)
  assert not found[~scored].any()


def test_rewards_come_at_the_end_of_an_answer_and_kl_at_each_token():
  recipe = PPO(
    feature_lengths={'tokens': 32}, rewards={'a.b': 1.0}, max_new_tokens=8, whiten=False
  )
  recipe = dataclasses.replace(recipe, lam=1.0, discount=1.0)
  scored = np.array([[False, True, True, True, False]])
  kl = np.array([[9.0, 0.1, 0.2, 0.3, 9.0]])
  values = np.array([[9.0, 0.5, 0.25, 0.125, 9.0]])
  better, returns = recipe.advantages(np.array([2.0]), kl, values, scored)
  # What is still to come: the reward, less the KL of these and later tokens.
  np.testing.assert_allclose(returns[0, 1:4], [1.4, 1.5, 1.7])
  np.testing.assert_allclose(better[0, 1:4], returns[0, 1:4] - values[0, 1:4])
  white, _ = dataclasses.replace(recipe, whiten=True).advantages(
    np.array([2.0]), kl, values, scored
  )
  assert white[scored].mean() == pytest.approx(0) and white[scored].std() == pytest.approx(
    1
  )
  assert not white[~scored].any()


@pytest.mark.parametrize('baseline,scaled', [('group', True), ('others', False)])
def test_answers_are_held_against_those_to_their_own_question(baseline, scaled):
  recipe = GRPO(
    feature_lengths={'tokens': 32},
    rewards={'a.b': 1.0},
    max_new_tokens=8,
    samples=3,
    baseline=baseline,
    scaled=scaled,
  )
  scores = np.array([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
  scored = np.ones((6, 2), bool)
  better, _ = recipe.advantages(scores, np.zeros((6, 2)), np.zeros((6, 2)), scored)
  for i, score in enumerate(scores):
    group = scores[i // 3 * 3 : i // 3 * 3 + 3]
    others = np.delete(group, i % 3)
    expected = score - (group if baseline == 'group' else others).mean()
    if scaled:
      # The deviation of a sample of three.
      expected /= np.sqrt(((group - group.mean()) ** 2).sum() / 2) + 1e-4
    np.testing.assert_allclose(better[i], expected, atol=1e-9)


def test_the_loss_holds_a_quarter_of_the_logits_at_most(monkeypatch):
  """At ChatGLM2's vocabulary, in the program that is compiled, backward pass included."""
  V, B, T = 65024, 2, 64
  monkeypatch.setattr(Policy, '_allowed', lambda self, config: np.ones(V, bool))
  config = dataclasses.replace(tuned.MODELS['chatglm3'][0], vocab_size=V)
  recipe = GRPO(feature_lengths={'tokens': T}, rewards={'a.b': 1.0}, max_new_tokens=8)
  loss = recipe.loss(None, build(config, ComputeConfig()))

  class Run:
    batch_size = B

  def gradient(params, batch):
    return jax.grad(lambda params: loss({'params': params}, batch, None, {})[0])(params)

  params = state.abstract_params(config)
  text = jax.jit(gradient).lower(params, recipe.batch(Run)).as_text()
  assert re.search(rf'tensor<{B}x{T // 8}x{V}xf32>', text)
  assert f'x{T}x{V}x' not in text


@pytest.mark.parametrize('chunks', [1, 3, 8, 64])
def test_parts_of_a_row_change_nothing(chunks):
  model, _ = tuned.model('chatglm3')
  module = build(model, ComputeConfig())
  params = state.init_params(model, jax.random.key(0))
  ids = jnp.asarray(RNG.integers(0, 99, (2, 10)))
  t = jnp.broadcast_to(jnp.arange(10), (2, 10))
  rows = Batch(ids, ids, jnp.ones((2, 10)), t, 0 * t, 0 * t, t + 1, 0 * t)
  allowed = jnp.arange(model.vocab_size) < 600
  of = lambda chunks: log_probs.said(
    module,
    {'params': params},
    rows,
    allowed_V=allowed,
    temperature=0.8,
    chunks=chunks,
  )
  for a, b in zip(of(0), of(chunks), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_judge_asks_its_functions_about_all(monkeypatch):
  import sys
  import types

  own = types.ModuleType('judging')
  own.first = lambda prompts, completions, **_: [0.25 * len(c) for c in completions]
  own.second = lambda prompts, completions, level, **_: np.array(
    [len(p) + (n or 0) for p, n in zip(prompts, level, strict=True)]
  )
  monkeypatch.setitem(sys.modules, 'judging', own)
  of = lambda prompt, answer, **fields: rewards.Sample(prompt, answer, fields, None, ())
  judge = rewards.Judge(['judging.first', 'judging.second'], 5.0)
  found = judge([of('ab', 'c', level=3), of('d', 'efg')])
  np.testing.assert_allclose(found, [[0.25, 5], [0.75, 1]], atol=1e-6)
  assert found.dtype == np.float32
