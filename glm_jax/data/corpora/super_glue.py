"""SuperGLUE in TFDS, example by example as the lines that the benchmark publishes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from glm_jax import configs
from glm_jax.data.corpora import sources
from glm_jax.data.corpora.config import CorpusConfig

PREFIX = sources.DataSet.prefix
_SPLITS = {'val': 'validation'}
# Of TFDS, as classes of labels that are true or false.
_TRUTHS = {'False': False, 'True': True}


def lines(config: CorpusConfig) -> Callable[[str], Iterator[tuple[str, dict[str, Any]]]]:
  """What reads a data set of TFDS; of another benchmark, its features as they are.

  Args:
    config: whose `corpus` is such as 'tfds:super_glue/boolq'.

  Returns:
    A function of a split, 'train' or 'val': (where it stands, line) of each example.
  """

  def of_split(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import tensorflow_datasets as tfds

    source = sources.DataSet(config)
    builder = source.builder()
    split = _SPLITS.get(name, name)
    configs.check(
      split in builder.info.splits,
      f'{config.corpus!r} must have the split {split!r}',
      str([*builder.info.splits]),
      'give one of these',
    )
    features = builder.info.features
    labels = features['label'] if 'label' in features else None
    # Of another benchmark that has the same names, lines are not made over.
    of_line = _LINES.get(_name(builder), lambda line: line)
    reading = tfds.ReadConfig(try_autocache=False)
    for number, example in enumerate(
      tfds.as_numpy(builder.as_dataset(split=split, read_config=reading))
    ):
      line = {key: _plain(value) for key, value in example.items()}
      where = f'{config.corpus} {split} {number}'
      if isinstance(labels, tfds.features.ClassLabel):
        configs.check(
          0 <= line['label'] < labels.num_classes,
          f'{where}: an example must have a label',
          'none',
          'give a split with labels',
        )
        word = labels.int2str(line['label'])
        line['label'] = _TRUTHS.get(word, word)
      if 'idx' in line and isinstance(line['idx'], dict):
        # Examples of one question are told by it.
        numbers = {k: v for k, v in line['idx'].items() if k != 'answer'}
        where = f'{config.corpus} {split} ' + ' '.join(
          f'{k} {v}' for k, v in numbers.items()
        )
      yield where, of_line(line)

  return of_split


def _name(builder: Any) -> str:
  """Of the benchmark; '' of a data set that is none of SuperGLUE's."""
  if builder.name != 'super_glue':
    return ''
  return builder.builder_config.name.partition('.')[0]


def _plain(value: Any) -> Any:
  """A feature in Python's types."""
  if isinstance(value, dict):
    return {key: _plain(inner) for key, inner in value.items()}
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if hasattr(value, 'tolist'):
    value = value.tolist()
  return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _copa(line: dict[str, Any]) -> dict[str, Any]:
  return {**line, 'label': ('choice1', 'choice2').index(line['label'])}


def _wsc(line: dict[str, Any]) -> dict[str, Any]:
  names = ('span1_text', 'span1_index', 'span2_text', 'span2_index')
  return {**line, 'target': {name: line[name] for name in names}}


def _multirc(line: dict[str, Any]) -> dict[str, Any]:
  answer = {'text': line['answer'], 'label': int(line['label'])}
  question = {'question': line['question'], 'answers': [answer]}
  return {'passage': {'text': line['paragraph'], 'questions': [question]}}


def _record(line: dict[str, Any]) -> dict[str, Any]:
  text = line['passage']
  # Where one stands first: only what it says is asked for.
  places = [(text.find(entity), entity) for entity in line['entities']]
  entities = [
    {'start': at, 'end': at + len(entity) - 1} for at, entity in places if at >= 0
  ]
  answers = [{'text': answer} for answer in line['answers']]
  return {
    'passage': {'text': text, 'entities': entities},
    'qas': [{'query': line['query'], 'answers': answers}],
  }


_LINES = {'copa': _copa, 'wsc': _wsc, 'multirc': _multirc, 'record': _record}
