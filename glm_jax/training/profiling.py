"""A trace of some steps of a run, for TensorBoard and for Perfetto."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from glm_jax import configs, distributed, storage


def parse(text: str) -> tuple[int, int] | None:
  """The first and the last step of START:STOP; None for ''.

  Raises:
    UserError: it is something else.

  Example:
    >>> parse('10:12')
    (10, 12)
  """
  if not text:
    return None
  match = re.fullmatch(r'(\d{1,12}):(\d{1,12})', text)
  configs.check(
    match is not None and 1 <= int(match[1]) <= int(match[2]),
    '--profile must be START:STOP, the first and the last step, from 1 on',
    repr(text),
    'write it such as --profile=10:12',
  )
  return int(match[1]), int(match[2])


class Profile:
  """As a context, it is written whatever ends the run."""

  def __init__(
    self, steps: tuple[int, int] | None, model_dir: str, say: Callable[..., None]
  ):
    """
    Args:
      steps: the first and the last; None for no profile.
      model_dir: of the run.
      say: prints, on the leader.

    Raises:
      UserError: a run in a bucket, where JAX cannot write a profile.
    """
    configs.check(
      steps is None or not storage.is_remote(model_dir),
      '--profile must be of a run in a folder of this machine',
      f'MODEL_DIR={model_dir!r}',
      'profile some steps of the same configuration in another MODEL_DIR',
    )
    self._steps, self._model_dir, self._say = steps, model_dir, say
    # All processes refuse alike; the leader alone writes.
    self._leads = distributed.is_leader()
    self._traced: list[int] = []
    self._running = False

  def check(self, train_steps: int | None, saved_step: int | None) -> None:
    """Raises UserError for steps that the run has not.

    Args:
      train_steps: of the whole run; None if the data will say.
      saved_step: that the run goes on from; None for a new one.
    """
    if self._steps is None:
      return
    start, stop = self._steps
    configs.check(
      train_steps is None or stop <= train_steps,
      f'--profile must be of steps of the run, which has {train_steps}',
      f'{start}:{stop}',
      'choose earlier steps',
    )
    configs.check(
      saved_step is None or stop > saved_step,
      f'--profile must be of steps that are still to come, behind step {saved_step}',
      f'{start}:{stop}',
      'choose later steps',
    )

  def step(self, number: int) -> Any:
    """A context for a step; the trace begins with the first."""
    wanted = self._steps is not None and self._steps[0] <= number <= self._steps[1]
    if wanted and self._leads and not self._traced:
      options = jax.profiler.ProfileOptions()
      # Functions of Python would be most of the events, and slow the steps down.
      options.python_tracer_level = 0
      jax.profiler.start_trace(
        # TensorBoard shows what is below `plugins` beside the events of the run.
        f'{self._model_dir}/tensorboard',
        create_perfetto_trace=True,
        profiler_options=options,
      )
      self._running = True
    if self._running:
      self._traced.append(number)
    return jax.profiler.StepTraceAnnotation('train', step_num=number)

  def is_bound(self, number: int) -> bool:
    """Whether a step must be over before the next begins: no other is in the trace."""
    return self._steps is not None and number in (self._steps[0] - 1, self._steps[1])

  def ended(self, number: int) -> None:
    """Writes the trace behind its last step, and says where."""
    if self._running and number == self._steps[1]:
      self._write()

  def _write(self) -> None:
    self._running = False
    jax.profiler.stop_trace()
    profiles = Path(self._model_dir) / 'tensorboard' / 'plugins' / 'profile'
    folder = max(profiles.iterdir())  # they are named by their time
    self._say(
      f'profile of steps {self._traced[0]} to {self._traced[-1]}: open '
      f'{folder}/perfetto_trace.json.gz in https://ui.perfetto.dev, or see PROFILE in '
      f'tensorboard --logdir {self._model_dir} (pip install xprof)'
    )

  def __enter__(self) -> Profile:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if self._running:
      self._write()
    elif error is None and self._steps and self._leads and not self._traced:
      self._say(f'no profile: the run ended before step {self._steps[0]}')
