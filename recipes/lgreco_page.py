"""What levels by leaf came to on the language model: a table and a page."""

import html
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import record
from compared import with_error
from compared_plots import over_bytes
from page import COLORS, html_table, page, size, svg
from rich.table import Table

COLUMNS = ('levels', 'loss', 'above dense', 'sent a step', 'at equal loss')
UNITS = (
  'Validation loss in nats a byte, mean over the seeds and its standard error; '
  'above dense: mean of the ratios to the run of the same seed. Sent by each '
  'worker, from the compiled programs, vectors and all. At equal loss: bytes '
  'saved against one level for all that ends at the same loss, read from a '
  'straight line of log loss over log bytes between two levels; in brackets '
  'the least and the most of single seeds. A dash: no two levels enclose it.'
)


class Row(NamedTuple):
  """One way over the seeds.

  Attributes:
    kind: of compression; empty for dense.
    way: how leaves get their levels.
    losses: at the end, by seed.
    sent: bytes that a worker sends a step, in the mean, by seed.
    above: losses over those of dense, less 1.
    saved: part of the bytes, at the mean loss and then by seed; NaN where it
      cannot be read, and everywhere where all have one level.
  """

  kind: str
  way: str
  losses: np.ndarray
  sent: np.ndarray
  above: np.ndarray
  saved: np.ndarray

  @property
  def has_one_level(self) -> bool:
    return self.way.startswith('all ')


def bytes_at(loss: float, points: Sequence[tuple[float, float]]) -> float:
  """Where a curve first comes to a loss.

  Args:
    loss: to look for.
    points: bytes and losses of the curve, straight between their logarithms.

  Returns:
    Bytes; NaN if it nowhere comes to it.

  Examples:
    >>> round(bytes_at(2.0, [(10.0, 4.0), (40.0, 1.0)]), 6)
    20.0
  """
  for (fewer, high), (more, low) in itertools.pairwise(points):
    if high != low and min(high, low) <= loss <= max(high, low):
      part = math.log(high / loss) / math.log(high / low)
      return fewer * (more / fewer) ** part
  return math.nan


def rows_of(found: Mapping[tuple[str, str], list[dict]]) -> list[Row]:
  """A row for each way, from its runs; the first is what others are above."""
  rows, first = [], None
  for (kind, way), runs in found.items():
    losses, sent = (
      np.array([run[name] for run in runs], float) for name in ('loss', 'sent')
    )
    first = losses if first is None else first
    rows.append(Row(kind, way, losses, sent, losses / first - 1, np.array([])))
  return [row._replace(saved=saved_by(row, rows)) for row in rows]


def saved_by(row: Row, rows: Sequence[Row]) -> np.ndarray:
  """What a row saves against those of one level of its kind."""
  seeds = len(row.losses)
  if row.has_one_level:
    return np.full(1 + seeds, math.nan)
  curve = [r for r in rows if r.kind == row.kind and r.has_one_level]
  saved = []
  for some in (slice(None), *(slice(i, i + 1) for i in range(seeds))):
    points = [(r.sent[some].mean(), r.losses[some].mean()) for r in curve]
    equal = bytes_at(row.losses[some].mean(), points)
    saved.append(1 - row.sent[some].mean() / equal)
  return np.array(saved)


def cells(row: Row) -> list[str]:
  """As in ``COLUMNS``."""
  whole, *single = 100 * row.saved
  if row.has_one_level or not row.kind:
    saved = ''
  elif len(single) > 1 and np.isfinite(row.saved).all():
    saved = f'{whole:+.0f}% ({min(single):+.0f} to {max(single):+.0f})'
  else:
    saved = '-' if math.isnan(whole) else f'{whole:+.0f}%'
  return [
    ', '.join(filter(None, (row.kind, row.way))),
    with_error(row.losses, '.4f'),
    with_error(100 * row.above, '+.2f') + '%',
    size(row.sent.mean()),
    saved,
  ]


def terminal_table(rows: Sequence[Row]) -> Table:
  """The table for the terminal."""
  table = Table(caption=UNITS, caption_justify='left')
  for i, name in enumerate(COLUMNS):
    table.add_column(name, justify='right' if i else 'left')
  for row in rows:
    table.add_row(*cells(row))
  return table


def draw(axes, rows: Sequence[Row]) -> None:
  """Loss against bytes: a line through one level for all, and points."""
  dense, *others = rows
  axes.axhline(dense.losses.mean(), color=COLORS[3], linestyle=':')
  one = [row for row in others if row.has_one_level]
  axes.plot(
    [row.sent.mean() for row in one],
    [row.losses.mean() for row in one],
    color=COLORS[0],
  )
  for row in others:
    mean = row.losses.mean()
    spread = [[mean - row.losses.min()], [row.losses.max() - mean]]
    color = COLORS[0] if row.has_one_level else COLORS[1]
    point = (row.sent.mean(), mean)
    axes.errorbar(*point, spread, color=color, marker='o', markersize=5)
    axes.annotate(
      row.way, point, (7, 3), textcoords='offset points', fontsize=9
    )
  axes.set_yscale('log')
  axes.yaxis.set_major_formatter('{x:.2f}')
  axes.yaxis.set_minor_formatter('{x:.2f}')
  axes.set_ylabel('validation loss (nats a byte)')
  over_bytes(axes, 'sent by each worker in a step, in the mean')
  # They seldom lie ten times apart.
  axes.xaxis.set_minor_formatter(lambda value, _: size(value))
  axes.margins(x=0.15)


def write(
  folder: Path,
  rows: Sequence[Row],
  found: Mapping[tuple[str, str], list[dict]],
  facts: Mapping[str, Any],
) -> None:
  """Writes ``report.html``, which needs nothing else, and ``results.json``.

  Args:
    folder: where to.
    rows: from :func:`rows_of`; the first is dense.
    found: the runs, for the numbers.
    facts: settings and versions to list.
  """
  numbers = {
    'settings': facts,
    'ways': [
      {
        'kind': row.kind,
        'way': row.way,
        'losses': row.losses.tolist(),
        'sent': row.sent.tolist(),
        'saved': row.saved.tolist(),
        'chosen': [run['chosen'] for run in found[row.kind, row.way]],
      }
      for row in rows
    ],
  }
  text = json.dumps(record.plain(numbers), indent=2) + '\n'
  record.replace(folder / 'results.json', text)
  figures = ''.join(
    FIGURE.format(
      kind=html.escape(kind),
      figure=svg(
        draw,
        [row for row in rows if row.kind in ('', kind)],
        f'Loss and bytes, {kind}',
      ),
    )
    for kind in dict.fromkeys(row.kind for row in rows if row.kind)
  )
  body = BODY.format(
    table=html_table(COLUMNS, map(cells, rows)),
    units=html.escape(UNITS),
    figures=figures,
    facts=html_table(
      ('setting', 'value'), [(name, str(x)) for name, x in facts.items()]
    ),
  )
  title = 'A level for each matrix of the language model'
  record.replace(folder / 'report.html', page(title, body))


BODY = """{table}
<p class="units">{units}</p>
{figures}
<h2>Settings and versions</h2>
<div class="facts">{facts}</div>
"""
FIGURE = """<h2>Loss against bytes: {kind}</h2>
<p>The line joins one level for all matrices; dotted: dense.</p>
<figure>{figure}</figure>
"""
