"""Fills the blanks of texts, or goes on with them, with one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from glm_jax import configs, models
from glm_jax.inference import prompts as prompt_lib
from glm_jax.inference.beam import BeamConfig, check_alone
from glm_jax.inference.engine import Engine
from glm_jax.inference.request import Answer
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
    barred: str = '',
  ):
    """
    Args:
      config: of the model.
      variables: its collections: {'params'}, and more (`glm_jax.models.products`).
      vocabulary: that it was trained with.
      compute: of it, the dtype is what counts here.
      rows: see `Engine`.
      cache_dtype: likewise.
      barred: a text that no token of an answer holds, such as a line break; '' for none.
    """
    self._config, self._vocabulary = config, vocabulary
    self.engine = Engine(
      config,
      variables,
      stops=vocabulary.stops,
      allowed=prompt_lib.allowed(config, vocabulary, barred),
      compute=compute,
      rows=rows,
      cache_dtype=cache_dtype,
    )

  def encode(self, prompt: str, gmask: bool = False) -> list[int]:
    """See `prompts.encode`."""
    return prompt_lib.encode(self._config, self._vocabulary, prompt, gmask)

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
    numbers: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
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
      numbers: of the prompts; None counts them.
      stop_strings: texts that end a span, too: its last token is the one that spells the
        first of them to its end. They are looked for every few tokens.
      watch: see `Engine.generate`; None with `beam`.

    Raises:
      UserError: a prompt or span longer than the model's positions, or a search that is to
        sample.
    """
    c, v = self._config, self._vocabulary
    numbers = range(len(prompts)) if numbers is None else numbers
    requests = [
      prompt_lib.request(c, v, *pair) for pair in zip(numbers, prompts, strict=True)
    ]
    configs.check(
      0 <= min_new_tokens <= max_new_tokens,
      f'--min_new_tokens must be in 0 .. {max_new_tokens}, that of --max_new_tokens',
      str(min_new_tokens),
      'ask for fewer',
    )
    # At once, and not when the first answer is asked for.
    self.engine.check(requests, max_new_tokens)
    if beam is not None:
      check_alone(sampling, bool(watch or stop_strings))
      return self.engine.search(
        requests, most=max_new_tokens, least=min_new_tokens, config=beam
      )

    def cut(number: int, made: list[int]) -> int:
      if not self._holds(made, stop_strings):
        return len(made)
      counts = range(1, len(made) + 1)
      return next(n for n in counts if self._holds(made[:n], stop_strings))

    return self.engine.generate(
      requests,
      most=max_new_tokens,
      least=min_new_tokens,
      sampling=sampling,
      seed=seed,
      watch=watch,
      cut=cut if stop_strings else None,
    )

  def _holds(self, ids: Sequence[int], texts: Sequence[str]) -> bool:
    decoded = self._vocabulary.decode(ids)
    return any(text in decoded for text in texts)

  def text(
    self,
    prompt: Sequence[int],
    spans: Sequence[Sequence[int]],
    mark: tuple[str, str] = ('', ''),
  ) -> str:
    """A prompt with its blanks filled, each between two marks; see `parts`."""
    parts = self.parts(prompt, spans)
    parts[1::2] = [mark[0] + span + mark[1] for span in parts[1::2]]
    return ''.join(parts)

  def parts(
    self,
    prompt: Sequence[int],
    spans: Sequence[Sequence[int]],
    stop_strings: Sequence[str] = (),
  ) -> list[str]:
    """Text, the first span, text, and so on: what a prompt with its spans is decoded to.

    Of a span that ends within a character, the bytes of that are left out; of one that
    holds a stop string, this and what is behind it.
    """
    if self._config.causal:
      ids = [prompt, *spans]
    else:
      ids, rest = [[]], list(spans)
      blanks = set(prompt_lib.blanks(self._vocabulary, prompt))
      for position, token in enumerate(prompt):
        if position in blanks and rest:
          ids += [rest.pop(0), []]
        else:
          ids[-1].append(token)
    texts = self._vocabulary.decode_parts(ids)
    for i in range(1, len(ids), 2):
      if self._vocabulary.ends_within_character(ids[i]):
        texts[i] = texts[i].rstrip(_BROKEN)
      found = [texts[i].find(stop) for stop in stop_strings if stop in texts[i]]
      texts[i] = texts[i][: min(found, default=None)]
    return texts
