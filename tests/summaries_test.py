"""Questions about functions: what is read of a source file, and what is held out."""

import json

import pytest
import tensorflow_datasets as tfds

from glm_jax.data.corpora import docstrings, documentation, sources, summaries
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.docstrings import Summary

SOURCE = '''
def get(self, key, /, default=None):
  """Returns the value
  of a key. Never raises.

  Args:
  """

class A:
  async def close(self):
    """Closes the connection."""

  def __init__(self):
    """Is not asked about."""

  def short(self):
    """Too short."""

  def bare(self):
    """Has no full stop"""
'''


def test_the_first_sentence_of_functions_is_read(tmp_path):
  (tmp_path / 'package').mkdir()
  (tmp_path / 'package' / 'x.py').write_text(SOURCE)
  (tmp_path / 'package' / 'broken.py').write_text('def (')
  assert docstrings.read_summaries((str(tmp_path), 'package/x.py')) == [
    Summary('package', 'get(key, default)', 'Returns the value of a key.'),
    Summary('package', 'close()', 'Closes the connection.'),
  ]
  assert docstrings.read_summaries((str(tmp_path), 'package/broken.py')) == []


@pytest.fixture
def made(monkeypatch):
  """What stands in for the documentation of all packages."""
  found = [Summary('a', f'f{i}(x)', f'Does the thing {i}.') for i in range(6)]
  found += [Summary('b', f'g{i}(x)', f'Does the thing {i}.') for i in range(4, 9)]
  found += [Summary('a', 'again(x)', 'Does the thing 0.')]
  monkeypatch.setattr(documentation, 'held_out', lambda folder: {'b'})
  monkeypatch.setattr(docstrings, 'summaries', lambda: iter(found))
  return found


def _examples(builder):
  return {
    split: [
      {k: v.decode() for k, v in example.items()}
      for example in tfds.as_numpy(builder.as_dataset(split=split))
    ]
    for split in ('train', 'validation')
  }


@pytest.fixture
def built(tmp_path, made):
  return _examples(summaries.prepared(tmp_path))


def test_of_two_commands_at_once_the_slower_reads_what_the_faster_made(
  tmp_path, made, monkeypatch
):
  faster = []

  def read():
    if not faster:
      faster.append(None)
      faster.append(_examples(summaries.prepared(tmp_path)))
    return iter(made)

  monkeypatch.setattr(docstrings, 'summaries', read)
  assert _examples(summaries.prepared(tmp_path)) == faster[1]
  assert len(faster[1]['train']) == 6


def test_held_out_packages_are_asked_about_what_no_other_answers(built):
  assert [e['response'] for e in built['train']] == [
    f'Does the thing {i}.' for i in range(6)
  ]
  assert built['train'][0]['prompt'] == 'What does f0(x) do?'
  assert [e['response'] for e in built['validation']] == [
    f'Does the thing {i}.' for i in (6, 7, 8)
  ]
  assert {e['package'] for e in built['validation']} == {'b'}


def test_a_corpus_of_that_name_holds_conversations(built, tmp_path):
  config = CorpusConfig(
    corpus='documentation:summaries', cache_dir=str(tmp_path), conversations='chatglm3'
  )
  source = sources.of(config)
  assert source.has_prompts() and source.has_validation() and source.holds(6)
  [document] = [
    d
    for part in source.parts(2**20)
    if part.split == 'train'
    for d in source.read(part)
    if 'f3' in d.messages[0].content
  ]
  said = [(m.role, m.content) for m in document.messages]
  assert said == [('user', 'What does f3(x) do?'), ('assistant', 'Does the thing 3.')]
  assert json.dumps(source.fingerprint()) == json.dumps(sources.of(config).fingerprint())
