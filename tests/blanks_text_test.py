"""Text around masks and blanks: encoded and decoded as the released tokenizers do it."""

import itertools
import json
import pathlib
import re

import numpy as np
import pytest
from released_vocabularies_test import (
  ICE_PIECES,
  MAKERS,
  SETTINGS,
  _sentencepiece,
  original,
)
from tokenizers import Tokenizer

from glm_jax.configs import UserError
from glm_jax.data.examples import render
from glm_jax.inference import prompts
from glm_jax.inference.filling import Filler
from glm_jax.models import ChatGLM2Config, GLMConfig
from glm_jax.text import fast, released
from glm_jax.text import vocabulary as vocabularies

MASKS = ('[MASK]', '[gMASK]', '[sMASK]')
# Ids of THUDM/GLM's EncodeAsIds, of SwissArmyTransformer 0.4.12, with its vocabularies.
GOLDEN = json.loads(
  (pathlib.Path(__file__).parent / 'golden/masked_texts.json').read_text('utf-8')
)
# As the released ice_text.model, which keeps every space; as a model of a user's own.
KINDS = {
  **MAKERS,
  'ice, spaces kept': lambda: released.IceVocabulary(
    _sentencepiece(pieces=ICE_PIECES, remove_extra_whitespaces=False)
  ),
  'own, a space in front': lambda: vocabularies.SentencePieceVocabulary(
    _sentencepiece(add_dummy_prefix=True, remove_extra_whitespaces=False)
  ),
  'own, spaces cleaned up': lambda: vocabularies.SentencePieceVocabulary(
    _sentencepiece(add_dummy_prefix=True)
  ),
}
PHRASES = ['the quick brown fox', 'jumps over', 'lazy dog.', 'a', 'x = 3.14;', '“ ” …', '—']
PHRASES += [
  '语言模型',
  '在学习',
  '文字。',
  '中文, English',
  '：“好！”',
  '😀',
  '𠮷野家',
  'é́',
  'naïve',
]


@pytest.fixture(scope='session', params=KINDS)
def vocabulary(request):
  return KINDS[request.param]()


def _filler(vocabulary, config=GLMConfig, **sizes):
  """One that reads and writes text, and has no parameters."""
  sizes = dict(num_layers=1, hidden_size=8, num_heads=1, max_positions=64, **sizes)
  return Filler(config(**sizes, vocab_size=vocabulary.size), {}, vocabulary)


def _texts(seed, count=40):
  """Texts of a few phrases, in both scripts, with one space, several or none between."""
  rng = np.random.default_rng(seed)
  gaps = ('', ' ', ' ', ' ', '  ', '\n')
  for _ in range(count):
    words = rng.choice(PHRASES, rng.integers(1, 9))
    yield ''.join(word + gaps[rng.integers(len(gaps))] for word in words)


def _cut(ids, seed):
  """A text in parts at random borders of tokens; every other part is a blank."""
  rng = np.random.default_rng(seed)
  count = 2 * min(4, (len(ids) + 1) // 2)
  borders = [0, *sorted(rng.choice(len(ids) + 1, count, replace=False)), len(ids)]
  return [ids[start:end] for start, end in itertools.pairwise(borders)]


def _prompt(parts, mask):
  """With a mask for each blank."""
  return [*parts[0], *itertools.chain(*([mask, *part] for part in parts[2::2]))]


def test_blanks_filled_with_their_own_spans_give_the_text_back(vocabulary):
  filler = _filler(vocabulary)
  for seed, text in enumerate(_texts(0)):
    ids = vocabulary.encode(text)
    parts, whole = _cut(ids, seed), vocabulary.decode(ids)
    prompt = _prompt(parts, vocabulary.specials.mask)
    assert ''.join(vocabulary.decode_parts(parts)) == whole
    assert filler.text(prompt, parts[1::2]) == whole
    marked = filler.text(prompt, parts[1::2], ('⟦', '⟧'))
    assert re.sub('[⟦⟧]', '', marked) == whole
    assert len(re.findall('⟦[^⟦⟧]*⟧', marked)) == len(parts) // 2


def test_an_answer_in_its_blank_is_the_text(vocabulary):
  """The space that the mask has swallowed is the answer's."""
  if vocabulary.prefix and vocabulary.specials.gmask in vocabulary.prefix:
    pytest.skip('its models are causal')
  config = GLMConfig(
    num_layers=1,
    hidden_size=8,
    num_heads=1,
    max_positions=64,
    vocab_size=vocabulary.size,
  )
  filler = Filler(config, {}, vocabulary)
  for text in ('the quick brown fox', 'a lazy dog.', 'the quick dog. jumps'):
    for word in re.finditer(r'\S+', text):
      prompt = text[: word.start()] + '[MASK]' + text[word.end() :]
      spans = prompts.encode_answers(config, vocabulary, prompt, [word[0]])
      filled = filler.text(filler.encode(prompt), spans)
      assert filled == vocabulary.decode(vocabulary.encode(text)), (prompt, spans)


def test_a_span_brings_its_own_space():
  for kind in ('ice', 'ice-130b', 'cog', 'ice, spaces kept', 'own, a space in front'):
    vocabulary = KINDS[kind]()
    filler = _filler(vocabulary)
    prompt = filler.encode('the dog is [MASK] .')
    span = vocabulary.encode('quick')  # in the middle of a text it begins with a space
    if kind == 'own, a space in front':
      assert vocabulary.encode_marked('[MASK]dog', ['[MASK]'])[1:] == [
        vocabulary._processor.piece_to_id(piece) for piece in 'dog'
      ]
    assert filler.text(prompt, [span]) == 'the dog is quick .', kind
    assert filler.text(prompt, [span], ('[', ']')) == 'the dog is[ quick] .', kind
    prompt = filler.encode('语言[MASK]文字 。')
    assert filler.text(prompt, [vocabulary.encode('模型')]).startswith('语言 模型'), kind


@pytest.mark.slow
@pytest.mark.parametrize('kind', GOLDEN)
def test_masks_in_a_text_are_encoded_as_by_the_original(kind):
  setting = next(s for s in SETTINGS.values() if s.partition(':')[0] == kind)
  vocabulary = original(setting)
  for text, ids in GOLDEN[kind].items():
    assert vocabulary.encode_marked(text, MASKS) == ids, text


# A text with a mask, and the texts that the parts around it are encoded as.
AROUND = {
  # transformers strips both sides of a mask, and each part begins as a text does.
  'ice': {
    'the fox is [MASK] .': ('the fox is', '.'),
    'the fox is[MASK].': ('the fox is', '.'),
    'one  [MASK]   [sMASK]\n two': ('one', '', 'two'),
    '语言[MASK]。': ('语言', '。'),
    '语言 [MASK] 。': ('语言', '。'),
    '[MASK] fox': ('', 'fox'),
    'in the end [gMASK]': ('in the end', ''),
  },
  # THUDM/GLM: the space before a mask alone.
  'cog': {
    'the fox is [MASK] .': ('the fox is', ' .'),
    '语言 [MASK]。': ('语言', '。'),
  },
  'gpt2': {
    'the fox is [MASK] .': ('the fox is', ' .'),
    'the fox is [MASK].': ('the fox is', '.'),
    '语言 [MASK] 。': ('语言', ' 。'),
  },
  # ChatGLM3's tokenizer cuts at its roles, and leaves spaces as they are.
  'chatglm3': {
    '<|user|>\n the fox <|assistant|> 语言': ('', '\n the fox ', ' 语言'),
  },
}
AROUND |= {'ice-130b': AROUND['ice'], 'ice, spaces kept': AROUND['ice']}
AROUND |= {'cog-fixed': AROUND['cog'], 'roberta': AROUND['gpt2']}


@pytest.mark.parametrize('kind', AROUND)
def test_parts_around_masks_are_encoded_each_as_a_text(kind):
  vocabulary = KINDS[kind]()
  names = [*MASKS, *released.ROLES]
  for text, parts in AROUND[kind].items():
    masks = re.findall('|'.join(map(re.escape, names)), text)
    wanted = vocabulary.encode(parts[0])
    for mask, part in zip(masks, parts[1:], strict=True):
      wanted += [vocabulary.control[mask], *vocabulary.encode(part)]
    assert vocabulary.encode_marked(text) == wanted, text


def test_one_space_behind_a_mask_is_one_piece():
  """As ChatGLM-6B's tokenizer has it; the space in front of a text is not added to it."""
  vocabulary = KINDS['ice, spaces kept']()
  ids = vocabulary.encode_marked('fox [MASK] dog')
  pieces = [vocabulary.piece(token) for token in ids]
  assert ''.join(pieces) == '▁fox[MASK]▁dog'
  assert vocabulary.decode(ids, control=True) == 'fox[MASK] dog'
  assert vocabulary.decode(ids) == 'fox dog'


def test_glm4_reads_masks_as_its_tokenizer_does():
  vocabulary = KINDS['glm4']()
  theirs = Tokenizer.from_str(vocabulary.to_dict()['tokenizer'])
  for text in GOLDEN['gpt2']:
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert vocabulary.encode_marked(text) == ids, text
    assert vocabulary.decode(ids, control=True) == theirs.decode(
      ids, skip_special_tokens=False
    )


@pytest.mark.parametrize('kind', ['sentencepiece', 'chatglm2', 'chatglm3'])
def test_the_exported_tokenizer_reads_masks_as_we_do(kind):
  vocabulary = KINDS[kind]()
  tokenizer = fast.fast_tokenizer(vocabulary)
  for text in GOLDEN['gpt2']:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == vocabulary.encode_marked(text), text


@pytest.mark.parametrize(
  'kind', ['bytes', 'sentencepiece', 'own, a space in front', 'own, spaces cleaned up']
)
def test_a_text_of_our_own_reads_with_masks_as_it_is_trained_on(kind):
  """Wherever a blank is cut: the best pieces of a whole are the best of its parts."""
  vocabulary, tried = KINDS[kind](), 0
  for seed, text in enumerate(_texts(1, count=300)):
    parts = _cut(vocabulary.encode(text), seed)
    texts = vocabulary.decode_parts(parts)[::2]
    # A mask takes the space before it, also the one in front of a text, and no string is
    # cut within a character.
    spaces = any(part != part.rstrip() for part in texts[:-1]) or (
      parts[0] and not texts[0]
    )
    if spaces or any('\ufffd' in vocabulary.decode(part) for part in parts):
      continue
    prompt = _prompt(parts, vocabulary.specials.mask)
    assert vocabulary.encode_marked('[MASK]'.join(texts), MASKS) == prompt
    tried += 1
  assert tried > 10


@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind != 'bert'])
def test_a_character_cut_at_the_end_of_a_span_is_not_shown(kind):
  vocabulary = KINDS[kind]()
  filler = _filler(vocabulary)
  prompt = [*vocabulary.encode('fox'), vocabulary.specials.mask, *vocabulary.encode('dog')]
  # Behind the text, whose last piece is the last byte of a character.
  span = vocabulary.encode('ab 😀')
  shown = filler.text(prompt, [span], ('⟦', '⟧'))
  assert shown.count('😀⟧') == 1
  for cut in (1, 2, 3):
    assert filler.text(prompt, [span[:-cut]], ('⟦', '⟧')) == shown.replace('😀', '')
    end = filler.text(prompt[:-1], [span[:-cut]])
    assert '\ufffd' not in end
  # What is no beginning of a character stays to be seen; so does the mark itself.
  invalid = [*span[:-4], span[-1]]
  assert filler.text(prompt, [invalid], ('⟦', '⟧')).count('\ufffd⟧') == 1
  mark = vocabulary.encode('ab \ufffd')
  if '\ufffd' in vocabulary.decode(mark):
    assert filler.text(prompt, [mark], ('⟦', '⟧')).count('\ufffd⟧') == 1


def test_a_causal_text_goes_on_without_a_piece_of_a_character():
  vocabulary = KINDS['chatglm3']()
  filler = _filler(vocabulary, ChatGLM2Config, num_kv_heads=1, head_size=8, mlp_size=8)
  prompt, span = filler.encode('the fox'), vocabulary.encode('😀')
  assert filler.text(prompt, [span], ('[', ']')) == 'the fox[ 😀]'
  assert filler.text(prompt, [span[:-1]], ('[', ']')) == 'the fox[ ]'


# What a person reads of an example.


def _example(vocabulary, text, seed):
  """GLM's layout of a text with blanks, whose spans follow in another order."""
  s = vocabulary.specials
  parts = _cut(vocabulary.encode(text), seed)
  part_a = [*vocabulary.prefix, *_prompt(parts, s.mask), *vocabulary.suffix]
  rows = [(token, s.pad, place, 0) for place, token in enumerate(part_a)]
  places = len(vocabulary.prefix) - 1 + np.cumsum([len(part) + 1 for part in parts[::2]])
  blanks = [*zip(places, parts[1::2], strict=False)]
  for place, span in sorted(blanks, key=lambda blank: (blank[0] * 7919) % 31):
    inputs, targets = [s.sop, *span], [*span, s.eop]
    rows += [
      (*both, place, number)
      for number, both in enumerate(zip(inputs, targets, strict=True), 1)
    ]
  tokens, targets, positions, blocks = np.array(rows, np.int32).T
  t = np.arange(len(rows))
  return {
    'tokens': tokens,
    'targets': targets,
    'positions': positions,
    'block_positions': blocks,
    'key_start': 0 * t,
    'key_end': np.maximum(len(part_a), t + 1),
    'loss_weights': (blocks > 0).astype(np.float32),
    'objective': 0 * t,
  }


def _read_back(lines, vocabulary):
  """The document of the lines of an example: spans in the place of their masks."""
  names, s = vocabulary.names, vocabulary.specials
  head, *spans = lines
  sop, eop = re.escape(names[s.sop]), re.escape(names[s.eop])
  found = [
    re.fullmatch(f'  position (\\d+), [^:]*:  {sop}(.*)  =>  (.*){eop}', x) for x in spans
  ]
  assert all(match and match[2] == match[3] for match in found)
  found.sort(key=lambda match: int(match[1]))
  text = head.removeprefix('Part A  ')
  for token in vocabulary.prefix:
    text = text.removeprefix(names[token])
  for token in vocabulary.suffix:
    text = text.removesuffix(names[token])
  kept = text.split('[MASK]')
  texts = [*itertools.chain(*zip(kept, [m[2] for m in found] + [''], strict=True))]
  return ''.join(texts).replace('↵', '\n')


def test_an_example_reads_as_its_text(vocabulary, monkeypatch):
  monkeypatch.setattr(render, '_WIDTH', 10_000)
  alone = []
  for seed, text in enumerate(_texts(2, count=12)):
    example = _example(vocabulary, text, seed)
    _, *lines = render.render(example, vocabulary).split('\n')
    assert _read_back(lines, vocabulary) == vocabulary.decode(vocabulary.encode(text))
    alone.append((example, [line.split('sees')[0] for line in lines]))
  # Side by side in a row, each sees itself alone and reads as it did.
  (first, lines), (second, more) = alone[:2]
  offset = len(first['tokens'])
  row = {k: np.concatenate([first[k], second[k]]) for k in first}
  row['key_start'][offset:] += offset
  row['key_end'][offset:] += offset
  _, *packed = render.render(row, vocabulary).split('\n')
  assert [line.split('sees')[0] for line in packed] == [*lines, *more]


# What a command is asked for.


def test_a_prompt_that_is_not_utf8_is_refused():
  filler = _filler(KINDS['bytes']())
  for prompt in (b'caf\xe9 [MASK]'.decode('utf-8', 'surrogateescape'), '[MASK] \ud83d'):
    with pytest.raises(UserError, match=r"must be UTF-8 text, got '.*\\ud.*; save"):
      filler.encode(prompt)


def test_a_text_to_be_continued_is_encoded_with_its_mask(vocabulary):
  filler = _filler(vocabulary)
  for text in ('the fox ', '语言', 'a\n'):
    assert filler.encode(text, gmask=True) == filler.encode(text + '[gMASK]')
