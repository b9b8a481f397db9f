"""Clozes: numbers of the original's heads, patterns, metrics, and runs."""

import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stored
from commands import ROOT, gin, in_process, refused, snapshot
from foreign import arrays_of, imported
from published import LINES

from glm_jax import models
from glm_jax.batch import Batch
from glm_jax.configs import UserError
from glm_jax.evaluation import cloze as clozes
from glm_jax.evaluation.patterns import PATTERNS, Short
from glm_jax.evaluation.task import Asker
from glm_jax.models import GLMConfig
from glm_jax.recipes import cloze
from glm_jax.text.vocabulary import ByteVocabulary
from glm_jax.training import writer

LOSSES = ('cross_entropy', 'hinge', 'generative', 'mix', 'adapet')


@pytest.fixture(scope='module')
def golden():
  arrays, _ = arrays_of('cloze')
  _, tensors = arrays_of('glm')
  found, params = imported(tensors, {}, 'megatron', num_heads=4)
  return arrays, models.build(found.config), jax.tree.map(jnp.asarray, params)


def _packed(ids, positions, sep, targets, weights):
  """Rows of [B, N, T] candidates, each a document."""
  B, N, T = ids.shape
  start = np.broadcast_to(np.arange(N)[:, None] * T, ids.shape)
  end = start + np.maximum(sep[..., None], np.arange(T) + 1)
  arrays = (ids, targets, weights, *np.moveaxis(positions, 2, 0), start, end, 0 * ids)
  arrays = [jnp.asarray(x.reshape(B, N * T)) for x in arrays]
  return Batch(*(x if i == 2 else x.astype(jnp.int32) for i, x in enumerate(arrays)))


def _of_mc(arrays):
  names = ('ids', 'pos', 'sep', 'target', 'logit_mask')
  return _packed(*(arrays[f'mc/{name}'] for name in names))


def _scores(golden, batch, penalty=0.0):
  _, model, params = golden
  logits = _logits(model, {'params': params}, batch)
  log_probs = jax.nn.log_softmax(logits)
  chosen = jnp.take_along_axis(log_probs, batch.targets[..., None], -1)[..., 0]
  return cloze.scores(chosen, batch, 3, penalty)


def _logits(model, variables, batch):
  fields = (batch.tokens, batch.positions, batch.block_positions, batch.visibility)
  return model.apply(variables, *fields)[0]


def test_scores_of_packed_candidates_are_the_originals(golden):
  arrays, *_ = golden
  for penalty, name in ((0.0, 'softmax'), (1.0, 'lp')):
    scores, there = _scores(golden, _of_mc(arrays), penalty)
    np.testing.assert_allclose(scores, arrays[f'mc/score_{name}'], atol=2e-5)
    assert there.all()


def test_candidates_behind_one_context_are_the_originals(golden):
  """The original's fast decoding reads the context once; here each document repeats it."""
  arrays, *_ = golden
  both = lambda a, b: np.concatenate([np.repeat(a[:, None], 3, 1), b], -1)
  ids = both(arrays['fast/enc'], arrays['fast/dec'])
  positions = both(arrays['fast/encp'], arrays['fast/decp'])
  none = np.zeros((2, 3, 12), int)
  targets = np.concatenate([none, arrays['fast/dect']], -1)
  weights = np.concatenate([none, arrays['fast/declm']], -1).astype('f4')
  batch = _packed(ids, positions, np.full((2, 3), 12), targets, weights)
  scores, _ = _scores(golden, batch)
  np.testing.assert_allclose(scores, arrays['fast/score'], atol=2e-5)


def test_words_of_one_token_and_the_classifier_are_the_originals(golden):
  arrays, model, params = golden
  ids, positions, sep = (arrays[f'mc/{name}'][:, :1] for name in ('ids', 'pos', 'sep'))
  batch = _packed(ids, positions, sep, ids, ids.astype('f4'))
  logits = _logits(model, {'params': params}, batch)
  at = logits[jnp.arange(2), sep[:, 0]]
  np.testing.assert_allclose(at, arrays['st/target_logits'], atol=2e-5)
  # What a document of one candidate scores is the same but for a number that all share.
  rows = lambda name: arrays[f'mc/{name}'][:, :1].repeat(2, 1)
  at_sop = np.arange(12) == rows('sep')[..., None]
  targets = np.where(at_sop, arrays['st/target_ids'][..., None], 0)
  inputs = (rows('ids'), rows('pos'), rows('sep'), targets, at_sop.astype('f4'))
  scores, _ = _scores(golden, _packed(*inputs))
  margins = lambda x: x[:, 0] - x[:, 1]
  np.testing.assert_allclose(margins(scores[:, :2]), margins(arrays['st/score']), atol=2e-5)
  weights = {
    name: {
      'weight': jnp.asarray(arrays[f'cls/{theirs}.weight'].T),
      'bias': jnp.asarray(arrays[f'cls/{theirs}.bias']),
    }
    for name, theirs in (('pool', 'pool_layer'), ('out', 'multichoice_head'))
  }
  fields = (batch.tokens, batch.positions, batch.block_positions, batch.visibility)
  x_BTD, _ = model.apply({'params': params}, *fields, head=lambda x, _: x)
  made = cloze.classified(weights, x_BTD[jnp.arange(2), sep[:, 0]])
  np.testing.assert_allclose(made, arrays['cls/logits_start'], atol=2e-5)
  # The loss finds that place, and the label, in a row.
  labels = np.array([3, 1])
  targets = np.where(np.arange(12) == sep[..., None], labels[:, None, None], 0)
  at_sep = (np.arange(12) == sep[..., None]).astype('f4')
  row = _packed(ids, positions, sep, targets, at_sep)
  variables = {'params': {**params, 'classifier': weights}}
  total, metrics = cloze.classifier_loss(model, 0.1)(variables, row, None)
  expected = jax.nn.log_softmax(arrays['cls/logits_start'])[np.arange(2), labels]
  np.testing.assert_allclose(total, -expected.sum(), rtol=1e-5)
  right = (arrays['cls/logits_start'].argmax(1) == labels).sum()
  assert metrics['accuracy'] == (100 * right, 2)


@pytest.mark.parametrize('right', range(3))
def test_adapet_of_the_originals_scores_is_the_originals(golden, right):
  """By the sentences of THUDM/GLM finetune_glm.py, --adapet, on scores that it gave."""
  scores = golden[0]['mc/score_softmax'].astype('f8')
  label_mask = np.ones_like(scores)
  label_mask[:, right] = -1.0
  theirs = (scores * label_mask).sum() / len(scores)
  # The right one comes first here.
  order = [right, *(i for i in range(3) if i != right)]
  made = cloze.of_scores('adapet', jnp.asarray(scores[:, order]), jnp.ones((2, 3), bool))
  np.testing.assert_allclose(made.mean(), theirs, atol=2e-5)


def test_adapet_raises_the_right_candidate_and_lowers_each_of_the_others():
  there = jnp.array([[True, True, True, False], [True, True, False, False]])
  scores = jax.random.normal(jax.random.key(0), there.shape)
  slope = jax.grad(lambda s: cloze.of_scores('adapet', s, there).sum())(scores)
  np.testing.assert_array_equal(slope, [[-1, 1, 1, 0], [-1, 1, 0, 0]])


@pytest.mark.slow
@pytest.mark.parametrize('kind', LOSSES)
def test_losses_and_gradients_are_those_of_separate_rows(golden, kind):
  """By the sentences of THUDM/GLM finetune_glm.py, where candidates are a row each."""
  arrays, model, params = golden
  B, N = arrays['mc/ids'].shape[:2]
  alone = lambda name: arrays[f'mc/{name}'].reshape(
    B * N, 1, *arrays[f'mc/{name}'].shape[2:]
  )
  names = ('ids', 'pos', 'sep', 'target', 'logit_mask')
  batch = _packed(*map(alone, names))

  def theirs(params):
    log_probs = jax.nn.log_softmax(_logits(model, {'params': params}, batch))
    chosen = jnp.take_along_axis(log_probs, batch.targets[..., None], -1)[..., 0]
    scores = (chosen * batch.loss_weights).sum(1).reshape(B, N)
    entropy = -jax.nn.log_softmax(scores)[:, 0].mean()
    if kind == 'cross_entropy':
      return entropy
    if kind == 'hinge':
      return jnp.maximum(1 + scores - scores[:, :1], 0).sum(1).mean() - 1
    if kind == 'adapet':
      return (scores * jnp.array([-1.0, 1, 1])).sum() / B
    return -scores[:, 0].mean() + (entropy if kind == 'mix' else 0)

  def ours(params, chunks):
    loss = cloze.candidates_loss(model, kind, 5, 0.0, chunks)
    total, metrics = loss({'params': params}, _of_mc(arrays), None)
    return total / metrics['loss'][1]

  value, gradients = jax.jit(jax.value_and_grad(theirs))(params)
  for chunks in (0, 3):
    made, of_ours = jax.jit(jax.value_and_grad(ours), static_argnums=1)(params, chunks)
    np.testing.assert_allclose(made, value, rtol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), of_ours, gradients
    )


@pytest.mark.slow
def test_an_empty_row_and_a_missing_candidate_count_for_nothing(golden):
  arrays, model, params = golden
  batch = _of_mc(arrays)
  empty = lambda x: jnp.concatenate([x, jnp.zeros_like(x[:1])])
  longer = Batch(*(x if x is None else empty(x) for x in batch))
  for kind in ('hinge', 'mix', 'adapet'):
    loss = cloze.candidates_loss(model, kind, 8)
    of = lambda params, batch: loss({'params': params}, batch, None)
    before, _ = jax.jit(of)(params, batch)
    (after, metrics), gradients = jax.jit(jax.value_and_grad(of, has_aux=True))(
      params, longer
    )
    np.testing.assert_allclose(before, after, rtol=1e-6)
    assert metrics['loss'][1] == 2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize('name', PATTERNS)
def test_a_line_becomes_its_pattern(name):
  line, text, candidates, right = LINES[name]
  assert {*PATTERNS[name].fields} <= {*line}
  [example] = PATTERNS[name].read(line, 'here')
  assert ''.join(example.parts) == text
  assert candidates is None or [*example.candidates] == candidates
  assert [*example.right] == right and any(isinstance(p, Short) for p in example.parts)
  # As token ids, too long for a row, its shortenable parts lose their ends.
  config = GLMConfig(
    num_layers=1, hidden_size=8, num_heads=1, vocab_size=384, max_positions=512
  )
  asker = Asker(config, ByteVocabulary())
  whole = clozes.encode(asker, example, 'here')
  size = sum(map(len, (*whole[:2], max(whole.candidates, key=len)))) + 4
  assert asker.cut == 0 and bytes(whole.before).decode() == text.partition('[MASK]')[0]
  asker.length = size - 2
  cut = clozes.encode(asker, example, 'here')
  lengths = lambda ids: len(ids.before) + len(ids.behind)
  assert asker.cut == 1 and lengths(cut) == lengths(whole) - 2
  assert cut.candidates == whole.candidates


def test_metrics_are_as_published():
  rng = np.random.default_rng(0)
  records = [
    {'said': int(s), 'right': [int(r)], 'group': str(g)}
    for s, r, g in zip(*rng.integers(0, 3, (3, 60)), strict=True)
  ]

  def f1(label):
    said = [r['said'] == label for r in records]
    right = [r['right'] == [label] for r in records]
    both = np.logical_and(said, right).sum()
    precision, recall = both / np.sum(said), both / np.sum(right)
    return 100 * 2 * precision * recall / (precision + recall)

  assert clozes.f1_macro(records) == pytest.approx(np.mean([f1(i) for i in range(3)]))
  assert clozes.f1(records) == pytest.approx(f1(1))
  groups = [[r for r in records if r['group'] == str(g)] for g in range(3)]
  whole = [all(r['right'] == [r['said']] for r in group) for group in groups]
  assert clozes.exact_match(records) == 100 * np.mean(whole)
  # Two of three words of one side, and two of two of the other; then all; then none.
  names = ['New York City', 'the York', 'Rome']
  made = [
    {'said': i, 'candidates': names, 'answers': answers, 'right': []}
    for i, answers in enumerate((['York City', 'X'], ['York!'], ['Paris']))
  ]
  assert clozes.word_f1(made) == pytest.approx(100 * (0.8 + 1 + 0) / 3)
  assert clozes.word_exact_match(made) == pytest.approx(100 / 3)


def test_answers_in_chinese_are_compared_as_cmrc_does():
  # By hand, from the trial split and the sentences of cmrc2018_evaluate.py.
  trial = [
    # A unit more: 3 of 4 and 3 of 3.
    ('4分钟内', ['4分钟'], 6 / 7, 0),
    # Six characters of sixteen: marks do not count.
    ('经典、热血、狙击', ['可选择经典、热血、狙击等模式进行游戏。'], 12 / 22, 0),
    # The longest run alone counts: 1 of 3 and 1 of 2.
    ('踢了爆', ['踢爆'], 2 / 5, 0),
    # The nearest of the answers, and a number is one word.
    ('0.304平方公里', ['约0.304平方公里。', '0.304平方公里。'], 1, 1),
    ('Queen Sirikit', ['「Queen Sirikit Park」'], 4 / 5, 0),
    ('鹅', ['踢爆'], 0, 0),
    ('', ['踢爆'], 0, 0),
  ]
  for said, answers, f1, exact in trial:
    record = [{'answer': said, 'answers': answers}]
    assert clozes.character_f1(record) == pytest.approx(100 * f1), said
    assert clozes.character_exact_match(record) == 100 * exact, said
  records = [{'answer': said, 'answers': answers} for said, answers, *_ in trial]
  mean = 100 * np.mean([f1 for *_, f1, _ in trial])
  assert clozes.character_f1(records) == pytest.approx(mean)


@pytest.mark.parametrize('family', ['glm', 'chatglm2'])
def test_a_question_that_is_generated_keeps_room_for_its_answer(family):
  line = LINES['cmrc'][0]
  [example] = PATTERNS['cmrc'].read(line, 'here')
  sizes = dict(num_layers=1, hidden_size=8, num_heads=1, vocab_size=384)
  config = GLMConfig(**sizes, max_positions=128)
  if family == 'chatglm2':
    config = stored.FAMILIES['chatglm2']
  asker = Asker(config, ByteVocabulary())
  prompt = clozes.asked(asker, example, 'here', '[MASK]', 16).prompt
  blank = '' if config.causal else '[MASK]。'
  assert prompt == f'狐狸跑了。请问，谁跑了？{blank}' and asker.cut == 0
  size = len(prompt.replace('[MASK]', '').encode()) + len(asker.opened('[MASK]')) + 16
  for less, context in ((0, '狐狸跑了。'), (1, '狐狸跑了'), (7, '狐狸'), (15, '')):
    asker.length = size - less
    prompt = clozes.asked(asker, example, 'here', '[MASK]', 16).prompt
    assert prompt == f'{context}请问，谁跑了？{blank}'
  assert asker.cut == 3
  asker.length = size - 16
  with pytest.raises(UserError, match='a question must fit'):
    clozes.asked(asker, example, 'here', '[MASK]', 16)


def _line(rng):
  animal = rng.choice(['fox', 'dog'])
  passage = f'{rng.choice("abc")} {animal}.'
  return {'question': 'is it a fox', 'passage': passage, 'label': animal == 'fox'}


def _write(path, rows):
  path.parent.mkdir(exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp('cloze'), random.Random(0)
  sizes = dict(num_layers=2, hidden_size=32, num_heads=4, vocab_size=384, init_std=0.1)
  none = dict.fromkeys(('embedding_dropout', 'attention_dropout', 'output_dropout'), 0.0)
  stored.checkpoint(folder / 'base', GLMConfig(**sizes, **none, max_positions=160))
  stored.checkpoint(folder / 'causal', stored.FAMILIES['chatglm2'])
  for split, count in (('train', 64), ('val', 32)):
    _write(folder / 'boolq' / f'{split}.jsonl', [_line(rng) for _ in range(count)])
    record = LINES['record'][0]
    _write(folder / 'record' / f'{split}.jsonl', [record] * 8)
  return folder


def _train(place, *bindings, run='run', data='boolq', base='base', flags=(), **more):
  places = [
    f"MODEL_DIR='{place}/{run}'",
    f"INIT_FROM='{place}/{base}'",
    f"CORPUS='{place}/{data}'",
    f"BENCHMARK='{data}'",
    f"CorpusConfig.cache_dir='{place}/cache'",
    "TASK_FEATURE_LENGTHS={'tokens': 160}",
    "ComputeConfig.dtype='float32'",
    'BATCH_SIZE=8',
    'TRAIN_STEPS=4',
    'EvaluationConfig.every=2',
    'CheckpointConfig.every=2',
    'OptimizerConfig.warmup_steps=1',
    'TrainConfig.log_every=1',
  ]
  files = ('--gin_file=gin_configs/runs/cloze.gin',)
  return in_process('train', *files, *flags, *gin(*places, *bindings), **more)


def _records(run, kind):
  return writer.read(str(run), kind)


@pytest.mark.slow
def test_a_cloze_is_learnt_and_judged_as_evaluate_does(place):
  how = (
    'TRAIN_STEPS=60',
    'OptimizerConfig.learning_rate=1e-2',
    'EvaluationConfig.every=20',
  )
  done = _train(place, *how, run='learnt')
  assert done.returncode == 0, done.stderr
  validated = _records(place / 'learnt', 'validation')
  assert max(v['accuracy'] for v in validated) > 90, done.stdout
  best = max(validated, key=lambda v: v['accuracy'])
  assert str(best['step']) in done.stdout
  done = in_process(
    'evaluate',
    f'--checkpoint={place}/learnt/checkpoints/60',
    '--task=boolq',
    f'--input={place}/boolq',
    f'--output={place}/said.jsonl',
    '--length=79',
  )
  assert done.returncode == 0, done.stderr
  [line] = json.loads((place / 'said.json').read_text())['table']
  assert line['accuracy'] == pytest.approx(validated[-1]['accuracy'])


@pytest.mark.slow
def test_one_device_learns_what_eight_do_and_a_stopped_run_goes_on(place):
  runs = {
    'one': [()],
    'eight': [('MeshConfig.fsdp=2', 'MeshConfig.tensor=2')],
    'stopped': [('TRAIN_STEPS=2',), ()],
  }
  constant = "OptimizerConfig.schedule='constant'"
  for run, calls in runs.items():
    for more in calls:
      flags = ('--cpu_devices=8',) if run == 'eight' else ()
      parts = (
        'TrainConfig.microbatches=2' if run == 'eight' else 'TrainConfig.microbatches=1'
      )
      done = _train(place, constant, parts, *more, run=run, flags=flags)
      assert done.returncode == 0, done.stderr
  losses = {run: [r['loss'] for r in _records(place / run, 'train')] for run in runs}
  assert losses['one'] == losses['stopped'] and len(losses['one']) == 4
  np.testing.assert_allclose(losses['eight'], losses['one'], rtol=1e-4)
  last = [_records(place / run, 'validation')[-1]['accuracy'] for run in runs]
  assert last[0] == last[1] == last[2]


@pytest.mark.slow
def test_a_classifier_few_shots_and_negatives(place):
  done = _train(place, 'Cloze.classifier=True', run='classifier')
  assert done.returncode == 0, done.stderr
  assert 0 <= _records(place / 'classifier', 'validation')[-1]['accuracy'] <= 100
  done = _train(place, 'Cloze.shots=8', 'Cloze.negatives=1', run='few', data='record')
  assert done.returncode == 0, done.stderr
  last = _records(place / 'few', 'validation')[-1]
  assert {'word_f1', 'word_exact_match', 'accuracy', 'loss'} <= {*last}
  done = _train(
    place, "TASK_FEATURE_LENGTHS={'tokens': 150}", run='causal_run', base='causal'
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('base', ['base', 'causal'])
def test_answers_without_candidates_are_learnt_and_generated(place, base):
  asked = [
    {'id': str(i), 'question': f'{c}？', 'answers': [{'text': c}]}
    for i, c in enumerate('abcdefgh')
  ]
  content = {'data': [{'paragraphs': [{'context': '问', 'qas': asked}]}]}
  (place / 'cmrc').mkdir(exist_ok=True)
  for split in ('train', 'dev'):
    (place / 'cmrc' / f'{split}.json').write_text(json.dumps(content, indent=1))
  how = (
    'TRAIN_STEPS=150',
    'OptimizerConfig.learning_rate=1e-2',
    'EvaluationConfig.every=75',
    "TASK_FEATURE_LENGTHS={'tokens': 64}",
    "CheckpointConfig.best_metric='loss'",
    "CheckpointConfig.best_mode='min'",
  )
  done = _train(place, *how, run=f'cmrc_{base}', data='cmrc', base=base)
  assert done.returncode == 0, done.stderr
  done = in_process(
    'evaluate',
    f'--checkpoint={place}/cmrc_{base}',
    '--task=cmrc',
    f'--input={place}/cmrc',
    f'--output={place}/cmrc_{base}.jsonl',
    '--max_new_tokens=8',
  )
  assert done.returncode == 0, done.stderr
  [line] = json.loads((place / f'cmrc_{base}.json').read_text())['table']
  assert line['examples'] == 8 and line['character_exact_match'] > 80, done.stdout


OWN = """
from glm_jax.evaluation.patterns import BLANK, ClozePattern, Short, chosen, register


def read(line, where):
  parts = [Short(line['review']), ' It was', BLANK, '.']
  yield chosen(parts, {'bad': ' terrible', 'good': ' great'}, line['stars'], where)


register(ClozePattern(name='stars', fields=('review', 'stars'), read=read))
"""


@pytest.mark.slow
def test_a_task_of_ones_own(place, monkeypatch):
  monkeypatch.setitem(PATTERNS, 'stars', None)  # forgotten afterwards
  (place / 'own_stars.py').write_text(OWN)
  rows = [{'review': f'{w} {n}', 'stars': w} for n in range(8) for w in ('bad', 'good')]
  for split in ('train', 'val'):
    _write(place / 'stars' / f'{split}.jsonl', rows)
  own = {'PYTHONPATH': f'{ROOT}:{place}'}
  done = _train(place, run='own', data='stars', flags=('--import=own_stars',), **own)
  assert done.returncode == 0, done.stderr
  done = in_process(
    'evaluate',
    f'--checkpoint={place}/own',
    '--task=stars',
    f'--input={place}/stars',
    '--import=own_stars',
    **own,
  )
  assert done.returncode == 0 and 'accuracy' in done.stdout, done.stderr


REFUSED = [
  (("BENCHMARK='nonsense'",), 'boolq', ['Cloze.benchmark must be one of']),
  (("BENCHMARK='rte'",), 'boolq', ["the fields ['premise', 'hypothesis', 'label']"]),
  (("BENCHMARK='boolq'",), 'label', ['label.jsonl', 'a label must be one of', "'maybe'"]),
  (("BENCHMARK='multirc'",), 'record', ['must be a line of multirc', "'questions'"]),
  (("BENCHMARK='copa'",), 'empty', ['a candidate must hold some text']),
  (("BENCHMARK='wsc'",), 'wsc', ['its field "candidates"', 'wsc_words']),
  (("BENCHMARK='boolq'",), 'nowhere', ['must be a folder that holds one of']),
  (('Cloze.shots=65',), 'boolq', ['Cloze.shots must be at most 64']),
  (("TASK_FEATURE_LENGTHS={'tokens': 20}",), 'boolq', ['must leave each of 2 candidates']),
  (
    ("TASK_FEATURE_LENGTHS={'tokens': 60}",),
    'boolq',
    ['must fit 29 tokens without its shortenable parts'],
  ),
  (("Cloze.candidates_loss='x'",), 'boolq', ['Cloze.candidates_loss must be one of']),
  (("Cloze.candidates_loss='mix'",), 'cmrc', ["the loss 'generative'"]),
  (("BENCHMARK='cmrc'",), 'list', ['must be an object with the fields']),
  (("BENCHMARK='cmrc'",), 'half', ['must be JSON']),
  (('BATCH_SIZE=128',), 'boolq', ['must hold the rows of one global batch']),
]


@pytest.mark.parametrize('bindings,data,words', REFUSED, ids=str)
def test_what_cannot_be_learnt_is_refused(place, bindings, data, words):
  for split in ('train', 'val'):
    _write(place / 'label' / f'{split}.jsonl', [{**LINES['boolq'][0], 'label': 'maybe'}])
    _write(place / 'empty' / f'{split}.jsonl', [{**LINES['copa'][0], 'choice1': '.'}])
    _write(place / 'list' / f'{split}.json', [[]])
    _write(place / 'cmrc' / f'{split}.json', [LINES['cmrc'][0]])
    (place / 'half').mkdir(exist_ok=True)
    (place / 'half' / f'{split}.json').write_text('{"data": [')
    _write(place / 'wsc' / f'{split}.jsonl', [LINES['wsc_words'][0]])
  words = [word.replace('label.jsonl', 'train.jsonl:1') for word in words]
  before = snapshot(place)
  refused(_train(place, *bindings, run='refused', data=data), *words)
  assert snapshot(place) == before
