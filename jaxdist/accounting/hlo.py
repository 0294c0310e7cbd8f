"""Reads a compiled program's text into computations and instructions.

Only what the accounting needs is understood: names, opcodes, operands, array
shapes, and an instruction's attributes as text.
"""

import dataclasses
import math
import re

import numpy as np

_COMPUTATION = re.compile(r'^(ENTRY )?%?([^\s(]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?(\S+) = (.*)$')
_INDEX_COMMENT = re.compile(r'/\*index=\d+\*/')
_OPCODE = re.compile(r'\s*([a-z][\w\-]*)\(')
_NAME = re.compile(r'%([\w.\-]+)')
_ARRAY = re.compile(
  r'\b([a-z]\w*)\[([\d,<= ]*)\]'
  r'(?:\{([\d,]*):T\(([\d,]+)\))?'  # {1,0:T(8,128)}: the order, then tiles
)
_OP_NAME = re.compile(r'\bop_name="((?:[^"\\]|\\.)*)"')

_IOTA = re.compile(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_MESH = re.compile(
  r'mesh\[([^\]]*)\]'  # 'dcn'=2,'data'=4
  r'(?:, device_ids=\(((?:[^()]|\([^()]*\))*)\))?'  # [2,4]T(1,0), or 1,0,..
  r' \{([^}]*)\}'  # 'data', or of a part of an axis 'data':(2)4
)
_MESH_AXIS = re.compile(r"'?([^',=]+)'?=(\d+)")
_GROUP_AXIS = re.compile(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?")

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Array:
  """One array.

  Attributes:
    dtype: element type, as the compiler spells it.
    shape: of its numbers.
    padded: shape in memory, where that is made of whole tiles, as on TPUs.
  """

  dtype: str
  shape: tuple[int, ...]
  padded: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)

  @property
  def num_bytes(self) -> int:
    """Bytes of the elements, those below a byte packed."""
    return self._bytes_of(self.shape)

  @property
  def memory_bytes(self) -> int:
    """The same with the padding."""
    return self._bytes_of(self.padded or self.shape)

  def _bytes_of(self, shape: tuple[int, ...]) -> int:
    width = re.search(r'\d+', self.dtype)  # f32, u4, f8e4m3fn; not pred
    bits = int(width.group()) if width else 8
    return -(-math.prod(shape) * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in the program.
    opcode: such as ``all-reduce``.
    operands: names of the instructions it reads.
    arrays: what it returns; several for a tuple.
    arguments: the text between its parentheses, such as a constant's value.
    attributes: the text behind its parentheses.
    is_root: whether the computation returns it.
  """

  name: str
  opcode: str
  operands: tuple[str, ...]
  arrays: tuple[Array, ...]
  arguments: str
  attributes: str
  is_root: bool

  @property
  def op_name(self) -> str:
    """Where it comes from: ``'jit(f)/shard_map/psum'``, or nothing."""
    found = _OP_NAME.search(self.attributes)
    return found.group(1) if found else ''

  def called(self, *attributes: str) -> tuple[str, ...]:
    """Names of the computations in the given attributes."""
    names = []
    for attribute in attributes:
      value = re.search(
        rf'\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)', self.attributes
      )
      names += _NAME.findall(value.group(1)) if value else []
    return tuple(names)


@dataclasses.dataclass(frozen=True)
class Computation:
  """A named list of instructions, in the order of their text."""

  name: str
  instructions: dict[str, Instruction]

  @property
  def root(self) -> Instruction:
    """The instruction whose value the computation returns."""
    return next(i for i in self.instructions.values() if i.is_root)

  def operands(self, instruction: Instruction) -> list[Instruction]:
    """The instructions that ``instruction``, one of this one's, reads."""
    return [self.instructions[name] for name in instruction.operands]


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program: one for all of its devices.

  Attributes:
    computations: by name.
    entry: name of the one that runs first.
    num_devices: how many devices run it.
  """

  computations: dict[str, Computation]
  entry: str
  num_devices: int


def parse(text: str) -> Program:
  """Reads the text of a compiled program (``compiled.as_text()``).

  Args:
    text: an HLO module.

  Returns:
    Its computations.

  Raises:
    ValueError: if ``text`` has no entry computation.
  """
  computations: dict[str, Computation] = {}
  entry = None
  current: dict[str, Instruction] = {}
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = {}
      computations[header.group(2)] = Computation(header.group(2), current)
      if header.group(1):
        entry = header.group(2)
    elif computations and (found := _INSTRUCTION.match(line)):
      instruction = _instruction(*found.groups())
      current[instruction.name] = instruction
  if entry is None:
    raise ValueError('text must be an HLO module with an ENTRY computation.')
  header_line = text.split('\n', 1)[0]
  return Program(
    computations,
    entry,
    num_devices=math.prod(
      int(count)
      for count in re.findall(
        r'\b(?:num_partitions|replica_count)=(\d+)', header_line
      )
    ),
  )


def _instruction(root: str | None, name: str, rest: str) -> Instruction:
  rest = _INDEX_COMMENT.sub('', rest)
  # The type is one word, or a tuple in parentheses.
  end = _closing(rest, 0) + 1 if rest[0] == '(' else rest.find(' ')
  result, rest = rest[:end], rest[end:]
  opcode = _OPCODE.match(rest)
  if not opcode:
    raise ValueError(f'Cannot read the HLO instruction {name!r}: {rest!r}')
  end = _closing(rest, opcode.end() - 1)
  arguments = rest[opcode.end() : end]
  return Instruction(
    name=name,
    opcode=opcode.group(1),
    operands=tuple(_NAME.findall(arguments)),
    arrays=arrays(result),
    arguments=arguments,
    attributes=rest[end + 1 :],
    is_root=root is not None,
  )


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at ``start``."""
  depth, quoted, escaped = 0, False, False
  for i in range(start, len(text)):
    c = text[i]
    if escaped:
      escaped = False
    elif quoted and c == '\\':
      escaped = True
    elif c == '"':
      quoted = not quoted
    elif not quoted and c == '(':
      depth += 1
    elif not quoted and c == ')':
      depth -= 1
      if not depth:
        return i
  raise ValueError(f'Unbalanced parentheses in HLO: {text[start:]!r}')


def arrays(text: str) -> tuple[Array, ...]:
  """The arrays in the text of a type.

  Examples:
    >>> arrays('(f32[8,16]{1,0}, pred[])')
    (Array(dtype='f32', shape=(8, 16)), Array(dtype='pred', shape=()))
  """
  return tuple(
    Array(dtype, _ints(dims), _padded(_ints(dims), _ints(order), _ints(tile)))
    for dtype, dims, order, tile in _ARRAY.findall(text)
    if dtype != 'token'
  )


def _padded(
  shape: tuple[int, ...], order: tuple[int, ...], tile: tuple[int, ...]
) -> tuple[int, ...] | None:
  """A shape in whole tiles, which lie in its most minor dimensions.

  Args:
    shape: of the numbers.
    order: dimensions, the most minor first.
    tile: sizes of a tile, the most minor last.

  Returns:
    The shape, or None where there are no tiles.

  Examples:
    >>> _padded((3, 24, 20), (2, 1, 0), (8, 128))
    (3, 24, 128)
    >>> _padded((), (), (128,))
    (128,)
  """
  if not tile:
    return None
  if len(shape) < len(tile):
    shape, order = (1, *shape), (*(dim + 1 for dim in order), 0)
    return _padded(shape, order, tile)
  padded = list(shape)
  for dim, size in zip(order, reversed(tile), strict=False):
    padded[dim] = -(-padded[dim] // size) * size
  return tuple(padded)


def replica_groups(attributes: str, num_devices: int) -> Groups:
  """The groups of devices that a collective runs in.

  The compiler prints them as lists, as a reshaped and transposed ``iota``, or
  as axes of a mesh.

  Args:
    attributes: attributes of an instruction.
    num_devices: how many devices run the program; where no groups are printed,
      they are all in one.

  Returns:
    Device numbers, from 0 up in the order in which the program's mesh lists
    its devices.

  Examples:
    >>> replica_groups('replica_groups={{0,1},{2,3}}', 4)
    ((0, 1), (2, 3))
    >>> replica_groups('replica_groups=[2,2]<=[2,2]T(1,0)', 4)
    ((0, 2), (1, 3))
    >>> replica_groups("replica_groups=mesh['dcn'=2,'data'=2] {'dcn'}", 4)
    ((0, 2), (1, 3))
    >>> replica_groups("replica_groups=mesh['data'=4] {'data':(1)2}", 4)
    ((0, 2), (1, 3))
  """
  everyone = (tuple(range(num_devices)),)
  start = attributes.find('replica_groups=')
  if start < 0:
    return everyone
  text = attributes[start + len('replica_groups=') :]
  if found := _MESH.match(text):
    return _groups_of_mesh(*found.groups())
  if found := _IOTA.match(text):
    return _rows(_iota(found.group(2), found.group(3), found.group(1)))
  groups = _lists(text)
  return groups or everyone


def source_target_pairs(attributes: str) -> Groups:
  """The (sender, receiver) pairs of a ``collective-permute``."""
  _, _, text = attributes.partition('source_target_pairs=')
  return _lists(text)


def _lists(text: str) -> Groups:
  """Reads ``{{0,1},{2,3}}``."""
  found = re.match(r'\{(?:\{[\d,]*\},?)*\}', text)
  inner = re.findall(r'\{([\d,]+)\}', found.group()) if found else []
  return tuple(_ints(group) for group in inner)


def _groups_of_mesh(axes: str, device_ids: str | None, group: str) -> Groups:
  sizes = {name: int(size) for name, size in _MESH_AXIS.findall(axes)}
  shape = tuple(sizes.values())
  devices = np.arange(math.prod(shape)).reshape(shape)
  if device_ids:
    iota = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?$', device_ids)
    devices = (
      _iota(*iota.groups()) if iota else np.array(_ints(device_ids))
    ).reshape(shape)
  # A part of an axis is an axis by itself once the whole is split in
  # (before it, the part, after it).
  parts = [
    (name, int(before or 1), int(size or sizes[name]))
    for name, before, size in _GROUP_AXIS.findall(group)
  ]
  split, grouped = [], []
  for name, size in sizes.items():
    done = 1
    for part in sorted(p for p in parts if p[0] == name):
      _, before, part_size = part
      split.append(before // done)
      grouped.append((parts.index(part), len(split)))
      split.append(part_size)
      done = before * part_size
    split.append(size // done)
  dims = [dim for _, dim in sorted(grouped)]
  rest = [dim for dim in range(len(split)) if dim not in dims]
  width = math.prod(split[dim] for dim in dims)
  return _rows(devices.reshape(split).transpose(rest + dims).reshape(-1, width))


def _iota(
  shape: str, permutation: str | None, final: str | None = None
) -> np.ndarray:
  dims = _ints(shape)
  numbers = np.arange(math.prod(dims)).reshape(dims)
  if permutation:
    numbers = numbers.transpose(_ints(permutation))
  return numbers.reshape(_ints(final)) if final else numbers


def _rows(numbers: np.ndarray) -> Groups:
  return tuple(tuple(row) for row in numbers.tolist())


def _ints(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in re.findall(r'\d+', text))
