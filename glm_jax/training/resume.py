"""A run that is started again: whether it is the same one, and what is left of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from glm_jax import checkpoints, distributed, leaving
from glm_jax.checkpoints import folder, manager, steps
from glm_jax.checkpoints.damage import Damaged
from glm_jax.configs import UserError
from glm_jax.models import config as model_config
from glm_jax.training import adapters, report
from glm_jax.training.config import TrainConfig
from glm_jax.training.stopping import Stopping

_NONE, _REFUSED = -1, -2


def chosen(model_dir: str, wanted: int | None = None) -> int | None:
  """`steps.chosen`, as process 0 sees it: it is the same in all of them.

  Raises:
    UserError: in all of them, too.
  """
  step, refusal = _REFUSED, None
  if distributed.is_leader():
    try:
      step = steps.chosen(model_dir, wanted)
      step = _NONE if step is None else step
    except UserError as error:
      refusal = error
  step = _of_leader(step)
  if step == _REFUSED:
    raise refusal or UserError('the checkpoints of MODEL_DIR are refused by process 0.')
  return None if step == _NONE else step


def _of_leader(number: int) -> int:
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


class Restored(NamedTuple):
  """Where a run goes on.

  Attributes:
    step: of the checkpoint; None for a new run.
    state: of training; None for a new run.
    meta: the checkpoint's description; {} for a new run.
    stream: of the run's batches, as it was.
  """

  step: int | None
  state: Any
  meta: dict[str, Any]
  stream: Any


def restored(
  model_dir: str,
  step: int | None,
  abstract: Any,
  stream: Callable[[int], Any],
  say: Callable[..., None],
  wanted: int | None = None,
) -> Restored:
  """The state of the newest undamaged checkpoint; what is no such is set aside.

  Args:
    model_dir: of the run.
    step: see `chosen`: where to begin with.
    abstract: the state's shapes, dtypes and shardings.
    stream: gives the stream of a run at a step.
    say: prints, on the leader.
    wanted: a step that was asked for: no other is taken.

  Raises:
    UserError: none of them is undamaged; then nothing is set aside.
  """
  where = epath.Path(model_dir) / steps.FOLDER
  reasons, result = {}, Restored(None, None, {}, None)
  while step is not None:
    batches = stream(step)
    try:
      current = manager.restore(where / str(step), abstract, batches)
      meta = checkpoints.read_meta(where / str(step))
      result = Restored(step, current, meta, batches)
      break
    except Damaged as error:
      reasons[step] = error.reason
      if wanted is not None:
        raise
    step = _of_leader(_before(where, step) if distributed.is_leader() else 0)
    if step == _NONE:
      raise steps.none_left(where, reasons)
  if distributed.is_leader():
    before = dict(steps.readable(where))
    newer = {}
    if wanted is not None:
      newer = {n: f'--restore_step={wanted} goes back' for n in before if n > wanted}
    # What was found damaged on the way says more than what its description does.
    reasons = {n: why for n, why in before.items() if why} | newer | reasons
    kept = [n for n in before if n not in reasons]
    for line in steps.set_aside(where, kept, reasons):
      say(line)
  distributed.barrier('set aside')
  return result if step is not None else result._replace(stream=stream(0))


def _before(where: epath.Path, step: int) -> int:
  found = (n for n, why in steps.readable(where) if n < step and not why)
  return next(found, _NONE)


def nothing_left(config: TrainConfig, saved_step: int | None, stop: Stopping) -> str:
  """Why a run that is started again has nothing to do; '' if it has.

  Args:
    config: of the run.
    saved_step: of its newest checkpoint; None if there is none.
    stop: as that checkpoint has it.
  """
  if saved_step is None:
    return ''
  # One that was killed before it had reported goes on to its report.
  reported = report.is_reported(config.model_dir, saved_step)
  if saved_step > config.train_steps or (saved_step == config.train_steps and reported):
    return (
      f'{config.model_dir} is at step {saved_step}, and TRAIN_STEPS={config.train_steps}: '
      'nothing is left to train; raise TRAIN_STEPS or TRAIN_EPOCHS to go on'
    )
  if stop.over and reported:
    return (
      f'{config.model_dir} has stopped early at step {saved_step}: {stop.in_words()}; '
      f'raise EvaluationConfig.patience={config.evaluation.patience}, or set it to 0, to '
      'go on'
    )
  return ''


def check_unchanged(
  config: TrainConfig, saved_step: int | None, wanted: int | None
) -> None:
  """Raises leaving.Again if somebody has trained on until the folder was this process's.

  Args:
    config: of the run.
    saved_step: that its folder was at before.
    wanted: see `chosen`.
  """
  now = steps.chosen(config.model_dir, wanted)
  if now != saved_step:
    raise leaving.Again(
      f'{config.model_dir} has come from step {saved_step} to {now} while this process '
      'started; the same command goes on'
    )


def identity(config: TrainConfig, data: Any, base: dict[str, str] | None) -> dict[str, Any]:
  """What makes a run the same run: see `folder.identity`.

  Args:
    config: of the run.
    data: its `recipe.Data`.
    base: see `start.Base.describe`; None if all parameters are trained.
  """
  trained = {'trained': config.trained, 'base': base} if base else {}
  if config.adapters is not None:
    trained['adapters'] = adapters.to_dict(config.adapters)
  if config.recipe.reference:
    began = checkpoints.find(config.init_from)
    trained['reference'] = checkpoints.describe(began)
  return folder.identity(
    model_config.to_dict(config.model),
    data.vocabulary.fingerprint,
    batch_size=config.batch_size,
    seed=config.seed,
    recipe=type(config.recipe).__name__,
    data={**data.identity, **trained},
  )
