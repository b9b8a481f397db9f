"""What a stage of training answers: what is read, what the loss is, what is reported.

`train`, `plan`, `preview` and `tune` ask a recipe and name no stage. Most answers have
defaults: a simple recipe gives `length`, `prepare` and `loss`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from glm_jax import configs, sharding
from glm_jax.batch import DTYPES, Batch, Visibility
from glm_jax.performance import flops
from glm_jax.training import adapters, state
from glm_jax.training.losses import LossFn

if TYPE_CHECKING:
  from glm_jax.training.config import TrainConfig

# In tokens; a row of so many fits no device.
_LONGEST = 2**20

REFERENCE = 'reference'
"""Among the collections that a loss is given: those of what the run began with."""


class Work(NamedTuple):
  """What one update is made of.

  Attributes:
    batch: on the mesh.
    tokens: of all processes, without padding.
    flops: of all processes, as `performance.flops.training` counts them.
  """

  batch: Any
  tokens: float
  flops: float


class Between(NamedTuple):
  """What a stage computes between updates, and keeps, on the mesh of its step.

  Attributes:
    rows: shapes and dtypes of what is read, forward alone, at a time.
    score: (model, variables, rows) -> what is asked of them; a Flax module, and the
      collections that a loss is given.
    asked: answers that are generated one after the other.
    at_a_time: most of them at a time.
    context: most tokens that an answer follows.
    most: tokens of an answer.
    slots: of a row's cache.
    temperature: of sampling.
    kept: shapes and dtypes of rows that stay from one update to the next.
    others: configurations of other frozen models that stay, float32.
  """

  rows: Batch
  score: Callable[..., Any]
  asked: int
  at_a_time: int
  context: int
  most: int
  slots: int
  temperature: float
  kept: Any
  others: tuple[Any, ...]


class WorkStream:
  """Asked with the state before each update; answers with `Work`.

  Attributes:
    kept: a tree of arrays on the mesh that the stream needs from one step to the next, such
      as rollouts that several updates learn from. Checkpoints hold them, and a resumed run
      sets them again, on whatever mesh it has; None for a function of the step.
    variables: set before the first step: state -> the collections of the model, the
      reference's among them, for what is computed with the weights as they stand.
    place: what each process keeps by itself, with `save(prefix)` and `restore(prefix)`, as
      an iterator of TensorFlow does: as many processes go on from it. None for nothing.
  """

  kept: Any = None
  place: Any = None
  variables: Callable[[Any], dict[str, Any]] | None = None

  def __call__(self, current: Any) -> Work:
    raise NotImplementedError


class Data:
  """What a recipe has prepared for a run.

  Attributes:
    vocabulary: of the tokens; see `glm_jax.text.vocabulary`.
    fingerprint: tells one set of training examples from another; processes compare it.
    identity: what must stay equal for a resumed run to be the same run.
    validation: name -> the batches of a held-out set, numpy, this process's rows.
    rows: of an epoch of training, all corpora together; None where nobody counts them.
    validated_rows: corpus -> rows of each validation set, in which the corpora of a
      mixture stand one behind the other, `Batch.index` counting them from 0; {} for one
      corpus without a name.
    skipped: documents too short to be read.
    decided: what was found for the user, and must stay as it is in a run that goes on; see
      `checkpoints.folder.decided`.
  """

  vocabulary: Any
  fingerprint: str
  identity: Mapping[str, Any]
  validation: Mapping[str, Callable[[], Iterator[Batch]]]
  rows: int | None = None
  validated_rows: Mapping[str, int] = MappingProxyType({})
  skipped: int = 0
  decided: Mapping[str, Any] = MappingProxyType({})

  def stream(self, step: int) -> WorkStream:
    """The stream, from a step on."""
    raise NotImplementedError

  def describe(self, step: int, train_steps: int) -> list[str]:
    """Lines that say what is trained on from a step on, for the leader."""
    del step, train_steps
    return []

  def examples(self) -> Iterator[Mapping[str, np.ndarray]]:
    """Batches for a person to look at: fields of the contract, and what else is known."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """A stage of training; its fields are what gin binds.

  A recipe of one's own is a subclass in a module named by `--import`, which lists it in
  `CONFIGURABLES`.
  """

  @property
  def length(self) -> int:
    """T, positions of a row."""
    raise NotImplementedError

  def prepare(self, config: TrainConfig, vocabulary: Any, layout: sharding.Layout) -> Data:
    """Makes, or finds, what is read. The leader is called first, the others find caches.

    Args:
      config: of the run, its model resolved.
      vocabulary: of the checkpoint that the model comes from, or None.
      layout: of the devices.
    """
    raise NotImplementedError

  def loss(self, config: TrainConfig, model: Any) -> LossFn:
    """The loss of a Flax module of the run's model; see `losses.LossFn`."""
    raise NotImplementedError

  def check(self, config: TrainConfig) -> None:
    """Raises UserError for a run that cannot be; called as the configuration is made."""
    del config

  def check_data(self, config: TrainConfig, data: Data) -> None:
    """Raises UserError for data that does not fit the run; all processes call it."""
    del config, data

  def counts(self, batch: Any) -> dict[str, jax.Array]:
    """Sums over a whole batch that a loss divides by, before micro-batches cut it.

    The loss is given them with each part, so that terms that count tokens and terms that
    count pairs add up alike however the batch is cut.
    """
    del batch
    return {}

  def batch(self, config: TrainConfig) -> Any:
    """Shapes and dtypes of a global batch, [B, T] each."""
    shape = (config.batch_size, self.length)
    rows = lambda dtype: jax.ShapeDtypeStruct(shape, dtype)
    # Without `index`, which stays on the host.
    return Batch(*map(rows, DTYPES))._replace(index=None)

  def visibility(self, config: TrainConfig) -> Visibility:
    """[1, T]: what an average row sees, by which a plan counts FLOPs."""
    del config
    t = np.arange(self.length, dtype=np.int32)
    return Visibility(np.zeros_like(t)[None], (t + 1)[None])

  def rows_in_words(self, config: TrainConfig) -> str:
    """The same for a person."""
    del config
    return ''

  @property
  def logits_share(self) -> float:
    """Share of the logits [B, T, V] that exists at a time."""
    return 1.0

  @property
  def has_vocabulary(self) -> bool:
    """Whether the recipe says which vocabulary, though the model's checkpoint has one."""
    return False

  def leaves(self, config: TrainConfig) -> dict[str, Callable[[jax.Array], Any]]:
    """Parameters that are not the model's: name -> key -> tree, boxed or plain arrays."""
    del config
    return {}

  @property
  def reference(self) -> bool:
    """Whether the loss is given `variables[REFERENCE]`, the collections as the run began.

    What is not trained is there once; of what is trained, adapters too, a copy is kept in
    the dtype of the computation. A run that goes on reads it from `init_from` again.
    """
    return False

  def programs(self, config: TrainConfig) -> Between | None:
    """What is compiled besides the step and has to fit beside its state, if anything is."""
    del config
    return None

  def work(self, config: TrainConfig, visibility: Visibility) -> tuple[float, float]:
    """Tokens and FLOPs of rows, of numpy: of a batch, or of an average row for a plan."""
    # Padding has the empty interval [0, 0).
    start, end = map(np.asarray, visibility)
    tokens = float((end > start).sum())
    frozen = state.frozen_weights(config.model, config.pattern)
    beside = adapters.weights(config.adapters, config.model)
    # Every token sees its document's virtual tokens, too.
    pairs = flops.pairs(visibility) + tokens * adapters.virtual_tokens(config.adapters)
    return tokens, flops.training(config.model, tokens, pairs, frozen, beside)

  def fixed_validation(self) -> list[str]:
    """gin bindings that keep what is validated out of a search of `tune`."""
    return []

  def told(self, values: Mapping[str, float]) -> dict[str, float]:
    """What is written and printed of means of the loss's metrics, by name.

    For what no mean over batches is, such as a correlation, of which a loss sums up the
    moments: they are replaced here, once the sums are whole.

    Args:
      values: means over a validation, over a corpus of it, or since the last progress
        line; without those that nothing was counted for.
    """
    return dict(values)

  def validate(
    self, config: TrainConfig, data: Data, variables: Mapping[str, Any]
  ) -> dict[str, float]:
    """What is measured beside the losses at each validation: name -> number.

    All processes call it, and must compute the same with the model's collections
    (`params`, and more with adapters or integers), which are on the mesh. A metric whose
    largest value is best is `best_metric` with `CheckpointConfig.best_mode='max'`.
    """
    del config, data, variables
    return {}

  def report(
    self,
    config: TrainConfig,
    data: Data,
    variables: Mapping[str, Any],
    validated: Mapping[str, float],
    say: Callable[..., None],
  ) -> dict[str, Any]:
    """Prints what a person wants to see at the end.

    All processes call it, and must compute the same with what is on the mesh.

    Args:
      config: of the run.
      data: of `prepare`.
      variables: the model's collections, on the mesh.
      validated: the last validation; on the leader alone.
      say: prints, on the leader.

    Returns:
      What summary.json holds of it; under 'lines', levels to draw beside the loss.
    """
    del config, data, variables, validated, say
    return {}


def check_lengths(feature_lengths: Mapping[str, int]) -> None:
  """Raises UserError unless rows are of one length, and one that rows can have."""
  configs.check(
    set(feature_lengths) == {'tokens'} and feature_lengths['tokens'] <= _LONGEST,
    f"TASK_FEATURE_LENGTHS must have the one key 'tokens', of {_LONGEST} or less",
    str(feature_lengths),
    "write {'tokens': 512}",
  )
