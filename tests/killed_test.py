"""A run that is killed, again and again, goes on to the same bits."""

import json
import signal

import jax
import killer
import numpy as np
import pytest
import runs

from glm_jax import checkpoints

pytestmark = pytest.mark.slow


def test_killed_anywhere_a_run_continues_to_the_same_bits(text, straight, tmp_path):
  """Between steps, in a validation, and in a save: early, at its end, and after it."""
  run = tmp_path / 'killed'
  # A save is waited for by the next one: until then, it may or may not be whole.
  for point, there in (
    ('before the parameters of step 2', (None,)),
    (killer.BETWEEN, (None, 2)),
    (killer.VALIDATION, (2, 4)),
    ('before step 6 is committed', (4,)),
    ('while step 2 is removed', (8, 10)),
  ):
    process = runs.begin(text, run, flags=['--import=killer'], KILLED=point)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, (point, output)
    assert checkpoints.latest_step(str(run)) in there, point
  last = checkpoints.latest_step(str(run))
  assert f'resumed {run} at step {last}' in runs.finish(runs.begin(text, run))
  found, wanted = runs.params(run), runs.params(straight)
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  losses = [_losses(folder) for folder in (run, straight)]
  assert losses[0] == losses[1] and len(losses[0]) == runs.STEPS


def _losses(run):
  """By step; of a step that was repeated, the last; half a line may be left of a kill."""
  records = [
    json.loads(line)
    for line in (run / 'metrics.jsonl').read_text().splitlines()
    if line.endswith('}')
  ]
  return {r['step']: r['loss'] for r in records if r['kind'] == 'train'}
