"""A picture of a schedule: compute in one lane, each link in another."""

import math
import os
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from jaxdist.accounting.collective import Collective
from jaxdist.accounting.schedule import Schedule

_COMPUTE = {
  'matmul': '#4c78a8',
  'loop': '#9ecae9',
  'branch': '#b6a6ca',
  'other': '#d4d4d4',
}
_COMPUTE_NAMES = {
  'matmul': 'matrix products',
  'loop': 'loop',
  'branch': 'branch',
  'other': 'other compute',
}
_LINKS = {
  'between slices': '#e45756',
  'between hosts': '#e45756',
  'chip links': '#f2a65a',
  'inside a host': '#f2a65a',
  '?': '#888888',
}
_BAR = 0.8
_LETTER = 0.0061  # about the width of one in a label, as a share of the axis
_MOST_LANES = 12  # of one link
_BLOCKING = 0.004  # drawn width of a transfer with no compute beside it


def plot_schedule(traffic: Any, to: Any) -> None:
  """Draws a :class:`jaxdist.Traffic`, as its ``plot_schedule`` says.

  Args:
    traffic: what to draw.
    to: a path, or ``matplotlib`` axes.
  """
  if not isinstance(to, str | os.PathLike):
    _panel(to, traffic.schedules[0], _rows_of(traffic, traffic.schedules[0]))
    return
  panels = [
    (schedule, rows)
    for schedule in traffic.schedules
    if (rows := _rows_of(traffic, schedule)) or schedule.kind == 'program'
  ]
  heights = [1.2 + sum(map(len, _stacked(rows).values())) for _, rows in panels]
  figure = Figure(
    figsize=(10, 1.0 + sum(0.8 + 0.34 * height for height in heights)),
    layout='constrained',
  )
  axes = figure.subplots(
    len(panels), squeeze=False, gridspec_kw={'height_ratios': heights}
  )[:, 0]
  for panel, (schedule, rows) in zip(axes, panels, strict=True):
    _panel(panel, schedule, rows)
  figure.savefig(to, dpi=150)


def _rows_of(traffic: Any, schedule: Schedule) -> list[Collective]:
  return [row for row in traffic.rows if row.schedule == schedule.name]


class _Bar(NamedTuple):
  """Transfers of one link that are drawn as one.

  Attributes:
    link: their link.
    start: of the bar.
    end: likewise.
    label: what it says.
    left: of bar and label.
    right: likewise.
    label_at: where the label is anchored.
    label_side: which end of the label is there.
  """

  link: str
  start: float
  end: float
  label: str
  left: float
  right: float
  label_at: float
  label_side: str


def _bar(rows: list[Collective]) -> _Bar:
  """Puts the label on the bar if it fits, else where there is room."""
  # One that blocks at the very end is still to be seen.
  start = min(min(row.start for row in rows), 1 - _BLOCKING)
  end = max(max(row.end for row in rows), start + _BLOCKING)
  label = _size(sum(row.bytes_sent for row in rows))
  kinds = {row.kind for row in rows}
  name = kinds.pop() if len(kinds) == 1 else 'transfers'
  label = (
    f'{len(rows)} x {name}, {label}' if len(rows) > 1 else (f'{name} {label}')
  )
  bar = (rows[0].link, start, end, label)
  width = _LETTER * (len(label) + 2)
  if width < end - start:
    return _Bar(*bar, start, end, (start + end) / 2, 'center')
  if end + width < 1:
    return _Bar(*bar, start, end + width, end + _LETTER, 'left')
  return _Bar(*bar, start - width, end, start - _LETTER, 'right')


def _lanes(groups: list[list[Collective]]) -> list[list[_Bar]]:
  """Lines of bars, of which none touches the next."""
  lanes: list[list[_Bar]] = []
  for bar in sorted(map(_bar, groups), key=lambda bar: (bar.left, -bar.right)):
    for lane in lanes:
      if lane[-1].right <= bar.left:
        lane.append(bar)
        break
    else:
      lanes.append([bar])
  return lanes


def _stacked(rows: list[Collective]) -> dict[str, list[list[_Bar]]]:
  """For each link its lanes; where they would be many, what touches is one."""
  links: dict[str, list[Collective]] = {}
  for row in sorted(rows, key=lambda row: (row.start, row.end)):
    links.setdefault(row.link, []).append(row)
  stacked = {}
  for link, of_link in sorted(links.items()):
    lanes = _lanes([[row] for row in of_link])
    if len(lanes) > _MOST_LANES:
      lanes = _lanes(_touching(of_link))
    stacked[link] = lanes
  return stacked


def _touching(rows: list[Collective]) -> list[list[Collective]]:
  """Rows in groups, between which nothing is open."""
  groups: list[list[Collective]] = []
  end = -math.inf
  for row in rows:
    if row.start <= end + 2 * _BLOCKING:
      groups[-1].append(row)
    else:
      groups.append([row])
    end = max(end, row.end)
  return groups


def _panel(axes: Any, schedule: Schedule, rows: list[Collective]) -> None:
  for span in schedule.spans:
    axes.barh(
      0,
      span.end - span.start,
      left=span.start,
      height=_BAR,
      color=_COMPUTE[span.kind],
      edgecolor='white',
      linewidth=0.4 if span.kind != 'other' else 0,
    )
  ticks, labels, lane = [0.0], ['compute'], 1
  for link, lanes in _stacked(rows).items():
    ticks.append(lane + (len(lanes) - 1) / 2)
    labels.append(link)
    for bars in lanes:
      for bar in bars:
        _transfer(axes, lane, bar)
      lane += 1
  axes.set_yticks(ticks, labels)
  axes.set_ylim(lane - 0.4, -0.6)
  axes.set_xlim(0, 1)
  axes.xaxis.set_major_formatter(PercentFormatter(1))
  axes.set_xlabel('share of compute')
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.tick_params(axis='y', length=0)
  title = {'program': 'the step', 'loop': 'body of a loop'}.get(
    schedule.kind, f'a {schedule.kind}'
  )
  axes.set_title(f'{title} ({schedule.name})', loc='left', fontsize=10)
  kinds = {span.kind for span in schedule.spans}
  axes.legend(
    handles=[
      Patch(color=color, label=_COMPUTE_NAMES[kind])
      for kind, color in _COMPUTE.items()
      if kind in kinds
    ],
    loc='lower right',
    bbox_to_anchor=(1, 1),
    ncols=4,
    frameon=False,
    fontsize=8,
  )


def _transfer(axes: Any, lane: int, bar: _Bar) -> None:
  axes.barh(
    lane,
    bar.end - bar.start,
    left=bar.start,
    height=_BAR,
    color=_LINKS[bar.link],
    edgecolor='white',
    linewidth=0.4,
  )
  axes.text(
    bar.label_at, lane, bar.label, ha=bar.label_side, va='center', fontsize=7
  )


def _size(num_bytes: float) -> str:
  for unit, scale in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if num_bytes >= scale:
      return f'{num_bytes / scale:.3g} {unit}'
  return f'{num_bytes:.3g} B'
