"""What a comparison found: a table for the terminal, a page to keep."""

import html
import json
from typing import Any

import numpy as np
from page import COLORS, duration, html_table, page, size, svg
from record import Run
from rich.table import Table

COLUMNS = (
  'run',
  'validation loss',
  'sent a step',
  'fewer bytes',
  'step time',
  'total time',
)
UNITS = (
  'Validation loss in nats a byte. Sent a step: by each worker, on average and '
  'with its warm-up; read from the compiled program.'
)


def ratio(dense: Run, other: Run) -> str:
  """How many times fewer bytes a run sends than dense data parallel."""
  if dense.bytes_a_step == other.bytes_a_step:
    return '1x'
  if not other.bytes_a_step:
    return 'sends nothing'
  times = dense.bytes_a_step / other.bytes_a_step
  return f'{times:.3g}x'


def rows(runs: list[Run]) -> list[tuple[str, ...]]:
  """The table's cells; the first run is dense."""
  return [
    (
      run.name,
      '-' if run.val_loss is None else f'{run.val_loss:.4f}',
      size(run.bytes_a_step),
      ratio(runs[0], run),
      duration(run.step_seconds),
      duration(run.seconds),
    )
    for run in runs
  ]


def terminal_table(runs: list[Run], title: str) -> Table:
  """The table for the terminal."""
  table = Table(
    title=title, caption=UNITS, title_justify='left', caption_justify='left'
  )
  for i, name in enumerate(COLUMNS):
    table.add_column(name, justify='right' if i else 'left')
  for row in rows(runs):
    table.add_row(*row)
  return table


def write(path, runs: list[Run], title: str, facts: dict[str, Any]) -> None:
  """Writes one file that needs nothing else, not even a network.

  Args:
    path: the HTML file.
    runs: dense data parallel first.
    title: one line of text.
    facts: settings and versions to list.
  """
  senders = [run for run in runs if run.bytes_a_step]
  bars = sum(len(collectives(run)) for run in senders)
  nothing = '<p>No run sends anything.</p>'
  body = BODY.format(
    summary=html.escape(summary(runs)),
    table=html_table(COLUMNS, rows(runs)),
    units=html.escape(UNITS),
    window=window(runs[0]),
    over_steps=svg(draw_over_steps, runs, 'Loss over steps'),
    over_bytes=svg(draw_over_bytes, senders, 'Loss over bytes sent')
    if senders
    else nothing,
    by_collective=svg(
      draw_by_collective, senders, 'Bytes by collective', 0.7 + 0.38 * bars
    )
    if senders
    else nothing,
    collectives=html_table(
      ('run and collective', 'arrays', 'bytes a step'),
      [
        (f'{run.name}: {name}', str(count), f'{sent:,.0f}')
        for run in runs
        for name, (count, sent) in collectives(run).items()
      ],
    ),
    facts=html_table(
      ('setting', 'value'),
      [
        (name, value if isinstance(value, str) else json.dumps(value))
        for name, value in facts.items()
      ],
    ),
  )
  path.write_text(page(title, body), encoding='utf-8')


def summary(runs: list[Run]) -> str:
  """The result in a sentence."""
  dense, *others = runs
  if dense.val_loss is None:
    return 'Nothing was evaluated.'
  words = [f'Dense data parallel ends at {dense.val_loss:.3f} nats a byte.']
  for run in others:
    difference = run.val_loss - dense.val_loss
    words.append(
      f'{run.name} ends at {run.val_loss:.3f} ({difference:+.3f}) '
      f'and sends {size(run.bytes_a_step)} a worker a step instead of '
      f'{size(dense.bytes_a_step)}: {ratio(dense, run)}.'
    )
  return ' '.join(words)


def collectives(run: Run) -> dict[str, tuple[int, float]]:
  """Number of arrays and bytes a step for each kind of collective and dtype."""
  found: dict[str, tuple[int, float]] = {}
  for row in run.traffic.rows:
    name = f'{row.kind} {row.dtype}'
    count, sent = found.get(name, (0, 0.0))
    found[name] = count + 1, sent + row.bytes_a_step
  return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def smooth(losses: list[float], width: int) -> np.ndarray:
  """Running means over ``width`` steps; a skipped step's loss is missing."""
  values = np.array(losses)
  values[~np.isfinite(values)] = np.nan
  return np.array(
    [
      np.nan if np.isnan(part).all() else np.nanmean(part)
      for part in (
        values[max(0, i + 1 - width) : i + 1] for i in range(len(values))
      )
    ]
  )


def draw_losses(axes, runs: list[Run], x: str) -> None:
  """Training losses as thin lines, validation losses as marked ones."""
  # The first drop is not where runs differ.
  tops = []
  for run, color in zip(runs, COLORS, strict=False):
    training = smooth([line['loss'] for line in run.lines], window(run))
    # A page does not show more points than this.
    stride = max(1, len(run.lines) // 1000)
    axes.plot(
      [line[x] for line in run.lines][::stride],
      training[::stride],
      color=color,
      alpha=0.5,
      linewidth=1,
    )
    evaluated = [line for line in run.lines if 'val_loss' in line]
    axes.plot(
      [line[x] for line in evaluated],
      [line['val_loss'] for line in evaluated],
      color=color,
      marker='o',
      markersize=4,
      linewidth=1.8,
      label=run.name,
    )
    tops.append(training[len(training) // 20])
  if np.isfinite(tops).all():
    axes.set_ylim(top=max(tops) + 0.1)
  axes.set_ylabel('loss (nats a byte)')
  axes.legend(
    loc='lower left', bbox_to_anchor=(0, 1), ncols=len(runs), frameon=False
  )


def window(run: Run) -> int:
  """Over how many steps a training loss is averaged."""
  return max(1, len(run.lines) // 40)


def draw_over_steps(axes, runs: list[Run]) -> None:
  draw_losses(axes, runs, 'step')
  axes.set_xlabel('step')


def draw_over_bytes(axes, runs: list[Run]) -> None:
  draw_losses(axes, runs, 'bytes_sent')
  axes.set_xscale('log')
  axes.xaxis.set_major_formatter(lambda value, _: size(value))
  axes.set_xlabel('sent by each worker so far')


def draw_by_collective(axes, runs: list[Run]) -> None:
  bars = [
    (f'{run.name}: {name}', sent, color)
    for run, color in zip(runs, COLORS, strict=False)
    for name, (_, sent) in collectives(run).items()
    if sent
  ]
  names, sent, colors = zip(*bars, strict=True)
  drawn = axes.barh(range(len(bars)), sent, color=colors, height=0.65)
  axes.bar_label(drawn, [size(count) for count in sent], padding=4)
  axes.set_yticks(range(len(bars)), names)
  axes.invert_yaxis()
  axes.set_xscale('log')
  axes.set_xlim(min(sent) / 4, max(sent) * 6)
  axes.xaxis.set_major_formatter(lambda value, _: size(value))
  axes.grid(False, axis='y')
  axes.tick_params(axis='y', length=0)


BODY = """<p>{summary}</p>
{table}
<p class="units">{units}</p>
<h2>Loss over steps</h2>
<p>Marked: validation. Thin: training, mean of {window} steps.</p>
<figure>{over_steps}</figure>
<h2>Loss over bytes sent by each worker</h2>
<figure>{over_bytes}</figure>
<h2>Bytes a worker sends in a step, by collective</h2>
<p>Read from the compiled program, as a ring algorithm sends them. A collective
that runs every few steps counts for its share, one of a warm-up for nothing.
Mind the logarithmic scale.</p>
<figure>{by_collective}</figure>
{collectives}
<h2>Settings and versions</h2>
<div class="facts">{facts}</div>
"""
