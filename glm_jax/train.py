"""Trains a model: one story, from the mesh to the last report.

The phases, in order: mesh, data, model and state (restored, started from another
checkpoint, or fresh), steps, reports. Resuming is the default: the same command goes on
where the run in MODEL_DIR stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import jax

from glm_jax import checkpoints, cli, configs, distributed, sharding, startup, storage
from glm_jax.checkpoints import Checkpoints, folder
from glm_jax.models import config as model_config
from glm_jax.training import evaluation, metrics, optimizer, program, report, start, state
from glm_jax.training.config import TrainConfig
from glm_jax.training.meter import Meter, progress_line
from glm_jax.training.trained import merge
from glm_jax.training.writer import Writer


def train(
  config: TrainConfig, config_text: str, telling: startup.Telling | None = None
) -> None:
  """Trains to `train_steps`, from wherever the run stands.

  Args:
    config: the run.
    config_text: its operative gin configuration, kept beside the checkpoints.
    telling: is told what goes on until the first step; None if nobody listens.

  Raises:
    UserError: something in the configuration or the data that a user can mend.
    FloatingPointError: the loss or the gradient's norm is no longer finite; nothing is
      saved from that step on.
  """
  began = time.perf_counter()
  say = print if distributed.is_leader() else lambda *_, **__: None
  telling = telling or startup.Telling('')
  telling.quiet = not distributed.is_leader()

  storage.check_can_save(config.model_dir)
  # The model may stand in another checkpoint.
  config, vocabulary, source = start.resolve(config)
  recipe = config.recipe

  # Mesh.
  layout = sharding.make_mesh(config.mesh)
  built = program.build(config, layout)
  # The optimizer has the same schedule inside; this one is for the log.
  rate = optimizer.schedule(config.optimizer, config.train_steps)
  for line in optimizer.in_words(config.optimizer, config.train_steps):
    say(line)

  # Data. The leader goes first, so that the others find its caches.
  telling('preparing data: TensorFlow, the text, its vocabulary')
  # TensorFlow writes to stderr as it is imported, and only data needs it.
  with startup.silenced_stderr(), distributed.leader_first():
    data = recipe.prepare(config, vocabulary, layout)
  distributed.check_equal(
    'vocabulary and rows', f'{data.vocabulary.fingerprint} {data.fingerprint}'
  )
  recipe.check_data(config, data)

  # The folder: a new one, or this run's. What is not trained stays in its base.
  base = start.base_of(config)
  identity = folder.identity(
    model_config.to_dict(config.model),
    data.vocabulary.fingerprint,
    batch_size=config.batch_size,
    seed=config.seed,
    recipe=type(recipe).__name__,
    data={**data.identity, **({'trained': config.trained, 'base': base} if base else {})},
  )
  settings = start.settings(config)
  changes = folder.check_same(config.model_dir, identity, settings)

  # Model and state: fresh, with another's parameters, or of this run. The folder is
  # written once nothing else can be refused.
  saved_step = checkpoints.latest_step(config.model_dir)
  run = storage.Folder(config.model_dir)
  # One that was killed before it had reported goes on to its report.
  reported = saved_step == config.train_steps and run.read('summary.json') is not None
  if saved_step is not None and (reported or saved_step > config.train_steps):
    say(
      f'{config.model_dir} is at step {saved_step}, and TRAIN_STEPS={config.train_steps}: '
      'nothing is left to train; raise TRAIN_STEPS to go on'
    )
    return
  for line in start.in_words(changes):
    say(line)
  telling('reading or initialising parameters')
  if saved_step is None:
    current = start.begin(config, built, layout, data.vocabulary.fingerprint)
    if config.init_from:
      say(f'parameters from {config.init_from}')
    # Traced, so that a mistake in the loss leaves no folder behind.
    with sharding.active(layout):
      whole = merge(built.state['params'], built.frozen)
      jax.eval_shape(built.eval_step, whole, built.batch)
  frozen = start.frozen(config, built)
  # A process that refuses must do so before the leader claims the folder.
  distributed.barrier('checked')
  if distributed.is_leader():
    folder.write(config.model_dir, identity, settings, config_text, data.decided)
  manager = Checkpoints(config.model_dir, config.checkpoint)
  stream = data.stream(saved_step or 0)
  if saved_step is not None:
    current = manager.restore(saved_step, built.state, stream)
    say(f'resumed {config.model_dir} at step {saved_step}')
  first = int(current['step'])
  backend, why = built.attention
  count = state.count(current['params'])
  of_all = f' of {count + state.count(frozen):,}' if config.trained else ''
  say(
    f'{count:,}{of_all} parameters on {layout.size} '
    f'{layout.device_kind} device(s), mesh {layout.shape}; {config.batch_size} x '
    f'{recipe.length} positions a step; attention: {backend} ({why})'
  )
  if distributed.is_leader():
    for line in data.describe(first):
      say(line)

  # Steps. Each waits for the one before it, while the next is being computed.
  meta = {
    'model': model_config.to_dict(config.model),
    'run': identity,
    'vocabulary': data.vocabulary.to_dict(),
    'config': config_text,
    'source': source,
    'base': base,
  }
  writer = Writer(config.model_dir, distributed.is_leader())
  telling('compiling the first step, which waits for its batch')
  with sharding.active(layout):
    validate = evaluation.Validation(data.validation, built.eval_step, layout)
    meter = Meter(first, config.train_steps)
    # Metrics of the latest steps, still being computed: to look at one is to wait for it.
    waiting: list[Any] = []
    # Sums since the last progress line.
    since: dict[str, Any] = {}
    validated: dict[str, float] = {}
    for number in range(first + 1, config.train_steps + 1):
      work = meter.wait_for(stream, current, waiting)
      meter.count(work.tokens, work.flops)
      # Returns at once. The state before is donated: `current` is the only one.
      current, step_metrics = built.train_step(current, frozen, work.batch)
      waiting.append(step_metrics)
      last = number == config.train_steps
      saves = last or number % config.checkpoint.every == 0
      validates = last or number % config.evaluation.every == 0
      logs = last or number % config.log_every == 0 or number == first + 1
      # One step is left running, unless its state is about to be used: nothing is saved or
      # reported whose loss has not been looked at.
      while len(waiting) > (0 if saves or validates or logs else 1):
        since = metrics.add(since, jax.device_get(waiting.pop(0)))
        _check_finite(since, number - len(waiting), config.model_dir)
      if logs:
        values = {
          **metrics.averages(since),
          'learning_rate': float(rate(number - 1)),
          **meter.report(number),
        }
        telling.stop()
        if number == first + 1:  # its time is that of the compiler
          values = {k: v for k, v in values.items() if k in metrics.averages(since)}
          say(f'first step after {time.perf_counter() - began:.0f} s')
        say(progress_line(number, config.train_steps, values), flush=True)
        writer.write(number, 'train', values)
        since = {}
      # Validation and saving do not count as training time.
      meter.stop()
      if validates:
        whole = merge(current['params'], frozen)
        validated = {**validate(whole), **recipe.validate(config, data, whole)}
        writer.write(number, 'validation', validated)
        say(evaluation.line(validated, bool(data.validation)), flush=True)
      if saves:
        # An older validation says nothing of this checkpoint.
        scores = validated if validates else {}
        manager.save(current, {**meta, 'step': number}, scores, stream)
      meter.restart()
    manager.close()

    # Reports; again if the run was complete but killed before it had reported.
    telling.stop()
    if first < config.train_steps or not reported:
      report.report(config, data, merge(current['params'], frozen), say)
  writer.close()
  distributed.barrier('done')
  say(
    f'done: {config.train_steps} steps in {config.model_dir} '
    f'({time.perf_counter() - began:.0f} s)'
  )


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = cli.parse(_flags(), argv)
  startup.use_cpu_devices(flags.cpu_devices)
  # Who leads is known by all once they have met.
  quiet = flags.multiprocess or bool(flags.process_index)
  with startup.Telling('reading the configuration', quiet=quiet) as telling:
    config, text = cli.configuration(flags)
    telling('waiting for the other processes')
    distributed.initialize(
      distributed.Processes(
        multiprocess=flags.multiprocess,
        coordinator_address=flags.coordinator_address,
        process_count=flags.process_count,
        process_index=flags.process_index,
      )
    )
    telling('starting the devices')
    startup.find_devices()
    train(config, text, telling)


def _check_finite(since: dict[str, Any], number: int, model_dir: str) -> None:
  for name in ('loss', 'gradient_norm'):
    configs.check_finite(
      since[name][0],
      f'the {name.replace("_", " ")} at step {number}',
      f'the last checkpoint in {model_dir} is from before; lower the learning rate or '
      'lengthen the warm-up, and start again',
    )


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'train',
    'Trains a model; run again, it goes on where it stopped.',
    'python -m glm_jax.train --gin_file=gin_configs/quickstart.gin '
    '--gin.MODEL_DIR="\'runs/a\'" --gin.TRAIN_STEPS=100',
  )
  cli.add_gin_flags(flags)
  cli.add_process_flags(flags)
  return flags


if __name__ == '__main__':
  cli.main(main)
