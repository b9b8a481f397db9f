"""Lines of benchmarks as these publish them, and what a pattern makes of each."""

SPANS = {'span1_text': 'Mark', 'span1_index': 0, 'span2_text': 'He', 'span2_index': 3}
# Line, text of the pattern, candidates where they are few, numbers of the right ones.
LINES = {
  'copa': (
    {
      'premise': 'The man fell.',
      'choice1': 'He slipped.',
      'choice2': 'It rained.',
      'question': 'cause',
      'label': 1,
    },
    '"he slipped" or "it rained"? The man fell because[MASK].',
    [' he slipped', ' it rained'],
    [1],
  ),
  'wsc': (
    {
      'text': 'Mark saw Pete. He ran.',
      'target': SPANS,
      'label': True,
      'candidates': ['Pete'],
    },
    "Mark saw Pete. *He* ran. Question: In the passage above, what does the pronoun '*He*' "
    'refer to? Answer:[MASK].',
    [' Mark', ' Pete'],
    [0],
  ),
  'wsc_words': (
    {'text': 'Mark saw Pete. He ran.', 'target': SPANS, 'label': False},
    "Mark saw Pete. *He* ran. Question: In the passage above, does the pronoun '*He*' "
    'refer to Mark? Answer:[MASK].',
    [' No', ' Yes'],
    [0],
  ),
  'rte': (
    {'premise': 'A fox ran.', 'hypothesis': 'It ran.', 'label': 'entailment'},
    '"It ran" ?[MASK], "A fox ran."',
    [' No', ' Yes'],
    [1],
  ),
  'cb': (
    {'premise': 'A fox ran.', 'hypothesis': 'It ran.', 'label': 'neutral'},
    'It ran?[MASK]. A fox ran.',
    [' No', ' Yes', ' Maybe'],
    [2],
  ),
  'boolq': (
    {'question': 'is it', 'passage': 'It is.', 'label': True},
    'Based on the following passage  is it?[MASK]. It is.',
    [' No', ' Yes'],
    [1],
  ),
  'multirc': (
    {
      'passage': {
        'text': 'It is red.',
        'questions': [{'question': 'What?', 'answers': [{'text': 'red', 'label': 1}]}],
      }
    },
    'It is red. Question: What? Is it red?[MASK].',
    [' No', ' Yes'],
    [1],
  ),
  'wic': (
    {'word': 'run', 'sentence1': 'I run.', 'sentence2': 'A run.', 'label': False},
    'I run. A run. Does run have the same meaning in both sentences?[MASK]',
    [' No', ' Yes'],
    [0],
  ),
  'record': (
    {
      'passage': {
        'text': 'Ann met Bob. Ann left.',
        'entities': [
          {'start': 0, 'end': 2},
          {'start': 8, 'end': 10},
          {'start': 13, 'end': 15},
        ],
      },
      'qas': [{'query': 'Then @placeholder left.', 'answers': [{'text': 'Ann'}]}],
    },
    'Ann met Bob. Ann left. Then[MASK] left.',
    [' Ann', ' Bob'],
    [0],
  ),
  'tnews': (
    {'sentence': '股价上涨', 'label': '114', 'label_desc': 'news_stock'},
    '股价上涨，这是一条关于[MASK]的新闻。',
    None,
    [12],
  ),
  'afqmc': (
    {'sentence1': '甲', 'sentence2': '乙', 'label': '0'},
    '“甲”和“乙”意思相同吗？[MASK]。',
    ['否', '是'],
    [0],
  ),
  'cluewsc': (
    {'text': '他跑了。', 'target': SPANS, 'label': 'true'},
    '他跑了。其中“He”指的是“Mark”吗？[MASK]。',
    ['否', '是'],
    [1],
  ),
  'cmrc': (
    {
      'data': [
        {
          'paragraphs': [
            {
              'context': '狐狸跑了。',
              'qas': [{'id': 'A_1', 'question': '谁跑了？', 'answers': [{'text': '狐狸'}]}],
            }
          ]
        }
      ]
    },
    '狐狸跑了。请问，谁跑了？[MASK]。',
    ['狐狸'],
    [0],
  ),
}
