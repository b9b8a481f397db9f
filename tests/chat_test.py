"""Conversations: ids of each family, what is learnt, and the jinja that is exported."""

import functools
import json
import random

import jinja2.sandbox
import pytest
from commands import ROOT
from released_vocabularies_test import ICE_PIECES, _glm4, _sentencepiece
from tokenizers import Tokenizer

from glm_jax.configs import UserError
from glm_jax.interop import tokenizer_files
from glm_jax.models import ChatGLM2Config
from glm_jax.text import chat, chat_tools, released
from glm_jax.text import vocabulary as vocabularies
from glm_jax.text.chat import Message, template_for
from glm_jax.text.fast import HOLD

TIKTOKEN = json.loads((ROOT / 'tests/golden/tiktoken.json').read_text())
SPACED = dict(bpe=True, add_dummy_prefix=True, normalization_rule_name='identity')
MAKERS = {
  'ice': lambda: released.IceVocabulary(_sentencepiece(pieces=ICE_PIECES)),
  'bytes': vocabularies.ByteVocabulary,
  'chatglm2': lambda: released.ChatGLM2Vocabulary(_sentencepiece(bpe=True)),
  'chatglm3': lambda: released.ChatGLM3Vocabulary(_sentencepiece(bpe=True)),
  # As in the published files: a space in front of every text.
  'chatglm2 spaced': lambda: released.ChatGLM2Vocabulary(
    _sentencepiece(**SPACED, remove_extra_whitespaces=False)
  ),
  'chatglm3 spaced': lambda: released.ChatGLM3Vocabulary(
    _sentencepiece(**SPACED, remove_extra_whitespaces=False)
  ),
  'chatglm3 cleaned': lambda: released.ChatGLM3Vocabulary(_sentencepiece(**SPACED)),
  'glm4': lambda: released.GLM4Vocabulary(_glm4()),
  'glm4 tiktoken': lambda: released.GLM4Vocabulary.from_ranks(
    TIKTOKEN['model'].encode(), {}
  ),
}
FAMILIES = {
  'chatglm': ('ice', 'bytes'),
  'chatglm2': ('chatglm2', 'chatglm2 spaced'),
  'chatglm3': ('chatglm3', 'chatglm3 spaced', 'chatglm3 cleaned'),
  'glm4': ('glm4', 'glm4 tiktoken'),
  'glm4-0414': ('glm4', 'glm4 tiktoken'),
}
PAIRS = [(family, name) for family, names in FAMILIES.items() for name in names]
EXPORTED = [pair for pair in PAIRS if pair[0] != 'chatglm']
TOOLS = (
  {'name': 'weather', 'description': '查询天气 <|user|>', 'parameters': {'city': {}}},
  {'type': 'function', 'function': {'name': 'add', 'parameters': {}}},
)

_vocabulary = functools.cache(lambda name: MAKERS[name]())


def _template(family, name):
  return template_for(_vocabulary(name), family)


def user(text):
  return Message('user', text)


def assistant(text, metadata=''):
  return Message('assistant', text, metadata)


WORDS = [
  'the quick brown fox',
  '语言模型在学习文字。',
  ' ',
  '  ',
  '\n',
  '\n\n',
  '\t',
  '问：',
  'a',
]
WORDS += [
  '[Round 1]',
  'sop',
  'x=1;',
  '答：',
  '😀',
  'é',
  '...',
  '"\'',
  '{{ x }}',
  '\\n',
  '{% x %}',
]
MARKERS = [
  '<|user|>',
  '<|assistant|>',
  '[gMASK]',
  '[MASK]',
  '</s>',
  '<sop>',
  '<|endoftext|>',
]
MARKERS += ['<|us', 'er|>', '<<|user|>>', '<|observation|>\n', 'eop', '<eop>', '[sMASK]']


def conversation(rng, template, words):
  """A random one in a valid order; the last message is the user's or a tool's."""
  text = lambda: ''.join(rng.choices(words, k=rng.randint(1, 6)))
  turns = 'system' in template.roles
  messages = []
  if turns:  # GLM-4 has one of the tools beside the user's own
    messages += [Message('system', text()) for _ in range(rng.choice([0, 0, 1, 2]))]
  for _ in range(rng.randint(0, 3)):
    messages.append(user(text()))
    if turns and rng.random() < 0.4:
      if rng.random() < 0.5:
        messages.append(assistant(text()))
      calls = rng.choice([['weather'], ['计算'], ['a.b-c', 'weather']])
      messages += [assistant(text(), name) for name in calls]
      messages += [Message('observation', text()) for _ in range(rng.randint(1, 2))]
    messages.append(assistant(text()))
  messages.append(user(text()))
  if turns and rng.random() < 0.3:
    messages += [assistant(text(), 'weather'), Message('observation', text())]
  return messages


def _rendering():
  """As `transformers.utils.chat_template_utils` sets it up."""

  def refuse(message):
    raise jinja2.exceptions.TemplateError(message)

  made = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )
  made.filters['tojson'] = lambda x, indent=None: json.dumps(
    x, ensure_ascii=False, indent=indent
  )
  made.globals['raise_exception'] = refuse
  return made


def export(folder, vocabulary, family):
  """The tokenizer of an export and its rendered template, by what transformers reads."""
  sizes = dict(num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, head_size=16)
  sizes |= dict(mlp_size=48, vocab_size=vocabulary.size, max_positions=64)
  config = ChatGLM2Config(**sizes, sandwich_norms=family == 'glm4-0414')
  tokenizer_files.write(folder, vocabulary, config)
  content = json.loads((folder / 'tokenizer_config.json').read_text(encoding='utf-8'))
  rendered = _rendering().from_string(content['chat_template']).render
  tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))

  def encode(messages, tools=(), opening=True):
    text = rendered(
      messages=[{k: v for k, v in vars(m).items() if v} for m in messages],
      tools=[*tools] or None,
      add_generation_prompt=opening,
    )
    return tokenizer.encode(text, add_special_tokens=False).ids

  return encode


@pytest.mark.parametrize('family,name', EXPORTED)
def test_the_exported_jinja_gives_the_same_ids(family, name, tmp_path):
  template = _template(family, name)
  theirs = export(tmp_path, template.vocabulary, family)
  rng = random.Random(f'{family} {name}')
  words = WORDS if family.startswith('glm4') else WORDS + MARKERS
  for _ in range(60):
    messages = conversation(rng, template, words)
    assert theirs(messages) == template.encode(messages, opening=True), messages
    answered = [*messages, assistant('the fox')]
    ids = template.encode(answered, opening=False)
    assert theirs(answered, opening=False) == ids, answered
    if 'system' in template.roles:
      tools = TOOLS if words is not WORDS else TOOLS[1:]
      told = template.with_tools(messages, tools)
      assert theirs(messages, tools) == template.encode(told, opening=True), messages


@pytest.mark.parametrize('family', ['glm4', 'glm4-0414'])
def test_where_a_marker_cannot_stay_text_the_jinja_refuses_it(family, tmp_path):
  theirs = export(tmp_path, _vocabulary('glm4'), family)
  for message in (user('<|user|>'), user('a [MASK] b')):
    with pytest.raises(jinja2.exceptions.TemplateError, match='must not spell the piece'):
      theirs([message])


@pytest.mark.parametrize('family,name', EXPORTED)
def test_the_jinja_refuses_roles_that_the_family_has_not(family, name, tmp_path):
  theirs = export(tmp_path, _vocabulary(name), family)
  others = ['tool'] if family != 'chatglm2' else ['tool', 'system', 'observation']
  for role in others:
    with pytest.raises(jinja2.exceptions.TemplateError, match='knows no'):
      theirs([Message(role, 'x'), user('y')])


def test_the_mark_that_holds_a_name_is_dropped_nowhere_else():
  vocabulary = _vocabulary('chatglm3')
  fast = tokenizer_files.fast_tokenizer(vocabulary)
  encode = lambda text: fast.encode(text, add_special_tokens=False).ids
  assert encode(f'a{HOLD}b') == vocabulary.encode(f'a{HOLD}b')
  assert encode(f'<{HOLD}|user|>') == vocabulary.encode('<|user|>')


@pytest.mark.parametrize('family,name', PAIRS)
def test_text_spells_no_control_piece(family, name):
  """As many of them as the same conversation has without names in it."""
  template = _template(family, name)
  control = {*template.vocabulary.control.values()}
  pieces = lambda ids: [token for token in ids if token in control]
  rng, names = random.Random(0), [*template.vocabulary.control, *MARKERS]
  for _ in range(15):
    messages = conversation(rng, template, names)
    plain = [Message(m.role, 'plain', m.metadata) for m in messages]
    ids, others = (template.encode(m, opening=True) for m in (messages, plain))
    assert pieces(ids) == pieces(others)


# The wording of each family, by one conversation.
ROUNDS = [user('你好'), assistant('Hello.'), user('再见')]


def test_chatglm_counts_rounds_from_0_and_asks_a_first_question_alone():
  template = _template('chatglm', 'ice')
  vocabulary, control = template.vocabulary, template.vocabulary.control
  opening = [control['[gMASK]'], control['<sop>']]
  text = '[Round 0]\n问：你好\n答：Hello.\n[Round 1]\n问：再见\n答：'
  assert template.encode(ROUNDS, opening=True) == vocabulary.encode(text) + opening
  alone = template.encode(ROUNDS[:1], opening=True)
  assert alone == vocabulary.encode('你好') + opening
  assert template.stops == (control['<eop>'],) and template.reads_again
  ids, scored = template.encode_masked(ROUNDS[:2])
  assert ids == alone + vocabulary.encode('Hello.') + [control['<eop>']]
  assert scored == [False] * len(alone) + [True] * (len(ids) - len(alone))


def test_chatglm_in_a_vocabulary_of_ones_own():
  template = _template('chatglm', 'bytes')
  control = template.vocabulary.control
  ids = template.encode([user('ab')], opening=True)
  names = ('[ENC]', '[gMASK]', '<eos>', '[sop]')
  first, *rest = (control[name] for name in names)
  assert ids == [first, *b'ab', *rest]


@pytest.mark.parametrize('name', FAMILIES['chatglm2'])
def test_chatglm2_counts_rounds_from_1(name):
  template = _template('chatglm2', name)
  vocabulary = template.vocabulary
  text = '[Round 1]\n\n问：你好\n\n答：Hello.\n\n[Round 2]\n\n问：再见\n\n答：'
  ids = [*vocabulary.prefix, *vocabulary.encode(text)]
  assert template.encode(ROUNDS, opening=True) == ids
  assert template.stops == (2,)
  # What goes on behind an answer is the rest of that text, without a space in front.
  first = template.encode(ROUNDS[:1], opening=True) + vocabulary.encode_inside('Hello.')
  both = first + template.encode_next(ROUNDS, 2)
  assert vocabulary.decode(both) == text


@pytest.mark.parametrize('name', FAMILIES['chatglm3'])
def test_chatglm3_encodes_metadata_and_content_apart(name):
  template = _template('chatglm3', name)
  vocabulary, control = template.vocabulary, template.vocabulary.control
  messages = [
    Message('system', 'Be  brief.'),
    user('天气？'),
    assistant(" tool_call(city='北京')", 'weather'),
    Message('observation', '\n31'),
  ]
  ids = [control['[gMASK]'], control['sop']]
  for role, metadata, content in (
    ('system', '\n', 'Be  brief.'),
    ('user', '\n', '天气？'),
    ('assistant', 'weather\n', " tool_call(city='北京')"),
    ('observation', '\n', '\n31'),
  ):
    ids.append(control[f'<|{role}|>'])
    ids += vocabulary.encode(metadata) + vocabulary.encode(content)
  assert template.encode(messages, opening=False) == ids
  assert template.encode(messages, opening=True) == [*ids, control['<|assistant|>']]
  ends = ('<|user|>', '<|observation|>')
  assert template.stops == (2, *(control[end] for end in ends))


@pytest.mark.parametrize('family,space', [('glm4', ''), ('glm4-0414', ' ')])
def test_glm4_is_one_text_between_its_pieces(family, space):
  template = _template(family, 'glm4')
  vocabulary = template.vocabulary
  messages = [
    Message('system', 'Be brief.'),
    user('\n天气？'),
    assistant('{"city": "北京"}', 'weather'),
    Message('observation', '31'),
  ]
  text = '[gMASK]<sop><|system|>\nBe brief.<|user|>\n\n天气？'
  text += f'<|assistant|>weather{space}\n{{"city": "北京"}}<|observation|>\n31<|assistant|>'
  fast = Tokenizer.from_str(vocabulary.files()['tokenizer.json'].decode())
  assert template.encode(messages, opening=True) == fast.encode(text).ids


def test_system_messages_say_what_the_tools_are():
  """As the chat_template of GLM-4-9B-chat and GLM-4-0414, and PROMPT.md of ChatGLM3."""
  tools, asked = [{'name': 'f', 'parameters': {'x': '数'}}], (user('q'),)
  say = lambda family, name: _template(family, name).with_tools(asked, tools)
  shown = '## f\n\n{\n    "name": "f",\n    "parameters": {\n        "x": "数"\n    }\n}\n'
  shown += '在调用上述函数时，请使用 Json 格式表示调用的参数。'
  [system, question] = say('glm4', 'glm4')
  assert question == asked[0] and system.role == 'system'
  assert system.content.startswith('你是一个名为 ChatGLM 的人工智能助手。')
  assert system.content.endswith(f'支持。\n\n# 可用工具\n\n{shown}')
  [system, _] = say('glm4-0414', 'glm4')
  assert system.content == f'# 可用工具\n\n{shown}'
  own = Message('system', 'Be brief.')
  listed = json.dumps(tools, indent=4, ensure_ascii=False)
  chatglm3 = _template('chatglm3', 'chatglm3')
  told = chatglm3.with_tools((own, *asked), tools)
  assert told == (Message('system', f'Be brief.\n{listed}'), *asked)
  assert say('chatglm3', 'chatglm3')[0].content.endswith(f'the following tools:\n{listed}')
  assert chatglm3.with_tools((own, *asked), ()) == (own, *asked)


# What is learnt.


@pytest.mark.parametrize('family,name', PAIRS)
def test_answers_are_scored_with_what_ends_them_and_nothing_else_is(family, name):
  template = _template(family, name)
  rng, vocabulary = random.Random(1), template.vocabulary
  for _ in range(15):
    messages = [*conversation(rng, template, WORDS), assistant('the end')]
    pieces = []
    for example in template.examples(messages):
      ids, scored = template.encode_masked(example)
      assert len(ids) == len(scored) and scored[-1] and not scored[0]
      # Scored is what is generated: behind what a model reads, up to a stop.
      read = template.encode(example[:-1], opening=False)
      if example[-2].role in ('user', 'observation'):
        read = template.encode(example[:-1], opening=True)
        assert ids[: len(read)] == read and not scored[len(read) - 1]
        assert all(scored[len(read) :])
      run = []
      for token, counts in zip(ids, scored, strict=True):
        run += [token] if counts else []
        if counts and token in vocabulary.control.values():
          pieces.append((tuple(run), token))
          run = []
      assert not run
    answers = [message for message in messages if message.role == 'assistant']
    assert len(pieces) == len(answers)
    opens = vocabulary.control.get('<|assistant|>')
    assert {token for _, token in pieces} <= {*template.stops, opens}
    for (ids, token), message in zip(pieces, answers, strict=True):
      [answer] = template.decode_answer(ids[:-1])
      text = vocabulary.decode(vocabulary.encode(message.content))
      assert (answer.content, answer.metadata) == (text.strip(), message.metadata)
      if message.calls:
        assert token in (vocabulary.control['<|observation|>'], opens)


@pytest.mark.parametrize('family', ['chatglm3', 'glm4'])
def test_what_ends_a_conversation_is_what_would_come_next(family):
  """After a call, the tool's answer; after an answer, nothing."""
  template = _template(family, family)
  call, answer = assistant('{}', 'f'), assistant('a')
  ends = [template.encode_masked([user('q'), turn])[0][-1] for turn in (call, answer)]
  assert ends == [template.stops[2], template.stops[0]]


def test_a_conversation_in_turns_is_one_example_and_one_in_rounds_one_an_answer():
  messages = [*ROUNDS, assistant('Bye.')]
  assert _template('chatglm3', 'chatglm3').examples([*messages, user('?')]) == [
    tuple(messages)
  ]
  rounds = [tuple(messages[:2]), tuple(messages)]
  assert _template('chatglm2', 'chatglm2').examples(messages) == rounds
  assert _template('chatglm', 'ice').examples([*messages, user('?')]) == rounds


@pytest.mark.parametrize('family,name', PAIRS)
def test_too_long_a_conversation_loses_whole_turns_from_the_left(family, name):
  template, rng = _template(family, name), random.Random(2)
  for number in range(12):
    messages = conversation(rng, template, WORDS)
    if number % 2:
      messages.append(assistant('the end'))
    answered = messages[-1].role == 'assistant'
    length = lambda m: (
      len(template.encode_masked(m)[0])
      if answered
      else len(template.encode(m, opening=True))
    )
    whole = length(messages)
    assert template.fit(messages, whole) == (tuple(messages), 0)
    system = [message for message in messages if message.role == 'system']
    last = max(i for i, message in enumerate(messages) if message.role == 'user')
    shortest = [*system, *messages[last:]]
    for limit in (whole - 1, (whole + length(shortest)) // 2, length(shortest)):
      kept, left_out = template.fit(messages, limit)
      if limit < length(shortest):
        assert (kept, left_out) == ((), len(messages))
        continue
      assert length(kept) <= limit and len(kept) + left_out == len(messages)
      rest = messages[len(system) + left_out :]
      assert [*kept] == [*system, *rest] and rest[0].role == 'user'
      # One round more has no room.
      starts = [i for i, m in enumerate(messages) if m.role == 'user']
      before = [i for i in starts if i < len(system) + left_out]
      assert not before or length([*system, *messages[before[-1] :]]) > limit
    assert template.fit(messages, 1) == ((), len(messages))


@pytest.mark.parametrize('family,name', PAIRS)
def test_a_model_that_goes_on_has_read_the_same(family, name):
  template, rng = _template(family, name), random.Random(3)
  if template.reads_again:
    return
  for _ in range(10):
    asked = conversation(rng, template, WORDS)
    more = [assistant('the fox'), user('and  the dog?')]
    ids = template.encode([*asked, *more], opening=True)
    behind = template.encode_next([*asked, *more], len(asked) + 1)
    assert ids[len(ids) - len(behind) :] == behind
    assert 'the dog?' in template.vocabulary.decode(behind)


# What a model says.


@pytest.mark.parametrize('family', ['chatglm3', 'glm4'])
def test_an_answer_is_a_sentence_or_a_call(family):
  template = _template(family, family)
  vocabulary = template.vocabulary
  opens, stop = vocabulary.control['<|assistant|>'], template.stops[2]
  decode = lambda text: template.decode_answer([*vocabulary.encode(text), stop])
  assert decode('\n Hello,\nfox. ') == (assistant('Hello,\nfox.'),)
  assert decode('weather\n{"x": 1}') == (assistant('{"x": 1}', 'weather'),)
  assert decode('Hello there,\nfox') == (assistant('Hello there,\nfox'),)
  assert decode('Hello') == (assistant('Hello'),)
  assert template.decode_answer([]) == (assistant(''),)
  ids = [*vocabulary.encode('\nI look.'), opens, *vocabulary.encode('f\n{}'), stop]
  assert template.decode_answer(ids) == (assistant('I look.'), assistant('{}', 'f'))


def test_arguments_of_a_call_are_read_and_never_run(tmp_path):
  read = chat_tools.call_arguments
  assert read('{"city": "北京", "n": [1]}') == {'city': '北京', 'n': [1]}
  assert read("```python\ntool_call(city='北京', n=-1)\n```") == {'city': '北京', 'n': -1}
  assert read('tool_call()') == {}
  trace = tmp_path / 'trace'
  for content in (
    f"tool_call(x=open({str(trace)!r}, 'w'))",
    'tool_call(1)',
    "tool_call(**{'a': 1})",
    '{"city": ',
    '[1]',
    'x = 1',
    '',
    '(' * 5000,
    'tool_call(x=' + '-' * 5000 + '1)',
    '{"a":' * 100_000,
  ):
    with pytest.raises(UserError, match='a call of a tool must be an object in JSON or'):
      read(content)
  assert not trace.exists()


# What is refused.


@pytest.mark.parametrize('family,name', PAIRS)
def test_what_a_family_cannot_read_is_refused(family, name):
  template = _template(family, name)
  q, a = user('q'), assistant('a')
  refused = [
    ([], 'must have a message, got none'),
    ([q, a, Message('bot', 'x')], "message 3 .* must have a role .*, got 'bot'; rename"),
    ([Message('tool', 'x')], "got 'tool'; call what a tool gave back 'observation'"),
    ([user('')], "message 1 .* must have some text as its content, got ''; leave"),
    ([user(None)], 'must have some text as its content, got None'),
    ([user(['x'])], 'must have some text as its content, got'),
    ([user('x\ud800')], 'must be Unicode characters, got a lone surrogate; remove it'),
    ([a, q], "message 1 .* behind 'start', got 'assistant'; put the messages in order"),
    ([q, q], "message 2 .* behind 'user', got 'user'"),
    ([q, a, a, q], "message 3 .* behind 'assistant', got 'assistant'"),
    ([Message('user', 'q', 'f')], "metadata of message 1 .* got 'f' from 'user'"),
    ([q, assistant('a', 'f\ng'), q], 'metadata of message 2 .* must be the name of a tool'),
    ([q, assistant('a', 'f g'), q], "metadata of message 2 .* got 'f g' from 'assistant'"),
    ([q, a], 'the last message of this conversation must be of user or observation'),
  ]
  system, seen = Message('system', 's'), Message('observation', 'o')
  if 'system' in template.roles:
    refused += [
      ([q, a, system, q], "message 3 .* behind 'assistant', got 'system'"),
      ([q, seen], "message 2 .* behind 'user', got 'observation'"),
      ([q, a, seen], "message 3 .* behind 'assistant', got 'observation'"),
      ([q, assistant('a', 'f'), q], "message 3 .* behind 'call', got 'user'"),
      ([q, assistant('a', 'f'), seen, q], "message 4 .* behind 'observation', got 'user'"),
      ([system], 'the last message of this conversation must be of user or observation'),
    ]
    with pytest.raises(UserError, match='a tool must be an object with a name of .*, got'):
      template.with_tools([q], [{'function': {'description': 'x'}}])
    with pytest.raises(UserError, match='a tool must be an object with a name of .*, got'):
      template.with_tools([q], ['weather'])
  else:
    refused += [
      ([system, q], "got 'system'; put it in front of the first question"),
      ([q, assistant('a', 'f'), q], "metadata of message 2 .* got 'f' from 'assistant'"),
      ([q, a, seen], "got 'observation'; rename it"),
    ]
    with pytest.raises(UserError, match='must be without tools, .*, got 1; leave'):
      template.with_tools([q], TOOLS[:1])
  for messages, message in refused:
    with pytest.raises(UserError, match=message):
      template.encode(messages, opening=True)
  for messages in ([], [q, q], [q]):
    with pytest.raises(UserError):
      template.encode_masked(messages)
  with pytest.raises(UserError, match='must be of assistant, got'):
    template.encode_masked([q])


def test_a_template_goes_with_its_models_vocabulary():
  for kind, family in (('ice', 'chatglm'), ('chatglm2', 'chatglm2'), ('glm4', 'glm4')):
    assert template_for(_vocabulary(kind)).family == family
  with pytest.raises(UserError, match="template 'glm4' must be used with .*'chatglm3'"):
    template_for(_vocabulary('chatglm3'), 'glm4')
  with pytest.raises(UserError, match="template 'chatglm' must be used with .*'chatglm2'"):
    template_for(_vocabulary('chatglm2'), 'chatglm')
  with pytest.raises(UserError, match=r"must be one of .*, got 'llama'; choose"):
    template_for(_vocabulary('chatglm2'), 'llama')
  with pytest.raises(UserError, match="got one with a vocabulary 'bytes'; use glm_pairs"):
    template_for(_vocabulary('bytes'))
  assert {*chat.FAMILIES} == {*FAMILIES}
