"""Released vocabularies: ids and texts of the original code, and what text cannot spell."""

import importlib.util
import io
import json
import pathlib

import pytest
import sentencepiece
from tokenizers import Tokenizer

from glm_jax.text import fast, loading, released
from glm_jax.text import vocabulary as vocabularies

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'golden/tokenizers.json').read_text())
# The original's settings, and the file of the vocabulary in the SwissArmyTransformer package.
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


@pytest.mark.slow
@pytest.mark.parametrize('setting', GOLDEN)
def test_ids_and_texts_are_the_originals(setting):
  package = importlib.util.find_spec('sat')
  assert package, 'pip install --no-deps -r launch/requirements/vocabularies.txt'
  folder = pathlib.Path(package.origin).parent / 'tokenization/embed_assets'
  kind, _, path = SETTINGS[setting].partition(':')
  vocabulary, golden = loading.load(f'{kind}:{folder / path}'), GOLDEN[setting]
  assert vocabulary.size >= golden['num_tokens']
  assert -(-vocabulary.size // 128) * 128 == golden['padded_to_128']
  for use, command in golden['command_tokens'].items():
    ours = getattr(vocabulary.specials, {'ENC': 'enc', 'MASK': 'mask'}.get(use, use.lower()), None)
    assert ours in (command['id'], None), use
    assert vocabulary.control.get(command['token'], command['id']) == command['id'], use
  # The original has task masks only where it was told so; here they are always known.
  names = [c['token'] for c in golden['command_tokens'].values()]
  for text, wanted in golden['texts'].items():
    ids = vocabulary.encode_marked(text, names)
    assert ids == wanted['ids'], text
    assert vocabulary.decode(ids, control=True) == wanted['decoded'], text
