"""Understanding, learnt as GLM does: a cloze whose right candidate is the most probable.

All candidates of an example are documents of one row, the right one first, so that nothing
parts them; or, with a classifier, a row is one document and a label (GLM paper, section
3.1; THUDM/GLM finetune_glm.py and model/downstream.py).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import configs, models, sharding
from glm_jax.configs import at_least, one_of
from glm_jax.data.corpora.config import CorpusConfig
from glm_jax.data.rows.table import RowPlan
from glm_jax.evaluation import cloze as clozes
from glm_jax.evaluation import running
from glm_jax.evaluation.patterns import PATTERNS, Example
from glm_jax.evaluation.task import Asker, Item
from glm_jax.inference.candidates import Reader
from glm_jax.recipes.pretraining import Pretraining
from glm_jax.recipes.reading import TaskData
from glm_jax.text import asking, loading
from glm_jax.text.vocabulary import Vocabulary
from glm_jax.training.config import TrainConfig
from glm_jax.training.losses import LossFn, applied, chunked_cross_entropy, cross_entropy

_TASK = 'glm_cloze'
_LOSSES = ('cross_entropy', 'hinge', 'generative', 'mix', 'adapet')
# Tokens of a document without which there is nothing to read.
_LEAST = 16
_CLASSIFIER = 'classifier'


class ClozeData(TaskData):
  """See `recipe.Data`.

  Attributes:
    judged: what is asked at each validation; empty with a classifier.
  """

  judged: list[Item]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cloze(Pretraining):
  """A pattern over a benchmark.

  Attributes, besides those of `Pretraining`, whose `corpus` names its folder, or its data
  set in TFDS, 'tfds:super_glue/boolq':
    task: 'glm_cloze'.
    benchmark: a name in `glm_jax.evaluation.patterns.PATTERNS`.
    candidates_loss: of the candidates' log-probabilities s, of which y is right:
      'cross_entropy', -log softmax(s)[y]; 'hinge', the sum of max(0, 1 + s_j - s_y);
      'generative', -s_y; 'mix', the first and the third; 'adapet', s_j summed over the
      others, less s_y, which has no least value. '' for the benchmark's own.
    classifier: classify what is read at the blank by a head of its own instead.
    dropout: of what it reads.
    negatives: most wrong candidates in a row, drawn anew whenever its example comes round,
      as a function of the run's seed and the example's number; 0 for all, None for the
      benchmark's own number. Metrics of what is held out are of all candidates.
    shots: examples that are learnt from, drawn by the run's seed; 0 for all.
  """

  task: Annotated[str, one_of(_TASK)] = _TASK
  benchmark: str
  candidates_loss: Annotated[str, one_of('', *_LOSSES)] = ''
  classifier: bool = False
  dropout: Annotated[float, configs.within('[0, 1)')] = 0.1
  negatives: Annotated[int | None, at_least(0)] = None
  shots: Annotated[int, at_least(0)] = 0

  def __post_init__(self):
    super().__post_init__()
    known = one_of(*PATTERNS).but('choose one of these, or --import what registers it')
    configs.check_value('Cloze.benchmark', self.benchmark, known)

  @property
  def pattern(self) -> Any:
    return PATTERNS[self.benchmark]

  @property
  def _source(self) -> Any:
    """The folder, or what reads a data set."""
    from glm_jax.data.corpora import super_glue

    is_data_set = self.corpus.corpus.startswith(super_glue.PREFIX)
    return super_glue.lines(self.corpus) if is_data_set else Path(self.corpus.corpus)

  def own_vocabulary(self) -> Vocabulary:
    configs.check(
      self.has_vocabulary,
      'a cloze must have the vocabulary of a checkpoint',
      'none',
      'set TrainConfig.model=@CheckpointModel() (runs/cloze.gin) or VocabularyConfig.path',
    )
    return loading.load(self.vocabulary.path)

  def row_plans(
    self, config: TrainConfig, vocabulary: Vocabulary
  ) -> tuple[dict[str, CorpusConfig], dict[str, RowPlan], str]:
    raise configs.UserError(
      'make_shards must be of text, got clozes; a run makes its rows of them itself.'
    )

  def _check_task(self, config: TrainConfig) -> None:
    """Any family reads them, with the positions that it has."""

  def _text_length(self, packed: bool) -> int:
    # Documents are cut to the model's positions, whatever the row.
    return 0

  def _part_a(self) -> float:
    return 0.9

  def fixed_validation(self) -> list[str]:
    return []

  def prepare(
    self, config: TrainConfig, vocabulary: Any, layout: sharding.Layout
  ) -> ClozeData:
    from glm_jax.data import prepare_cloze

    vocabulary = vocabulary or self.own_vocabulary()
    splits = {
      split: [*clozes.examples(self._source, self.pattern, name)]
      for split, name in (('train', 'train'), ('validation', 'val'))
    }
    rng = np.random.default_rng(config.seed)
    splits['train'] = [pair for pair in splits['train'] if pair[1].trained]
    if self.shots:
      configs.check(
        self.shots <= len(splits['train']),
        f'Cloze.shots must be at most {len(splits["train"])}, the examples to learn from',
        str(self.shots),
        'give fewer',
      )
      order = rng.permutation(len(splits['train']))[: self.shots]
      splits['train'] = [splits['train'][i] for i in order]
    learnt = {
      split: [(where, self._ordered(example, where)) for where, example in pairs]
      for split, pairs in splits.items()
    }
    generated = any(example.generated for _, example in splits['train'])
    kind = self.candidates_loss or self.pattern.loss
    configs.check(
      not generated or (kind == 'generative' and not self.classifier),
      f'{self.benchmark} has answers without candidates, which are learnt by the loss '
      "'generative'",
      'a classifier' if self.classifier else repr(kind),
      'leave Cloze.candidates_loss and Cloze.classifier as they are',
    )
    counts = [len(e.candidates) for pairs in learnt.values() for _, e in pairs]
    if self.classifier:
      configs.check(
        len({*counts}) <= 1,
        'a classifier must have the same labels for each example',
        f'{sorted({*counts})[:5]} candidates in {self.benchmark}',
        'set Cloze.classifier=False',
      )
    negatives = self.pattern.negatives if self.negatives is None else self.negatives
    most = 1 if self.classifier else max(counts, default=1)
    most = min(most, negatives + 1) if negatives else most
    room = (self.length + 1) // most - 1
    configs.check(
      room >= _LEAST,
      f'TASK_FEATURE_LENGTHS must leave each of {most} candidates {_LEAST} tokens',
      str(self.length),
      'raise it, or set Cloze.negatives',
    )
    asker = Asker(config.model, vocabulary, min(room, config.model.max_positions))
    prepared = prepare_cloze.prepare_clozes(
      self.task,
      {
        split: [self._pieces(asker, example, where) for where, example in pairs]
        for split, pairs in learnt.items()
      },
      vocabulary,
      length=self.length,
      negatives=negatives,
      cache_dir=self.corpus.cache_dir,
      corpus=self.corpus.corpus,
      causal=config.model.causal,
      two_positions=not config.model.causal and config.model.two_positions,
    )
    if asker.cut:
      note = f'{asker.cut} examples are longer than {asker.length} tokens and shortened'
      prepared = dataclasses.replace(prepared, notes=(note,))
    data = self.data_of(
      ClozeData,
      config,
      layout,
      prepared,
      benchmark=self.benchmark,
      candidates_loss=kind,
      classifier=self.classifier,
      negatives=negatives,
    )
    data.judged = []
    if not self.classifier:
      most = config.evaluation.examples or None
      data.judged = [
        clozes.item(asker, example, where, asker.mask())
        for where, example in splits['validation'][:most]
        if not example.generated
      ]
    return data

  def _ordered(self, example: Example, where: str) -> Example:
    """The right candidate first, and all wrong ones."""
    if self.classifier:
      return example
    configs.check(
      bool(example.right),
      f'{where}: an example must have a right candidate',
      'none',
      'mend',
    )
    others = [i for i in range(len(example.candidates)) if i not in example.right]
    chosen = [example.candidates[i] for i in (example.right[0], *others)]
    return dataclasses.replace(example, candidates=chosen, right=(0,))

  def _pieces(
    self, asker: Asker, example: Example, where: str
  ) -> list[tuple[np.ndarray, np.ndarray]]:
    """What is read, and each candidate behind it."""
    config, v = asker.config, asker.vocabulary
    ids = clozes.encode(asker, example, where)
    spans, ends, behind = ids.spans(config.causal), ids.ends, []
    if self.classifier:
      # Its number stands where a token would, as what is predicted at the blank.
      spans, ends, behind = [[example.right[0]]], False, ids.behind
    if config.causal:
      context = [*v.prefix, *ids.before, *behind]
    else:
      part_a = [*ids.before, v.control[asker.mask()], *ids.behind]
      context = [*asking.around(v, part_a), v.specials.sop]
    configs.check(
      bool(context),
      f'{where}: a causal model must read something before it fills a blank',
      'none',
      'give a pattern in which text precedes it',
    )
    end = [v.specials.eos if config.causal else v.specials.eop] * ends
    spans = [np.array([*span, *end]) for span in spans]
    read = np.array(context)
    scored = [np.ones(len(span), bool) for span in spans]
    return [(read, np.zeros(len(read), bool)), *zip(spans, scored, strict=True)]

  def leaves(self, config: TrainConfig) -> dict[str, Callable[[jax.Array], Any]]:
    if not self.classifier:
      return {}
    D, std = config.model.hidden_size, config.model.init_std
    # All examples have as many labels: `prepare` looks at them.
    examples = clozes.examples(self._source, self.pattern, 'train')
    labels = max(
      (len(example.candidates) for _, example in itertools.islice(examples, 1)), default=2
    )

    def fresh(key: jax.Array) -> Any:
      pool, out = jax.random.split(key)
      return {
        'pool': {'weight': std * jax.random.normal(pool, (D, D)), 'bias': jnp.zeros(D)},
        'out': {
          'weight': std * jax.random.normal(out, (D, labels)),
          'bias': jnp.zeros(labels),
        },
      }

    return {_CLASSIFIER: fresh}

  def loss(self, config: TrainConfig, model: Any) -> LossFn:
    if self.classifier:
      return classifier_loss(model, self.dropout)
    # Rows are at most as full of candidates as they are long.
    most = max(1, (self.length + 1) // _LEAST)
    return candidates_loss(
      model,
      self.candidates_loss or self.pattern.loss,
      most,
      self.pattern.length_penalty,
      self.loss_config.vocab_chunks,
    )

  def validate(
    self, config: TrainConfig, data: Any, variables: Mapping[str, Any]
  ) -> dict[str, float]:
    """The benchmark's metrics, in percent, over all candidates of what is held out."""
    if not data.judged:
      return {}
    compute = models.ComputeConfig(dtype=config.compute.dtype)
    reader = Reader(config.model, variables, data.vocabulary, compute, data.layout)
    task = clozes.PatternTask(self.pattern)
    rows = -(-config.batch_size // config.microbatches)
    records = running.read(reader, task, data.judged, rows)
    [line] = task.table([*records])
    return {name: float(value) for name, value in line.items() if name != 'examples'}

  def report(self, *_: Any) -> dict[str, Any]:
    return {}


def scores(
  log_probs_BT: jax.Array, batch: Any, most: int, penalty: float = 0.0
) -> tuple[jax.Array, jax.Array]:
  """Scores of the documents of rows, and whether there are so many; [B, most] each.

  Args:
    log_probs_BT: of targets.
    batch: of rows; `loss_weights` say which targets are candidates'.
    most: documents that a row can have.
    penalty: p, sums are divided by the number of tokens ** p.
  """
  t = jnp.arange(batch.tokens.shape[1])
  begins = (batch.key_start == t) & (batch.key_end > 0)
  document = jnp.cumsum(begins, axis=1) - 1
  # A product, where a scatter would gather rows that devices share.
  of = (document[..., None] == jnp.arange(most)).astype(jnp.float32)
  total = lambda x: jnp.einsum('BT,BTN->BN', x * batch.loss_weights, of)
  lengths = total(jnp.ones_like(log_probs_BT))
  return total(log_probs_BT) / jnp.maximum(lengths, 1) ** penalty, lengths > 0


def of_scores(kind: str, scores_BN: jax.Array, there_BN: jax.Array) -> jax.Array:
  """[B] losses of candidates of which the first is right; see `Cloze.candidates_loss`.

  Example:
    >>> scores = jnp.log(jnp.array([[0.5, 0.25, 1.0]]))
    >>> there = jnp.array([[True, True, False]])
    >>> [round(float(of_scores(kind, scores, there)[0]), 4) for kind in _LOSSES]
    [0.4055, 0.3069, 0.6931, 1.0986, -0.6931]
  """
  right = scores_BN[:, 0]
  others = jnp.where(there_BN, scores_BN, -jnp.inf)
  # Of an empty row there is nothing to sum up.
  others = others.at[:, 0].set(right)
  entropy = jax.nn.logsumexp(others, axis=1) - right
  if kind == 'cross_entropy':
    return entropy
  if kind == 'hinge':
    margins = jnp.maximum(0, 1 + scores_BN - right[:, None])
    return jnp.where(there_BN, margins, 0)[:, 1:].sum(1)
  if kind == 'adapet':
    # finetune_glm.py of THUDM/GLM, --adapet: each candidate by itself, up or down.
    return jnp.where(there_BN, scores_BN, 0)[:, 1:].sum(1) - right
  return -right + entropy * (kind == 'mix')


def candidates_loss(
  model: Any, kind: str, most: int, penalty: float = 0.0, chunks: int = 0
) -> LossFn:
  """The loss of rows whose documents are candidates, the first of them right.

  Args:
    model: a Flax module called as `glm_jax.models.glm.GLM`.
    kind: see `of_scores`.
    most: see `scores`.
    penalty: see `scores`.
    chunks: see `LossConfig.vocab_chunks`.
  """

  def loss(variables: Any, batch: Any, key: jax.Array | None, counts: Any = None):
    del counts  # rows are counted
    head = {}
    if chunks:
      of_chunks = lambda x, w: chunked_cross_entropy(x, w, batch.targets, chunks)[0]
      head = {'head': of_chunks}
    result = applied(model, variables, batch, key, **head)
    losses_BT = result if chunks else cross_entropy(result, batch.targets)
    scores_BN, there_BN = scores(-losses_BT, batch, most, penalty)
    rows = there_BN[:, 0]
    losses = jnp.where(rows, of_scores(kind, scores_BN, there_BN), 0)
    return losses.sum(), {'loss': (losses.sum(), rows.sum().astype(jnp.float32))}

  return loss


def classifier_loss(model: Any, dropout: float) -> LossFn:
  """Cross-entropy of labels, each the target of the one place of a row that is scored."""

  def loss(variables: Any, batch: Any, key: jax.Array | None, counts: Any = None):
    del counts
    x_BTD = applied(model, variables, batch, key, head=lambda x_BTD, _: x_BTD)
    at = batch.loss_weights > 0
    label = jnp.where(at, batch.targets, 0).sum(1)
    x_BD = jnp.where(at[..., None], x_BTD, 0).astype(jnp.float32).sum(1)
    logits = classified(variables['params'][_CLASSIFIER], x_BD, dropout, key)
    chosen = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0]
    rows = at.any(1)
    losses = jnp.where(rows, jax.nn.logsumexp(logits, axis=1) - chosen, 0)
    right = 100 * (rows & (chosen >= logits.max(1)))
    count = rows.sum().astype(jnp.float32)
    return losses.sum(), {
      'loss': (losses.sum(), count),
      'accuracy': (right.sum().astype(jnp.float32), count),
    }

  return loss


def classified(
  weights: Any, x_BD: jax.Array, dropout: float = 0.0, key: jax.Array | None = None
) -> jax.Array:
  """[B, labels]: a dense layer, tanh, dropout, and another one (model/downstream.py)."""
  x_BD = jnp.tanh(x_BD @ weights['pool']['weight'] + weights['pool']['bias'])
  if key is not None and dropout:
    kept = jax.random.bernoulli(jax.random.fold_in(key, 1), 1 - dropout, x_BD.shape)
    x_BD = jnp.where(kept, x_BD / (1 - dropout), 0)
  return x_BD @ weights['out']['weight'] + weights['out']['bias']


CONFIGURABLES = (Cloze,)
"""What gin may bind, besides what it may in pretraining."""
