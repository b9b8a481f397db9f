"""Released vocabularies: ids and texts of the original code, and what text cannot spell."""

import functools
import importlib.util
import io
import json
import pathlib

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer

from glm_jax.interop import hub, tokenizer_files
from glm_jax.models import ChatGLM2Config, ChatGLMConfig, GLMConfig
from glm_jax.text import fast, loading, released
from glm_jax.text import vocabulary as vocabularies

_FOLDER = pathlib.Path(__file__).parent / 'golden'
GOLDEN = json.loads((_FOLDER / 'tokenizers.json').read_text())
# Ranks of a small vocabulary, and what tiktoken makes of texts with them.
TIKTOKEN = json.loads((_FOLDER / 'tiktoken.json').read_text())
# The original's settings; their vocabularies' files are in package SwissArmyTransformer.
SETTINGS = {
  'bert-base-uncased': 'bert:english_tokenizer/bert-base-uncased-vocab.txt',
  'bert-task-mask': 'bert:english_tokenizer/bert-base-uncased-vocab.txt',
  'gpt2-task-mask': 'gpt2:english_tokenizer',
  'gpt2-task-mask-dblock': 'gpt2:english_tokenizer',
  'roberta': 'roberta:english_tokenizer',
  'roberta-task-mask': 'roberta:english_tokenizer',
  'chinese': 'cog:chinese_sentencepiece/cog-pretrain.model',
  'chinese-dblock': 'cog:chinese_sentencepiece/cog-pretrain.model',
  'chinese-fix': 'cog-fixed:chinese_sentencepiece/cog-pretrain.model',
  'chinese-fix-dblock': 'cog-fixed:chinese_sentencepiece/cog-pretrain.model',
}


def original(setting):
  """The vocabulary of a setting, KIND:FILE, with the original's own file."""
  package = importlib.util.find_spec('sat')
  assert package, 'pip install --no-deps -r launch/requirements/vocabularies.txt'
  folder = pathlib.Path(package.origin).parent / 'tokenization/embed_assets'
  kind, _, path = setting.partition(':')
  return loading.load(f'{kind}:{folder / path}')


@pytest.mark.slow
@pytest.mark.parametrize('setting', GOLDEN)
def test_ids_and_texts_are_the_originals(setting):
  vocabulary, golden = original(SETTINGS[setting]), GOLDEN[setting]
  assert vocabulary.size >= golden['num_tokens']
  assert -(-vocabulary.size // 128) * 128 == golden['padded_to_128']
  for use, command in golden['command_tokens'].items():
    ours = getattr(
      vocabulary.specials, {'ENC': 'enc', 'MASK': 'mask'}.get(use, use.lower()), None
    )
    assert ours in (command['id'], None), use
    assert vocabulary.control.get(command['token'], command['id']) == command['id'], use
  # The original has task masks only where it was told so; here they are always known.
  names = [c['token'] for c in golden['command_tokens'].values()]
  for text, wanted in golden['texts'].items():
    ids = vocabulary.encode_marked(text, names)
    assert ids == wanted['ids'], text
    assert vocabulary.decode(ids, control=True) == wanted['decoded'], text


# What holds for every vocabulary, on small ones made here.

TEXTS = ('the quick brown fox jumps over the lazy dog. ' * 9, '语言模型在学习文字。' * 9)
SPECIAL_TEXTS = (
  'Plain English, and 中文 in one line.',
  'two  spaces,   three,\ttab\nline\n\nlines ',
  ' leading space',
  '[MASK] [gMASK] [sMASK] sop eop <sop> <eop> [CLS] <|endoftext|> </s> <s> [PAD]',
  '<|user|> <|assistant|> <|system|> <|observation|> <|startofpiece|> <|endofpiece|>',
  '',
)


def _sentencepiece(bpe=False, pieces=(), **options):
  """A small sentencepiece model; `pieces` are user-defined."""
  if not pieces and not options:
    return vocabularies.train_sentencepiece(list(TEXTS), 512, bpe=bpe)
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([*TEXTS, *TEXTS]),
    model_writer=model,
    model_type='bpe' if bpe else 'unigram',
    vocab_size=500 + len(pieces),
    hard_vocab_limit=False,
    byte_fallback=True,
    user_defined_symbols=list(pieces),
    minloglevel=2,
    pad_id=-1,
    **options,
  )
  return model.getvalue()


def _pairs():
  """vocab.json and merges.txt of byte-level pairs."""
  from tokenizers import models, pre_tokenizers, trainers

  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    initial_alphabet=sorted(alphabet),
    special_tokens=['<|endoftext|>'],
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS, trainer)
  content = json.loads(tokenizer.to_str())['model']
  merges = [m if isinstance(m, str) else ' '.join(m) for m in content['merges']]
  return json.dumps(content['vocab']), '#version: 0.2\n' + '\n'.join(merges)


def _glm4():
  """A tokenizer.json with GLM-4's added tokens, in its order."""
  vocab, merges = _pairs()
  tokenizer = Tokenizer.from_str(
    released.BytePairVocabulary.from_files(vocab, merges).to_dict()['tokenizer']
  )
  names = ['<|endoftext|>', '[MASK]', '[gMASK]', '[sMASK]', '<sop>', '<eop>']
  tokenizer.add_special_tokens([*names, *released.ROLES])
  return tokenizer.to_str()


ICE_PIECES = (
  '<n>',
  '<|tab|>',
  *(f'<|blank_{n}|>' for n in range(2, 81)),
  *('[MASK]', '[gMASK]', '[sMASK]', '<unused_0>', '<sop>', '<eop>'),
)
WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefghijklmnopqrstuvwxyz']
WORDS += [f'##{letter}' for letter in 'abcdefghijklmnopqrstuvwxyz'] + list('.,[]<>|语')
MAKERS = {
  'bytes': lambda: vocabularies.ByteVocabulary(),
  'sentencepiece': lambda: vocabularies.SentencePieceVocabulary(_sentencepiece()),
  'bert': lambda: released.BertVocabulary.from_files('\n'.join(WORDS)),
  'gpt2': lambda: released.BytePairVocabulary.from_files(*_pairs()),
  'roberta': lambda: released.RobertaVocabulary.from_files(*_pairs()),
  'cog': lambda: released.CogVocabulary(_sentencepiece(add_dummy_prefix=True)),
  'cog-fixed': lambda: released.FixedCogVocabulary(_sentencepiece(add_dummy_prefix=True)),
  'ice': lambda: released.IceVocabulary(_sentencepiece(pieces=ICE_PIECES)),
  'ice-130b': lambda: released.IceVocabulary(_sentencepiece(pieces=ICE_PIECES), 20_000),
  'chatglm2': lambda: released.ChatGLM2Vocabulary(
    _sentencepiece(bpe=True, add_dummy_prefix=True)
  ),
  'chatglm3': lambda: released.ChatGLM3Vocabulary(
    _sentencepiece(bpe=True, add_dummy_prefix=True)
  ),
  'glm4': lambda: released.GLM4Vocabulary(_glm4()),
}
EXACT = {'bytes', 'sentencepiece', 'gpt2', 'roberta', 'glm4'}  # the others clean text up


@pytest.fixture(scope='session')
def made():
  return functools.cache(lambda kind: MAKERS[kind]())


@pytest.mark.parametrize('kind', MAKERS)
def test_no_text_spells_a_control_piece(made, kind):
  vocabulary = made(kind)
  names = [*vocabulary.control, *SPECIAL_TEXTS]
  unknown = vocabulary.control.get('[UNK]') if kind == 'bert' else None  # a word's own fate
  for ids in vocabulary.encode_batch(names):
    assert not {*ids} & ({*vocabulary.control.values()} - {unknown})
    assert all(0 <= token < vocabulary.size for token in ids) and ids.dtype == np.int32


@pytest.mark.parametrize('kind', MAKERS)
def test_text_comes_back_and_control_pieces_are_apart(made, kind):
  vocabulary = made(kind)
  for text in SPECIAL_TEXTS:
    back = vocabulary.decode(vocabulary.encode(text))
    if kind in EXACT:
      assert back == text
    elif kind.startswith('ice'):
      assert back.strip() == text.strip()  # line breaks, tabs and runs of spaces included
  marked = vocabulary.encode_marked('fox [MASK] dog', ['[MASK]'])
  place = marked.index(vocabulary.specials.mask)
  # GLM-4's own file leaves the space before a mask in the text.
  before = 'fox ' if kind == 'glm4' else 'fox'
  assert marked[:place] == vocabulary.encode(before)
  assert '[MASK]' in vocabulary.decode(marked, control=True)
  assert 'MASK' not in vocabulary.decode(marked)
  assert vocabulary.specials.pad < vocabulary.size
  assert all(token < vocabulary.size for token in (*vocabulary.prefix, *vocabulary.suffix))
  assert {*vocabulary.stops} <= {*vocabulary.control.values()}


@pytest.mark.parametrize('kind', MAKERS)
def test_a_checkpoint_and_a_folder_give_the_same_vocabulary_again(made, kind, tmp_path):
  vocabulary = made(kind)
  again = loading.from_dict(json.loads(json.dumps(vocabulary.to_dict())))
  assert type(again) is type(vocabulary) and again.fingerprint == vocabulary.fingerprint
  text = SPECIAL_TEXTS[0]
  assert again.encode(text) == vocabulary.encode(text)
  assert again.control == vocabulary.control and again.size == vocabulary.size
  for name, content in vocabulary.files().items():
    (tmp_path / name).write_bytes(content)
  if kind in ('bytes', 'sentencepiece'):  # no released model has these
    return
  formats = {'chatglm2': 'chatglm2', 'chatglm3': 'glm', 'glm4': 'glm'}
  if kind == 'chatglm3':
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'x': list(released.ROLES)}))
  if kind == 'chatglm2':
    (tmp_path / 'tokenization_chatglm.py').write_text('names = ["[MASK]", "sop", "eop"]')
  if kind.startswith('cog'):
    gmask = 9 if kind == 'cog-fixed' else 7
    added = {'[gMASK]': gmask, '<|endofpiece|>': 7}
    (tmp_path / 'added_tokens.json').write_text(json.dumps(added))
  rows = 150_528 if kind == 'ice-130b' else vocabulary.size
  found = loading.find(tmp_path, formats.get(kind, 'glm-10b'), rows)
  if kind == 'roberta':  # told from GPT-2's by the ids of its own special pieces
    found = loading.load(f'roberta:{tmp_path}')
  assert type(found) is type(vocabulary) and found.fingerprint == vocabulary.fingerprint


def test_ids_of_chatglm2_and_chatglm3_follow_the_model(made):
  for kind, roles in (('chatglm2', 0), ('chatglm3', 4)):
    vocabulary = made(kind)
    first = vocabulary.size - 5 - roles
    names = ('[MASK]', '[gMASK]', '[sMASK]', 'sop', 'eop', *released.ROLES[:roles])
    assert [vocabulary.control[name] for name in names] == list(
      range(first, vocabulary.size)
    )
    assert vocabulary.prefix == (first + 1, first + 3)
  vocabulary = made('chatglm3')
  assert vocabulary.stops == (
    2,
    vocabulary.control['<|user|>'],
    vocabulary.control['<|observation|>'],
  )


def test_ice_spells_layout_and_leaves_room_for_images(made):
  plain, images = made('ice'), made('ice-130b')
  ids = plain.encode('fox\n\tdog   fox')
  names = [plain.piece(token) for token in ids]
  for name in ('<n>', '<|tab|>', '<|blank_3|>'):
    assert name in names
  assert [t + 20_000 for t in ids] == images.encode('fox\n\tdog   fox')
  assert images.size == plain.size + 20_000 and images.specials.pad == 20_003
  long = ' ' * 200
  assert plain.decode(plain.encode(f'a{long}b')) == f'a{long}b'


@pytest.mark.parametrize('kind', ['sentencepiece', 'chatglm2', 'chatglm3', 'unigram'])
def test_the_fast_tokenizer_gives_the_same_ids(made, kind):
  """Of the export; transformers and vLLM read it."""
  if kind == 'unigram':
    vocabulary = vocabularies.SentencePieceVocabulary(_sentencepiece(add_dummy_prefix=True))
  else:
    vocabulary = made(kind)
  tokenizer = fast.fast_tokenizer(vocabulary)
  for text in (
    *SPECIAL_TEXTS[:2],
    *TEXTS,
    'naïve café — “quotes” 😀',
    'a people of philosophy, sop, eop',
    'foxfox dogs',
  ):
    assert tokenizer.encode(text, add_special_tokens=False).ids == vocabulary.encode(text)
    ids = tokenizer.encode(text).ids
    assert ids == [*vocabulary.prefix, *vocabulary.encode(text)]
    assert tokenizer.decode(ids) == vocabulary.decode(ids)
  for name, token in vocabulary.control.items():
    assert tokenizer.token_to_id(f'<{name}>' if name in ('sop', 'eop') else name) == token


def test_the_fast_tokenizer_keeps_line_breaks_at_the_ends():
  """Where a vocabulary drops spaces there, it drops nothing else."""
  model = _sentencepiece(bpe=True, normalization_rule_name='identity')
  vocabulary = released.ChatGLM3Vocabulary(model)
  tokenizer = fast.fast_tokenizer(vocabulary)
  for text in ('\n', '  \nfox\n', ' fox \n\n  ', '\tfox\r\n', ' fox\n dog '):
    ids = vocabulary.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids


def test_vocabularies_are_seqio_vocabularies(made):
  """Where TensorFlow has no op, rows are tokenised beforehand, and a task says so."""
  import tensorflow as tf

  from glm_jax.data import preprocessors

  for kind in MAKERS:
    vocabulary = made(kind)
    seqio = preprocessors.SeqioVocabulary(vocabulary)
    text = 'the quick brown fox'
    assert seqio.decode(seqio.encode(text)) == vocabulary.decode(vocabulary.encode(text))
    assert seqio.pad_id == vocabulary.specials.pad and seqio.vocab_size == vocabulary.size
    source = tf.data.Dataset.from_tensor_slices({'text': [text]})
    if kind in ('bert', 'gpt2', 'roberta', 'glm4', 'ice', 'ice-130b'):
      with pytest.raises(ValueError, match='must be able to compute the vocabulary'):
        preprocessors.tokenize(source, vocabulary=vocabulary)
      continue
    made_ids = next(
      preprocessors.tokenize(source, vocabulary=vocabulary).as_numpy_iterator()
    )
    wanted = [*vocabulary.prefix, *vocabulary.encode(text), vocabulary.specials.eos]
    assert made_ids['tokens'].tolist() == wanted


def test_an_export_says_which_vocabulary_its_files_are(made, tmp_path):
  for kind in set(MAKERS) - {'roberta'}:
    folder, vocabulary = tmp_path / kind, made(kind)
    folder.mkdir()
    tokenizer_files.write_vocabulary(folder, vocabulary)
    found = loading.find(folder, 'chatglm2', vocabulary.size)
    assert (found.kind, found.fingerprint) == (vocabulary.kind, vocabulary.fingerprint)


CHATGLM = ChatGLMConfig(
  num_layers=1,
  hidden_size=32,
  num_heads=2,
  mlp_size=48,
  vocab_size=640,
  max_positions=64,
  deepnorm_layers=28,
)
CHATGLM2 = ChatGLM2Config(
  num_layers=1,
  hidden_size=32,
  num_heads=2,
  num_kv_heads=1,
  head_size=16,
  mlp_size=48,
  vocab_size=640,
  max_positions=64,
)


def _exported(folder, format, config, source, vocabulary):
  """config.json and tokenizer_config.json of an export."""
  folder.mkdir(parents=True)
  hub.check(format, config, source, vocabulary)
  hub.write_config(folder, format, config, source, 'float32', vocabulary)
  return [
    json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    for name in ('config.json', 'tokenizer_config.json')
  ]


def test_an_export_counts_control_pieces_as_its_vocabulary_does(made, tmp_path):
  """ChatGLM-6B's code finds the context by them; the first release had images before."""
  names = {'bos': '<sop>', 'eos': '<eop>', 'mask': '[MASK]', 'gmask': '[gMASK]'}
  found = {}
  for kind in ('ice', 'ice-130b'):
    vocabulary = made(kind)
    config, tokenizer = _exported(tmp_path / kind, 'chatglm', CHATGLM, {}, vocabulary)
    found[kind] = {name: config[f'{name}_token_id'] for name in (*names, 'pad')}
    for name, piece in names.items():
      assert vocabulary.piece(found[kind][name]) == piece
      assert tokenizer[f'{name}_token'] == piece
    assert tokenizer['num_image_tokens'] == (20_000 if kind == 'ice-130b' else 0)
    # What the files of another release said of it does not count.
    source = {'format': 'chatglm', 'config': dict.fromkeys(config, 130_004)}
    again, _ = _exported(tmp_path / f'{kind}2', 'chatglm', CHATGLM, source, vocabulary)
    assert {name: again[f'{name}_token_id'] for name in found[kind]} == found[kind]
  assert found['ice-130b'] == {k: v + 20_000 for k, v in found['ice'].items()}
  assert found['ice']['pad'] == 3


def test_ids_are_of_some_vocabulary_or_demanded(tmp_path):
  with pytest.raises(ValueError, match='--vocabulary=ice:PATH'):
    _exported(tmp_path / 'none', 'chatglm', CHATGLM, {}, None)
  # The original's, where the files of its tokenizer were not there.
  ids = {f'{name}_token_id': i for i, name in enumerate(('bos', 'mask', 'gmask', 'pad'))}
  source = {'format': 'chatglm', 'config': ids}
  config, tokenizer = _exported(tmp_path / 'source', 'chatglm', CHATGLM, source, None)
  assert {k: config[k] for k in ids} == ids and tokenizer == {}


def test_ids_that_end_an_answer_are_the_vocabularys_and_those_added_to_it(made, tmp_path):
  for kind, raw, right in (
    ('chatglm3', None, 2),
    ('chatglm3', [2, 700], [2, 700]),  # somebody's own
    ('chatglm3', [1, 700], 2),  # of another vocabulary
    ('glm4', None, [*made('glm4').stops]),
  ):
    source = {'format': 'chatglm2', 'config': {'eos_token_id': raw} if raw else {}}
    folder = tmp_path / f'{kind}{raw}'
    config, _ = _exported(folder, 'chatglm2', CHATGLM2, source, made(kind))
    assert config['eos_token_id'] == right
    assert config['pad_token_id'] == made(kind).specials.pad


def test_dropouts_and_deviations_of_an_export_are_the_models(made, tmp_path):
  fields = dict(embedding_dropout=0.2, attention_dropout=0.3, output_dropout=0.4)
  config = GLMConfig(
    num_layers=1,
    hidden_size=32,
    num_heads=2,
    vocab_size=640,
    max_positions=64,
    init_std=0.05,
    **fields,
  )
  written, _ = _exported(tmp_path / 'glm', 'glm-10b', config, {}, made('gpt2'))
  for field, value in fields.items():
    assert written[f'{field}_prob'] == value
  assert written['initializer_range'] == 0.05
  assert written['eos_token_id'] == made('gpt2').control['<|endofpiece|>']


@pytest.mark.parametrize(
  'kind', ['bert', 'gpt2', 'roberta', 'cog', 'cog-fixed', 'ice', 'chatglm3', 'glm4']
)
def test_an_export_for_published_code_names_its_tokenizer(made, kind, tmp_path):
  """And the ids of every piece that the code does not add itself."""
  names = {'bert': 'Bert', 'gpt2': 'GPT2', 'roberta': 'Roberta', 'cog': 'Chinese'}
  names |= {'cog-fixed': 'Chinese'}
  vocabulary = made(kind)
  if kind in names:
    sizes = dict(num_layers=1, hidden_size=32, num_heads=2, vocab_size=640)
    format, config = 'glm-10b', GLMConfig(**sizes, max_positions=64)
    right = f'tokenization_glm.GLM{names[kind]}Tokenizer'
  elif kind == 'ice':
    format, config, right = 'chatglm', CHATGLM, 'tokenization_chatglm.ChatGLMTokenizer'
  else:
    format, config = 'chatglm2', CHATGLM2
    right = f'tokenization_chatglm.ChatGLM{"4" if kind == "glm4" else ""}Tokenizer'
  model, tokenizer = _exported(tmp_path / kind, format, config, {}, vocabulary)
  assert tokenizer['auto_map'] == {'AutoTokenizer': [right, None]}
  assert tokenizer['tokenizer_class'] == right.split('.')[1]
  assert {'AutoConfig', 'AutoModel'} <= {*model['auto_map']}
  if kind in ('ice', 'chatglm3'):  # whose code adds them
    assert 'added_tokens_decoder' not in tokenizer
    return
  for number, token in tokenizer['added_tokens_decoder'].items():
    assert vocabulary.control[token['content']] == int(number)
  # Those of the model's own files, and no others, are left to them.
  left = {*vocabulary.control.values()} - {*map(int, tokenizer['added_tokens_decoder'])}
  own = {'bert': ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'), 'gpt2': ('<|endoftext|>',)}
  own |= {'glm4': own['gpt2'], 'roberta': ('<|endoftext|>', '[SEP]', '[CLS]', '[UNK]')}
  assert left == {vocabulary.control[name] for name in own.get(kind, ())}
  if format == 'glm-10b':
    added = json.loads((tmp_path / kind / 'added_tokens.json').read_text())
    assert added == {k: v for k, v in vocabulary.control.items() if v not in left}


def test_a_length_saved_in_a_tokenizer_json_is_not_obeyed(made):
  tokenizer = Tokenizer.from_str(_glm4())
  tokenizer.enable_truncation(4)
  tokenizer.enable_padding(length=8)
  vocabulary = released.GLM4Vocabulary(tokenizer.to_str())
  for text in ('a fox', TEXTS[0]):
    assert vocabulary.encode(text) == made('glm4').encode(text)


def test_a_control_piece_that_a_model_has_is_not_exported_twice():
  model = _sentencepiece(bpe=True, pieces=('[gMASK]',))
  with pytest.raises(
    ValueError, match=r"must not be pieces of its model, got \['\[gMASK\]'"
  ):
    fast.fast_tokenizer(released.ChatGLM3Vocabulary(model))


# GLM-4's tokenizer.model.


def test_tiktokens_file_gives_tiktokens_ids(tmp_path):
  """English, Chinese, code, spaces, numbers, marks: recorded from the package."""
  (tmp_path / 'tokenizer.model').write_text(TIKTOKEN['model'])
  found = loading.find(tmp_path, 'chatglm2', 151_552)
  assert found.kind == 'glm4' and len(TIKTOKEN['texts']) > 12
  for text, ids in TIKTOKEN['texts'].items():
    assert found.encode(text) == ids, text
    assert found.decode(ids) == text
  # In the order of the published code, behind the ranks: of 151,329 of them, <|user|> is
  # 151336, as GLM-4-9B's config.json has it.
  ranks = len(TIKTOKEN['model'].splitlines())
  names = ['<|endoftext|>', '[MASK]', '[gMASK]', '[sMASK]', '<sop>', '<eop>']
  names += [*released.ROLES, '<|begin_of_image|>', '<|end_of_image|>']
  names += ['<|begin_of_video|>', '<|end_of_video|>']
  assert found.control == {name: ranks + i for i, name in enumerate(names)}
  assert 151_329 + names.index('<|user|>') == 151_336
  assert found.stops == (ranks, ranks + 7, ranks + 9) and found.size == ranks + 14


def test_tiktokens_file_comes_back_and_its_tokenizer_json_is_the_same(tmp_path):
  (tmp_path / 'tokenizer.model').write_text(TIKTOKEN['model'])
  vocabulary = loading.load(f'glm4:{tmp_path}/tokenizer.model')
  files = vocabulary.files()
  assert files['tokenizer.model'] == TIKTOKEN['model'].encode()
  (tmp_path / 'tokenizer.json').write_bytes(files['tokenizer.json'])
  again = loading.load(f'glm4:{tmp_path}/tokenizer.json')
  assert again.fingerprint == vocabulary.fingerprint
  # transformers' own reading of the file begins a text so, too.
  tokenizer = Tokenizer.from_str(files['tokenizer.json'].decode())
  assert tokenizer.encode('a').ids == [*vocabulary.prefix, *vocabulary.encode('a')]
  # Of some other tokenizer.json no ranks are made up.
  assert [*released.GLM4Vocabulary(_glm4()).files()] == ['tokenizer.json']


def test_added_tokens_of_tiktokens_file_are_those_of_its_tokenizer_config(tmp_path):
  (tmp_path / 'tokenizer.model').write_text(TIKTOKEN['model'])
  ranks = len(TIKTOKEN['model'].splitlines())
  names = [*released.ROLES, '[MASK]', '[gMASK]', '[sMASK]', '<sop>', '<eop>']
  names += ['<|endoftext|>', '<think>']
  for first in (ranks, ranks + 1):
    added = {str(first + i): {'content': name} for i, name in enumerate(names)}
    text = json.dumps({'added_tokens_decoder': added})
    (tmp_path / 'tokenizer_config.json').write_text(text)
    if first == ranks:
      found = loading.find(tmp_path, 'chatglm2', 151_552)
      assert found.control == {name: ranks + i for i, name in enumerate(names)}
    else:
      with pytest.raises(ValueError, match=f'must be numbered from {ranks} on'):
        loading.find(tmp_path, 'chatglm2', 151_552)


@pytest.mark.parametrize(
  'change,message',
  [
    (lambda lines: [*lines[:300], 'no rank', *lines[300:]], 'in line 301'),
    (lambda lines: lines[:300] + lines[301:], 'must rank every byte'),
    (lambda lines: lines[1:], 'must rank every byte'),
  ],
)
def test_a_damaged_file_of_tiktoken_is_named(tmp_path, change, message):
  lines = change(TIKTOKEN['model'].splitlines())
  (tmp_path / 'tokenizer.model').write_text('\n'.join(lines))
  with pytest.raises(ValueError, match=rf'tokenizer\.model.*{message}'):
    loading.find(tmp_path, 'chatglm2', 151_552)


def test_tiktokens_file_beside_a_tokenizer_json_of_glm4(made, tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes(b'IQ== 0\nIg== 1\n')
  for name, content in made('glm4').files().items():
    (tmp_path / name).write_bytes(content)
  assert loading.find(tmp_path, 'chatglm2', 151_552).kind == 'glm4'
  assert loading.find(tmp_path, 'glm-10b', 100) is None  # no vocabulary of that format


@pytest.mark.parametrize(
  'spec,content,message',
  [
    ('bert:v.txt', b'a\nb', 'must have the pieces'),
    ('chatglm3:v.model', b'no model', 'must be a sentencepiece model'),
    ('ice:v.model', b'no model', 'must be a sentencepiece model'),
    ('glm4:v.json', b'{}', 'must be a tokenizer.json'),
    ('gpt2:v', None, 'must be .*readable'),
    ('bytes:v', b'x', 'must be a sentencepiece model|readable'),
  ],
)
def test_what_is_no_vocabulary_is_named(tmp_path, spec, content, message):
  kind, _, name = spec.partition(':')
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    loading.load(f'{kind}:{tmp_path / name}')
