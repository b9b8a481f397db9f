"""A trained model in Python: loaded from where it is, asked in batches, numpy out.

What a command does with a checkpoint can be done here; nothing is written. TensorFlow is
imported by the losses of GLM's objectives alone, which are made as in training.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from glm_jax import accelerators, configs, models, opening, sharding
from glm_jax.batch import Batch
from glm_jax.configs import at_least
from glm_jax.inference import candidates as candidate_lib
from glm_jax.inference import prompts as prompt_lib
from glm_jax.inference import scoring
from glm_jax.inference.beam import BeamConfig
from glm_jax.inference.filling import Filler
from glm_jax.inference.forward import Forward, Loss, Scores
from glm_jax.inference.generation import Completion, Generation
from glm_jax.inference.request import Answer, check_context
from glm_jax.models.cache import DTYPES
from glm_jax.text import chat
from glm_jax.text.conversation import Message, in_text


def load(
  path: Any,
  *,
  adapters: Any = '',
  mesh: sharding.MeshConfig | sharding.Layout | None = None,
  dtype: str = 'float32',
  batch_size: int = 8,
  cache_dtype: str = '',
) -> LanguageModel:
  """A model from a run, a checkpoint, or the folder of a released model.

  Args:
    path: a MODEL_DIR (its newest checkpoint), a checkpoint, or a folder as it was
      published, which is read as it is.
    adapters: a MODEL_DIR or a checkpoint of adapters that were trained on it; a run's own
      are read with it.
    mesh: to spread it over; None for one device.
    dtype: of activations; weights stay as they are stored.
    batch_size: rows that are worked on at a time.
    cache_dtype: of keys and values, of `glm_jax.models.cache.DTYPES`; '' for `dtype`.

  Raises:
    UserError: no such model, a damaged one, or one without its vocabulary; adapters of
      another one.
  """
  for line in accelerators.start():
    warnings.warn(line, stacklevel=2)
  if not isinstance(mesh, sharding.Layout):
    # Without a mesh, one device: a prompt is a batch of one row.
    devices = jax.local_devices()[:1] if mesh is None else None
    mesh = sharding.make_mesh(mesh or sharding.MeshConfig(), devices)
  return LanguageModel(
    opening.find(str(path), str(adapters)),
    mesh,
    dtype=dtype,
    batch_size=batch_size,
    cache_dtype=cache_dtype,
  )


class LanguageModel:
  """What `load` returns.

  Attributes:
    config: of the model.
    vocabulary: that it was trained with: `encode`, `decode`.
    variables: its Flax collections: 'params', 'scales' of one that is quantised, and
      'adapters' or 'prefix' of one that has them.
    layout: the mesh that they are on.
    reader: of candidates, in token ids.
  """

  def __init__(
    self,
    source: opening.Stored,
    layout: sharding.Layout,
    *,
    dtype: str = 'float32',
    batch_size: int = 8,
    cache_dtype: str = '',
  ):
    """See `load`."""
    configs.check_value('batch_size', batch_size, at_least(1))
    configs.check_value('cache_dtype', cache_dtype, configs.one_of('', *DTYPES))
    compute = models.ComputeConfig(dtype=dtype)
    self.config, self.vocabulary, self.layout = source.config, source.vocabulary, layout
    self.variables = source.read(layout)
    self._value = functools.cache(source.value)
    self._forward = Forward(self.config, self.variables, compute, layout, batch_size)
    self.reader = candidate_lib.Reader(
      self.config, self.variables, self.vocabulary, compute, layout
    )
    self._filler = Filler(
      self.config,
      self.variables,
      self.vocabulary,
      compute,
      rows=batch_size,
      cache_dtype=cache_dtype,
    )

  @property
  def params(self) -> Any:
    """The parameters, a tree of arrays with layers stacked first."""
    return self.variables['params']

  def rows(
    self, texts: str | Sequence[str], answers: Sequence[Sequence[str]] | None = None
  ) -> Batch:
    """Texts as the model reads them, numpy arrays [B, T] (see `glm_jax.batch.Batch`).

    Of a model that fills blanks, a text is the context, and `answers` stand behind it in
    the order of its blanks; without them, the first blank is opened, so that what is said
    there is its first token. A causal model reads the text and what goes on with it.

    Args:
      texts: with or without blanks.
      answers: of each text, a text a blank.
    """
    texts = _listed(texts)
    configs.check(
      answers is None or len(answers) == len(texts),
      'answers must be as many as texts',
      f'{answers and len(answers)} for {len(texts)}',
      'give a list of answers for each text',
    )
    return scoring.of_texts(self.config, self.vocabulary, texts, answers)

  def logits(
    self, texts: str | Sequence[str] | Batch, answers: Sequence[Sequence[str]] | None = None
  ) -> np.ndarray:
    """[B, T, V] float32: what is said at each token of `rows(texts, answers)`.

    Args:
      texts: a batch, too: then of just these rows, as in training.
      answers: see `rows`.
    """
    if isinstance(texts, Batch):
      return self._forward.logits(texts)
    return self._forward.logits_in_parts(self.rows(texts, answers))

  def loss(self, texts: str | Sequence[str], objective: str = '', seed: int = 0) -> Loss:
    """The training loss of texts, each a document that fits one row; without dropout.

    Args:
      texts: plain text.
      objective: 'blank', 'document' or 'sentence', with the masks that a run with the
        default `ObjectiveConfig` draws (TensorFlow is imported for it); 'causal'.
      seed: of the masks.

    Raises:
      UserError: another model's objective, a text that is too long, or nothing to predict.
    """
    c, v = self.config, self.vocabulary
    known = ('causal',) if c.causal else ('blank', 'document', 'sentence')
    objective = objective or known[0]
    configs.check_value('objective', objective, configs.one_of(*known))
    configs.check_value('seed', seed, configs.SEED)
    texts = _listed(texts)
    if c.causal:
      rows = scoring.documents(c, v, texts)
    else:
      from glm_jax import startup

      startup.import_tensorflow()
      from glm_jax.data.examples import texts as examples

      ids = [scoring.document(c, v, text) for text in texts]
      rows = examples.batch(ids, v, objective, seed, block_positions=c.two_positions)
    counts = rows.loss_weights.sum(1)
    configs.check(
      counts.sum() > 0,
      'texts must hold something to predict',
      f'{len(texts)} too short for {objective!r}',
      'give longer ones',
    )
    log_probs, _ = self._forward.compared(rows)
    return Loss(-(log_probs * rows.loss_weights).sum(1), counts)

  def score(self, prompt: str, candidates: Sequence[str]) -> Scores:
    """Log-probabilities of candidates as what fills the prompt's blank, or goes on with it.

    They are the model's among the tokens that it may generate, as in `generate`. A
    candidate has the space that its blank has swallowed; behind the prompt of a causal
    model it stands as it is, with the space that it begins with.
    """
    configs.check(
      bool(candidates) and not isinstance(candidates, str),
      'candidates must be a list of one or more texts',
      repr(candidates),
      'give some',
    )
    c, v = self.config, self.vocabulary
    ids = prompt_lib.encode(c, v, prompt)
    spans = [prompt_lib.encode_answers(c, v, prompt, [text])[0] for text in candidates]
    check_context(c, len(ids) + max(map(len, spans)) - 1 if c.causal else 0)
    question = candidate_lib.Asked(prompt_lib.request(c, v, 0, ids), spans)
    [said] = self.reader([question], self._filler.engine.allowed)
    tokens = [one.log_probs[:-1] for one in said]
    return Scores(
      np.array([scores.sum() for scores in tokens], np.float32),
      tokens,
      np.array([one.stops[-1] for one in said]),
    )

  def reward(
    self, conversations: Sequence[Sequence[Mapping[str, str]]], template: str = ''
  ) -> np.ndarray:
    """[n] float32: what a reward model (gin_configs/runs/reward.gin) makes of answers.

    Args:
      conversations: each ends with an answer: [{'role': 'user', 'content': ...}, ...].
      template: a key of `glm_jax.text.chat.FAMILIES`; '' for that of the model.

    Raises:
      UserError: no reward model, or no conversation of its template.
    """
    value_D = self._value()
    configs.check(
      value_D is not None,
      'rewards must be those of a reward model',
      'a model that has none',
      'train one with gin_configs/runs/reward.gin',
    )
    _check_listed(conversations)
    c, v, form, made = self.config, self.vocabulary, self._template(template), []
    for messages in conversations:
      ids, scored = form.encode_masked([Message(**message) for message in messages])
      # Behind the prompt, of a model that fills blanks, stands what opens an answer.
      first = scored.index(True) - (not c.causal)
      check_context(c, len(ids))
      asked = prompt_lib.request(c, v, 0, ids[:first])
      made.append(scoring.lay_out(c, v, asked, [ids[first + (not c.causal) :]]))
    values = self._forward.values(scoring.batch(made, 'answer', v.specials.pad), value_D)
    return np.array([x[len(row.tokens) - 1] for x, row in zip(values, made, strict=True)])

  def reply(
    self,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    template: str = '',
    **how: Any,
  ) -> list[list[str]]:
    """Answers to conversations, `samples` texts to each; see `replies`."""
    found: dict[int, dict[int, str]] = {}
    for answer in self.replies(conversations, template, **how):
      found.setdefault(answer.number, {})[answer.sample] = answer.spans[0]
    return [[text for _, text in sorted(one.items())] for _, one in sorted(found.items())]

  def replies(
    self,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    template: str = '',
    *,
    skip: Container[tuple[int, int]] = (),
    **how: Any,
  ) -> Iterator[Completion]:
    """Answers to conversations, in the order in which they are done.

    Args:
      conversations: each ends with a question: [{'role': 'user', 'content': ...}, ...].
      template: a key of `glm_jax.text.chat.FAMILIES`; '' for that of the model.
      skip: see `answers`.
      **how: of `answers`.

    Raises:
      UserError: no conversation of the template, or one that the model has no room for.
    """
    _check_listed(conversations)
    form, asked, encoded = self._template(template), Generation.of(**how), []
    for messages in conversations:
      ids = form.encode([Message(**message) for message in messages], opening=True)
      # What opens an answer is not read with the question by a model that fills blanks.
      encoded.append(ids if self.config.causal else ids[:-1])
    questions = [messages[-1]['content'] for messages in conversations]
    return (
      dataclasses.replace(answer, spans=[self._said(form, answer.tokens[0].tolist())])
      for answer in self._answers(questions, encoded, asked, skip)
    )

  def _said(self, form: Any, ids: list[int]) -> str:
    text = in_text(form.decode_answer(ids))
    # Of an answer that was cut within a character, its bytes are left out.
    return text.rstrip('\ufffd') if self.vocabulary.ends_within_character(ids) else text

  def _template(self, name: str) -> Any:
    """That of a name, or of the model."""
    return chat.template_for(self.vocabulary, name or chat.family_of(self.config))

  def generate(self, prompts: str | Sequence[str], **how: Any) -> list[Completion]:
    """Fills the blanks of prompts, or goes on with them; `samples` answers a prompt.

    Args:
      prompts: texts, or one.
      **how: of `answers`.
    """
    key = lambda answer: (answer.number, answer.sample)
    return sorted(self.answers(prompts, **how), key=key)

  def answers(
    self,
    prompts: str | Sequence[str],
    *,
    skip: Container[tuple[int, int]] = (),
    **how: Any,
  ) -> Iterator[Completion]:
    """As `generate`, in the order in which they are done: a free row takes the next prompt.

    Args:
      prompts: texts with [MASK] (a few words), [sMASK] (a sentence) or [gMASK] (the rest);
        any text, for a causal model.
      skip: (number, sample) of answers that are not wanted.
      **how: of `glm_jax.inference.generation.Generation`, and of `sampling.Sampling` and
        `beam.BeamConfig` beside it: max_new_tokens, samples, temperature (0 takes the most
        probable token), num_beams, ...

    Raises:
      UserError: a prompt that cannot be filled, or settings out of their range.
    """
    asked, prompts = Generation.of(**how), _listed(prompts)
    encoded = [self._filler.encode(prompt, asked.gmask) for prompt in prompts]
    return self._answers(prompts, encoded, asked, skip)

  def _answers(
    self,
    prompts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    asked: Generation,
    skip: Container[tuple[int, int]] = (),
  ) -> Iterator[Completion]:
    samples = asked.samples
    wanted = [
      (number, sample)
      for number in range(len(prompts))
      for sample in range(samples)
      if (number, sample) not in skip
    ]
    answers = self._filler.answers(
      [encoded[number] for number, _ in wanted],
      numbers=[number * samples + sample for number, sample in wanted],
      max_new_tokens=asked.max_new_tokens,
      min_new_tokens=asked.min_new_tokens,
      sampling=asked.sampling,
      beam=None if asked.beam == BeamConfig() else asked.beam,
      seed=asked.seed,
      stop_strings=asked.stop_strings,
    )
    return (
      self._completion(prompts, encoded, samples, answer, asked.stop_strings)
      for answer in self._inside(answers)
    )

  def fill(
    self,
    text: str,
    top: int = 5,
    *,
    max_new_tokens: int = 64,
    drawn: int = 32,
    seed: int = 0,
  ) -> list[Completion]:
    """The most probable fillings of a text that are found, best first.

    They are the `top` most probable, by the model's own probabilities and all blanks taken
    together, of the different ones among the greedy filling, what a search with `top` beams
    finds, and `drawn` that are drawn. There may be fewer.

    Args:
      text: with one or more blanks; a causal model goes on with it.
      top: most fillings.
      max_new_tokens: longest span.
      drawn: how many are drawn.
      seed: of these.
    """
    configs.check_value('top', top, at_least(1))
    configs.check_value('drawn', drawn, at_least(1))
    how = {'max_new_tokens': max_new_tokens, 'seed': seed}
    found = self.generate([text], **how)
    # Without a penalty, the search compares plain log-probabilities.
    found += self.generate([text], num_beams=top, length_penalty=0.0, **how)
    # At temperature 1, log-probabilities are the model's.
    found += self.generate([text], samples=drawn, temperature=1.0, **how)
    found.sort(key=lambda answer: answer.log_prob)
    # Of token sequences with one text, the most probable is kept: the last.
    different = {tuple(answer.spans): answer for answer in found}
    return sorted(different.values(), key=lambda a: a.log_prob, reverse=True)[:top]

  def _completion(
    self, prompts: Any, encoded: Any, samples: int, answer: Answer, stop_strings: Any
  ) -> Completion:
    number, sample = divmod(answer.number, samples)
    parts = self._filler.parts(encoded[number], answer.spans, stop_strings)
    return Completion(
      number=number,
      sample=sample,
      prompt=prompts[number],
      text=''.join(parts),
      spans=parts[1::2],
      tokens=[np.array(ids, np.int32) for ids in answer.spans],
      log_probs=[np.array(scores, np.float32) for scores in answer.log_probs],
    )

  def _inside(self, answers: Iterator[Answer]) -> Iterator[Answer]:
    """The same, each computed on the mesh, which whoever takes them does not see."""
    # A token at a time is no length to be cut.
    layout = self.layout.replace(act_length=None)
    while True:
      with sharding.active(layout):
        answer = next(answers, None)
      if answer is None:
        return
      yield answer


def _check_listed(conversations: Any) -> None:
  """Raises UserError for a single conversation, or none."""
  configs.check(
    bool(conversations) and not isinstance(conversations[0], Mapping),
    'conversations must be a list of lists of messages',
    repr(conversations)[:80],
    "give [[{'role': 'user', 'content': ...}], ...]",
  )


def _listed(texts: str | Sequence[str]) -> list[str]:
  """A list of texts; one is a list of one.

  Raises:
    UserError: none.
  """
  texts = [texts] if isinstance(texts, str) else [*texts]
  configs.check(bool(texts), 'texts must be one or more', '[]', 'give some')
  return texts
