"""Commands as users start them, and what one that refused its input must have done."""

import hashlib
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
# A model for which a command needs seconds.
TINY = [
  "VocabularyConfig.path='bytes'",
  'GLMConfig.num_layers=1',
  'GLMConfig.hidden_size=32',
  'GLMConfig.num_heads=2',
  'GLMConfig.vocab_size=384',
  'GLMConfig.max_positions=64',
  "TASK_FEATURE_LENGTHS={'tokens':64}",
  'TRAIN_STEPS=2',
  'BATCH_SIZE=4',
  'EvaluationConfig.examples=8',
  'EvaluationConfig.fill=0',
  'OptimizerConfig.warmup_steps=1',
]

# Where a CUDA plugin of JAX is installed and no driver is, as with the compilers of
# launch/test.sh --all, importing jax says so before anyone could set up its logging.
_OF_JAX = ('All log messages before absl::InitializeLog()', 'Could not find cuda drivers')

# Set by conftest.py.
COMPILATION_CACHE = {}


def refused(done, *words, code=65):
  """One line on stderr that says all of `words`; the exit code; no traceback."""
  assert done.returncode == code, (done.stdout, done.stderr)
  assert 'Traceback' not in done.stdout + done.stderr
  lines = [
    line
    for line in done.stderr.strip().splitlines()
    if not any(noise in line for noise in _OF_JAX)
  ]
  assert len(lines) == 1 and lines[0].startswith('error: '), done.stderr
  for word in words:
    assert word in lines[0], (word, lines[0])


def environment(**more):
  """The environment of a user, but for a cache of what XLA compiled."""
  kept = {k: v for k, v in os.environ.items() if k not in ('NPROC', 'XLA_FLAGS')}
  return {**kept, **COMPILATION_CACHE, 'PYTHONPATH': str(ROOT), **more}


def command(module, *arguments, cwd=ROOT, timeout=600, **more):
  """A command of the package that ended; `more` stands in its environment."""
  return subprocess.run(
    [sys.executable, '-m', f'glm_jax.{module}', *map(str, arguments)],
    cwd=cwd,
    env=environment(**more),
    capture_output=True,
    text=True,
    timeout=timeout,
  )


def start(module, *arguments, **more):
  """The same, running, in a session of its own: whoever kills it kills its workers."""
  return subprocess.Popen(
    [sys.executable, '-m', f'glm_jax.{module}', *map(str, arguments)],
    cwd=ROOT,
    env=environment(**more),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )


def gin(*bindings):
  """Flags of bindings."""
  return [f'--gin.{binding}' for binding in bindings]


def snapshot(folder):
  """Every file's content; caches, which belong to nobody, are left out."""
  return {
    str(path): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(pathlib.Path(folder).rglob('*'))
    if path.is_file() and 'cache' not in path.relative_to(folder).parts
  }
