"""What a device sends in one step, as a table."""

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

from jaxdist.accounting.collective import Collective, Memory
from jaxdist.accounting.schedule import Schedule, Span
from jaxdist.accounting.work import NO_WORK, Work

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
  'overlap': 'right',  # share of the compute around it
  'source': 'left',
}


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What a device sends in one step, made by :func:`jaxdist.traffic`.

  As text it is a table, in which equal rows are one row with a count.
  ``rich.print`` shows it as a ``rich`` table.

  Attributes:
    rows: one for each array that a collective carries, in the order of the
      program's text.
    memory: what a device's memory holds; None if the backend does not say.
    work: what a device computes in a step, estimated from shapes.
    notes: what a reader should know, such as a type that is sent as another.
    schedules: of the program, and of loops and branches that send.
  """

  rows: tuple[Collective, ...]
  memory: Memory | None = None
  work: Work = NO_WORK
  notes: tuple[str, ...] = ()
  schedules: tuple[Schedule, ...] = dataclasses.field(
    default=(), compare=False, repr=False
  )

  @property
  def bytes_a_step(self) -> float:
    """Bytes that a device sends in a step, on average."""
    return math.fsum(row.bytes_a_step for row in self.rows)

  @property
  def padding_a_step(self) -> float:
    """The part of :attr:`bytes_a_step` that only fills tiles."""
    return math.fsum(row.padding_sent * row.times for row in self.rows)

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

  def plot_schedule(self, to: Any) -> None:
    """Draws when transfers are open beside the compute that hides them.

    A lane for compute and one for each link; the axis is compute, so that a
    transfer that blocks is a line. Needs matplotlib.

    Args:
      to: a path of an image (one panel for the program, and one for each loop
        and branch that sends), or the ``matplotlib`` axes to draw the
        program's own panel on.
    """
    # matplotlib is an optional dependency.
    from jaxdist.accounting import plot

    plot.plot_schedule(self, to)

  def to_json(self) -> str:
    """All of it as JSON.

    Returns:
      An object with the attributes and, for other readers, ``bytes_a_step``,
      ``payload_bytes`` and ``by_link``, and for each row ``bytes_received`` and
      ``overlap``.
    """
    derived = ('bytes_received', 'overlap')
    return json.dumps(
      {
        'rows': [
          dataclasses.asdict(row)
          | {name: getattr(row, name) for name in derived}
          for row in self.rows
        ],
        'bytes_a_step': self.bytes_a_step,
        'payload_bytes': self.payload_bytes,
        'by_link': self.by_link(),
        'memory': dataclasses.asdict(self.memory) if self.memory else None,
        'work': self.work._asdict(),
        'notes': self.notes,
        'schedules': [dataclasses.asdict(each) for each in self.schedules],
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
    names = {field.name for field in dataclasses.fields(Collective)}
    return cls(
      tuple(
        Collective(
          **{k: v for k, v in row.items() if k in names}
          | {'shape': tuple(row['shape'])}
        )
        for row in parsed['rows']
      ),
      memory=Memory(**parsed['memory']) if parsed['memory'] else None,
      work=Work(**parsed['work']),
      notes=tuple(parsed['notes']),
      schedules=tuple(
        Schedule(
          **{**each, 'spans': tuple(Span(**span) for span in each['spans'])}
        )
        for each in parsed['schedules']
      ),
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
        f'{self._overlap(row):.0%}',
        row.source,
      ]
      for row, count in collections.Counter(self.rows).items()
    ]

  def _overlap(self, equal: Collective) -> float:
    """Mean over the rows that are shown as one."""
    return statistics.fmean(r.overlap for r in self.rows if r == equal)

  def _footer(self) -> list[str]:
    links = '; '.join(
      f'{link}: {_number(sent)}' for link, sent in self.by_link().items()
    )
    lines = [
      f'A device sends {_number(self.bytes_a_step)} bytes a step ({links}).'
    ]
    if self.padding_a_step:
      share = self.padding_a_step / self.bytes_a_step
      lines.append(
        f'{share:.0%} of it is padding: whole tiles are sent, whatever the'
        ' shape.'
      )
    if self.memory:
      lines.append(str(self.memory))
    lines += self.notes
    if any(row.in_unknown_branch for row in self.rows):
      lines.append(_BRANCH_NOTE)
    if any(row.in_unknown_loop for row in self.rows):
      lines.append(_LOOP_NOTE)
    return lines


def _number(value: float) -> str:
  """Whole where it is whole, with two decimals where it is not."""
  return f'{value:,.0f}' if value == round(value) else f'{value:,.2f}'


def _times(row: Collective) -> str:
  marks = '?' * row.in_unknown_branch + '*' * row.in_unknown_loop
  return f'{row.times:.4g}{marks}'
