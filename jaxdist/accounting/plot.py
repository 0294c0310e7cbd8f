"""A picture of a schedule: compute in one lane, each link in another."""

import os
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

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


def _stacked(
  rows: list[Collective],
) -> dict[str, list[list[Collective]]]:
  """For each link lines of transfers, of which none touches the next."""
  links: dict[str, list[list[Collective]]] = {}
  for row in sorted(rows, key=lambda row: (row.start, -row.end)):
    lines = links.setdefault(row.link, [])
    for line in lines:
      if _drawn_end(line[-1]) <= row.start:
        line.append(row)
        break
    else:
      lines.append([row])
  return dict(sorted(links.items()))


def _drawn_end(row: Collective) -> float:
  return max(row.end, row.start + _BLOCKING)


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
  for link, lines in _stacked(rows).items():
    ticks.append(lane + (len(lines) - 1) / 2)
    labels.append(link)
    for line in lines:
      for row in line:
        _transfer(axes, lane, row)
      lane += 1
  axes.set_yticks(ticks, labels)
  axes.set_ylim(lane - 0.4, -0.6)
  axes.set_xlim(0, 1)
  axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
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


def _transfer(axes: Any, lane: int, row: Collective) -> None:
  width = _drawn_end(row) - row.start
  axes.barh(
    lane,
    width,
    left=row.start,
    height=_BAR,
    color=_LINKS[row.link],
    edgecolor='white',
    linewidth=0.4,
  )
  label = f'{row.kind} {_size(row.bytes_sent)}'
  # About how much of the width a letter takes.
  if width > 0.011 * len(label):
    axes.text(
      row.start + width / 2, lane, label, ha='center', va='center', fontsize=7
    )
  elif row.start < 0.7:
    axes.text(
      row.start + width + 0.004, lane, label, ha='left', va='center', fontsize=7
    )
  else:
    axes.text(row.start - 0.004, lane, label, ha='right', va='center', fontsize=7)


def _size(num_bytes: float) -> str:
  for unit, scale in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if num_bytes >= scale:
      return f'{num_bytes / scale:.3g} {unit}'
  return f'{num_bytes:.3g} B'
