"""The planner's prediction for runs that others measured: how far off is it?

python -m benchmarks.calibration

writes glm_jax/performance/calibration.json, from which every prediction is printed with
its error. The runs are MaxText's, of models of the same shape as ChatGLM2 (grouped heads,
RMSNorm, gated MLP); MFU counts visible pairs alone. Minutes each.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import readme
from glm_jax.planning import topologies

RESULTS = Path(__file__).parent.parent / 'glm_jax' / 'performance' / 'calibration.json'

_SHAPE = dict(head_size=128, max_positions=8192, qkv_bias=False)

# Sizes: MaxText's configs (the 16B and 32B by its `global_parameter_scale`). Measured:
# its READMEs and tpu-recipes; the published figures count masked pairs, too.
RUNS = {
  'v5e': dict(
    run='MaxText 16B',
    setting='v5e-256, 6 x 2,048 tokens a chip, full remat: 61.1% published',
    topology='v5e:16x16',
    model=dict(
      num_layers=32, hidden_size=4096, num_heads=64, num_kv_heads=64, mlp_size=28672
    ),
    vocab_size=32000,
    remat='full',
    rows=6 * 256,
    length=2048,
    mesh=dict(fsdp=256),
    measured=0.592,
  ),
  'v5p': dict(
    # MaxText spreads activations over tensor, too; ours need two micro-batches to fit.
    run='MaxText 32B',
    setting='64 v5p chips, 7 x 2,048 tokens a chip, tensor 4: 71.5% published',
    topology='v5p:4x4x4',
    model=dict(
      num_layers=32, hidden_size=8192, num_heads=64, num_kv_heads=64, mlp_size=28672
    ),
    vocab_size=32000,
    remat='projections',
    rows=7 * 64,
    length=2048,
    mesh=dict(fsdp=16, tensor=4),
    microbatches=2,
    measured=0.703,
  ),
  'v6e': dict(
    # MaxText keeps them in the host's memory; ours takes three micro-batches instead.
    run='MaxText Llama-3.1-8B',
    setting='v6e-8, 3 x 8,192 tokens a chip, q, k, v and out '
    'offloaded: 7,139 tokens/s a chip published',
    topology='v6e:2x4',
    model=dict(
      num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, mlp_size=14336
    ),
    vocab_size=128256,
    remat='attention_qkv',
    rows=3 * 8,
    length=8192,
    mesh=dict(fsdp=8),
    microbatches=3,
    measured=0.404,
  ),
}


def main() -> None:
  # Before JAX is imported, which the modules below do.
  topologies.prepare_environment()
  from glm_jax import sharding
  from glm_jax.models import ChatGLM2Config, ComputeConfig
  from glm_jax.planning import prediction
  from glm_jax.recipes.pretraining import Pretraining
  from glm_jax.training.config import TrainConfig

  results = {}
  for chip, run in RUNS.items():
    config = TrainConfig(
      model=ChatGLM2Config(**run['model'], **_SHAPE, vocab_size=run['vocab_size']),
      compute=ComputeConfig(dtype='bfloat16', remat=run['remat']),
      # Causal as those runs are: every pair of the lower triangle is visible.
      recipe=Pretraining(task='glm_causal', feature_lengths={'tokens': run['length']}),
      batch_size=run['rows'],
      microbatches=run.get('microbatches', 1),
      train_steps=1000,
      model_dir='unset',
      mesh=sharding.MeshConfig(**run['mesh']),
    )
    layout = sharding.make_mesh(config.mesh, topologies.devices(run['topology']))
    result = prediction.predict(config, layout)
    # What does not fit could not have been measured.
    prediction.check_fits(result)
    results[chip] = {
      'measured': run['measured'],
      'predicted': round(result.mfu, 4),
      'run': run['run'],
      'setting': run['setting'],
      'peak_gib': round(result.memory['peak'] / prediction.GIB, 1),
    }
    print(chip, results[chip], flush=True)
  RESULTS.write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
  readme.write_section('calibration', lines(results))


def lines(results: dict[str, dict]) -> list[str]:
  """The table of launch/README.md."""
  rows = [
    f'| {r["run"]}, {r["setting"]} | {r["measured"]:.1%} | {r["predicted"]:.1%} | '
    f'{r["measured"] / r["predicted"]:.2f} |'
    for r in results.values()
  ]
  return [
    '| run | measured MFU, visible pairs | predicted | measured / predicted |',
    '|---|---|---|---|',
    *rows,
    '',
    '(Written by `python -m benchmarks.calibration`.)',
  ]


if __name__ == '__main__':
  main()
