"""When a transfer is open: positions in the compute of a schedule.

The text of a compiled program is scheduled: the order of a computation's
instructions is the order in which they run. Estimated work makes an axis of it
on which 0 is where the computation begins and 1 where it ends.
"""

import dataclasses
import itertools

from jaxdist.accounting import hlo
from jaxdist.accounting.work import Estimate


@dataclasses.dataclass(frozen=True)
class Span:
  """An instruction that computes.

  Attributes:
    name: the instruction.
    kind: ``'matmul'`` if matrix products are in it, ``'loop'``, ``'branch'``,
      or ``'other'``.
    start: where it begins, as a share of the schedule's compute.
    end: where it ends.
  """

  name: str
  kind: str
  start: float
  end: float


@dataclasses.dataclass(frozen=True)
class Schedule:
  """What one computation of a program does, in order.

  Attributes:
    name: the computation.
    kind: ``'program'``, ``'loop'``, ``'branch'`` or ``'call'``.
    seconds: estimate of its work done once, at the chip's best rates.
    spans: what computes, in order.
  """

  name: str
  kind: str
  seconds: float
  spans: tuple[Span, ...]


class Clocks:
  """The schedules of a program's computations, each worked out when asked for.

  Args:
    program: a parsed program.
    estimate: of its work.
  """

  def __init__(self, program: hlo.Program, estimate: Estimate):
    self._program = program
    self._estimate = estimate
    self._clocks: dict[str, Clock] = {}

  def of(self, computation: str) -> 'Clock':
    """The schedule of the computation of that name."""
    if computation not in self._clocks:
      self._clocks[computation] = Clock(
        self._estimate, self._program.computations[computation]
      )
    return self._clocks[computation]


class Clock:
  """Positions of a computation's instructions in its compute.

  Args:
    estimate: of the program's work.
    computation: one of its computations.

  Attributes:
    num_matmuls: instructions with matrix products in them.
  """

  def __init__(self, estimate: Estimate, computation: hlo.Computation):
    self._name = computation.name
    self._instructions = tuple(computation.instructions.values())
    self._order = {name: i for i, name in enumerate(computation.instructions)}
    work = [estimate.instruction(computation, i) for i in self._instructions]
    self._seconds = [w.seconds for w in work]
    ends = list(itertools.accumulate(self._seconds))
    scale = 1 / ends[-1] if ends[-1] else 0.0
    self._ends = [end * scale for end in ends]
    self._starts = [0.0, *self._ends[:-1]]
    self._matmuls = [i for i, w in enumerate(work) if w.flops]
    self.num_matmuls = len(self._matmuls)

  def interval(self, start: str, end: str | None) -> tuple[float, float]:
    """Positions before one instruction and behind another, or the last."""
    last = self._ends[-1 if end is None else self._order[end]]
    return self._starts[self._order[start]], last

  def matmuls_between(self, start: str, end: str | None) -> int:
    """Instructions with matrix products, of those from one to another."""
    first = self._order[start]
    last = len(self._order) if end is None else self._order[end]
    return sum(first <= i <= last for i in self._matmuls)

  def schedule(self, kind: str) -> Schedule:
    """All of it, for a plot."""
    matmuls = set(self._matmuls)
    spans = tuple(
      Span(
        instruction.name,
        _kind(instruction, i in matmuls),
        self._starts[i],
        self._ends[i],
      )
      for i, instruction in enumerate(self._instructions)
      if self._seconds[i]
    )
    return Schedule(self._name, kind, sum(self._seconds), spans)


def _kind(instruction: hlo.Instruction, has_matmul: bool) -> str:
  if instruction.opcode == 'while':
    return 'loop'
  if instruction.opcode == 'conditional':
    return 'branch'
  return 'matmul' if has_matmul else 'other'
