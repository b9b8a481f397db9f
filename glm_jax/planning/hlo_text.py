"""HLO as text: instructions, computations, loops, groups, and the bytes they move."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from glm_jax import configs

# The printer's layout: a computation's header begins in the first column and ends with a
# brace, an instruction is indented by two spaces.
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'  (ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r' ([a-z][a-z0-9\-]*)\(')
OPERAND = re.compile(r'%([\w.\-]+)')
# An array's dtype, dimensions and layout: bf16[8,128]{1,0:T(8,128)S(1)}.
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_PARENTHESIS = re.compile(r'[()]')
# Memory spaces other than HBM, which is 0 and is not printed; S(1) is VMEM.
_MEMORY_SPACE = re.compile(r'S\([1-9]')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# What the cost model writes where it has no estimate.
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
    match = re.search(rf'\b{name}=%([\w.\-]+)', self.attributes)
    return match[1] if match else None

  def target(self) -> str:
    match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return match[1] if match else ''

  def cycles(self) -> int:
    match = _CYCLES.search(self.attributes)
    cycles = int(match[1]) if match else 0
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


def parse(text: str) -> Module:
  """Reads optimized HLO text.

  Raises:
    UserError: there is no ENTRY computation in it.
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
    # A brace ends a computation; metadata may have a line that begins with two.
    elif line.startswith('}') and not line.startswith('}}'):
      finish()
      if not root and instructions:
        root = next(reversed(instructions))
      computations[name], name = Computation(name, instructions, root), None
    elif _INSTRUCTION.match(line):
      finish()
      pending = line
    else:
      # A kernel's metadata holds line breaks: the instruction goes on.
      pending += line
  configs.check(
    entry is not None,
    'The text of an executable must have an ENTRY computation',
    f'{len(text):,} characters without one',
    'pass `compiled.as_text()`',
  )
  # The first line has both counts; one that is 1 is left out.
  head = text[: text.find('\n')]
  counts = [re.search(rf'{k}=(\d+)', head) for k in ('replica_count', 'num_partitions')]
  replicas, partitions = (int(c[1]) if c else 1 for c in counts)
  return Module(computations, str(entry), replicas * partitions)


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
  # The condition may be a fusion: its limit is taken to be the largest constant in it.
  constants = [
    int(i.arguments)
    for computation in called(module, loop.attribute('condition'), inclusive=True)
    for i in computation.instructions.values()
    if _is_integer(i)
  ]
  return max(constants) if constants and max(constants) > 0 else None


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
  # Operands may be tuples with shapes of their own: the parentheses have to be counted.
  depth, end = 1, len(line)
  for parenthesis in _PARENTHESIS.finditer(line, opcode.end()):
    depth += 1 if parenthesis[0] == '(' else -1
    if depth == 0:
      end = parenthesis.start()
      break
  arguments = line[opcode.end() : end]
  return Instruction(
    name=start[2],
    opcode=opcode[1],
    shape=line[start.end() : opcode.start()],
    operands=tuple(OPERAND.findall(arguments)),
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
  # The loop's state is a tuple: `start` builds it before the loop, `test` reads it, `end`
  # builds the next one. The counter is one element of all three.
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
    # Not a constant itself, but perhaps an element that the body passes on as it is: then
    # what the loop began with is its value throughout.
    k = _element(computation, name)
    if k is None or computation is holder or _element(body, end.operands[k]) != k:
      return None  # what the loop changes is no constant
    return value(holder, start.operands[k])

  limit, first = value(condition, test.operands[1]), value(holder, start.operands[index])
  add = _origin(body, end.operands[index])
  if limit is None or add is None or add.opcode != 'add':
    return None
  # counter + step, in either order: the operand that is not the counter.
  steps = [value(body, o) for o in add.operands if _element(body, o) != index]
  if len(steps) != 1 or not steps[0] or steps[0] < 0:
    return None
  # Rounded up; a counter that starts at no readable number is taken to start at 0.
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
  index = re.search(r'\bindex=(\d+)', i.attributes)
  return int(index[1]) if index and source and source.opcode == 'parameter' else None


def called(
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
        yield from called(module, i.attribute(key), inclusive=True, loops=loops)


def _leaves(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
  return [
    (dtype, tuple(int(d) for d in dims.split(',') if d), layout or '')
    for dtype, dims, layout in _ARRAY.findall(shape)
  ]


def arrays(computation: Computation, name: str) -> list[tuple[str, tuple[int, ...]]]:
  instruction = computation.instructions.get(name)
  return [(t, d) for t, d, _ in _leaves(instruction.shape)] if instruction else []


def array_size(dtype: str, dims: tuple[int, ...]) -> int:
  """Bytes of an array, without the padding of its tiles."""
  if dtype == 'pred':
    bits = 8
  else:
    # bf16, s4, f8e4m3fn: the first number is the width. A token has none.
    width = re.match(r'[a-z]+(\d+)', dtype)
    bits = int(width[1]) if width else 0
  count = 1
  for d in dims:
    count *= d
  return (count * bits + 7) // 8


def hbm_size(shape: str) -> int:
  return sum(
    array_size(dtype, dims)
    for dtype, dims, layout in _leaves(shape)
    if not _MEMORY_SPACE.search(layout)
  )


def read_bytes(
  module: Module,
  computation: Computation,
  name: str,
  users: list[Instruction] | None = None,
) -> int:
  """Bytes of an array that its users (by default all) read."""
  full = hbm_size(computation.instructions[name].shape)
  total = 0
  for user in users or [i for i in computation.instructions.values() if name in i.operands]:
    # The same bytes under another shape: what its users read.
    if user.opcode == 'bitcast':
      read = read_bytes(module, computation, user.name)
    elif user.opcode == 'dynamic-slice' and user.operands[0] == name:
      read = _unplaced_size(user.shape)
    elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
      read = 0
    elif user.opcode == 'fusion' and user.attribute('calls') in module.computations:
      fused = module.computations[str(user.attribute('calls'))]
      # A fusion reads through its parameters: those whose argument is this array.
      parameters = [str(k) for k, o in enumerate(user.operands) if o == name]
      read = sum(
        read_bytes(module, fused, p.name)
        for p in fused.instructions.values()
        if p.opcode == 'parameter' and p.arguments in parameters
      )
    else:
      return full
    total += read
  return min(total, full)


def written_bytes(module: Module, computation: Computation, i: Instruction) -> int:
  """Bytes that an instruction writes to HBM; for an update in place, the update's."""
  fused = module.computations.get(i.attribute('calls') or '')
  root = fused.instructions[fused.root] if i.opcode == 'fusion' and fused else i
  leaves = _leaves(i.shape)
  # A fusion of several outputs has a tuple at its root: one element an array.
  parts = root.operands if root.opcode == 'tuple' else (root.name,) * len(leaves)
  total = 0
  for part, (dtype, dims, layout) in zip(parts, leaves, strict=False):
    if not _MEMORY_SPACE.search(layout):
      update = _update(fused or computation, part)
      total += _unplaced_size(update.shape) if update else array_size(dtype, dims)
  return total


def group_size(i: Instruction, num_devices: int) -> int:
  """Devices of one group, from the four ways in which XLA writes groups."""
  if 'collective-permute' in i.opcode:
    return len(sent_pairs(i))
  text = i.attributes
  # mesh['x'=4,'y'=2], device_ids=(...) {'x'}; part of an axis: 'x':(1)2
  if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{('.*?)\}", text):
    sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    size = 1
    for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]):
      size *= int(part) if part else sizes[axis]
    return size
  # [groups,size]<=[...]: the groups as an iota.
  if iota := re.search(r'replica_groups=\[\d+,(\d+)\]<=', text):
    return int(iota[1])
  # {{0,1},{2,3}}: every device by name; all groups are of one size.
  if listed := re.search(r'replica_groups=\{\{([\d,]*)\}', text):
    return listed[1].count(',') + 1
  return num_devices


def sent_pairs(i: Instruction) -> list[tuple[str, str]]:
  """(source, target) of each transfer of a collective-permute."""
  pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', i.attributes)
  return re.findall(r'\{(\d+),(\d+)', pairs[1]) if pairs else []


def torus_dims(i: Instruction) -> int:
  """Axes in a strategy's text: `num_dims:3 active_dims:011` uses two of three."""
  dims = re.search(r'num_dims:(\d+)(?: active_dims:([01]+))?', i.attributes)
  if dims is None:
    return 1
  active = dims[2].count('1') if dims[2] else int(dims[1])
  return max(1, min(int(dims[1]), active))


def _update(computation: Computation, name: str) -> Instruction | None:
  """What is put into an array in place, if that is how it comes about."""
  i = _origin(computation, name)
  if i is None or i.opcode != 'dynamic-update-slice':
    return None
  return computation.instructions.get(i.operands[1])


def _unplaced_size(shape: str) -> int:
  """Bytes of what crosses to or from HBM wherever this side of it lies."""
  return sum(array_size(dtype, dims) for dtype, dims, _ in _leaves(shape))
