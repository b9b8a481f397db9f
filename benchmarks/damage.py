"""What damage does to checkpoints: every kind of file, damaged in five ways.

python -m benchmarks.damage [--table]

writes two steps of a small run, damages the newest or both, and goes on, generates and
converts. Each time the damage must be found and the step before taken, or named and
refused, or what is read must be equal to what was saved, to the bit. Some minutes.
Results are kept in benchmarks/damage/; --table only writes the table of launch/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from benchmarks import readme
from benchmarks.step import about
from glm_jax import cli, models, opening, sharding
from glm_jax.checkpoints import CheckpointConfig, Checkpoints, damage, slices, verifying
from glm_jax.configs import UserError
from glm_jax.text.vocabulary import ByteVocabulary
from glm_jax.training import resume, state
from glm_jax.training.optimizer import OptimizerConfig, make_optimizer

RESULTS = Path(__file__).parent / 'damage'
KINDS = ('truncated', 'one bit', 'missing', 'empty', 'swapped')
"""What becomes of a file; swapped with that of the other step."""
WHERE = ('newest', 'both')
MODEL = models.GLMConfig(
  num_layers=2, hidden_size=32, num_heads=2, vocab_size=384, max_positions=32
)
OPTIMIZER = make_optimizer(OptimizerConfig(), 100)


class Read(NamedTuple):
  """What was read of a run.

  Attributes:
    step: of which step; None where that is not said.
    arrays: parameters, and the optimizer's state or None.
    said: to a person.
  """

  step: int | None
  arrays: tuple[Any, Any]
  said: str


def layout() -> sharding.Layout:
  """One device."""
  return sharding.make_mesh(sharding.MeshConfig(data=1), jax.devices()[:1])


def write(folder: Path) -> dict[int, tuple[Any, Any]]:
  """Writes a run with the steps 1 and 2; parameters and optimizer of both."""
  current = state.init_state(MODEL, OPTIMIZER, layout(), 0)
  written = Checkpoints(str(folder), CheckpointConfig())
  meta = {
    'model': models.config.to_dict(MODEL),
    'vocabulary': ByteVocabulary().to_dict(),
    'source': None,
  }
  arrays = {}
  for step in (1, 2):
    # Every array is another: moments of a fresh state would be zeros in both.
    current = jax.tree.map(lambda a: a + jnp.asarray(0.5, a.dtype), current)
    current['step'] = jnp.int32(step)
    written.save(current, {**meta, 'step': step}, {'loss': 3.0 - step})
    arrays[step] = jax.tree.map(np.asarray, (current['params'], current['opt_state']))
  written.close()
  return arrays


def classes(step: Path) -> dict[str, Path]:
  """The largest file of each class, by name; data files have random names."""
  made: dict[str, Path] = {}
  for path in sorted(step.rglob('*')):
    if path.is_file():
      name = re.sub('[0-9a-f]{32}', '*', str(path.relative_to(step)))
      if name not in made or path.stat().st_size > made[name].stat().st_size:
        made[name] = path
  return made


def spoil(path: Path, other: bytes, kind: str, rng: np.random.Generator) -> None:
  """Damages a file, in one of `KINDS`; `other` is what it is swapped with."""
  content = path.read_bytes()
  if kind == 'missing':
    path.unlink()
  elif kind == 'one bit':
    changed = bytearray(content)
    changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
    path.write_bytes(changed)
  else:
    new = {'truncated': content[: len(content) // 2], 'empty': b'', 'swapped': other}
    path.write_bytes(new[kind])


def resumed(run: Path) -> Read:
  """As `train` goes on."""
  said: list[str] = []
  abstract = state.abstract_state(MODEL, OPTIMIZER, layout())
  step = resume.chosen(str(run))
  going = resume.restored(str(run), step, abstract, lambda step: None, said.append)
  # What stands in the way of the steps to come is gone, for Orbax, too.
  assert [p.name for p in (run / 'checkpoints').iterdir() if p.name.isdigit()]
  Checkpoints(str(run), CheckpointConfig()).close()
  found = going.state['params'], going.state['opt_state']
  return Read(going.step, jax.tree.map(np.asarray, found), ' '.join(said))


def opened(run: Path) -> Read:
  """As `generate`, `chat`, `evaluate` and `load` open it."""
  source = opening.find(str(run))
  return Read(None, (jax.tree.map(np.asarray, source.read(layout())['params']), None), '')


def converted(run: Path) -> Read:
  """As `convert` and `quantize` stream it."""
  folder = verifying.find(str(run))
  return Read(int(folder.name), (streamed(folder), None), '')


def streamed(folder: Path) -> Any:
  """The parameters of a checkpoint, a leaf at a time."""
  leaves = slices.StoredLeaves(folder)
  flat = {path: leaves.read(path, None) for path in leaves.specs}
  return traverse_util.unflatten_dict(flat)


WAYS: dict[str, Callable[[Path], Read]] = {
  'resume': resumed,
  'generate': opened,
  'convert': converted,
}


def are_equal(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
  """Whether trees of arrays are, to the bit, where there are any."""
  pairs = [(f, w) for f, w in zip(found, wanted, strict=True) if f is not None]
  return all(
    jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), f, w)) for f, w in pairs
  )


def outcomes(
  original: Path,
  arrays: dict[int, tuple[Any, Any]],
  way: str,
  cases: Iterable[tuple[str, str, str]],
  folder: Path,
) -> Iterator[tuple[tuple[str, str, str], str, Read | UserError]]:
  """Each case (class, kind, where) and its outcome.

  Args:
    original: a run of `write`.
    arrays: what that returned.
    way: of `WAYS`.
    cases: of `classes`, `KINDS` and `WHERE`.
    folder: for copies.

  Yields:
    The case; 'equal' (step 2, to the bit), 'before' (step 1), 'refused' or 'wrong'; and
    what was read, or the refusal.
  """
  rng, run = np.random.default_rng(0), folder / 'run'
  for name, kind, where in cases:
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(original, run)
    damage.tell.cache_clear()
    first, second = (classes(run / 'checkpoints' / step) for step in '12')
    contents = [files[name].read_bytes() for files in (first, second)]
    spoil(second[name], contents[0], kind, rng)
    if where == 'both':
      spoil(first[name], contents[1], kind, rng)
    try:
      read = WAYS[way](run)
    except UserError as error:
      yield (name, kind, where), 'refused', error
      continue
    equal = [n for n in (2, 1) if are_equal(read.arrays, arrays[n])]
    right = equal and read.step in (None, equal[0])
    outcome = {2: 'equal', 1: 'before'}[equal[0]] if right else 'wrong'
    yield (name, kind, where), outcome, read


def table(results: dict[str, Any]) -> list[str]:
  """Markdown lines: of each class of files, how its cases ended."""
  rows = ['| file of a step | damaged | the step before | refused | equal | wrong |']
  rows.append('|---|---|---|---|---|---|')
  for name, counts in results['files'].items():
    cells = [counts.get(key, 0) for key in ('before', 'refused', 'equal', 'wrong')]
    rows.append(f'| `{name}` | {sum(cells)} | {" | ".join(map(str, cells))} |')
  return [
    *rows,
    '',
    f'Each file damaged in {len(KINDS)} ways ({", ".join(KINDS)} with the other step), in '
    'the newest step or in both, then resumed, generated from and converted: the step '
    'before was taken, it was refused by name, or what was read is equal to the bit (what '
    'is damaged was not read, or is the same in both steps). '
    f'{results["date"]}.',
  ]


def main(argv: Sequence[str]) -> None:
  """The command."""
  parser = argparse.ArgumentParser(
    prog='python -m benchmarks.damage', description=__doc__.splitlines()[0]
  )
  parser.add_argument('--table', action='store_true', help='only write the table')
  flags = parser.parse_args(argv)
  path = RESULTS / 'results.json'
  if not flags.table:
    with tempfile.TemporaryDirectory() as scratch:
      original = Path(scratch) / 'original'
      arrays = write(original)
      names = classes(original / 'checkpoints' / '2')
      cases = [*itertools.product(names, KINDS, WHERE)]
      files = {name: Counter() for name in names}
      with tqdm(total=len(WAYS) * len(cases), unit='case') as bar:
        for way in WAYS:
          for (name, *_), outcome, _ in outcomes(
            original, arrays, way, cases, Path(scratch)
          ):
            files[name][outcome] += 1
            bar.update()
    results = {'date': about()['date'], 'files': files}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
  lines = table(json.loads(path.read_text(encoding='utf-8')))
  readme.write_section(
    'damage', [*lines, '', '(Written by `python -m benchmarks.damage`.)']
  )


if __name__ == '__main__':
  cli.main(main)
