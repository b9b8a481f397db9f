"""Reading compiled text: what runs how often, which bytes move, what is overlapped."""

import dataclasses

import pytest

from glm_jax.planning import hlo, hlo_text


def _module(entry, *computations):
  """HLO text of some computations and the lines of ENTRY."""
  body = '\n'.join(f'  {line}' for line in entry)
  parts = [*computations, f'ENTRY %main (p: f32[]) -> f32[] {{\n{body}\n}}']
  return '\n\n'.join(['HloModule jit_step, is_scheduled=true, num_partitions=8', *parts])


def _computation(name, *lines, thread=''):
  end = f'}}, execution_thread="{thread}"' if thread else '}'
  body = '\n'.join(f'  {line}' for line in lines)
  return f'%{name} (p: f32[]) -> f32[] {{\n{body}\n{end}'


def _cycles(n):
  return f'backend_config={{"window_config":{{"estimated_cycles":"{n}"}}}}'


def _loop(name, limit, *lines, step=1, start=0, known=None):
  """A while's (line of the caller, condition and body); what it carries is one counter."""
  condition = _computation(
    f'{name}_condition',
    f'%limit = s32[]{{:T(128)}} constant({limit})',
    '%carried = (s32[]{:T(128)}) parameter(0)',
    '%i = s32[]{:T(128)} get-tuple-element(%carried), index=0',
    'ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT',
  )
  body = _computation(
    f'{name}_body',
    '%carried = (s32[]{:T(128)}) parameter(0)',
    '%i = s32[]{:T(128)} get-tuple-element(%carried), index=0',
    f'%step = s32[]{{:T(128)}} constant({step})',
    '%next = s32[]{:T(128)} add(%i, %step)',
    *lines,
    'ROOT %out = (s32[]{:T(128)}) tuple(%next)',
  )
  extra = f', backend_config={{"known_trip_count":{{"n":"{known}"}}}}' if known else ''
  call = [
    f'%{name}_zero = s32[]{{:T(128)}} constant({start})',
    f'%{name}_start = s32[]{{:T(128)}} copy(%{name}_zero)',
    f'%{name}_init = (s32[]{{:T(128)}}) tuple(%{name}_start)',
    f'%{name} = (s32[]{{:T(128)}}) while(%{name}_init), condition=%{name}_condition, '
    f'body=%{name}_body{extra}',
  ]
  return call, condition, body


WORK = f'%work = f32[8]{{0}} fusion(%i), kind=kLoop, calls=%math, {_cycles(10)}'
MATH = _computation('math', '%x = f32[] parameter(0)', 'ROOT %y = f32[8]{0} broadcast(%x)')


# What runs how often.


def _work_trips(text):
  return [op.trips for op in hlo.read(text).ops if op.name == 'work']


@pytest.mark.parametrize(
  'loop, trips',
  [
    (dict(limit=28), 28),
    (dict(limit=8, step=2), 4),  # a matmul cut for its collective counts in twos
    (dict(limit=9, step=2), 5),
    (dict(limit=8, start=1), 7),  # a peeled first iteration
    (dict(limit=99, known=3), 3),
  ],
)
def test_a_loop_counts_as_often_as_it_runs(loop, trips):
  call, condition, body = _loop('loop', loop.pop('limit'), WORK, **loop)
  assert _work_trips(_module(call, MATH, condition, body)) == [trips]


def test_nested_loops_multiply():
  inner_call, *inner = _loop('inner', 8, WORK, step=2)
  outer_call, *outer = _loop('outer', 28, *inner_call)
  text = _module(outer_call, MATH, *inner, *outer)
  assert _work_trips(text) == [28 * 4]
  step = hlo.read(text)
  assert sum(op.trips * op.cycles for op in step.ops) == 28 * 4 * 10


def test_a_limit_carried_by_the_loop_is_found():
  text = _module(
    [
      '%zero = s32[] constant(0)',
      '%six = s32[] constant(6)',
      '%init = (s32[], s32[]) tuple(%zero, %six)',
      '%loop = (s32[], s32[]) while(%init), condition=%condition, body=%body',
    ],
    MATH,
    _computation(
      'condition',
      '%carried = (s32[], s32[]) parameter(0)',
      '%i = s32[] get-tuple-element(%carried), index=0',
      '%limit = s32[] get-tuple-element(%carried), index=1',
      'ROOT %lt = pred[] compare(%i, %limit), direction=LT',
    ),
    _computation(
      'body',
      '%carried = (s32[], s32[]) parameter(0)',
      '%i = s32[] get-tuple-element(%carried), index=0',
      '%limit = s32[] get-tuple-element(%carried), index=1',
      '%one = s32[] constant(1)',
      '%next = s32[] add(%i, %one)',
      WORK,
      'ROOT %out = (s32[], s32[]) tuple(%next, %limit)',
    ),
  )
  assert _work_trips(text) == [6]


def test_a_loop_of_unknown_length_is_named():
  call, condition, body = _loop('loop', 3, WORK)
  condition = condition.replace('constant(3)', 'add(%carried, %carried)')
  step = hlo.read(_module(call, MATH, condition, body))
  assert step.unknown_loops == ('loop_body',)
  assert [op.trips for op in step.ops if op.name == 'work'] == [1]


def test_a_conditional_counts_its_longest_branch_and_a_call_once():
  short = WORK.replace('"10"', '"3"')
  text = _module(
    [
      '%x = f32[] parameter(0)',
      '%c = f32[] conditional(%x, %x, %x), branch_computations={%short, %long}',
      '%d = f32[] call(%x), to_apply=%short',
    ],
    MATH,
    _computation('short', '%i = f32[] parameter(0)', short),
    _computation('long', '%i = f32[] parameter(0)', WORK),
  )
  assert [op.cycles for op in hlo.read(text).ops] == [10, 3]


def test_an_estimate_of_int64_max_is_none():
  text = _module([f'%x = f32[8]{{0}} iota(), {_cycles(2**63 - 1)}'])
  assert [op.cycles for op in hlo.read(text).ops] == [0]


def test_text_without_entry_is_refused():
  with pytest.raises(ValueError, match='ENTRY'):
    hlo.read('HloModule jit_step')


# Kernels.

KERNEL = """%splash_mha_{part}.1 = (f32[64,128]{{1,0:T(8,128)}}) custom-call(%p.1, %p.2), \
custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
"xprof_metadata":"{{\\"block_q\\": 1024}}"
}}}}, metadata={{op_name="jit(step)/splash_mha_{part}/pallas_call"}}"""


def _kernel(part):
  return KERNEL.format(part=part)


def test_kernels_keep_name_trips_and_operands_behind_line_breaks():
  call, *parts = _loop(
    'loop',
    5,
    '%p.1 = s8[1,4,4]{2,1,0} iota()',
    '%p.2 = bf16[16,4096,128]{2,1,0} iota()',
    _kernel('fwd_residuals'),
    '%buffer = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"',
    WORK,
  )
  text = _module(call, MATH, *parts)
  kernel = (
    hlo_text.parse(text)
    .computations['loop_body']
    .instructions['splash_mha_fwd_residuals.1']
  )
  assert 'pallas_call' in kernel.attributes
  step = hlo.read(text)
  assert step.kernels == (
    hlo.Kernel(
      'splash_mha_fwd_residuals',
      'tpu_custom_call',
      'loop_body',
      5,
      (('s8', (1, 4, 4)), ('bf16', (16, 4096, 128))),
    ),
  )
  assert [op.trips for op in step.ops if op.name == 'work'] == [5]


# Collectives.


def _gather(name, channel=36, operand='%x'):
  return (
    f'%{name} = bf16[2048,64]{{1,0}} all-gather({operand}), channel_id={channel}, '
    "replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}"
  )


def _chain(channel):
  """An overlapped all-gather as TPUs write it: start, step inside a matmul, done."""
  shard = '%x = bf16[256,64]{1,0} parameter(0)'
  computations = [
    _computation(f'start{channel}', shard, 'ROOT ' + _gather('g.1', channel)),
    _computation(
      f'async_collective_fusion{channel}',
      shard,
      '%m = bf16[8,8]{1,0} convolution(%x, %x)',
      _gather('g.2', channel),
      'ROOT %t = (bf16[8,8]{1,0}, bf16[2048,64]{1,0}) tuple(%m, %g.2)',
    ),
    _computation(f'done{channel}', shard, 'ROOT ' + _gather('g.3', channel)),
  ]
  lines = [
    f'%s{channel} = bf16[2048,64]{{1,0}} fusion(%shard), kind=kCustom, '
    f'calls=%start{channel}',
    f'%f{channel} = (bf16[8,8]{{1,0}}, bf16[2048,64]{{1,0}}) fusion(%shard), '
    f'kind=kOutput, calls=%async_collective_fusion{channel}, {_cycles(100)}',
    f'%d{channel} = bf16[2048,64]{{1,0}} fusion(%shard), kind=kCustom, '
    f'calls=%done{channel}',
  ]
  return lines, computations


def test_an_async_chain_counts_once_in_each_computation():
  one, first = _chain(36)
  other, second = _chain(37)
  shard = '%shard = bf16[256,64]{1,0} iota()'
  call, *loop = _loop('loop', 4, shard, *one, *other)
  text = _module([*call, shard, *one], *first, *second, *loop)
  gathers = hlo.read(text).collectives
  assert [(c.kind, c.trips, c.overlapped) for c in gathers] == [
    ('all-gather', 4, True),
    ('all-gather', 4, True),
    ('all-gather', 1, True),
  ]
  assert {(c.bytes, c.dtype, c.group_size) for c in gathers} == {(2048 * 64 * 2, 'bf16', 8)}
  matmuls = [op for op in hlo.read(text).ops if op.cycles]
  assert all(op.has_matmul for op in matmuls)


def test_a_fused_all_reduce_scatter_is_a_synchronous_reduce_scatter():
  call, *loop = _loop(
    'loop',
    4,
    '%grad = bf16[2048,64]{1,0} iota()',
    '%fusion.8 = bf16[512,64]{1,0} fusion(%grad), kind=kCustom, '
    'calls=%all-reduce-scatter.5',
  )
  scatter = _computation(
    'all-reduce-scatter.5',
    '%input = bf16[2048,64]{1,0} parameter(0)',
    '%all-reduce.19 = bf16[2048,64]{1,0} all-reduce(%input), channel_id=44, '
    'replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, backend_config='
    '{"debug":"num_dims:3 active_dims:011 dim_sizes:2,2,2"}',
    'ROOT %slice = bf16[512,64]{1,0} dynamic-slice(%all-reduce.19)',
  )
  (c,) = hlo.read(_module(call, scatter, *loop)).collectives
  assert (c.kind, c.trips, c.group_size, c.overlapped) == ('reduce-scatter', 4, 4, False)
  assert c.torus_dims == 2  # of three, by active_dims
  assert c.wire_bytes == 2048 * 64 * 2 * 3 / 4


def test_a_sparsecore_call_is_overlapped_if_work_comes_before_its_end():
  start = (
    '%a.call-start = ((bf16[256,64]{1,0}), bf16[2048,64]{1,0}) call-start(%shard), '
    'async_execution_thread="sparsecore", to_apply=%called'
  )
  done = '%a.call-done = bf16[2048,64]{1,0} call-done(%a.call-start)'
  called = _computation(
    'called',
    '%x = bf16[256,64]{1,0} parameter(0)',
    'ROOT ' + _gather('g'),
    thread='sparsecore',
  )
  entry = ['%shard = bf16[256,64]{1,0} iota()', '%i = f32[] constant(0)', start]
  for lines, overlapped in (([WORK, done], True), ([done, WORK], False)):
    (c,) = hlo.read(_module([*entry, *lines], MATH, called)).collectives
    assert (c.kind, c.bytes, c.overlapped) == ('all-gather', 2048 * 64 * 2, overlapped)


def test_a_start_and_its_done_are_one_collective():
  entry = [
    '%shard = bf16[256,64]{1,0} iota()',
    '%i = f32[] constant(0)',
    '%s = (bf16[256,64]{1,0}, bf16[2048,64]{1,0}) all-gather-start(%shard), '
    'replica_groups=[1,8]<=[8], dimensions={0}',
    WORK,
    '%d = bf16[2048,64]{1,0} all-gather-done(%s)',
  ]
  step = hlo.read(_module(entry, MATH))
  (c,) = step.collectives
  assert (c.bytes, c.group_size, c.overlapped) == (2048 * 64 * 2, 8, True)
  assert [op.name for op in step.ops] == ['shard', 'work']


@pytest.mark.parametrize(
  'groups, size',
  [
    ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
    ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
    ('[4,2]<=[2,4]T(1,0)', 2),
    ('{{0,1,2,3},{4,5,6,7}}', 4),
    ('{}', 8),  # all devices
  ],
)
def test_groups_are_read_in_every_notation(groups, size):
  line = f'%r = f32[8]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add'
  (c,) = hlo.read(_module(['%x = f32[8]{0} iota()', line])).collectives
  assert c.group_size == size


@pytest.mark.parametrize(
  'kind, share',
  [
    ('all-gather', 7 / 8),
    ('reduce-scatter', 7 / 8),
    ('all-to-all', 7 / 8),
    ('all-reduce', 2 * 7 / 8),
    ('collective-permute', 1),
  ],
)
def test_bytes_on_the_wire(kind, share):
  c = hlo.Collective('c', kind, 'main', 1, 8000, 'bf16', 8, 1, False)
  assert c.wire_bytes == 8000 * share
  if kind != 'collective-permute':
    assert dataclasses.replace(c, group_size=1).wire_bytes == 0


def test_a_tuple_of_arrays_is_reduced_as_one():
  entry = [
    '%x = bf16[8,8]{1,0} iota()',
    '%y = f32[4]{0} iota()',
    '%r = (bf16[8,8]{1,0}, f32[4]{0}) all-reduce(%x, %y), replica_groups=[1,8]<=[8]',
  ]
  (c,) = hlo.read(_module(entry)).collectives
  assert c.bytes == 8 * 8 * 2 + 4 * 4


def test_only_a_ring_in_a_loop_is_a_permute_loop():
  def text(pairs):
    call, *loop = _loop(
      'loop',
      4,
      '%x = bf16[8]{0} iota()',
      f'%s = (bf16[8]{{0}}, bf16[8]{{0}}) collective-permute-start(%x), '
      f'source_target_pairs={pairs}',
    )
    return _module(call, *loop)

  assert hlo.collective_permute_loops(text('{{0,1},{1,2},{2,3},{3,0}}')) == ['loop_body']
  assert hlo.collective_permute_loops(text('{{0,1},{1,2},{2,3}}')) == []  # a margin


# Bytes.


def test_vmem_slices_and_updates_in_place_count_what_moves():
  stack = 'f32[4,8,8]{2,1,0:T(8,128)}'
  entry = [
    f'%stack = {stack} iota()',
    '%cached = f32[8,8]{1,0:T(8,128)S(1)} iota()',
    '%i = s32[] constant(0)',
    f'%f = {stack} fusion(%stack, %cached, %i), kind=kLoop, calls=%fused, {_cycles(7)}',
  ]
  fused = _computation(
    'fused',
    f'%a = {stack} parameter(0)',
    '%b = f32[8,8]{1,0:T(8,128)S(1)} parameter(1)',
    '%k = s32[] parameter(2)',
    '%layer = f32[1,8,8]{2,1,0} dynamic-slice(%a, %k, %k, %k)',
    '%flat = f32[8,8]{1,0} bitcast(%layer)',
    '%sum = f32[8,8]{1,0} add(%flat, %b)',
    '%new = f32[1,8,8]{2,1,0} bitcast(%sum)',
    f'ROOT %out = {stack} dynamic-update-slice(%a, %new, %k, %k, %k)',
  )
  (op,) = [op for op in hlo.read(_module(entry, fused)).ops if op.name == 'f']
  assert op.operand_bytes == 8 * 8 * 4 + 4
  assert op.output_bytes == 8 * 8 * 4
  assert op.array_bytes == 2 * 4 * 8 * 8 * 4 + 4


def test_every_output_counts():
  entry = [
    '%x = f32[8]{0} iota()',
    '%pair = (f32[8]{0}, s32[8]{0}) sort(%x, %x), dimensions={0}, to_apply=%compare',
  ]
  (op,) = [op for op in hlo.read(_module(entry)).ops if op.name == 'pair']
  assert (op.output_bytes, op.operand_bytes) == (64, 32)


@pytest.mark.parametrize(
  'shape, expected',
  [('f32[2,384,384]', True), ('pred[384,384,4]', True), ('f32[384,128]', False)],
)
def test_squares_are_seen(shape, expected):
  assert hlo.has_square(f'%x = {shape}{{1,0}} add(%a), slice={{[0:384]}}', 384) is expected


@pytest.mark.parametrize(
  'message, needed, available',
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
      'temporaries (960.00G) exceeds available HBM (15.75G).',
      960 * 2**30,
      15.75 * 2**30,
    ),
    (
      'RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory '
      'space vmem while allocating on stack for %huge.1 = f32[128,4096] custom-call(). '
      'Scoped allocation with size 127.50M and limit 32.00M exceeded scoped vmem limit.',
      127.5 * 2**20,
      32 * 2**20,
    ),
    (
      'RESOURCE_EXHAUSTED: Allocation (size=268435456) would exceed memory '
      "(size=134217728) :: #allocation5 [shape = 'u8[268435456]{0}', space=vmem",
      2**28,
      2**27,
    ),
  ],
)
def test_refusals_of_the_compiler_are_read(message, needed, available):
  assert hlo.out_of_memory(message) == (needed, available)


def test_other_errors_are_no_refusal():
  assert hlo.out_of_memory('INVALID_ARGUMENT: size 12.5G is not a mesh') is None
