"""Does `train` do on the card that is here what it does on a CPU, and survive being killed?

python -m benchmarks.train_on_card --write [--steps=1500]  # here, where TensorFlow is
python -m benchmarks.train_on_card                         # there, on the card

The first keeps the batches of glm_tiny.gin in a file, trains on them on the CPU and keeps
the losses. The second trains the same run on the card, twice: once undisturbed, once killed
after its first checkpoint and started again. It prints the losses beside the CPU's, and
whether the run that was killed ended with the same bits. On the card it needs what
benchmarks.step needs, and neither TensorFlow nor gin.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import readme
from glm_jax import checkpoints, cli, configs, sharding, train
from glm_jax.batch import Batch
from glm_jax.models import config as model_config
from glm_jax.text import loading
from glm_jax.training import losses, program, recipe, writer
from glm_jax.training.config import CheckpointConfig, EvaluationConfig, TrainConfig
from glm_jax.training.optimizer import OptimizerConfig

RESULTS = Path(__file__).parent / 'train_on_card'
# What --write leaves, to be carried to the card.
BATCHES = readme.ROOT / 'runs' / 'train_on_card'
GLM_TINY = readme.ROOT / 'gin_configs' / 'glm_tiny.gin'
# Losses that are compared: so many, spread over the run.
_POINTS = 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept(recipe.Recipe):
  """Batches from a file, one a step, with the loss of pretraining.

  Attributes:
    path: of a file that `keep` wrote.
    positions: T.
  """

  path: str
  positions: int

  @property
  def length(self) -> int:
    return self.positions

  def loss(self, config: TrainConfig, model: Any) -> losses.LossFn:
    return losses.pretraining_loss(model, losses.LossConfig())

  def prepare(self, config: TrainConfig, vocabulary: Any, layout: Any) -> KeptData:
    return KeptData(self, config, layout)


class KeptData(recipe.Data):
  """See `recipe.Data`; the vocabulary's pieces are not looked at."""

  def __init__(self, kept: Kept, config: TrainConfig, layout: sharding.Layout):
    """
    Args:
      kept: names the file.
      config: of the run.
      layout: of the devices.
    """
    with np.load(kept.path) as file:
      self._arrays = {name: file[name] for name in file.files}
    self.vocabulary = loading.load('bytes')
    self.fingerprint = hashlib.sha256(self._arrays['train/tokens'].data).hexdigest()
    self.identity = {'batches': self.fingerprint}
    self._config, self._layout = config, layout
    self.validation = {'held out': self._held_out}

  def _batch(self, split: str, number: int) -> Batch:
    fields = {name: self._arrays.get(f'{split}/{name}') for name in Batch._fields}
    return Batch(**{k: None if v is None else v[number] for k, v in fields.items()})

  def _held_out(self) -> Iterator[Batch]:
    count = len(self._arrays['validation/tokens'])
    return (self._batch('validation', number) for number in range(count))

  def stream(self, step: int) -> recipe.WorkStream:
    data = self

    class Stream(recipe.WorkStream):
      def __init__(self):
        self._next = step

      def __call__(self, current: Any) -> recipe.Work:
        batch = data._batch('train', self._next)
        self._next += 1
        tokens, flops = data._config.recipe.work(data._config, batch.visibility)
        return recipe.Work(sharding.place(batch, data._layout), tokens, flops)

    return Stream()


def keep(path: Path, batches: Sequence[Batch], validation: Sequence[Batch]) -> None:
  """Writes batches for `Kept`: arrays [steps, B, T] by split and field."""
  arrays = {
    f'{split}/{name}': np.stack([getattr(batch, name) for batch in rows])
    for split, rows in (('train', batches), ('validation', validation))
    for name in Batch._fields
    if name != 'index'
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  np.savez_compressed(path, **arrays)


def write(flags: argparse.Namespace) -> None:
  """Keeps the batches of glm_tiny.gin, and what training on them gives on this CPU."""
  given = cli.parser('train', '', '')
  cli.add_gin_flags(given)
  text = [f'--gin_file={GLM_TINY}', f'--gin.TRAIN_STEPS={flags.steps}']
  config, _ = cli.configuration(cli.parse(given, text))
  layout = sharding.make_mesh(config.mesh, jax.devices()[:1])
  data = config.recipe.prepare(config, None, layout)
  stream = data.stream(0)
  batches = [jax.device_get(stream(None).batch) for _ in range(flags.steps)]
  held_out = [batch for make in data.validation.values() for batch in make()]
  keep(flags.batches / 'batches.npz', batches, held_out)
  about = {
    'model': model_config.to_dict(config.model),
    'optimizer': dataclasses.asdict(config.optimizer),
    'batch_size': config.batch_size,
    'positions': config.recipe.length,
    'steps': flags.steps,
  }
  (flags.batches / 'run.json').write_text(json.dumps(about, indent=1) + '\n', 'utf-8')
  results = {'cpu': _run(flags, 'cpu')}
  (flags.batches / 'cpu.json').write_text(json.dumps(results) + '\n', 'utf-8')


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Trains undisturbed, and killed and resumed; neither holds the card meanwhile."""
  cpu = json.loads((flags.batches / 'cpu.json').read_text(encoding='utf-8'))['cpu']
  whole = _run(flags, 'whole')
  killed = _run(flags, 'killed', kill=True)
  results = {
    'device': whole['device'],
    'date': datetime.date.today().isoformat(),
    'jax': jax.__version__,
    'cpu': cpu,
    'card': whole,
    'killed_after': killed['killed_after'],
    # Losses are means since the line before, of which a run that is resumed has other ones.
    'same_bits': killed['parameters'] == whole['parameters'],
  }
  path = readme.path_of(flags.folder, results)
  path.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
  return results


def table(results: dict[str, Any]) -> list[str]:
  """Markdown lines of a comparison."""
  cpu, card = results['cpu'], results['card']
  same = 'the same bits' if results['same_bits'] else 'other bits'
  lines = [
    f'{results["device"]}, {results["date"]}; jax {results["jax"]}; glm_tiny.gin, '
    f'{card["steps"]:,} steps in {card["seconds"]:.0f} s; killed after a checkpoint (step '
    f'{results["killed_after"]}) and started again: {same}.',
    '',
    '| loss | CPU | card | difference |',
    '|---|---|---|---|',
  ]
  pairs = {f'training, step {s}': (v, card['losses'][s]) for s, v in cpu['losses'].items()}
  pairs |= {
    f'validation, {k}': (v, card['validation'][k]) for k, v in cpu['validation'].items()
  }
  chosen = [*pairs.items()]
  every = max(1, len(cpu['losses']) // 5)
  chosen = [p for i, p in enumerate(chosen) if i % every == 0 or p[0].startswith('val')]
  for name, (a, b) in chosen:
    lines.append(f'| {name} | {a:.4f} | {b:.4f} | {b - a:+.4f} |')
  return lines


def run(flags: argparse.Namespace, model_dir: str) -> dict[str, Any]:
  """The training run itself, in this process; goes on where `model_dir` stands.

  Returns:
    Losses by step, the last validation, a digest of the parameters, seconds.
  """
  about = json.loads((flags.batches / 'run.json').read_text(encoding='utf-8'))
  steps = about['steps']
  config = TrainConfig(
    model=model_config.from_dict(about['model']),
    recipe=Kept(path=str(flags.batches / 'batches.npz'), positions=about['positions']),
    optimizer=OptimizerConfig(**about['optimizer']),
    checkpoint=CheckpointConfig(every=max(1, steps // 3)),
    evaluation=EvaluationConfig(every=steps),
    batch_size=about['batch_size'],
    train_steps=steps,
    model_dir=model_dir,
    log_every=max(1, steps // _POINTS),
  )
  began = time.perf_counter()
  train.train(config, '')
  seconds = time.perf_counter() - began
  built = program.build(config, sharding.make_mesh(config.mesh))
  params = checkpoints.read_params(checkpoints.find(model_dir), built.state['params'])
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(jax.device_get(params)):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  drop = ('step', 'kind')
  return {
    'device': jax.devices()[0].device_kind,
    'steps': steps,
    'seconds': seconds,
    'losses': {str(r['step']): r['loss'] for r in writer.read(model_dir, 'train')},
    'validation': {
      k: v for k, v in writer.read(model_dir, 'validation')[-1].items() if k not in drop
    },
    'parameters': digest.hexdigest(),
  }


def _run(flags: argparse.Namespace, name: str, kill: bool = False) -> dict[str, Any]:
  """`run` in a process of its own, which may be killed and started again."""
  with tempfile.TemporaryDirectory() as folder:
    model_dir, out = f'{folder}/{name}', Path(folder) / 'result.json'
    command = [
      sys.executable,
      '-m',
      'benchmarks.train_on_card',
      f'--batches={flags.batches}',
    ]
    command += [f'--model_dir={model_dir}', f'--out={out}']
    step = None
    if kill:
      with subprocess.Popen(command) as process:
        while process.poll() is None and step is None:
          time.sleep(0.05)
          step = checkpoints.latest_step(model_dir)
        process.kill()
    subprocess.run(command, check=True)
    return {**json.loads(out.read_text(encoding='utf-8')), 'killed_after': step}


def write_tables() -> None:
  """The section of benchmarks/README.md, from the newest results of each device."""
  readme.write_results('train on card', RESULTS, table, 'benchmarks.train_on_card')


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = _flags().parse_args(argv)
  if flags.model_dir:
    result = run(flags, flags.model_dir)
    flags.out.write_text(json.dumps(result), encoding='utf-8')
  elif flags.write:
    write(flags)
  else:
    configs.check(
      (flags.batches / 'cpu.json').exists(),
      'benchmarks.train_on_card must have the batches and losses of a CPU',
      f'{flags.batches} without cpu.json',
      'run it with --write where TensorFlow is installed, and carry its folder along',
    )
    print('\n'.join(table(measure(flags))), flush=True)
    if flags.folder == RESULTS:
      write_tables()


def _flags() -> argparse.ArgumentParser:
  flags = argparse.ArgumentParser(
    prog='python -m benchmarks.train_on_card', description=__doc__.splitlines()[0]
  )
  flags.add_argument('--write', action='store_true', help='keep the batches, here')
  flags.add_argument('--steps', type=int, default=1500, help='of the run that is written')
  flags.add_argument('--batches', type=Path, default=BATCHES, help='folder of the batches')
  flags.add_argument('--folder', type=Path, default=RESULTS, help='of the results')
  flags.add_argument('--model_dir', help=argparse.SUPPRESS)
  flags.add_argument('--out', type=Path, help=argparse.SUPPRESS)
  return flags


if __name__ == '__main__':
  cli.main(main)
