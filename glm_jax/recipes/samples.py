"""What a person looks at: losses beside baselines, blanks filled by the model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from glm_jax import distributed, sharding
from glm_jax.batch import Batch
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.inference.filling import Filler
from glm_jax.inference.forward import Forward
from glm_jax.recipes import guesses
from glm_jax.recipes.reading import TaskData
from glm_jax.training.config import TrainConfig

# Baselines are fitted on what the model saw; more would take longer than it is worth.
_BASELINE_POSITIONS = 4_000_000


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
) -> list[dict[str, str]]:
  """Prints held-out sentences with a few words hidden and filled, or their ends continued.

  All processes take part: the parameters stay where they are on the mesh.

  Args:
    config: of the run.
    data: that it was trained on.
    source: the corpus.
    variables: the model's collections, on the mesh.
    say: prints, on the leader.

  Returns:
    {'filled', 'was'} of each sentence.
  """
  kind = 'continued' if config.model.causal else 'blanks filled'
  say(f'\nheld-out text, {kind} by the model:')
  # A token at a time is no length to be cut.
  with sharding.active(data.layout.replace(act_length=None)):
    filler = Filler(config.model, variables, data.vocabulary, config.compute)
    asked = [*_questions(config, filler, source)]
    spans = filler.fill([prompt for prompt, _ in asked], max_new_tokens=16) if asked else []
  filled = []
  for (prompt, was), made in zip(asked, spans, strict=True):
    filled.append({'filled': filler.text(prompt, made, ('[', ']')), 'was': was})
    say(f'  {filled[-1]["filled"]}   (was: {was})'.replace('\n', '↵'))
  return filled


def _questions(
  config: TrainConfig, filler: Filler, source: CorpusConfig
) -> Iterator[tuple[list[int], str]]:
  """Prompts, and what was hidden."""
  # A fixed seed: runs are compared on the same blanks.
  rng = np.random.default_rng(0)
  for sentence in itertools.islice(_sentences(source), config.evaluation.fill):
    words = list(re.finditer(r'\S+', sentence))
    size = int(rng.integers(1, 4))
    # At least two words before the blank and one behind it, which are something to go by.
    first = int(rng.integers(2, len(words) - size))
    start, end = words[first].start(), words[first + size - 1].end()
    if config.model.causal:
      prompt, end = filler.encode(sentence[:start].rstrip()), len(sentence)
    else:
      prompt = filler.encode(sentence[:start] + '[MASK]' + sentence[end:])
    yield prompt, sentence[start:end]


def _sentences(source: CorpusConfig) -> Iterator[str]:
  """One plain sentence a held-out document, of 8 words or more."""
  from glm_jax.data.corpora import corpus

  for document in corpus.documents(source, 'validation'):
    # Letters, digits and light punctuation only: no headings, lists or code.
    for sentence in re.findall(r'[A-Z][\w ,\'()-]{40,160}\.(?=\s)', document.text):
      if len(sentence.split()) >= 8:
        yield sentence
        break
