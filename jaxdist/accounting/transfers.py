"""The transfers in a computation, whatever form a compiler gives them.

- Opcodes by their name (``all-reduce``); these block.
- Pairs ``all-reduce-start``, ``all-reduce-done``; work between them overlaps.
- A computation with the collective, called by ``async-start`` or
  ``call-start`` (TPU: on the sparse cores) and awaited by its ``-done``.
- TPU, inside a slice: a chain of fusions, of which the first holds the
  collective and a custom call ``AsyncCollectiveStart``, the last one
  ``AsyncCollectiveDone``, and others a copy of the collective beside the work
  that hides it. One ``chain_id`` is one transfer.
- TPU: a fusion of an ``all-reduce`` and the slice of it that a chip keeps; the
  chip then only does the ``reduce-scatter``.
- TPU, between slices: ``send`` and ``recv`` to and from the host, whose
  attributes name what the hosts do with it. Open from ``send`` to
  ``recv-done``. A collective over both levels is several: an ``all-reduce`` is
  a ``reduce-scatter`` inside the slice, an ``all-reduce`` of a chip's part
  between slices, and an ``all-gather`` inside the slice.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from jaxdist.accounting import hlo

COLLECTIVES = frozenset(
  {
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'all-to-all',
    'collective-permute',
    'collective-broadcast',
  }
)
# These send too, but how much is not in the program's shapes.
_UNREADABLE = frozenset({'ragged-all-to-all', 'send', 'recv'})
_BETWEEN_SLICES = {
  'ALL_REDUCE': 'all-reduce',
  'ALL_GATHER': 'all-gather',
  'REDUCE_SCATTER': 'reduce-scatter',
  'ALL_TO_ALL': 'all-to-all',
  'ONE_TO_ONE': 'collective-permute',
}
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]+)"')
_TARGET = re.compile(r'_xla_megascale_target=("[^"]*"|\{.*?\}\})')
_CHAIN = re.compile(r'\bchain_id="(\w+)"')
_CHANNEL = re.compile(r'\bchannel_id=(\d+)')


@dataclasses.dataclass(frozen=True)
class Transfer:
  """A collective in the schedule of a computation.

  Attributes:
    kind: as the compiler spells it, without ``-start``.
    instruction: has the groups and the name.
    arrays: what a device puts in.
    start: name of the instruction, of this computation, that opens it.
    end: name of the one that waits for it; the same for one that blocks. None
      if the computation ends with it open.
  """

  kind: str
  instruction: hlo.Instruction
  arrays: tuple[hlo.Array, ...]
  start: str
  end: str | None

  @property
  def target(self) -> str:
    """Devices of a transfer between slices; nothing for others."""
    found = _TARGET.search(self.instruction.attributes)
    return found.group(1) if found else ''

  @property
  def rendezvous(self) -> str:
    """A name for one between slices, whose instructions bear none."""
    found = _RENDEZVOUS.search(self.instruction.attributes)
    return found.group(1) if found else ''


def find(program: hlo.Program, computation: hlo.Computation) -> list[Transfer]:
  """Finds the transfers that a computation's own schedule opens.

  Args:
    program: the program.
    computation: one of its computations. What its loops, branches and calls
      that wait do is not included.

  Returns:
    Transfers, in the order of the text.

  Raises:
    NotImplementedError: if the program sends in a way that has no known size.
  """
  ends = _Ends(computation)
  found: list[Transfer] = []
  chain_ends: dict[tuple[str, ...], str] = {}
  # Backwards, to know the end of a chain where it starts.
  for instruction in reversed(computation.instructions.values()):
    opcode = instruction.opcode.removesuffix('-start')
    if is_host_transfer(instruction):
      if instruction.opcode == 'send' and _MEGASCALE.search(
        instruction.attributes
      ):
        found.append(_between_slices(computation, instruction, ends))
    elif opcode in _UNREADABLE:
      raise NotImplementedError(
        f'The bytes of {instruction.opcode!r} ({instruction.op_name}) cannot'
        ' be read from the program.'
      )
    elif opcode in COLLECTIVES:
      arrays = _carried(opcode, computation, instruction)
      end = ends.of(instruction)
      found.append(Transfer(opcode, instruction, arrays, instruction.name, end))
    for parent, inner in called_collectives(program, instruction):
      chain = _CHAIN.search(inner.attributes)
      end = ends.of(instruction)
      if chain:
        key = (chain.group(1), *_CHANNEL.findall(inner.attributes))
        if _feeds(parent, inner, 'AsyncCollectiveDone'):
          chain_ends[key] = instruction.name
        if not _feeds(parent, inner, 'AsyncCollectiveStart'):
          continue
        end = chain_ends.pop(key, None)
      kind = inner.opcode
      if _keeps_a_part(program, parent, inner):
        kind = 'reduce-scatter'
      arrays = _carried(kind, parent, inner)
      found.append(Transfer(kind, inner, arrays, instruction.name, end))
  return found[::-1]


def called_collectives(
  program: hlo.Program, instruction: hlo.Instruction
) -> Iterator[tuple[hlo.Computation, hlo.Instruction]]:
  """Collectives inside a fusion, or a computation that runs beside this one.

  Args:
    program: the program.
    instruction: any instruction.

  Yields:
    Collectives, each behind the computation that it is in.
  """
  if instruction.opcode not in ('fusion', 'async-start', 'call-start'):
    return
  for name in instruction.called('calls', 'to_apply'):
    parent = program.computations[name]
    for inner in parent.instructions.values():
      if inner.opcode in COLLECTIVES:
        yield parent, inner
      yield from called_collectives(program, inner)


def is_host_transfer(instruction: hlo.Instruction) -> bool:
  """Whether it sends to its own host or receives from it.

  The hosts may then send on to other slices. Others, such as callbacks, end
  there.
  """
  return (
    instruction.opcode in ('send', 'recv')
    and 'is_host_transfer=true' in instruction.attributes
  )


def _between_slices(
  computation: hlo.Computation, send: hlo.Instruction, ends: '_Ends'
) -> Transfer:
  name = _MEGASCALE.search(send.attributes).group(1)
  if name not in _BETWEEN_SLICES:
    raise NotImplementedError(
      f'The bytes of a transfer {name} between slices cannot be read from the'
      ' program.'
    )
  meeting = _RENDEZVOUS.search(send.attributes)
  received = next(
    (
      other
      for other in computation.instructions.values()
      if other.opcode == 'recv'
      and meeting
      and meeting.group() in other.attributes
    ),
    None,
  )
  return Transfer(
    _BETWEEN_SLICES[name],
    send,
    computation.operands(send)[0].arrays,
    send.name,
    ends.of(received) if received else None,
  )


def _carried(
  kind: str, computation: hlo.Computation, instruction: hlo.Instruction
) -> tuple[hlo.Array, ...]:
  """What a collective carries; chunks of an ``all-to-all`` as one array."""
  arrays = tuple(
    array
    for operand in computation.operands(instruction)
    for array in operand.arrays
  )
  if kind == 'all-to-all' and len(arrays) > 1 and len(set(arrays)) == 1:
    chunk, count = arrays[0], (len(arrays),)
    padded = count + chunk.padded if chunk.padded else None
    return (hlo.Array(chunk.dtype, count + chunk.shape, padded),)
  return arrays


def _feeds(
  computation: hlo.Computation, instruction: hlo.Instruction, target: str
) -> bool:
  """Whether a custom call of that name reads the instruction."""
  return any(
    f'custom_call_target="{target}"' in user.attributes
    and instruction.name in user.operands
    for user in computation.instructions.values()
  )


def _keeps_a_part(
  program: hlo.Program,
  computation: hlo.Computation,
  instruction: hlo.Instruction,
) -> bool:
  """Whether a fusion reduces to all, and each device slices out its part."""
  root = computation.root
  if instruction.opcode != 'all-reduce' or root.opcode != 'dynamic-slice':
    return False
  size = len(hlo.replica_groups(instruction.attributes, program.num_devices)[0])
  (whole,), (part,) = instruction.arrays, root.arrays
  return root.operands[0] == instruction.name and math.prod(
    part.shape
  ) * size == math.prod(whole.shape)


class _Ends:
  """Where what a computation starts is awaited."""

  def __init__(self, computation: hlo.Computation):
    self._users: dict[str, list[hlo.Instruction]] = {}
    for instruction in computation.instructions.values():
      for operand in instruction.operands:
        self._users.setdefault(operand, []).append(instruction)

  def of(self, start: hlo.Instruction) -> str | None:
    """Name of the ``-done`` of a ``-start`` or ``recv``; else its own."""
    if not start.opcode.endswith('-start') and start.opcode != 'recv':
      return start.name
    names, seen = [start.name], {start.name}
    while names:
      for user in self._users.get(names.pop(), []):
        if user.opcode.endswith('-done'):
          return user.name
        passes_on = user.opcode.endswith('-update') or user.opcode in (
          'get-tuple-element',
          'tuple',
          'bitcast',
          'opt-barrier',
        )
        if passes_on and user.name not in seen:
          seen.add(user.name)
          names.append(user.name)
    return None
