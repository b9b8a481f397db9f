"""What one sees at the end: the recipe's report, a summary, a loss curve."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from glm_jax import configs, distributed, storage
from glm_jax.training import goodput, recipe, writer
from glm_jax.training.config import TrainConfig
from glm_jax.training.goodput import Clock

_SUMMARY = 'summary.json'


def is_reported(model_dir: str, step: int) -> bool:
  """Whether a run has had its report at that step, and not only at an earlier one."""
  try:
    summary = configs.parse_json(storage.Folder(model_dir).read(_SUMMARY) or '{}')
  except ValueError:
    return False  # a damaged one is written anew
  return isinstance(summary, dict) and summary.get('steps') == step


def report(
  config: TrainConfig,
  data: recipe.Data,
  variables: Mapping[str, Any],
  say: Callable[..., None],
  *,
  step: int,
  so_far: Mapping[str, float],
  clock: Clock,
) -> None:
  """Prints the recipe's report and writes summary.json and loss.png.

  Args:
    config: of the run.
    data: of the recipe.
    variables: the model's collections, on the mesh; all processes must take part.
    say: prints, on the leader.
    step: that the run has ended at, which may be an early one.
    so_far: see `Meter.so_far`.
    clock: of the run's time, which ends here.
  """
  config = dataclasses.replace(config, train_steps=step)
  leads = distributed.is_leader()
  validations = writer.read(config.model_dir, 'validation') if leads else []
  validated = validations[-1] if validations else {}
  reported = config.recipe.report(config, data, variables, validated, say)
  if not leads:
    return
  picture = writer.plot_losses(config.model_dir, reported.pop('lines', {}))
  shares = clock.write(step)
  spent = {'goodput': shares, 'restarts': clock.restarts}
  summary = {'steps': step, **so_far, **spent, 'validation': validated, **reported}
  text = json.dumps(summary, indent=2, ensure_ascii=False) + '\n'
  storage.Folder(config.model_dir).write(_SUMMARY, text.encode('utf-8'))
  say(f'\nloss curve in {picture}')
  say(goodput.line(shares, clock.restarts))
