"""What a device sends in one step, as a table."""

import collections
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

_BRANCH_NOTE = '? in a branch of unknown frequency, counted as always taken'
_LOOP_NOTE = '* in a loop of unknown length, counted as run once'
_NOTHING = 'no collectives: nothing is sent'
_COLUMNS = {
  'collective': 'left',
  'dtype': 'left',
  'shape': 'left',
  'axis': 'left',
  'link': 'left',
  'group': 'right',
  'bytes': 'right',  # each time
  'times': 'right',  # a step
  'count': 'right',
  'bytes a step': 'right',
  'source': 'left',
}


@dataclasses.dataclass(frozen=True)
class Collective:
  r"""One array that a collective of the compiled program carries.

  ``bytes_sent`` is what a ring algorithm makes a device send for each run of
  the collective, the mean over the devices. With :math:`B` the device's
  operand in bytes and :math:`W` the group's size:

  ========================  =============================================
  collective                bytes sent
  ========================  =============================================
  ``all-reduce``            :math:`2B(W-1)/W`
  ``all-gather``            :math:`B(W-1)`
  ``reduce-scatter``        :math:`B(W-1)/W`
  ``all-to-all``            :math:`B(W-1)/W`
  ``collective-broadcast``  :math:`B(W-1)/W`
  ``collective-permute``    :math:`B`, times the share of devices that send
                            to another one
  ========================  =============================================

  An ``all-gather`` is often stated by its output :math:`N = BW`, of which a
  device sends :math:`N(W-1)/W`.

  Attributes:
    kind: the collective, as the compiler spells it.
    dtype: the elements' type on the wire, by its JAX name. The compiler may
      have widened it: CPUs add up bfloat16 as float32.
    shape: shape of a device's operand. Where an ``all-to-all`` takes one chunk
      for each device, the chunks are stacked.
    operand_bytes: bytes of a device's operand.
    bytes_sent: bytes that a device sends for each run.
    axis: mesh axes that the groups span, separated by commas; ``'?'`` if the
      groups are not those of axes of a mesh that was found.
    link: the slowest link between devices of a group: ``'between slices'``
      (the data-centre network) or ``'chip links'`` on TPUs; ``'between
      hosts'`` or ``'inside a host'`` on others.
    group_size: devices in a group; the largest, where they differ.
    times: runs in a step. A collective in a branch that is taken every fifth
      step counts 1/5, in a loop of seven 7.
    source: what opened it, the tail of its name in the traced function.
    in_unknown_branch: it is in a branch of which nothing is known; ``times``
      counts it as always taken.
    in_unknown_loop: it is in a loop of unknown length; ``times`` counts it as
      run once.
  """

  kind: str
  dtype: str
  shape: tuple[int, ...]
  operand_bytes: int
  bytes_sent: float
  axis: str
  link: str
  group_size: int
  times: float
  source: str
  in_unknown_branch: bool = False
  in_unknown_loop: bool = False

  @property
  def bytes_a_step(self) -> float:
    """Bytes that a device sends for it in a step, on average."""
    return self.bytes_sent * self.times


@dataclasses.dataclass(frozen=True)
class Memory:
  """What a device's memory holds for the program, in bytes.

  Attributes:
    arguments: what it reads.
    outputs: what it returns.
    temporaries: what it needs meanwhile.
    aliased: outputs that take the place of donated arguments.
    code: the program itself.
  """

  arguments: int
  outputs: int
  temporaries: int
  aliased: int
  code: int

  @property
  def total(self) -> int:
    """All at once, donated arguments counted once."""
    return (
      self.arguments
      + self.outputs
      + self.temporaries
      + self.code
      - self.aliased
    )

  def __str__(self) -> str:
    return (
      f'Memory of a device: {_megabytes(self.total)} (arguments'
      f' {_megabytes(self.arguments)}, outputs {_megabytes(self.outputs)} of'
      f' which in place {_megabytes(self.aliased)}, temporaries'
      f' {_megabytes(self.temporaries)}, code {_megabytes(self.code)}).'
    )


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What a device sends in one step, made by :func:`jaxdist.traffic`.

  As text it is a table, in which equal rows are one row with a count.
  ``rich.print`` shows it as a ``rich`` table.

  Attributes:
    rows: one for each array that a collective carries, in the order of the
      program's text.
    memory: what a device's memory holds; None if the backend does not say.
  """

  rows: tuple[Collective, ...]
  memory: Memory | None = None

  @property
  def bytes_a_step(self) -> float:
    """Bytes that a device sends in a step, on average."""
    return math.fsum(row.bytes_a_step for row in self.rows)

  @property
  def payload_bytes(self) -> float:
    """Bytes of a device's operands in a step, before any algorithm.

    A compressor's payload is gathered once, so that this is its size.
    """
    return math.fsum(row.operand_bytes * row.times for row in self.rows)

  def by_axis(self) -> dict[str, float]:
    """Bytes a step for each mesh axis, or group of them."""
    return self._by(lambda row: row.axis)

  def by_link(self) -> dict[str, float]:
    """Bytes a step over each link."""
    return self._by(lambda row: row.link)

  def by_kind(self) -> dict[str, float]:
    """Bytes a step for each kind of collective."""
    return self._by(lambda row: row.kind)

  def _by(self, key: Callable[[Collective], str]) -> dict[str, float]:
    parts: dict[str, list[float]] = {}
    for row in self.rows:
      parts.setdefault(key(row), []).append(row.bytes_a_step)
    return {name: math.fsum(part) for name, part in sorted(parts.items())}

  def to_json(self) -> str:
    """The rows and totals as JSON.

    Returns:
      An object with ``rows``, ``bytes_a_step``, ``payload_bytes``,
      ``by_link`` and ``memory``.
    """
    return json.dumps(
      {
        'rows': [dataclasses.asdict(row) for row in self.rows],
        'bytes_a_step': self.bytes_a_step,
        'payload_bytes': self.payload_bytes,
        'by_link': self.by_link(),
        'memory': dataclasses.asdict(self.memory) if self.memory else None,
      },
      indent=2,
    )

  @classmethod
  def from_json(cls, text: str) -> 'Traffic':
    """The inverse of :meth:`to_json`.

    Args:
      text: what :meth:`to_json` returned.

    Returns:
      An equal :class:`Traffic`.
    """
    parsed = json.loads(text)
    return cls(
      tuple(
        Collective(**{**row, 'shape': tuple(row['shape'])})
        for row in parsed['rows']
      ),
      memory=Memory(**parsed['memory']) if parsed['memory'] else None,
    )

  def __str__(self) -> str:
    if not self.rows:
      return _NOTHING
    lines = [list(_COLUMNS), *self._cells()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
      '  '.join(
        cell.rjust(width) if align == 'right' else cell.ljust(width)
        for cell, width, align in zip(
          line, widths, _COLUMNS.values(), strict=True
        )
      ).rstrip()
      for line in lines
    ]
    return '\n'.join([*text, *self._footer()])

  def __rich__(self) -> Any:
    # rich is an optional dependency; only rich itself calls this method.
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if not self.rows:
      return Text(_NOTHING)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name, align in _COLUMNS.items():
      # In a narrow terminal words are folded; numbers stay whole.
      table.add_column(
        name, justify=align, overflow='fold', no_wrap=align == 'right'
      )
    for line in self._cells():
      table.add_row(*map(Text, line))
    return Group(table, *map(Text, self._footer()))

  def _cells(self) -> list[list[str]]:
    return [
      [
        row.kind,
        row.dtype,
        'x'.join(map(str, row.shape)) or 'scalar',
        row.axis,
        row.link,
        str(row.group_size),
        _number(row.bytes_sent),
        _times(row),
        str(count),
        _number(row.bytes_a_step * count),
        row.source,
      ]
      for row, count in collections.Counter(self.rows).items()
    ]

  def _footer(self) -> list[str]:
    links = '; '.join(
      f'{link}: {_number(sent)}' for link, sent in self.by_link().items()
    )
    lines = [
      f'A device sends {_number(self.bytes_a_step)} bytes a step ({links}).'
    ]
    if self.memory:
      lines.append(str(self.memory))
    if any(row.in_unknown_branch for row in self.rows):
      lines.append(_BRANCH_NOTE)
    if any(row.in_unknown_loop for row in self.rows):
      lines.append(_LOOP_NOTE)
    return lines


def _number(value: float) -> str:
  """Whole where it is whole, with two decimals where it is not."""
  return f'{value:,.0f}' if value == round(value) else f'{value:,.2f}'


def _megabytes(value: int) -> str:
  return f'{value / 1e6:,.1f} MB'


def _times(row: Collective) -> str:
  marks = '?' * row.in_unknown_branch + '*' * row.in_unknown_loop
  return f'{row.times:.4g}{marks}'
