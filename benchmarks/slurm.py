"""A real Slurm of one machine, and what launch/slurm.sbatch does on it.

apt-get install --no-install-recommends slurm-wlm munge
python -m benchmarks.slurm [--folder=DIR]

A controller and two nodes run as this user, with all of their files in one folder. A run
of two processes, one a node, is killed, requeued and told that its time is up, and must end
with the parameters and the optimizer of a run that nobody disturbed, to the bit. About 6
minutes on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.readme import ROOT, write_section

PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch')
PAGE = ROOT / 'launch' / 'slurm.sbatch'
# Addresses of this machine as names of nodes: JAX takes the coordinator's from there, and
# nothing has to be written into /etc/hosts.
NODES = ('127.0.0.1', '127.0.0.2')
SMALL = (
  "VocabularyConfig.path='bytes'",
  'GLMConfig.num_layers=2',
  'GLMConfig.hidden_size=64',
  'GLMConfig.num_heads=2',
  'GLMConfig.vocab_size=384',
  'GLMConfig.max_positions=64',
  "TASK_FEATURE_LENGTHS={'tokens':64}",
  'TRAIN_STEPS=300',
  'BATCH_SIZE=8',
  'EvaluationConfig.examples=8',
  'EvaluationConfig.every=300',
  'EvaluationConfig.fill=0',
  'CheckpointConfig.every=20',
  'TrainConfig.log_every=20',
)


def installed() -> bool:
  """Whether all programs are here that a `Cluster` needs."""
  return all(_program(name) for name in PROGRAMS)


def _program(name: str) -> str | None:
  # Daemons of Debian's packages are not on everybody's path.
  return shutil.which(name, path=f'{os.environ["PATH"]}:/usr/sbin:/usr/local/sbin')


class Cluster:
  """What was started by `cluster`, and how to ask it."""

  def __init__(self, folder: Path):
    self.folder = folder
    self._environment = {**os.environ, 'SLURM_CONF': str(folder / 'slurm.conf')}

  def ask(self, *command: str, **environment: str) -> str:
    """What a command of Slurm prints; raises CalledProcessError if it fails."""
    return subprocess.run(
      command,
      env=self._environment | environment,
      check=True,
      capture_output=True,
      text=True,
      timeout=60,
    ).stdout

  def submit(self, *arguments: str, options: Sequence[str] = (), **environment: str) -> str:
    """Gives the page to sbatch, on both nodes.

    Args:
      *arguments: of `train`.
      options: of sbatch besides.
      **environment: of the job.

    Returns:
      The number of the job.
    """
    return self.ask(
      *('sbatch', '--parsable', f'--nodes={len(NODES)}', f'--chdir={self.folder}'),
      *(*options, str(PAGE), *arguments),
      **environment,
    ).strip()

  def job(self, number: str) -> dict[str, str]:
    """What Slurm says of a job, such as JobState, Restarts and ExitCode."""
    return dict(
      re.findall(r'(\S+?)=(\S*)', self.ask('scontrol', '-o', 'show', 'job', number))
    )

  def wait(
    self, number: str, until: Callable[[dict[str, str]], Any], seconds: float
  ) -> None:
    """Waits for what `job` says; raises TimeoutError with the job's output."""
    ends = time.monotonic() + seconds
    while not until(self.job(number)):
      if time.monotonic() > ends:
        raise TimeoutError(f'{self.job(number)}\n{self.output(number)}')
      time.sleep(0.2)

  def finish(self, number: str, seconds: float) -> dict[str, str]:
    """The job when it has left the queue for good."""
    over = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL')
    self.wait(number, lambda job: job['JobState'] in over, seconds)
    return self.job(number)

  def output(self, number: str) -> str:
    """What all attempts of a job have printed."""
    path = self.folder / f'slurm-{number}.out'
    return path.read_text(errors='replace') if path.exists() else ''


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
  """A controller and two nodes, of eight CPUs as they say, until the end of the context.

  Args:
    folder: for all of their files; only its owner may write there, or munge refuses.
  """
  user, host, ports = getpass.getuser(), socket.gethostname().split('.')[0], _free_ports(3)
  folder.chmod(0o700)
  for name in ('state', *NODES):
    (folder / name).mkdir()
  (folder / 'munge.key').write_bytes(os.urandom(1024))
  (folder / 'munge.key').chmod(0o400)
  nodes = [
    f'NodeName={node} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs=8'
    for node, port in zip(NODES, ports[1:], strict=True)
  ]
  (folder / 'slurm.conf').write_text(
    f"""ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
# A requeued job waits until its credential has expired: 120 s if nothing is said.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
# By itself, a waiting job is looked at every 30 s.
SchedulerParameters=bf_interval=1,sched_interval=1
"""
    + '\n'.join([*nodes, 'PartitionName=all Nodes=ALL Default=YES State=UP', ''])
  )
  munge = [
    f'--key-file={folder}/munge.key',
    f'--socket={folder}/munge.sock',
    f'--pid-file={folder}/munged.pid',
    f'--log-file={folder}/munged.log',
    f'--seed-file={folder}/munged.seed',
  ]
  daemons = [['munged', '--foreground', '--force', *munge], ['slurmctld', '-D']]
  daemons += [['slurmd', '-D', '-N', node] for node in NODES]
  here = Cluster(folder)
  with contextlib.ExitStack() as running:
    for name, *arguments in daemons:
      running.enter_context(_daemon([_program(name), *arguments], here))
      time.sleep(0.5)  # each asks the one before it
    ends = time.monotonic() + 30
    while here.ask('sinfo', '--noheader', '--format=%T %D').split() != ['idle', '2']:
      if time.monotonic() > ends:
        raise TimeoutError((folder / 'slurmctld.log').read_text())
      time.sleep(0.2)
    yield here
    here.ask('scancel', '--me', '--full', '--signal=KILL')


@contextlib.contextmanager
def _daemon(command: Sequence[str], here: Cluster) -> Iterator[None]:
  with open(here.folder / 'daemons.log', 'ab') as log:
    process = subprocess.Popen(
      command, env=here._environment, stdout=log, stderr=subprocess.STDOUT
    )
  try:
    yield
  finally:
    process.terminate()
    process.wait(30)


def _free_ports(count: int) -> list[int]:
  with contextlib.ExitStack() as held:
    sockets = [held.enter_context(socket.socket()) for _ in range(count)]
    for each in sockets:
      each.bind(('127.0.0.1', 0))
    return [each.getsockname()[1] for each in sockets]


def _newest(run: Path) -> int:
  """The last step that is saved; 0 for none."""
  names = [path.name for path in (run / 'checkpoints').glob('*')]
  return max((int(name) for name in names if name.isdecimal()), default=0)


def digest(run: Path) -> str:
  """A hash of the parameters and the optimizer of the last checkpoint."""
  import jax
  import orbax.checkpoint as ocp

  folder = run / 'checkpoints' / str(_newest(run))
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
  total = hashlib.sha256()
  with ocp.StandardCheckpointer() as reader:
    for item in ('params', 'optimizer'):
      target = jax.tree.map(place, reader.metadata(folder / item).item_metadata.tree)
      for leaf in jax.tree.leaves(reader.restore(folder / item, target)):
        total.update(np.asarray(leaf).tobytes())
  return total.hexdigest()


def _process(number: str, index: int) -> int:
  """The pid of a process of a job: the Python one, not the shell that waits for it."""
  for path in Path('/proc').glob('[0-9]*'):
    with contextlib.suppress(OSError):
      variables = (path / 'environ').read_bytes().split(b'\0')
      told = {f'SLURM_JOB_ID={number}', f'SLURM_PROCID={index}'}
      if told <= {each.decode(errors='replace') for each in variables}:
        if 'python' in os.readlink(path / 'exe'):
          return int(path.name)
  raise ProcessLookupError(f'process {index} of job {number}')


def disturb(here: Cluster, number: str, run: Path) -> Iterator[tuple[str, float]]:
  """Does to a job what happens to jobs, each time when another checkpoint is there.

  Yields:
    What was done, and the seconds until a step after it was saved.
  """
  kill = lambda index: lambda: os.kill(_process(number, index), signal.SIGKILL)
  events: dict[str, Callable[[], Any]] = {
    '`kill -9` of process 1': kill(1),
    '`kill -9` of process 0': kill(0),
    '`scontrol requeue`, as a preemption does': lambda: here.ask(
      'scontrol', 'requeue', number
    ),
    'SIGTERM to the processes, as at the end of the time': lambda: here.ask(
      'scancel', '--signal=TERM', number
    ),
  }
  before = 0
  for name, happens in events.items():
    here.wait(number, lambda _: _newest(run) > before, 600)
    restarts = int(here.job(number)['Restarts'])
    happens()
    began, attempt = time.monotonic(), f'+ attempt {restarts + 1} '
    # Until then, the processes of before may save.
    here.wait(number, lambda _: attempt in here.output(number), 600)
    before = _newest(run)
    here.wait(number, lambda _: _newest(run) > before, 600)
    yield name, time.monotonic() - began


def measure(folder: Path) -> list[str]:
  """Two runs, one disturbed; lines of a table of what came of it."""
  (folder / 'text').mkdir()
  for name in 'ab':
    (folder / 'text' / f'{name}.txt').write_text(f'Some text of {name}. ' * 20_000)
  environment = {'PYTHON': sys.executable, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  lines = ['| what happened | to the next saved step, s |', '|---|---|']

  def submit(name: str) -> str:
    bindings = [
      *SMALL,
      f"MODEL_DIR='{folder / name}'",
      f"CorpusConfig.corpus='{folder}/text/*.txt'",
      f"CorpusConfig.cache_dir='{folder}/cache'",
    ]
    flags = [f'--gin.{binding}' for binding in bindings]
    return here.submit('--gin_file=gin_configs/glm_tiny.gin', *flags, **environment)

  # munge wants a folder that its owner alone may write to.
  (folder / 'slurm').mkdir()
  with cluster(folder / 'slurm') as here:
    version = here.ask('sinfo', '--version').strip()
    number = submit('straight')
    assert here.finish(number, 1200)['JobState'] == 'COMPLETED', here.output(number)
    number = submit('disturbed')
    try:
      for name, seconds in disturb(here, number, folder / 'disturbed'):
        print(f'{seconds:.0f} s: {name}', flush=True)
        lines.append(f'| {name} | {seconds:.0f} |')
      job = here.finish(number, 1200)
    finally:
      print(here.output(number))
  assert job['JobState'] == 'COMPLETED', job
  digests = [digest(folder / name) for name in ('straight', 'disturbed')]
  equal = 'the same bits as' if digests[0] == digests[1] else '**other bits** than'
  lines.append('')
  lines.append(
    f'{version}, controller and two nodes on one machine, {os.cpu_count()} CPU cores; a '
    f'process a node. All of it happened to one job, which Slurm restarted '
    f'{job["Restarts"]} times and which ended with {equal} a run that was left alone, '
    'parameters and optimizer. '
    '(Written by `python -m benchmarks.slurm`.)'
  )
  return lines


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = argparse.ArgumentParser(
    prog='python -m benchmarks.slurm',
    description='A run of two processes on a Slurm of this machine, disturbed.',
  )
  flags.add_argument('--folder', metavar='DIR', help='what is left stays there')
  given = flags.parse_args(argv)
  if not installed():
    flags.exit(65, 'error: apt-get install --no-install-recommends slurm-wlm munge\n')
  with contextlib.ExitStack() as stack:
    folder = given.folder or stack.enter_context(tempfile.TemporaryDirectory())
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_section('slurm', measure(Path(folder).resolve()))


if __name__ == '__main__':
  main(sys.argv[1:])
