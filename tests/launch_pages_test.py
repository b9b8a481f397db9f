"""The launch pages, without a cloud: what they ask of it, and what they do with exit codes.

launch/slurm.sbatch has a test of its own, on a real Slurm.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from commands import ROOT

from glm_jax import cli, train

LAUNCH = ROOT / 'launch'
PAGES = [
  LAUNCH / name for name in ('tpu_pod.sh', 'gke_jobset.yaml', 'slurm.sbatch', 'Dockerfile')
]
SCRIPTS = sorted([*LAUNCH.glob('*.sh'), LAUNCH / 'slurm.sbatch'])
# What `train` leaves with, and what a shell says of a process that a signal has ended.
AGAIN = (42, 134, 137, 139, 143)
NEVER = (1, *range(64, 79))


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_a_page_is_short_and_says_what_to_fill_in_and_what_was_run(page):
  lines = page.read_text().splitlines()
  assert len(lines) <= 60 and max(map(len, lines)) <= 110
  head = [line for line in lines[:20] if line.startswith('#')]
  assert any('To fill in:' in line for line in head)
  assert any(re.search(r'\bRun:', line) for line in head)


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_has_nothing_to_say(script):
  beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
  program = shutil.which('shellcheck', path=beside)
  assert program, "pip install -e '.[test]'"
  done = subprocess.run(
    [program, '--external-sources', '--source-path=SCRIPTDIR', str(script)],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 0, done.stdout


def _object(required=(), **properties):
  """A JSON schema of an object that has no other fields."""
  return {
    'type': 'object',
    'properties': properties,
    'required': [*required],
    'additionalProperties': False,
  }


NAME = {'type': 'string', 'pattern': '^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$'}
COUNT = {'type': 'integer', 'minimum': 0}
TEXTS = {'type': 'array', 'items': {'type': 'string'}, 'minItems': 1}
STRINGS = {'type': 'object', 'additionalProperties': {'type': 'string'}}
# The fields of jobset.x-k8s.io/v1alpha2 that a page may need, as its API's reference has
# them; those of Kubernetes itself are looked at by kubernetes_validate.
JOBSET = _object(
  ('apiVersion', 'kind', 'metadata', 'spec'),
  apiVersion={'const': 'jobset.x-k8s.io/v1alpha2'},
  kind={'const': 'JobSet'},
  metadata=_object(
    ('name',),
    name=NAME,
    labels=STRINGS,
    annotations=STRINGS,
  ),
  spec=_object(
    ('replicatedJobs',),
    ttlSecondsAfterFinished=COUNT,
    suspend={'type': 'boolean'},
    network=_object(
      enableDNSHostnames={'type': 'boolean'},
      subdomain=NAME,
      publishNotReadyAddresses={'type': 'boolean'},
    ),
    successPolicy=_object(
      ('operator',), operator={'enum': ['All', 'Any']}, targetReplicatedJobs=TEXTS
    ),
    failurePolicy=_object(
      maxRestarts=COUNT,
      restartStrategy={'enum': ['Recreate', 'BlockingRecreate']},
      rules={
        'type': 'array',
        'items': _object(
          ('action',),
          name={'type': 'string', 'pattern': '^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$'},
          action={
            'enum': ['FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts']
          },
          onJobFailureReasons={
            'type': 'array',
            'items': {
              'enum': [
                *('BackoffLimitExceeded', 'DeadlineExceeded', 'FailedIndexes'),
                *('MaxFailedIndexesExceeded', 'PodFailurePolicy'),
              ]
            },
          },
          targetReplicatedJobs=TEXTS,
        ),
      },
    ),
    replicatedJobs={
      'type': 'array',
      'minItems': 1,
      'items': _object(
        ('name', 'template'),
        name=NAME,
        replicas=COUNT,
        template=_object(('spec',), metadata={'type': 'object'}, spec={'type': 'object'}),
      ),
    },
  ),
)


@pytest.fixture
def jobset():
  return yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())


@pytest.fixture
def of_xpk():
  return yaml.safe_load((ROOT / 'tests' / 'golden' / 'xpk_jobset.yaml').read_text())


def _job(jobset):
  """The Job that the controller makes of it."""
  [replicated] = jobset['spec']['replicatedJobs']
  return {
    'apiVersion': 'batch/v1',
    'kind': 'Job',
    'metadata': {'name': f'{jobset["metadata"]["name"]}-{replicated["name"]}-0'},
    **replicated['template'],
  }


def _container(jobset):
  [container] = _job(jobset)['spec']['template']['spec']['containers']
  return container


@pytest.mark.parametrize('version', ['1.29', kubernetes_validate.latest_version()])
def test_kubernetes_takes_the_job(jobset, version):
  kubernetes_validate.validate(_job(jobset), version, strict=True)
  _container(jobset)['comand'] = ['sh']
  with pytest.raises(kubernetes_validate.ValidationError):
    kubernetes_validate.validate(_job(jobset), version, strict=True)


def test_the_controller_takes_the_jobset_and_so_does_it_that_of_xpk(jobset, of_xpk):
  for each in (jobset, of_xpk):
    jsonschema.validate(each, JOBSET)
  policy = jobset['spec']['failurePolicy']
  for name, value in {
    'maxRestart': 3,
    'maxRestarts': '3',
    'restartStrategy': 'All',
  }.items():
    jobset['spec']['failurePolicy'] = policy | {name: value}
    with pytest.raises(jsonschema.ValidationError):
      jsonschema.validate(jobset, JOBSET)


def _restarts(jobset, code):
  """Whether pods are started again after a container left with a code (not 0)."""
  spec = _job(jobset)['spec']
  assert spec['backoffLimit'] == 0 and jobset['spec']['failurePolicy']['maxRestarts'] > 0
  reason = 'BackoffLimitExceeded'
  for rule in spec['podFailurePolicy']['rules']:
    codes = rule['onExitCodes']
    assert codes['containerName'] == _container(jobset)['name']
    if (code in codes['values']) == (codes['operator'] == 'In'):
      reason = {'FailJob': 'PodFailurePolicy'}[rule['action']]
      break
  for rule in jobset['spec']['failurePolicy']['rules']:
    if reason in rule['onJobFailureReasons']:
      return rule['action'] != 'FailJobSet'
  return True


@pytest.mark.parametrize('code', [*AGAIN, *NEVER])
def test_a_cluster_tries_again_what_may_be_tried_again(jobset, of_xpk, code):
  assert _restarts(jobset, code) == (code in AGAIN)
  assert _restarts(of_xpk, code) == (code in AGAIN)


def test_pods_have_a_place_each_and_time_to_save(jobset, of_xpk):
  spec, theirs = _job(jobset)['spec'], _job(of_xpk)['spec']
  assert spec['completionMode'] == 'Indexed'
  for name in ('parallelism', 'completions', 'backoffLimit'):
    assert spec[name] == theirs[name]
  pod, their_pod = (each['template']['spec'] for each in (spec, theirs))
  for name in ('restartPolicy', 'nodeSelector', 'terminationGracePeriodSeconds'):
    assert pod[name] == their_pod[name]
  assert pod['terminationGracePeriodSeconds'] > 120
  limits = [_container(each)['resources']['limits'] for each in (jobset, of_xpk)]
  assert limits[0] == limits[1]


def test_a_pod_runs_train_with_flags_that_it_has(jobset):
  container = _container(jobset)
  python, *command = container['command']
  assert (python, *command[:2]) == ('python', '-m', 'glm_jax.train')
  flags = cli.parse(train._flags(), [*command[2:], *container['args']])
  assert flags.multiprocess and flags.gin_file == ['RUN.gin']
  assert flags.bindings == ["MODEL_DIR='gs://BUCKET/runs/a'"]


STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys
folder = pathlib.Path(os.environ['STAND_IN'])
with open(folder / 'calls.jsonl', 'a') as calls:
  calls.write(json.dumps(sys.argv[1:]) + '\\n')
answers = json.loads((folder / 'answers.json').read_text())
mine = answers.get(sys.argv[4], [['', 0]])
said, code = mine.pop(0) if len(mine) > 1 else mine[0]
(folder / 'answers.json').write_text(json.dumps(answers))
print(said)
sys.exit(code)
"""


class _Cloud:
  """A gcloud that answers as it is told, and writes down what it was asked."""

  def __init__(self, folder):
    self.folder = folder
    self.program('gcloud', STAND_IN)

  def program(self, name, text):
    path = self.folder / name
    path.write_text(text)
    path.chmod(0o755)

  def run(self, *arguments, states, ssh, **more):
    """The page's exit code and the verbs that it used, in order."""
    answers = {'list': [[state, 0] for state in states], 'ssh': ssh}
    (self.folder / 'answers.json').write_text(json.dumps(answers))
    variables = {
      'PATH': f'{self.folder}:{os.environ["PATH"]}',
      'STAND_IN': str(self.folder),
      'PROJECT': 'p',
      'ZONE': 'us-central2-b',
      'TPU': 'glm',
      'ACCELERATOR': 'v4-32',
      'IMAGE': 'us-docker.pkg.dev/p/r/glm_jax:tpu',
      'POLL_SECONDS': '0',
    }
    done = subprocess.run(
      ['bash', str(LAUNCH / 'tpu_pod.sh'), *arguments],
      env=os.environ | variables | more,
      capture_output=True,
      text=True,
      timeout=120,
    )
    return done.returncode, [call[3] for call in self.calls()]

  def calls(self):
    lines = (self.folder / 'calls.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def cloud(tmp_path):
  return _Cloud(tmp_path)


def _left(*codes):
  """What ssh to all hosts says and leaves with: gcloud's code is the first bad one."""
  said = '\n'.join(f'glm_jax left with {code}' for code in codes if code is not None)
  lost = [255 if code is None else code for code in codes]
  return [said, next((code for code in lost if code), 0)]


@pytest.mark.parametrize(
  'states,ssh,code,verbs',
  [
    (
      ['', 'WAITING_FOR_RESOURCES', 'ACTIVE'],
      [_left(0, 0)],
      0,
      'list create list list ssh delete',
    ),
    (['ACTIVE'], [_left(42, 42), _left(0, 0)], 0, 'list ssh list ssh delete'),
    (['ACTIVE'], [_left(134, 137), _left(0, 0)], 0, 'list ssh list ssh delete'),
    (['ACTIVE'], [_left(65, 65)], 65, 'list ssh delete'),
    # The code of the first host is what gcloud leaves with.
    (['ACTIVE'], [_left(134, 70)], 70, 'list ssh delete'),
    (['ACTIVE'], [_left(1, 42)], 1, 'list ssh delete'),
    (['FAILED'], [_left(0)], 69, 'list delete'),
    # Taken away in the middle: ssh finds nobody, and another slice is asked for.
    (
      ['ACTIVE', 'SUSPENDING', 'SUSPENDED', '', 'ACTIVE'],
      [_left(None, 42), _left(0, 0)],
      0,
      'list ssh list list delete list create list ssh delete',
    ),
    # A host that is gone each time is not waited for for ever; 42 is no such time.
    (
      ['ACTIVE'],
      [_left(0, None), _left(42, None), _left(None, None), _left(None, 0)],
      75,
      'list ssh list ssh list ssh list ssh delete',
    ),
  ],
)
def test_a_slice_is_asked_for_and_the_run_goes_on_while_it_may(
  cloud, states, ssh, code, verbs
):
  assert cloud.run(states=states, ssh=ssh, MOST_DEATHS='2') == (code, verbs.split())


def test_what_the_cloud_is_asked_for(cloud):
  cloud.run('--gin_file=a.gin', states=['', 'ACTIVE'], ssh=[_left(0)])
  calls = {call[3]: call for call in cloud.calls()}
  for call in calls.values():
    assert {'--project=p', '--zone=us-central2-b', '--quiet'} <= {*call}
  assert calls['create'][:5] == ['compute', 'tpus', 'queued-resources', 'create', 'glm']
  assert {'--node-id=glm', '--accelerator-type=v4-32', '--spot'} <= {*calls['create']}
  assert calls['ssh'][:5] == ['compute', 'tpus', 'tpu-vm', 'ssh', 'glm']
  assert '--worker=all' in calls['ssh']
  assert '--force' in calls['delete']


def test_a_reserved_slice_stays_if_it_is_to_be_kept(cloud):
  more = {'OPTIONS': '--reserved --internal-ips', 'KEEP': '1'}
  code, verbs = cloud.run(states=['', 'ACTIVE'], ssh=[_left(0)], **more)
  assert code == 0 and 'delete' not in verbs
  create = next(call for call in cloud.calls() if call[3] == 'create')
  assert {'--reserved', '--internal-ips'} <= {*create} and '--spot' not in create


@pytest.mark.parametrize('missing', ['PROJECT', 'ZONE', 'TPU', 'ACCELERATOR', 'IMAGE'])
def test_what_is_not_filled_in_is_named(cloud, missing):
  variables = dict.fromkeys(('PROJECT', 'ZONE', 'TPU', 'ACCELERATOR', 'IMAGE'), 'x')
  variables.pop(missing)
  environment = {k: v for k, v in os.environ.items() if k not in variables and k != missing}
  done = subprocess.run(
    ['bash', str(LAUNCH / 'tpu_pod.sh')],
    env=environment | variables | {'PATH': f'{cloud.folder}:{os.environ["PATH"]}'},
    capture_output=True,
    text=True,
  )
  assert done.returncode and missing in done.stderr
  assert not (cloud.folder / 'calls.jsonl').exists()


@pytest.mark.parametrize('code', [0, 42, 65, 137])
def test_a_host_gives_train_what_was_given_to_the_page(cloud, code):
  """Its shell, with a `sudo` that writes down what it was to do."""
  arguments = [
    '--gin_file=my runs/a.gin',
    "--gin.MODEL_DIR='gs://b/a'",
    '--gin.X="$HOME `ls` \'"',
  ]
  cloud.run(*arguments, states=['ACTIVE'], ssh=[_left(0)])
  [ssh] = [call for call in cloud.calls() if call[3] == 'ssh']
  [command] = [
    each.removeprefix('--command=') for each in ssh if each.startswith('--command=')
  ]
  (cloud.folder / 'answers.json').write_text(json.dumps({}))
  cloud.program(
    'sudo',
    f"""#!{sys.executable}
import json, os, sys
with open({str(cloud.folder / 'on_host.jsonl')!r}, 'a') as calls:
  calls.write(json.dumps(sys.argv[1:]) + '\\n')
sys.exit({code} if sys.argv[2] == 'run' else 1 if sys.argv[2] in ('stop', 'rm') else 0)
""",
  )
  done = subprocess.run(
    ['sh', '-c', command],
    env=os.environ | {'PATH': f'{cloud.folder}:{os.environ["PATH"]}'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == code and f'glm_jax left with {code}' in done.stdout.splitlines()
  calls = [json.loads(line) for line in (cloud.folder / 'on_host.jsonl').open()]
  assert [call[1] for call in calls] == ['stop', 'rm', 'auth', 'pull', 'run']
  image = calls[-1].index('us-docker.pkg.dev/p/r/glm_jax:tpu')
  flags = cli.parse(train._flags(), calls[-1][image + 1 :])
  assert flags.multiprocess and flags.gin_file == ['my runs/a.gin']
  assert flags.bindings == ["MODEL_DIR='gs://b/a'", 'X="$HOME `ls` \'"']
  assert calls[2][2:4] == ['configure-docker', 'us-docker.pkg.dev']


def _instructions():
  """(word, rest) of each line of the Dockerfile."""
  text = (LAUNCH / 'Dockerfile').read_text().replace('\\\n', ' ')
  lines = [line for line in text.splitlines() if line and not line.startswith('#')]
  return [tuple(line.split(maxsplit=1)) for line in lines]


@pytest.mark.parametrize('accelerator', ['tpu', 'gpu'])
def test_an_image_is_made_of_files_that_are_here(accelerator):
  instructions = _instructions()
  assert instructions[0][0] == 'FROM' and re.fullmatch(
    r'python:3\.1[123]-slim', instructions[0][1]
  )
  assert ('ARG', 'ACCELERATOR=tpu') in instructions
  copied = [
    path for word, rest in instructions if word == 'COPY' for path in rest.split()[:-1]
  ]
  assert copied and all((ROOT / path).exists() for path in copied)
  required = [
    path.replace('${ACCELERATOR}', accelerator)
    for word, rest in instructions
    if word == 'RUN'
    for path in re.findall(r'-r (\S+)', rest)
  ]
  assert f'launch/requirements/{accelerator}.txt' in required
  for path in required:
    assert (ROOT / path).is_file()
    assert any(path == each or path.startswith(f'{each}/') for each in copied)


@pytest.mark.slow
def test_what_is_copied_installs_and_trains(tmp_path):
  """The image's last steps, with the libraries that are here: an environment of its own."""
  work, environment = tmp_path / 'glm_jax', tmp_path / 'venv'
  subprocess.run(
    [sys.executable, '-m', 'venv', '--system-site-packages', environment], check=True
  )
  # An environment does not see the packages of one that it was made in.
  [site] = environment.glob('lib/*/site-packages')
  (site / 'here.pth').write_text(
    '\n'.join(path for path in sys.path if 'site-packages' in path)
  )
  variables = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
  variables |= {'PATH': f'{environment}/bin:{os.environ["PATH"]}', 'JAX_PLATFORMS': 'cpu'}
  entry = None
  for word, rest in _instructions():
    if word == 'COPY':
      *sources, to = rest.split()
      for source in (ROOT / path for path in sources):
        if source.is_dir():
          shutil.copytree(source, work / to)
        else:
          (work / to).mkdir(parents=True, exist_ok=True)
          shutil.copy(source, work / to)
    elif word == 'RUN' and ' -r ' not in rest:
      subprocess.run(['sh', '-c', rest], cwd=work, env=variables, check=True)
    elif word == 'ENTRYPOINT':
      entry = json.loads(rest)
  # From elsewhere: what was installed must do without the folder.
  run = lambda *flags: subprocess.run(
    [*entry, *flags], cwd=tmp_path, env=variables, capture_output=True, text=True
  )
  done = run('--help')
  assert done.returncode == 0 and '--multiprocess' in done.stdout, done.stderr
  done = run('--gin_file=gin_configs/quickstart.gin', '--gin.NO_SUCH=1')
  assert done.returncode == 65 and 'NO_SUCH' in done.stderr
  where = 'import glm_jax; print(glm_jax.__file__)'
  done = subprocess.run(
    [*entry[:1], '-c', where], cwd=tmp_path, env=variables, capture_output=True, text=True
  )
  assert str(site) in done.stdout
