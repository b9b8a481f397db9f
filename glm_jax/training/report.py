"""What one sees at the end: a table beside baselines, filled blanks, a loss curve."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from glm_jax import distributed, sharding
from glm_jax.checkpoints import folder
from glm_jax.inference.decode import Filler
from glm_jax.training import evaluation, writer
from glm_jax.training.config import TrainConfig

# Baselines are fitted on what the model saw; more would take longer than it is worth.
_BASELINE_POSITIONS = 4_000_000


def report(config: TrainConfig, data: Any, params: Any, say: Callable[..., None]) -> None:
  """Prints the tables and writes summary.json and loss.png.

  Args:
    config: of the run.
    data: a `glm_jax.data.prepare.Prepared`.
    params: the trained parameters; all processes must take part.
    say: prints, on the leader.
  """
  validation = (
    writer.read(config.model_dir, 'validation') if distributed.is_leader() else []
  )
  # A collective: every process must come this far.
  params = _on_every_process(params)
  if not distributed.is_leader():
    return
  summary: dict[str, Any] = {
    'steps': config.train_steps,
    'validation': validation[-1] if validation else {},
    'baselines': {},
    'filled': [],
  }
  if summary['validation']:
    say(f'\n{"validation loss (nats)":<24}{"model":>8}{"bigram":>8}{"unigram":>9}')
  for name, task in data.evaluation_tasks.items():
    loss = summary['validation'].get(f'loss/{name}', summary['validation'].get('loss'))
    scores = _baselines(config, data, name, task)
    summary['baselines'][name] = scores
    say(f'{name:<24}{loss:>8.3f}{scores["bigram"]:>8.3f}{scores["unigram"]:>9.3f}')

  if data.corpora and config.evaluation.fill:
    kind = 'continued' if config.model.causal else 'blanks filled'
    say(f'\nheld-out text, {kind} by the model:')
    # The leader is alone now: its computations must not wait for other processes.
    alone = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1])
    with sharding.active(alone):
      params = jax.device_put(params, sharding.replicated(alone))
      for filled in _filled(config, data, params):
        summary['filled'].append(filled)
        say(f'  {filled["filled"]}   (was: {filled["was"]})'.replace('\n', '↵'))
  lines = {
    f'{k} ({name})': v
    for name, scores in summary['baselines'].items()
    for k, v in scores.items()
    if name in ('blank', 'causal')
  }
  picture = writer.plot_losses(config.model_dir, lines)
  folder.write_atomically(
    Path(config.model_dir) / 'summary.json',
    json.dumps(summary, indent=2, ensure_ascii=False) + '\n',
  )
  say(f'\nloss curve in {picture}')


def _on_every_process(params: Any) -> Any:
  """Parameters as arrays of this process alone, since only the leader goes on."""
  if jax.process_count() == 1:
    return params
  return multihost_utils.process_allgather(params, tiled=True)


def _baselines(config: TrainConfig, data: Any, name: str, task: str) -> dict[str, float]:
  from glm_jax.data import baselines, pipeline

  train = pipeline.batches(
    f'glm_{name}' if data.indexed else task,
    config.feature_lengths,
    batch_size=config.batch_size,
    seed=config.seed,
  )
  positions = config.batch_size * config.feature_lengths['tokens']
  most_batches = max(1, _BASELINE_POSITIONS // positions)
  # All rows of each batch, whatever this process's share: the leader is alone by now.
  return baselines.fit_and_score(
    itertools.islice(train, min(config.train_steps, most_batches)),
    evaluation.validation_batches(config, task, pipeline.Process()),
    data.vocabulary.size,
  )


def _filled(config: TrainConfig, data: Any, params: Any) -> Iterator[dict[str, str]]:
  """Sentences of held-out documents with a few words hidden, or their ends."""
  filler = Filler(config.model, params, data.vocabulary)
  # A fixed seed: runs are compared on the same blanks.
  rng = np.random.default_rng(0)
  for sentence in itertools.islice(_sentences(config), config.evaluation.fill):
    words = list(re.finditer(r'\S+', sentence))
    size = int(rng.integers(1, 4))
    # At least two words before the blank and one behind it, which are something to go by.
    first = int(rng.integers(2, len(words) - size))
    start, end = words[first].start(), words[first + size - 1].end()
    if config.model.causal:
      prompt, end = filler.encode(sentence[:start].rstrip()), len(sentence)
    else:
      prompt = filler.encode(sentence[:start] + '[MASK]' + sentence[end:])
    spans = filler.fill([prompt], max_tokens=16)[0]
    yield {'filled': filler.text(prompt, spans, ('[', ']')), 'was': sentence[start:end]}


def _sentences(config: TrainConfig) -> Iterator[str]:
  """One plain sentence a held-out document, of 8 words or more."""
  from glm_jax.data.corpora import corpus

  name = next(iter(config.mixture.corpora.values()), config.corpus.corpus)
  source = dataclasses.replace(config.corpus, corpus=name)
  for document in corpus.documents(source, 'validation'):
    # Letters, digits and light punctuation only: no headings, lists or code.
    for sentence in re.findall(r'[A-Z][\w ,\'()-]{40,160}\.(?=\s)', document.text):
      if len(sentence.split()) >= 8:
        yield sentence
        break
