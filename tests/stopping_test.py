"""Early stopping: where it stops, whoever killed the run, and what is said of it."""

import json
import math
import types

import numpy as np
import pytest

from glm_jax.checkpoints import CheckpointConfig
from glm_jax.configs import UserError
from glm_jax.training.config import EvaluationConfig
from glm_jax.training.stopping import Stopping, check_metric


def _config(patience, mode='min', metric='loss'):
  return types.SimpleNamespace(
    evaluation=EvaluationConfig(patience=patience),
    checkpoint=CheckpointConfig(best_metric=metric, best_mode=mode),
  )


def _stops_at(values, patience, mode):
  """By hand: the first that has `patience` of them behind the best before it."""
  sign = 1 if mode == 'min' else -1
  for i in range(len(values)):
    seen = [sign * v if math.isfinite(v) else math.inf for v in values[: i + 1]]
    behind = i - seen.index(min(seen)) if min(seen) < math.inf else i + 1
    if behind >= patience:
      return i
  return None


@pytest.mark.parametrize('mode', ['min', 'max'])
def test_it_stops_after_the_last_of_so_many_without_a_better_one(mode):
  """Ties and what is no number are not better; resumed anywhere, it is the same."""
  rng = np.random.default_rng(0)
  stopped = 0
  for _ in range(300):
    # Few values, so that many are equal.
    values = rng.choice([1.0, 2.0, 3.0, 4.0, math.nan, math.inf, -math.inf], 12).tolist()
    patience = int(rng.integers(1, 9))
    config, found = _config(patience, mode), None
    stop = Stopping(config)
    for i, value in enumerate(values):
      stop.see(10 * i, {'loss': value, 'other': 0.0})
      if rng.random() < 0.3:  # killed here: a checkpoint holds JSON
        stop = Stopping(config, json.loads(json.dumps(stop.state)))
      if stop.over:
        found = i
        assert f'in {patience} validation' in stop.in_words()
        break
    assert found == _stops_at(values, patience, mode)
    stopped += found is not None
  assert 100 < stopped < 300


def test_it_never_stops_unless_asked_to_and_goes_on_with_more_patience():
  stop = Stopping(_config(0))
  for step in range(50):
    stop.see(step, {'loss': 1.0})
    assert not stop.over
  assert Stopping(_config(49), stop.state).over
  assert not Stopping(_config(50), stop.state).over


def test_what_was_best_of_another_metric_is_forgotten():
  stop = Stopping(_config(2))
  for step, loss in enumerate((1.0, 2.0, 3.0)):
    stop.see(step, {'loss': loss, 'accuracy': loss})
  for other in (_config(2, metric='accuracy'), _config(2, mode='max')):
    assert stop.over and not Stopping(other, stop.state).over
    assert Stopping(other, stop.state).state['best'] is None


def test_the_words_name_the_best_and_its_step():
  stop = Stopping(_config(2))
  for step, loss in ((0, 3.0), (5, 2.5), (10, 2.6), (15, 2.5)):
    stop.see(step, {'loss': loss})
  wanted = 'loss has not improved in 2 validations on its 2.5000 of step 5'
  assert stop.over and stop.in_words() == wanted
  never = Stopping(_config(1))
  never.see(5, {'loss': math.nan})
  assert never.in_words() == 'loss was no finite number in 1 validation'


def test_a_metric_that_nothing_measures_is_refused_with_those_there_are():
  names = {'loss': 1.0, 'loss/blank': 1.0, 'corpus/web/loss': 1.0}
  for name in names:
    check_metric(_config(3, metric=name), names)
  for patience in (0, 3):
    with pytest.raises(UserError, match="got 'nope'; choose among corpus/web/loss, loss, "):
      Stopping(_config(patience, metric='nope')).see(1, names)
  # Nobody asked for the default where a recipe measures something else.
  check_metric(_config(0), {'accuracy': 1.0})
  with pytest.raises(UserError, match="got 'loss'; choose among accuracy"):
    check_metric(_config(1), {'accuracy': 1.0})
  check_metric(_config(0), {})
  with pytest.raises(UserError, match='patience=1 and nothing to validate on'):
    check_metric(_config(1), {})
