"""Eight virtual devices, quiet libraries, strict JAX."""

import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
# Eight devices wait for each other in collectives: XLA's pool needs a thread for each.
os.environ.setdefault('NPROC', '32')

import commands
import jax
import numpy as np
import pytest

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Tests compile for longer than they run; XLA's own passes remain.
jax.config.update('jax_disable_most_optimizations', True)

from glm_jax.batch import Batch
from glm_jax.models import GLMConfig


@pytest.fixture(scope='session', autouse=True)
def compiled(tmp_path_factory):
  """Commands of one session share what they compiled: most train the same tiny models."""
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:  # each worker has a folder in the session's
    folder = folder.parent
  commands.COMPILATION_CACHE.update(
    JAX_COMPILATION_CACHE_DIR=str(folder / 'compiled'),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.1',
  )


@pytest.fixture(scope='session')
def config():
  """A model that compiles in seconds; no dropout."""
  return GLMConfig(
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    vocab_size=512,
    max_positions=48,
    embedding_dropout=0.0,
    attention_dropout=0.0,
    output_dropout=0.0,
  )


@pytest.fixture(scope='session')
def batch():
  """16 rows of 48 positions of GLM's layout, ragged, with ragged weights."""
  rng = np.random.default_rng(0)
  B, T = 16, 48
  t = np.arange(T)
  part_a = rng.integers(8, 24, (B, 1))
  length = rng.integers(30, T + 1, (B, 1))
  inside, in_b = t < length, (t >= part_a) & (t < length)
  tokens = rng.integers(0, 512, (B, T))
  return Batch(
    tokens=np.where(inside, tokens, 0).astype(np.int32),
    targets=rng.integers(0, 512, (B, T)).astype(np.int32),
    loss_weights=(in_b * rng.choice([0.0, 0.5, 1.0], (B, T))).astype(np.float32),
    positions=np.where(in_b, part_a // 2, np.minimum(t, part_a)).astype(np.int32),
    block_positions=np.where(in_b, t - part_a + 1, 0).astype(np.int32),
    key_start=np.zeros((B, T), np.int32),
    key_end=np.where(inside, np.maximum(part_a, t + 1), 0).astype(np.int32),
    objective=np.broadcast_to(rng.integers(0, 3, (B, 1)), (B, T)).astype(np.int32),
  )
