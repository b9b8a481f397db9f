"""A prediction as a table for a person."""

from __future__ import annotations

from glm_jax.performance.chips import CHIPS, calibrations
from glm_jax.planning.prediction import GIB, Prediction
from glm_jax.training.config import TrainConfig


def render(result: Prediction, config: TrainConfig, where: str) -> str:
  """The table, one fact a line.

  Args:
    result: the prediction for the configuration.
    config: of the run.
    where: the topology, in words.
  """
  rows: list[tuple[str, str]] = [
    ('topology', f'{where}: {result.devices} x {result.device_kind}'),
    ('parameters', _parameters(result)),
    ('mesh', ' x '.join(f'{k} {v}' for k, v in result.mesh.items() if v > 1) or 'one'),
    ('batch', _batch(result, config)),
    ('remat, dtype', f'{config.compute.remat}, {config.compute.dtype}'),
    ('attention', '{} ({})'.format(*result.attention)),
    *_memory(result),
    ('model FLOPs', _flops(result, config)),
    *_time(result),
    _effort(result),
  ]
  width = max(len(name) for name, _ in rows)
  return '\n'.join(f'{name:<{width}}  {value}' for name, value in rows)


def _parameters(result: Prediction) -> str:
  if result.trained == result.parameters:
    return f'{result.parameters:,}'
  return f'{result.parameters:,}, of which {result.trained:,} are trained'


def _batch(result: Prediction, config: TrainConfig) -> str:
  length = config.recipe.length
  text = f'{result.rows} rows of {length:,}, {result.rows / result.devices:g} a device'
  if config.microbatches > 1:
    text += f', in {config.microbatches} micro-batches'
  return text


def _effort(result: Prediction) -> tuple[str, str]:
  seconds = f'{result.compile_seconds:.0f} s'
  if result.compiled:
    return 'compiled in', f'{seconds}; fingerprint {result.fingerprint}'
  return (
    'from shapes in',
    f'{seconds}; what has a ~ is an estimate, --compile tells exactly',
  )


_BOUND = 'the FLOPs at their peak, or the state read and written'

# The kinds of `shapes.memory`, for a person.
_EXACT = {
  'parameters': 'parameters',
  'frozen': 'parameters not trained',
  'optimizer': 'optimizer',
  'copies': 'copies to compute with',
  'gradients': 'gradients',
}


def _from_shapes(result: Prediction) -> list[tuple[str, str]]:
  m = {kind: size / GIB for kind, size in result.memory.items()}
  exact = [f'{words} {m[kind]:.2f}' for kind, words in _EXACT.items() if kind in m]
  text = f'~{m["peak"]:.2f} GiB'
  if m['limit']:
    over = m['peak'] - m['limit']
    fits = f'headroom ~{-over / m["limit"]:.0%}'
    if not result.fits:
      fits = f'does not fit, ~{over:.2f} too many'
    text = f'~{m["peak"]:.2f} of {m["limit"]:.2f} GiB, {fits}'
  rows = [
    ('HBM a device', text),
    ('of which', ', '.join(exact) + f'; activations ~{m["activations"]:.2f}'),
  ]
  if result.devices == 1:
    cards = [
      k for k, c in CHIPS.items() if not c.clock_hz and c.hbm_bytes >= m['peak'] * GIB
    ]
    rows.append(
      ('GPUs that hold it', ', '.join(cards) or 'none of one: spread it, with fsdp')
    )
  return rows


def _of_jax(result: Prediction) -> list[tuple[str, str]]:
  """What keeps a step that fits from running all the same."""
  m, chip = result.memory, result.chip
  if not chip or chip.clock_hz or not result.fits or m['peak'] <= _JAX_TAKES * m['limit']:
    return []
  text = (
    f'JAX takes {_JAX_TAKES:.0%} of a GPU: XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 for more'
  )
  return [('to run it', text)]


# Unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
_JAX_TAKES = 0.75


def _memory(result: Prediction) -> list[tuple[str, str]]:
  return [*_of_step(result), *_programs(result), *_of_jax(result)]


def _programs(result: Prediction) -> list[tuple[str, str]]:
  """Each program of a stage that has several, with what stays there beside it."""
  if not result.programs:
    return []
  about = '' if result.compiled else '~'
  peaks = ', '.join(f'{k} {about}{v / GIB:.2f}' for k, v in result.programs.items())
  resident = result.memory['resident'] / GIB
  return [('of programs', f'{peaks} GiB; {resident:.2f} of them whichever runs')]


def _of_step(result: Prediction) -> list[tuple[str, str]]:
  if not result.compiled:
    return _from_shapes(result)
  m = result.memory
  if not result.fits:
    over = (m['peak'] - m['limit']) / GIB
    return [
      (
        'HBM a device',
        f'does not fit: {m["peak"] / GIB:.2f} of {m["limit"] / GIB:.2f} GiB, '
        f'{over:.2f} too many',
      )
    ]
  text = f'arguments {m["arguments"] / GIB:.2f}, temporaries {m["temporaries"] / GIB:.2f}'
  text += f', peak {m["peak"] / GIB:.2f}'
  if m['limit']:
    text += f' of {m["limit"] / GIB:.2f} GiB, headroom {1 - m["peak"] / m["limit"]:.0%}'
  else:
    text += ' GiB'
  return [('HBM a device', text)]


def _flops(result: Prediction, config: TrainConfig) -> str:
  text = f'{result.model_flops:.4g} a step, visible pairs only'
  words = config.recipe.rows_in_words(config)
  return f'{text} ({words})' if words else text


def _time(result: Prediction) -> list[tuple[str, str]]:
  e, chip = result.estimate, result.chip
  if chip and not result.compiled:
    return [('step', f'~{result.least_seconds:.3f} s or more: {_BOUND}')]
  if e is None or chip is None:
    return []
  kind = 'step, predicted' if chip.clock_hz else 'step, roofline'
  rows = [
    (
      kind,
      f'{e.step_seconds:.3f} s: TensorCore {e.tensorcore_seconds:.3f}, attention '
      f'{e.attention_seconds:.3f}, exposed collectives '
      f'{e.exposed_collective_seconds:.3f}',
    ),
    ('speed', f'{result.tokens_per_second:,.0f} tokens/s a chip, MFU {result.mfu:.1%}'),
  ]
  # The error of the method, where it could be checked; it is printed with every number.
  factors = [factor for factor, _ in calibrations().values()]
  error = f'public runs were {min(factors) - 1:+.0%} to {max(factors) - 1:+.0%} off'
  if chip.calibration:
    factor, run = chip.calibration
    rows.append(
      (
        'calibrated',
        f'{result.tokens_per_second * factor:,.0f} tokens/s a chip, MFU '
        f'{result.mfu * factor:.1%}, by one run (x {factor:.2f}: {run}); {error}',
      )
    )
  elif chip.clock_hz:
    rows.append(('calibrated', f'by no public run of this chip; of others, {error}'))
  if result.efficiency:
    rows.append(
      (
        'attention assumed',
        f'{result.efficiency:.0%} of peak in visited blocks, which hold '
        f'{result.visited:.2f} x the visible pairs',
      )
    )
  for name, t in sorted(e.traffic.items()):
    rows.append(
      (
        name,
        f'{t.count} x, {t.bytes / 1e9:.2f} GB, {t.overlapped_bytes / max(t.bytes, 1):.0%} '
        f'of them overlapped, {t.exposed_seconds:.4f} s exposed',
      )
    )
  if e.unknown_loops:
    rows.append(('loops counted once', ', '.join(e.unknown_loops)))
  return rows
