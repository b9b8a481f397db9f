"""Fills the blanks of texts, or goes on with them, with one model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import configs, models, sharding
from glm_jax.inference import decode
from glm_jax.inference.sampling import Sampling
from glm_jax.text.vocabulary import Vocabulary

# Contexts are padded to a multiple of this, so that few shapes are compiled.
_BUCKET = 64
# What bytes that are no character are decoded to.
_BROKEN = '\ufffd'


class Filler:
  """Fills the blanks of texts with one model; a causal model goes on with them."""

  def __init__(
    self,
    config: Any,
    params: Any,
    vocabulary: Vocabulary,
    compute: models.ComputeConfig = models.ComputeConfig(),
  ):
    """
    Args:
      config: of the model.
      params: its parameters.
      vocabulary: that it was trained with.
      compute: of it, the dtype is what counts here.
    """
    # Rows of the table behind the vocabulary's pieces are never trained on. Of the special
    # pieces, a span of GLM has none but a stop token.
    allowed = np.arange(config.vocab_size) < vocabulary.size
    if not config.causal:
      allowed[list(vocabulary.names)] = False
      allowed[list(vocabulary.stops)] = True
    self._config, self._params, self._vocabulary = config, params, vocabulary
    self._dtype = compute.dtype
    model = models.build(config, compute)
    # Each gives back the cache that it was given, in the same memory.
    jit = functools.partial(jax.jit, donate_argnums=1)
    self._read = jit(functools.partial(decode.read_context, model, causal=config.causal))
    self._generate = jit(
      functools.partial(
        decode.generate_span, model, stop=vocabulary.stops, allowed_V=jnp.asarray(allowed)
      ),
      static_argnames=('max_tokens', 'sampling'),
    )
    self._end = jit(functools.partial(decode.end_span, model))

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

  def fill(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 64,
    sampling: Sampling = Sampling(),
    seed: int = 0,
  ) -> list[list[list[int]]]:
    """Generates every blank of every prompt, blanks left to right.

    Args:
      prompts: token ids with mask pieces, as `encode` gives them.
      max_tokens: longest span.
      sampling: how tokens are chosen.
      seed: of sampling.

    Returns:
      For each prompt, the token ids of each of its blanks.

    Raises:
      UserError: a prompt or span longer than the model's positions.
    """
    return self.fill_scored(prompts, max_tokens=max_tokens, sampling=sampling, seed=seed)[0]

  def fill_scored(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int = 64,
    sampling: Sampling = Sampling(),
    seed: int = 0,
  ) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
    """As `fill`, and the log-probability of each token; see `decode.generate_span`.

    Behind those of a span that a stop token ended stands that of the stop token.
    """
    asked = len(prompts)
    # Every device has as many rows: the last prompt is answered more than once.
    prompts = [*prompts, *[prompts[-1]] * (-asked % sharding.axis_size('act_batch'))]
    s, c = self._vocabulary.specials, self._config
    blanks = [self._blanks(p) for p in prompts]
    # 1. The contexts, into a cache with room for every span.
    # A causal model generates from the last token of its prompt.
    contexts = [p[:-1] if c.causal else p for p in prompts]
    lengths = np.array([len(p) for p in contexts], np.int32)
    configs.check(
      lengths.max() <= c.max_positions + 1,
      f'a prompt must have at most {c.max_positions + 1} tokens',
      f'{lengths.max()}',
      'shorten it',
    )
    configs.check(
      1 <= max_tokens <= c.max_positions,
      f'--max_tokens must be in 1 .. {c.max_positions}',
      str(max_tokens),
      'generate less at a time',
    )
    rounds = max(map(len, blanks))
    width = -(-max(int(lengths.max()), 1) // _BUCKET) * _BUCKET
    tokens = np.full((len(prompts), width), s.pad, np.int32)
    for row, context in enumerate(contexts):
      tokens[row, : len(context)] = context
    # One slot a span more than its tokens: [sop] is read, too.
    slots = width + rounds * (max_tokens + 1)
    cache = decode.init_cache(c, len(prompts), slots, self._dtype)
    cache, _ = self._read(self._params, cache, tokens, lengths)

    # 2. The blanks: in each round the next one of every prompt that has one left.
    spans: list[list[list[int]]] = [[] for _ in prompts]
    scores: list[list[list[float]]] = [[] for _ in prompts]
    slot = jnp.asarray(lengths)
    for number in range(rounds):
      active = np.array([number < len(b) for b in blanks])
      position = np.array([b[number] if number < len(b) else 0 for b in blanks], np.int32)
      first = np.array([p[-1] if c.causal else s.sop for p in prompts], np.int32)
      # Without block positions, positions go on after a causal context and after [gMASK].
      mask = np.array([p[i] for p, i in zip(prompts, position, strict=True)])
      goes_on = (not c.two_positions) & ((mask == s.gmask) | c.causal)
      # From the first free slot: slots and positions agree, unless a span came before.
      position = np.where(goes_on, slot, position).astype(np.int32)
      key = jax.random.fold_in(jax.random.key(seed), number)
      cache, generated, count, slot, log_probs = self._generate(
        self._params,
        cache,
        first,
        position,
        goes_on.astype(np.int32),
        slot,
        active,
        key,
        max_tokens=max_tokens,
        sampling=sampling,
      )
      generated, count, log_probs = jax.device_get((generated, count, log_probs))
      for row in np.flatnonzero(active):
        spans[row].append(generated[row, : count[row]].tolist())
        scores[row].append(log_probs[row, : count[row] + 1].tolist())
      cut = active & (count == max_tokens)
      if number + 1 < rounds and cut.any():
        position = position + max_tokens * goes_on.astype(np.int32)
        block = np.full_like(position, max_tokens + 1)
        last = generated[:, -1]
        cache, slot = self._end(self._params, cache, last, position, block, slot, cut)
    return spans[:asked], scores[:asked]

  def _blanks(self, prompt: Sequence[int]) -> list[int]:
    """Positions of the masks; of the last token for a causal model."""
    if self._config.causal:
      return [len(prompt) - 1]
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
