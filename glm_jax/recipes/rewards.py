"""What an answer is worth: functions of one's own, a reward model, or both, weighted."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from glm_jax import configs, opening, sharding
from glm_jax.inference import scoring
from glm_jax.inference.forward import Forward
from glm_jax.inference.request import Request
from glm_jax.models import ComputeConfig
from glm_jax.text.vocabulary import Vocabulary

RewardFn = Callable[..., Sequence[float]]
"""reward(prompts, completions, **fields) -> a number for each, as in TRL.

`prompts` and `completions` are lists of texts; `fields` are lists of the values that the
lines of the corpus hold by these names, None where one lacks it.
"""


class Sample(NamedTuple):
  """An answer, and what was asked.

  Attributes:
    prompt: the question's text.
    answer: the answer's.
    fields: of the question's line.
    request: what the model has read.
    ids: of the answer, and of the token that ended it.
  """

  prompt: str
  answer: str
  fields: Mapping[str, Any]
  request: Request
  ids: Sequence[int]


def function(name: str) -> RewardFn:
  """The function 'module.name' of a module that --import has named.

  Raises:
    UserError: there is none.
  """
  module, _, attribute = name.rpartition('.')
  found = getattr(sys.modules.get(module), attribute, None)
  configs.check(
    callable(found),
    "a reward must be a function's name behind its module's, which --import names",
    repr(name),
    f'add --import={module or "my_rewards"}, and name its function as '
    f'{module or "my_rewards"}.{attribute or "reward"}',
  )
  return found


class Judge:
  """Gives samples their rewards; all processes call it with the same samples."""

  def __init__(
    self, functions: Sequence[str], seconds: float, model: RewardModel | None = None
  ):
    """
    Args:
      functions: names, see `function`.
      seconds: that a function may take for its process's samples.
      model: judges, too, behind the functions.
    """
    self._functions = {name: function(name) for name in functions}
    self._seconds, self._model = seconds, model

  def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
    """[n, judges] float32.

    Each process asks its functions for a part of the samples.

    Raises:
      UserError: a function that raises, takes too long, or answers with something else
        than a finite number for each sample.
    """
    given = np.zeros((len(samples), len(self._functions)), np.float32)
    count, index = jax.process_count(), jax.process_index()
    own = np.array_split(np.arange(len(samples)), count)[index]
    error = None
    try:
      for number, (name, reward) in enumerate(self._functions.items()):
        part = [samples[i] for i in own]
        if part:
          given[own, number] = _given(name, reward, part, int(own[0]), self._seconds)
    except configs.UserError as raised:
      error = raised
    if count > 1:
      # Who has failed tells the others, which would wait for it.
      failed = np.asarray(multihost_utils.process_allgather(np.int32(error is not None)))
      if failed.any() and error is None:
        error = configs.UserError(
          'a reward must answer in every process, got none in process '
          f'{int(failed.ravel().argmax())}; see what it says.'
        )
    if error is not None:
      raise error
    if count > 1:
      # Of a sample, one process has them, the others 0.
      given = np.asarray(multihost_utils.process_allgather(given)).sum(0)
    if self._model is None:
      return given
    return np.column_stack([given, self._model(samples)])


def _given(
  name: str, reward: RewardFn, samples: Sequence[Sample], first: int, seconds: float
) -> np.ndarray:
  """What a function gives samples, of which the first has a number among all."""
  answers = _asked(name, reward, samples, first, seconds)
  given = np.asarray(answers, object) if isinstance(answers, np.ndarray) else answers
  known = hasattr(given, '__len__') and not isinstance(given, str | Mapping)
  configs.check(
    known and len(given) == len(samples),
    f'the reward {name!r} must return a number for each of {len(samples)} samples',
    f'{len(given)} of them' if known else type(given).__name__,
    'return a list as long as prompts',
  )
  values = np.zeros(len(samples), np.float32)
  for i, value in enumerate(given):
    try:
      values[i] = float(value)
    except (TypeError, ValueError):
      values[i] = np.nan
    configs.check(
      bool(np.isfinite(values[i])),
      f'the reward {name!r} must return a finite number',
      f'{value!r:.40} for {_named(samples, first, i)}',
      'mend it',
    )
  return values


def _asked(
  name: str, reward: RewardFn, samples: Sequence[Sample], first: int, seconds: float
) -> Any:
  """The function's own answer; UserError if it raises, or takes too long."""
  names = {key for sample in samples for key in sample.fields}
  results: list[Any] = []

  def ask(part: Sequence[Sample]) -> Any:
    fields = {key: [sample.fields.get(key) for sample in part] for key in names}
    said = {'prompts': [s.prompt for s in part], 'completions': [s.answer for s in part]}
    return reward(**{**fields, **said})

  def work() -> None:
    try:
      results.append(ask(samples))
    except BaseException as error:  # whatever it is, the user's function has raised it
      # At once: to look for the sample takes as long again.
      results.append(_Raised(error, None))
      results[0] = _Raised(error, _first_to_raise(ask, samples))

  # A thread that hangs must not keep the process from ending.
  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  thread.join(seconds)
  configs.check(
    bool(results),
    f'the reward {name!r} must answer within {seconds:g} s',
    f'no answer for {len(samples)} samples, {_named(samples, first, 0)} the first',
    'mend it, or raise reward_seconds',
  )
  answer = results[0]
  if isinstance(answer, _Raised):
    error = answer.error
    place = traceback.extract_tb(error.__traceback__)[-1]
    whose = f'one of {len(samples)} samples'
    if answer.sample is not None:
      whose = _named(samples, first, answer.sample)
    raise configs.UserError(
      f'the reward {name!r} must return numbers, got {type(error).__name__}: {error} '
      f'({place.filename} line {place.lineno}) for {whose}; mend it.'
    ) from error
  return answer


class _Raised(NamedTuple):
  """What a function has raised, and at which sample by itself; None for none."""

  error: BaseException
  sample: int | None


def _first_to_raise(
  ask: Callable[[Sequence[Sample]], Any], samples: Sequence[Sample]
) -> int | None:
  for i, sample in enumerate(samples):
    try:
      ask([sample])
    except BaseException:
      return i
  return None


def _named(samples: Sequence[Sample], first: int, i: int) -> str:
  sample = samples[i]
  return f'sample {first + i} ({sample.prompt!r:.60} -> {sample.answer!r:.60})'


class RewardModel:
  """A checkpoint of `glm_jax.recipes.reward`, of any size, on the mesh of a run."""

  def __init__(
    self,
    path: str,
    model: Any,
    vocabulary: Vocabulary,
    compute: ComputeConfig,
    layout: Any,
    rows: int,
    length: int,
  ):
    """
    Args:
      path: a MODEL_DIR or a checkpoint.
      model: the configuration of the model whose answers are judged.
      vocabulary: of that model.
      compute: of the run; its dtype is what counts here.
      layout: of the devices.
      rows: that are worked on at a time.
      length: positions of the longest row.

    Raises:
      UserError: no reward model, one that reads otherwise, or that does not fit the mesh.
    """
    stored = opening.find(path)
    value_D = stored.value()
    configs.check(
      value_D is not None,
      'a reward model must be one (gin_configs/runs/reward.gin)',
      path,
      'give the MODEL_DIR of a run that has trained one',
    )
    fingerprint = stored.vocabulary.fingerprint
    configs.check(
      fingerprint == vocabulary.fingerprint,
      "a reward model must have the policy's vocabulary",
      f'{fingerprint} in {path}, {vocabulary.fingerprint} here',
      'train one that begins with the same model, or another of its vocabulary',
    )
    configs.check(
      (stored.config.causal, stored.config.two_positions)
      == (model.causal, model.two_positions),
      'a reward model must read rows as the policy does',
      f'{type(stored.config).__name__} for {type(model).__name__}',
      'use one of the same family',
    )
    configs.check(
      length <= stored.config.max_positions + 1,
      'a reward model must have the positions of a question and its answer',
      f'max_positions={stored.config.max_positions} in {path}, rows of {length}',
      'shorten TASK_FEATURE_LENGTHS',
    )
    sharding.check_fits(stored.config, rows, 1, length, layout)
    self._config, self._vocabulary = stored.config, vocabulary
    self.fingerprint = stored.fingerprint()
    compute = ComputeConfig(dtype=compute.dtype)
    self._value_D = np.asarray(value_D)
    self._forward = Forward(
      stored.config, stored.read(layout), compute, layout, batch_size=rows
    )

  def __call__(self, samples: Sequence[Sample]) -> np.ndarray:
    """[n] float32: of the token that ends each answer, or of its last one."""
    made = []
    for sample in samples:
      row = scoring.lay_out(self._config, self._vocabulary, sample.request, [sample.ids])
      made.append(row)
    pad = self._vocabulary.specials.pad
    values = self._forward.values(scoring.batch(made, 'answer', pad), self._value_D)
    return values[np.arange(len(made)), [len(row.tokens) - 1 for row in made]]
