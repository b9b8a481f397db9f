"""Trains a model: one story, from the mesh to the last report.

The phases, in order: mesh, data, model and state (restored, started from another
checkpoint, or fresh), steps, reports. Resuming is the default: the same command goes on
where the run in MODEL_DIR stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from glm_jax import checkpoints, cli, configs, distributed, sharding, startup
from glm_jax.checkpoints import Checkpoints, folder
from glm_jax.models import config as model_config
from glm_jax.training import evaluation, metrics, optimizer, program, report, start, state
from glm_jax.training.config import TrainConfig
from glm_jax.training.meter import Meter, progress_line, step_flops
from glm_jax.training.writer import Writer


def train(config: TrainConfig, config_text: str) -> None:
  """Trains to `train_steps`, from wherever the run stands.

  Args:
    config: the run.
    config_text: its operative gin configuration, kept beside the checkpoints.

  Raises:
    UserError: something in the configuration or the data that a user can mend.
    FloatingPointError: the loss or the gradient's norm is no longer finite; nothing is
      saved from that step on.
  """
  began = time.perf_counter()
  say = print if distributed.is_leader() else lambda *_, **__: None

  # The model may stand in another checkpoint.
  config, vocabulary, source = start.resolve(config)

  # Mesh.
  layout = sharding.make_mesh(config.mesh)
  built = program.build(config, layout)
  # The optimizer has the same schedule inside; this one is for the log.
  rate = optimizer.schedule(config.optimizer, config.train_steps)

  # Data. The leader goes first, so that the others find its caches.
  # TensorFlow writes to stderr as it is imported, and only data needs it.
  with startup.silenced_stderr():
    from glm_jax.data import pipeline, prepare, shares
  index, count = sharding.row_share(layout)
  process = pipeline.Process(index=index, count=count)
  with distributed.leader_first():
    data = prepare.prepare(
      config.task,
      config.feature_lengths,
      config.corpus,
      config.vocabulary,
      config.objectives,
      vocabulary,
      mixture=config.mixture,
      evaluation=config.evaluation.objectives,
    )
  distributed.check_equal(
    'vocabulary and rows', f'{data.vocabulary.fingerprint} {data.fingerprint}'
  )
  length = config.length
  _check_sizes(config, data.vocabulary)
  prepare.check_batch(data, config.batch_size)
  prepare.verify(data, config.corpus, jax.process_index(), jax.process_count())

  # The folder: a new one, or this run's.
  identity = folder.identity(
    model_config.to_dict(config.model),
    data.vocabulary.fingerprint,
    task=config.task,
    feature_lengths=config.feature_lengths,
    batch_size=config.batch_size,
    seed=config.seed,
    objectives=config.objectives,
    data=data.fingerprint,
  )
  settings = {'optimizer': dataclasses.asdict(config.optimizer)}
  for change in folder.check_same(config.model_dir, identity, settings):
    say(f'from here on, {change}')

  # Model and state: fresh, with another's parameters, or of this run. The folder is
  # written once nothing else can be refused.
  saved_step = checkpoints.latest_step(config.model_dir)
  if saved_step is None:
    current = state.init_state(config.model, built.optimizer, layout, config.seed)
    if config.init_from:
      params = start.params_from(
        config.init_from, config.model, data.vocabulary.fingerprint, current['params']
      )
      current = state.with_params(current, params)
      say(f'parameters from {config.init_from}')
  # A process that refuses must do so before the leader claims the folder.
  distributed.barrier('checked')
  if distributed.is_leader():
    folder.write(config.model_dir, identity, settings, config_text)
  manager = Checkpoints(config.model_dir, config.checkpoint)
  stream = pipeline.Stream(
    config.task,
    config.feature_lengths,
    batch_size=config.batch_size,
    seed=config.seed,
    start_step=(saved_step or 0) if data.indexed else 0,
    process=process,
  )
  # A task of the user's keeps a place in its stream.
  keeps_place = {} if data.indexed else {'stream': stream}
  if saved_step is not None:
    current = manager.restore(saved_step, built.state, **keeps_place)
    say(f'resumed {config.model_dir} at step {saved_step}')
  first = int(current['step'])
  backend, why = built.attention
  say(
    f'{state.count(current["params"]):,} parameters on {layout.size} '
    f'{layout.device_kind} device(s), mesh {layout.shape}; '
    f'{config.batch_size} x {length} positions a step; attention: {backend} ({why})'
  )
  if data.corpora and distributed.is_leader():
    lines = shares.table(
      config.task,
      config.feature_lengths,
      data.corpora,
      batch_size=config.batch_size,
      seed=config.seed,
      step=first,
      train_steps=config.train_steps,
    )
    say('\n'.join(lines))

  # Steps. Each waits for the one before it, while the next is being computed.
  meta = {
    'model': model_config.to_dict(config.model),
    'run': identity,
    'vocabulary': data.vocabulary.to_dict(),
    'config': config_text,
    'source': source,
  }
  writer = Writer(config.model_dir, distributed.is_leader())
  with sharding.active(layout):
    validate = evaluation.Validation(
      config, data.evaluation_tasks, built.loss, layout, process
    )
    meter = Meter(first, config.train_steps)
    # Metrics of the latest steps, still being computed: to look at one is to wait for it.
    waiting: list[Any] = []
    # Sums since the last progress line.
    since: dict[str, Any] = {}
    validated: dict[str, float] = {}
    for number in range(first + 1, config.train_steps + 1):
      batch = meter.wait_for(stream, waiting)
      tokens, flops = _tokens(batch), step_flops(config.model, batch)
      meter.count(process.count * tokens, process.count * flops)
      # Returns at once. The state before is donated: `current` is the only one.
      current, step_metrics = built.train_step(
        current, sharding.place(batch._replace(index=None), layout)
      )
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
        if number == first + 1:  # its time is that of the compiler
          values = {k: v for k, v in values.items() if k in metrics.averages(since)}
          say(f'first step after {time.perf_counter() - began:.0f} s')
        say(progress_line(number, config.train_steps, values), flush=True)
        writer.write(number, 'train', values)
        since = {}
      # Validation and saving do not count as training time.
      meter.stop()
      if validates:
        validated = validate(current['params'])
        writer.write(number, 'validation', validated)
        say(evaluation.line(validated), flush=True)
      if saves:
        # An older validation says nothing of this checkpoint.
        scores = validated if validates else {}
        manager.save(current, {**meta, 'step': number}, scores, **keeps_place)
      meter.restart()
    manager.close()

    # Reports; again if the run was complete but killed before it had reported.
    if first < config.train_steps or not (Path(config.model_dir) / 'summary.json').exists():
      report.report(config, data, current['params'], say)
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
  config, text = cli.configuration(flags)
  distributed.initialize(
    distributed.Processes(
      multiprocess=flags.multiprocess,
      coordinator_address=flags.coordinator_address,
      process_count=flags.process_count,
      process_index=flags.process_index,
    )
  )
  startup.find_devices()
  train(config, text)


def _check_sizes(config: TrainConfig, vocabulary: Any) -> None:
  c = config.model
  name = type(c).__name__
  if config.task.startswith('glm_'):
    configs.check(
      c.causal == (config.task == 'glm_causal'),
      'MIXTURE_OR_TASK_NAME must be glm_causal for a causal model, and for no other',
      f'{config.task!r} for {name}',
      'use glm_causal with a causal model, and glm_mixture with any other',
    )
    configs.check(
      c.causal or c.two_positions == config.objectives.block_positions,
      "ObjectiveConfig.block_positions must be the model's two_positions",
      f'{config.objectives.block_positions} and {c.two_positions}',
      f'set ObjectiveConfig.block_positions = {c.two_positions}',
    )
  configs.check(
    vocabulary.size <= c.vocab_size,
    "the model's vocab_size must hold the vocabulary",
    f'vocab_size={c.vocab_size}, vocabulary of {vocabulary.size}',
    f'set {name}.vocab_size to {math.ceil(vocabulary.size / 128) * 128}',
  )
  # One more than the table's largest index, since positions begin at 0. A GLM row may be
  # longer than its text, whose spans repeat the positions of their masks.
  longest = config.length
  configs.check(
    longest <= c.max_positions + 1 or _row_length(config) <= c.max_positions + 1,
    "rows must fit the model's position table",
    f'rows of {longest} positions, max_positions={c.max_positions}',
    f'raise {name}.max_positions or shorten TASK_FEATURE_LENGTHS',
  )


def _row_length(config: TrainConfig) -> int:
  """Tokens of text in a row: no position is larger."""
  length = config.length
  # A packed row may hold one document alone.
  if config.corpus.packed or config.objectives.one_dimensional:
    return length
  return config.objectives.row_length(length)


def _tokens(batch: Any) -> float:
  # Padding has the empty interval [0, 0).
  return float((batch.key_end > 0).sum())


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
