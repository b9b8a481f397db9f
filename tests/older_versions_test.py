"""What version 0.1.0 wrote and read: its run, its checkpoint, and its first batches."""

import hashlib
import itertools
import json
import pathlib
import re
import tarfile

import pytest
from commands import command, gin, in_process, refused, snapshot
from etils import epath
from safetensors.numpy import load_file

from glm_jax import convert, generate, recipes
from glm_jax.data import pipeline, prepare
from glm_jax.data.corpora import parts
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.making import shard_job, shard_runner
from glm_jax.text.vocabulary import ByteVocabulary

GOLDEN = pathlib.Path(__file__).parent / 'golden' / 'version_0_1_0'
EXPECTED = json.loads((GOLDEN / 'expected.json').read_text())


def _unpacked(name, folder):
  with tarfile.open(GOLDEN / f'{name}.tar.gz') as archive:
    archive.extractall(folder, filter='data')
  return folder / name


def test_its_checkpoint_generates_and_goes_back_to_the_same_tensors(tmp_path, capsys):
  checkpoint = _unpacked('checkpoint', tmp_path)
  prompt = 'the quick brown fox'
  generate.main([f'--checkpoint={checkpoint}', f'--prompt={prompt}', '--max_new_tokens=12'])
  assert capsys.readouterr().out == EXPECTED['continued']
  convert.main([str(checkpoint), str(tmp_path / 'exported'), '--to=chatglm2'])
  tensors, digest = load_file(tmp_path / 'exported' / 'model.safetensors'), hashlib.sha256()
  for name in sorted(tensors):
    digest.update(name.encode() + tensors[name].tobytes())
  assert digest.hexdigest() == EXPECTED['exported']


def test_its_run_fills_the_same_blanks(tmp_path, capsys):
  run = _unpacked('run', tmp_path)
  prompt = 'Document 5 says [MASK] words, and [MASK] more.'
  generate.main([f'--checkpoint={run}', f'--prompt={prompt}', '--max_new_tokens=6'])
  assert capsys.readouterr().out == EXPECTED['filled']


@pytest.mark.slow
def test_its_run_is_refused_in_a_line_and_another_begins_with_it(tmp_path):
  """Its gin file has old names, and of its few documents others are held out today."""
  run = _unpacked('run', tmp_path)
  config = run / 'config.gin'
  flags = [f'--gin_file={config}', *gin('TrainConfig.log_every=1')]
  before = snapshot(run)
  done = in_process('train', *flags, cwd=tmp_path)
  refused(done, 'must have its name of today', 'Pretraining.task', 'ComputeConfig.dtype')
  assert snapshot(run) == before
  # As the message says.
  text = config.read_text() + '\n'.join(recipes.WIRED.values()) + '\n'
  for old, new in recipes.MOVED.items():
    text = re.sub(rf'^{old}\b', new, text, flags=re.MULTILINE)
  config.write_text(text)
  before = snapshot(run)
  refused(in_process('train', *flags, cwd=tmp_path), 'data was', 'is now')
  assert snapshot(run) == before
  again = gin("MODEL_DIR='again'", f"TrainConfig.init_from='{run}'")
  done = command('train', *flags, *again, cwd=tmp_path)
  assert done.returncode == 0 and 'parameters from' in done.stdout, done.stderr


@pytest.fixture(scope='session')
def text(tmp_path_factory):
  """Documents of 2 to 700 bytes, a third with a prompt; no part is held out."""
  folder = tmp_path_factory.mktemp('text')
  lines = []
  for n in range(300):
    words = ' '.join(f'word{n * 7 % k}' + '.' * (n % 5 == 0) for k in range(2, 3 + n % 90))
    fields = {'text': f'Text {n}: {words}. 语言模型'}
    lines.append(fields if n % 3 else {**fields, 'prompt': f'Question {n}? '})
  content = ''.join(json.dumps(line) + '\n' for line in lines)
  for name in ('train', 'validation'):
    (folder / f'{name}.jsonl').write_text(content)
  return folder


def _digest(text, task, packed, shards):
  """SHA-256 of the first 50 batches, all of their fields."""
  lengths, config = {'tokens': 96}, ObjectiveConfig(blank=0.5, document=0.3, sentence=0.2)
  corpus = CorpusConfig(
    corpus=f'{text}/train.jsonl',
    validation=f'{text}/validation.jsonl',
    packed=packed,
    cache_dir=str(text / 'cache'),
  )
  if shards:
    vocabulary, folder = ByteVocabulary(), epath.Path(text / f'shards-{task}-{packed}')
    plan = prepare.row_plan(task, 96, config, vocabulary, packed=packed)
    todo = parts.find(corpus, parts.PART_BYTES)
    job = shard_job.of_config(corpus, vocabulary, plan, todo, count=3, imports=())
    shard_runner.run(job, folder, todo, 1)
    corpus = CorpusConfig(corpus=f'shards:{folder}', packed=packed)
  words = VocabularyConfig(path='bytes')
  prepare.prepare(task, lengths, corpus, words, config)
  stream = pipeline.batches(task, lengths, batch_size=16, seed=3)
  digest = hashlib.sha256()
  for batch in itertools.islice(stream, 50):
    for field in batch:
      digest.update(field.tobytes())
  return digest.hexdigest()


@pytest.mark.parametrize('shards', [False, True], ids=['files', 'shards'])
@pytest.mark.parametrize('packed', [False, True], ids=['stream', 'packed'])
@pytest.mark.parametrize('task', ['glm_mixture', 'glm_causal'])
def test_its_first_batches_are_the_same(text, task, packed, shards):
  name = f'{task}, {"packed" if packed else "stream"}, files'
  assert _digest(text, task, packed, shards) == EXPECTED['batches'][name]
