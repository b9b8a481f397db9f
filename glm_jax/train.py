"""Trains a model: one story, from the mesh to the last report.

The phases, in order: mesh, data, model and state (restored, started from another
checkpoint, or fresh), steps, reports. Resuming is the default: the same command goes on
where the run in MODEL_DIR stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from glm_jax import (
  cli,
  configs,
  distributed,
  joining,
  ownership,
  peers,
  sharding,
  startup,
  storage,
)
from glm_jax.checkpoints import Checkpoints, folder, steps
from glm_jax.models import config as model_config
from glm_jax.training import (
  adapters,
  evaluation,
  goodput,
  guard,
  metrics,
  optimizer,
  profiling,
  program,
  report,
  resume,
  signals,
  start,
  state,
)
from glm_jax.training.config import TrainConfig
from glm_jax.training.meter import Meter, progress_line
from glm_jax.training.stopping import Stopping
from glm_jax.training.writer import Writer, note_step


def train(
  config: TrainConfig,
  config_text: str,
  telling: startup.Telling | None = None,
  profiled: tuple[int, int] | None = None,
  restore_step: int | None = None,
  stops: signals.Signals | None = None,
) -> None:
  """Trains to `train_steps`, from wherever the run stands.

  Args:
    config: the run.
    config_text: its operative gin configuration, kept beside the checkpoints.
    telling: is told what goes on until the first step; None if nobody listens.
    profiled: the first and the last step of a profile; None for none.
    restore_step: a checkpoint to go back to; None for the newest undamaged one.
    stops: hears what is to stop the run; None if nobody sends it.

  Raises:
    leaving.Again: a signal has stopped the run, and what it has learnt is saved.
    UserError: something in the configuration or the data that a user can mend.
    FloatingPointError: the loss or the gradient's norm is no longer finite; nothing is
      saved from that step on.
  """
  say = print if distributed.is_leader() else lambda *_, **__: None
  telling = telling or startup.Telling('')
  telling.quiet = not distributed.is_leader()
  with ownership.Owner(config.model_dir, say) as owner:
    stops = stops or signals.Signals()
    _train(config, config_text, telling, profiled, restore_step, stops, say, owner)


def _train(
  config: TrainConfig,
  config_text: str,
  telling: startup.Telling,
  profiled: tuple[int, int] | None,
  restore_step: int | None,
  stops: signals.Signals,
  say: Callable[..., None],
  owner: ownership.Owner,
) -> None:
  """The story; see `train`."""
  began = time.perf_counter()
  profile = profiling.Profile(profiled, config.model_dir, say)
  storage.check_can_save(config.model_dir)
  if distributed.is_leader():
    owner.look()  # long before it is taken: nobody waits for data to be refused
  kept = storage.Folder(config.model_dir) if distributed.is_leader() else None
  clock = goodput.Clock(kept, began=startup.process_began())
  saved_step = resume.chosen(config.model_dir, restore_step)
  profile.check(config.train_steps, saved_step)
  # The model may stand in another checkpoint.
  config, vocabulary, source = start.resolve(config)
  recipe, base = config.recipe, start.find_base(config)
  quantized = base and base.quantized

  # Mesh and program: what does not fit is refused before any data are read.
  layout = sharding.make_mesh(config.mesh)
  built = program.build(config, layout, quantized)

  # Data. The leader goes first, so that the others find its caches.
  telling('preparing data: TensorFlow, the text, its vocabulary')
  # TensorFlow writes to stderr as it is imported, and only data needs it. But what JAX says
  # of a process that is lost meanwhile, it says there, too.
  alone = jax.process_count() == 1
  hidden = startup.silenced_stderr() if alone else contextlib.nullcontext()
  with hidden, distributed.leader_first():
    data = recipe.prepare(config, vocabulary, layout)
  distributed.check_equal(
    'vocabulary and rows',
    {'vocabulary': data.vocabulary.fingerprint, 'rows': data.fingerprint},
    'use one CorpusConfig.cache_dir, or files that are the same everywhere',
  )
  recipe.check_data(config, data)
  adapters.check_data(config.adapters, data.decided)
  if config.train_epochs:  # from here on, they are steps
    config = start.in_steps(config, data, say)
    profile.check(config.train_steps, saved_step)
    built = program.build(config, layout, quantized)
  # The optimizer has the same schedule inside; this one is for the log.
  rate = optimizer.schedule(config.optimizer, config.train_steps)
  for line in optimizer.in_words(config.optimizer, config.train_steps):
    say(line)

  # The folder: a new one, or this run's. What is not trained stays in its base.
  pinned = base and base.describe()
  identity, settings = resume.identity(config, data, pinned), start.settings(config)
  distributed.check_equal(
    'run',
    {**identity, 'step': saved_step},
    'let all see the same MODEL_DIR and the same files',
  )
  changes = folder.check_same(config.model_dir, identity, settings)

  # Model and state: fresh, with another's parameters, or of this run. The folder is
  # written once nothing else can be refused.
  new = saved_step is None
  saved = {} if new else steps.read(config.model_dir, saved_step)
  stop = Stopping(config, saved.get('stopping'))
  if words := resume.nothing_left(config, saved_step, stop):
    return say(words)
  for line in start.in_words(changes):
    say(line)
  telling('reading or initialising parameters')
  if new:
    current = start.begin(config, built, layout, data.vocabulary.fingerprint, base)
    if config.init_from:
      say(f'parameters from {config.init_from}')
    # Traced, so that a mistake in the loss leaves no folder behind.
    evaluation.check(config, data, built, layout)
  frozen = start.frozen(
    config, built, layout, data.vocabulary.fingerprint, base, current if new else None
  )
  # A process that refuses must do so before the leader claims the folder.
  distributed.barrier('checked')
  if distributed.is_leader():
    owner.take()
    resume.check_unchanged(config, saved_step, restore_step)
  # Where the run goes on, as far back as a checkpoint is undamaged: what is not is set
  # aside, by the owner of the folder alone.
  with clock.doing('start' if new else 'restore'):
    going = resume.restored(
      config.model_dir, saved_step, built.state, data.stream, say, restore_step
    )
  if not new:
    current = state.complete(going.state, built.state)
    saved_step, saved = going.step, going.meta
    stop = Stopping(config, saved.get('stopping'))
  if distributed.is_leader():
    folder.write(config.model_dir, identity, settings, config_text, data.decided)
  first = int(current['step'])
  clock.begins(first)
  clock.write(first)  # an attempt that ends before its first step is one, too
  manager = Checkpoints(config.model_dir, config.checkpoint)
  stream = going.stream
  stream.variables = lambda state: built.variables(state['params'], frozen)
  if not new:
    say(f'resumed {config.model_dir} at step {saved_step}')
  say(program.in_words(built, config, layout))

  # Steps. Each waits for the one before it, while the next is being computed.
  meta = {
    'model': model_config.to_dict(config.model),
    'run': identity,
    'vocabulary': data.vocabulary.to_dict(),
    'config': config_text,
    'source': source,
    'base': pinned,
    **({'quantized': quantized} if quantized else {}),
    **({'adapters': identity['adapters']} if config.adapters else {}),
  }
  writer = contextlib.closing(Writer(config.model_dir, distributed.is_leader()))
  with writer as writer, sharding.active(layout), profile:
    measure = evaluation.Validation(
      data.validation, built.eval_step, layout, data.validated_rows, recipe.told
    )

    def save(number: int, scores: dict[str, float]) -> None:
      progress = {'step': number, 'so_far': meter.so_far, 'stopping': stop.state}
      with clock.doing('save'):
        manager.save(current, {**meta, **progress}, scores, stream)
      clock.write(number)

    def look(number: int, leave: int) -> None:
      try:
        results.wait(leave)
      except guard.TooManyLeftOut as error:
        if error.sound:
          save(number, {})
        manager.close()
        raise

    @contextlib.contextmanager
    def keeping(number: int) -> Iterator[None]:
      # Such as of a reward: what was learnt until then is kept.
      try:
        yield
      except configs.UserError:
        if number > max(first, saved_step or 0):
          results.wait(0)
          save(number, {})
        manager.close()
        raise

    def validate(number: int) -> dict[str, float]:
      whole = built.variables(current['params'], frozen)
      with keeping(number), clock.doing('evaluate'):
        values = measure(whole) | recipe.validate(config, data, whole)
      writer.write(number, 'validation', values)
      say(evaluation.line(values, bool(data.validation)), flush=True)
      stop.see(number, values)
      return values

    if config.evaluation.at_start and first == 0:
      telling('validating what the run begins with')
      validate(0)
    telling('compiling the first step, which waits for its batch')
    note_step(first)
    clock.to('compile')
    so_far = saved.get('so_far', None if new else {})
    meter = Meter(first, config.train_steps, so_far, clock.waited)
    watch = guard.Watch(config.guard, config.batch_size, say, config.model_dir)
    results = metrics.Results(config.model_dir, recipe.told, watch.see)
    # A run that has stopped early, and was killed before its report, is only reported.
    for number in range(first + 1, config.train_steps + 1 if not stop.over else 0):
      with profile.step(number):
        with keeping(number - 1):
          work = meter.wait_for(stream, current, results.running)
        stops.ask(layout.mesh)
        # Either returns at once. The state before is donated: `current` is the only one.
        if config.skips(number):
          current, step_metrics = state.skip(current), {}
        else:
          meter.count(work.tokens, work.flops)
          current, step_metrics = built.train_step(current, frozen, work.batch)
      results.add(number, step_metrics)
      last = number == config.train_steps
      saves = last or number % config.checkpoint.every == 0
      validates = last or number % config.evaluation.every == 0
      logs = last or number % config.log_every == 0 or number == first + 1
      # One step is left running, unless its state is about to be used: nothing is saved or
      # reported whose loss has not been looked at.
      waits = saves or validates or logs or profile.is_bound(number)
      look(number, 0 if waits else 1)
      note_step(number)
      stops.holding = True
      leaves = stops.agreed(number)
      if logs:
        values = {**results.take(), **meter.taken(), **watch.taken()}
        telling.stop()
        if number == first + 1:  # its time is that of the compiler
          say(f'first step after {time.perf_counter() - began:.0f} s')
          clock.to(goodput.STEPS)
          meter.report(number)
        else:
          # The optimizer counts the updates that it has made.
          current_rate = float(rate(number - 1 - watch.skipped))
          values |= {'learning_rate': current_rate, **meter.report(number)}
          values['goodput'] = clock.write(number).get(goodput.STEPS, 0.0)
        say(progress_line(number, config.train_steps, values), flush=True)
        writer.write(number, 'train', values)
      # Validation, saving and writing a profile do not count as training time.
      meter.stop()
      profile.ended(number)
      # Counted over many batches, for which the first step does not wait.
      if number == first + 1 and distributed.is_leader():
        for line in data.describe(first, config.train_steps):
          say(line)
      # An older validation says nothing of this checkpoint.
      scores = validate(number) if validates else {}
      if saves or stop.over or leaves:
        look(number, 0)
        save(number, scores)
        saved_step = number
      if stop.over:
        say(f'stopped early at step {number}: {stop.in_words()}')
      if stop.over or leaves:
        break
      meter.restart()
    clock.to('save')
    manager.close()
    distributed.barrier('saved')  # whoever leaves now leaves nobody behind in a save
    stops.release(int(current['step']))

    # Reports; again if the run was complete but killed before it had reported.
    telling.stop()
    clock.to('evaluate')
    ended, whole = int(current['step']), built.variables(current['params'], frozen)
    report.report(config, data, whole, say, step=ended, so_far=meter.so_far, clock=clock)
  distributed.barrier('done')
  say(f'done: {ended} steps in {config.model_dir} ({time.perf_counter() - began:.0f} s)')


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = cli.parse(_flags(), argv)
  profiled = profiling.parse(flags.profile)
  startup.use_cpu_devices(flags.cpu_devices)
  # Who leads is known by all once they have met.
  quiet = flags.multiprocess or bool(flags.process_index)
  with (
    signals.Signals(flags.grace_seconds) as stops,
    startup.Telling('reading the configuration', quiet=quiet) as telling,
  ):
    config, text = cli.configuration(flags)
    telling('waiting for the other processes')
    about = {'configuration': text, **joining.code(flags.imports)}
    distributed.initialize(distributed.Processes.of(flags), about)
    stops.listen()
    with peers.together(cli.explain):
      telling('starting the devices')
      startup.find_devices()
      distributed.check_devices()
      train(config, text, telling, profiled, flags.restore_step, stops)


def _flags() -> argparse.ArgumentParser:
  flags = cli.parser(
    'train',
    'Trains a model; run again, it goes on where it stopped.',
    'python -m glm_jax.train --gin_file=gin_configs/quickstart.gin '
    '--gin.MODEL_DIR="\'runs/a\'" --gin.TRAIN_STEPS=100',
  )
  cli.add_gin_flags(flags)
  cli.add_process_flags(flags)
  flags.add_argument(
    '--profile',
    default='',
    metavar='START:STOP',
    help='trace these steps for TensorBoard and Perfetto; the first one compiles',
  )
  flags.add_argument(
    '--restore_step',
    type=int,
    metavar='N',
    help='go back to the checkpoint of step N; newer ones are set aside, not removed '
    '(by default, the newest undamaged one is taken)',
  )
  return flags


if __name__ == '__main__':
  startup.keep_memory()
  cli.main(main)
