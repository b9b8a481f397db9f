"""What a command that refused its input must have done."""

# Where a CUDA plugin of JAX is installed and no driver is, as with the compilers of
# launch/test.sh --all, importing jax says so before anyone could set up its logging.
_OF_JAX = ('All log messages before absl::InitializeLog()', 'Could not find cuda drivers')


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
