"""The configuration of a run, which every room may read.

A leaf: it imports the configurations of the other rooms, and nothing that computes.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from glm_jax import configs
from glm_jax.checkpoints import CheckpointConfig
from glm_jax.configs import POSITIVE, at_least
from glm_jax.data.corpora.config import CorpusConfig, VocabularyConfig
from glm_jax.data.examples.objective_config import ObjectiveConfig
from glm_jax.data.stream.mixing import MixtureConfig
from glm_jax.models import ChatGLM2Config, ChatGLMConfig, GLMConfig
from glm_jax.models.config import Compute
from glm_jax.sharding import MeshConfig
from glm_jax.training.losses import LossConfig
from glm_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointModel(Compute):
  """The model that a checkpoint holds: its family and sizes stand there.

  Attributes:
    path: of a converted checkpoint, or the MODEL_DIR of a run.
  """

  path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
  """Validation of each objective that is trained on.

  Attributes:
    every: steps between validations; the last step always has one.
    examples: rows of the validation split, for each objective; 0 for all.
    objectives: what is validated, on masks of its own; None for what is trained on. Runs
      that train on different objectives are compared on one.
    fill: held-out sentences whose blanks are filled at the end; 0 for none.
  """

  every: Annotated[int, at_least(1)] = 1000
  examples: Annotated[int, at_least(0)] = 1024
  objectives: ObjectiveConfig | None = None
  fill: Annotated[int, at_least(0)] = 5

  def __post_init__(self):
    configs.check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """A training run.

  Attributes:
    model: sizes and computation of the model, or `CheckpointModel`: those of a checkpoint.
    corpus: the text.
    mixture: several corpora, by rate.
    vocabulary: how it becomes tokens.
    objectives: how tokens become examples.
    optimizer: and its schedule.
    loss: how it is computed.
    mesh: of the devices.
    checkpoint: when to save.
    evaluation: when to validate.
    task: a registered seqio task or mixture (MIXTURE_OR_TASK_NAME).
    feature_lengths: {'tokens': positions of a row} (TASK_FEATURE_LENGTHS).
    batch_size: rows of the global batch (BATCH_SIZE).
    microbatches: parts of it worked on one after the other.
    train_steps: of the whole run, resumed or not (TRAIN_STEPS).
    model_dir: where everything is written (MODEL_DIR).
    seed: of data, initialisation and dropout.
    log_every: steps between progress lines.
    init_from: a checkpoint whose parameters, and nothing else, a new run begins with;
      '' for fresh ones.
  """

  model: GLMConfig | ChatGLMConfig | ChatGLM2Config | CheckpointModel
  corpus: CorpusConfig = CorpusConfig()
  mixture: MixtureConfig = MixtureConfig()
  vocabulary: VocabularyConfig = VocabularyConfig()
  objectives: ObjectiveConfig = ObjectiveConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  loss: LossConfig = LossConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  task: str
  feature_lengths: dict[str, int]
  batch_size: Annotated[int, POSITIVE]
  microbatches: Annotated[int, POSITIVE] = 1
  train_steps: Annotated[int, POSITIVE]
  model_dir: str
  seed: int = 0
  log_every: Annotated[int, POSITIVE] = 100
  init_from: str = ''

  def __post_init__(self):
    configs.check_fields(self)
    configs.check(
      set(self.feature_lengths) == {'tokens'},
      "TASK_FEATURE_LENGTHS must have the one key 'tokens'",
      str(self.feature_lengths),
      "write {'tokens': 512}",
    )
    configs.check(
      bool(self.model_dir),
      'MODEL_DIR must name a folder',
      "''",
      'set it, such as --gin.MODEL_DIR="\'runs/mine\'"',
    )
    # What two configurations must agree in is checked by the one that holds both.
    self.objectives.check_steps(self.train_steps)

  @property
  def length(self) -> int:
    """L, positions of a row."""
    return self.feature_lengths['tokens']


CONFIGURABLES = (
  TrainConfig,
  GLMConfig,
  ChatGLMConfig,
  ChatGLM2Config,
  CheckpointModel,
  CorpusConfig,
  MixtureConfig,
  VocabularyConfig,
  ObjectiveConfig,
  OptimizerConfig,
  LossConfig,
  MeshConfig,
  CheckpointConfig,
  EvaluationConfig,
)
"""What gin may bind."""
