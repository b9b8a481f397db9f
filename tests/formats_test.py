"""Files of text: one content, whatever it is written in; what cannot be read is named."""

import csv
import gzip
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from glm_jax.data.corpora import corpus, fields, formats, parts
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.fields import Document

AWKWARD = [
  'a, "quoted"\nline',
  '中文 \u2028 emoji 🙂',
  '  spaces  ',
  'tab\tand\r\nbreak',
  '0',
]


def _pairs(count=30):
  draw = random.Random(0)
  return [
    Document(draw.choice(AWKWARD) + f' {n}', f'Question {n}: {draw.choice(AWKWARD)}')
    for n in range(count)
  ]


def _objects(documents, names=('prompt', 'text')):
  return [dict(zip(names, (d.prompt, d.text), strict=True)) for d in documents]


def _write(path, objects):
  """As the ending says."""
  kind, compression = formats.split(epath.Path(path))
  if kind == '.parquet':
    return pq.write_table(pa.Table.from_pylist(objects), path, row_group_size=7)
  if kind == '.csv':
    with open(path, 'w', newline='', encoding='utf-8') as file:
      writer = csv.DictWriter(file, objects[0])
      writer.writeheader()
      writer.writerows(objects)
    content = path.read_bytes()
  elif kind == '.json':
    content = json.dumps(objects, ensure_ascii=False, indent=1).encode()
  else:
    content = ''.join(json.dumps(o, ensure_ascii=False) + '\n' for o in objects).encode()
  if compression:
    content = pa.Codec(compression).compress(content, asbytes=True)
  return path.write_bytes(content)


def _config(folder, pattern, **more):
  # All of it is read: what is held out is another file.
  held_out = folder / 'held.jsonl'
  held_out.write_text('{"text": "held out"}\n')
  return CorpusConfig(corpus=str(folder / pattern), validation=str(held_out), **more)


def _read(config):
  return [*corpus.documents(config, 'train')]


@pytest.mark.parametrize(
  'name',
  [
    *('a.jsonl', 'a.JSONL', 'a.jsonl.gz', 'a.jsonl.zst', 'a.json', 'a.Json.GZ'),
    *('a.csv', 'a.csv.zst', 'a.parquet', 'a.PARQUET', '[a] b.jsonl'),
  ],
)
def test_one_content_whatever_it_is_written_in(tmp_path, name):
  documents = _pairs()
  _write(tmp_path / name, _objects(documents))
  assert _read(_config(tmp_path, name)) == documents
  # However it is divided among workers, too, and held out alike.
  config = CorpusConfig(corpus=str(tmp_path / name), validation_fraction=0.2)
  found = [pair for part in parts.find(config, 300) for pair in parts.read(config, part)]
  assert [d for _, d in found] == documents
  plain = tmp_path / 'plain.jsonl'
  _write(plain, _objects(documents))
  as_lines = CorpusConfig(corpus=str(plain), validation_fraction=0.2)
  assert found == [
    (split, d)
    for part in parts.find(as_lines, 10**6)
    for split, d in parts.read(as_lines, part)
  ]
  assert {split for split, _ in found} == {'train', 'validation'}


@pytest.mark.parametrize('name', ['a.txt', 'A.TXT', 'a.txt.gz', 'a.txt.zst'])
def test_a_text_is_a_document(tmp_path, name):
  content = '\ufeffOne\r\n\ufefftwo 中\n'.encode()
  _, compression = formats.split(epath.Path(name))
  if compression:
    content = pa.Codec(compression).compress(content, asbytes=True)
  (tmp_path / name).write_bytes(content)
  assert _read(_config(tmp_path, name)) == [Document('One\r\ntwo 中\n')]


def test_files_of_one_corpus_may_differ_and_gzip_may_have_members(tmp_path):
  documents = _pairs(4)
  _write(tmp_path / 'b.parquet', _objects(documents[2:]))
  members = [(json.dumps(o) + '\n').encode() for o in _objects(documents[:2])]
  (tmp_path / 'a.jsonl.gz').write_bytes(b''.join(map(gzip.compress, members)))
  assert _read(_config(tmp_path, '[ab].*')) == documents


@pytest.mark.parametrize('names', fields.PAIRS)
def test_pairs_are_known_by_their_names(names):
  config = CorpusConfig(corpus='a')
  item = dict(zip(names, ('Why?', 'So.'), strict=True))
  assert fields.document({**item, 'id': 7}, config) == Document('So.', 'Why?')


@pytest.mark.parametrize(
  'item,keys,wanted',
  [
    ({'instruction': 'Add.', 'input': '1', 'output': '2'}, {}, Document('2', 'Add.\n1')),
    ({'instruction': 'Go.', 'input': '', 'output': 'ok'}, {}, Document('ok', 'Go.')),
    ({'instruction': 'Go.', 'input': None, 'output': 'ok'}, {}, Document('ok', 'Go.')),
    ({'instruction': 'Go.', 'output': 'ok', 'history': []}, {}, Document('ok', 'Go.')),
    ({'text': 'a', 'prompt': None}, {}, Document('a')),
    ({'text': 'a', 'response': 'b', 'prompt': 'c'}, {}, Document('a', 'c')),
    ({'body': 'a', 'text': 'b'}, {'text_key': 'body'}, Document('a')),
    ({'body': 'a', 'q': 'b'}, {'text_key': 'body', 'prompt_key': 'q'}, Document('a', 'b')),
    ({'q': 'b', 'text': 'c', 'a': 'd'}, {'prompt_key': 'q', 'answer_key': 'a'}, None),
    ({b'text'.decode(): b'\xe4\xb8\xad'}, {}, Document('中')),
    ({'instruction': '', 'output': 'ok'}, {}, Document('ok', '')),
  ],
)
def test_fields_by_name(item, keys, wanted):
  found = fields.document(item, CorpusConfig(corpus='a', **keys))
  assert found == (wanted or Document('d', 'b'))


@pytest.mark.parametrize(
  'name,content,words',
  [
    ('a.jsonl', '{"text": 1' + '0' * 5000 + '}', r'a\.jsonl line 1: Exceeds the limit'),
    ('a.jsonl', '\n\n' + '[' * 100_000, r'a\.jsonl line 3: JSON nested deeper'),
    ('a.json', '[' * 100_000, r'a\.json: JSON nested deeper'),
    ('a.json', '[{"text": "a"}, {"text": 7}]', r"'text' must be text, got 7 in .*, item 2"),
    (
      'a.json',
      '{"text": "a"}\n{"text": "b"}',
      r'list of objects, got in .*Extra data',
    ),
    ('a.json', '"text"', r'must be a list of objects, got str'),
    ('a.json', '["a"]', r'must be an object .*got "a" in .*item 1'),
    ('a.csv', 'text,text\na,b\n', r"begin with the names .*\['text', 'text'\]"),
    ('a.csv', 'text,b\na\n', r'must have its 2 fields, got 1 in .*a\.csv line 2'),
    ('a.csv', 'text\n"a\n', r'quoted, comma-separated fields, got .*a\.csv line 2'),
    ('a.csv', 'body\na\n', r"field 'text', got the fields \['body'\] in .*a\.csv line 2"),
    ('a.parquet', 'text', r'\.parquet file must be readable, got .*a\.parquet'),
    ('a.jsonl.gz', 'text', r'readable and whole, got .*a\.jsonl\.gz'),
    ('a.jsonl.zst', 'text', r'readable and whole, got .*a\.jsonl\.zst'),
    ('a.parquet.gz', 'text', r'must end in .*all but the last also'),
    ('a.gz', 'text', 'must end in'),
    ('a', 'text', 'must end in'),
    ('a.jsonl', '{"messages": [{"role": "user"}]}', 'conversations are for fine-tuning'),
    ('a.json', '[{"conversations": [{"from": "human"}]}]', "the field 'conversations'"),
    ('a.jsonl', '{"prompt": "a", "response": "b", "history": [["c", "d"]]}', "'history'"),
    ('a.jsonl', '{"prompt": "a", "response": null}', r"'response' must be text, got null"),
    ('a.jsonl', '{"prompt": ["a"], "text": "b"}', r"'prompt' must be text, got \[\"a\"\]"),
  ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, words):
  (tmp_path / name).write_text(content)
  with pytest.raises(ValueError, match=words):
    _read(_config(tmp_path, name))


def test_a_compressed_file_that_ends_early_is_named(tmp_path):
  whole = gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)
  (tmp_path / 'a.jsonl.gz').write_bytes(whole[:-20])
  with pytest.raises(ValueError, match=r'readable and whole, got .*a\.jsonl\.gz'):
    _read(_config(tmp_path, 'a.jsonl.gz'))


@pytest.mark.parametrize('errors', ['strict', 'replace', 'ignore'])
@pytest.mark.parametrize(
  'encoding,likely', [('gb18030', 'GB18030'), ('utf-16', 'UTF-16'), ('shift_jis', '')]
)
def test_another_encoding_is_no_slip(tmp_path, errors, encoding, likely):
  """Replaced, three of four characters would be lost without a word."""
  text = (
    '今天天气很好，我們去公園。' if encoding != 'shift_jis' else 'これは日本語の文章です。'
  )
  (tmp_path / 'a.txt').write_bytes((text * 20).encode(encoding))
  with pytest.raises(ValueError, match=f'must be UTF-8.*iconv -f {likely}') as caught:
    _read(_config(tmp_path, 'a.txt', errors=errors))
  assert "'replace'" not in str(caught.value)


def test_the_same_text_is_the_same_corpus_whenever_it_was_written(tmp_path):
  (tmp_path / 'a.txt').write_text('One.')
  config = _config(tmp_path, 'a.txt')
  before = corpus.fingerprint(config)
  (tmp_path / 'a.txt').write_text('One.')
  os.utime(tmp_path / 'a.txt', (1, 1))
  assert corpus.fingerprint(config) == before
  (tmp_path / 'a.txt').write_text('Two.')
  assert corpus.fingerprint(config) != before
