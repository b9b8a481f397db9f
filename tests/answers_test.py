"""Rows of answers: what carries loss, what sees what, and what is left out."""

import dataclasses
import functools
import itertools
import json
import random

import jax
import numpy as np
import pytest
import small
import tensorflow as tf
import tuned
from chat_test import EXPORTED, WORDS, _template, assistant, conversation, export, user

from glm_jax import models
from glm_jax.batch import OBJECTIVES, Batch
from glm_jax.configs import UserError
from glm_jax.data import pipeline, preprocessors
from glm_jax.data.corpora import turns
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.fields import Document
from glm_jax.data.examples.answers import MixedText, answers
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.making import rendered, tokenized
from glm_jax.data.prepare_answers import TEXT, plan_answers, plan_text, prepare_answers
from glm_jax.data.rows.table import pack
from glm_jax.data.stream.mixing import MixtureConfig
from glm_jax.data.stream.source import IndexedRows, Reading
from glm_jax.inference import prompts
from glm_jax.inference.chatting import Chat
from glm_jax.text import asking, chat
from glm_jax.text.conversation import Message
from glm_jax.training import losses

FAMILIES = ('chatglm', 'chatglm2', 'chatglm3', 'glm4')
LENGTH = 128


def _counts():
  return tokenized.new_counts()


def _pieces(documents, vocabulary, plan, rule='truncate_prompt_left', counts=None):
  made = rendered.pieces(documents, vocabulary, plan, rule, counts or _counts())
  return [(ids.tolist(), scored.tolist()) for ids, scored in made]


def _said(*messages):
  return Document('x', messages=messages)


def marked(vocabulary, ids, learnt):
  """Text of ids, what is learnt between « and »; written apart from `render`."""
  text = ''
  groups = itertools.groupby(zip(ids, learnt, strict=True), lambda pair: pair[1])
  for learns, group in groups:
    said = vocabulary.decode([token for token, _ in group], control=True)
    text += f'«{said}»' if learns else said
  return text


def silent(text):
  return Message('assistant', text, without_loss=True)


# By hand, from the programs of the families (chat.py says which).
GOLDEN = [
  (
    'chatglm3',
    [Message('system', 'S'), user('a'), assistant('b'), user('c'), assistant('d')],
    [
      '[gMASK]sop<|system|>\nS<|user|>\na<|assistant|>«\nb<|user|>»\nc<|assistant|>«\nd</s>»'
    ],
  ),
  (
    'chatglm3',
    [user('a'), silent('b'), user('c'), assistant('d'), user('e'), silent('f')],
    ['[gMASK]sop<|user|>\na<|assistant|>\nb<|user|>\nc<|assistant|>«\nd</s>»'],
  ),
  (
    'chatglm3',
    [user('a'), assistant('b', 'f'), Message('observation', 'c'), assistant('d')],
    [
      '[gMASK]sop<|user|>\na<|assistant|>«f\nb<|observation|>»\nc<|assistant|>«\nd</s>»',
    ],
  ),
  (
    'chatglm3',
    [user('a'), assistant('b'), assistant('{}', 'f')],
    ['[gMASK]sop<|user|>\na<|assistant|>«\nb<|assistant|>f\n{}<|observation|>»'],
  ),
  (
    'glm4',
    [user('a'), assistant('b'), user('c'), assistant('d')],
    ['[gMASK]<sop><|user|>\na<|assistant|>«\nb<|user|>»\nc<|assistant|>«\nd<|endoftext|>»'],
  ),
  (
    'chatglm2',
    [user('a'), assistant('b'), user('c'), assistant('d')],
    [
      '[gMASK]sop[Round 1]\n\n问：a\n\n答：«b</s>»',
      '[gMASK]sop[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：c\n\n答：«d</s>»',
    ],
  ),
  (
    'chatglm2',
    [user('a'), silent('b'), user('c'), assistant('d')],
    ['[gMASK]sop[Round 1]\n\n问：a\n\n答：b\n\n[Round 2]\n\n问：c\n\n答：«d</s>»'],
  ),
  (
    'chatglm',
    [user('a'), assistant('b'), user('c'), assistant('d')],
    [
      '[ENC]a[gMASK]<eos>[sop]«b[eop]»',
      '[ENC][Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答：[gMASK]<eos>[sop]«d[eop]»',
    ],
  ),
  ('chatglm3', [user('a'), silent('b')], []),
]


def _close(text):
  """Without the spaces that a vocabulary begins texts with."""
  return text.replace(' ', '')


@pytest.mark.parametrize('family,messages,wanted', GOLDEN)
def test_what_is_learnt_of_a_conversation(family, messages, wanted):
  _, vocabulary = tuned.model(family)
  counts = _counts()
  plan = plan_answers(LENGTH * 4, template=family)
  found = _pieces([_said(*messages)], vocabulary, plan, counts=counts)
  texts = [marked(vocabulary, *piece) for piece in found]
  assert [*map(_close, texts)] == [*map(_close, wanted)]
  assert counts['documents'] == len(wanted) and counts['skipped'] == (not wanted)


PAIRS = [
  ('{prompt}[gMASK]', 'Why', '[ENC]Why[gMASK][sop]«Because[eop]»'),
  ('{prompt} [MASK].', 'Why', '[ENC]Why[MASK].<eos>[sop]« Because[eop]»'),
  ('[sMASK] Content: {prompt}', 'Why', '[ENC][sMASK] Content: Why<eos>[sop]«Because[eop]»'),
  ('{prompt}', 'So [MASK] then', '[ENC]So[MASK] then<eos>[sop]« Because[eop]»'),
]


@pytest.mark.parametrize('blank,prompt,wanted', PAIRS)
def test_what_is_learnt_of_a_pair(blank, prompt, wanted):
  """And its ids are those that `generate` reads and scores."""
  config, vocabulary = tuned.model('glm')
  [(ids, scored)] = _pieces(
    [Document('Because', prompt)], vocabulary, plan_answers(LENGTH, blank=blank)
  )
  assert marked(vocabulary, ids, scored) == wanted
  text = blank.replace('{prompt}', prompt)
  asked = prompts.encode(config, vocabulary, text)
  assert ids[: len(asked)] == asked
  [answer] = prompts.encode_answers(config, vocabulary, text, ['Because'])
  assert ids[len(asked) + 1 : -1] == answer


def _object(messages):
  return {'messages': [{k: v for k, v in vars(m).items() if v} for m in messages]}


class _Listening:
  """A session that notes what it is asked, and says nothing."""

  window = 10**6

  def answer(self, ids, **how):
    self.asked = ids
    yield []


@pytest.mark.parametrize('family', FAMILIES)
def test_ids_are_those_of_chat_and_of_the_exported_jinja(family, tmp_path):
  """From a line of a file to a document of a row, over random conversations."""
  name = tuned.MODELS[family][1]
  template, rng = _template(family, name), random.Random(family)
  theirs = None
  if (family, name) in EXPORTED:
    theirs = export(tmp_path, template.vocabulary, family)
  config = CorpusConfig(corpus='*.jsonl', conversations=family)
  plan = plan_answers(10**4, template=family)
  for _ in range(25):
    messages = [*conversation(rng, template, WORDS), assistant('the fox')]
    system = [m for m in messages if m.role == 'system']
    if len(system) > 1:  # of those, the user's chat has one
      messages = [m for m in messages if m is not system[0]]
      system = system[1:]
    document = turns.document(json.loads(json.dumps(_object(messages))), config)
    assert document.messages == tuple(messages)
    pieces = _pieces([document], template.vocabulary, plan)
    ids, scored = pieces[-1]
    begins = max(i for i, learns in enumerate(scored) if not learns) + 1
    # What the last answer is read behind. Behind a call, chat goes on by itself.
    listening = _Listening()
    talk = Chat(
      listening, template, max_new_tokens=1, system=''.join(m.content for m in system)
    )
    talk.messages = [m for m in messages[:-2] if m.role != 'system']
    list(talk.say(messages[-2].content))
    assert listening.asked == ids[:begins], messages
    if theirs:
      assert theirs(messages[:-1]) == ids[:begins], messages
      if 'observation' in template.roles:
        assert [*theirs(messages, opening=False), template.stops[0]] == ids


# Rows and batches.


def _documents(family, count=60, seed=0):
  config = CorpusConfig(corpus='*.jsonl', conversations=family)
  return [turns.document(line, config) for line in tuned.lines(count, seed)]


def _rows(table):
  """Rows in memory as the source gives them."""
  rows = {name: tf.constant(value) for name, value in table._asdict().items()}
  count = len(table.lengths)
  numbers = np.arange(count)
  return tf.data.Dataset.from_tensors(
    {
      **rows,
      'index': tf.constant(numbers, tf.int64),
      'step': tf.zeros([count], tf.int64),
      'keys': tf.constant(numbers + 7, tf.uint64),
      'corpus': tf.zeros([count], tf.int32),
    }
  )


def _batch(table, vocabulary, config, length=LENGTH):
  made = answers(
    _rows(table),
    {'tokens': length},
    vocabulary=vocabulary,
    causal=config.causal,
    two_positions=not config.causal and config.two_positions,
  )
  [batch] = made.as_numpy_iterator()
  return Batch(**{name: batch[name] for name in Batch._fields if name in batch})


def _expected(ids, scored, at, vocabulary, config):
  """Fields of a document's tokens, at a place in a row, by plain Python."""
  s = vocabulary.specials
  n, begins = len(ids), scored.index(True)
  fields = {name: [] for name in Batch._fields[:-1]}
  sop = begins - 1
  place = max(
    (i for i, token in enumerate(ids[:sop]) if token in (s.mask, s.gmask, s.smask)),
    default=0,
  )
  for i in range(n):
    fields['tokens'].append(ids[i])
    last = i == n - 1
    fields['loss_weights'].append(0.0 if last else float(scored[i + 1]))
    fields['targets'].append(None if last else ids[i + 1])
    fields['objective'].append(OBJECTIVES.index('answer'))
    fields['key_start'].append(at)
    if config.causal or i >= sop:
      fields['key_end'].append(at + i + 1)
    else:
      fields['key_end'].append(at + sop)
    in_b = not config.causal and i >= sop
    fields['block_positions'].append(i - sop + 1 if in_b else 0)
    goes_on = not config.causal and not config.two_positions and ids[place] == s.gmask
    fields['positions'].append(place if in_b and not goes_on else i)
  return fields


CASES = [
  *((family, family, '') for family in FAMILIES),
  ('chatglm one position', 'chatglm', ''),
  *(('glm', '', blank) for blank, *_ in PAIRS[:3]),
  ('glm one position', '', PAIRS[0][0]),
  ('glm one position', '', PAIRS[1][0]),
  ('chatglm3', '', ''),
]


def _case(model, template, blank):
  """A model, its vocabulary, a plan, and pieces with it."""
  family = model.split()[0]
  config, vocabulary = tuned.model(family)
  if 'one position' in model:
    config = dataclasses.replace(tuned.model('chatglm')[0], two_positions=False)
  plan = plan_answers(LENGTH, template=template, blank=blank)
  if template:
    documents = _documents(template)
  else:
    rng = random.Random(3)
    documents = [
      Document('a' * rng.randint(1, 20), 'why ' * rng.randint(1, 8)) for _ in range(60)
    ]
  if template or blank:
    return config, vocabulary, plan, _pieces(documents, vocabulary, plan)
  prefix, eos = vocabulary.prefix, vocabulary.specials.eos
  pieces = []
  for document in documents:
    asked = [*prefix, *vocabulary.encode(document.prompt)]
    learnt = [*vocabulary.encode(document.text), eos]
    pieces.append(([*asked, *learnt], [False] * len(asked) + [True] * len(learnt)))
  return config, vocabulary, plan, pieces


def _arrays(pieces):
  return [(np.array(ids, np.int32), np.array(scored)) for ids, scored in pieces]


@pytest.mark.parametrize('case', CASES, ids=str)
def test_a_batch_holds_each_document_as_plain_python_has_it(case):
  """Tokens, targets, loss, positions and intervals of all, whatever stands beside them."""
  config, vocabulary, plan, pieces = _case(*case)
  table = pack(_arrays(pieces), plan)
  assert len(table.lengths) < len(pieces)
  batch = _batch(table, vocabulary, config)
  left = {tuple(ids): scored for ids, scored in pieces}
  for row, length in enumerate(table.lengths):
    ids = table.tokens[row, :length].tolist()
    at = 0
    while at < length:
      [end] = [at + n for n in range(1, length - at + 1) if tuple(ids[at : at + n]) in left]
      found = ids[at:end]
      wanted = _expected(found, left[tuple(found)], at, vocabulary, config)
      # The last token of a row is a target alone.
      seen = min(end, length - 1) - at
      for name, values in wanted.items():
        got = getattr(batch, name)[row, at : at + seen].tolist()
        for t, (a, b) in enumerate(zip(got, values[:seen], strict=True)):
          assert b is None or a == b, (name, row, at + t)
      at = end
    rest = slice(length - 1, None)
    assert not batch.loss_weights[row, rest].any() and not batch.key_end[row, rest].any()
    assert (batch.tokens[row, length:] == vocabulary.specials.pad).all()
  learnt = sum(sum(scored) for _, scored in pieces)
  assert batch.loss_weights.sum() == learnt


@pytest.mark.parametrize(
  'case',
  [
    ('chatglm3', 'chatglm3', ''),
    pytest.param(('chatglm', 'chatglm', ''), marks=pytest.mark.slow),
    pytest.param(CASES[5], marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_a_packed_document_has_the_loss_it_has_alone(case):
  config, vocabulary, plan, pieces = _case(*case)
  packed = pack(_arrays(pieces), plan)
  alone = dataclasses.replace(plan, room=tuple([plan.positions] * len(plan.room)))
  apart = pack(_arrays(pieces), alone)
  assert len(apart.lengths) == len(pieces) > len(packed.lengths)
  loss = losses.pretraining_loss(models.build(config, models.ComputeConfig()))
  measure = jax.jit(lambda *given: loss(*given, None)[1]['loss/answer'])
  params = {'params': small.params(config)}
  sums = [
    measure(params, _batch(rows, vocabulary, config)._replace(index=None))
    for rows in (packed, apart)
  ]
  np.testing.assert_allclose(sums[0], sums[1], rtol=2e-6)


# What is too long.


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('rule', ['truncate_prompt_left', 'truncate_answer', 'drop'])
def test_too_long_a_conversation_loses_whole_rounds_and_keeps_its_end(family, rule):
  _, vocabulary = tuned.model(family)
  template = chat.template_for(vocabulary, family)
  rng = random.Random(1)
  limit = 60
  plan = plan_answers(limit - 1, template=family)
  seen = {'whole': 0, 'rounds': 0, 'cut': 0, 'dropped': 0}
  for _ in range(60):
    text = lambda most: 'x y ' * rng.randint(1, most)
    rounds = [(user(text(6)), assistant(text(14))) for _ in range(rng.randint(1, 3))]
    messages = [*itertools.chain(*rounds)]
    for example in template.examples(messages):
      counts = _counts()
      found = _pieces([_said(*example)], vocabulary, plan, rule, counts)
      ids, scored = template.encode_masked(example)
      if template.reads_again or family == 'chatglm2':  # an example for each answer
        found = found[-1:] if counts['documents'] else []
      if len(ids) <= limit:
        assert found[-1] == (ids, scored) and not counts['dropped']
        seen['whole'] += 1
        continue
      # The most rounds that fit, by trying all.
      starts = [i for i, m in enumerate(example) if m.role == 'user']
      kept = [template.encode_masked(example[start:]) for start in starts]
      kept = [piece for piece in kept if len(piece[0]) <= limit]
      if kept and rule != 'drop':
        assert found[-1] == kept[0] and counts['shortened']
        seen['rounds'] += 1
      elif found and rule == 'truncate_answer':
        (cut, flags), (whole, _) = found[-1], template.encode_masked(example[-2:])
        assert cut[:-1] == whole[: limit - 1] and cut[-1] == whole[-1]
        assert len(cut) == limit and flags[-1] and flags[-2]
        seen['cut'] += 1
      else:
        assert counts['dropped'] and rule in ('drop', 'truncate_prompt_left')
        seen['dropped'] += 1
  assert seen['whole'] and (seen['rounds'] > 0) == (rule != 'drop')
  assert (seen['cut'] > 0) == (rule == 'truncate_answer')


def test_too_long_is_an_error_that_names_the_line():
  _, vocabulary = tuned.model('chatglm3')
  document = _said(user('x ' * 200), assistant('y'))._replace(where=lambda: ' in a line 3')
  plan = plan_answers(60, template='chatglm3')
  with pytest.raises(
    UserError, match=r'must fit a row, 61 tokens, got \d+ tokens in a line 3'
  ):
    _pieces([document], vocabulary, plan, 'error')


@pytest.mark.parametrize('blank', [blank for blank, *_ in PAIRS[:3]])
def test_too_long_a_prompt_keeps_its_mask_and_its_pattern(blank):
  _, vocabulary = tuned.model('glm')
  limit, prompt = 40, ''.join(chr(97 + i % 26) for i in range(50))
  counts = _counts()
  plan = plan_answers(limit - 1, blank=blank)
  [(ids, scored)] = _pieces([Document('Yes', prompt)], vocabulary, plan, counts=counts)
  assert len(ids) == limit and counts['shortened'] == 1
  # What is farthest from the mask is left out; all else stays.
  whole = asking.encode_pair(vocabulary, blank, prompt, 'Yes', 10**6)[0]
  gone = len(whole) - limit
  kept = prompt[:-gone] if blank.startswith('[') else prompt[gone:]
  [short] = _pieces([Document('Yes', kept)], vocabulary, plan)
  assert (ids, scored) == short
  counts = _counts()
  long_answer = Document('y' * 60, 'why')
  assert not _pieces([long_answer], vocabulary, plan, counts=counts) and counts['dropped']
  [(ids, scored)] = _pieces([long_answer], vocabulary, plan, 'truncate_answer')
  assert len(ids) == limit and scored[-1] and ids[-1] == vocabulary.specials.eop


# Text of pretraining between the answers.


def _prepared(folder, family, share=0.25):
  config, vocabulary = tuned.model(family)
  tuned.write(folder / 'lines.jsonl', tuned.lines(300))
  text = [{'text': 'the quick brown fox jumps. ' * (2 + i % 9)} for i in range(300)]
  tuned.write(folder / 'text.jsonl', text)
  here = functools.partial(CorpusConfig, cache_dir=str(folder / 'cache'))
  corpora = {
    'answers': here(corpus=str(folder / 'lines.jsonl'), conversations=family),
    TEXT: here(corpus=str(folder / 'text.jsonl')),
  }
  objectives = ObjectiveConfig(blank=0.5, document=0.5)
  causal = config.causal
  plans = {
    'answers': plan_answers(LENGTH, template=family),
    TEXT: plan_text(LENGTH, objectives, causal=causal),
  }
  prepared = prepare_answers(
    'glm_conversations',
    corpora,
    plans,
    vocabulary,
    mixture=MixtureConfig(),
    text_share=share,
    objectives=objectives,
    causal=causal,
    two_positions=not causal,
  )
  return prepared, vocabulary, objectives, plans


def _stream(count, batch_size=8, split='train', **more):
  task = 'glm_conversations' + ('_evaluation' if split == 'validation' else '')
  stream = pipeline.dataset(
    task,
    {'tokens': LENGTH},
    batch_size=batch_size,
    seed=1,
    split=split,
    train=split == 'train',
    **more,
  )
  return [*itertools.islice(stream.as_numpy_iterator(), count)]


@pytest.mark.parametrize(
  'family', ['chatglm3', pytest.param('chatglm', marks=pytest.mark.slow)]
)
def test_text_is_mixed_in_by_its_share(family, tmp_path):
  prepared, *_ = _prepared(tmp_path, family)
  batches = _stream(125)
  corpus = np.concatenate([b['corpus'] for b in batches])
  objective = np.concatenate([b['objective'][:, 0] for b in batches])
  assert (corpus == 1).mean() == 0.25
  assert {*objective[corpus == 0]} == {OBJECTIVES.index('answer')}
  wanted = ('causal',) if family == 'chatglm3' else ('blank', 'document')
  assert {OBJECTIVES[i] for i in objective[corpus == 1]} == {*wanted}
  assert all((b['loss_weights'].sum(1) > 0).all() for b in batches)
  # Any step is reached by itself, and validation has both.
  [again] = _stream(1, start_step=7)
  assert all((again[name] == batches[7][name]).all() for name in again)
  held_out = _stream(50, split='validation')
  assert {*np.concatenate([b['corpus'] for b in held_out])} == {0, 1}
  assert [c.name for c in prepared.corpora] == ['answers', TEXT]


def test_text_of_a_prefix_model_is_masked_as_in_pretraining(tmp_path):
  prepared, vocabulary, objectives, plans = _prepared(tmp_path, 'chatglm')
  source = IndexedRows(prepared.corpora, Reading(batch_size=32))
  [rows] = source.get_dataset(seed=1).take(1)
  text = tf.where(rows['corpus'] == 1)[:, 0]
  alone = {name: tf.gather(value, text) for name, value in rows.items()}
  data = tf.data.Dataset.from_tensors(alone)
  lengths = {'tokens': LENGTH}
  mixture = preprocessors.glm_mixture(
    data, lengths, vocabulary=vocabulary, config=objectives, plan=plans[TEXT]
  )
  mixed = answers(
    tf.data.Dataset.from_tensors(rows),
    lengths,
    vocabulary=vocabulary,
    causal=False,
    two_positions=True,
    text=MixedText(TEXT, 1, objectives, plans[TEXT]),
  )
  [wanted], [got] = mixture.as_numpy_iterator(), mixed.as_numpy_iterator()
  assert len(text) > 2
  for name in Batch._fields:
    np.testing.assert_array_equal(got[name][text.numpy()], wanted[name], err_msg=name)
