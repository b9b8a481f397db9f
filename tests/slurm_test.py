"""launch/slurm.sbatch on a real Slurm of this machine, with processes that act out a plan.

What `train` itself does there is `python -m benchmarks.slurm`'s.
"""

import re
import time

import pytest

from benchmarks import slurm
from glm_jax import cli, train

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not slurm.installed(), reason='apt-get install --no-install-recommends slurm-wlm munge'
  ),
]

# A line an attempt, a word a process: what it leaves with, or how it ends otherwise.
PLANS = {
  'done': ('0 0',),
  'stopped': ('42 42', '0 0'),
  'killed': ('kill wait', 'wait kill', '0 0'),
  'aborted again and again': ('134 wait', '134 wait', '134 wait'),
  'refused': ('wait 65',),
  'refused, others aborted': ('abort 70',),
  'defect': ('1 wait',),
  'requeued': ('wait wait', '0 0'),
  'out of time': ('wait wait', '0 0'),
}
STAND_IN = """#!/usr/bin/env bash
attempt=${SLURM_RESTART_COUNT:-0}
read -ra words <<< "$(sed -n "$((attempt + 1))p" "$PLAN")"
trap 'echo "process $SLURM_PROCID saves"; sleep 1; exit 42' TERM
echo "process $SLURM_PROCID of attempt $attempt: $*"
touch "$PLAN.$attempt.$SLURM_PROCID"
# None ends before all can be told to: a shell that hears of it just before it starts its
# process does not pass it on, and Slurm kills that process (137) 30 s later.
until [[ -e $PLAN.$attempt.0 && -e $PLAN.$attempt.1 ]]; do sleep 0.1; done
case ${words[$SLURM_PROCID]} in
  wait) sleep 300 & wait $! ;;
  abort) trap 'exit 134' TERM; sleep 300 & wait $! ;;
  kill) kill -9 $$ ;;
  *) exit "${words[$SLURM_PROCID]}" ;;
esac
"""


@pytest.fixture(scope='module')
def jobs(tmp_path_factory):
  """A cluster, and the number of a job for each plan: they all run side by side."""
  folder = tmp_path_factory.mktemp('slurm')
  (folder / 'python').write_text(STAND_IN)
  (folder / 'python').chmod(0o755)
  numbers = {}
  with slurm.cluster(folder) as here:
    for name, lines in PLANS.items():
      plan = folder / f'{name}.plan'.replace(' ', '_')
      plan.write_text('\n'.join(lines) + '\n')
      numbers[name] = here.submit(
        '--gin_file=my runs/a.gin',
        "--gin.MODEL_DIR='runs/a'",
        PYTHON=str(folder / 'python'),
        PLAN=str(plan),
        MOST_DEATHS='2',
      )
    yield here, numbers


def _finished(jobs, name):
  here, numbers = jobs
  job = here.finish(numbers[name], 180)
  output = here.output(numbers[name])
  print(output)
  return job['JobState'], job['ExitCode'], int(job['Restarts']), output


@pytest.mark.parametrize(
  'name,ended,code,restarts',
  [
    ('done', 'COMPLETED', 0, 0),
    ('stopped', 'COMPLETED', 0, 1),
    ('killed', 'COMPLETED', 0, 2),
    ('aborted again and again', 'FAILED', 134, 2),
    ('refused', 'FAILED', 65, 0),
    ('refused, others aborted', 'FAILED', 70, 0),
    ('defect', 'FAILED', 1, 0),
  ],
)
def test_a_job_goes_on_after_what_mends_and_only_then(jobs, name, ended, code, restarts):
  assert _finished(jobs, name)[:3] == (ended, f'{code}:0', restarts)


@pytest.mark.parametrize(
  'name,command',
  [
    ('requeued', ('scontrol', 'requeue')),
    ('out of time', ('scancel', '--signal=TERM')),  # what --signal=TERM@120 sends
  ],
)
def test_processes_may_save_before_a_job_goes_on(jobs, name, command):
  here, numbers = jobs
  ends = time.monotonic() + 60
  while here.output(numbers[name]).count('of attempt 0') < 2 and time.monotonic() < ends:
    time.sleep(0.1)
  here.ask(*command, numbers[name])
  state, code, restarts, output = _finished(jobs, name)
  assert (state, code, restarts) == ('COMPLETED', '0:0', 1)
  assert {*re.findall(r'process (\d) saves', output)} == {'0', '1'}


def test_every_process_is_given_what_was_given_to_the_page(jobs):
  *_, output = _finished(jobs, 'done')
  said = re.findall(r'process (\d) of attempt 0: -m glm_jax.train (.*)', output)
  assert {number for number, _ in said} == {'0', '1'}
  words = ['--multiprocess', '--gin_file=my runs/a.gin', "--gin.MODEL_DIR='runs/a'"]
  assert all(text == ' '.join(words) for _, text in said)
  assert cli.parse(train._flags(), words).multiprocess
