"""Rotary positions: frequencies, phases, and the two ways of pairing dimensions.

A pair of dimensions is rotated by the angle `position * frequency` (Su et al., RoFormer,
2021, section 3.2.2). Angles are float32 unless `phase_dtype` says otherwise: the
released fp16 checkpoints of ChatGLM-6B and ChatGLM2-6B were run with angles in float16,
which is off by as much as 0.2 rad at position 512 (ChatGLM2's: 1.0 rad at 2,048); the
setting repeats that bit for bit, for those who need a checkpoint's exact outputs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Phases = tuple[jax.Array, jax.Array]
"""(cos, sin), each [B, T, R / 2] float32."""

PHASE_DTYPES = ('float32', 'float16')


def frequencies(size: int, theta: float) -> np.ndarray:
  """`theta ** (-2 i / size)` for i in 0 .. size / 2, float32.

  Args:
    size: R, dimensions that are rotated together.
    theta: the base.

  Example:
    >>> frequencies(4, 10000.0).tolist()
    [1.0, 0.009999999776482582]
  """
  powers = theta ** (np.arange(0, size, 2) / size)
  return 1 / powers.astype(np.float32)  # rounded twice, as PyTorch does


def phases(positions_BT: jax.Array, frequencies_R: np.ndarray) -> Phases:
  """cos and sin of `position * frequency`.

  Args:
    positions_BT: int32, or float32 where positions are interpolated.
    frequencies_R: [R / 2]; the angle is computed, and its cos and sin rounded, in their
      dtype.
  """
  angles = positions_BT[..., None].astype(frequencies_R.dtype) * frequencies_R
  # [B, T, 1] x [R / 2] -> [B, T, R / 2]. With a float16 table the angle is rounded by now;
  # its cosine is computed in float32 and rounded once more, as PyTorch does it.
  cos, sin = (
    f(angles.astype(jnp.float32)).astype(frequencies_R.dtype) for f in (jnp.cos, jnp.sin)
  )
  return cos.astype(jnp.float32), sin.astype(jnp.float32)


def rotate_halves(x_BTNR: jax.Array, phases: Phases) -> jax.Array:
  """Rotates the pairs (i, i + R / 2), as GPT-NeoX, ChatGLM-6B and GLM-130B do."""
  cos, sin = _like(x_BTNR, phases)
  first, second = jnp.split(x_BTNR.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x_BTNR.dtype)


def rotate_neighbours(x_BTNR: jax.Array, phases: Phases) -> jax.Array:
  """Rotates the pairs (2i, 2i + 1), as ChatGLM2, ChatGLM3 and GLM-4 do."""
  cos, sin = _like(x_BTNR, phases)
  pairs = x_BTNR.astype(jnp.float32).reshape(*x_BTNR.shape[:-1], -1, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
  return rotated.reshape(x_BTNR.shape).astype(x_BTNR.dtype)


def _like(x_BTNR: jax.Array, phases: Phases) -> Phases:
  """Phases with an axis for the heads."""
  assert x_BTNR.shape[-1] == 2 * phases[0].shape[-1], (x_BTNR.shape, phases[0].shape)
  return phases[0][:, :, None], phases[1][:, :, None]
