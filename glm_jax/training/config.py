"""The configuration of a run, which every room may read.

A leaf: it imports the configurations of the other rooms, and nothing that computes.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from glm_jax import configs
from glm_jax.checkpoints import CheckpointConfig
from glm_jax.configs import INT32, POSITIVE, READABLE, SEED, at_least, one_of
from glm_jax.models import ChatGLM2Config, ChatGLMConfig, ComputeConfig, GLMConfig
from glm_jax.sharding import MeshConfig
from glm_jax.training.adapters import LoRAConfig, PTuningConfig
from glm_jax.training.guard import GuardConfig
from glm_jax.training.optimizer import OptimizerConfig
from glm_jax.training.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointModel:
  """The model that a checkpoint holds: its family and sizes stand there.

  Attributes:
    path: of a converted checkpoint, or the MODEL_DIR of a run.
  """

  path: Annotated[str, READABLE]

  def __post_init__(self):
    configs.check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
  """Validation.

  Attributes:
    every: steps between validations; the last step always has one.
    at_start: also before the first step, of the parameters that the run begins with.
    examples: rows of each validation set; 0 for all.
    patience: the run stops after so many validations that did not improve on the best
      `CheckpointConfig.best_metric`, as `best_mode` has it; 0 never does.
    fill: held-out sentences whose blanks are filled at the end; 0 for none, and no count of
      how many blanks are guessed right.
  """

  every: Annotated[int, at_least(1)] = 1000
  at_start: bool = False
  examples: Annotated[int, at_least(0)] = 1024
  patience: Annotated[int, at_least(0)] = 0
  fill: Annotated[int, at_least(0)] = 5

  def __post_init__(self):
    configs.check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """A training run.

  Attributes:
    model: sizes of the model, or `CheckpointModel`: those of a checkpoint.
    compute: the model's dtype, what is computed again, the attention backend.
    recipe: the stage: what is read, what the loss is, what is reported.
    optimizer: the optimizer and the schedule of its rate.
    mesh: how the devices share the work.
    checkpoint: when to save.
    guard: which updates are left out.
    evaluation: when to validate.
    batch_size: rows of the global batch (BATCH_SIZE).
    microbatches: parts of it worked on one after the other.
    train_steps: of the whole run, resumed or not (TRAIN_STEPS); None until the data are
      read, if `train_epochs` says it.
    train_epochs: the same in passes over the rows of all corpora (TRAIN_EPOCHS), to the
      nearest step. With rates of its own, a mixture repeats some rows in one and does not
      reach others: what a run trains on is printed as it starts.
    model_dir: where everything is written (MODEL_DIR).
    seed: of data, initialisation and dropout.
    log_every: steps between progress lines.
    skip_steps: pairs of a first and a last step whose data are read and not trained on,
      such as ((40701, 40900),) where they made the loss explode.
    init_from: a checkpoint whose parameters, and nothing else, a new run begins with;
      '' for fresh ones.
    trained: pattern of the paths of parameters that are trained, matched whole, such as
      'layers/attention/.*' or 'words/weight|.*norm/.*'; '' for all. The others stay as
      `init_from` has them, in its dtype, and checkpoints hold none of them.
    adapters: what is trained beside the parameters of `init_from`; of those, none but what
      `trained` matches. On a quantised checkpoint, LoRA is QLoRA.
    init_adapters: of an `init_from` that holds adapters itself, whether they are trained
      on ('continue') or become part of the weights that the run begins with ('merge').
  """

  model: GLMConfig | ChatGLMConfig | ChatGLM2Config | CheckpointModel
  recipe: Recipe
  compute: ComputeConfig = ComputeConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  guard: GuardConfig = GuardConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  batch_size: Annotated[int, POSITIVE, INT32]
  microbatches: Annotated[int, POSITIVE] = 1
  train_steps: Annotated[int | None, POSITIVE, INT32] = None
  train_epochs: Annotated[float | None, POSITIVE] = None
  model_dir: Annotated[str, READABLE]
  seed: Annotated[int, SEED] = 0
  log_every: Annotated[int, POSITIVE] = 100
  skip_steps: tuple[tuple[int, int], ...] = ()
  init_from: Annotated[str, READABLE] = ''
  trained: str = ''
  adapters: LoRAConfig | PTuningConfig | None = None
  init_adapters: Annotated[str, one_of('', 'continue', 'merge')] = ''

  @property
  def in_part(self) -> bool:
    """Whether some parameters are not trained."""
    return bool(self.trained) or self.adapters is not None

  def skips(self, step: int) -> bool:
    """Whether a step's data are not trained on."""
    return any(first <= step <= last for first, last in self.skip_steps)

  @property
  def pattern(self) -> str | None:
    """Of the model's parameters that are trained: '' for all, None for none."""
    return None if self.adapters is not None and not self.trained else self.trained

  def __post_init__(self):
    configs.check_fields(self)
    configs.check(
      (self.train_steps is None) != (self.train_epochs is None),
      'a run must have TRAIN_STEPS or TRAIN_EPOCHS, and not both',
      f'train_steps={self.train_steps}, train_epochs={self.train_epochs}',
      'give one of them, such as --gin.TRAIN_STEPS=1000',
    )
    configs.check(
      bool(self.model_dir),
      'MODEL_DIR must name a folder',
      "''",
      'set it, such as --gin.MODEL_DIR="\'runs/mine\'"',
    )
    configs.check(
      not self.in_part or bool(self.init_from),
      'TrainConfig.trained and adapters must have a checkpoint that holds the other '
      'parameters',
      f'trained={self.trained!r}, init_from={self.init_from!r}',
      'set TrainConfig.init_from',
    )
    configs.check(
      self.init_adapters != 'continue' or self.adapters is not None,
      "init_adapters='continue' must be of a run with adapters",
      'TrainConfig.adapters=None',
      "set them as init_from has them, or init_adapters='merge'",
    )
    configs.check(
      all(0 < first <= last for first, last in self.skip_steps),
      'TrainConfig.skip_steps must hold pairs of a first and a last step, from 1 on',
      repr(self.skip_steps),
      'write them as ((40701, 40900),)',
    )
    configs.check_pattern('TrainConfig.trained', self.trained)
    self.recipe.check(self)


CONFIGURABLES = (
  TrainConfig,
  GLMConfig,
  ChatGLMConfig,
  ChatGLM2Config,
  CheckpointModel,
  ComputeConfig,
  OptimizerConfig,
  MeshConfig,
  CheckpointConfig,
  GuardConfig,
  EvaluationConfig,
  LoRAConfig,
  PTuningConfig,
)
"""What gin may bind, whatever the recipe."""
