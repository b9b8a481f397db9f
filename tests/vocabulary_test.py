"""Vocabularies: every text comes back, no text makes a control piece."""

import dataclasses

import pytest

from glm_jax.text import loading
from glm_jax.text import vocabulary as vocabularies
from glm_jax.text.vocabulary import NAMES, ByteVocabulary, SentencePieceVocabulary

# From the Analects and from Lu Xun, both long in the public domain.
CHINESE = (
  '子曰：“学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠，不亦君子乎？”\n'
  '　　在我的后园，可以看见墙外有两株树，一株是枣树，还有一株也是枣树。……\n\n'
)
ENGLISH = (
  'Call me Ishmael.  Some years ago --\tnever mind how long precisely --\r\nhaving (12.5%).'
)
HARD = [
  '',
  ' ',
  '  leading',
  'trailing  ',
  '\n\n\n',
  'a\x00b',
  '🙂𠮷é́',
  '\u2028',
  '▁marks▁',
  ' '.join(NAMES),
  '[MASK]<eos><pad>[sop][eop]',
  '<0x41>',
  'ﬁ２①',
]


@pytest.fixture(scope='session')
def trained():
  texts = [CHINESE * 3, ENGLISH * 5, 'the cat sat on the mat. ' * 50]
  return SentencePieceVocabulary(vocabularies.train_sentencepiece(texts, 600))


@pytest.fixture(params=['trained', 'bytes'])
def vocabulary(request, trained):
  return trained if request.param == 'trained' else ByteVocabulary()


@pytest.mark.parametrize('text', [CHINESE, ENGLISH, *HARD])
def test_text_comes_back_exactly_without_control_pieces(vocabulary, text):
  ids = vocabulary.encode(text)
  assert vocabulary.decode(ids) == text
  assert all(0 <= token < vocabulary.specials.mask for token in ids)
  assert vocabulary.encode_batch([text, 'x'])[0].tolist() == ids


def test_control_pieces_follow_the_others_in_their_order(vocabulary):
  ids = dataclasses.astuple(vocabulary.specials)
  assert ids == tuple(range(vocabulary.size - 9, vocabulary.size))
  assert [vocabulary.piece(token) for token in ids] == list(NAMES)
  named = dataclasses.asdict(vocabulary.specials)
  assert (
    vocabulary.piece(named['gmask']) == '[gMASK]' and named['pad'] == vocabulary.size - 1
  )
  assert vocabulary.decode([*vocabulary.encode('a'), *ids]) == 'a'


def test_sentence_ends(vocabulary):
  ends = vocabulary.ends_sentence()
  assert ends.shape == (vocabulary.size,)
  assert not ends[vocabulary.specials.mask :].any()
  for text, wanted in (('.', True), ('?', True), ('\n', True), ('a', False), (',', False)):
    assert ends[vocabulary.encode(text)].any() == wanted, text


def test_chinese_sentence_ends(trained):
  ends = trained.ends_sentence()
  assert ends[trained.encode('树。')].any() and not ends[trained.encode('枣树')].any()


def test_a_vocabulary_survives_a_checkpoint(vocabulary):
  again = loading.from_dict(vocabulary.to_dict())
  assert again.fingerprint == vocabulary.fingerprint
  assert again.encode(CHINESE) == vocabulary.encode(CHINESE)
  with pytest.raises(ValueError, match='must be of a kind'):
    loading.from_dict({'kind': 'wordpiece'})


def test_a_model_file_keeps_its_ids(trained, tmp_path):
  import base64

  import sentencepiece

  model = base64.b64decode(trained.to_dict()['model'])
  (tmp_path / 'own.model').write_bytes(model)
  theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
  ours = loading.load(str(tmp_path / 'own.model'))
  assert ours.encode(ENGLISH) == theirs.encode(ENGLISH)
  assert ours.size == theirs.get_piece_size() + 9
  assert loading.load('bytes').size == 265


def test_unreadable_models_are_refused(tmp_path):
  with pytest.raises(ValueError, match='readable .model file'):
    loading.load(str(tmp_path / 'none.model'))
  (tmp_path / 'bad.model').write_bytes(b'not a model at all')
  with pytest.raises(ValueError, match=r'bad\.model.*must be a sentencepiece model'):
    loading.load(str(tmp_path / 'bad.model'))
  with pytest.raises(ValueError, match='some text, got none'):
    vocabularies.train_sentencepiece(['', ' \n'.strip()], 600)
  with pytest.raises(ValueError, match='512 or more'):
    vocabularies.train_sentencepiece(['text'], 100)
