"""Answers of which people preferred one: what a line says, and how a pair becomes a row."""

import re

import numpy as np
import pytest
import tuned

from glm_jax.configs import UserError
from glm_jax.data.corpora import objects, ranked
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.corpora.fields import Document
from glm_jax.data.making import rendered, tokenized
from glm_jax.data.prepare_answers import plan_ranked
from glm_jax.data.rows.table import grouped_rows
from glm_jax.text import chat
from glm_jax.text.conversation import Message

ASKED = [('user', '1?'), ('assistant', 'one'), ('user', '2?')]
MESSAGES = [{'role': role, 'content': text} for role, text in ASKED]
ANSWER = lambda text: {'role': 'assistant', 'content': text}
LINES = {
  'transcripts': {
    'chosen': '\n\nHuman: 1?\n\nAssistant: one\n\nHuman: 2?\n\nAssistant: two',
    'rejected': '\n\nHuman: 1?\n\nAssistant: one\n\nHuman: 2?\n\nAssistant: ten',
  },
  'transcript and texts': {
    'prompt': '\n\nHuman: 1?\n\nAssistant: one\n\nHuman: 2?\n\nAssistant:',
    'chosen': ' two',
    'rejected': ' ten',
  },
  'messages': {
    'prompt': MESSAGES,
    'chosen': [ANSWER('two')],
    'rejected': [ANSWER('ten')],
  },
  'whole conversations': {
    'prompt': '2?',
    'chosen': [*MESSAGES, ANSWER('two')],
    'rejected': [*MESSAGES, ANSWER('ten')],
    'score_chosen': 8.5,
    'score_rejected': 7,
  },
  'alpaca': {
    'instruction': '2?',
    'input': '',
    'history': [['1?', 'one']],
    'chosen': 'two',
    'rejected': 'ten',
  },
  'a list': {
    'instruction': '2?',
    'history': [['1?', 'one']],
    'output': ['two', 'ten'],
  },
  'ShareGPT': {
    'conversations': [
      {'from': 'human', 'value': '1?'},
      {'from': 'gpt', 'value': 'one'},
      {'from': 'human', 'value': '2?'},
    ],
    'chosen': {'from': 'gpt', 'value': 'two'},
    'rejected': {'from': 'gpt', 'value': 'ten'},
  },
  'scored': {
    'prompt': MESSAGES,
    'answers': [{'text': 'ten', 'score': 1}, {'text': 'two', 'score': 1.5}],
  },
  'scores apart': {
    'messages': MESSAGES,
    'responses': ['ten', 'two'],
    'scores': [-1, 0],
  },
}


def _config(family='chatglm3'):
  return CorpusConfig(corpus='*.jsonl', conversations=family, ranked=True)


def _said(messages):
  return [(m.role, m.content.strip()) for m in messages]


@pytest.mark.parametrize('form', LINES)
@pytest.mark.parametrize('family', ['chatglm', 'chatglm3'])
def test_every_form_says_the_same_pair(form, family):
  document = objects.read(LINES[form], _config(family))
  [(better, worse)] = document.pairs
  assert _said(better) == [*ASKED, ('assistant', 'two')]
  assert _said(worse) == [*ASKED, ('assistant', 'ten')]
  assert document.unranked == 0
  # Of what was said before, nothing is learnt.
  assert [m.without_loss for m in better if m.role == 'assistant'] == [True, False]


def test_scored_answers_are_compared_each_with_each():
  line = {'instruction': 'n?', 'completions': []}
  for text, score in (('a', 3), ('b', 5), ('c', 3), ('', 1), ('b ', 4)):
    line['completions'].append({'response': text, 'overall_score': score})
  document = ranked.document(line, _config())
  found = [(b[-1].content, w[-1].content) for b, w in document.pairs]
  assert found == [('b', 'a'), ('b ', 'a'), ('b', 'c'), ('b ', 'c')]
  # Equal scores once, equal answers once, and four with an empty one.
  assert document.unranked == 6


TIED = {
  'prompt': 'a',
  'chosen': 'b',
  'rejected': 'c',
  'score_chosen': 1,
  'score_rejected': 1,
}


@pytest.mark.parametrize(
  'line,word',
  [
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'b '}, 'equal'),
    ({'prompt': 'a', 'chosen': '', 'rejected': 'b'}, 'empty'),
    (TIED, 'tied'),
    (
      {
        'chosen': '\n\nHuman: 1?\n\nAssistant: one',
        'rejected': '\n\nHuman: 2?\n\nAssistant: two',
      },
      'different questions',
    ),
  ],
)
def test_what_is_no_pair_is_counted_and_said(line, word):
  document = ranked.document(line, _config())
  assert document.pairs == () and document.unranked == 1
  counts = tokenized.new_counts()
  vocabulary = tuned.model('chatglm3')[1]
  plan = plan_ranked(64, template='chatglm3')
  assert not [*rendered.ranked([document], vocabulary, plan, 'drop', counts)]
  said = tokenized.in_words(counts)
  assert counts['unranked'] == 1 and re.search(f'1 with .*{word}.* left out', said), said


@pytest.mark.parametrize(
  'line,words',
  [
    ('text', 'must stand in an object'),
    ({'prompt': 'a', 'text': 'b'}, 'must be named'),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 3}, 'a text or messages'),
    ({'chosen': 'b', 'rejected': 'c'}, 'an answer to a question'),
    ({'prompt': 'a', 'answers': ['b']}, 'two or more'),
    ({'prompt': 'a', 'answers': ['b', 'c']}, 'a score must be a number'),
    ({'prompt': 'a', 'answers': ['b', 'c'], 'scores': [1, float('nan')]}, 'a number'),
    ({'prompt': 'a', 'answers': ['b', 'c'], 'scores': [1]}, 'as many as answers'),
  ],
)
def test_what_is_no_comparison_is_refused_with_its_place(line, words):
  with pytest.raises(UserError, match=f'{words}.* in x line 3'):
    ranked.document(line, _config(), lambda: ' in x line 3')


def _rows(lines, family, length, rule='truncate_prompt_left', blank=''):
  vocabulary = tuned.model(family)[1]
  template = '' if blank else family
  plan = plan_ranked(length, template=template, blank=blank)
  counts = tokenized.new_counts()
  config = _config('chatglm' if blank else family)
  documents = [ranked.document(line, config) for line in lines]
  pairs = rendered.ranked(documents, vocabulary, plan, rule, counts)
  return grouped_rows(pairs, plan.row_length), counts, vocabulary


@pytest.mark.parametrize('family', ['chatglm', 'chatglm2', 'chatglm3', 'glm4'])
def test_a_row_is_both_answers_whole(family):
  rows, counts, vocabulary = _rows([LINES['messages']], family, 200)
  template = chat.template_for(vocabulary, family)
  [(better, worse)] = ranked.document(LINES['messages'], _config(family)).pairs
  at = 0
  for messages in (better, worse):
    ids, scored = template.encode_masked(messages)
    assert rows.tokens[0, at : at + len(ids)].tolist() == ids
    assert rows.scored[0, at : at + len(ids)].tolist() == scored
    # One run of loss, up to the end: the last answer and what ends it.
    assert np.flatnonzero(np.diff(scored)).size == 1 and scored[-1]
    assert rows.starts[0, at]
    at += len(ids)
  # The end of the second is read, too, so a token stands behind it.
  assert rows.lengths[0] == at + 1 and rows.starts[0].sum() == 2
  assert counts['documents'] == 1 and counts['tokens'] == at and not counts['shortened']


def test_whole_turns_are_left_out_from_the_left_and_no_answer_is_cut():
  full = _rows([LINES['messages']], 'chatglm3', 200)[0]
  last = {'prompt': '2?', 'chosen': 'two', 'rejected': 'ten'}
  short = _rows([last], 'chatglm3', 200)[0]
  most, least = (int(rows.lengths[0]) for rows in (full, short))
  # A row of L positions holds L + 1 tokens.
  for room in range(least, most + 2):
    rows, counts, _ = _rows([LINES['messages']], 'chatglm3', room - 1)
    expected = full if room >= most else short
    n = int(expected.lengths[0])
    assert rows.lengths.tolist() == [n]
    assert rows.tokens[0, :n].tolist() == expected.tokens[0, :n].tolist()
    assert rows.scored[0, :n].tolist() == expected.scored[0, :n].tolist()
    assert counts['shortened'] == (room < most)
  assert _rows([LINES['messages']], 'chatglm3', most - 2, 'drop')[1]['dropped'] == 1
  with pytest.raises(UserError, match='must fit a row'):
    _rows([LINES['messages']], 'chatglm3', most - 2, 'error')


QUESTION = 'which of them is the quick one, 狐狸 or the lazy dog?'
LONG = {**LINES['alpaca'], 'instruction': QUESTION}


@pytest.mark.parametrize('family', ['chatglm', 'chatglm2', 'chatglm3', 'glm4'])
def test_the_last_question_loses_its_beginning_where_it_is_too_long(family):
  """As few characters as is enough; a pair is left out when there is no more to cut."""
  cut = lambda at: {**LINES['alpaca'], 'instruction': QUESTION[at:], 'history': []}
  whole = [_rows([cut(at)], family, 400)[0] for at in range(len(QUESTION))]
  sizes = [int(rows.lengths[0]) for rows in whole]
  seen = []
  for room in range(sizes[-1] - 3, sizes[0] + 1):
    rows, counts, _ = _rows([LONG], family, room - 1)
    if room < min(sizes):
      assert len(rows.tokens) == 0 and counts['dropped'] == 1
      continue
    assert counts['shortened'] == counts['documents'] == 1 and not counts['dropped']
    n = int(rows.lengths[0])
    [at] = [
      at
      for at, other in enumerate(whole)
      if rows.tokens[0, :n].tolist() == other.tokens[0, : sizes[at]].tolist()
    ]
    assert n <= room and (at == 0 or sizes[at - 1] > room)
    assert rows.scored[0, :n].tolist() == whole[at].scored[0, :n].tolist()
    assert rows.starts[0, :n].tolist() == whole[at].starts[0, :n].tolist()
    seen.append(at)
  assert seen[-1] == 0 and len({*seen}) > 5
  assert _rows([LONG], family, sizes[0] - 2, 'drop')[1]['dropped'] == 1
  with pytest.raises(UserError, match='must fit a row'):
    _rows([LONG], family, sizes[0] - 2, 'error')


def test_what_stands_around_a_cut_question_stays():
  system, question = Message('system', 'be brief'), Message('user', QUESTION)
  asked = (system, *(Message(*turn) for turn in ASKED[:2]), question)
  tool = Message('assistant', '{}', 'look'), Message('observation', 'none')
  for behind in ((), tool):
    answers = [(Message('assistant', text),) for text in ('two', 'ten')]
    whole, cut = (
      Document('', pairs=(tuple((*front, *behind, *answer) for answer in answers),))
      for front in (asked, (system, Message('user', '狸 or the lazy dog?')))
    )
    vocabulary = tuned.model('glm4')[1]
    read = lambda document, length: rendered.ranked(
      [document],
      vocabulary,
      plan_ranked(length, template='glm4'),
      'truncate_prompt_left',
      tokenized.new_counts(),
    )
    [expected] = read(cut, 400)
    # A row of L positions holds L + 1 tokens.
    [found] = read(whole, sum(len(ids) for ids, _ in expected) - 1)
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  'blank', ['{prompt} [MASK]', 'q: {prompt} [gMASK]', '[MASK]{prompt}']
)
def test_around_a_blank_tokens_of_both_questions_are_left_out_alike(blank):
  line = {'prompt': QUESTION, 'chosen': 'quick', 'rejected': 'slow as ever'}
  full, _, vocabulary = _rows([line], 'glm', 400, blank=blank)
  most, s = int(full.lengths[0]), vocabulary.specials
  at = lambda tokens, token: tokens.index(token)

  def sides(rows):
    n, [_, start] = int(rows.lengths[0]), np.flatnonzero(rows.starts[0])
    both = rows.tokens[0, :start].tolist(), rows.tokens[0, start : n - 1].tolist()
    assert rows.tokens[0, n - 1] == s.pad
    return [(ids[: at(ids, s.sop)], ids[at(ids, s.sop) :]) for ids in both]

  (asked, *answers), kept = zip(*sides(full), strict=True), []
  assert asked[0] == asked[1]
  question = vocabulary.encode(QUESTION)
  around = len(asked[0]) - len(question)
  for room in range(most - 2 * len(question) - 4, most + 1):
    rows, counts, _ = _rows([line], 'glm', room - 1, blank=blank)
    excess = -(-(most - room) // 2)
    if excess >= len(question):
      assert len(rows.tokens) == 0 and counts['dropped'] == 1
      continue
    (one, other), *found = zip(*sides(rows), strict=True)
    assert one == other and found == answers
    assert len(one) == around + len(question) - excess
    # Its beginning before the mask, its end behind it.
    left = question[:-excess] if blank.startswith('[') and excess else question[excess:]
    assert ' '.join(map(str, left)) in ' '.join(map(str, one))
    assert counts['shortened'] == (excess > 0)
    kept.append(excess)
  assert kept[0] == len(question) - 1 and kept[-1] == 0


def test_a_model_without_a_chat_template_is_asked_a_question():
  line = {'prompt': 'a fox?', 'chosen': 'quick', 'rejected': 'slow'}
  rows, _, vocabulary = _rows([line], 'glm', 64, blank='{prompt} [MASK]')
  ends = np.flatnonzero(rows.scored[0] & (rows.tokens[0] == vocabulary.specials.eop))
  assert len(ends) == 2 and rows.starts[0].sum() == 2
  with pytest.raises(UserError, match='a single question'):
    _rows([LINES['messages']], 'glm', 64, blank='{prompt} [MASK]')
