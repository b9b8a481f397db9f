"""A corpus as a run sees it: documents by split, a fingerprint, a vocabulary."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence

from glm_jax.data.corpora import parts, sources, text_files
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.data.corpora.fields import Document
from glm_jax.text import loading
from glm_jax.text import vocabulary as vocabularies
from glm_jax.text.vocabulary import Vocabulary

# Counts up when other documents would be held out of the same text.
_RULE = 3


def documents(config: CorpusConfig, split: str) -> Iterator[Document]:
  """The documents of 'train' or 'validation', in a fixed order.

  Raises:
    UserError: no such files, none left, or text that cannot be read: the file and
      the line or byte are named.
  """
  for part in parts.find(config, parts.PART_BYTES):
    if part.split in ('', split):
      yield from (d for name, d in parts.read(config, part) if name == split)


def fingerprint(config: CorpusConfig) -> str:
  """Tells one state of a corpus from another."""
  found = sources.of(config).fingerprint()
  # And what decides which documents are held out, and how they are read.
  found += [config.validation, config.validation_fraction, config.errors, _RULE]
  found += [config.text_key, config.prompt_key, config.answer_key]
  return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def load_or_train_vocabulary(
  config: VocabularyConfig, corpora: Sequence[CorpusConfig]
) -> Vocabulary:
  """The vocabulary of a run: the one it names, that of its shards, or one trained on its
  text at first use, then cached."""
  if config.path:
    return loading.load(config.path)
  for corpus in corpora:
    own = sources.of(corpus).vocabulary()
    if own is not None:
      return own
  # A trained vocabulary is a .model file, whatever pieces stand behind it.
  kind = '' if config.kind == 'sentencepiece' else f'-{config.kind}'
  prints = '-'.join(map(fingerprint, corpora))
  name = f'{prints}-{config.size}{kind}.model'
  path = sources.cache_dir(corpora[0]) / 'vocabularies' / name
  if not path.exists():
    began = time.perf_counter()
    # Trained on training documents alone: validation must not shape the vocabulary.
    # Prompts are read by the model, too.
    texts = [
      text
      for corpus in corpora
      for document in documents(corpus, 'train')
      for text in (document.prompt, document.text)
      if text
    ]
    text_files.check_some(any(map(str.strip, texts)), corpora[0].corpus)
    model = vocabularies.train_sentencepiece(
      texts, config.size, bpe=config.kind == 'chatglm3'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written whole or not at all, since another run may be waiting for it.
    temporary = path.with_name(f'.{name}.{os.getpid()}')
    temporary.write_bytes(model)
    os.replace(temporary, path)
    vocab = loading.load(f'{config.kind}:{path}')
    print(
      f'vocabulary: {vocab.size:,} pieces in {time.perf_counter() - began:.0f} s ({path})',
      flush=True,
    )
    if vocab.size < config.size:
      print(f'  (the corpus has no more; {config.size:,} were asked for)', flush=True)
  return loading.load(f'{config.kind}:{path}')
