"""A run that is started again: whether it is the same one, and what is left of it."""

from __future__ import annotations

from typing import Any

from glm_jax import checkpoints, leaving
from glm_jax.checkpoints import folder
from glm_jax.models import config as model_config
from glm_jax.training import adapters, report
from glm_jax.training.config import TrainConfig
from glm_jax.training.stopping import Stopping


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


def check_unchanged(config: TrainConfig, saved_step: int | None) -> None:
  """Raises leaving.Again if somebody has trained on until the folder was this process's.

  Args:
    config: of the run.
    saved_step: that its folder was at before.
  """
  now = checkpoints.latest_step(config.model_dir)
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
