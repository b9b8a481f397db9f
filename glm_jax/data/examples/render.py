"""Examples as a person reads them, their statistics, and a picture of who sees whom."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from glm_jax.batch import OBJECTIVES
from glm_jax.text.vocabulary import Vocabulary

# What carries loss stands between them.
_LEARNT = ('⟦', '⟧')
# Characters a line.
_WIDTH = 96


def render(example: Mapping[str, np.ndarray], vocabulary: Vocabulary) -> str:
  """One row as text: of each example Part A, then each span of Part B in order.

  Text stands as in the document: where the spans are put in the place of their masks, it
  reads as the document does.

  Args:
    example: [L] arrays of the batch contract; with `ranked`, of two answers.
    vocabulary: of the tokens.
  """
  tokens, block = example['tokens'], example['block_positions']
  length = int((example['key_end'] > 0).sum())
  part_a = int((block[:length] == 0).sum())
  if not length:
    return '(an empty row)'
  # A packed row holds several examples; it is named by its first.
  name = OBJECTIVES[int(example['objective'][0])]
  if name in ('causal', 'answer'):
    # What a token sees begins with its document, so `key_start` changes where one begins.
    starts = np.flatnonzero(np.diff(example['key_start'][:length], prepend=-1))
    scored = int(example['loss_weights'].sum())
    lines = [f'{name}: {length} tokens, {len(starts)} document(s), {scored} scored']
    if name == 'answer':
      lines[0] += f', between {_LEARNT[0]} and {_LEARNT[1]}'
    which = ('chosen ', 'rejected ') if 'ranked' in example else [''] * len(starts)
    for start, end, whose in zip(starts, [*starts[1:], length], which, strict=True):
      one = {k: v[start:end] for k, v in example.items() if v.ndim}
      text = _answers(one, vocabulary) if name == 'answer' else ''
      text = text or _texts([tokens[start:end]], vocabulary)[0]
      lines += _wrap(f'  {whose}{start}..{end - 1}:  ', text)
    return '\n'.join(lines)
  lines = [
    f'{name}: {length} tokens, Part A {part_a}, '
    f'{int((block == 1).sum())} span(s), {int(example["loss_weights"].sum())} scored'
  ]
  # What the examples of a packed row see begins with each.
  firsts = np.flatnonzero(np.diff(example['key_start'][:length], prepend=-1))
  for first, end in zip(firsts, [*firsts[1:], length], strict=True):
    lines += _example({k: v[first:end] for k, v in example.items() if v.ndim}, vocabulary)
  return '\n'.join(lines)


def _answers(example: Mapping[str, np.ndarray], vocabulary: Vocabulary) -> str:
  """A document as it is read, what carries loss marked; [n] arrays."""
  tokens, targets = example['tokens'], example['targets']
  learnt = np.append(False, example['loss_weights'] > 0)
  # What ends a row is a target and no input.
  ids = np.append(tokens, targets[-1])[: len(tokens) + learnt[-1]]
  bounds = np.flatnonzero(np.diff(learnt[: len(ids)])) + 1
  texts = _texts(np.split(ids, bounds), vocabulary)
  return ''.join(
    _LEARNT[0] + text + _LEARNT[1] if number % 2 else text
    for number, text in enumerate(texts)
  )


def _example(example: Mapping[str, np.ndarray], vocabulary: Vocabulary) -> list[str]:
  """Lines of Part A and of each span of one example, [n] arrays."""
  tokens, targets = example['tokens'], example['targets']
  block, position = example['block_positions'], example['positions']
  s, names = vocabulary.specials, vocabulary.names
  part_a = int((block == 0).sum())
  masks = [t for t in range(part_a) if tokens[t] in (s.mask, s.gmask, s.smask)]
  # 1. The document again, as parts: text, a span, text, a span, ..., text.
  # Second positions count from 1 in each span, at its [sop].
  starts = np.flatnonzero(block == 1).tolist()
  ends = dict(zip(starts, [*starts[1:], len(tokens)], strict=True))
  places = {}
  for start in starts:
    # A span has the first position of its mask; positions of the only one may go on.
    same = [mask for mask in masks if position[mask] == position[start]]
    places[start] = (same or masks or [part_a])[-1]
  in_text_order = sorted(starts, key=places.get)
  parts, last = [], 0
  for start in in_text_order:
    end = ends[start] - (targets[ends[start] - 1] == s.eop)
    parts += [tokens[last : places[start]], targets[start:end]]
    last = places[start] + 1
  texts = _texts([*parts, tokens[last:part_a]], vocabulary)
  # 2. Part A, with the names of masks for the spans.
  names_of_masks = [names[int(tokens[places[start]])] for start in in_text_order]
  pairs = zip(names_of_masks, texts[2::2], strict=True)
  lines = _wrap('Part A  ', texts[0] + ''.join(itertools.chain(*pairs)))
  # 3. The spans, in the order of Part B.
  for start, end in ends.items():
    number, inputs = 2 * in_text_order.index(start) + 1, tokens[start + 1 : end]
    text = given = texts[number]
    # Inputs may be noise, and lack the last token of a span without [eop].
    if not np.array_equal(inputs, parts[number]):
      given = _texts([np.concatenate(parts[:number]), inputs], vocabulary)[1]
    if len(parts[number]) < end - start:
      text += names[s.eop]
    seen = f'sees {example["key_start"][start]}..{example["key_end"][start] - 1}'
    lines += _wrap(
      f'  position {position[start]}, block {block[start]}-{block[end - 1]}, {seen}:  ',
      f'{names[int(tokens[start])]}{given}  =>  {text}',
    )
  return lines


def statistics(batch: Mapping[str, np.ndarray], skipped: int) -> str:
  """Padding, mask ratio, spans, objectives, and what was lost, over many examples.

  Args:
    batch: [B, L] arrays of the batch contract, `lost` and `capped` [B], `eop` [B].
    skipped: documents of the corpus that are in no row.
  """
  inside = batch['key_end'] > 0
  block, objective = batch['block_positions'], batch['objective'][:, 0]
  spans = (block == 1).sum(1)
  lines = [
    f'over {len(objective)} examples of {inside.shape[1]} positions:',
    f'  padding {1 - inside.mean():.1%}; rows without a token: '
    f'{int((~inside.any(1)).sum())}',
  ]
  for number, name in enumerate(OBJECTIVES):
    rows = objective == number
    if not rows.any():
      continue
    if name in ('causal', 'answer'):
      # An empty row is -1 throughout, as is what is prepended: no document begins in it.
      starts = np.diff(np.where(inside, batch['key_start'], -1)[rows], prepend=-1)
      documents = ((starts != 0) & inside[rows]).sum() / rows.sum()
      scored = (batch['loss_weights'][rows] > 0).sum() / max(inside[rows].sum(), 1)
      lines.append(
        f'  {name}: {rows.mean():.1%} of examples, {documents:.1f} documents each, '
        f'{scored:.1%} of tokens scored'
      )
      continue
    # A span of n tokens has n + 1 positions, or n where it runs to the end of its row.
    hidden = _span_lengths({k: v[rows] for k, v in batch.items()})
    # Less a mask and an [sop] a span; the last token of an open span is no input.
    text = inside[rows].sum() - 2 * spans[rows].sum()
    text += int((hidden['open']).sum())
    lines.append(
      f'  {name}: {rows.mean():.1%} of examples, {hidden["lengths"].sum() / text:.1%} of '
      f'tokens hidden, {spans[rows].mean():.1f} spans of {hidden["lengths"].mean():.1f}'
    )
    if name == 'blank':
      counts = np.bincount(np.minimum(hidden['lengths'], 10), minlength=11)[1:]
      shares = '  '.join(
        f'{k}{"+" if k == 10 else ""}: {c / counts.sum():.1%}'
        for k, c in enumerate(counts, 1)
      )
      lines.append(f'    lengths  {shares}')
  lines.append(
    f'  documents lost: {skipped}; tokens outside a short window: {batch["lost"].sum()}; '
    f'examples with room for fewer spans than drawn: {batch["capped"].sum()}'
  )
  return '\n'.join(lines)


def picture(example: Mapping[str, np.ndarray], path: Path) -> None:
  """Saves the visibility of one example as a PNG: rows see the dark columns."""
  # The Figure alone, not pyplot, which would pick a backend with windows.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  start, end = example['key_start'], example['key_end']
  keys = np.arange(len(start))
  mask = (start[:, None] <= keys) & (keys < end[:, None])
  part_a = int(((example['block_positions'] == 0) & (end > 0)).sum())
  figure = Figure(figsize=(5, 5), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  axes.imshow(mask, cmap='Blues', interpolation='nearest')
  for line in (axes.axhline, axes.axvline):
    line(part_a - 0.5, color='0.4', lw=0.8)
  axes.set(
    xlabel='key',
    ylabel='query',
    title=f'Part A is 0-{part_a - 1}, Part B follows; padding sees nothing',
  )
  figure.savefig(path, dpi=120)


def _span_lengths(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Hidden tokens of each span, and whether it has no [eop]."""
  lengths, is_open = [], []
  for block, target in zip(batch['block_positions'], batch['targets'], strict=True):
    starts = np.flatnonzero(block == 1)
    # A span ends where the next one begins, the last one with the example.
    ends = np.append(starts[1:], np.flatnonzero(block > 0)[-1:] + 1)
    for start, end in zip(starts, ends, strict=True):
      closed = target[end - 1] == batch['eop'][0]
      lengths.append(end - start - closed)
      is_open.append(not closed)
  return {'lengths': np.array(lengths), 'open': np.array(is_open)}


def _texts(parts: Sequence[np.ndarray], vocabulary: Vocabulary) -> list[str]:
  """Parts of a document as they read in it, control pieces by their names."""
  names, s = vocabulary.names, vocabulary.specials
  inside = {s.mask, s.gmask, s.smask, s.dblock}
  # Runs of text or of control pieces. Behind control pieces such as <eos>, or the roles of
  # a chat, a text begins, which is decoded by itself.
  documents: list[list[tuple[int, bool, list[int]]]] = [[]]
  for number, part in enumerate(parts):
    for control, run in itertools.groupby(part.tolist(), names.__contains__):
      documents[-1].append((number, control, [*run]))
      if control and not inside.issuperset(documents[-1][-1][2]):
        documents.append([])
  texts = [''] * len(parts)
  for runs in documents:
    read = vocabulary.decode_parts([ids for _, _, ids in runs])
    for (number, control, ids), text in zip(runs, read, strict=True):
      texts[number] += ''.join(names[t] for t in ids) if control else text
  return [text.replace('\n', '↵') for text in texts]


def _wrap(head: str, text: str) -> list[str]:
  body = [text[i : i + _WIDTH] for i in range(0, len(text), _WIDTH)] or ['']
  return [head + body[0], *(' ' * 8 + line for line in body[1:])]
