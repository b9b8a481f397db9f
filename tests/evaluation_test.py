"""The command `evaluate`: its numbers, its files, its refusals."""

import csv
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import stored
import tuned
from commands import in_process, refused, snapshot

import glm_jax
from glm_jax import evaluation
from glm_jax.evaluation import language, running
from glm_jax.evaluation.task import Asker, Options
from glm_jax.inference import prompt_files
from glm_jax.inference.candidates import Asked

TEXTS = [
  'The quick brown fox jumps over the lazy dog, and the dog sleeps on. ' * 3,
  'A model of language learns words, one after the other.',
]
CHOICES = [
  ('2 + 2 = ?', '1', '2', '3', '4', 'D'),
  ('The sky is', 'blue', 'green', 'red', 'loud', 'A'),
  ('A fox is', 'a tool', 'an animal', 'a town', 'a word', 'B'),
]


def _csv(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w', newline='', encoding='utf-8') as file:
    csv.writer(file).writerows(rows)


def _jsonl(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  folder = tmp_path_factory.mktemp('evaluation')
  for family, config in stored.FAMILIES.items():
    stored.checkpoint(folder / family, config)
  _jsonl(folder / 'texts.jsonl', [{'text': text} for text in TEXTS])
  passages = [
    'the fox eats the hen',
    'a dog sees a ' + 'very ' * 20 + 'quick fox',
    'one two',
  ]
  (folder / 'passages.txt').write_text('\n'.join(passages))
  pairs = [{'prompt': f'what is {n}?', 'answer': f'it is {n}'} for n in range(5)]
  _jsonl(folder / 'pairs.jsonl', pairs)
  ids = [(i, *row) for i, row in enumerate(CHOICES)]
  for split, rows in (('test', CHOICES), ('dev', CHOICES[:1])):
    for subject in ('law', 'sea_life'):
      _csv(folder / 'mmlu' / split / f'{subject}_{split}.csv', rows)
  header = ('id', 'question', *'ABCD', 'answer')
  _csv(folder / 'ceval' / 'val' / 'law_val.csv', [header, *ids])
  header = ('', 'Question', *'ABCD', 'Answer')
  _csv(folder / 'cmmlu' / 'test' / 'law.csv', [header, *ids])
  return folder


def _run(place, family, task, data, *more):
  return in_process(
    'evaluate',
    f'--checkpoint={family}',
    f'--task={task}',
    f'--input={data}',
    *more,
    cwd=place,
  )


def _table(place, name):
  return json.loads((place / f'{name}.json').read_text())['table']


def _alone(model, question, candidate):
  """Log-probabilities of a candidate in a row of its own, by the plain forward."""
  request, c = question.request, model.config
  span = request.spans[0]
  tokens = [*request.context, span.first, *candidate]
  n, T = len(request.context), len(tokens)
  tokens += [0] * (96 - T)  # one program for all
  t = np.arange(96)
  first = np.where(t < T, np.where((t < n) | c.causal, t, span.position or 0), 0)
  block = np.where((t < n) | (t >= T) | c.causal, 0, t - n + 1)
  end = np.where(t < T, np.maximum(0 if c.causal else n, t + 1), 0)
  arrays = [jnp.asarray(x, jnp.int32)[None] for x in (tokens, first, block, 0 * t, end)]
  seen = glm_jax.batch.Visibility(*arrays[3:])
  logits = small.apply(c, model.variables, *arrays[:3], seen)
  scores = np.asarray(jax.nn.log_softmax(logits[0].astype(jnp.float32)))
  return scores[n + np.arange(len(candidate)), candidate]


@pytest.mark.slow
@pytest.mark.parametrize('family', stored.FAMILIES)
@pytest.mark.parametrize('mesh', [False, True], ids=['1 device', '8 devices'])
def test_one_context_for_all_candidates_is_a_row_for_each(place, family, mesh):
  mesh = glm_jax.MeshConfig(data=2, fsdp=2, tensor=2) if mesh else None
  model, alone = glm_jax.load(place / family, mesh=mesh), glm_jax.load(place / family)
  asker = Asker(model.config, model.vocabulary)
  texts = ['a', 'bc', 'a longer one than all', 'd', 'eee', 'ffffff']
  questions = [
    asker.question('the quick brown', texts[:count], 'here') for count in (6, 1, 2)
  ]
  questions.append(asker.question('x ' * 20, texts[1:4], 'here'))
  for question, said in zip(questions, model.reader(questions), strict=True):
    assert len(said) == len(question.candidates)
    for candidate, one in zip(question.candidates, said, strict=True):
      expected = _alone(alone, question, candidate)
      np.testing.assert_allclose(one.log_probs[:-1], expected, rtol=1e-6, atol=3e-6)


def test_greedy_tokens_are_those_that_are_generated(place):
  for family in stored.FAMILIES:
    model = glm_jax.load(place / family)
    asker = Asker(model.config, model.vocabulary)
    question = asker.question('the quick brown', ['x'], 'here')
    every = np.ones(model.config.vocab_size, bool)
    ids = []
    for _ in range(4):
      scores = [_alone(model, question, [*ids, token])[-1] for token in range(97, 101)]
      ids.append(97 + int(np.argmax(scores)))
    only = every & False
    only[97:101] = True
    [[said]] = model.reader([Asked(question.request, [ids])], only)
    assert said.greedy[:-1].all()
    [[other]] = model.reader([Asked(question.request, [[*ids[:-1], 96]])], only)
    assert other.greedy[:-1].tolist() == [True] * 3 + [False]


@pytest.mark.parametrize('family', stored.FAMILIES)
def test_windows_score_every_token_once_and_as_far_back_as_a_row_reaches(place, family):
  model = glm_jax.load(place / family)
  for options in (Options(stride=7), Options(), Options(stride=5, unidirectional=True)):
    asker = Asker(model.config, model.vocabulary, 24)
    items = [*language.Perplexity().items(place / 'texts.jsonl', asker, options)]
    for number, text in enumerate(TEXTS):
      ids, scored = model.vocabulary.encode(text), []
      windows = [i for i in items if i.fields['document'] == number]
      for item in windows:
        request, [span] = item.question
        causal = model.config.causal
        used = len(request.context) + len(span) + (0 if causal else 1)
        assert used <= 24 and (item is windows[-1] or used == 24)
        scored += span[-item.fields['tokens'] :]
      assert scored == ids
      assert [i.fields['bytes'] for i in windows] == [len(text), *[0] * (len(windows) - 1)]
  assert asker.cut == 0


@pytest.mark.slow
@pytest.mark.parametrize('family', stored.FAMILIES)
def test_perplexity_is_that_of_every_token_in_its_window(place, family):
  done = _run(
    place, family, 'perplexity', 'texts.jsonl', '--stride=9', f'--output={family}.jsonl'
  )
  assert done.returncode == 0, done.stderr
  [line] = _table(place, family)
  model = glm_jax.load(place / family)
  asker = Asker(model.config, model.vocabulary)
  items = language.Perplexity().items(place / 'texts.jsonl', asker, Options(stride=9))
  total = sum(_alone(model, i.question, i.question.candidates[0]).sum() for i in items)
  size = sum(map(len, TEXTS))
  assert line['tokens'] == line['bytes'] == size
  assert line['byte_perplexity'] == pytest.approx(math.exp(-total / size), rel=1e-5)
  words = sum(len(text.split()) for text in TEXTS)
  assert line['word_perplexity'] == pytest.approx(math.exp(-total / words), rel=1e-4)
  assert f'{line["token_perplexity"]:.4f}' in done.stdout


def test_the_last_word_is_asked_as_a_blank_or_as_what_goes_on(place):
  read = lambda model, options: [
    *language.Lambada().items(
      place / 'passages.txt', Asker(model.config, model.vocabulary), options
    )
  ]
  glm, causal = (glm_jax.load(place / family) for family in stored.FAMILIES)
  s = glm.vocabulary.specials
  question = read(glm, Options())[0].question
  text = list(b'the fox eats the')
  assert question.request.context == [s.enc, *text, s.mask, s.eos]
  assert question.candidates == [[*b' hen']]
  item = read(glm, Options(unidirectional=True))[0]
  assert item.question.request.context == [s.enc, s.gmask]
  assert item.question.candidates == [[*text, *b' hen']] and item.fields['tokens'] == 4
  question = read(causal, Options())[0].question
  assert [*question.request.context, question.request.spans[0].first] == [s.enc, *text]
  assert question.candidates == [[*b' hen']]
  # Of a passage that is too long, the beginning is left out, and it is counted.
  for options in (Options(), Options(unidirectional=True)):
    asker = Asker(glm.config, glm.vocabulary, 60)
    items = [*language.Lambada().items(place / 'passages.txt', asker, options)]
    request, [span] = items[1].question
    assert asker.cut == 1 and len(request.context) + len(span) + 1 == 60
    whole = glm.vocabulary.decode([*request.context, *span])
    assert whole.endswith('very quick fox')


@pytest.mark.slow
@pytest.mark.parametrize('task', ['mmlu', 'ceval', 'cmmlu'])
def test_choices_are_asked_as_their_authors_do(place, task):
  done = _run(place, 'chatglm2', task, task, f'--output={task}.jsonl', '--length=81')
  refused(done, 'must fit a row of 81 tokens', 'question 1')
  big = stored.checkpoint(place / f'big_{task}', _longer('chatglm2'))
  done = _run(place, big, task, task, f'--output={task}.jsonl')
  assert done.returncode == 0, done.stderr
  lines = _table(place, task)
  subjects = ['law', 'sea_life'] if task == 'mmlu' else ['law']
  assert [line['subject'] for line in lines] == [
    *subjects,
    'mean of subjects',
    'all questions',
  ]
  records = [
    json.loads(line) for line in (place / f'{task}.jsonl').read_text().splitlines()
  ]
  model = glm_jax.load(big)
  openings = {
    'mmlu': 'The following are multiple choice questions (with answers) about law.\n\n',
    'ceval': '以下是中国关于law考试的单项选择题，请选出其中的正确答案。\n\n',
    'cmmlu': '以下是关于law的单项选择题，请直接给出正确答案的选项。\n\n题目：',
  }
  ends = {'mmlu': 'Answer:', 'ceval': '答案：', 'cmmlu': '答案是：'}
  for record, (question, *choices, answer) in zip(records, CHOICES, strict=False):
    options = ''.join(f'\n{k}. {v}' for k, v in zip('ABCD', choices, strict=True))
    prompt = f'{openings[task]}{question}{options}\n{ends[task]}'
    letters = [f' {k}' if task == 'mmlu' else k for k in 'ABCD']
    expected = model.score(prompt, letters).sums
    # Here all tokens compete; those of the vocabulary alone do there.
    margins = np.array(record['log_probs']) - record['log_probs'][0]
    np.testing.assert_allclose(margins, expected - expected[0], atol=2e-5)
    assert record['answer'] == answer
    assert record['said'] == 'ABCD'[int(np.argmax(expected))]
  right = [r['said'] == r['answer'] for r in records]
  assert lines[-1]['accuracy'] == pytest.approx(100 * np.mean(right))


def _longer(family):
  import dataclasses

  return dataclasses.replace(stored.FAMILIES[family], max_positions=512)


def test_shots_stand_before_each_question(place):
  model = glm_jax.load(stored.checkpoint(place / 'shots', _longer('glm')))
  asker = Asker(model.config, model.vocabulary)
  task = evaluation.tasks()['mmlu']
  item = next(task.items(place / 'mmlu', asker, Options(shots=1)))
  text = model.vocabulary.decode(item.question.request.context, control=True)
  shot = '2 + 2 = ?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D\n\n'
  assert text.count(shot) == 1 and text.endswith('Answer:[MASK]<eos>')
  done = _run(place, 'shots', 'mmlu', 'mmlu', '--shots=2')
  refused(done, 'an example for each of --shots=2, got 1')


@pytest.mark.slow
def test_blanks_are_filled_and_prompts_answered(place):
  pytest.importorskip('sacrebleu')
  flags = ('--max_new_tokens=6', '--mask_ratios=0.2,0.6')
  _jsonl(place / 'short.jsonl', [{'text': 'a quick fox sees one dog'}] * 3)
  done = _run(place, 'glm', 'blanks', 'short.jsonl', *flags, '--output=blanks.jsonl')
  assert done.returncode == 0, done.stderr
  lines = _table(place, 'blanks')
  assert [line['ratio'] for line in lines] == ['20%', '60%'] and lines[0]['blanks'] == 3
  for record in map(json.loads, (place / 'blanks.jsonl').read_text().splitlines()):
    assert len(record['filled']) == len(record['spans'])
    whole = record['reference']
    assert all(span in whole for span in record['spans'])
  done = _run(
    place, 'glm', 'answers', 'pairs.jsonl', *flags[:1], '--output=pairs_said.jsonl'
  )
  assert done.returncode == 0, done.stderr
  [line] = _table(place, 'pairs_said')
  model = glm_jax.load(place / 'glm')
  [answer] = model.generate('what is 0?', gmask=True, max_new_tokens=6)
  first = json.loads((place / 'pairs_said.jsonl').read_text().splitlines()[0])
  assert first['answer'] == answer.spans[0].strip() and line['examples'] == 5


@pytest.mark.slow
def test_prompts_are_asked_in_a_chat_template(place):
  """As the library replies, and what was answered before is not asked again."""
  pytest.importorskip('sacrebleu')
  tuned.checkpoint(place, 'chatglm3')
  how = ('--template=own', '--max_new_tokens=5', '--batch_size=4')
  done = _run(place, 'chatglm3_base', 'answers', 'pairs.jsonl', *how, '--output=own.jsonl')
  assert done.returncode == 0, done.stderr
  said = [json.loads(line) for line in (place / 'own.jsonl').read_text().splitlines()]
  asked = [[{'role': 'user', 'content': record['prompt']}] for record in said]
  expected = glm_jax.load(place / 'chatglm3_base').reply(asked, max_new_tokens=5)
  assert [[record['answer']] for record in said] == [[a.strip()] for [a] in expected]
  # Half of it, and on.
  lines = (place / 'own.jsonl').read_text().splitlines(keepends=True)
  table = _table(place, 'own')
  (place / 'own.jsonl').write_text(''.join(lines[:2]))
  done = _run(place, 'chatglm3_base', 'answers', 'pairs.jsonl', *how, '--output=own.jsonl')
  assert done.returncode == 0 and _table(place, 'own') == table, done.stderr
  other = ('--template=glm4', *how[1:])
  refused(
    _run(place, 'chatglm3_base', 'answers', 'pairs.jsonl', *other), "'glm4' must be used"
  )


def test_a_text_keeps_what_is_not_blanked():
  words = [str(n) for n in range(50)]
  text, spans = language.blank(' '.join(words), 0.3, np.random.default_rng(1), '[MASK]')
  assert sum(len(span.split()) for span in spans) == 15
  assert text.count('[MASK]') == len(spans) and '[MASK] [MASK]' not in text
  for span in spans:
    text = text.replace('[MASK]', span, 1)
  assert text.split() == words


@pytest.mark.slow
@pytest.mark.parametrize(
  'task,data', [('perplexity', 'texts.jsonl'), ('answers', 'pairs.jsonl')]
)
def test_an_interrupted_evaluation_goes_on_to_the_same_table(
  place, task, data, monkeypatch
):
  flags = ('--batch_size=4', '--stride=9', '--max_new_tokens=4')
  assert (
    _run(place, 'glm', task, data, *flags, f'--output=straight_{task}.jsonl').returncode
    == 0
  )
  add, count = prompt_files.Answers.add, 0

  def interrupted(self, line):
    nonlocal count
    count += 1
    if count == 3:  # in the middle of a line
      self._file.write(line.encode()[:20])
      raise KeyboardInterrupt
    add(self, line)

  monkeypatch.setattr(prompt_files.Answers, 'add', interrupted)
  output = f'--output=stopped_{task}.jsonl'
  assert _run(place, 'glm', task, data, *flags, output).returncode == 130
  before = snapshot(place)
  refused(
    _run(place, 'chatglm2', task, data, *flags, output), 'made otherwise', 'checkpoint'
  )
  refused(_run(place, 'glm', task, data, *flags, output, '--limit=2'), 'made otherwise')
  assert snapshot(place) == before
  done = _run(place, 'glm', task, data, *flags, output)
  assert done.returncode == 0, done.stderr
  assert _table(place, f'straight_{task}') == _table(place, f'stopped_{task}')
  straight, stopped = (place / f'{name}_{task}.jsonl' for name in ('straight', 'stopped'))
  assert straight.read_bytes() == stopped.read_bytes()
  kept = json.loads((place / f'stopped_{task}.json').read_text())
  assert kept['checkpoint'] and kept['task'] == task and kept['stride'] == 9


@pytest.mark.slow
def test_eight_devices_say_what_one_does(place):
  for task, data in (('perplexity', 'texts.jsonl'), ('lambada', 'passages.txt')):
    for name, more in (
      ('one', ()),
      ('eight', ('--cpu_devices=8', '--fsdp=2', '--tensor=2')),
    ):
      done = _run(place, 'glm', task, data, *more, f'--output={name}_{task}.jsonl')
      assert done.returncode == 0, done.stderr
    [one], [eight] = (_table(place, f'{name}_{task}') for name in ('one', 'eight'))
    assert one == pytest.approx(eight, rel=1e-5)


@pytest.mark.slow
def test_integers_and_adapters_are_judged_as_they_are_loaded(place):
  from glm_jax.training.adapters import LoRAConfig

  config, base = stored.FAMILIES['chatglm2'], place / 'chatglm2'
  stored.quantize(base, place / 'int8', '--bits=8')
  stored.adapted(place / 'lora', base, config, LoRAConfig(rank=2))
  plain = {}
  for name, flags in (
    ('chatglm2', ()),
    ('int8', ()),
    ('chatglm2', ('--adapters=lora',)),
    ('lora', ()),
  ):
    output = f'loaded_{name}{len(flags)}'
    done = _run(place, name, 'lambada', 'passages.txt', *flags, f'--output={output}.jsonl')
    assert done.returncode == 0, done.stderr
    [plain[output]] = _table(place, output)
  words = {name: line['perplexity'] for name, line in plain.items()}
  assert words['loaded_int80'] == pytest.approx(words['loaded_chatglm20'], rel=0.1)
  assert words['loaded_int80'] != words['loaded_chatglm20']
  assert words['loaded_chatglm21'] == pytest.approx(words['loaded_lora0'], rel=1e-6)
  assert words['loaded_chatglm21'] != pytest.approx(words['loaded_chatglm20'], rel=1e-3)


REFUSED = [
  ('glm', 'nonsense', 'texts.jsonl', (), ['--task must be one of', 'lambada']),
  ('glm', 'lambada', 'nowhere.txt', (), ['a file of examples must be there']),
  ('glm', 'perplexity', 'pairs.jsonl', (), ["the fields ['text']", 'pairs.jsonl:1']),
  ('glm', 'answers', 'texts.jsonl', (), ["the fields ['prompt', 'answer']"]),
  ('glm', 'answers', 'pairs.jsonl', ('--answers=texts.jsonl',), ["the fields ['answer']"]),
  (
    'glm',
    'answers',
    'pairs.jsonl',
    ('--answers=two.jsonl',),
    ['as many as prompts, got 2'],
  ),
  ('glm', 'lambada', 'one.txt', (), ['one.txt:1 must be a passage']),
  ('glm', 'ceval', 'mmlu', (), ['ceval must be a folder that holds val/SUBJECT.csv']),
  (
    'glm',
    'ceval',
    'mmlu',
    ('--split=test',),
    ['must have the columns', 'law_test.csv without'],
  ),
  ('glm', 'mmlu', 'cmmlu', (), ['a question of mmlu must have', 'law.csv question 1']),
  ('glm', 'cmmlu', 'ceval', ('--split=val',), ['must have the columns', 'Question']),
  (
    'chatglm2',
    'blanks',
    'texts.jsonl',
    (),
    ['a model that fills blanks', 'ChatGLM2Config'],
  ),
  ('glm', 'blanks', 'masks.jsonl', (), ['leave names of masks to the task']),
  ('glm', 'perplexity', 'texts.jsonl', ('--stride=99',), ['--stride must be below 77']),
  ('glm', 'perplexity', 'texts.jsonl', ('--length=99',), ['--length must be at most 81']),
  (
    'glm',
    'perplexity',
    'texts.jsonl',
    ('--mask_ratios=a',),
    ['--mask_ratios must be numbers'],
  ),
  ('glm', 'perplexity', 'texts.jsonl', ('--mask_ratios=2',), ['must be in (0, 1)']),
  (
    'glm',
    'perplexity',
    'texts.jsonl',
    ('--output=a.txt',),
    ['--output must end in .jsonl'],
  ),
  ('glm', 'perplexity', 'empty.jsonl', (), ['must hold an example']),
]


@pytest.mark.parametrize('family,task,data,more,words', REFUSED, ids=str)
def test_what_cannot_be_evaluated_is_refused(place, family, task, data, more, words):
  (place / 'one.txt').write_text('one\n')
  (place / 'empty.jsonl').write_text('\n')
  _jsonl(place / 'two.jsonl', [{'answer': 'a'}] * 2)
  _jsonl(place / 'masks.jsonl', [{'text': 'a [MASK] b'}])
  before = snapshot(place)
  output = () if any('--output' in flag for flag in more) else ('--output=refused.jsonl',)
  refused(_run(place, family, task, data, *more, *output), *words)
  assert snapshot(place) == before


def test_an_empty_candidate_is_refused(place):
  model = glm_jax.load(place / 'glm')
  with pytest.raises(glm_jax.configs.UserError, match='there: a candidate must hold some'):
    Asker(model.config, model.vocabulary).question('a', ['b', ''], 'there')


def test_a_table_has_the_names_of_all_its_lines():
  shown = running.in_words([{'subject': 'law', 'n': 2}, {'subject': 'all', 'x': 1.5}])
  assert shown.splitlines() == ['subject  n  x', 'law      2', 'all         1.5000']
