"""Small runs of `train`, as a command or in the process of the tests."""

import jax
import numpy as np
import orbax.checkpoint as ocp
from commands import ROOT, gin, start

from glm_jax import checkpoints

STEPS = 12
SMALL = [
  "VocabularyConfig.path='bytes'",
  'GLMConfig.num_layers=2',
  'GLMConfig.hidden_size=64',
  'GLMConfig.num_heads=2',
  'GLMConfig.vocab_size=384',
  'GLMConfig.max_positions=64',
  "TASK_FEATURE_LENGTHS={'tokens':64}",
  f'TRAIN_STEPS={STEPS}',
  'BATCH_SIZE=8',
  'EvaluationConfig.examples=8',
  'EvaluationConfig.every=6',
  'EvaluationConfig.fill=1',
  'OptimizerConfig.warmup_steps=1',
  'TrainConfig.microbatches=2',
  'CheckpointConfig.every=2',
  'TrainConfig.log_every=1',
  'GLMConfig.output_dropout=0.1',
  'GLMConfig.attention_dropout=0.1',
  'GLMConfig.embedding_dropout=0.1',
]


def write_words(folder, count):
  """Documents of random words, the same each time."""
  rng = np.random.default_rng(0)
  for number in range(count):
    words = [bytes(rng.integers(97, 123, rng.integers(2, 7))).decode() for _ in range(30)]
    (folder / f'{number:02}.txt').write_text(' '.join(words) + '. ')


def arguments(text, run, *bindings):
  """Of a run in `run` over the files in `text`; with dropout and validation."""
  places = [
    f"MODEL_DIR='{run}'",
    f"CorpusConfig.corpus='{text}/*.txt'",
    f"CorpusConfig.cache_dir='{run}-cache'",
  ]
  return [
    '--gin_file=gin_configs/glm_tiny.gin',
    *gin(*SMALL, *places, *bindings),
  ]


def begin(text, run, *bindings, flags=(), imports=ROOT / 'tests', **more):
  """The run as a process that has only been started; `imports` is on its path."""
  return start(
    'train',
    *flags,
    *arguments(text, run, *bindings),
    PYTHONPATH=f'{ROOT}:{imports}',
    PYTHONUNBUFFERED='1',
    **more,
  )


def finish(process, seconds=300):
  """What a run that ended well has said."""
  output, _ = process.communicate(timeout=seconds)
  assert process.returncode == 0, output
  return output


def params(run):
  """Parameters and optimizer of the last checkpoint, whoever wrote it."""
  folder = checkpoints.find(str(run))
  assert folder.name == str(STEPS)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  with ocp.StandardCheckpointer() as reader:

    def read(item):
      found = reader.metadata(folder / item).item_metadata.tree
      target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), found
      )
      return reader.restore(folder / item, target)

    return jax.tree.map(np.asarray, [read('params'), read('optimizer')])
