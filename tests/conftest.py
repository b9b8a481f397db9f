"""Eight virtual devices, quiet libraries, strict JAX; where the time of the tests went."""

import collections
import fcntl
import itertools
import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
# Eight devices wait for each other in collectives: XLA's pool needs a thread for each.
os.environ.setdefault('NPROC', '32')

from glm_jax import compiled

# For the tests, and for the commands that they start: most train the same tiny models.
# Not that of the user's runs.
_KEPT = compiled.folder().parents[1] / 'tests' / compiled.folder().name
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_KEPT))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')

import jax
import numpy as np
import pytest
import runs

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Tests compile for longer than they run; XLA's own passes remain.
jax.config.update('jax_disable_most_optimizations', True)

from glm_jax.batch import Batch
from glm_jax.models import GLMConfig


def pytest_sessionstart(session):
  """Forgets what was compiled long ago, most of it for code that is gone."""
  if not hasattr(session.config, 'workerinput'):
    compiled.forget(_KEPT.parent, 2**30)


def pytest_terminal_summary(terminalreporter):
  """Where the time of all workers went; a fixture's is its first test's."""
  files, tests = collections.Counter(), collections.Counter()
  for report in itertools.chain(*terminalreporter.stats.values()):
    if isinstance(report, pytest.TestReport):
      files[report.nodeid.split('::')[0]] += report.duration
      tests[report.nodeid] += report.duration
  terminalreporter.section('seconds')
  for counts, most in ((files, 20), (tests, 10)):
    for name, seconds in counts.most_common(most):
      terminalreporter.write_line(f'{seconds:7.1f}  {name}')
    rest = counts.total() - sum(seconds for _, seconds in counts.most_common(most))
    terminalreporter.write_line(f'{rest:7.1f}  others\n')


@pytest.fixture(scope='session')
def shared(tmp_path_factory):
  """shared(name, make): a folder that `make(folder)` fills once for all workers."""
  base = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:  # each worker has a folder in the session's
    base = base.parent

  def folder(name, make):
    made, whole = base / name, base / f'{name}.whole'
    with open(base / f'{name}.lock', 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
      if not whole.exists():
        made.mkdir()
        make(made)
        whole.touch()
    return made

  return folder


@pytest.fixture(scope='session')
def text(shared):
  """40 documents in files."""

  def write(folder):
    for number in range(40):
      line = f'Document {number} says a number of plain words in one sentence. '
      (folder / f'{number:02}.txt').write_text(line * 8)

  return shared('text', write)


@pytest.fixture(scope='session')
def straight(shared, text):
  """A run of `runs.STEPS` over the text that nothing interrupted, as a command."""

  def train(folder):
    runs.finish(runs.begin(text, folder / 'straight'))

  return shared('runs', train) / 'straight'


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
