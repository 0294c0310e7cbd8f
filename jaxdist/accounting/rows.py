"""From a parsed program to rows of a table: bytes, axes, links."""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

from jaxdist.accounting import hlo, transfers, walk
from jaxdist.accounting.collective import Collective
from jaxdist.accounting.links import Places
from jaxdist.accounting.schedule import Clocks

# What tracing puts into a name by itself.
_PLUMBING = re.compile(
  r'shard_map|while|body|cond|branch_\d+_fun|closed_call|eval_jaxpr'
  r'|jaxdist\.every\.[\d_]+|jit\(<lambda>\)|(?:vmap|jvp)\(\)'
)
_HLO_DTYPE = re.compile(r'(bf|f|s|u|c)(\d+)(.*)')
_DTYPE_NAMES = {
  'bf': 'bfloat',
  'f': 'float',
  's': 'int',
  'u': 'uint',
  'c': 'complex',
}


def rows(
  program: hlo.Program, places: Places, clocks: Clocks
) -> Iterator[Collective]:
  """Lists what the devices of a program send.

  Args:
    program: a parsed program.
    places: its devices.
    clocks: the schedules of its computations.

  Yields:
    A row for each array that a collective among several devices carries.
  """
  for run in walk.collectives(program):
    transfer = run.transfer
    groups = _groups(transfer, program, places)
    if transfer.kind == 'collective-permute':
      pairs = tuple(pair for pair in groups if pair[0] != pair[1])
      axis = places.axis_of_pairs(pairs)
      groups = _connected(pairs)
      devices = len(places.devices) or program.num_devices
      sent = Fraction(len(pairs), devices)
    else:
      axis = places.axis_of_groups(groups)
      # Groups may differ in size: the mean over all devices.
      sent = Fraction(
        sum(_sent(transfer.kind, group, places) for group in groups),
        sum(map(len, groups)),
      )
    largest = max(groups, key=len, default=())
    if len(largest) <= 1:
      continue
    clock = clocks.of(run.computation)
    start, end = clock.interval(transfer.start, transfer.end)
    for array in transfer.arrays:
      yield Collective(
        kind=transfer.kind,
        dtype=_dtype(array.dtype),
        shape=array.shape,
        operand_bytes=array.num_bytes,
        bytes_sent=float(sent * array.memory_bytes),
        padding_sent=float(sent * (array.memory_bytes - array.num_bytes)),
        axis=axis,
        link=places.link(largest),
        group_size=len(largest),
        times=float(run.times),
        source=_source(transfer),
        in_unknown_branch=run.in_unknown_branch,
        in_unknown_loop=run.in_unknown_loop,
        schedule=run.computation,
        within=run.within,
        start=start,
        end=end,
        matmuls=clock.num_matmuls,
        matmuls_inside=clock.matmuls_between(transfer.start, transfer.end),
      )


def _groups(
  transfer: transfers.Transfer, program: hlo.Program, places: Places
) -> hlo.Groups:
  """Groups of positions in the mesh; pairs for a ``collective-permute``."""
  if transfer.target:
    return places.groups_between_slices(transfer.target)
  attributes = transfer.instruction.attributes
  if transfer.kind == 'collective-permute':
    return places.groups(hlo.source_target_pairs(attributes))
  return places.groups(hlo.replica_groups(attributes, program.num_devices))


def _sent(kind: str, group: Sequence[int], places: Places) -> Fraction:
  """What a group's devices send in all, for each byte of one's operand."""
  size = len(group)
  if kind == 'all-to-all':
    # Chunks for devices of the same slice do not cross.
    return Fraction(places.pairs_apart(group), size)
  # A ring algorithm.
  if kind == 'all-gather':
    return Fraction(size * (size - 1))
  return Fraction((size - 1) * (2 if kind == 'all-reduce' else 1))


def _connected(pairs: hlo.Groups) -> hlo.Groups:
  """Devices that reach each other through pairs."""
  groups: list[set[int]] = []
  for pair in pairs:
    joined = set(pair).union(*(g for g in groups if not g.isdisjoint(pair)))
    groups = [g for g in groups if g.isdisjoint(pair)] + [joined]
  return tuple(tuple(sorted(group)) for group in groups)


def _dtype(name: str) -> str:
  """JAX's name of an element type: ``float32`` for ``f32``."""
  found = _HLO_DTYPE.fullmatch(name)
  if not found:
    return 'bool' if name == 'pred' else name
  letters, bits, variant = found.groups()
  return f'{_DTYPE_NAMES[letters]}{bits}{variant and "_"}{variant}'


def _source(transfer: transfers.Transfer) -> str:
  """The end of a collective's name in the traced function."""
  instruction = transfer.instruction
  parts = instruction.op_name.split('/')
  if parts[0].startswith('jit('):
    del parts[0]  # The step itself.
  parts = [part for part in parts if not _PLUMBING.fullmatch(part)]
  if name := '/'.join(parts[-3:]):
    # JAX spells a psum whose result is the same everywhere psum_invariant.
    return name.removesuffix('_invariant')
  # TPU compilers drop most names: psum.7_0 of a meeting, all-gather.9 else.
  name = transfer.rendezvous or instruction.name
  return re.sub(r'(_invariant)?(-start)?(\.\d+)?(_\d+)?$', '', name)
