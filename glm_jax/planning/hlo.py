"""What a compiled step does, read from `compiled.as_text()`: ops, kernels, collectives.

A TPU executable is read fully; a GPU or CPU one as far as its text goes (no cycles).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from glm_jax.planning import hlo_text

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# Opcodes that move nothing, or whose work is counted where it starts.
_FREE = frozenset(
  'parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id '
  'opt-barrier add-dependency'.split()
)
# Opcodes that take time even where the text has no cycles for them.
_WORK = frozenset('fusion custom-call while dot convolution call'.split())


@dataclasses.dataclass(frozen=True)
class Op:
  """An operation of the step.

  Attributes:
    computation: that holds it: ENTRY, a loop's body, ...
    trips: how often a step runs it.
    cycles: the compiler's estimate for one run; 0 where it has none.
    output_bytes: written to HBM in one run; an update in place counts the update.
    operand_bytes: read from HBM in one run; what is only sliced counts the slice.
    array_bytes: of all its HBM arrays, operands and outputs, whole.
    has_matmul: whether a dot or a convolution is in it.
  """

  name: str
  opcode: str
  computation: str
  trips: int
  cycles: int
  output_bytes: int
  operand_bytes: int
  array_bytes: int
  has_matmul: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A custom call: a Pallas kernel, a library's matmul or attention.

  Attributes:
    name: of the instruction without its number: a Pallas kernel's own name.
    target: 'tpu_custom_call' for a Pallas kernel on TPU.
    operands: (dtype, shape) of each operand array.
  """

  name: str
  target: str
  computation: str
  trips: int
  operands: tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation.

  Attributes:
    kind: one of `COLLECTIVES`.
    bytes: of the whole array of one group: what an all-gather returns, what the others
      take from each device.
    dtype: of the first operand.
    group_size: devices that take part together.
    torus_dims: torus axes that its strategy uses at once; 1 where it does not say.
    overlapped: whether other work of the same computation runs meanwhile.
  """

  name: str
  kind: str
  computation: str
  trips: int
  bytes: int
  dtype: str
  group_size: int
  torus_dims: int
  overlapped: bool

  @property
  def wire_bytes(self) -> float:
    """Bytes that each device receives in one run by a ring algorithm.

    Example:
      >>> import dataclasses
      >>> c = Collective('x', 'all-gather', 'main', 1, 800, 'bf16', 8, 1, False)
      >>> c.wire_bytes, dataclasses.replace(c, kind='all-reduce').wire_bytes
      (700.0, 1400.0)
    """
    if self.kind in ('collective-permute', 'collective-broadcast'):
      return float(self.bytes)
    share = (self.group_size - 1) / self.group_size
    return self.bytes * share * (2 if self.kind == 'all-reduce' else 1)


@dataclasses.dataclass(frozen=True)
class Step:
  """All that one call of the executable runs on one device.

  Attributes:
    unknown_loops: bodies of loops without a readable trip count, counted once.
  """

  ops: tuple[Op, ...]
  kernels: tuple[Kernel, ...]
  collectives: tuple[Collective, ...]
  unknown_loops: tuple[str, ...]


def read(text: str) -> Step:
  """What one step runs, loops multiplied out.

  The body of a `while` counts `trip_count` times, a `call` once, a `conditional` as its
  longest branch, a fusion by its own estimate.

  Args:
    text: `compiled.as_text()`.

  Raises:
    UserError: there is no ENTRY computation in it.

  Example:
    >>> step = read('''HloModule m, num_partitions=4
    ... ENTRY %main (p: bf16[8,16]) -> bf16[32,16] {
    ...   %p = bf16[8,16]{1,0} parameter(0)
    ...   ROOT %g = bf16[32,16]{1,0} all-gather(%p), replica_groups=[1,4]<=[4]
    ... }''')
    >>> [(c.kind, c.bytes, c.group_size) for c in step.collectives]
    [('all-gather', 1024, 4)]
  """
  module = hlo_text.parse(text)
  walk = _Walk(module)
  walk.computation(module.entry, 1)
  return walk.step()


def has_square(text: str, size: int) -> bool:
  """Whether an array with two adjacent dimensions of `size` exists.

  Args:
    text: of the executable.
    size: the sequence length, chosen unlike every width of the model.

  Example:
    >>> has_square('%x = f32[2,384,384]{2,1,0} add(%a, %b)', 384)
    True
    >>> has_square('%x = f32[384,128]{1,0} add(%a, %b)', 384)
    False
  """
  return bool(re.search(rf'\b[a-z]\w*\[(?:\d+,)*{size},{size}(?:,\d+)*\]', text))


def collective_permute_loops(text: str) -> list[str]:
  """Bodies of loops that send arrays round a ring: matmuls cut into steps, ring attention.

  An all-gather is none however it is overlapped, nor is the exchange of a margin with a
  neighbour, which does not close the ring.

  Args:
    text: of the executable.
  """
  module, bodies = hlo_text.parse(text), []
  for computation in module.computations.values():
    for loop in computation.instructions.values():
      body = loop.attribute('body') if loop.opcode == 'while' else None
      if body and any(
        instruction.opcode in ('collective-permute', 'collective-permute-start')
        and _is_ring(instruction)
        for inside in hlo_text.called(module, body, inclusive=True, loops=False)
        for instruction in inside.instructions.values()
      ):
        bodies.append(body)
  return bodies


def out_of_memory(message: str) -> tuple[int, int] | None:
  """(needed, available) bytes of the compiler's refusal; None for another message.

  HBM and a kernel's VMEM alike.

  Example:
    >>> needed, available = out_of_memory(
    ...   'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
    ...   'temporaries (38.04G) exceeds available HBM (31.25G).')
    >>> round(needed / 2**30, 2), available / 2**30
    (38.04, 31.25)
  """
  # Versions and memories word it differently: the needed size, then the available one.
  size = r'([\d.]+)([KMGT]?)i?B?'
  for pattern in (
    rf'\({size}\) exceeds available \w+ \({size}\)',
    rf'allocation with size {size} and limit {size}',
    rf'\(size={size}\) would exceed memory \(size={size}\)',
    rf'Used {size} of {size} \w+',
  ):
    if match := re.search(pattern, message):
      needed, available = (
        int(float(number) * 1024 ** ' KMGT'.index(suffix or ' '))
        for number, suffix in (match.groups()[:2], match.groups()[2:])
      )
      return needed, available
  return None


class _Walk:
  """Collects operations, kernels and collectives, from ENTRY on."""

  def __init__(self, module: hlo_text.Module):
    self._module = module
    self._ops: list[Op] = []
    self._kernels: list[Kernel] = []
    self._collectives: list[Collective] = []
    self._unknown: list[str] = []

  def step(self) -> Step:
    return Step(
      tuple(self._ops),
      tuple(self._kernels),
      tuple(self._collectives),
      tuple(self._unknown),
    )

  def computation(self, name: str, trips: int) -> None:
    computation = self._module.computations[name]
    # Collectives of this computation that were counted already, see `_fused_collectives`.
    chains: set[str] = set()
    for i in computation.instructions.values():
      base = i.opcode.removesuffix('-start')
      # An asynchronous pair counts where it starts.
      if i.opcode in _FREE or i.opcode.endswith('-done'):
        continue
      if i.opcode == 'while':
        # Trips of nested loops multiply.
        count = hlo_text.trip_count(self._module, computation, i)
        body = str(i.attribute('body'))
        if count is None:
          self._unknown.append(body)
        self.computation(body, trips * (count or 1))
      elif i.opcode == 'call':
        self.computation(str(i.attribute('to_apply')), trips)
      elif i.opcode == 'conditional':
        self._longest_branch(i, trips)
      elif base in COLLECTIVES:
        # Only an asynchronous one, `all-gather-start`, can run beside other work.
        overlapped = base != i.opcode and self._works_until_done(computation, i)
        self._collective(computation, i, computation, trips, overlapped)
      elif i.opcode in ('call-start', 'async-start'):
        overlapped = self._works_until_done(computation, i)
        for holder, c in self._held_collectives(i):
          self._collective(computation, c, holder, trips, overlapped)
      elif not i.opcode.endswith('-start') and i.opcode not in ('send', 'recv'):
        self._op(computation, i, trips)
        self._fused_collectives(computation, i, trips, chains)

  def _longest_branch(self, i: hlo_text.Instruction, trips: int) -> None:
    # `conditional` on an index lists its branches, on a predicate it names two.
    listed = re.search(r'branch_computations=\{([^}]*)\}', i.attributes)
    names = hlo_text.OPERAND.findall(listed[1]) if listed else []
    names += [
      name
      for name in (i.attribute('true_computation'), i.attribute('false_computation'))
      if name
    ]
    branches = []
    for name in names:
      # A walk of its own, which is kept or dropped as a whole.
      branch = _Walk(self._module)
      branch.computation(name, trips)
      branches.append(branch)
    longest = max(branches, key=_Walk._weight)
    self._ops += longest._ops
    self._kernels += longest._kernels
    self._collectives += longest._collectives
    self._unknown += longest._unknown

  def _weight(self) -> tuple[int, int, int]:
    return (
      # Kernels first: the text has no cycles for them, and few operations take longer.
      len(self._kernels),
      sum(op.cycles * op.trips for op in self._ops),
      sum((op.output_bytes + op.operand_bytes) * op.trips for op in self._ops),
    )

  def _op(
    self, computation: hlo_text.Computation, i: hlo_text.Instruction, trips: int
  ) -> None:
    # The instruction itself and, of a fusion, all that is fused: kernels and matmuls may be
    # inside.
    inside = [(computation, i)] + [
      (holder, instruction)
      for holder in hlo_text.called(self._module, i.attribute('calls'), inclusive=True)
      for instruction in holder.instructions.values()
    ]
    for holder, call in inside:
      if call.opcode == 'custom-call' and not _is_bookkeeping(call):
        # Passes of the compiler number and clone instructions:
        # splash_mha_fwd.3.remat.clone.
        name = re.sub(r'(\.(\d+|clone|cloned|remat\d*))+$', '', call.name)
        operands = [array for o in call.operands for array in hlo_text.arrays(holder, o)]
        self._kernels.append(
          Kernel(name, call.target(), computation.name, trips, tuple(operands))
        )
    if not _is_bookkeeping(i):
      # An array that is passed twice is read once.
      operands = [o for o in dict.fromkeys(i.operands) if o in computation.instructions]
      self._ops.append(
        Op(
          name=i.name,
          opcode=i.opcode,
          computation=computation.name,
          trips=trips,
          cycles=i.cycles(),
          output_bytes=hlo_text.written_bytes(self._module, computation, i),
          operand_bytes=sum(
            hlo_text.read_bytes(self._module, computation, o, [i]) for o in operands
          ),
          array_bytes=hlo_text.hbm_size(i.shape)
          + sum(hlo_text.hbm_size(computation.instructions[o].shape) for o in operands),
          has_matmul=any(_is_matmul(call) for _, call in inside),
        )
      )

  def _fused_collectives(
    self,
    computation: hlo_text.Computation,
    i: hlo_text.Instruction,
    trips: int,
    chains: set[str],
  ) -> None:
    """A collective inside a fusion; several fusions of a chain carry the same one."""
    for holder, c in self._held_collectives(i):
      # Gathers written by hand share one channel: what they gather tells them apart.
      channel = re.search(r'channel_id=(\d+)', c.attributes)
      source = re.search(r'op_name="([^"]*)"', c.attributes)
      key = f'{channel[1]} {source and source[1]}' if channel else c.name
      if key not in chains:
        chains.add(key)
        # The TPU compiler's name for an all-reduce fused with each device's slice of it: a
        # reduce-scatter, beside which nothing else runs.
        scatter = holder.name.startswith('all-reduce-scatter')
        kind = 'reduce-scatter' if scatter else None
        self._collective(computation, c, holder, trips, not scatter, kind)

  def _held_collectives(
    self, i: hlo_text.Instruction
  ) -> Iterator[tuple[hlo_text.Computation, hlo_text.Instruction]]:
    for holder in hlo_text.called(
      self._module, i.attribute('calls') or i.attribute('to_apply'), inclusive=True
    ):
      for c in holder.instructions.values():
        if c.opcode.removesuffix('-start') in COLLECTIVES:
          yield holder, c

  def _works_until_done(
    self, computation: hlo_text.Computation, start: hlo_text.Instruction
  ) -> bool:
    # The text is in the order of the schedule, so that what stands between start and done
    # runs meanwhile.
    instructions = list(computation.instructions.values())
    begin = next(k for k, i in enumerate(instructions) if i is start)
    for i in instructions[begin + 1 :]:
      if i.opcode.endswith('-done') and start.name in i.operands:
        return False
      if i.cycles() or (i.opcode in _WORK and not _is_bookkeeping(i)):
        return True
    return False

  def _collective(
    self,
    computation: hlo_text.Computation,
    i: hlo_text.Instruction,
    holder: hlo_text.Computation,
    trips: int,
    overlapped: bool,
    kind: str | None = None,
  ) -> None:
    kind = kind or i.opcode.removesuffix('-start')
    arrays = [array for o in i.operands for array in hlo_text.arrays(holder, o)]
    group = hlo_text.group_size(i, self._module.num_devices)
    total = sum(hlo_text.array_size(dtype, dims) for dtype, dims in arrays)
    self._collectives.append(
      Collective(
        i.name,
        kind,
        computation.name,
        trips,
        # An all-gather takes one share of the array that it returns.
        total * (group if kind == 'all-gather' else 1),
        arrays[0][0] if arrays else '',
        group,
        hlo_text.torus_dims(i),
        overlapped,
      )
    )


def _is_matmul(i: hlo_text.Instruction) -> bool:
  return i.opcode in ('dot', 'convolution') or bool(re.search('gemm|matmul', i.target()))


def _is_bookkeeping(i: hlo_text.Instruction) -> bool:
  """A custom call by which the compiler talks to itself: `AllocateBuffer`, ..."""
  return i.opcode == 'custom-call' and i.target()[:1].isupper() and not i.cycles()


def _is_ring(i: hlo_text.Instruction) -> bool:
  # Closed if every device that sends receives, too; the ends of an open chain do only one.
  pairs = hlo_text.sent_pairs(i)
  return len(pairs) > 1 and {s for s, _ in pairs} == {t for _, t in pairs}
