"""Bad input as a user meets it: one message, an exit code, nothing changed on disk."""

import pytest
from commands import TINY, command, gin, in_process, refused, snapshot


def _train(
  folder,
  *bindings,
  flags=(),
  text='text/*.txt',
  gin_file='gin_configs/glm_tiny.gin',
  run=in_process,
):
  places = [
    f"MODEL_DIR='{folder}/run'",
    f"CorpusConfig.corpus='{folder}/{text}'",
    f"CorpusConfig.cache_dir='{folder}/cache'",
  ]
  return run(
    'train',
    f'--gin_file={gin_file}',
    *flags,
    *gin(*TINY, *places, *bindings),
  )


@pytest.fixture
def corpus(tmp_path):
  folder = tmp_path / 'text'
  folder.mkdir()
  for number in range(30):
    (folder / f'{number:02}.txt').write_text(f'Document {number} says a few words. ' * 9)
  return tmp_path


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
  """A run of two steps."""
  folder = tmp_path_factory.mktemp('finished')
  (folder / 'text').mkdir()
  for number in range(30):
    (folder / 'text' / f'{number:02}.txt').write_text(f'Document {number} says words. ' * 9)
  done = _train(folder)
  assert done.returncode == 0, done.stderr
  return folder


@pytest.mark.parametrize(
  'binding,words',
  [
    ('GLMConfig.layers=3', ('layers',)),
    ('TRAIN_STEP=3', ('TRAIN_STEP', 'did you mean TRAIN_STEPS')),
    ("BATCH_SIZE='64'", ('batch_size must be int', "'64'")),
    ('TRAIN_STEPS=1e6', ('train_steps must be int', '1000000.0')),
    ('ObjectiveConfig.mask_ratio=1.5', ('mask_ratio', '1.5')),
    ('GLMConfig.num_heads=5', ('hidden_size=32', 'num_heads=5')),
  ],
)
def test_a_bad_configuration_stops_before_anything_is_read(corpus, binding, words):
  before = snapshot(corpus)
  refused(_train(corpus, binding), *words)
  assert snapshot(corpus) == before


@pytest.mark.parametrize(
  'bindings,flags,words',
  [
    (['MeshConfig.data=3'], ['--cpu_devices=2'], ('2 devices', 'data=3')),
    (['BATCH_SIZE=3'], ['--cpu_devices=2'], ('BATCH_SIZE=3', 'data x fsdp=2')),
    (
      ['MeshConfig.tensor=4', 'GLMConfig.num_heads=2'],
      ['--cpu_devices=4'],
      ('num_heads=2', 'tensor=4'),
    ),
    (['OptimizerConfig.decay_steps=1'], [], ('warmup_steps=1, decay_steps=1',)),
  ],
)
def test_what_does_not_fit_the_devices_is_refused(corpus, bindings, flags, words):
  before = snapshot(corpus)
  refused(_train(corpus, *bindings, flags=flags), *words)
  assert snapshot(corpus) == before


def test_flags_that_are_wrong_are_refused(corpus):
  refused(_train(corpus, flags=['--import=no_such_module']), 'no_such_module')
  refused(_train(corpus, gin_file='nowhere.gin'), 'nowhere.gin')
  refused(_train(corpus, flags=['--process_count=2']), 'go together')


@pytest.mark.parametrize(
  'bindings,text,words',
  [
    ([], 'nowhere/*.txt', ('matches no file', 'nowhere')),
    ([], 'empty/*.txt', ('must hold some text', 'empty')),
    ([], 'bad.txt', ('bad.txt', 'offset 5', 'CorpusConfig.errors')),
    ([], 'bad.jsonl', ('bad.jsonl line 2',)),
    (['MIXTURE_OR_TASK_NAME="glm_nothing"'], 'text/*.txt', ('glm_nothing', 'glm_mixture')),
    (['GLMConfig.max_positions=20'], 'text/*.txt', ('max_positions=20', '64 positions')),
    (['GLMConfig.vocab_size=256'], 'text/*.txt', ('vocab_size=256', '265')),
    (["TASK_FEATURE_LENGTHS={'inputs':64}"], 'text/*.txt', ("'tokens'", 'inputs')),
  ],
)
def test_bad_text_and_sizes_are_named(corpus, bindings, text, words):
  (corpus / 'empty').mkdir()
  for number in range(30):
    (corpus / 'empty' / f'{number}.txt').write_text('')
  (corpus / 'bad.txt').write_bytes(b'good \xff bad')
  (corpus / 'bad.jsonl').write_text('{"text": "x"}\nno json\n')
  before = snapshot(corpus)
  refused(_train(corpus, *bindings, text=text), *words)
  assert snapshot(corpus) == before


@pytest.mark.parametrize(
  'binding,word',
  [
    ('TrainConfig.seed=1', 'seed was 0 and is now 1'),
    ('BATCH_SIZE=8', 'batch_size was 4 and is now 8'),
    ('GLMConfig.mlp_size=64', 'model.mlp_size was 0 and is now 64'),
    ('ObjectiveConfig.mask_ratio=0.2', 'objectives.mask_ratio'),
  ],
)
def test_a_folder_of_another_run_is_refused_and_left_alone(finished, binding, word):
  before = snapshot(finished)
  refused(_train(finished, binding), 'holds a run of another configuration', word)
  assert snapshot(finished) == before


def test_a_run_with_nothing_left_to_train_says_so_and_writes_nothing(finished):
  before = snapshot(finished)
  for steps in (1, 2):
    done = _train(finished, f'TRAIN_STEPS={steps}')
    assert done.returncode == 0, done.stderr
    said = f'run is at step 2, and TRAIN_STEPS={steps}: nothing is left to train; raise'
    assert said in done.stdout and 'done:' not in done.stdout
  assert snapshot(finished) == before


def test_a_short_try_shortens_the_warmup_and_a_longer_run_says_what_changes(corpus):
  done = _train(corpus, 'OptimizerConfig.warmup_steps=20')
  assert done.returncode == 0, done.stderr
  assert 'a warm-up of 20 steps does not fit into 2: it is 0\n' in done.stdout
  longer = _train(corpus, 'OptimizerConfig.warmup_steps=20', 'TRAIN_STEPS=30')
  assert longer.returncode == 0, longer.stderr
  for line in ('decay_ends was 2 and is now 30', 'warmup_ends was 0 and is now 20'):
    assert f'from here on, schedule.{line}: the rate follows TRAIN_STEPS;' in longer.stdout
  assert 'does not fit' not in longer.stdout and 'done: 30 steps' in longer.stdout


def test_other_data_in_the_same_folder_is_refused(finished):
  path = finished / 'text' / '05.txt'
  text = path.read_text()
  path.write_text(text + 'One more sentence. ')
  before = snapshot(finished)
  try:
    refused(_train(finished), 'data was')
    assert snapshot(finished) == before
  finally:
    path.write_text(text)


def test_a_folder_with_something_else_in_it_is_refused(corpus):
  (corpus / 'run').mkdir()
  (corpus / 'run' / 'thesis.tex').write_text('years of work')
  before = snapshot(corpus)
  refused(_train(corpus), 'thesis.tex', 'choose another folder')
  assert snapshot(corpus) == before


def test_a_folder_that_cannot_be_made_is_refused(corpus):
  """Through a file, since permissions do not stop root."""
  (corpus / 'file').write_text('')
  before = snapshot(corpus)
  refused(_train(corpus, f"MODEL_DIR='{corpus}/file/run'"), 'file', code=74)
  assert snapshot(corpus) == before


def test_generation_from_a_finished_run_and_its_refusals(finished, tmp_path):
  done = command(
    'generate',
    f'--checkpoint={finished}/run',
    '--prompt=Document [MASK] words.',
    '--max_new_tokens=8',
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('Document') and done.stdout.rstrip().endswith('words.')
  for arguments, word in (
    ([f'--checkpoint={tmp_path}', '--prompt=[MASK]'], 'must be a folder'),
    ([f'--checkpoint={finished}/run', '--prompt=x'], 'hold a blank'),
    ([f'--checkpoint={finished}/run', '--prompt='], 'some text'),
    (
      [f'--checkpoint={finished}/run', '--prompt=[MASK]', '--max_new_tokens=1000'],
      'max_new_tokens',
    ),
  ):
    refused(in_process('generate', *arguments), word)


def test_an_unreadable_checkpoint_is_refused(finished, tmp_path):
  import shutil

  for number, (file, content) in enumerate(
    (('meta/metadata', '{'), ('params/_METADATA', 'broken'))
  ):
    copy = tmp_path / str(number)
    shutil.copytree(finished / 'run', copy)
    (copy / 'checkpoints' / '2' / file).write_text(content)
    refused(in_process('generate', f'--checkpoint={copy}', '--prompt=[MASK]'), 'checkpoint')


GIN = '--gin_file=gin_configs/glm_tiny.gin'


@pytest.mark.parametrize(
  'module,arguments,words',
  [
    ('train', [GIN, "--gin.MODEL_DIR='x'", '--cpu_devices=-1'], ('--cpu_devices',)),
    ('preview', [GIN, '--examples=0'], ('--examples must be in',)),
    ('generate', ['--checkpoint=nowhere', '--prompt=[MASK]'], ('must be a folder',)),
    ('convert', ['nowhere', 'out'], ('must be a folder', 'nowhere')),
    ('quantize', ['nowhere', 'out', '--bits=4'], ('must be a folder', 'nowhere')),
    ('plan', [GIN], ('--topology, or --platform=cpu',)),
    ('make_shards', [GIN, '--output_dir=out', '--shards=0'], ('--shards must be',)),
    ('tune', [GIN, '--trials=0'], ('--trials must be 1 or more',)),
  ],
)
def test_a_command_that_is_started_refuses_in_one_line(module, arguments, words, tmp_path):
  """Other refusals run in the process of the tests, which a library's noise leaves."""
  refused(command(module, *arguments, cwd=tmp_path), *words)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'module',
  [
    'train',
    'preview',
    'generate',
    'evaluate',
    'chat',
    'convert',
    'quantize',
    'plan',
    'make_shards',
    'tune',
    'fields',
  ],
)
def test_help_shows_an_example(module):
  done = in_process(module, '--help')
  assert done.returncode == 0 and f'python -m glm_jax.{module} ' in done.stdout
