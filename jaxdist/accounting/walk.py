"""How often each collective of a program runs in one step.

A loop multiplies by its trip count. A branch is taken as often as its scope
says: transforms open ``jax.named_scope('jaxdist.every.K')`` inside a branch
that runs in one of ``K`` steps, ``jaxdist.every.K_N`` in one that runs in ``N``
of them, and ``jaxdist.warmup.I`` in one that runs only at the start and counts
nothing in the long run. The compiler keeps scopes in the ``op_name`` of
instructions.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from jaxdist.accounting import hlo, transfers

_BRANCH = re.compile(r'\bbranch_\d+_fun\b')
_EVERY = re.compile(
  r'\bjaxdist\.(?:every\.([1-9]\d*)(?:_([1-9]\d*))?|warmup\.\d+)'
)


@dataclasses.dataclass(frozen=True)
class Run:
  """A collective and how often it runs in one call of the program.

  Attributes:
    transfer: the collective.
    computation: name of the one in whose schedule it is.
    within: what that is: ``'program'``, ``'loop'``, ``'branch'``, ``'call'``.
    times: mean number of runs in a step.
    in_unknown_branch: it is in a branch of unknown frequency, which ``times``
      counts as always taken.
    in_unknown_loop: it is in a loop of unknown length, which ``times`` counts
      as run once.
  """

  transfer: transfers.Transfer
  computation: str
  within: str
  times: Fraction
  in_unknown_branch: bool
  in_unknown_loop: bool


@dataclasses.dataclass(frozen=True)
class _Branch:
  """A branch that the walk is in.

  Attributes:
    depth: how many branches deep in the traced function, with those that the
      compiler removed.
    scopes: every ``K`` that instructions of the branch speak of.
  """

  depth: int
  scopes: frozenset[Fraction | float]


def every(op_name: str, depth: int) -> Fraction | float | None:
  """``K`` of the scope ``jaxdist.every.K`` in the branch at ``depth``.

  Only the first scope in a branch says how often it is taken: a second one
  belonged to an inner branch that is none any more, such as a ``cond`` that
  ``vmap`` made a ``select``, whose collectives always run.

  Args:
    op_name: an instruction's.
    depth: 1 for the outermost branch.

  Returns:
    ``K``, or ``K / N``; infinity for a warm-up; ``None`` if no scope was opened
    directly in that branch.

  Examples:
    >>> op_name = 'cond/branch_1_fun/jaxdist.every.5/cond/branch_0_fun/psum'
    >>> every(op_name, 1), every(op_name, 2)
    (Fraction(5, 1), None)
  """
  pieces = _BRANCH.split(op_name)
  scope = _EVERY.search(pieces[depth]) if depth < len(pieces) else None
  if not scope:
    return None
  return Fraction(int(scope[1]), int(scope[2] or 1)) if scope[1] else math.inf


def collectives(program: hlo.Program) -> Iterator[Run]:
  """Finds the collectives of a program, in the order of its text.

  Args:
    program: a parsed program.

  Yields:
    Each collective once for each place that it is called from.

  Raises:
    NotImplementedError: if the program sends in a way that has no known size.
  """
  yield from _visit(program, program.entry, 'program', Fraction(1), (), False)


def _visit(
  program: hlo.Program,
  name: str,
  within: str,
  times: Fraction,
  branches: tuple[_Branch, ...],
  in_unknown_loop: bool,
) -> Iterator[Run]:
  """Walks a computation that runs ``times`` times if all branches are taken."""
  computation = program.computations[name]
  opened: dict[str, list[transfers.Transfer]] = {}
  for transfer in transfers.find(program, computation):
    opened.setdefault(transfer.start, []).append(transfer)
  for instruction in computation.instructions.values():
    opcode = instruction.opcode
    for transfer in opened.get(instruction.name, []):
      scopes = [
        _branch_every(transfer.instruction, branch) for branch in branches
      ]
      yield Run(
        transfer,
        name,
        within,
        _part(times, scopes),
        in_unknown_branch=None in scopes,
        in_unknown_loop=in_unknown_loop,
      )
    if opcode == 'while':
      trips = trip_count(program, computation, instruction)
      unknown = in_unknown_loop or trips is None
      trips = 1 if trips is None else trips
      (body,) = instruction.called('body')
      (condition,) = instruction.called('condition')
      yield from _visit(program, body, 'loop', times * trips, branches, unknown)
      # Asked once more than it says yes.
      yield from _visit(
        program, condition, 'loop', times * (trips + 1), branches, unknown
      )
    elif opcode == 'conditional':
      # The compiler may have lost where the conditional comes from.
      depth = len(_BRANCH.split(instruction.op_name))
      if not instruction.op_name and branches:
        depth = branches[-1].depth + 1
      for branch in _branches(instruction):
        inside = _Branch(depth, _scopes(program, branch, depth))
        yield from _visit(
          program, branch, 'branch', times, (*branches, inside), in_unknown_loop
        )
    elif opcode in ('call', 'custom-call'):
      for called in instruction.called('to_apply', 'called_computations'):
        yield from _visit(
          program, called, 'call', times, branches, in_unknown_loop
        )


def branch_shares(
  program: hlo.Program, conditional: hlo.Instruction
) -> list[tuple[str, float]]:
  """How often each branch of a ``conditional`` is taken.

  Args:
    program: the program.
    conditional: the instruction.

  Returns:
    The computation of each branch, and the share of runs that take it: one in
    ``K`` where its scope says so; the others share the rest alike.
  """
  depth = len(_BRANCH.split(conditional.op_name))
  names = _branches(conditional)
  scopes = [_scopes(program, name, depth) for name in names]
  known = [
    float(1 / min(scope)) if len(scope) == 1 else None for scope in scopes
  ]
  rest = max(0.0, 1 - sum(share for share in known if share))
  unknown = known.count(None)
  return [
    (name, rest / unknown if share is None else share)
    for name, share in zip(names, known, strict=True)
  ]


def _branches(conditional: hlo.Instruction) -> tuple[str, ...]:
  return conditional.called(
    'branch_computations', 'true_computation', 'false_computation'
  )


def _part(
  times: Fraction, scopes: Sequence[Fraction | float | None]
) -> Fraction:
  """How many of ``times`` runs fall to branches that are taken so rarely."""
  if math.inf in scopes:
    return Fraction(0)
  return times / math.prod(scope or 1 for scope in scopes)


def _branch_every(
  instruction: hlo.Instruction, branch: _Branch
) -> Fraction | float | None:
  """How rarely a branch is taken: in one of how many steps, if known.

  Collectives that the partitioner inserts may bear no ``op_name``, or that of
  an argument: they are taken as rarely as what is beside them in the branch.
  """
  own = every(instruction.op_name, branch.depth)
  if own is None and len(branch.scopes) == 1:
    (own,) = branch.scopes
  return own


def _scopes(
  program: hlo.Program, name: str, depth: int
) -> frozenset[Fraction | float]:
  """All ``K`` that a branch's instructions, and what they call, speak of."""
  scopes: set[Fraction | float] = set()
  names, seen = [name], {name}
  while names:
    for instruction in program.computations[names.pop()].instructions.values():
      scopes |= {every(instruction.op_name, depth)} - {None}
      if instruction.opcode != 'conditional':
        called = set(
          instruction.called('to_apply', 'calls', 'body', 'condition')
        )
        names += called - seen
        seen |= called
  return frozenset(scopes)


def trip_count(
  program: hlo.Program,
  computation: hlo.Computation,
  loop: hlo.Instruction,
) -> int | None:
  """How often the body of a ``while`` runs, if the program says so.

  The compiler's own figure where there is one. Otherwise the condition must
  compare a counter, of known start and step, to a constant.

  Args:
    program: the program.
    computation: where the loop is.
    loop: the ``while`` instruction.

  Returns:
    The number of times, or ``None``.
  """
  known = re.search(
    r'\\?"known_trip_count\\?":\s*\{\\?"n\\?":\s*\\?"(\d+)', loop.attributes
  )
  if known:
    return int(known.group(1))
  (condition_name,) = loop.called('condition')
  (body_name,) = loop.called('body')
  compared = _compared(program, program.computations[condition_name])
  (carry,) = computation.operands(loop)
  if compared is None or carry.opcode != 'tuple':
    return None
  index, direction, bound = compared
  start = _constant(_origin(computation, computation.operands(carry)[index]))
  step = _step(program, program.computations[body_name], index)
  if start is None or not step or (direction[0] == 'L') != (step > 0):
    return None
  if direction in ('LE', 'GE'):
    bound += 1 if step > 0 else -1
  return max(0, math.ceil(Fraction(bound - start, step)))


def _compared(
  program: hlo.Program, condition: hlo.Computation
) -> tuple[int, str, int] | None:
  """Reads ``counter < bound`` as (tuple index, direction, bound)."""
  compare, operands = _operation(program, condition, condition.root)
  direction = re.search(r'direction=(LT|LE|GT|GE)', compare.attributes)
  if compare.opcode != 'compare' or not direction:
    return None
  counter, limit = operands
  bound = _constant(limit)
  if counter.opcode != 'get-tuple-element' or bound is None:
    return None
  return _index(counter), direction.group(1), bound


def _step(
  program: hlo.Program, body: hlo.Computation, index: int
) -> int | None:
  """What a loop's body adds to its counter."""
  if body.root.opcode != 'tuple':
    return None
  after = _origin(body, body.operands(body.root)[index])
  add, operands = _operation(program, body, after)
  if add.opcode != 'add':
    return None
  constants = [c for c in map(_constant, operands) if c is not None]
  counters = [o for o in operands if o.opcode == 'get-tuple-element']
  if len(constants) != 1 or list(map(_index, counters)) != [index]:
    return None
  return constants[0]


def _operation(
  program: hlo.Program,
  computation: hlo.Computation,
  instruction: hlo.Instruction,
) -> tuple[hlo.Instruction, list[hlo.Instruction]]:
  """An operation and what it reads, seen through a fusion around it."""
  if instruction.opcode != 'fusion':
    operands = computation.operands(instruction)
    return instruction, [_origin(computation, o) for o in operands]
  fused = program.computations[instruction.called('calls')[0]]
  arguments = computation.operands(instruction)
  operands = [
    arguments[int(o.arguments)] if o.opcode == 'parameter' else o
    for o in (_origin(fused, o) for o in fused.operands(fused.root))
  ]
  return fused.root, [
    _origin(computation, o) if o in arguments else o for o in operands
  ]


def _origin(
  computation: hlo.Computation, instruction: hlo.Instruction
) -> hlo.Instruction:
  """What an instruction copies."""
  while instruction.opcode in ('copy', 'bitcast'):
    (instruction,) = computation.operands(instruction)
  return instruction


def _constant(instruction: hlo.Instruction) -> int | None:
  is_integer = re.fullmatch(r'-?\d+', instruction.arguments)
  if instruction.opcode != 'constant' or not is_integer:
    return None
  return int(instruction.arguments)


def _index(get_tuple_element: hlo.Instruction) -> int:
  found = re.search(r'\bindex=(\d+)', get_tuple_element.attributes)
  return int(found.group(1)) if found else -1
