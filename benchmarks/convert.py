"""A full-size ChatGLM2-6B, in and out: memory and speed, beside `cp` of the same bytes.

python -m benchmarks.convert [--folder=DIR] [--repeats=2] [--layers=28]

Needs 45 GB of disk and about 15 minutes. Random weights in the released layout (float16,
7 shards) become a checkpoint and come back in the layout of transformers and in their
own, tensor by tensor the same; `cp` copies the same files before each. All end with
`sync`, so that what is measured is on the disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.readme import ROOT, write_section
from glm_jax import cli
from glm_jax.interop import files, formats, hub
from glm_jax.models import ChatGLM2Config
from glm_jax.recipes import CONFIGURABLES

RESULTS = ROOT / 'benchmarks' / 'convert' / 'results.json'
GIN_FILE = 'gin_configs/models/chatglm2_6b.gin'


def write_source(folder: Path, config: ChatGLM2Config, shards: int = 7) -> None:
  """A checkpoint of random weights as the released one is laid out."""
  from safetensors.numpy import save_file

  folder.mkdir()
  rng = np.random.default_rng(0)
  entries = formats.chatglm2(config, 1)
  # 16 M random numbers, used again and again: drawing 6.2 G would take minutes.
  noise = rng.normal(0, 0.02, 2**24).astype(np.float16)
  weight_map: dict[str, str] = {}
  per_shard = -(-len(entries) // shards)
  for number in range(shards):
    name = f'model-{number + 1:05}-of-{shards:05}.safetensors'
    group = entries[number * per_shard : (number + 1) * per_shard]
    tensors = {}
    for i, entry in enumerate(group):
      # Rolled by another amount each, so that no two tensors are equal.
      size = int(np.prod(entry.shape))
      tensors[entry.name] = np.resize(np.roll(noise, 977 * i), size).reshape(entry.shape)
    save_file(tensors, folder / name, metadata={'format': 'pt'})
    weight_map |= dict.fromkeys(tensors, name)
  index = json.dumps({'metadata': {}, 'weight_map': weight_map})
  (folder / files.INDICES[0]).write_text(index, encoding='utf-8')
  content = hub.config_json('chatglm2', config, {})
  (folder / 'config.json').write_text(json.dumps(content), encoding='utf-8')


def timed(*command: Any) -> tuple[float, float]:
  """Seconds and peak resident memory in GB of a process, with a `sync` at its end."""
  # What was written before must not be counted.
  os.sync()
  began = time.perf_counter()
  process = subprocess.Popen(
    [str(part) for part in command], cwd=ROOT, stdout=subprocess.DEVNULL
  )
  # wait4 gives the usage of this child alone.
  _, status, usage = os.wait4(process.pid, 0)
  os.sync()
  if status:
    raise SystemExit(f'{command} failed')
  return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


def same(a: Path, b: Path) -> bool:
  """Whether two checkpoints hold the same tensors, bit for bit."""
  first, second = (files.open_source(folder).parts[0] for folder in (a, b))
  # Rotary frequencies are written in exports, and are not weights.
  names = {name for name in first.specs if not name.endswith('inv_freq')}
  if names != {name for name in second.specs if not name.endswith('inv_freq')}:
    return False
  return all(
    # As bits: NaN would differ from itself.
    np.array_equal(*(part.read(name).view(np.uint16) for part in (first, second)))
    for name in sorted(names)
  )


def elsewhere(function: Any, *arguments: Any) -> Any:
  """A function's result from a process of its own.

  A child's peak memory counts that of its parent when it began, so that this process
  must stay small.
  """
  with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
    return pool.submit(function, *arguments).result()


def measure(folder: Path, config: ChatGLM2Config, repeats: int) -> dict[str, Any]:
  """Both directions against `cp`, in turn."""
  source, checkpoint, out = folder / 'source', folder / 'checkpoint', folder / 'out'
  elsewhere(write_source, source, config)
  size = sum(path.stat().st_size for path in source.rglob('*')) / 1e9
  convert = (sys.executable, '-m', 'glm_jax.convert')
  rows: dict[str, list[list[float]]] = {'in': [], 'out': [], 'out --to=glm': []}

  def pair(kind: str, before: Path, after: Path, *flags: str) -> None:
    copy = folder / 'copy'
    seconds, _ = timed('cp', '-r', before, copy)
    # The disk needs room for one result at a time.
    shutil.rmtree(copy)
    shutil.rmtree(after, ignore_errors=True)
    ours, memory = timed(*convert, before, after, *flags)
    rows[kind].append([ours, seconds, memory])
    print(
      f'{kind}: {ours:.1f} s ({size * 1000 / ours:.0f} MB/s), cp {seconds:.1f} s, '
      f'ratio {seconds / ours:.2f}, peak {memory:.2f} GB',
      flush=True,
    )

  for _ in range(repeats):
    pair('in', source, checkpoint)
    pair('out', checkpoint, out, '--to=chatglm2')
    equal = elsewhere(same, source, out)
    print(f'the tensors are the same: {equal}', flush=True)
    pair('out --to=glm', checkpoint, out, '--to=glm')
  largest = 2 * config.num_layers * config.hidden_size * config.mlp_size / 1e9
  return {'gigabytes': size, 'rows': rows, 'equal': equal, 'largest_tensor': largest}


def report(results: dict[str, Any]) -> None:
  """The README's table."""
  size = results['gigabytes']
  lines = [
    "| ChatGLM2-6B, float16 | seconds | MB/s | of `cp`'s speed | peak memory |",
    '|---|---|---|---|---|',
  ]
  for kind, runs in results['rows'].items():
    ours, copy, memory = np.median(np.array(runs), axis=0)
    lines.append(
      f'| {kind} | {ours:.0f} | {1000 * size / ours:.0f} | {copy / ours:.2f} | '
      f'{memory:.2f} GB |'
    )
  write_section(
    'convert',
    [
      *lines,
      '',
      f'{size:.1f} GB of random weights, medians of {len(runs)}; the way in and back gave '
      f'{"the same bytes" if results["equal"] else "OTHER BYTES"}. '
      '(Written by `python -m benchmarks.convert`.)',
    ],
  )


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = argparse.ArgumentParser(description=__doc__, prog='python -m benchmarks.convert')
  flags.add_argument('--folder', default=None, help='where there are 45 GB of disk')
  flags.add_argument('--repeats', type=int, default=2)
  flags.add_argument('--layers', type=int, default=28, help='fewer, to try it')
  chosen = flags.parse_args(argv)
  config, _ = cli.load_config(
    ChatGLM2Config,
    CONFIGURABLES,
    [GIN_FILE],
    '',
    [f'ChatGLM2Config.num_layers={chosen.layers}'],
  )
  with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
    results = measure(Path(folder), config, chosen.repeats)
  # A model of fewer layers is a trial, whose numbers are not kept.
  if chosen.layers == 28:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
    report(results)


if __name__ == '__main__':
  cli.main(main)
