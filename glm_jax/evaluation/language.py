"""Language modelling: perplexity, the last word of a passage, and blanks in a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from glm_jax import configs
from glm_jax.evaluation import metrics
from glm_jax.evaluation.task import Asker, Item, Options, Record, Task, lines, text_of
from glm_jax.inference.candidates import Said
from glm_jax.text.vocabulary import MASKS


class Perplexity(Task):
  """Of documents: a .jsonl with {"text"} a line, or a .txt that is one.

  A document is read in windows as long as a row; each goes `stride` tokens further, and is
  scored on these alone. To a model that fills blanks, what precedes them is Part A
  (THUDM/GLM tasks/language_model/dataset.py). The end of a document is not scored.
  """

  name = 'perplexity'

  def items(self, path: Path, asker: Asker, options: Options) -> Iterator[Item]:
    mask = options.mask or asker.mask('[gMASK]')
    for number, (place, text) in enumerate(_documents(path)):
      ids = asker.vocabulary.encode(text)
      sizes = {'words': len(text.split()), 'bytes': len(text.encode())}
      for first, begin, end in _windows(len(ids), asker, options, mask):
        # Without a Part A, all of a window is predicted, and the end of it counts.
        begins = first if _goes_on(asker, options) else begin
        question = asker.of_ids(ids[first:begins], [ids[begins:end]], place, mask=mask)
        fields = {'document': number, 'tokens': end - begin, **sizes}
        yield Item(fields=fields, question=question)
        # Those of a document are counted once.
        sizes = dict.fromkeys(sizes, 0)

  def judged(self, fields: Record, said: Sequence[Said]) -> Record:
    # Behind the tokens stands what ends them.
    counted = said[0].log_probs[:-1][-fields['tokens'] :]
    return {'log_prob': float(counted.sum(dtype=np.float64))}

  def table(self, records: Sequence[Record]) -> list[Record]:
    total = lambda name: math.fsum(record[name] for record in records)
    line: Record = {'documents': len({record['document'] for record in records})}
    line |= {name: int(total(name)) for name in ('tokens', 'words', 'bytes')}
    for name in ('token', 'word', 'byte'):
      line[f'{name}_perplexity'] = math.exp(-total('log_prob') / max(line[f'{name}s'], 1))
    return [line]


def _goes_on(asker: Asker, options: Options) -> bool:
  return options.unidirectional and not asker.config.causal


def _documents(path: Path) -> Iterator[tuple[str, str]]:
  if path.suffix.lower() == '.txt' and path.is_file():
    try:
      made = path.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
      raise configs.UserError(
        f'{path} must be UTF-8 text, got {str(error)[:80]}; save it as UTF-8.'
      ) from error
    yield str(path), text_of({'text': made}, 'text', str(path))
    return
  for place, made in lines(path, ['text']):
    yield place, text_of(made, 'text', place)


def _windows(
  count: int, asker: Asker, options: Options, mask: str
) -> Iterator[tuple[int, int, int]]:
  """(first, begin, end) of windows of `count` tokens; from begin on, they are scored."""
  opens, causal = len(asker.opened(mask)), asker.config.causal
  # The last token of a causal row is only predicted; a span is opened by one more.
  room = asker.length - opens + (1 if causal else -1)
  stride = options.stride or max(room // 2, 1)
  configs.check(
    stride < room,
    f'--stride must be below {room}, the tokens of text that a row of {asker.length} has',
    str(stride),
    'give less, or leave it out',
  )
  # Nothing predicts a first token that nothing precedes.
  begin, end = int(causal and not opens), min(count, room)
  if begin < end:
    yield 0, begin, end
  while end < count:
    begin, end = end, min(count, end + stride)
    yield end - room, begin, end


class Lambada(Task):
  """The last word of passages, a line each: all of its tokens must be the most probable.

  A model that fills blanks reads the passage with a mask for the word (THUDM/GLM
  tasks/language_model/dataset.py), or goes on from nothing with `unidirectional`.
  """

  name = 'lambada'

  def items(self, path: Path, asker: Asker, options: Options) -> Iterator[Item]:
    mask = options.mask or asker.mask('[gMASK]' if options.unidirectional else '[MASK]')
    for place, made in lines(path, ['text']):
      text = text_of(made, 'text', place).strip()
      context, _, word = text.rpartition(' ')
      configs.check(
        bool(context.strip()),
        f'{place} must be a passage, of whose words the last is asked for',
        repr(text[:80]),
        'take the line out',
      )
      ids = asker.candidate(f' {word}', context, place)
      before = asker.encoded(context, before_mask=not _goes_on(asker, options))
      fields = {'word': word, 'tokens': len(ids)}
      if _goes_on(asker, options):
        room = asker.length - len(asker.opened(mask)) - 1 - len(ids)
        asker.cut += len(before) > room
        before = before[max(0, len(before) - room) :]
        question = asker.of_ids([], [[*before, *ids]], place, mask=mask)
      else:
        question = asker.of_ids(before, [ids], place, mask=mask)
      yield Item(fields=fields, question=question)

  def judged(self, fields: Record, said: Sequence[Said]) -> Record:
    counted = slice(len(said[0].log_probs) - 1 - fields['tokens'], -1)
    return {
      'log_prob': float(said[0].log_probs[counted].sum(dtype=np.float64)),
      'right': bool(said[0].greedy[counted].all()),
    }

  def table(self, records: Sequence[Record]) -> list[Record]:
    log_probs = [record['log_prob'] for record in records]
    return [
      {
        'examples': len(records),
        'accuracy': 100 * float(np.mean([record['right'] for record in records])),
        'perplexity': math.exp(-math.fsum(log_probs) / len(log_probs)),
      }
    ]


class Blanks(Task):
  """Texts of which a share of the words is blanked, and filled again, left to right.

  Words are those of `text.split()`, so that models of any vocabulary fill the same blanks;
  neighbours share one. Which they are depends on the seed, the text's number and the ratio.
  """

  name = 'blanks'

  def items(self, path: Path, asker: Asker, options: Options) -> Iterator[Item]:
    configs.check(
      not asker.config.causal,
      'blanks must be filled by a model that fills blanks',
      type(asker.config).__name__,
      'choose another --task',
    )
    metrics.check_libraries('choose another --task')
    mask = options.mask or asker.mask('[MASK]')
    for number, (place, text) in enumerate(_documents(path)):
      configs.check(
        not any(name in text for name in MASKS),
        f'{place}: a text must leave names of masks to the task',
        repr(text[:80]),
        'take the line out',
      )
      for ratio in options.mask_ratios:
        key = [options.seed, number, round(ratio * 1e6)]
        blanked, spans = blank(text, ratio, np.random.default_rng(key), mask)
        fields = {'ratio': ratio, 'reference': ' '.join(text.split()), 'spans': spans}
        yield Item(fields=fields, prompt=blanked)

  def answered(self, fields: Record, spans: Sequence[str], text: str) -> Record:
    return {'filled': [span.strip() for span in spans], 'answer': ' '.join(text.split())}

  def table(self, records: Sequence[Record]) -> list[Record]:
    made = []
    for ratio in sorted({record['ratio'] for record in records}):
      group = [record for record in records if record['ratio'] == ratio]
      pairs = [pair for r in group for pair in zip(r['filled'], r['spans'], strict=True)]
      spans = metrics.score(*zip(*pairs, strict=True))
      whole = metrics.score(*([r[name] for r in group] for name in ('answer', 'reference')))
      made.append(
        {
          'ratio': f'{ratio:.0%}',
          'examples': len(group),
          'blanks': len(pairs),
          'exact_match': spans['exact_match'],
          'rouge1': spans['rouge1'],
          'bleu': whole['bleu'],
        }
      )
    return made


def blank(
  text: str, ratio: float, rng: np.random.Generator, mask: str
) -> tuple[str, list[str]]:
  """A text with a share of its words, at least one, behind masks; and what these hide.

  Example:
    >>> blank('a b c d e f', 0.5, np.random.default_rng(0), '[MASK]')
    ('a b [MASK] e [MASK]', ['c d', 'f'])
  """
  words = text.split()
  count = max(1, round(ratio * len(words)))
  hidden = {*rng.permutation(len(words))[:count].tolist()}
  parts: list[str] = []
  spans: list[str] = []
  for i, word in enumerate(words):
    if i not in hidden:
      parts.append(word)
    elif i - 1 in hidden:
      spans[-1] += f' {word}'
    else:
      parts.append(mask)
      spans.append(word)
  return ' '.join(parts), spans
