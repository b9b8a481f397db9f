"""python tests/rollouts_peer.py FOLDER: what `benchmarks.rollouts.answers` measures, tiny.

A process of its own, as the command is: transformers and PyTorch need not share one with
TensorFlow, which other tests of a worker have loaded.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax

from benchmarks import decode, rollouts
from glm_jax import sharding
from glm_jax.training import state

MODEL = dataclasses.replace(
  rollouts.MODEL,
  num_layers=2,
  hidden_size=64,
  num_heads=2,
  num_kv_heads=1,
  head_size=32,
  mlp_size=64,
  vocab_size=512,
)
SIZES = dict(count=6, asked=(2, 5), answered=(2, 4), sizes=(2, 4), rounds=2)

if __name__ == '__main__':
  layout = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  params = state.init_state(MODEL, decode.nothing(), layout, 0)['params']
  folder = decode.exported(Path(sys.argv[1]), params, MODEL)
  print(json.dumps(rollouts.answers(MODEL, params, folder, **SIZES)))
