"""Fills the blanks of texts, or goes on with them, with one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from glm_jax import configs, models
from glm_jax.inference.beam import BeamConfig
from glm_jax.inference.engine import Answer, Engine, Request, Span
from glm_jax.inference.sampling import Sampling
from glm_jax.text.vocabulary import Vocabulary

# What bytes that are no character are decoded to.
_BROKEN = '\ufffd'


class Filler:
  """Fills the blanks of texts with one model; a causal model goes on with them."""

  def __init__(
    self,
    config: Any,
    variables: Any,
    vocabulary: Vocabulary,
    compute: models.ComputeConfig = models.ComputeConfig(),
    *,
    rows: int = 8,
    cache_dtype: str = '',
  ):
    """
    Args:
      config: of the model.
      variables: its collections: {'params'}, and more (`glm_jax.models.products`).
      vocabulary: that it was trained with.
      compute: of it, the dtype is what counts here.
      rows: see `Engine`.
      cache_dtype: likewise.
    """
    # Rows of the table behind the vocabulary's pieces are never trained on. Of the special
    # pieces, a span of GLM has none but a stop token.
    allowed = np.arange(config.vocab_size) < vocabulary.size
    if not config.causal:
      allowed[list(vocabulary.names)] = False
      allowed[list(vocabulary.stops)] = True
    self._config, self._vocabulary = config, vocabulary
    self.engine = Engine(
      config,
      variables,
      stops=vocabulary.stops,
      allowed=allowed,
      compute=compute,
      rows=rows,
      cache_dtype=cache_dtype,
    )

  def encode(self, prompt: str, gmask: bool = False) -> list[int]:
    """`[ENC] text <eos>`, with '[MASK]', '[sMASK]' and '[gMASK]' spelt out.

    Space around a mask is the vocabulary's (see `Vocabulary.encode_marked`). With `gmask`,
    the text is to be continued: `[gMASK]` follows it and there is no <eos>. What stands
    around the text is the vocabulary's `prefix` and `suffix`. A causal model always
    continues, and a mask is text to it.

    Raises:
      UserError: nothing to fill, an empty text, or one that is not UTF-8.
    """
    # An argument that is not UTF-8 reaches Python with its bytes as lone surrogates.
    configs.check(
      not any('\ud800' <= c <= '\udfff' for c in prompt),
      'the prompt must be UTF-8 text',
      repr(prompt),
      'save or type it as UTF-8',
    )
    v, s = self._vocabulary, self._vocabulary.specials
    masks = {'[MASK]': s.mask, '[sMASK]': s.smask, '[gMASK]': s.gmask}
    known = [] if self._config.causal else [n for n, t in masks.items() if t is not None]
    goes_on = gmask and not self._config.causal
    configs.check(
      not goes_on or s.gmask is not None,
      'the vocabulary must have [gMASK] to continue a text',
      v.kind,
      'mark a blank with [MASK]',
    )
    ids = v.encode_marked(prompt, known) if known else v.encode(prompt)
    configs.check(bool(ids), 'the prompt must hold some text', repr(prompt), 'give a text')
    if goes_on:
      # Encoded with its mask: the space before one is not always the text's.
      ids = v.encode_marked(prompt + '[gMASK]', known)
    blanks = [token for token in ids if token in [masks[name] for name in known]]
    ids = [*v.prefix, *ids]
    if goes_on or self._config.causal:
      return ids
    configs.check(
      bool(blanks),
      'the prompt must hold a blank: [MASK], [sMASK] or [gMASK]',
      repr(prompt),
      'mark one, or continue the text with --gmask',
    )
    # [gMASK] at the end is a text to be continued: nothing follows it, as with `gmask`.
    return ids if ids[-1] == s.gmask else [*ids, *v.suffix]

  def fill(self, prompts: Sequence[Sequence[int]], **how: Any) -> list[list[list[int]]]:
    """Generates every blank of every prompt, blanks left to right.

    Args:
      prompts: token ids with mask pieces, as `encode` gives them.
      **how: of `answers`.

    Returns:
      For each prompt, the token ids of each of its blanks.

    Raises:
      UserError: a prompt or span longer than the model's positions.
    """
    return self.fill_scored(prompts, **how)[0]

  def fill_scored(
    self, prompts: Sequence[Sequence[int]], **how: Any
  ) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
    """As `fill`, and the log-probability of each token; see `decode.RowStates`.

    Behind those of a span that a stop token ended stands that of the stop token.
    """
    answers = sorted(self.answers(prompts, **how), key=lambda answer: answer.number)
    return [a.spans for a in answers], [a.log_probs for a in answers]

  def answers(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
    sampling: Sampling = Sampling(),
    beam: BeamConfig | None = None,
    seed: int = 0,
    first: int = 0,
    watch: Callable[[int, list[int]], bool] | None = None,
  ) -> Iterator[Answer]:
    """Answers, in the order in which they are done; `number` says whose they are.

    With `beam`, the best text is searched for, of each blank after the one before it.

    Args:
      prompts: token ids with mask pieces, as `encode` gives them.
      max_new_tokens: longest span.
      min_new_tokens: tokens of a span before it may end.
      sampling: how tokens are chosen; as it is by default with `beam`.
      beam: how texts are searched; None to choose one token after the other.
      seed: of sampling; a prompt's random numbers come from it and its number.
      first: the number of the first prompt.
      watch: see `Engine.generate`; None with `beam`.

    Raises:
      UserError: a prompt or span longer than the model's positions, or a search that is to
        sample.
    """
    requests = [self._request(first + i, prompt) for i, prompt in enumerate(prompts)]
    configs.check(
      0 <= min_new_tokens <= max_new_tokens,
      f'--min_new_tokens must be in 0 .. {max_new_tokens}, that of --max_new_tokens',
      str(min_new_tokens),
      'ask for fewer',
    )
    if beam is not None:
      configs.check(
        sampling == Sampling() and watch is None,
        'beam search must be without temperature, top_k, top_p, min_p, repetition_penalty'
        ' and stop strings',
        str(sampling) if watch is None else 'a stop string',
        'leave these out, or the beams',
      )
      return self.engine.search(
        requests, most=max_new_tokens, least=min_new_tokens, config=beam
      )
    return self.engine.generate(
      requests,
      most=max_new_tokens,
      least=min_new_tokens,
      sampling=sampling,
      seed=seed,
      watch=watch,
    )

  def _request(self, number: int, prompt: Sequence[int]) -> Request:
    c, s = self._config, self._vocabulary.specials
    if c.causal:
      # It generates from the last token of its prompt.
      spans = [Span(first=prompt[-1], position=None, stride=1)]
      return Request(number=number, context=prompt[:-1], spans=spans)
    spans = []
    for position in self._blanks(prompt):
      # Without block positions, positions go on after [gMASK].
      goes_on = not c.two_positions and prompt[position] == s.gmask
      spans.append(
        Span(
          first=s.sop,
          position=None if goes_on else position,
          stride=int(goes_on),
        )
      )
    return Request(number=number, context=prompt, spans=spans)

  def _blanks(self, prompt: Sequence[int]) -> list[int]:
    """Positions of the masks."""
    s = self._vocabulary.specials
    return [i for i, t in enumerate(prompt) if t in (s.mask, s.gmask, s.smask)]

  def text(
    self,
    prompt: Sequence[int],
    spans: Sequence[Sequence[int]],
    mark: tuple[str, str] = ('', ''),
  ) -> str:
    """A prompt with its blanks filled, each between two marks.

    It is what the vocabulary decodes the prompt to, with spans in the place of their masks.
    Of a span that ends within a character, the bytes of that are left out.
    """
    if self._config.causal:
      parts = [prompt, *spans]
    else:
      parts, rest = [[]], list(spans)
      blanks = set(self._blanks(prompt))
      for position, token in enumerate(prompt):
        if position in blanks and rest:
          parts += [rest.pop(0), []]
        else:
          parts[-1].append(token)
    texts = self._vocabulary.decode_parts(parts)
    # Spans are every other part.
    for i in range(1, len(parts), 2):
      cut = self._vocabulary.ends_within_character(parts[i])
      text = texts[i].rstrip(_BROKEN) if cut else texts[i]
      texts[i] = mark[0] + text + mark[1]
    return ''.join(texts)
