"""Prose of the documentation: which paragraphs are sentences, and what is held out."""

import pytest
import tensorflow_datasets as tfds

from glm_jax.data.corpora import documentation, prose, sources
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.docstrings import SourceDocs


@pytest.mark.parametrize(
  'text,made',
  [
    ('This opens the door of a house for those who knock.', 1),
    ('  This opens the door of a house\n  for those who knock.\n', 1),
    ('This opens the door (or the `window`) of "a house" with 2 keys.', 1),
    # Too short, no beginning, no end, an item and what is indented below it.
    ('Opens the door.', 0),
    ('which opens the door of a house for those who knock.', 0),
    ('This opens the door of a house for those who knock', 0),
    ('Door: this opens the door of a house\n    for those who knock.', 0),
    # Code and numbers: one word in ten at most.
    ('This calls door.open(now=True) or self._door[3] if that is open.', 0),
    ('>>> This opens the door of a house for those who knock.', 0),
    ('', 0),
    ('\n\n \n', 0),
  ],
)
def test_paragraphs_of_plain_sentences_are_kept(text, made):
  found = [*prose.paragraphs(text)]
  assert found == [' '.join(text.split())] * made


def test_paragraphs_are_kept_in_order_and_apart():
  one, two = (
    'One opens the door of a house for you.',
    'Two opens the door of a house for me.',
  )
  assert [*prose.paragraphs(f'{one}\n\n>>> no\n\n{two}')] == [one, two]


def test_each_paragraph_once_and_what_is_learnt_is_not_held_out(tmp_path, monkeypatch):
  says = 'This opens the {} of a house for those who knock.'.format
  made = [
    SourceDocs('a', 'a/x', f'{says("door")}\n\n{says("door")}\n\n{says("gate")}'),
    SourceDocs('a', 'a/y', f'{says("door")}\n\n>>> code'),
    SourceDocs('b', 'b/x', f'{says("gate")}\n\n{says("hall")}'),
  ]
  monkeypatch.setattr(
    documentation, 'split_by_package', lambda documents: (made[:2], made[2:])
  )
  monkeypatch.setattr(documentation, '_read', lambda: made)
  config = CorpusConfig(corpus='documentation:prose', cache_dir=str(tmp_path))
  source = sources.of(config)
  assert not source.has_prompts()
  builder = prose.prepared(tmp_path)
  texts = {
    split: [e['text'].decode() for e in tfds.as_numpy(builder.as_dataset(split=split))]
    for split in ('train', 'validation')
  }
  assert texts == {
    'train': [f'{says("door")}\n{says("gate")}'],
    'validation': [says('hall')],
  }
