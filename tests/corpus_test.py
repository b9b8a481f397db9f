"""Documents and rows: everything read once, nothing lost, everything bad named."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from glm_jax.data.corpora import corpus, documentation, overlap
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.data.corpora.corpus import Document
from glm_jax.data.corpora.docstrings import SourceDocs
from glm_jax.data.making import tokenized
from glm_jax.data.rows.table import RowPlan, stream_rows
from glm_jax.text.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary()
S = VOCABULARY.specials


def _config(folder, pattern='*.txt', **fields):
  return CorpusConfig(
    corpus=str(folder / pattern), cache_dir=str(folder / 'cache'), **fields
  )


def _write(folder, count=30):
  for number in range(count):
    (folder / f'{number:02}.txt').write_text(f'Text {number}. ' * (number + 1))
  return _config(folder)


def test_each_document_is_in_one_split(tmp_path):
  config = _write(tmp_path)
  train, held_out = (
    [d.text for d in corpus.documents(config, split)] for split in ('train', 'validation')
  )
  assert len(train) + len(held_out) == 30 == len({*train, *held_out})
  assert 1 <= len(held_out) <= 3


def test_held_out_files_may_be_named(tmp_path):
  config = _write(tmp_path)
  (tmp_path / 'held.jsonl').write_text('{"text": "held out"}\n')
  config = _config(tmp_path, validation=str(tmp_path / 'held.jsonl'))
  assert [*corpus.documents(config, 'validation')] == [Document('held out')]
  assert len([*corpus.documents(config, 'train')]) == 30


def test_jsonl_lines_are_documents_with_prompts(tmp_path):
  lines = [{'text': '中文', 'prompt': 'p'}, {'text': 'b', 'other': 1}]
  (tmp_path / 'a.jsonl').write_text(
    '\ufeff' + '\n\n'.join(json.dumps(line, ensure_ascii=False) for line in lines)
  )
  config = _config(tmp_path, '*.jsonl', validation=str(tmp_path / 'a.jsonl'))
  assert [*corpus.documents(config, 'train')] == [Document('中文', 'p'), Document('b')]


@pytest.mark.parametrize(
  'name,content,message',
  [
    ('a.txt', b'good \xff bad', r'a\.txt with byte 0xff at offset 5'),
    ('a.jsonl', b'{"text": "x"}\n{"text": }\n', r'a\.jsonl line 2'),
    (
      'a.jsonl',
      b'{"prompt": "x"}\n',
      r"field 'text', got the fields \['prompt'\] in .*line 1",
    ),
    ('a.jsonl', b'\n{"text": 5}\n', r"'text' must be text, got 5 in .*a\.jsonl line 2"),
    ('a.jsonl', b'["text"]\n', r'must be an object .*got \["text"\] in .*line 1'),
    ('a.jsonl', b'{"text": "\\ud800"}\n', 'lone surrogate'),
    ('a.tsv', b'text', 'must end in .txt, .jsonl'),
  ],
)
def test_bad_text_is_named(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    list(corpus.documents(_config(tmp_path, 'a.*'), 'train'))


def test_invalid_utf8_may_be_replaced_or_left_out(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'good \xff bad')
  for errors, text in (('replace', 'good \ufffd bad'), ('ignore', 'good  bad')):
    config = _config(tmp_path, errors=errors, validation=str(tmp_path / 'a.txt'))
    assert [*corpus.documents(config, 'train')] == [Document(text)]


def test_a_missing_or_too_small_corpus_is_refused(tmp_path):
  with pytest.raises(ValueError, match='matches no file'):
    list(corpus.documents(_config(tmp_path), 'train'))
  (tmp_path / 'one.txt').write_text('only one')
  with pytest.raises(ValueError, match='held out for validation'):
    list(corpus.documents(_config(tmp_path), 'train'))
  with pytest.raises(ValueError, match='must be a TFDS data set'):
    list(corpus.documents(CorpusConfig(corpus='tfds:no_such_set'), 'train'))


def test_a_vocabulary_is_trained_once(tmp_path, capsys):
  config = _write(tmp_path)
  first = corpus.load_or_train_vocabulary(VocabularyConfig(size=512), [config])
  assert 'vocabulary:' in capsys.readouterr().out
  assert (
    corpus.load_or_train_vocabulary(VocabularyConfig(size=512), [config]).fingerprint
    == first.fingerprint
  )
  assert capsys.readouterr().out == ''


# Rows.


def test_every_token_is_in_one_row_in_order():
  rng = np.random.default_rng(0)
  documents = [
    (
      rng.integers(0, 256, rng.integers(0, 5)).tolist(),
      rng.integers(0, 256, rng.integers(2, 70)).tolist(),
    )
    for _ in range(300)
  ]
  for length in (8, 9, 33):
    table = stream_rows(documents, (S.enc,), S.eos, length)
    packed = [
      (ids[:n].tolist(), scored[:n].tolist())
      for ids, scored, n in zip(table.tokens, table.scored, table.lengths, strict=True)
    ]
    # Where a document, or the part of one that a row begins with, starts.
    np.testing.assert_array_equal(table.starts, table.tokens == S.enc)
    stream, flags = [], []
    for ids, scored in packed:
      assert ids[0] == S.enc and 2 <= len(ids) <= length and len(scored) == len(ids)
      assert ids[-1] != S.enc  # an [ENC] has something behind it
      stream += [t for t in ids if t != S.enc]
      flags += [f for t, f in zip(ids, scored, strict=True) if t != S.enc]
    assert stream == [t for prompt, text in documents for t in [*prompt, *text, S.eos]]
    assert flags == [
      f
      for prompt, text in documents
      for f in [False] * len(prompt) + [True] * (len(text) + 1)
    ]
    # Full but for the last, and for those that would have ended with a lone [ENC].
    assert all(len(ids) >= length - 1 for ids, _ in packed[:-1])
    assert all(
      not f
      for ids, scored in packed
      for t, f in zip(ids, scored, strict=True)
      if t == S.enc
    )


def test_rows_are_cached_and_short_documents_counted(tmp_path, capsys):
  for number, text in enumerate(['', 'x', 'two', '中文文本。' * 40, ' ' * 9]):
    (tmp_path / f'{number}.txt').write_text(text)
  config = _config(tmp_path, validation=str(tmp_path / '3.txt'))
  made = tokenized.cached_rows(config, VOCABULARY, 'train', RowPlan(32))
  assert made.stats['documents'] == 3 and made.stats['skipped'] == 2
  assert '2 with nothing to predict skipped' in capsys.readouterr().out
  again = tokenized.cached_rows(config, VOCABULARY, 'train', RowPlan(32))
  assert capsys.readouterr().out == ''
  table = made.read()
  for name in table._fields:
    np.testing.assert_array_equal(getattr(table, name), getattr(again.read(), name))
  text = [t for row, n in zip(table.tokens, table.lengths, strict=True) for t in row[:n]]
  assert '中文文本。' * 40 in VOCABULARY.decode([t for t in text if t < 256])
  (tmp_path / '2.txt').write_text('now another text')
  changed = tokenized.cached_rows(config, VOCABULARY, 'train', RowPlan(32))
  assert changed.stats['digest'] != made.stats['digest']


def test_only_empty_documents_are_refused_and_leave_nothing(tmp_path):
  (tmp_path / 'a.txt').write_text('')
  config = _config(tmp_path, validation=str(tmp_path / 'a.txt'))
  with pytest.raises(ValueError, match='something to see and to predict'):
    tokenized.cached_rows(config, VOCABULARY, 'train', RowPlan(32))
  assert not [*(tmp_path / 'cache' / 'rows').glob('*')]


def test_a_damaged_cache_is_named(tmp_path):
  config = _write(tmp_path)
  tokenized.cached_rows(config, VOCABULARY, 'train', RowPlan(32))
  (path,) = (tmp_path / 'cache' / 'rows').iterdir()
  (tokens,) = path.glob('*.tfrecord')
  tokens.write_bytes(tokens.read_bytes()[:100])
  with pytest.raises(ValueError, match='cached rows must be readable.*delete'):
    tokenized.cached_rows(config, VOCABULARY, 'train', RowPlan(32))


# The documentation of this Python.


def _package(name, sentences):
  return [SourceDocs(name, f'{name}/{i}.py', text) for i, text in enumerate(sentences)]


def test_validation_shares_no_packages_and_almost_no_text_with_training(capsys):
  rng = np.random.default_rng(0)
  words = [f'word{i}' for i in range(500)]
  text = lambda: ' '.join(rng.choice(words, 120))
  shared = text()
  documents = [d for i in range(80) for d in _package(f'p{i:02}', [text(), text()])]
  documents += _package('copies', [documents[0].text + ' more', shared])
  documents += [SourceDocs(f'q{i}', 'x.py', shared + ' ' + text()) for i in range(30)]
  train, held_out = documentation.split_by_package(documents)
  assert not {d.package for d in train} & {d.package for d in held_out}
  assert documents[0].text + ' more' not in {d.text for d in train + held_out}
  total = sum(len(d.text) for d in train + held_out)
  assert 0.01 < sum(len(d.text) for d in held_out) / total < 0.1
  shares = overlap.shared(
    overlap.grams([d.text for d in held_out]), overlap.grams([d.text for d in train])
  )
  assert shares.max() <= 0.02
  assert 'of its 13-grams in training' in capsys.readouterr().out


def test_13_grams_by_hand():
  text = [f'w{i}' for i in range(20)]
  a, b, c = overlap.grams([' '.join(text), ' '.join(text[5:]), 'w0 w1 w2'])
  assert len(a) == 8 and len(b) == 3 and len(c) == 1
  np.testing.assert_array_equal(a[5:], b)
  assert overlap.near_duplicates([a, b, c]).tolist() == [False, True, False]
  assert overlap.shared([a], [b, c]) == pytest.approx([3 / 8])


def test_the_documentation_data_set_is_built_and_read(tmp_path):
  documents = [
    d
    for i in range(60)
    for d in _package(f'p{i}', [f'Function {i} does {i * 7} things. 中文' * 3])
  ]
  builder = documentation.Documentation(documents=documents, data_dir=str(tmp_path))
  builder.download_and_prepare()
  read = [
    example['text'].decode()
    for split in ('train', 'validation')
    for example in tfds.as_numpy(builder.as_dataset(split=split))
  ]
  assert {*read} <= {d.text for d in documents} and len(read) > 20
