"""What a compiled step does, read from `compiled.as_text()`: ops, kernels, collectives.

A TPU executable is read fully; a GPU or CPU one as far as its text goes (no cycles).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from glm_jax import configs

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

_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'  (ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r' ([a-z][a-z0-9\-]*)\(')
_OPERAND = re.compile(r'%([\w.\-]+)')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_PARENTHESIS = re.compile(r'[()]')
_MEMORY_SPACE = re.compile(r'S\([1-9]')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN_CYCLES = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO.

  Attributes:
    shape: its text, tuples and layouts included.
    operands: names.
    arguments: what stands in the parentheses, the value of a constant.
    attributes: what follows them.
  """

  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]
  arguments: str
  attributes: str

  def attribute(self, name: str) -> str | None:
    """The computation that `name=%...` names."""
    found = re.search(rf'\b{name}=%([\w.\-]+)', self.attributes)
    return found[1] if found else None

  def target(self) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found[1] if found else ''

  def cycles(self) -> int:
    found = _CYCLES.search(self.attributes)
    cycles = int(found[1]) if found else 0
    return 0 if cycles >= _UNKNOWN_CYCLES else cycles


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions by name in their order; the last is the root if none says so."""

  name: str
  instructions: dict[str, Instruction]
  root: str


@dataclasses.dataclass(frozen=True)
class Module:
  """The computations by name, the name of ENTRY and the number of devices."""

  computations: dict[str, Computation]
  entry: str
  num_devices: int


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


def parse(text: str) -> Module:
  """Reads optimized HLO text.

  Raises:
    ValueError: there is no ENTRY computation in it.
  """
  computations, entry, name = {}, None, None
  instructions: dict[str, Instruction] = {}
  root, pending = '', ''

  def finish() -> None:
    nonlocal pending, root
    if pending:
      instruction, is_root = _instruction(pending)
      instructions[instruction.name] = instruction
      root = instruction.name if is_root else root
      pending = ''

  for line in text.splitlines():
    if name is None:
      if header := _COMPUTATION.match(line):
        name, instructions, root = header[2], {}, ''
        entry = name if header[1] else entry
    elif line.startswith('}') and not line.startswith('}}'):
      finish()
      if not root and instructions:
        root = next(reversed(instructions))
      computations[name], name = Computation(name, instructions, root), None
    elif _INSTRUCTION.match(line):
      finish()
      pending = line
    else:
      pending += line  # a kernel's metadata holds line breaks
  configs.check(
    entry is not None,
    'The text of an executable must have an ENTRY computation',
    f'{len(text):,} characters without one',
    'pass `compiled.as_text()`',
  )
  head = text[: text.find('\n')]
  counts = [re.search(rf'{k}=(\d+)', head) for k in ('replica_count', 'num_partitions')]
  replicas, partitions = (int(c[1]) if c else 1 for c in counts)
  return Module(computations, str(entry), replicas * partitions)


def read(text: str) -> Step:
  """What one step runs, loops multiplied out.

  The body of a `while` counts `trip_count` times, a `call` once, a `conditional` as its
  longest branch, a fusion by its own estimate.

  Args:
    text: `compiled.as_text()`.

  Raises:
    ValueError: there is no ENTRY computation in it.

  Example:
    >>> step = read('''HloModule m, num_partitions=4
    ... ENTRY %main (p: bf16[8,16]) -> bf16[32,16] {
    ...   %p = bf16[8,16]{1,0} parameter(0)
    ...   ROOT %g = bf16[32,16]{1,0} all-gather(%p), replica_groups=[1,4]<=[4]
    ... }''')
    >>> [(c.kind, c.bytes, c.group_size) for c in step.collectives]
    [('all-gather', 1024, 4)]
  """
  module = parse(text)
  walk = _Walk(module)
  walk.computation(module.entry, 1)
  return walk.step()


def trip_count(module: Module, holder: Computation, loop: Instruction) -> int | None:
  """How often a `while` runs its body; None if the text does not say.

  From the compiler's own count if there is one; else from the counter's start, step and
  limit (the loops of a matmul cut for its collective count in twos); else the largest
  integer constant of the condition.

  Args:
    module: of the text.
    holder: the computation with the loop.
    loop: the `while`.
  """
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
    return int(known[1])
  counted = _counted(module, holder, loop)
  if counted is not None:
    return counted
  constants = [
    int(i.arguments)
    for computation in _called(module, loop.attribute('condition'), inclusive=True)
    for i in computation.instructions.values()
    if _is_integer(i)
  ]
  return max(constants) if constants and max(constants) > 0 else None


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
  module, found = parse(text), []
  for computation in module.computations.values():
    for loop in computation.instructions.values():
      body = loop.attribute('body') if loop.opcode == 'while' else None
      if body and any(
        instruction.opcode in ('collective-permute', 'collective-permute-start')
        and _is_ring(instruction)
        for inside in _called(module, body, inclusive=True, loops=False)
        for instruction in inside.instructions.values()
      ):
        found.append(body)
  return found


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
  size = r'([\d.]+)([KMGT]?)i?B?'
  for pattern in (
    rf'\({size}\) exceeds available \w+ \({size}\)',
    rf'allocation with size {size} and limit {size}',
    rf'\(size={size}\) would exceed memory \(size={size}\)',
    rf'Used {size} of {size} \w+',
  ):
    if found := re.search(pattern, message):
      needed, available = (
        int(float(number) * 1024 ** ' KMGT'.index(suffix or ' '))
        for number, suffix in (found.groups()[:2], found.groups()[2:])
      )
      return needed, available
  return None


class _Walk:
  """Collects what is met from ENTRY on."""

  def __init__(self, module: Module):
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
    chains: set[str] = set()
    for i in computation.instructions.values():
      base = i.opcode.removesuffix('-start')
      if i.opcode in _FREE or i.opcode.endswith('-done'):
        continue
      if i.opcode == 'while':
        count = trip_count(self._module, computation, i)
        body = str(i.attribute('body'))
        if count is None:
          self._unknown.append(body)
        self.computation(body, trips * (count or 1))
      elif i.opcode == 'call':
        self.computation(str(i.attribute('to_apply')), trips)
      elif i.opcode == 'conditional':
        self._longest_branch(i, trips)
      elif base in COLLECTIVES:
        overlapped = base != i.opcode and self._works_until_done(computation, i)
        self._collective(computation, i, computation, trips, overlapped)
      elif i.opcode in ('call-start', 'async-start'):
        overlapped = self._works_until_done(computation, i)
        for holder, c in self._held_collectives(i):
          self._collective(computation, c, holder, trips, overlapped)
      elif not i.opcode.endswith('-start') and i.opcode not in ('send', 'recv'):
        self._op(computation, i, trips)
        self._fused_collectives(computation, i, trips, chains)

  def _longest_branch(self, i: Instruction, trips: int) -> None:
    listed = re.search(r'branch_computations=\{([^}]*)\}', i.attributes)
    names = _OPERAND.findall(listed[1]) if listed else []
    names += [
      name
      for name in (i.attribute('true_computation'), i.attribute('false_computation'))
      if name
    ]
    branches = []
    for name in names:
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
      len(self._kernels),
      sum(op.cycles * op.trips for op in self._ops),
      sum((op.output_bytes + op.operand_bytes) * op.trips for op in self._ops),
    )

  def _op(self, computation: Computation, i: Instruction, trips: int) -> None:
    inside = [(computation, i)] + [
      (holder, instruction)
      for holder in _called(self._module, i.attribute('calls'), inclusive=True)
      for instruction in holder.instructions.values()
    ]
    for holder, call in inside:
      if call.opcode == 'custom-call' and not _is_bookkeeping(call):
        name = re.sub(r'(\.(\d+|clone|cloned|remat\d*))+$', '', call.name)
        operands = [array for o in call.operands for array in _arrays(holder, o)]
        self._kernels.append(
          Kernel(name, call.target(), computation.name, trips, tuple(operands))
        )
    if not _is_bookkeeping(i):
      operands = [o for o in dict.fromkeys(i.operands) if o in computation.instructions]
      self._ops.append(
        Op(
          name=i.name,
          opcode=i.opcode,
          computation=computation.name,
          trips=trips,
          cycles=i.cycles(),
          output_bytes=_written_bytes(self._module, computation, i),
          operand_bytes=sum(
            _read_bytes(self._module, computation, o, [i]) for o in operands
          ),
          array_bytes=_hbm_size(i.shape)
          + sum(_hbm_size(computation.instructions[o].shape) for o in operands),
          has_matmul=any(_is_matmul(x) for _, x in inside),
        )
      )

  def _fused_collectives(
    self, computation: Computation, i: Instruction, trips: int, chains: set[str]
  ) -> None:
    """A collective inside a fusion; several fusions of a chain carry the same one."""
    for holder, c in self._held_collectives(i):
      # Gathers written by hand share one channel: what they gather tells them apart.
      channel = re.search(r'channel_id=(\d+)', c.attributes)
      source = re.search(r'op_name="([^"]*)"', c.attributes)
      key = f'{channel[1]} {source and source[1]}' if channel else c.name
      if key not in chains:
        chains.add(key)
        scatter = holder.name.startswith('all-reduce-scatter')
        kind = 'reduce-scatter' if scatter else None
        self._collective(computation, c, holder, trips, not scatter, kind)

  def _held_collectives(self, i: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    for holder in _called(
      self._module, i.attribute('calls') or i.attribute('to_apply'), inclusive=True
    ):
      for c in holder.instructions.values():
        if c.opcode.removesuffix('-start') in COLLECTIVES:
          yield holder, c

  def _works_until_done(self, computation: Computation, start: Instruction) -> bool:
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
    computation: Computation,
    i: Instruction,
    holder: Computation,
    trips: int,
    overlapped: bool,
    kind: str | None = None,
  ) -> None:
    kind = kind or i.opcode.removesuffix('-start')
    arrays = [array for o in i.operands for array in _arrays(holder, o)]
    group = _group_size(i, self._module.num_devices)
    total = sum(_size(dtype, dims) for dtype, dims in arrays)
    self._collectives.append(
      Collective(
        i.name,
        kind,
        computation.name,
        trips,
        total * (group if kind == 'all-gather' else 1),
        arrays[0][0] if arrays else '',
        group,
        _torus_dims(i),
        overlapped,
      )
    )


def _instruction(line: str) -> tuple[Instruction, bool]:
  start = _INSTRUCTION.match(line)
  opcode = _OPCODE.search(line, start.end() - 1) if start else None
  configs.check(
    opcode is not None,
    'An HLO instruction must have an opcode',
    repr(line[:80]),
    'pass `compiled.as_text()`',
  )
  assert start is not None and opcode is not None
  depth, end = 1, len(line)
  for found in _PARENTHESIS.finditer(line, opcode.end()):
    depth += 1 if found[0] == '(' else -1
    if depth == 0:
      end = found.start()
      break
  arguments = line[opcode.end() : end]
  return Instruction(
    name=start[2],
    opcode=opcode[1],
    shape=line[start.end() : opcode.start()],
    operands=tuple(_OPERAND.findall(arguments)),
    arguments=arguments,
    attributes=line[end + 1 :],
  ), bool(start[1])


def _is_integer(i: Instruction) -> bool:
  return (
    i.opcode == 'constant'
    and bool(re.match(r'[su]\d+\[\]', i.shape))
    and bool(re.fullmatch(r'-?\d+', i.arguments))
  )


def _counted(module: Module, holder: Computation, loop: Instruction) -> int | None:
  """ceil((limit - start) / step) of a loop whose condition is `counter < limit`."""
  condition = module.computations.get(loop.attribute('condition') or '')
  body = module.computations.get(loop.attribute('body') or '')
  start = holder.instructions.get(loop.operands[0]) if loop.operands else None
  if condition is None or body is None or start is None or start.opcode != 'tuple':
    return None
  test, end = condition.instructions[condition.root], body.instructions[body.root]
  if test.opcode != 'compare' or 'direction=LT' not in test.attributes:
    return None
  index = _element(condition, test.operands[0])
  if index is None or end.opcode != 'tuple':
    return None

  def value(computation: Computation, name: str) -> int | None:
    i = _origin(computation, name)
    if i is not None and _is_integer(i):
      return int(i.arguments)
    k = _element(computation, name)
    if k is None or computation is holder or _element(body, end.operands[k]) != k:
      return None  # what the loop changes is no constant
    return value(holder, start.operands[k])

  limit, first = value(condition, test.operands[1]), value(holder, start.operands[index])
  add = _origin(body, end.operands[index])
  if limit is None or add is None or add.opcode != 'add':
    return None
  steps = [value(body, o) for o in add.operands if _element(body, o) != index]
  if len(steps) != 1 or not steps[0] or steps[0] < 0:
    return None
  return max(0, -(((first or 0) - limit) // steps[0]))


def _origin(computation: Computation, name: str) -> Instruction | None:
  """The instruction whose value a name has, behind copies."""
  i = computation.instructions.get(name)
  while i is not None and i.opcode in ('copy', 'bitcast'):
    i = computation.instructions.get(i.operands[0])
  return i


def _element(computation: Computation, name: str) -> int | None:
  """Which element of the computation's parameter a name is."""
  i = _origin(computation, name)
  if i is None or i.opcode != 'get-tuple-element':
    return None
  source = computation.instructions.get(i.operands[0])
  found = re.search(r'\bindex=(\d+)', i.attributes)
  return int(found[1]) if found and source and source.opcode == 'parameter' else None


def _called(
  module: Module, name: str | None, *, inclusive: bool = False, loops: bool = True
) -> Iterator[Computation]:
  """Computations that one calls, directly or not."""
  if name is None or name not in module.computations:
    return
  if inclusive:
    yield module.computations[name]
  for i in module.computations[name].instructions.values():
    if i.opcode in ('fusion', 'call', 'call-start', 'async-start') or (
      loops and i.opcode == 'while'
    ):
      for key in ('calls', 'to_apply', 'body'):
        yield from _called(module, i.attribute(key), inclusive=True, loops=loops)


def _is_matmul(i: Instruction) -> bool:
  return i.opcode in ('dot', 'convolution') or bool(re.search('gemm|matmul', i.target()))


def _is_bookkeeping(i: Instruction) -> bool:
  """A custom call by which the compiler talks to itself: `AllocateBuffer`, ..."""
  return i.opcode == 'custom-call' and i.target()[:1].isupper() and not i.cycles()


def _leaves(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
  return [
    (dtype, tuple(int(d) for d in dims.split(',') if d), layout or '')
    for dtype, dims, layout in _ARRAY.findall(shape)
  ]


def _arrays(computation: Computation, name: str) -> list[tuple[str, tuple[int, ...]]]:
  instruction = computation.instructions.get(name)
  return [(t, d) for t, d, _ in _leaves(instruction.shape)] if instruction else []


def _size(dtype: str, dims: tuple[int, ...]) -> int:
  """Bytes of an array, without the padding of its tiles."""
  if dtype == 'pred':
    bits = 8
  else:
    found = re.match(r'[a-z]+(\d+)', dtype)
    bits = int(found[1]) if found else 0  # a token has none
  count = 1
  for d in dims:
    count *= d
  return (count * bits + 7) // 8


def _hbm_size(shape: str) -> int:
  return sum(
    _size(dtype, dims)
    for dtype, dims, layout in _leaves(shape)
    if not _MEMORY_SPACE.search(layout)
  )


def _read_bytes(
  module: Module,
  computation: Computation,
  name: str,
  users: list[Instruction] | None = None,
) -> int:
  """Bytes of an array that its users (by default all) read."""
  full = _hbm_size(computation.instructions[name].shape)
  total = 0
  for user in users or [i for i in computation.instructions.values() if name in i.operands]:
    if user.opcode == 'bitcast':
      read = _read_bytes(module, computation, user.name)
    elif user.opcode == 'dynamic-slice' and user.operands[0] == name:
      read = _unplaced_size(user.shape)
    elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
      read = 0
    elif user.opcode == 'fusion' and user.attribute('calls') in module.computations:
      fused = module.computations[str(user.attribute('calls'))]
      places = [str(k) for k, o in enumerate(user.operands) if o == name]
      read = sum(
        _read_bytes(module, fused, p.name)
        for p in fused.instructions.values()
        if p.opcode == 'parameter' and p.arguments in places
      )
    else:
      return full
    total += read
  return min(total, full)


def _written_bytes(module: Module, computation: Computation, i: Instruction) -> int:
  """Bytes that an instruction writes to HBM; for an update in place, the update's."""
  fused = module.computations.get(i.attribute('calls') or '')
  root = fused.instructions[fused.root] if i.opcode == 'fusion' and fused else i
  leaves = _leaves(i.shape)
  parts = root.operands if root.opcode == 'tuple' else (root.name,) * len(leaves)
  total = 0
  for part, (dtype, dims, layout) in zip(parts, leaves, strict=False):
    if not _MEMORY_SPACE.search(layout):
      update = _update(fused or computation, part)
      total += _unplaced_size(update.shape) if update else _size(dtype, dims)
  return total


def _update(computation: Computation, name: str) -> Instruction | None:
  """What is put into an array in place, if that is how it comes about."""
  i = _origin(computation, name)
  if i is None or i.opcode != 'dynamic-update-slice':
    return None
  return computation.instructions.get(i.operands[1])


def _unplaced_size(shape: str) -> int:
  """Bytes of what crosses to or from HBM wherever this side of it lies."""
  return sum(_size(dtype, dims) for dtype, dims, _ in _leaves(shape))


def _group_size(i: Instruction, num_devices: int) -> int:
  """Devices of one group, from the four ways in which XLA writes groups."""
  if 'collective-permute' in i.opcode:
    return len(_pairs(i))
  text = i.attributes
  # mesh['x'=4,'y'=2], device_ids=(...) {'x'}; part of an axis: 'x':(1)2
  if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{('.*?)\}", text):
    sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    size = 1
    for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]):
      size *= int(part) if part else sizes[axis]
    return size
  if iota := re.search(r'replica_groups=\[\d+,(\d+)\]<=', text):
    return int(iota[1])
  if listed := re.search(r'replica_groups=\{\{([\d,]*)\}', text):
    return listed[1].count(',') + 1
  return num_devices


def _pairs(i: Instruction) -> list[tuple[str, str]]:
  found = re.search(r'source_target_pairs=\{(.*?)\}\}', i.attributes)
  return re.findall(r'\{(\d+),(\d+)', found[1]) if found else []


def _is_ring(i: Instruction) -> bool:
  pairs = _pairs(i)
  return len(pairs) > 1 and {s for s, _ in pairs} == {t for _, t in pairs}


def _torus_dims(i: Instruction) -> int:
  """Axes in a strategy's text: `num_dims:3 active_dims:011` uses two of three."""
  found = re.search(r'num_dims:(\d+)(?: active_dims:([01]+))?', i.attributes)
  if found is None:
    return 1
  active = found[2].count('1') if found[2] else int(found[1])
  return max(1, min(int(found[1]), active))
