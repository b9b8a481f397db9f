"""What a person looks at: losses beside baselines, blanks filled by the model."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from glm_jax import distributed, sharding
from glm_jax.batch import Batch
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.inference.filling import Filler
from glm_jax.inference.forward import Forward
from glm_jax.inference.sampling import Sampling
from glm_jax.recipes import guesses
from glm_jax.recipes.reading import TaskData
from glm_jax.training.config import TrainConfig

# Baselines are fitted on what the model saw; more would take longer than it is worth.
_BASELINE_POSITIONS = 4_000_000
# Answers that are drawn for a blank, and how many of the different ones are shown.
_DRAWN, _SHOWN = 32, 3


def beside_baselines(
  config: TrainConfig,
  data: TaskData,
  validated: Mapping[str, float],
  say: Callable[..., None],
) -> dict[str, dict[str, float]]:
  """Prints a line for each validation set; scores of unigrams and bigrams by its name.

  They are counted on the leader, which reads all rows.
  """
  if not distributed.is_leader():
    return {}
  if validated:
    say(f'\n{"validation loss (nats)":<24}{"model":>8}{"bigram":>8}{"unigram":>9}')
  baselines = {}
  for name in data.validation:
    loss = validated.get(f'loss/{name}', validated.get('loss'))
    # A task of one's own has a name of its own, and its losses those of its objectives.
    objectives = [k.removeprefix('loss/') for k in validated if k.startswith('loss/')]
    others = [] if name in objectives else objectives
    label = f'{name} ({", ".join(others)})' if others else name
    scores = _baselines(config, data, name)
    if loss is None or not scores:
      say(f'{name:<24}  nothing scored')
      continue
    baselines[name] = scores
    say(f'{label:<24}{loss:>8.3f}{scores["bigram"]:>8.3f}{scores["unigram"]:>9.3f}')
  return baselines


def _baselines(config: TrainConfig, data: TaskData, name: str) -> dict[str, float]:
  from glm_jax.data import baselines

  return baselines.fit_and_score(
    _seen(config, data, name), data.whole_validation(name), data.vocabulary.size
  )


def _seen(config: TrainConfig, data: TaskData, name: str) -> Iterator[Batch]:
  """Batches of an objective to count in, no more than were trained on.

  All rows of each, whatever this process's share.
  """
  from glm_jax.data import pipeline

  train = pipeline.batches(
    f'glm_{name}' if data.prepared.indexed else data.task,
    data.feature_lengths,
    batch_size=config.batch_size,
    seed=config.seed,
  )
  most_batches = max(1, _BASELINE_POSITIONS // (config.batch_size * config.recipe.length))
  return itertools.islice(train, min(config.train_steps, most_batches))


def guess(
  config: TrainConfig,
  data: TaskData,
  variables: Mapping[str, Any],
  say: Callable[..., None],
) -> dict[str, Any]:
  """Prints how well held-out blanks are guessed; see `guesses.guesses`.

  All processes take part, each with all rows.

  Args:
    config: of the run.
    data: that it was trained on.
    variables: the model's collections, on the mesh.
    say: prints, on the leader.
  """
  forward = Forward(config.model, variables, config.compute, data.layout, config.batch_size)
  made = guesses.guesses(
    forward,
    [*data.whole_validation('blank')],
    _seen(config, data, 'blank'),
    data.vocabulary,
  )
  for line in guesses.table(made):
    say(line)
  return made


def fill(
  config: TrainConfig,
  data: TaskData,
  source: CorpusConfig,
  variables: Mapping[str, Any],
  say: Callable[..., None],
) -> list[dict[str, Any]]:
  """Prints held-out sentences and what the model puts in their blanks, or goes on with.

  All processes take part: the parameters stay where they are on the mesh.

  Args:
    config: of the run.
    data: that it was trained on.
    source: the corpus.
    variables: the model's collections, on the mesh.
    say: prints, on the leader.

  Returns:
    Of each sentence {'before', 'was', 'behind', 'guesses': [{'text', 'probability'}]}, the
    most probable first.
  """
  causal = config.model.causal
  kind = 'ends' if causal else 'blanks'
  say(f'\n[{kind}] of held-out sentences, and what the model makes of them:')
  asked = [*_questions(config, source)]
  # What may fill a blank is drawn, by the model's own probabilities; of the ways in which
  # a text may go on, the likeliest tells more.
  count, temperature = (1, 0.0) if causal else (_DRAWN, 1.0)
  # A token at a time is no length to be cut.
  with sharding.active(data.layout.replace(act_length=None)):
    filler = Filler(
      config.model, variables, data.vocabulary, config.compute, rows=_DRAWN, barred='\n'
    )
    prompts = [filler.encode(_prompt(config, *parts)) for parts in asked]
    answers = filler.fill_scored(
      [prompt for prompt in prompts for _ in range(count)],
      max_new_tokens=16,
      sampling=Sampling(temperature=temperature),
    )
  made = []
  for number, (prompt, (before, was, behind)) in enumerate(
    zip(prompts, asked, strict=True)
  ):
    drawn = slice(number * count, (number + 1) * count)
    probabilities: dict[str, float] = {}
    for spans, scores in zip(*(part[drawn] for part in answers), strict=True):
      text = filler.parts(prompt, spans)[1].strip()
      likely = math.exp(math.fsum(scores[0]))
      probabilities[text] = max(likely, probabilities.get(text, 0.0))
    best = sorted(probabilities.items(), key=lambda item: -item[1])[:_SHOWN]
    shown = [{'text': text, 'probability': p} for text, p in best]
    made.append({'before': before, 'was': was, 'behind': behind, 'guesses': shown})
    said = [text if causal else f'{text or "(nothing)"} {p:.1%}' for text, p in best]
    say(f'  {before.strip()} [{was}] {behind.strip()}'.rstrip() + f'   {", ".join(said)}')
  return made


def _prompt(config: TrainConfig, before: str, _: str, behind: str) -> str:
  return before.rstrip() if config.model.causal else f'{before}[MASK]{behind}'


def _questions(config: TrainConfig, source: CorpusConfig) -> Iterator[tuple[str, str, str]]:
  """What stands before a blank, what it hides, and what stands behind it."""
  # A fixed seed: runs are compared on the same blanks.
  rng = np.random.default_rng(0)
  for sentence in itertools.islice(_sentences(source), config.evaluation.fill):
    words = list(re.finditer(r'\S+', sentence))
    size = int(rng.integers(1, 3))
    # At least two words before the blank and one behind it, which are something to go by.
    first = int(rng.integers(2, len(words) - size))
    start, end = words[first].start(), words[first + size - 1].end()
    if config.model.causal:
      end = len(sentence)
    yield sentence[:start], sentence[start:end], sentence[end:]


def _sentences(source: CorpusConfig) -> Iterator[str]:
  """One plain sentence a held-out document, of 8 words or more."""
  from glm_jax.data.corpora import corpus

  for document in corpus.documents(source, 'validation'):
    # Letters, digits and light punctuation only: no headings, lists or code.
    for sentence in re.findall(r'[A-Z][\w ,\'()-]{40,160}\.(?=\s)', document.text):
      if len(sentence.split()) >= 8:
        yield sentence
        break
