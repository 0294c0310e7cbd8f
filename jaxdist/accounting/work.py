"""An estimate of what each instruction of a program computes.

Two counts, both from shapes alone: operations of matrix products and
convolutions, and bytes that go between a chip and its memory. Elementwise
operations cost nothing but their bytes; what is fused stays on the chip.
Collectives, copies that run by themselves, and renamings cost nothing.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from jaxdist.accounting import hlo, transfers, walk
from jaxdist.accounting.chips import Chip

_FREE = frozenset(
  {
    'parameter',
    'constant',
    'iota',
    'tuple',
    'get-tuple-element',
    'bitcast',
    'after-all',
    'add-dependency',
    'opt-barrier',
    'partition-id',
    'replica-id',
    'send',
    'recv',
    'domain',
  }
) | set(transfers.COLLECTIVES)
# These read or write a part of a large array.
_READS_A_PART = frozenset({'dynamic-slice', 'slice', 'gather'})
# These write a part of their first operand, where it lies: this other one.
_WRITES_A_PART = {'dynamic-update-slice': 1, 'scatter': -1}
_FREE_CALLS = re.compile(
  r'custom_call_target="(AsyncCollective\w+|PrepareAsync\w+|ConcatBitcast'
  r'|SliceId|AllocateBuffer|Sharding)"'
)
_WINDOW = re.compile(r'\bwindow=\{([^}]*)\}')
_DIM_LABELS = re.compile(r'\bdim_labels=(\w+)_(\w+)->(\w+)')


class Work(NamedTuple):
  """What a device does.

  Attributes:
    seconds: at the chip's best rates, where of each instruction only the
      slower of its two counts takes time.
    flops: operations of matrix products and convolutions; a multiplication
      and an addition are two.
    num_bytes: read from and written to memory.
  """

  seconds: float = 0.0
  flops: float = 0.0
  num_bytes: float = 0.0

  def plus(self, other: 'Work', times: float = 1.0) -> 'Work':
    """With some other work, done so many times."""
    return Work(
      *(mine + times * its for mine, its in zip(self, other, strict=True))
    )


NO_WORK = Work()


class Estimate:
  """Work of a program's instructions and computations on a chip.

  Args:
    program: a parsed program.
    chip: rates of the device that runs it.
  """

  def __init__(self, program: hlo.Program, chip: Chip):
    self._program = program
    self._chip = chip
    self._computations: dict[str, Work] = {}

  def computation(self, name: str) -> Work:
    """Work of all that a computation's schedule does, once."""
    if name not in self._computations:
      computation = self._program.computations[name]
      total = NO_WORK
      for instruction in computation.instructions.values():
        total = total.plus(self.instruction(computation, instruction))
      self._computations[name] = total
    return self._computations[name]

  def instruction(
    self, computation: hlo.Computation, instruction: hlo.Instruction
  ) -> Work:
    """Work of one instruction, with the loops, branches and calls in it.

    A loop of unknown length counts as run once. Of branches, the mean: those
    that say how often they are taken by that, the others alike.
    """
    opcode = instruction.opcode
    if opcode == 'while':
      trips = walk.trip_count(self._program, computation, instruction)
      (body,) = instruction.called('body')
      return NO_WORK.plus(
        self.computation(body), 1.0 if trips is None else float(trips)
      )
    if opcode == 'conditional':
      total = NO_WORK
      for name, share in walk.branch_shares(self._program, instruction):
        total = total.plus(self.computation(name), share)
      return total
    if opcode == 'call':
      (name,) = instruction.called('to_apply')
      return self.computation(name)
    flops, num_bytes = self._counts(computation, instruction)
    return Work(
      max(flops / self._chip.flops, num_bytes / self._chip.memory_bytes),
      flops,
      num_bytes,
    )

  def _counts(
    self, computation: hlo.Computation, instruction: hlo.Instruction
  ) -> tuple[float, int]:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(('-start', '-done', '-update')):
      return 0.0, 0
    if opcode == 'custom-call' and _FREE_CALLS.search(instruction.attributes):
      return 0.0, 0
    if opcode == 'fusion':
      flops = self._fused_flops(instruction)
      # Beside a collective, what is read and written is mostly the wire's.
      waits = any(transfers.called_collectives(self._program, instruction))
      return flops, 0 if waits else self._fused_bytes(computation, instruction)
    flops = _flops(computation, instruction)
    written = _num_bytes(instruction)
    if opcode in _READS_A_PART:
      return flops, 2 * written
    operands = computation.operands(instruction)
    if opcode in _WRITES_A_PART:
      part = operands[_WRITES_A_PART[opcode]]
      return flops, _num_bytes(part) + sum(map(_num_bytes, operands[1:]))
    return flops, written + sum(map(_num_bytes, operands))

  def _fused_flops(self, fusion: hlo.Instruction) -> float:
    (name,) = fusion.called('calls')
    fused = self._program.computations[name]
    return math.fsum(
      self._fused_flops(inner)
      if inner.opcode == 'fusion'
      else _flops(fused, inner)
      for inner in fused.instructions.values()
    )

  def _fused_bytes(
    self, computation: hlo.Computation, fusion: hlo.Instruction
  ) -> int:
    """Operands and results, of which a part is often all that is touched."""
    (name,) = fusion.called('calls')
    fused = self._program.computations[name]
    users: dict[str, list[hlo.Instruction]] = {}
    for inner in fused.instructions.values():
      for operand in inner.operands:
        users.setdefault(operand, []).append(inner)
    total = 0
    for inner in fused.instructions.values():
      if inner.opcode != 'parameter':
        continue
      readers = users.get(inner.name, [])
      if readers and all(_touches_a_part(inner, user) for user in readers):
        total += sum(
          _num_bytes(user) for user in readers if user.opcode in _READS_A_PART
        )
      else:
        total += _num_bytes(inner)
    roots = [fused.root]
    if fused.root.opcode == 'tuple':
      roots = fused.operands(fused.root)
    for root in roots:
      if root.opcode in _WRITES_A_PART:
        part = fused.operands(root)[_WRITES_A_PART[root.opcode]]
        total += 2 * _num_bytes(part)
      else:
        total += _num_bytes(root)
    return total


def _touches_a_part(operand: hlo.Instruction, user: hlo.Instruction) -> bool:
  if user.opcode in _WRITES_A_PART:
    return user.operands[0] == operand.name
  return user.opcode in _READS_A_PART and user.operands[0] == operand.name


def _num_bytes(instruction: hlo.Instruction) -> int:
  return sum(array.memory_bytes for array in instruction.arrays)


def _flops(computation: hlo.Computation, instruction: hlo.Instruction) -> float:
  """Operations of a matrix product or convolution; 0 for others.

  Examples:
    >>> program = hlo.parse('''HloModule m
    ... ENTRY %e (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {
    ...   %a = f32[8,16] parameter(0)
    ...   %b = f32[16,4] parameter(1)
    ...   ROOT %c = f32[8,4] convolution(%a, %b), dim_labels=bf_io->bf
    ... }''')
    >>> _flops(program.computations['e'], program.computations['e'].root)
    1024.0
  """
  if instruction.opcode == 'dot':
    left = computation.operands(instruction)[0].arrays[0].shape
    found = re.search(
      r'lhs_contracting_dims=\{([\d,]*)\}', instruction.attributes
    )
    dims = re.findall(r'\d+', found.group(1)) if found else []
    contracted = math.prod(left[int(dim)] for dim in dims)
    return 2.0 * math.prod(instruction.arrays[0].shape) * contracted
  if instruction.opcode == 'convolution':
    return 2.0 * _products_of_convolution(computation, instruction)
  return 0.0


def _products_of_convolution(
  computation: hlo.Computation, instruction: hlo.Instruction
) -> int:
  """Multiplications, without those of padding and of holes.

  TPUs spell batched matrix products as convolutions with many holes.
  """
  labels = _DIM_LABELS.search(instruction.attributes)
  left, right = computation.operands(instruction)
  sizes = [
    dict(zip(names, array.shape, strict=True))
    for names, array in zip(
      labels.groups(),
      (left.arrays[0], right.arrays[0], instruction.arrays[0]),
      strict=True,
    )
  ]
  inputs, kernel, outputs = sizes
  total = outputs['b'] * outputs['f'] * kernel['i']
  window = _WINDOW.search(instruction.attributes)
  values = dict(
    item.split('=') for item in (window.group(1).split() if window else [])
  )

  def value(name, dim, default):
    return values[name].split('x')[dim] if name in values else default

  for dim in range(len(inputs) - 2):
    place = np.arange(outputs[str(dim)])[:, None]
    place = place * int(value('stride', dim, 1))
    inside = np.arange(kernel[str(dim)]) * int(value('rhs_dilate', dim, 1))
    hole = int(value('lhs_dilate', dim, 1))
    place = place + inside - int(value('pad', dim, '0_0').split('_')[0])
    real = (place >= 0) & (place <= (inputs[str(dim)] - 1) * hole)
    total *= int(np.sum(real & (place % hole == 0)))
  return total
