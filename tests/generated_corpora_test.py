"""Two hundred corpora of all kinds: no token is lost or doubled, files and shards agree."""

import collections
import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
from etils import epath

from glm_jax.configs import UserError
from glm_jax.data.corpora import parts
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.examples.objective_config import ObjectiveConfig, causal_packing
from glm_jax.data.making import shard_job, shard_runner, tokenized
from glm_jax.data.rows import pairs, shards
from glm_jax.data.rows.table import RowPlan
from glm_jax.text.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary()
PREFIX, EOS = VOCABULARY.prefix, VOCABULARY.specials.eos
# Letters of one to four bytes, control characters, line breaks of all kinds, and marks.
LETTERS = 'abc é中\u2028\u2029\x85\x00\x0b\x1f\r\n\t🙂\u200d\u202e"\\,\'\ud7ff\uffff'
GROUPS = 20


def _text(draw, longest):
  size = draw.choice([0, 1, 2, 3, draw.randrange(longest), draw.randrange(longest)])
  return ''.join(draw.choices(LETTERS, k=size))


def _corpus(draw, folder):
  """Files of one kind or several, and how they are read and become rows."""
  folder.mkdir()
  count = draw.choice([1, 3, 19, 20, 60, 199, 200, 230])
  longest = draw.choice([4, 30, 400])
  with_prompts = draw.random() < 0.5
  objects = []
  for number in range(count):
    fields = {'text': _text(draw, longest) if draw.random() < 0.9 else 'yes'}
    if with_prompts and draw.random() < 0.8:
      fields['prompt'] = f'{number} ' + _text(draw, longest)
    objects.append(fields)
  if draw.random() < 0.1:  # a huge one
    objects[0]['text'] = ''.join(draw.choices(LETTERS, k=20_000))
  cut = draw.randrange(count + 1)
  for name, some in (('a', objects[:cut]), ('b', objects[cut:])):
    if draw.random() < 0.5:
      lines = [json.dumps(o, ensure_ascii=draw.random() < 0.5) for o in some]
      text = ''.join(line + draw.choice(['\n', '\r\n', '\n\n']) for line in lines)
      (folder / f'{name}.jsonl').write_bytes(text.encode('utf-8'))
    else:
      (folder / f'{name}.json').write_text(json.dumps(some), encoding='utf-8')
  length = draw.choice([16, 40, 64])
  plan = draw.choice(
    [RowPlan(length + 1), causal_packing(length), ObjectiveConfig().packing(length)]
  )
  config = CorpusConfig(
    corpus=str(folder / '*.json*'),
    cache_dir=str(folder / 'cache'),
    validation_fraction=draw.choice([0.05, 0.3]),
    too_long=draw.choice(pairs.RULES[:3]),
  )
  return config, plan, objects


def _expected(config, plan):
  """Tokens of each split, and its counts, from documents one by one."""
  tokens = {split: collections.Counter() for split in shards.SPLITS}
  counts = {split: tokenized.new_counts() for split in shards.SPLITS}
  documents = []
  for part in parts.find(config, parts.PART_BYTES):
    for split, document in parts.read(config, part):
      documents.append(document)
      encoded = tokenized.encode([document], VOCABULARY, counts[split])
      fitting = pairs.fit(encoded, PREFIX, plan, config.too_long, counts[split])
      for prompt, text in fitting:
        tokens[split].update(
          [(t, False) for t in prompt.tolist()]
          + [(t, True) for t in text.tolist()]
          + [(EOS, True)]
        )
  return tokens, counts, documents


def _tokens(rows):
  """(token, whether it may carry loss) of all rows, without what opens documents."""
  table = rows.read()
  found = collections.Counter()
  for tokens, scored, starts, length in zip(*table, strict=True):
    assert length > 0 and not tokens[length:].any() and not scored[length:].any()
    for first in np.flatnonzero(starts):
      assert tuple(tokens[first : first + len(PREFIX)]) == PREFIX
      assert not scored[first : first + len(PREFIX)].any()
    found.update(zip(tokens[:length].tolist(), scored[:length].tolist(), strict=True))
  for token in PREFIX:
    found[token, False] -= int(table.starts.sum())
  return +found


@pytest.mark.parametrize('group', range(GROUPS))
def test_no_token_is_lost_or_doubled_and_files_and_shards_agree(tmp_path, group):
  draw = random.Random(group)
  for number in range(200 // GROUPS):
    folder = tmp_path / str(number)
    config, plan, objects = _corpus(draw, folder)
    try:
      tokens, counts, documents = _expected(config, plan)
      rows = {s: tokenized.cached_rows(config, VOCABULARY, s, plan) for s in shards.SPLITS}
    except UserError as error:
      # Of few documents, or of empty ones, nothing may be left to hold out or to learn.
      assert 'held out for validation' in str(error) or 'must hold' in str(error)
      continue
    # Below 20 documents, the end of one may be held out: its two halves are there.
    text = lambda d: d.prompt + '\0' + d.text
    if len(documents) == len(objects):
      wanted = sorted(o.get('prompt', '') + '\0' + o['text'] for o in objects)
      assert sorted(map(text, documents)) == wanted
    else:
      assert ''.join(d.text for d in documents) == ''.join(o['text'] for o in objects)
    for split in shards.SPLITS:
      assert _tokens(rows[split]) == tokens[split]
      assert {k: rows[split].stats[k] for k in shards.COUNTS} == counts[split]
    todo, count = parts.find(config, parts.PART_BYTES), draw.choice([1, 2, 7])
    job = shard_job.of_config(config, VOCABULARY, plan, todo, count=count, imports=())
    made = epath.Path(folder / 'shards')
    shard_runner.run(job, made, todo, 1)
    for split, stored in shards.load(str(made)).items():
      for ours, theirs in zip(stored.read(), rows[split].read(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # In smaller parts: other rows of the same documents, on the same sides.
    if not plan.packed and draw.random() < 0.3:
      smaller = dataclasses.replace(config, cache_dir=str(folder / 'other'))
      found = [p for part in parts.find(smaller, 200) for p in parts.read(smaller, part)]
      assert [d for _, d in found] == documents
    shutil.rmtree(folder)
