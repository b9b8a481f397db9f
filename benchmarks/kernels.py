"""Do the attention kernels compute on this card what dense attention does?

python -m benchmarks.kernels

runs every GPU kernel that the card has, forward and backward in bfloat16, on packed prefix
rows with padding, and prints how far outputs and gradients are from dense attention in
float32, beside how far dense attention in bfloat16 is. Exits with 70 if a kernel is more
than three times as far. JAX can interpret some of these kernels, never all: this is their
test on hardware.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import rows
from glm_jax import cli, configs
from glm_jax.attention import dense, gpu
from glm_jax.batch import Visibility

# (B, T, N, K, H): many heads and few, a length that is no multiple of a tile, small heads.
SHAPES = (
  (2, 1024, 16, 16, 64),
  (2, 2048, 32, 2, 128),
  (1, 1000, 8, 2, 128),
  (3, 333, 4, 1, 32),
  (1, 8192, 8, 1, 128),
)


def _visibility(B: int, T: int) -> Visibility:
  """Three packed documents a row; the last eighth of the first row is padding."""
  start, end = rows.prefix(B, T, 10, documents=3).visibility
  used = np.full((B, 1), T)
  used[0] -= T // 8
  padding = np.arange(T) >= used
  start, end = np.where(padding, 0, start), np.where(padding, 0, np.minimum(end, used))
  return Visibility(jnp.asarray(start), jnp.asarray(end))


def _gradients(attend, q, k, v, visibility, weight):
  def total(q, k, v):
    out = attend(q, k, v, visibility)
    return (out.astype(jnp.float32) * weight).sum(), out

  run = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
  (_, out), gradients = run(q, k, v)
  return [np.asarray(x, np.float32) for x in (out, *gradients)]


def compare(B: int, T: int, N: int, K: int, H: int, attend) -> dict[str, list[float]]:
  """Relative errors of (output, dq, dk, dv): a kernel's, and dense attention's in bfloat16.

  Both against dense attention in float32 of the same bfloat16 inputs.
  """
  keys = jax.random.split(jax.random.key(T), 4)
  q, weight = (jax.random.normal(key, (B, T, K, N // K, H)) for key in keys[:2])
  k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[2:])
  inputs = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  exact = [x.astype(jnp.float32) for x in inputs]
  visibility = _visibility(B, T)
  plain = lambda q, k, v, seen: dense.attend(q, k, v, seen, 0.0, None)
  with jax.default_matmul_precision('highest'):
    reference = _gradients(plain, *exact, visibility, weight)
  errors = {}
  for name, function in (('kernel', attend), ('dense bfloat16', plain)):
    results = _gradients(function, *inputs, visibility, weight)
    errors[name] = [
      float(np.linalg.norm(x - y) / np.linalg.norm(y))
      for x, y in zip(results, reference, strict=True)
    ]
  return errors


def main(argv: Sequence[str]) -> None:
  """The command."""
  configs.check(not argv, 'benchmarks.kernels takes no flags', str(argv), 'drop them')
  lacking = gpu.lacks(128, 'bfloat16', jax.devices()[0])
  configs.check(not lacking, 'the kernels must have their GPU', lacking, 'run it on one')
  kernels = {'triton': (False, gpu.flash)}
  if gpu.is_hopper(jax.devices()[0]):
    own = functools.partial(gpu.flash, own_gradients=True)
    kernels = {'mosaic': (True, gpu.flash), 'own gradients': (True, own)} | kernels
  worst = 0.0
  print(
    f'{jax.devices()[0].device_kind}, jax {jax.__version__}; relative errors of '
    'output, dq, dk, dv'
  )
  for name, (hopper, attend) in kernels.items():
    for shape in SHAPES:
      with mock.patch.object(gpu, 'is_hopper', lambda device, hopper=hopper: hopper):
        errors = compare(*shape, attend)
      print(f'{name} B, T, N, K, H = {shape}: {json.dumps(errors)}', flush=True)
      ratios = np.array(errors['kernel']) / np.array(errors['dense bfloat16'])
      worst = max(worst, float(ratios.max()))
  if worst > 3:
    print(f'a kernel is {worst:.1f} times as far as dense attention in bfloat16')
    sys.exit(cli.EXIT_NUMERICS)


if __name__ == '__main__':
  cli.main(main)
