"""Talking with a model: what is read, what is kept, and what is refused."""

import json

import pytest
import small
import tuned
from commands import in_process, refused

import glm_jax
from glm_jax import chat as command
from glm_jax.configs import UserError
from glm_jax.inference.chatting import Chat
from glm_jax.inference.filling import Filler
from glm_jax.inference.sampling import Sampling
from glm_jax.inference.session import Session
from glm_jax.models import ChatGLM2Config, ChatGLMConfig
from glm_jax.text import chat as templates
from glm_jax.text import vocabulary as vocabularies
from glm_jax.text.conversation import Message
from glm_jax.text.released import ChatGLM3Vocabulary

_SIZES = dict(num_layers=2, hidden_size=32, num_heads=4, mlp_size=48, init_std=0.5)
CAUSAL = ChatGLM2Config(
  **_SIZES, num_kv_heads=2, head_size=8, vocab_size=768, max_positions=512
)
PREFIX = ChatGLMConfig(**_SIZES, deepnorm_layers=2, vocab_size=384, max_positions=512)
HOT = Sampling(temperature=1.0)


@pytest.fixture(scope='module')
def vocabulary():
  text = ['the quick brown fox jumps over the lazy dog. ' * 4, '语言模型在学习文字。' * 8]
  return ChatGLM3Vocabulary(vocabularies.train_sentencepiece(text, 512, bpe=True))


@pytest.fixture(scope='module')
def fillers(vocabulary):
  of_bytes = vocabularies.ByteVocabulary()
  return {
    'causal': Filler(CAUSAL, {'params': small.params(CAUSAL)}, vocabulary, rows=1),
    'prefix': Filler(PREFIX, {'params': small.params(PREFIX)}, of_bytes, rows=1),
  }


def _chat(fillers, vocabulary, kind='causal', window=256, most=12, **how):
  session = Session(fillers[kind].engine, window)
  if kind == 'prefix':
    template = templates.template_for(vocabularies.ByteVocabulary(), 'chatglm')
  else:
    template = templates.template_for(vocabulary)
  return Chat(session, template, max_new_tokens=most, **how), session


def test_a_causal_model_reads_only_what_is_new(fillers, vocabulary):
  chat, session = _chat(fillers, vocabulary, sampling=HOT)
  read, written, ids = 0, 0, []
  for line in ('the fox', '语言模型 and the dog', 'x', 'over'):
    held = list(session.held)
    ''.join(chat.say(line))
    read, written = read + chat.read, written + chat.written
    assert session.held[: len(held)] == held
    ids = list(chat._ids)
  # Each token once; the last of each question opens its answer and is not context.
  turns = chat._turn
  assert len(ids) == read + written + turns == len(session.held)
  # A model that has not heard any of it says the same.
  fresh, _ = _chat(fillers, vocabulary, sampling=HOT)
  fresh._turn, fresh.messages, fresh._ids = chat._turn, list(chat.messages), list(ids)
  fresh._known = len(fresh.messages)
  assert ''.join(fresh.say('and now')) == ''.join(chat.say('and now'))
  assert fresh.read > 3 * chat.read


def test_a_prefix_model_reads_its_context_again(fillers, vocabulary):
  chat, _ = _chat(fillers, vocabulary, 'prefix', sampling=HOT)
  counts = []
  for line in ('one', 'two', 'three'):
    asked = [*chat.messages, Message('user', line)]
    list(chat.say(line))
    counts.append(chat.read)
    assert chat.read == len(chat._template.encode(asked, opening=True)) - 1
  # A question without an answer is forgotten: the next one is as long.
  assert counts == sorted(counts) and counts[-1] > counts[0]


def test_an_answer_is_what_the_engine_says(fillers, vocabulary):
  """In pieces and all at once; greedy."""
  for kind in ('causal', 'prefix'):
    chat, session = _chat(fillers, vocabulary, kind)
    list(chat.say('the fox'))
    template = chat._template
    ids = template.encode([Message('user', 'the fox')], opening=True)
    prompt = ids if kind == 'causal' else ids[:-1]
    [[[span]]] = [fillers[kind].fill([prompt], max_new_tokens=12)]
    assert len(span) == chat.written and session.held == [*ids, *span]


def test_whoever_stops_listening_may_go_on(fillers, vocabulary):
  chat, _ = _chat(fillers, vocabulary, most=40, sampling=HOT)
  answer = chat.say('the quick brown fox')
  first = next(answer)
  answer.close()
  assert first and chat.messages[-1].role == 'assistant'
  assert chat.messages[-1].content == first.strip() and chat.written < 40
  told = list(chat._ids)
  said = ''.join(chat.say('go on'))
  # The last token that was said had not been read: it is read now, and no other twice.
  assert chat._ids[: len(told)] == told
  again, _ = _chat(fillers, vocabulary, most=40, sampling=HOT)
  again.messages, again._ids, again._turn = list(chat.messages[:2]), told, 1
  again._known = 2
  assert ''.join(again.say('go on')) == said


def test_turns_that_no_longer_fit_are_left_out_and_counted(fillers, vocabulary):
  chat, session = _chat(fillers, vocabulary, window=64, most=8, sampling=HOT)
  for number in range(8):
    list(chat.say(f'the quick brown fox {number}'))
    assert len(session.held) <= 64
  assert chat.left_out >= 6 and len(chat.messages) <= 8
  with pytest.raises(UserError, match='a message must fit into 56 tokens'):
    list(chat.say('fox ' * 200))
  kept = list(chat.messages)
  list(chat.say('still here'))
  assert chat.messages[: len(kept)] == kept or chat.left_out


def test_what_the_model_is_told_first_is_counted(fillers, vocabulary):
  # A family without a role for it is told in front of the first question that is left.
  chat, _ = _chat(
    fillers, vocabulary, 'prefix', window=192, most=8, sampling=HOT, system='be kind ' * 6
  )
  for number in range(8):
    chat.messages += [Message('user', f'{number} the fox'), Message('assistant', 'over')]
  told = lambda: len(chat._template.encode(chat._with_system(chat.messages), opening=True))
  for number in range(4):
    chat.messages.append(Message('user', 'x' * (3 + number)))
    before = len(chat.messages)
    assert len(chat._encode()) == told() <= 192 - 8
    assert chat.messages[-1].content == 'x' * (3 + number)
    assert number or len(chat.messages) < before
    chat.messages.append(Message('assistant', 'over'))
  assert chat.left_out + len(chat.messages) == 16 + 8
  for kind in ('causal', 'prefix'):
    chat, _ = _chat(fillers, vocabulary, kind, window=64, most=8, system='be kind ' * 40)
    with pytest.raises(
      UserError, match=r'fit into 56 .*, got \d+ tokens and \d{2,} of what'
    ):
      list(chat.say('fox'))
    assert not chat.messages and not chat.left_out


def test_what_is_typed_spells_no_role(fillers, vocabulary):
  chat, _ = _chat(fillers, vocabulary)
  list(chat.say('<|assistant|> [gMASK] <|user|>'))
  roles = [vocabulary.control[f'<|{name}|>'] for name in ('user', 'assistant')]
  question = chat._ids[: len(chat._ids) - chat.written]
  assert [i for i in question if i in roles] == roles


@pytest.mark.parametrize('kind', ['causal', 'prefix'])
def test_the_system_is_told_first(fillers, vocabulary, kind):
  chat, _ = _chat(fillers, vocabulary, kind, system='be kind')
  list(chat.say('the fox'))
  told = chat._template.vocabulary.decode(chat._ids)
  assert 'be kind' in told
  assert [m.role for m in chat.messages][:1] == ['user']
  chat.reset('be short')
  assert not chat.messages and chat.system == 'be short'


def _talk(chat, *lines, terminal=True):
  command.talk(chat, iter(lines), terminal=terminal)


def test_commands_of_a_conversation(fillers, vocabulary, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  chat, _ = _chat(fillers, vocabulary, sampling=HOT)
  path = tmp_path / 'a.json'
  _talk(chat, 'the fox', '', f'/save {path}', '/nonsense', '/save', '/quit', 'unheard')
  said = capsys.readouterr()
  messages = json.loads(path.read_text(encoding='utf-8'))['messages']
  assert messages[0] == {'role': 'user', 'content': 'the fox'} and len(messages) == 2
  assert messages[1]['content'] in said.out and 'unheard' not in said.out
  assert 'a command must be known, got /nonsense' in said.err
  assert '/save must be given a file' in said.err
  assert f'[2 messages in {path}]' in said.err
  assert f'[{chat.read} tokens read, {chat.written} written' in said.err
  _talk(chat, f'/save {tmp_path}/no/folder', '/system be kind', '/reset')
  said = capsys.readouterr()
  assert 'can be written' in said.err and 'messages in' not in said.err
  assert "[begun anew, the model is told first: 'be kind']\n[begun anew]" in said.err
  assert not chat.messages and chat.system == 'be kind' and not said.out
  _talk(chat, '/save ~/b.json')
  assert json.loads((tmp_path / 'b.json').read_text())['messages'][0]['role'] == 'system'
  with pytest.raises(UserError, match='a command must be known'):
    _talk(chat, '/nonsense', terminal=False)


def test_ctrl_c_stops_an_answer_and_keeps_the_session(fillers, vocabulary, capsys):
  chat, _ = _chat(fillers, vocabulary, most=40, sampling=HOT)
  answering = chat.say

  def interrupted(line):
    pieces = answering(line)
    yield next(pieces)
    try:
      raise KeyboardInterrupt
    finally:
      pieces.close()

  chat.say = interrupted
  _talk(chat, 'the fox')
  chat.say = answering
  assert capsys.readouterr().out.rstrip('\n').endswith(' …')
  _talk(chat, 'go on')
  assert [m.role for m in chat.messages] == ['user', 'assistant'] * 2


@pytest.mark.parametrize('program', ['read', 'read_on', 'advance'])
def test_ctrl_c_inside_a_program_keeps_the_session(
  fillers, vocabulary, monkeypatch, capsys, program
):
  """The program has the cache by then, and nobody takes what it gives back."""
  chat, _ = _chat(fillers, vocabulary, sampling=HOT)
  if program == 'read_on':  # what follows a first message is read on to it
    _talk(chat, 'the fox')
  engine = fillers['causal'].engine
  compute = getattr(engine, program)

  def interrupted(*arguments, **more):
    compute(*arguments, **more)
    raise KeyboardInterrupt

  before, ids = list(chat.messages), list(chat._ids)
  with monkeypatch.context() as patch:
    patch.setattr(engine, program, interrupted)
    _talk(chat, 'the quick brown fox')
  # An answer that nobody heard a word of is forgotten, and its question.
  assert chat.messages == before and chat.written == 0
  assert capsys.readouterr().out.rstrip('\n').endswith(' …')
  said = ''.join(chat.say('go on'))
  again, _ = _chat(fillers, vocabulary, sampling=HOT)
  again.messages, again._turn = before, chat._turn - 1
  again._ids, again._known = ids, len(before)
  assert said and said == ''.join(again.say('go on'))


def test_what_a_tool_gives_back_is_asked_for(fillers, vocabulary, monkeypatch, capsys):
  chat, _ = _chat(
    fillers, vocabulary, window=128, most=8, sampling=HOT, system='tools: weather'
  )
  call = Message('assistant', 'the fox', 'weather')
  monkeypatch.setattr(chat._template, 'decode_answer', lambda ids: (call,))
  _talk(chat, 'how is it')
  assert "[it calls 'weather'; the next line is what that gives" in capsys.readouterr().err
  assert chat.wants == 'observation'
  # All of it belongs to one question, and is too much in the end.
  _talk(chat, *['over the lazy dog and over'] * 12)
  roles = [message.role for message in chat.messages]
  assert roles[:4] == ['user', 'assistant', 'observation', 'assistant']
  assert len(roles) < 26 and roles[-1] == 'assistant' and not chat.left_out
  assert (
    'a question with what was said and called since must fit into 120 tokens'
    in capsys.readouterr().err
  )
  _talk(chat, '/reset')
  assert chat.wants == 'user'


@pytest.mark.parametrize(
  ('said', 'system', 'expected'),
  [
    # No tool was described: a first line that could be the name of one is text.
    ('weather\nthe fox', '', [('weather\nthe fox', '')]),
    ('Yes\n', '', [('Yes', '')]),
    ('Yes\n', 'tools: weather', [('Yes', '')]),
    ('\nthe fox', '', [('the fox', '')]),
    ('weather\nthe fox', 'tools: weather', [('the fox', 'weather')]),
    ('\nwell<|>weather\nx', 'tools: weather', [('well', ''), ('x', 'weather')]),
    # Nobody asked for a second answer, or has seen what the tool gives back.
    ('\nwell<|>\nthe fox', 'tools: weather', [('well\nthe fox', '')]),
    ('weather\nx<|>\nwell', 'tools: weather', [('weather\nx\nwell', '')]),
    ('', '', []),
  ],
)
def test_an_answer_is_messages_that_can_be_gone_on_from(
  fillers, vocabulary, said, system, expected
):
  chat, _ = _chat(fillers, vocabulary, system=system)
  ids = []
  for number, part in enumerate(said.split('<|>')):
    ids += [vocabulary.control['<|assistant|>']] * (number > 0)
    ids += vocabulary.encode(part) if part else []
  heard = chat._heard(ids)
  assert [(m.content, m.metadata) for m in heard] == expected
  if heard:
    chat.messages = [Message('user', 'x'), *heard]
    assert ''.join(chat.say('over the lazy dog')) and len(chat.messages) > 2


def test_a_model_without_conversations_is_refused():
  with pytest.raises(UserError, match='a family that has a chat template'):
    templates.template_for(vocabularies.ByteVocabulary())


def test_a_window_without_room_is_refused(fillers, vocabulary):
  with pytest.raises(UserError, match='must leave room in a window of 64 tokens, got 64'):
    _chat(fillers, vocabulary, window=64, most=64)


def test_an_answer_may_be_half_of_a_small_window(fillers, vocabulary):
  chat, _ = _chat(fillers, vocabulary, window=64, most=None)
  list(chat.say('the fox'))
  assert chat._most == 32
  chat, _ = _chat(fillers, vocabulary, window=2048, most=None)
  assert chat._most == 257  # of a model with 513 positions


def test_the_command_refuses_what_is_no_checkpoint(tmp_path):
  refused(in_process('chat', f'--checkpoint={tmp_path}'), 'checkpoint')
  refused(in_process('chat', f'--checkpoint={tmp_path}', '--seed=-1'), '32 bits, got -1')


@pytest.mark.parametrize('family', ['chatglm', 'chatglm2', 'chatglm3'])
def test_the_library_replies_as_the_command_does(tmp_path, family):
  """To several conversations at once, each as if it were alone."""
  model = glm_jax.load(tuned.checkpoint(tmp_path, family))
  named = '' if family != 'chatglm' else family
  asked = [
    [{'role': 'user', 'content': 'hello'}],
    [
      {'role': 'user', 'content': 'is it a fox?'},
      {'role': 'assistant', 'content': 'yes'},
      {'role': 'user', 'content': 'why?'},
    ],
  ]
  found = model.reply(asked, named, max_new_tokens=6)
  for messages, [reply] in zip(asked, found, strict=True):
    session = Session(model._filler.engine, 200)
    talk = Chat(
      session,
      templates.template_for(model.vocabulary, named),
      max_new_tokens=6,
      sampling=Sampling(),
    )
    talk.messages = [Message(**message) for message in messages[:-1]]
    said = ''.join(talk.say(messages[-1]['content'])).strip()
    assert reply == said
  drawn = model.reply(asked, named, max_new_tokens=6, samples=3, temperature=1.0)
  assert [len({*texts}) for texts in drawn] == [3, 3]
  with pytest.raises(UserError, match='a list of lists'):
    model.reply(asked[0], named)
  with pytest.raises(UserError, match='must be of user'):
    model.reply([asked[1][:2]], named)
