"""The command `generate`: prompts from a flag, a file, a pipe, a terminal; its refusals."""

import io
import json
import sys

import pytest
import stored
from commands import in_process, refused, snapshot

from glm_jax.inference import prompt_files

PROMPTS = [f'one [MASK] two {i} [MASK]' for i in range(6)]
SAMPLED = (
  '--samples=2',
  '--temperature=1',
  '--max_new_tokens=5',
  '--seed=3',
  '--batch_size=4',
)


@pytest.fixture(scope='session')
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp('generate') / 'glm'
  return stored.checkpoint(folder, stored.FAMILIES['glm'])


@pytest.fixture
def generate(checkpoint, tmp_path):
  """The command, in a folder with prompts.txt and prompts.jsonl."""
  (tmp_path / 'prompts.txt').write_text('\n'.join(PROMPTS) + '\n')
  lines = [json.dumps({'prompt': p, 'id': i}) for i, p in enumerate(PROMPTS)]
  (tmp_path / 'prompts.jsonl').write_text('\n'.join(lines))

  def run(*arguments):
    return in_process('generate', f'--checkpoint={checkpoint}', *arguments, cwd=tmp_path)

  return run


def _read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def _ok(done):
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_a_file_is_answered_in_its_order_and_keeps_its_fields(generate, tmp_path):
  said = _ok(generate('--input=prompts.jsonl', '--output=answers.jsonl', *SAMPLED))
  assert said == '12 answers to 6 prompts: answers.jsonl\n'
  answers = _read(tmp_path / 'answers.jsonl')
  assert [(a['number'], a['sample']) for a in answers] == [
    (n, s) for n in range(6) for s in range(2)
  ]
  for answer in answers:
    n = answer['number']
    assert answer['id'] == n and answer['prompt'] == PROMPTS[n]
    first, second = answer['spans']
    assert answer['text'] == f'one{first} two {n}{second}'
    assert answer['log_prob'] < 0
  # The same from text, in rows of another number, printed.
  printed = _ok(generate('--input=prompts.txt', '--batch_size=2', *SAMPLED)).splitlines()
  texts = {(a['number'], a['sample']): a['text'] for a in map(json.loads, printed)}
  assert texts == {(a['number'], a['sample']): a['text'] for a in answers}
  # And from a flag, of the first prompt.
  printed = _ok(generate(f'--prompt={PROMPTS[0]}', *SAMPLED))
  assert printed == f'{texts[0, 0]}\n{texts[0, 1]}\n'


def test_an_interrupted_file_goes_on(generate, tmp_path, monkeypatch):
  flags = ('--input=prompts.txt', *SAMPLED)
  _ok(generate(*flags, '--output=straight.jsonl'))
  add, count = prompt_files.Answers.add, 0

  def interrupted(self, line):
    nonlocal count
    count += 1
    if count % 5 == 0:  # in the middle of a line
      self._file.write(line.encode()[:20])
      raise KeyboardInterrupt
    add(self, line)

  monkeypatch.setattr(prompt_files.Answers, 'add', interrupted)
  output = (*flags, '--output=answers.jsonl')
  for kept in (4, 8):
    assert generate(*output).returncode == 130
    content = (tmp_path / 'answers.jsonl').read_text()
    assert content.count('\n') == kept and not content.endswith('\n')
  # Neither other flags, nor other prompts, nor another checkpoint go on with it.
  before = snapshot(tmp_path)
  refused(generate(*output, '--top_k=3'), 'made otherwise', 'top_k 3 (was 0)')
  refused(generate('--input=prompts.jsonl', *output[1:]), 'made otherwise', 'prompts')
  assert snapshot(tmp_path) == before
  said = _ok(generate(*output))
  assert said == '12 answers to 6 prompts (8 were there): answers.jsonl\n'
  # Sums of other batches differ in their last bits.
  pairs = zip(
    _read(tmp_path / 'answers.jsonl'), _read(tmp_path / 'straight.jsonl'), strict=True
  )
  for answer, straight in pairs:
    assert answer.pop('log_prob') == pytest.approx(straight.pop('log_prob'), abs=1e-3)
    assert answer == straight
  # Whoever has all of them is told so, and nothing changes.
  before = snapshot(tmp_path)
  assert '(12 were there)' in _ok(generate(*output))
  assert snapshot(tmp_path) == before


def test_another_checkpoint_does_not_go_on(generate, tmp_path):
  flags = ('--input=prompts.txt', '--output=answers.jsonl', '--max_new_tokens=3')
  _ok(generate(*flags))
  stored.checkpoint(tmp_path / 'other', stored.FAMILIES['glm'], seed=1)
  done = generate(*flags, f'--checkpoint={tmp_path}/other')
  refused(done, 'made otherwise', 'checkpoint')


def test_lines_of_a_pipe_are_prompts(generate, monkeypatch):
  content = f'{PROMPTS[0]}\r\n{PROMPTS[1]}\n'.encode()
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content)))
  said = _ok(generate('--max_new_tokens=4'))
  alone = [_ok(generate(f'--prompt={p}', '--max_new_tokens=4')) for p in PROMPTS[:2]]
  assert said == ''.join(alone)
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'a [MASK]\nb\n')))
  refused(generate(), 'stdin:2: the prompt must hold a blank')


def test_whoever_sits_at_the_terminal_is_asked(generate, monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  monkeypatch.setattr(sys, 'stdin', Terminal(f'no blank\n\n{PROMPTS[0]}\n'))
  done = generate('--max_new_tokens=4')
  alone = _ok(generate(f'--prompt={PROMPTS[0]}', '--max_new_tokens=4'))
  assert alone in _ok(done) and done.stdout.count('> ') == 4
  assert done.stderr.startswith('error: the prompt must hold a blank')
  assert done.stderr.count('\n') == 1


def test_a_stop_string_ends_what_is_printed(generate):
  whole = _ok(generate('--prompt=tell [gMASK]', '--min_new_tokens=20'))
  stop = whole[8:10]
  cut = _ok(
    generate('--prompt=tell [gMASK]', '--stop_strings=never said', f'--stop_strings={stop}')
  )
  assert cut == whole[: whole.index(stop, 4)] + '\n'


@pytest.mark.parametrize(
  'name,content,words',
  [
    ('a.txt', b'a [MASK]\n\nb [MASK]\n', 'a.txt:2 must hold a prompt'),
    ('a.txt', b'a [MASK]\n  \n', 'a.txt:2 must hold a prompt'),
    ('a.txt', b'a [MASK]\n\xff [MASK]', 'a.txt:2 must be UTF-8 text'),
    ('a.txt', b'a [MASK]\nb', 'a.txt:2: the prompt must hold a blank'),
    ('a.txt', b'a [MASK]\n[MASK]' + b'x' * 90, 'a.txt:2: a prompt must have at most 81'),
    ('a.txt', b'', 'a.txt must hold a prompt, got an empty file'),
    ('a.jsonl', b'{"prompt": "[MASK]"}\n{"prompt": "[MA', 'a.jsonl:2 must be a line of'),
    ('a.jsonl', b'{"prompt": "[MASK]"}\n\n', 'a.jsonl:2 must hold a prompt'),
    ('a.jsonl', b'["[MASK]"]', 'a.jsonl:1 must hold a prompt {"prompt": TEXT}'),
    ('a.jsonl', b'{"text": "[MASK]"}', 'a.jsonl:1 must hold a prompt {"prompt": TEXT}'),
    ('a.jsonl', b'{"prompt": 3}', 'a.jsonl:1 must hold a prompt {"prompt": TEXT}'),
    ('a.jsonl', b'{"prompt": "[MASK]", "text": ""}', 'a.jsonl:1 must leave the names'),
    ('a.jsonl', b'{"prompt": "\\ud800 [MASK]"}', 'a.jsonl:1 must be a line of JSON'),
    ('a.jsonl', b'[' * 100_000, 'a.jsonl:1 must be a line of JSON'),
    ('a.jsonl', b'{"prompt": "[MASK]", "n": ' + b'1' * 5000 + b'}', 'a.jsonl:1 must be'),
    ('a.csv', b'a [MASK]', 'must be there and end in one of'),
  ],
)
def test_a_broken_file_is_refused_with_its_line(generate, tmp_path, name, content, words):
  (tmp_path / name).write_bytes(content)
  before = snapshot(tmp_path)
  refused(generate(f'--input={name}', '--output=answers.jsonl'), words)
  assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
  'arguments,words',
  [
    ('--samples=0', 'samples must be 1 or more'),
    ('--samples=2', 'must have a temperature above 0'),
    ('--stop_strings=', 'must hold some text'),
    ('--min_new_tokens=9 --max_new_tokens=8', 'min_new_tokens must be in 0 .. 8'),
    ('--max_new_tokens=0', 'max_new_tokens must be 1 or more'),
    ('--max_new_tokens=81', 'max_new_tokens must be in 1 .. 80'),
    ('--min_p=2', 'Sampling.min_p must be in'),
    ('--repetition_penalty=0', 'Sampling.repetition_penalty must be positive'),
    ('--num_beams=2 --temperature=1', 'beam search must be without temperature'),
    ('--num_beams=2 --stop_strings=x', 'and stop strings'),
    ('--num_beams=2 --samples=2', 'one answer a prompt'),
    ('--num_beams=0', 'num_beams must be 1 or more'),
    ('--batch_size=0', '--batch_size must be 1 or more'),
    ('--cache_dtype=int4', '--cache_dtype must be one of'),
    ('--prompt=[MASK]', 'from one place'),
    ('--output=answers.txt', '--output must end in .jsonl'),
    ('--output=nowhere/answers.jsonl', 'in a folder that exists'),
    ('--output=prompts.jsonl', '--output must not exist'),
    ('--input=nowhere.txt', 'must be there'),
    ('--input=gs://bucket/a.txt', '--input must be a path on this machine'),
    ('--checkpoint=.', 'a checkpoint must be a folder with params and meta'),
  ],
)
def test_what_cannot_be_is_refused(generate, tmp_path, arguments, words):
  before = snapshot(tmp_path)
  given = ('--input=prompts.txt', '--output=answers.jsonl', *arguments.split())
  refused(generate(*given), words)
  assert snapshot(tmp_path) == before
  assert not (tmp_path / 'answers.jsonl').exists()


def test_answers_of_something_else_are_left_alone(generate, tmp_path):
  flags = ('--input=prompts.txt', '--output=answers.jsonl', '--max_new_tokens=3')
  _ok(generate(*flags))
  answers = tmp_path / 'answers.jsonl'
  answers.write_text('{"number": 0, "sample": 0}\nsomebody wrote this\n')
  before = snapshot(tmp_path)
  refused(generate(*flags), 'answers.jsonl:2 must be an answer of this command')
  assert snapshot(tmp_path) == before


def test_two_commands_do_not_write_one_file(tmp_path):
  first = prompt_files.Answers(tmp_path / 'a.jsonl', {'seed': 0})
  second = prompt_files.Answers(tmp_path / 'a.jsonl', {'seed': 0})
  with first:
    first.add('{"number": 0, "sample": 0}\n')
    with pytest.raises(ValueError, match='which another one is writing'), second:
      pass
  again = prompt_files.Answers(tmp_path / 'a.jsonl', {'seed': 0})
  assert again.done == {(0, 0)}
