"""How fast is generation, beside transformers' `generate` on the export of the same model?

python -m benchmarks.decode [--only=TEXT] [--table]

A ChatGLM2, random: of 31 M parameters in float32 on a CPU; on the one GPU that JAX sees,
four layers of ChatGLM2-6B in bfloat16. Its checkpoint is exported by `convert --to=glm` and
loaded by transformers in this process. Both generate the same number of tokens from the
same prompts, greedily, in turn. Then the same model as integers, and 64 prompts of unlike
lengths, continuously and in batches that wait for their longest. Needs torch and
transformers (extra peers); no TensorFlow.
Results are kept by device and date in benchmarks/decode/; --table only writes the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import readme
from benchmarks.step import SMALL_CHATGLM2, WIDE_CHATGLM2, about
from glm_jax import cli, sharding, startup
from glm_jax.checkpoints import slices
from glm_jax.inference.engine import Engine
from glm_jax.inference.request import Request, Span
from glm_jax.models import ChatGLM2Config, ComputeConfig, quantized
from glm_jax.models import config as model_config
from glm_jax.training import state

RESULTS = Path(__file__).parent / 'decode'
PROMPT, NEW = 32, 64
INTEGERS = {'int8': 8, 'int4': 4}


def model() -> ChatGLM2Config:
  """What the device that is here generates with."""
  if jax.default_backend() == 'cpu':
    return dataclasses.replace(SMALL_CHATGLM2, max_positions=2048)
  return dataclasses.replace(WIDE_CHATGLM2, num_layers=4, max_positions=2048)


def requests(rows: int, new: Sequence[int] = (NEW,), length: int = PROMPT) -> list[Request]:
  """Prompts of random tokens, each to be gone on with for so many tokens, in turn."""
  rng = np.random.default_rng(0)
  made = []
  for number in range(rows):
    ids = rng.integers(3, model().vocab_size, length).tolist()
    span = Span(first=ids[-1], position=None, stride=1)
    most = new[number % len(new)]
    made.append(Request(number=number, context=ids[:-1], spans=[span], most=most))
  return made


class Ours:
  """The engine, which never meets a stop token."""

  def __init__(self, variables: Any, dtype: str, rows: int):
    self._engine = Engine(
      model(),
      variables,
      stops=[-1],
      allowed=np.ones(model().vocab_size, bool),
      compute=ComputeConfig(dtype=dtype),
      rows=rows,
    )

  def generate(self, asked: Sequence[Request]) -> dict[int, list[int]]:
    """number -> tokens."""
    answers = self._engine.generate(asked, most=max(r.most for r in asked))
    return {answer.number: answer.spans[0] for answer in answers}

  def in_batches(self, asked: Sequence[Request], rows: int) -> None:
    """The same, each batch waiting for its longest."""
    for first in range(0, len(asked), rows):
      self.generate(asked[first : first + rows])


class Transformers:
  """`generate` of GlmForCausalLM, on what `convert` exported."""

  def __init__(self, folder: Path, dtype: str):
    import torch
    from transformers import AutoModelForCausalLM

    self._torch = torch
    gpu = torch.cuda.is_available() and jax.default_backend() == 'gpu'
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    self._model = model.to('cuda' if gpu else 'cpu').eval()

  def generate(self, asked: Sequence[Request]) -> dict[int, list[int]]:
    """number -> tokens; all of one length."""
    torch, new = self._torch, asked[0].most
    ids = torch.tensor([[*r.context, r.spans[0].first] for r in asked])
    ids = ids.to(self._model.device)
    with torch.inference_mode():
      out = self._model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
      )
    said = out[:, ids.shape[1] :].tolist()
    return {r.number: tokens for r, tokens in zip(asked, said, strict=True)}


def bound(params: Any, rounds: int) -> float:
  """Tokens/s that one row cannot exceed: each token is multiplied with all weights.

  Args:
    params: of the model.
    rounds: ten times as many products with a vector, of which the median is taken.
  """
  width = model().hidden_size
  weights = []
  for path, x in slices.flat(params).items():
    if path[-1] == 'weight' and path[0] != 'words':  # a lookup reads a row of these
      layers = x if path[0] == 'layers' else x[None]
      weights += [layer.reshape(-1, width) for layer in layers]
  vectors = [jax.numpy.ones((1, len(w)), w.dtype) for w in weights]
  multiply = jax.jit(lambda pairs: [v @ w for v, w in pairs])
  pairs = [*zip(vectors, weights, strict=True)]
  read = {'weights': lambda: jax.block_until_ready(multiply(pairs))}
  return 1 / statistics.median(timed(read, 10 * rounds)['weights'])


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
  """Seconds of each, in turn; once before, to be compiled."""
  for run in runs.values():
    run()
  seconds: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      began = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - began)
  return seconds


def exported(folder: Path, params: Any, config: Any = None) -> Path:
  """The model as transformers reads it, by way of a checkpoint.

  Args:
    folder: to write to.
    params: of the model.
    config: of it; None for that of `model`.
  """
  leaves = slices.flat(jax.device_get(params))
  specs = {path: slices.LeafSpec(x.shape, x.dtype) for path, x in leaves.items()}
  read = lambda path, layer: leaves[path] if layer is None else leaves[path][layer]
  meta = {
    'model': model_config.to_dict(config or model()),
    'vocabulary': None,
    'source': {},
    'step': 0,
  }
  slices.write(folder / 'checkpoint', specs, read, meta, lambda size: None)
  # In a process of its own, which leaves the accelerator alone.
  command = [sys.executable, '-m', 'glm_jax.convert', f'{folder}/checkpoint']
  subprocess.run([*command, f'{folder}/glm', '--to=glm'], check=True)
  return folder / 'glm'


def measure(rounds: int, only: str) -> list[dict[str, Any]]:
  """Rows of the table: batches of one and eight, kinds of weights, 64 prompts."""
  dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  layout = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  plain = state.init_state(model(), nothing(), layout, 0)['params']
  plain = jax.tree.map(lambda x: x.astype(dtype), plain)
  kinds = {dtype: {'params': plain}}
  kinds |= {name: quantized.of_tree(plain, bits) for name, bits in INTEGERS.items()}
  results = []
  with tempfile.TemporaryDirectory() as folder:
    theirs = Transformers(exported(Path(folder), plain), dtype)
  for rows in (1, 8):
    if only not in f'batch {rows}':
      continue
    asked = requests(rows)
    ours = {name: Ours(v, dtype, rows) for name, v in kinds.items()}
    runs = {name: lambda o=o: o.generate(asked) for name, o in ours.items()}
    runs['transformers'] = lambda: theirs.generate(asked)
    # The same tokens, as long as rounding does not decide; in bfloat16 it does early.
    own, other = runs[dtype](), runs['transformers']()
    same = sum(own[n][:8] == other[n][:8] for n in range(rows))
    if dtype == 'float32' and same < rows:
      raise ValueError(f'other tokens than transformers: {own}, {other}')
    seconds = timed(runs, rounds)
    result = _result(f'batch {rows}', rows * NEW, seconds, 'transformers', dtype)
    if rows == 1:
      result['bound'] = bound(plain, rounds)
    results.append(result | {'rows_with_the_same_first_tokens': same})
  if only in '64 prompts':
    engine, asked = Ours(kinds[dtype], dtype, 8), requests(64, (8, NEW))
    runs = {
      'continuous': lambda: engine.generate(asked),
      'static': lambda: engine.in_batches(asked, 8),
    }
    tokens = sum(r.most for r in asked)
    seconds = timed(runs, rounds)
    results.append(_result('64 prompts, 8 rows', tokens, seconds, 'static', dtype))
  return results


def _result(case, tokens, seconds, peer, dtype) -> dict[str, Any]:
  speeds = {name: tokens / statistics.median(t) for name, t in seconds.items()}
  ratios = {
    name: [theirs / own for theirs, own in zip(seconds[peer], t, strict=True)]
    for name, t in seconds.items()
    if name != peer
  }
  return {
    'case': case,
    'dtype': dtype,
    'tokens': tokens,
    'peer': peer,
    'tokens_per_second': speeds,
    'ratios': ratios,
  }


def nothing() -> Any:
  """An optimizer without a state."""
  import optax

  return optax.identity()


def table(results: dict[str, Any]) -> list[str]:
  """Markdown lines of a device's results."""
  lines = [
    f'{results["device"]}, {results["date"]}; jax {results["jax"]}, transformers '
    f'{results["transformers"]}; {results["model"]}; {PROMPT} tokens of prompt, {NEW} new; '
    'medians, and the least and the largest ratio of the rounds:',
    '',
    '| case | ours | tokens/s | beside | tokens/s | ratio |',
    '|---|---|---|---|---|---|',
  ]
  note = ''
  for row in results['rows']:
    for name, ratios in row['ratios'].items():
      speed, peer = row['tokens_per_second'], row['peer']
      lines.append(
        f'| {row["case"]} | {name} | {speed[name]:,.0f} | {peer} | {speed[peer]:,.0f} | '
        f'**{statistics.median(ratios):.2f}** ({min(ratios):.2f}–{max(ratios):.2f}) |'
      )
    if 'bound' in row:
      note = (
        f'Products of all {row["dtype"]} weights with a vector, and nothing else, would be '
        f'{row["bound"]:,.0f} tokens/s at batch 1.'
      )
  return [*lines, '', note] if note else lines


def write_tables() -> None:
  """The section of benchmarks/README.md, from the newest results of each device."""
  readme.write_results('decode', RESULTS, table, 'benchmarks.decode')


def main(argv: Sequence[str]) -> None:
  """The command."""
  flags = argparse.ArgumentParser(
    prog='python -m benchmarks.decode', description=__doc__.splitlines()[0]
  )
  flags.add_argument('--only', default='', metavar='TEXT', help='cases with it in the name')
  flags.add_argument('--rounds', type=int, default=5, help='turns of each contender')
  flags.add_argument('--folder', type=Path, default=RESULTS, help='of the results')
  flags.add_argument('--table', action='store_true', help='only write the tables')
  flags = flags.parse_args(argv)
  if flags.table:
    return write_tables()
  import transformers

  results = {
    **about(),
    'transformers': transformers.__version__,
    'model': f'ChatGLM2, {model().num_layers} layers of width {model().hidden_size}',
    'rows': measure(flags.rounds, flags.only),
  }
  path = readme.path_of(flags.folder, results)
  path.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
  print('\n'.join(table(results)))
  if flags.folder == RESULTS:
    write_tables()


if __name__ == '__main__':
  startup.keep_memory()
  cli.main(main)
