"""What a user may ask for when answers are generated, and what an answer is."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import numpy as np

from glm_jax import configs
from glm_jax.configs import SEED, at_least, at_most
from glm_jax.inference.beam import BeamConfig, check_alone
from glm_jax.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """What is asked for; where transformers' GenerationConfig has a field, its name.

  Attributes:
    samples: answers a prompt, each with random numbers of its own.
    gmask: continue texts, with a model that fills blanks.
    max_new_tokens: longest span.
    min_new_tokens: tokens of a span before it may end.
    stop_strings: texts that end a span, and are left out of it.
    seed: of sampling: an answer depends on it, its prompt's number and its own.
    sampling: how tokens are chosen.
    beam: how texts are searched, if it is not as by default.
  """

  samples: Annotated[int, at_least(1), at_most(2**16)] = 1
  gmask: bool = False
  max_new_tokens: Annotated[int, at_least(1)] = 64
  min_new_tokens: Annotated[int, at_least(0)] = 0
  stop_strings: tuple[str, ...] = ()
  # JAX takes 32 bits of a seed, and would drop the others.
  seed: Annotated[int, SEED] = 0
  sampling: Sampling = Sampling()
  beam: BeamConfig = BeamConfig()

  def __post_init__(self):
    configs.check_fields(self)
    configs.check(
      self.min_new_tokens <= self.max_new_tokens,
      f'min_new_tokens must be in 0 .. {self.max_new_tokens}, that of max_new_tokens',
      str(self.min_new_tokens),
      'ask for fewer',
    )
    configs.check(
      all(self.stop_strings),
      'each of stop_strings must hold some text',
      repr(self.stop_strings),
      'leave out the empty one',
    )
    if self.beam != BeamConfig():
      check_alone(self.sampling, bool(self.stop_strings))
      configs.check(
        self.samples == 1,
        'beam search must have one answer a prompt',
        f'samples={self.samples}',
        'leave out samples, or the beams',
      )
    configs.check(
      self.samples == 1 or self.sampling.temperature > 0,
      'several samples must have a temperature above 0',
      f'samples={self.samples} and temperature={self.sampling.temperature}',
      'set one, such as 1',
    )

  @classmethod
  def of(cls, **fields: Any) -> Generation:
    """From its fields and those of `Sampling` and `BeamConfig`, side by side.

    Example:
      >>> Generation.of(seed=3, top_k=5).sampling.top_k
      5
      >>> Generation.of(stop_strings='END').stop_strings
      ('END',)
    """
    of = lambda kind: kind(
      **{f.name: fields.pop(f.name) for f in dataclasses.fields(kind) if f.name in fields}
    )
    sampling, beam = of(Sampling), of(BeamConfig)
    stops = fields.get('stop_strings', ())
    # One text is one stop string, and not its letters.
    fields['stop_strings'] = (stops,) if isinstance(stops, str) else tuple(stops)
    return cls(**fields, sampling=sampling, beam=beam)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """A prompt with its blanks filled, or a text that goes on.

  Attributes:
    number: of the prompt, from 0.
    sample: of the prompt's answers, from 0.
    prompt: the text that was given.
    text: the whole, as the vocabulary decodes it.
    spans: what was generated, a text a blank.
    tokens: its token ids.
    log_probs: of each token; behind them that of the end, unless a span was cut short.
  """

  number: int
  sample: int
  prompt: str
  text: str
  spans: list[str]
  tokens: list[np.ndarray]
  log_probs: list[np.ndarray]

  @property
  def log_prob(self) -> float:
    """Of all that was generated, in nats, at the temperature that it was sampled at."""
    return float(sum(scores.sum() for scores in self.log_probs))
