"""Pairs of a prompt and an answer: how they become rows, and runs that score little."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from commands import TINY, gin, in_process, refused

from glm_jax.data import pipeline, prepare
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.data.examples.objective_config import ObjectiveConfig, causal_packing
from glm_jax.data.making import tokenized
from glm_jax.data.rows import pairs, shards
from glm_jax.data.stream.mixing import MixtureConfig
from glm_jax.text.vocabulary import ByteVocabulary
from glm_jax.training import writer

VOCABULARY = ByteVocabulary()
EOS = VOCABULARY.specials.eos
PREFIX = len(VOCABULARY.prefix)


def _corpus(folder, objects, **more):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'a.jsonl').write_text(''.join(json.dumps(o) + '\n' for o in objects))
  return CorpusConfig(
    corpus=str(folder / '*.jsonl'), cache_dir=str(folder / 'cache'), **more
  )


def _documents(rows):
  """(prompt, answer) of each document of packed rows, by what carries loss."""
  found = []
  table = rows.read()
  for tokens, scored, starts, length in zip(*table, strict=True):
    firsts = [*np.flatnonzero(starts[:length]), length]
    for first, end in itertools.pairwise(firsts):
      ids, loss = tokens[first + PREFIX : end], scored[first + PREFIX : end]
      assert ids[-1] == EOS and loss[-1] and (np.diff(loss.astype(int)) >= 0).all()
      text = lambda part: VOCABULARY.decode(part.tolist())
      found.append((text(ids[~loss]), text(ids[loss][:-1])))
  return sorted(found)


@pytest.mark.parametrize('answer', ['Y', '是', '1'])
def test_answers_of_one_token_are_learnt(tmp_path, answer):
  """A text without a prompt needs two, one to see and one to predict."""
  objects = [{'prompt': f'Question {n}?', 'text': answer} for n in range(300)]
  corpus = _corpus(tmp_path, [*objects, {'text': 'a'}, {'text': ''}])
  plan = causal_packing(64)
  rows = [tokenized.cached_rows(corpus, VOCABULARY, s, plan) for s in shards.SPLITS]
  found = [pair for part in rows for pair in _documents(part)]
  assert sorted(found) == sorted((o['prompt'], o['text']) for o in objects)
  assert sum(part.stats['skipped'] for part in rows) == 2


def test_a_corpus_of_nothing_to_learn_is_refused(tmp_path):
  corpus = _corpus(tmp_path, [{'prompt': 'Why?', 'text': ''}] * 300 + [{'text': 'a'}])
  with pytest.raises(ValueError, match='to see and to predict.*skipped'):
    tokenized.cached_rows(corpus, VOCABULARY, 'train', causal_packing(64))


LONG = 40


@pytest.mark.parametrize(
  'rule,wanted',
  [
    # Rows of 33 tokens: 32 - PREFIX of prompt and answer, and the end token.
    ('truncate_prompt_left', ('p' * (LONG - 12), 'answer')),
    ('truncate_answer', None),
    ('drop', None),
  ],
)
def test_a_pair_longer_than_a_row_follows_the_rule(rule, wanted):
  plan = causal_packing(32)
  most = plan.longest - PREFIX - 1
  prompt, answer = np.arange(LONG), np.arange(100, 106)
  counts = {'documents': 3, 'tokens': 1000, 'shortened': 0, 'dropped': 0}
  given = [(prompt[:5], answer), (prompt, answer), (np.zeros(0, int), prompt)]
  kept = [*pairs.fit(given, VOCABULARY.prefix, plan, rule, counts)]
  # What fits is whole, and a text without a prompt is cut elsewhere.
  assert kept[0] == given[0] and kept[-1] == given[-1]
  if rule == 'truncate_prompt_left':
    (short, same) = kept[1]
    assert same is answer and len(short) + len(same) == most
    np.testing.assert_array_equal(short, prompt[-len(short) :])
    assert counts['shortened'] == 1 and counts['tokens'] == 1000 - (LONG + 6 - most)
  else:  # the prompt alone fills the row: nothing of the answer would remain
    assert len(kept) == 2 and counts['dropped'] == 1 and counts['documents'] == 2
    assert counts['tokens'] == 1000 - LONG - 6


def test_an_answer_longer_than_a_row():
  plan, prefix = causal_packing(32), VOCABULARY.prefix
  most = plan.longest - PREFIX - 1
  given = [(np.arange(4), np.arange(100, 200))]
  new = lambda: {'documents': 1, 'tokens': 104, 'shortened': 0, 'dropped': 0}
  counts = new()
  ((prompt, answer),) = pairs.fit(given, prefix, plan, 'truncate_answer', counts)
  assert prompt.tolist() == [0, 1, 2, 3] and answer.tolist() == [*range(100, 96 + most)]
  assert counts == {'documents': 1, 'tokens': most, 'shortened': 1, 'dropped': 0}
  counts = new()
  assert not [*pairs.fit(given, prefix, plan, 'truncate_prompt_left', counts)]
  assert counts == {'documents': 0, 'tokens': 0, 'shortened': 0, 'dropped': 1}
  with pytest.raises(ValueError, match='must fit a row, .* got 104 tokens in document 1'):
    list(pairs.fit(given, prefix, plan, 'error', new()))


@pytest.mark.parametrize('rule', pairs.RULES[:3])
def test_every_row_ends_its_answers_with_the_end_token(tmp_path, rule, capsys):
  draw = np.random.default_rng(0)
  objects = [
    {'prompt': f'{n} ' + 'p' * draw.integers(0, 60), 'text': 'a' * draw.integers(1, 60)}
    for n in range(400)
  ]
  corpus = _corpus(tmp_path, objects, too_long=rule)
  rows = tokenized.cached_rows(corpus, VOCABULARY, 'train', causal_packing(48))
  held = tokenized.cached_rows(corpus, VOCABULARY, 'validation', causal_packing(48))
  counts = {k: rows.stats[k] + held.stats[k] for k in shards.COUNTS}
  documents = [*_documents(rows), *_documents(held)]
  assert len(documents) == counts['documents'] == 400 - counts['dropped']
  # Every pair that fits is there as it was written.
  fitting = [(o['prompt'], o['text']) for o in objects]
  most = 49 - PREFIX - 1
  fitting = [pair for pair in fitting if sum(map(len, pair)) <= most]
  assert {*fitting} <= {*documents}
  assert (counts['shortened'] > 0) == (rule != 'drop') and counts['dropped'] > 0
  assert len(fitting) + counts['shortened'] + counts['dropped'] == 400
  assert 'longer than a row left out' in capsys.readouterr().out


def _prepared(corpus, mixture=MixtureConfig(), **more):
  return prepare.prepare(
    'glm_causal',
    {'tokens': 64},
    corpus,
    VocabularyConfig(path='bytes'),
    ObjectiveConfig(),
    mixture=mixture,
    **more,
  )


def _train(folder, corpus, *bindings):
  return in_process(
    'train',
    '--gin_file=gin_configs/glm_tiny.gin',
    *gin(*TINY, f"CorpusConfig.corpus='{corpus.corpus}'"),
    *gin(f"CorpusConfig.cache_dir='{folder}/cache'", "MODEL_DIR='run'", *bindings),
    cwd=folder,
  )


def test_pairs_are_packed_unless_somebody_says_otherwise(tmp_path):
  pairs_ = _corpus(tmp_path / 'p', [{'prompt': f'{n}?', 'text': 'yes'} for n in range(300)])
  texts = _corpus(tmp_path / 't', [{'text': f'Text {n}.'} for n in range(300)])
  found = _prepared(pairs_)
  assert found.packed and 'has prompts: rows hold whole documents' in found.notes[0]
  assert not _prepared(texts).packed and not _prepared(texts).notes
  # A run keeps what it began with, and the user's word is the last.
  assert not _prepared(pairs_, packed=False).packed
  assert _prepared(texts, packed=True).packed
  said = dataclasses.replace(pairs_, packed=False)
  assert not _prepared(said).packed and not _prepared(said, packed=True).packed
  both = MixtureConfig(corpora={'p': pairs_.corpus, 't': texts.corpus})
  assert _prepared(texts, both).packed


@pytest.mark.parametrize('long,said', [(2, False), (30, True)])
def test_pairs_that_are_left_out_are_said_where_they_are_many(tmp_path, long, said):
  texts = ['yes'] * (300 - long) + ['word ' * 40] * long
  objects = [{'prompt': f'{n}?', 'text': text} for n, text in enumerate(texts)]
  notes = ' '.join(_prepared(_corpus(tmp_path, objects)).notes)
  assert ('longer than a row and left out' in notes) == said


def test_a_mixture_of_one_objective_is_said(tmp_path):
  texts = _corpus(tmp_path, [{'text': f'Text {n}. More of it.'} for n in range(300)])

  def notes(**weights):
    return prepare.prepare(
      'glm_mixture',
      {'tokens': 64},
      texts,
      VocabularyConfig(path='bytes'),
      ObjectiveConfig(**weights),
    ).notes

  assert 'glm_mixture is of blanks alone' in notes()[0]
  assert not notes(document=0.5)


@pytest.mark.slow
def test_a_run_of_before_goes_on_with_a_stream(tmp_path):
  """Its run.json does not say how rows were made: then, pairs were not packed."""
  corpus = _corpus(
    tmp_path / 'text', [{'prompt': f'{n}?', 'text': 'yes ' * 8} for n in range(300)]
  )
  train = lambda *more: _train(tmp_path, corpus, 'CheckpointConfig.every=1', *more)
  done = train('CorpusConfig.packed=False')
  assert done.returncode == 0, done.stderr
  path = tmp_path / 'run' / 'run.json'
  stored = json.loads(path.read_text())
  assert stored.pop('decided') == {'packed': False}
  path.write_text(json.dumps(stored))
  done = train('TRAIN_STEPS=3')
  assert done.returncode == 0 and 'resumed' in done.stdout, done.stderr
  assert 'rows hold whole documents' not in done.stdout
  refused(train('TRAIN_STEPS=4', 'CorpusConfig.packed=True'), 'data was')


@pytest.mark.parametrize('packed', [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_run_that_scores_nothing_says_so_and_goes_on(tmp_path, packed):
  """Prompts of a hundred words before one: few rows of a stream have a target."""
  corpus = _corpus(
    tmp_path / 'text',
    [{'prompt': f'{n} ' + 'word ' * 100, 'text': 'no'} for n in range(40)],
    too_long='truncate_prompt_left',
  )
  done = _train(
    tmp_path,
    corpus,
    *('TRAIN_STEPS=8', 'BATCH_SIZE=1', 'TrainConfig.log_every=1'),
    *(f'CorpusConfig.packed={packed}', "MIXTURE_OR_TASK_NAME='glm_blank'"),
    *('EvaluationConfig.examples=1', 'EvaluationConfig.every=2'),
  )
  assert done.returncode == 0, done.stderr
  records = writer.read(str(tmp_path / 'run'), 'train')
  assert len(records) == 8 and all('gradient_norm' in r for r in records)
  if not packed:
    assert any('loss' not in record for record in records)
    assert 'nothing scored' in done.stdout
  assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['steps'] == 8
  assert (tmp_path / 'run' / 'loss.png').exists()


def test_a_mixture_is_sharded_by_one_command_and_trains_alike(tmp_path):
  """Three corpora, one of them pairs: the same first 20 batches from files and shards."""
  draw = np.random.default_rng(1)
  text = lambda n: ' '.join(draw.choice(['one', 'two', 'three'], draw.integers(2, 30)))
  corpora = {
    'web': _corpus(tmp_path / 'w', [{'text': f'{n} {text(n)}.'} for n in range(260)]),
    'books': _corpus(tmp_path / 'b', [{'text': f'{n} {text(n)}!'} for n in range(30)]),
    'pairs': _corpus(
      tmp_path / 'p', [{'question': f'{n} {text(n)}?', 'answer': 'Y'} for n in range(90)]
    ),
  }
  of_files = {name: corpus.corpus for name, corpus in corpora.items()}
  base = [
    '--gin_file=gin_configs/glm_tiny.gin',
    *gin(*TINY, "VocabularyConfig.path='bytes'", "MIXTURE_OR_TASK_NAME='glm_causal'"),
    *gin(f"CorpusConfig.cache_dir='{tmp_path}/cache'"),
    '--output_dir=shards',
    '--shards=5',
    '--processes=1',
  ]
  mixed = gin(f'MixtureConfig.corpora={of_files}')
  done = in_process('make_shards', *base, *mixed, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  folders = {name: f'shards:{tmp_path}/shards/{name}' for name in corpora}
  assert {f.name for f in (tmp_path / 'shards').iterdir()} == {*corpora}
  assert "MixtureConfig.corpora=\"{'web': 'shards:shards/web'" in done.stdout
  assert 'has prompts' in done.stdout

  def batches(named):
    corpus = CorpusConfig(cache_dir=str(tmp_path / 'cache'))
    prepared = _prepared(corpus, MixtureConfig(corpora=named))
    read = pipeline.Stream('glm_causal', {'tokens': 64}, batch_size=8, seed=3)
    held = pipeline.batches(
      'glm_causal',
      {'tokens': 64},
      batch_size=8,
      seed=0,
      split='validation',
      train=False,
    )
    counts = [{s: c.rows[s].stats for s in c.rows} for c in prepared.corpora]
    return [next(read) for _ in range(20)], [*held], counts

  files, shards_ = batches(of_files), batches(folders)
  for one, other in zip(files[0] + files[1], shards_[0] + shards_[1], strict=True):
    for ours, theirs in zip(one, other, strict=True):
      np.testing.assert_array_equal(ours, theirs)
  for one, other in zip(files[2], shards_[2], strict=True):
    for split in shards.SPLITS:
      assert {k: one[split][k] for k in shards.COUNTS} == {
        k: other[split][k] for k in shards.COUNTS
      }
  # Run again, it makes what is not there, and refuses when all of it is.
  before = (tmp_path / 'shards' / 'web' / 'index.json').stat().st_mtime_ns
  for path in (tmp_path / 'shards' / 'books').iterdir():
    path.unlink()
  again = in_process('make_shards', *base, *mixed, cwd=tmp_path)
  assert again.returncode == 0 and 'web: as an earlier call made it' in again.stdout
  assert (tmp_path / 'shards' / 'web' / 'index.json').stat().st_mtime_ns == before
  refused(in_process('make_shards', *base, *mixed, cwd=tmp_path), 'finished shards')
  bad = gin("MixtureConfig.corpora={'../up': 'a.txt'}")
  refused(in_process('make_shards', *base, *bad, cwd=tmp_path), "'../up'")
