"""Compiled steps to step time: cycles, attention, what is exposed; chips."""

import dataclasses

import pytest
from hlo_test import _chain, _cycles, _gather, _kernel, _loop, _module

from glm_jax.performance import chips
from glm_jax.performance.chips import CHIPS
from glm_jax.planning import estimate, hlo
from glm_jax.planning.estimate import AttentionCost

CLOCKED = chips.Chip(
  device_kinds=('a chip',),
  peak_flops=1e12,
  hbm_bytes=10**9,
  hbm_bandwidth=1e9,
  ici_bandwidth=1e9,
  clock_hz=1e6,
)


def _op(**values):
  base = dict(
    name='op',
    opcode='fusion',
    computation='main',
    trips=1,
    cycles=26_000,
    output_bytes=0,
    operand_bytes=0,
    array_bytes=0,
    has_matmul=False,
  )
  return hlo.Op(**{**base, **values})


def _step(ops=(), kernels=(), collectives=()):
  return hlo.Step(tuple(ops), tuple(kernels), tuple(collectives), ())


@pytest.mark.parametrize(
  'values, seconds',
  [
    (dict(), 0.010),  # no bytes: cycles / 2.6
    (dict(array_bytes=10**7), 0.0115),  # 15% above the roofline of 10 ms
    (dict(array_bytes=10**9), 0.026),  # never above the cycles
    (dict(has_matmul=True), 0.026),
    (dict(opcode='copy'), 0.026),
    (dict(trips=3), 0.030),
  ],
)
def test_elementwise_fusions_are_corrected(values, seconds):
  result = estimate.estimate(_step([_op(**values)]), CLOCKED)
  assert result.step_seconds == pytest.approx(seconds)


def _calls(part, trips):
  return hlo.Kernel(f'splash_mha_{part}_residuals', 'tpu_custom_call', 'main', trips, ())


def test_attention_is_priced_by_its_calls():
  attention = AttentionCost(forward_flops=2e9, backward_flops=5e9, efficiency=0.5)
  fused = _step(kernels=[_calls('fwd', 4), _calls('fwd', 4), _calls('dkv', 4)])
  result = estimate.estimate(fused, CLOCKED, attention)
  assert result.attention_calls == {'fwd': 8, 'dkv': 4}
  assert result.attention_seconds == pytest.approx((8 * 2e9 + 4 * 5e9) / 0.5e12)
  unfused = _step(kernels=[_calls('fwd', 4), _calls('dkv', 4), _calls('dq', 4)])
  result = estimate.estimate(unfused, CLOCKED, attention)
  assert result.attention_seconds == pytest.approx((4 * 2e9 + 4 * 7e9) / 0.5e12)


def _collective(kind='all-gather', overlapped=True, **values):
  base = dict(
    name='c',
    computation='main',
    trips=10,
    bytes=8_000_000,
    dtype='bf16',
    group_size=8,
    torus_dims=1,
  )
  return hlo.Collective(kind=kind, overlapped=overlapped, **{**base, **values})


def test_only_what_nothing_hides_is_exposed():
  matmul = _op(has_matmul=True, cycles=40_000)  # 40 ms
  result = estimate.estimate(
    _step(
      [matmul, dataclasses.replace(matmul, computation='elsewhere')],
      collectives=[
        _collective(),  # 70 ms, 40 of them hidden
        _collective('all-reduce', overlapped=False, torus_dims=2),  # 70 ms
      ],
    ),
    CLOCKED,
  )
  assert result.traffic['all-gather'] == estimate.Traffic(
    10, 80_000_000, 80_000_000, pytest.approx(0.030)
  )
  assert result.traffic['all-reduce'] == estimate.Traffic(
    10, 80_000_000, 0, pytest.approx(0.070)
  )
  assert result.exposed_collective_seconds == pytest.approx(0.100)
  assert result.step_seconds == pytest.approx(0.080 + 0.100)


def test_the_roofline_takes_the_slower_of_matmuls_and_memory():
  moving = _step([_op(cycles=0, output_bytes=3 * 10**6, operand_bytes=10**6, trips=2)])
  chip = dataclasses.replace(CLOCKED, clock_hz=None)
  assert estimate.roofline(moving, chip, 1e9).step_seconds == pytest.approx(0.008)
  assert estimate.roofline(moving, chip, 1e10).step_seconds == pytest.approx(0.010)
  exposed = dataclasses.replace(moving, collectives=(_collective(overlapped=False),))
  assert estimate.roofline(exposed, chip, 1e10).step_seconds == pytest.approx(0.080)


def test_what_is_missing_is_said():
  with pytest.raises(ValueError, match='needs a TPU'):
    estimate.estimate(_step(), CHIPS['h100'])
  with pytest.raises(ValueError, match='FLOPs of attention'):
    estimate.estimate(_step(kernels=[_calls('fwd', 1)]), CLOCKED)


def test_a_scanned_step_end_to_end():
  """Two loops of 28 layers and the head, from text to milliseconds."""
  chain, computations = _chain(36)
  matmul = f'%mm = bf16[8,8]{{1,0}} convolution(%shard, %shard), {_cycles(900)}'
  shard = '%shard = bf16[256,64]{1,0} iota()'
  arguments = ['%p.1 = s8[1]{0} iota()', '%p.2 = bf16[8,128]{1,0} iota()']
  forward_call, *forward = _loop(
    'forward', 28, shard, *arguments, matmul, *chain, _kernel('fwd_residuals')
  )
  backward_call, *backward = _loop(
    'backward', 28, shard, *arguments, matmul, *chain, _kernel('dkv_no_residuals')
  )
  head = [shard, f'%head = bf16[8,8]{{1,0}} dot(%shard, %shard), {_cycles(5000)}']
  text = _module(
    [*forward_call, *head, _gather('embedding', 99, '%shard'), *backward_call],
    *computations,
    *forward,
    *backward,
  )
  result = estimate.estimate(hlo.read(text), CLOCKED, AttentionCost(1e6, 2.5e6, 0.5))
  assert result.tensorcore_seconds == pytest.approx((2 * 28 * (900 + 100) + 5000) / 1e6)
  assert result.attention_seconds == pytest.approx(28 * 3.5e6 / 0.5e12)
  assert result.traffic['all-gather'].count == 2 * 28 + 1
  assert result.exposed_collective_seconds == pytest.approx(2048 * 64 * 2 * 7 / 8 / 1e9)
  assert result.unknown_loops == ()


# Chips.


def test_a_device_kind_names_one_chip():
  kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
  assert len(kinds) == len(set(kinds))
  assert chips.of_device_kind('TPU v6 lite') is CHIPS['v6e']
  assert chips.of_device_kind('TPU7x').devices_per_chip == 2
  assert chips.of_device_kind('NVIDIA H100 80GB HBM3') is CHIPS['h100']


@pytest.mark.parametrize('name', [k for k, chip in CHIPS.items() if chip.clock_hz])
def test_peak_is_clock_times_mxu(name):
  """Four MXUs of 128 x 128 a core, 2 FLOPs a cell and cycle; from v6e on four times it."""
  flops = 4 * 128**2 * 2 * (4 if name in ('v6e', 'tpu7x') else 1)
  cores = 2 if name in ('v4', 'v5p') else 1
  chip = CHIPS[name]
  assert cores * flops * chip.clock_hz == pytest.approx(chip.peak_flops, rel=0.01)
