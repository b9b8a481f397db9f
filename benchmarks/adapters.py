"""LoRA beside peft, and all parameters beside transformers: the same model and batches.

python -m benchmarks.adapters [--steps=100] [--full]     (pip install -e '.[peers]')

exports a small ChatGLM2 and fresh factors, trains both, and prints the largest difference
of the loss and the time of a step; with --full, all parameters are trained, without
factors. Fused projections have no factors here: peft has one pair for all of their parts,
which is another function once it is trained.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import readme
from glm_jax import checkpoints, convert, models, sharding, startup
from glm_jax.batch import Batch
from glm_jax.checkpoints import slices
from glm_jax.recipes.pretraining import Pretraining
from glm_jax.training import program, state
from glm_jax.training.adapters import LoRAConfig, to_dict
from glm_jax.training.config import TrainConfig
from glm_jax.training.optimizer import OptimizerConfig

# 25 M parameters.
MODEL = models.ChatGLM2Config(
  num_layers=8,
  hidden_size=512,
  num_heads=8,
  num_kv_heads=2,
  head_size=64,
  mlp_size=1024,
  vocab_size=4096,
  max_positions=512,
)
LORA = LoRAConfig(rank=8, alpha=16.0, targets='layers/(attention|mlp/down)/.*')
ROWS, LENGTH = 4, 128
# Each token has so many successors, so that there is something to learn.
_SUCCESSORS = 4


def main(argv: Sequence[str] | None = None) -> None:
  flags = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  flags.add_argument('--steps', type=int, default=100)
  flags.add_argument('--full', action='store_true', help='train all parameters')
  given = flags.parse_args(argv)
  steps, lora = given.steps, None if given.full else LORA
  jax.config.update('jax_platforms', 'cpu')
  optimizer = OptimizerConfig(
    # Of all parameters at ten times that, what rounding parts grows apart within 100 steps.
    learning_rate=1e-4 if given.full else 1e-3,
    schedule='constant',
    beta2=0.999,
    epsilon=1e-8,
    weight_decay=0.0,
  )
  run = TrainConfig(
    model=MODEL,
    recipe=Pretraining(task='glm_causal', feature_lengths={'tokens': LENGTH}),
    optimizer=optimizer,
    adapters=lora,
    # A loop over layers would copy their weights and what the backward pass needs.
    compute=models.ComputeConfig(unroll=0),
    batch_size=ROWS,
    train_steps=steps,
    model_dir='x',
    init_from='' if given.full else 'x',
  )
  layout = sharding.make_mesh(run.mesh, jax.devices()[:1])
  built = program.build(run, layout)
  leaves = program.all_leaves(run)
  whole = state.abstract_params(MODEL, layout, leaves)
  frozen = state.init_leaves(_plain(), whole, 0)
  params = state.init_leaves(leaves, whole, 0) if leaves else {}
  tokens = _tokens(steps)
  with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    _export(folder, params, frozen)
    np.save(folder / 'tokens.npy', tokens)
    (folder / 'optimizer.json').write_text(
      json.dumps(
        {
          'lr': optimizer.learning_rate,
          'betas': [optimizer.beta1, optimizer.beta2],
          'eps': optimizer.epsilon,
          'clip': optimizer.clip_norm,
        }
      )
    )
    trained, rest = (frozen, {}) if given.full else (params, frozen)
    ours = _train(built, layout, trained, rest, tokens)
    done = subprocess.run(
      # Not as a file: its folder is searched first, and transformers looks for `kernels`.
      [sys.executable, '-m', 'benchmarks.peft_step', folder],
      check=True,
      stdout=subprocess.PIPE,
      text=True,
      cwd=readme.ROOT,
    )
    theirs = json.loads(done.stdout)
  losses = np.array([ours['losses'], theirs['losses']])
  print(f'{steps} steps; loss {losses[0, 0]:.4f} to {losses[0, -1]:.4f}')
  print(f'largest difference of the loss: {np.abs(losses[0] - losses[1]).max():.1e}')
  a, b = (float(np.median(each['seconds'][2:])) for each in (ours, theirs))
  name = 'transformers' if given.full else 'peft and transformers'
  print(f'seconds a step: {a:.3f}, {name} {b:.3f}: {b / a:.2f} x')


def _plain() -> dict[str, Any]:
  """The model's own parameters, as `state.Leaves`."""
  names = state.abstract_params(MODEL)
  return {
    name: lambda key, name=name: state.init_params(MODEL, key)[name] for name in names
  }


def _tokens(steps: int) -> np.ndarray:
  """[steps, B, T + 1] of a chain in which few tokens follow each."""
  rng = np.random.default_rng(0)
  following = rng.integers(0, MODEL.vocab_size, (MODEL.vocab_size, _SUCCESSORS))
  tokens = np.empty((steps, ROWS, LENGTH + 1), np.int32)
  tokens[..., 0] = rng.integers(0, MODEL.vocab_size, (steps, ROWS))
  for t in range(LENGTH):
    choice = rng.integers(0, _SUCCESSORS, (steps, ROWS))
    tokens[..., t + 1] = following[tokens[..., t], choice]
  return tokens


def _export(folder: Path, params: Any, frozen: Any) -> None:
  """The model, and the factors if there are any, as transformers and peft read them."""
  meta = {'model': models.config.to_dict(MODEL), 'vocabulary': None}
  _write(folder / 'base', frozen, meta)
  convert.main([str(folder / 'base'), str(folder / 'model'), '--to=glm'])
  if not params:
    return
  base = checkpoints.describe(checkpoints.find(str(folder / 'base')))
  _write(folder / 'lora', params, {**meta, 'base': base, 'adapters': to_dict(LORA)})
  convert.main([str(folder / 'lora'), str(folder / 'peft'), '--peft', '--to=glm'])


def _write(folder: Path, tree: Any, meta: dict[str, Any]) -> None:
  leaves = {path: np.asarray(leaf) for path, leaf in slices.flat(tree).items()}
  specs = {path: slices.LeafSpec(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}
  read = lambda path, layer: leaves[path] if layer is None else leaves[path][layer]
  slices.write(folder, specs, read, meta, lambda _: None)


def _train(
  built: Any, layout: Any, params: Any, frozen: Any, tokens: np.ndarray
) -> dict[str, list[float]]:
  """Losses, and seconds a step."""
  current = state.begin(params, built.optimizer, built.state)
  result: dict[str, list[float]] = {'losses': [], 'seconds': []}
  t = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
  ones, zeros = np.ones((ROWS, LENGTH), np.float32), np.zeros_like(t)
  with sharding.active(layout):
    for rows in tokens:
      batch = Batch(rows[:, :-1], rows[:, 1:], ones, t, zeros, zeros, t + 1, zeros + 3)
      placed = sharding.place(batch, layout)
      began = time.perf_counter()
      current, metrics = built.train_step(current, frozen, placed)
      total, count = metrics['loss']
      result['losses'].append(float(total) / float(count))
      result['seconds'].append(time.perf_counter() - began)
  return result


if __name__ == '__main__':
  startup.keep_memory()
  main()
