"""Lines of conversations in the forms that people have, and lines that are none."""

import json

import pytest
import tuned
from commands import refused

from glm_jax.configs import UserError
from glm_jax.data.corpora import corpus, parts, turns
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.text.conversation import Message

U, A = 'user', 'assistant'
TOOL = {'name': 'f', 'parameters': {'x': {}}}
CALL = "```python\ntool_call(x=1, y='中')\n```"
GLM4_CALL = '{"x": 1, "y": "中"}'


def _read(line, family='chatglm3', **more):
  config = CorpusConfig(corpus='*.jsonl', conversations=family, **more)
  return [
    (m.role, m.content, *filter(None, [m.metadata]), *['silent'] * m.without_loss)
    for m in turns.document(line, config).messages
  ]


ROUND = [(U, 'q'), (A, 'a')]


@pytest.mark.parametrize(
  'line,wanted',
  [
    # ChatGLM3
    (
      {'conversations': [{'role': U, 'content': 'q'}, {'role': A, 'content': 'a'}]},
      ROUND,
    ),
    (
      {
        'conversations': [
          {'role': 'system', 'content': 's'},
          {'role': U, 'content': 'q'},
          {'role': A, 'content': 'a', 'loss': False},
          {'role': U, 'content': 'r'},
          {'role': A, 'content': 'b', 'loss': True},
        ]
      },
      [('system', 's'), (U, 'q'), (A, 'a', 'silent'), (U, 'r'), (A, 'b')],
    ),
    (
      {
        'conversations': [
          {'role': U, 'content': 'q'},
          {'role': A, 'content': 'I look.'},
          {
            'role': 'tool',
            'name': 'f',
            'parameters': {'x': 1, 'y': '中'},
            'observation': {'z': 2},
          },
          {'role': A, 'content': 'a'},
        ]
      },
      [(U, 'q'), (A, 'I look.'), (A, CALL, 'f'), ('observation', '{"z": 2}'), (A, 'a')],
    ),
    # OpenAI, TRL
    (
      {
        'messages': [
          {'role': U, 'content': 'q'},
          {
            'role': A,
            'content': None,
            'tool_calls': [
              {'type': 'function', 'function': {'name': 'f', 'arguments': GLM4_CALL}}
            ],
          },
          {'role': 'tool', 'content': '7', 'tool_call_id': 'c'},
          {'role': A, 'content': 'a', 'weight': 0},
        ]
      },
      [(U, 'q'), (A, CALL, 'f'), ('observation', '7'), (A, 'a', 'silent')],
    ),
    # ShareGPT
    (
      {
        'system': 's',
        'conversations': [
          {'from': 'human', 'value': 'q'},
          {
            'from': 'function_call',
            'value': json.dumps({'name': 'f', 'arguments': {'x': 1, 'y': '中'}}),
          },
          {'from': 'observation', 'value': '7'},
          {'from': 'gpt', 'value': 'a'},
        ],
      },
      [('system', 's'), (U, 'q'), (A, CALL, 'f'), ('observation', '7'), (A, 'a')],
    ),
    # ChatGLM2, alpaca, pairs
    ({'prompt': 'q', 'response': 'a', 'history': []}, ROUND),
    (
      {'prompt': 'q', 'response': 'a', 'history': [['x', 'y'], ['z', 'w']]},
      [(U, 'x'), (A, 'y', 'silent'), (U, 'z'), (A, 'w', 'silent'), *ROUND],
    ),
    ({'instruction': 'q', 'input': 'i', 'output': 'a'}, [(U, 'q\ni'), (A, 'a')]),
    ({'instruction': 'q', 'input': '', 'output': 'a', 'system': None}, ROUND),
    ({'prompt': 'q', 'text': 'a', 'id': 3}, ROUND),
  ],
)
def test_a_line_is_its_messages(line, wanted):
  assert _read(line) == wanted


def test_a_call_is_written_as_its_family_was_taught():
  line = {
    'messages': [
      {'role': U, 'content': 'q'},
      {'role': 'tool', 'name': 'f', 'parameters': json.loads(GLM4_CALL)},
    ]
  }
  assert _read(line)[-1] == (A, CALL, 'f')
  assert _read(line, 'glm4')[-1] == (A, GLM4_CALL, 'f')


def test_tools_are_told_as_chat_tells_them():
  line = {'tools': [TOOL], 'messages': [{'role': U, 'content': 'q'}]}
  line['messages'].append({'role': A, 'content': 'a'})
  text = {**line, 'tools': json.dumps([TOOL])}
  for family in ('chatglm3', 'glm4'):
    asked, *rest = _read(line, family)
    assert asked[0] == 'system' and '"name": "f"' in asked[1] and rest == ROUND
    assert _read(text, family) == [asked, *rest]


def test_fields_of_pairs_are_named_by_the_user():
  line = {'frage': 'q', 'antwort': 'a'}
  assert _read(line, prompt_key='frage', answer_key='antwort') == ROUND


def _turns(*roles, **more):
  return {'messages': [{'role': role, 'content': 'x'} for role in roles], **more}


@pytest.mark.parametrize(
  'line,words',
  [
    (_turns(U, U), r"message 2 .* must be one of .*'assistant'.* got 'user'"),
    (_turns(A), "must be one of .* behind 'start', got 'assistant'"),
    (_turns(U, 'system', A), "got 'system'"),
    (_turns('bot'), "must have a role that chatglm3 knows, .* got 'bot'"),
    ({'messages': [{'role': U, 'content': ''}]}, "some text as its content, got ''"),
    ({'messages': [{'role': U}]}, 'some text as its content'),
    ({'messages': [{'role': U, 'content': ['a']}]}, 'some text as its content'),
    ({'messages': [{'content': 'a'}]}, 'a turn must be an object with a role'),
    ({'messages': ['a']}, 'a turn must be an object with a role'),
    ({'messages': 'a'}, "the field 'messages' must be a list"),
    ({'messages': []}, 'must have a message'),
    (['a'], 'a conversation must be an object'),
    ({'text': 'a'}, 'must have a question'),
    ({'prompt': 'a', 'response': 'b', 'history': ['c']}, 'must be a question and its ans'),
    ({'prompt': 'a', 'response': ''}, 'some text as its content'),
    (_turns(U, A, tools=[{'name': 'f'}]), 'a tool must have a schema'),
    (_turns(U, A, tools=['f']), 'a tool must have a schema'),
    (_turns(U, A, tools='[f]'), "tools must be JSON, got '\\[f\\]'"),
    (_turns(U, A, tools=[{**TOOL, 'name': 'a b'}]), 'a name of letters'),
    (_turns(U, A, tools={'f': 1}), "'tools' must be a list"),
    (
      {'messages': [{'role': U, 'content': 'q'}, {'role': A, 'content': 'a', 'loss': 1}]},
      'the loss of a turn must be true or false, got 1',
    ),
    (
      {'messages': [{'role': U, 'content': 'q'}, {'role': 'tool', 'parameters': {}}]},
      'a call of a tool must have its name',
    ),
    (
      {'messages': [{'role': U, 'content': 'q'}, {'from': 'function_call', 'value': 'f'}]},
      'a call of a tool must be JSON',
    ),
  ],
)
def test_what_is_no_conversation_is_named_with_its_line(line, words, tmp_path):
  good = json.dumps(_turns(U, A))
  path = tmp_path / 'a.jsonl'
  path.write_text(f'{good}\n{good}\n{json.dumps(line)}\n', encoding='utf-8')
  config = CorpusConfig(corpus=str(path), conversations='chatglm3')
  [part] = parts.find(CorpusConfig(corpus=str(path), validation=str(path)), 1e9)[:1]
  with pytest.raises(UserError, match=words) as error:
    list(parts.sources.of(config).read(part))
  assert str(error.value).endswith(f'in {path} line 3.')


def test_a_family_without_a_role_says_what_to_do():
  with pytest.raises(UserError, match='put it in front of the first question'):
    _read(_turns('system', U, A), 'chatglm2')
  with pytest.raises(UserError, match='must be without tools'):
    _read(_turns(U, A, tools=[TOOL]), 'chatglm2')


def test_conversations_are_held_out_whole(tmp_path):
  """Also of a few; each says where it stands long after it was read."""
  path = tuned.write(tmp_path / 'a.jsonl', tuned.lines(10))
  config = CorpusConfig(corpus=str(path), conversations='chatglm3', validation_fraction=0.3)
  both = [[*corpus.documents(config, split)] for split in ('train', 'validation')]
  found = [*both[0], *both[1]]
  wanted = [
    tuple(Message(m['role'], m['content']) for m in line['messages'])
    for line in tuned.lines(10)
  ]
  assert [d.messages for d in found] == wanted and both[1]
  assert [d.where() for d in found] == [f' in {path} line {n}' for n in range(1, 11)]


def test_conversations_are_not_for_pretraining(tmp_path):
  """Nor is text for fine-tuning; both by the command."""
  tuned.checkpoint(tmp_path, 'chatglm3')
  path = tuned.write(tmp_path / 'lines.jsonl', tuned.lines(40))
  recipe = ('TrainConfig.recipe=@Pretraining()', "MIXTURE_OR_TASK_NAME='glm_causal'")
  refused(
    tuned.run('train', tmp_path, *recipe), 'conversations are for fine-tuning', 'sft.gin'
  )
  (tmp_path / 'a.txt').write_text('Some text.\n\n' * 40)
  done = tuned.run('train', tmp_path, corpus=tmp_path / 'a.txt')
  refused(done, 'must read objects')
  assert not (tmp_path / 'run').exists() and path.exists()
