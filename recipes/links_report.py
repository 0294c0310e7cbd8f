"""What links.py measured: tables for the terminal, a page, and numbers."""

import html
import json
from pathlib import Path
from typing import Any

import links_found as lf
import links_goals
import record
from compared_plots import COLORS
from links_found import Found, Measured
from page import duration, html_table, over_time, page, size, svg
from rich.box import SIMPLE_HEAD
from rich.table import Table

TIMES = (
  'rate',
  'run',
  'step',
  'of limit',
  'loss',
  'vs DDP',
  'vs PowerSGD',
)
PREDICTIONS = (
  'rate',
  'run',
  'step',
  'jd.advise',
  'off',
  'jd.step_time',
  'off',
)
BYTES = ('rate', 'run', 'interface', 'carried', 'jd.traffic', 'ratio', 'busy')
EXCHANGES = ('rate', 'code', 'payload', 'time', 'of the rate', 'of the link')
TIMES_NOTE = (
  'Step: median over stretches between validations, then over rounds. Of '
  'limit: over a step with no exchange at all of the same framework, round by '
  'round. '
  'Loss: the last validation, nats a byte. Vs: in how many times less time '
  'than PyTorch it has the higher of both last losses, round by round.'
)
PREDICTIONS_NOTE = (
  'From the measured step with no exchange, and a link measured with plain '
  'sums.'
)
BYTES_NOTE = (
  'A host and a step. Interface: sent, as its interface counted. Carried: '
  f'without the {lf.netns.HEADER_BYTES} bytes of Ethernet, IP and TCP headers '
  f'of each packet, {100 * lf.netns.HEADER_BYTES / lf.netns.PACKET_BYTES:.1f}% '
  'of a full one. Ratio: carried over jd.traffic; what is more are messages of '
  "gloo and JAX about the data. Busy: share of the link's rate, all the time."
)
EXCHANGES_NOTE = (
  'One jd.mean of float32 gradients, with coding and decoding. Payload: what a '
  'host sends. Of the link: over what full packets leave of the rate, '
  f'{100 * lf.CARRIED:.1f}%.'
)


def _times(value):
  return '' if value is None else f'{value:.3g}x'


def times_rows(found: Measured) -> list[tuple[str, ...]]:
  """Cells of the table of times."""
  rows = []
  for run in found.runs:
    is_limit = run.name in lf.LIMITS
    loss = run.losses[:, -1].mean()
    rows.append(
      (
        run.rate,
        run.name,
        duration(run.step_seconds),
        '' if is_limit else _times(run.over(found.limit(run))),
        '' if is_limit else f'{loss:.3f}',
        *map(_times, found.sooner(run)),
      )
    )
  return rows


def prediction_rows(found: Measured) -> list[tuple[str, ...]]:
  """Cells of the table of predictions."""
  rows = []
  for run in found.runs:
    cells = []
    for seconds in found.predictions(run):
      off = '' if seconds is None else f'{seconds / run.step_seconds - 1:+.0%}'
      cells += ['' if seconds is None else duration(seconds), off]
    if any(cells):
      rows.append((run.rate, run.name, duration(run.step_seconds), *cells))
  return rows


def bytes_rows(found: Measured) -> list[tuple[str, ...]]:
  """Cells of the table of bytes."""
  return [
    (
      run.rate,
      run.name,
      size(run.bytes_a_step),
      size(run.carried_a_step),
      '' if run.agreement is None else size(run.traffic.bytes_a_step),
      '' if run.agreement is None else f'{run.agreement:.3f}',
      f'{100 * run.busy:.3g}%',
    )
    for run in found.runs
  ]


def exchange_rows(found: Measured) -> list[tuple[str, ...]]:
  """Cells of the table of bare exchanges."""
  return [
    (
      each.rate,
      each.code,
      size(each.payload),
      duration(each.seconds),
      f'{100 * each.share * lf.CARRIED:.1f}%',
      f'{100 * each.share:.1f}%',
    )
    for each in found.exchanges
  ]


def tables(found: Measured) -> list[tuple[str, tuple[str, ...], list, str]]:
  """Title, columns, cells and note of each table."""
  verdict = lambda reached: 'yes' if reached else 'no'
  return [
    ('Time', TIMES, times_rows(found), TIMES_NOTE),
    ('Predictions', PREDICTIONS, prediction_rows(found), PREDICTIONS_NOTE),
    ('Bytes', BYTES, bytes_rows(found), BYTES_NOTE),
    ('A bare exchange', EXCHANGES, exchange_rows(found), EXCHANGES_NOTE),
    (
      'Goals',
      ('what', 'goal', 'measured', 'reached'),
      [(*row[:3], verdict(row[3])) for row in links_goals.goals(found)],
      'The best of the methods counts. Without exchange: so many steps without '
      "any exchange fit into one of the peer's.",
    ),
  ]


def terminal_tables(found: Measured) -> list[Table]:
  """The tables for the terminal."""
  made = []
  for title, columns, rows, note in tables(found):
    table = Table(
      title=title,
      caption=note,
      title_justify='left',
      caption_justify='left',
      box=SIMPLE_HEAD,
      pad_edge=False,
    )
    for i, name in enumerate(columns):
      table.add_column(name, justify='right' if i > 1 else 'left')
    for i, row in enumerate(rows):
      last = i + 1 == len(rows) or rows[i + 1][0] != row[0]
      table.add_row(*row, end_section=last and columns[0] == 'rate')
    made.append(table)
  return made


def write(folder: Path, found: Measured, facts: dict[str, Any]) -> None:
  """Writes ``report.html``, which needs nothing else, and ``results.json``.

  Args:
    folder: where to.
    found: what was measured.
    facts: settings and versions to list.
  """
  rates = list(dict.fromkeys(run.rate for run in found.runs))
  facts = {
    **facts,
    'load, at most': max(run.load for run in found.runs),
    'links measured': {
      rate: f'{8e-6 * link.bytes_per_second:.4g} Mbit/s, '
      f'{1e6 * link.latency:.0f} µs'
      for rate, link in found.links.items()
    },
  }
  body = [
    f'<p>{found.hosts} hosts on one machine: network namespaces, with links '
    'held to a rate each way by token buckets. One process a host.</p>'
  ]
  for title, columns, rows, note in tables(found):
    body += [
      f'<h2>{title}</h2>',
      html_table(columns, rows),
      f'<p class="units">{html.escape(note)}</p>',
    ]
  for rate in rates:
    title = f'Loss over time, {rate}'
    body += [
      f'<h2>{title}</h2>',
      f'<figure>{svg(draw_losses, (found, rate), title)}</figure>',
    ]
  settings = [(k, json.dumps(v, default=str)) for k, v in facts.items()]
  body += [
    '<h2>Settings and versions</h2>',
    f'<div class="facts">{html_table(("setting", "value"), settings)}</div>',
  ]
  title = 'Slow links, measured'
  (folder / 'report.html').write_text(
    page(title, '\n'.join(body)), encoding='utf-8'
  )
  numbers = {
    'settings': facts,
    **{
      name: [list(columns), *map(list, rows)]
      for name, columns, rows, _ in tables(found)
    },
    'runs': [as_json(found, run) for run in found.runs],
  }
  record.replace(
    folder / 'results.json', json.dumps(numbers, indent=2, default=str) + '\n'
  )


def as_json(found: Measured, run: Found) -> dict[str, Any]:
  """A contender's numbers."""
  advised, predicted = found.predictions(run)
  rounds = range(len(run.losses))
  return {
    'rate': run.rate,
    'name': run.name,
    'step_seconds': run.step_seconds_by_round.tolist(),
    'bytes_a_step': run.bytes_a_step,
    'carried_a_step': run.carried_a_step,
    'traffic_a_step': run.traffic and run.traffic.bytes_a_step,
    'busy': run.busy,
    'advised_seconds': advised,
    'predicted_seconds': predicted,
    'steps': run.steps.tolist(),
    'clock': [run.clock(i).tolist() for i in rounds],
    'losses': run.losses.tolist(),
  }


def draw_losses(axes, what: tuple[Measured, str]) -> None:
  found, rate = what
  runs = [r for r in found.runs if r.rate == rate and r.name not in lf.LIMITS]
  for i, run in enumerate(runs):
    is_peer = run.name in lf.PEERS
    for j in range(len(run.losses)):
      axes.plot(
        run.clock(j),
        run.losses[j],
        '--' if is_peer else '-',
        color=COLORS[i % len(COLORS)],
        linewidth=1.5,
        label=run.name if j == 0 else None,
      )
  over_time(axes, 'time in training; a line for each round')
  axes.set_ylabel('validation loss (nats a byte)')
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False)
