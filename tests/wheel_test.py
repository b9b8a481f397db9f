"""The package as a wheel: what is in it, and what an empty folder can do with only that."""

import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import runs
from commands import ROOT, TINY, command, environment, gin, refused

from glm_jax import gin_files

# All that a build may read, as launch/Dockerfile copies it.
SOURCES = ('glm_jax', 'gin_configs', 'launch/requirements', 'pyproject.toml')
SOURCES += ('requirements.txt', 'README.md', 'LICENSE')
# A gin file of one's own, as the pages show it.
PAGES = ('README.md', 'launch/README.md')
EXAMPLE = next(
  block
  for page in PAGES
  for block in re.findall(r'```gin\n(.*?)```', (ROOT / page).read_text(), re.DOTALL)
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Built in a copy: setuptools leaves folders there, which the next build would take."""
  pytest.importorskip('setuptools', minversion='77')
  folder = tmp_path_factory.mktemp('wheel')
  for name in SOURCES:
    source, copy = ROOT / name, folder / 'source' / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
      shutil.copytree(source, copy, ignore=shutil.ignore_patterns('__pycache__', '.*'))
    else:
      shutil.copy(source, copy)
  build = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation']
  build += ['--no-index', '--wheel-dir', str(folder), str(folder / 'source')]
  done = subprocess.run(build, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  (path,) = folder.glob('*.whl')
  return path


@pytest.fixture(scope='module')
def site(wheel, tmp_path_factory):
  """What pip makes of it, where no other file of this repository is near."""
  folder = tmp_path_factory.mktemp('site')
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder)
  return folder


def test_a_wheel_has_every_file_of_the_package_and_no_other(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    (metadata,) = (name for name in names if name.endswith('.dist-info/METADATA'))
    about = archive.read(metadata).decode()
  packed = {name for name in names if '.dist-info/' not in name}
  files = {
    path.relative_to(ROOT).as_posix()
    for folder in ('glm_jax', 'gin_configs')
    for path in (ROOT / folder).rglob('*')
    if path.is_file() and '__pycache__' not in path.parts and path.name[0] != '.'
  }
  assert packed == files
  assert {'glm_jax/performance/calibration.json', 'gin_configs/runs/sft.gin'} <= packed
  requirements = (ROOT / 'requirements.txt').read_text()
  for name in re.findall(r'^([\w-]+)', requirements, re.MULTILINE):
    assert f'Requires-Dist: {name}' in about, name
  for extra in ('tpu', 'gpu', 'plan', 'gcs'):
    assert f'Provides-Extra: {extra}' in about


def _done(site, folder, module, *arguments):
  done = command(module, *arguments, cwd=folder, PYTHONPATH=str(site))
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def test_an_empty_folder_has_the_wheels_gin_files(site, tmp_path):
  listed = _done(site, tmp_path, 'fields', 'gin_configs').splitlines()
  assert listed[0] == f'gin_configs: for --gin_file and include, in {site}.'
  assert [line.split('  ')[0] for line in listed[1:]] == gin_files.packaged()
  # What reads files of the package besides: sizes of released models, and of chips.
  where = ('--released=chatglm9', '--platform=cpu')
  done = command('plan', *where, cwd=tmp_path, PYTHONPATH=str(site))
  refused(done, 'chatglm9', 'chatglm3-6b')
  code = 'from glm_jax.performance import chips; print(*chips.calibrations())'
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=tmp_path,
    env=environment(PYTHONPATH=str(site)),
    capture_output=True,
    text=True,
  )
  assert 'v5p' in done.stdout, done.stderr
  assert not [*tmp_path.iterdir()]


def test_training_and_generation_in_an_empty_folder(site, tmp_path):
  """The package's run, and one's own file, which includes the package's."""
  text = tmp_path / 'my_text'
  text.mkdir()
  runs.write_words(text, 24)
  flags = gin(*TINY, "CorpusConfig.cache_dir='cache'")
  ours = 'gin_configs/glm_tiny.gin'
  own = gin("CorpusConfig.corpus='my_text/*.txt'")
  said = _done(site, tmp_path, 'train', f'--gin_file={ours}', *flags, *own)
  assert said.splitlines()[0] == f"{ours}: the package's own, {site / ours}"
  assert 'done: 2 steps in runs/glm_tiny' in said
  (tmp_path / 'mine.gin').write_text(EXAMPLE)
  said = _done(site, tmp_path, 'train', '--gin_file=mine.gin', *flags)
  assert "package's own" not in said and 'done: 2 steps in runs/mine' in said
  prompt = ('--checkpoint=runs/mine', '--prompt=a [MASK] b', '--max_new_tokens=4')
  said = _done(site, tmp_path, 'generate', *prompt)
  assert said.startswith('a') and said.endswith(' b\n')
