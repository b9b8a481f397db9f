"""Kills its process at a point with a name: a command takes it by --import.

As a power cut does: nothing is closed, nothing is flushed, nobody is told. With SIGNAL in
the environment it is told by that instead.
"""

import itertools
import os
import re
import signal
import sys

from glm_jax.recipes import rollouts
from glm_jax.training import evaluation, writer

# Of a run that saves every 2 steps, validates every 6 and keeps 3 checkpoints: events of
# the system, as Python tells them before they happen, and what the path looks like.
EVENTS = {
  'before the parameters of step 2': ('os.mkdir', r'/checkpoints/2[^/]*/params'),
  'before step 6 is committed': ('os.rename', r'/checkpoints/6$'),
  'before step 10 is committed': ('os.rename', r'/checkpoints/10$'),
  'while step 2 is removed': ('os.rmdir', r'/checkpoints/2$'),
}
BETWEEN = 'between steps 3 and 4'
VALIDATION = 'in the validation of step 6'
ROLLOUT = 'in the second rollout'

POINT = os.environ.get('KILLED')  # None for the test, which reads the names


def _kill(*_):
  os.kill(os.getpid(), signal.Signals[os.environ.get('SIGNAL', 'SIGKILL')])


def _heard(event, arguments):
  wanted, path = EVENTS[POINT]
  if event == wanted and any(re.search(path, str(argument)) for argument in arguments):
    _kill()


def _written(writer, step, kind, values, write=writer.Writer.write):
  write(writer, step, kind, values)
  if step == 3:
    _kill()


def _validated(self, params, original=evaluation.Validation.__call__):
  whole, one = self._sets, itertools.islice(next(iter(self._sets.values()))(), 1)
  self._sets = {'first batch': lambda: one}
  original(self, params)
  _kill()
  self._sets = whole  # it has only been told
  return original(self, params)


def _judged(self, questions, answers, original=rollouts.Rollouts.judged):
  if answers and questions and next(_ROLLOUTS) == 1:
    _kill()
  return original(self, questions, answers)


_ROLLOUTS = itertools.count()

if POINT == ROLLOUT:
  rollouts.Rollouts.judged = _judged
elif POINT == BETWEEN:
  writer.Writer.write = _written
elif POINT == VALIDATION:
  evaluation.Validation.__call__ = _validated
elif POINT:
  sys.addaudithook(_heard)
