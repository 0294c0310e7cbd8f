"""What faults cost: a table of each, and the runs with and without them."""

import html
import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from chaos import WORDS
from matplotlib.ticker import EngFormatter
from page import COLORS, duration, html_table, page, svg
from rich.table import Table

ENDS = ('died', 'fenced', 'failed')


def progress(name: str, line: dict[str, Any]) -> str:
  """A line about a run."""
  words = f'{name}, {duration(line["seconds"])}: round {line["round"]}'
  words += f', {line["tokens"]:,.0f} tokens'
  if 'val_loss' in line:
    words += f', validation loss {line["val_loss"]:.4f}'
  return words


def live_table(name, seats, lines, events) -> Table:
  """The replicas as they are now."""
  table = Table(
    title=progress(name, lines[-1]),
    title_justify='left',
    caption_justify='left',
  )
  for column in ('replica', 'process', 'life', 'does', 'owes', 'last event'):
    table.add_column(column)
  for replica, seat in enumerate(seats):
    last = next((e for e in reversed(events) if e.replica == replica), None)
    table.add_row(
      str(replica),
      str(seat.pid or '-'),
      str(seat.incarnation),
      seat.phase,
      f'{seat.owed:.3g}',
      f'{last.kind} in round {last.round}' if last else '',
    )
  return table


def costs(run: dict[str, Any]) -> list[dict[str, Any]]:
  """What each fault cost.

  A fault's consequences are what happened to the incarnations that it met,
  before another fault met them, and the starts that these made necessary.

  Args:
    run: one of ``runs.json``.

  Returns:
    For each fault that was brought about: what came of it in words, changes
    that were lost, the norm of the residual that went, how long the round took
    that it fell into, and seconds until the replicas it ended were back.
  """
  done = [fault for fault in run['faults'] if fault['done'] is not None]
  return [cost(run, fault, done[i + 1 :]) for i, fault in enumerate(done)]


def cost(run, fault, later) -> dict[str, Any]:
  """What one fault cost; ``later`` are those after it."""
  words, lost, owed, back = [], 0, 0.0, []
  for replica, incarnation in fault['hit']:
    after = [f['done'] for f in later if is_hit(f, replica, incarnation)]
    end = min(after, default=math.inf)
    event = consequence(run['events'], replica, incarnation, fault, end)
    if event is None:
      words.append('nothing was lost')
      continue
    words.append(spoken(event))
    lost += event['kind'] != 'late'
    if event['kind'] in ENDS:
      owed += event['lost']
      back.append(return_of(run['events'], replica, incarnation))
  rounds = [
    line['round_seconds']
    for line in run['lines']
    if 0 <= line['seconds'] - fault['done'] <= line['round_seconds']
  ]
  return {
    'seconds': fault['done'],
    'kind': fault['kind'],
    'lasts': fault['lasts'],
    'replicas': [replica for replica, _ in fault['hit']],
    'outcome': ', '.join(dict.fromkeys(words)) or 'met nobody',
    'changes_lost': lost,
    'residual_lost': owed,
    'round_seconds': rounds[0] if rounds else None,
    'back_seconds': None
    if not back or None in back
    else max(back) - fault['done'],
  }


def is_hit(fault, replica, incarnation) -> bool:
  """Whether a fault met an incarnation of a replica."""
  return [replica, incarnation] in map(list, fault['hit'])


def return_of(events, replica, incarnation) -> float | None:
  """When a replica was ready again after an incarnation, if it was."""
  return next(
    (
      event['seconds']
      for event in events
      if event['kind'] == 'ready'
      and event['replica'] == replica
      and event['incarnation'] > incarnation
    ),
    None,
  )


def consequence(events, replica, incarnation, fault, end):
  """The first event that a fault may have caused; an end goes before others."""
  mine = [
    event
    for event in events
    if event['replica'] == replica
    and event['incarnation'] == incarnation
    and fault['done'] - 0.1 <= event['seconds'] < end
  ]
  wanted = {
    'kill': ENDS,
    'kill several': ENDS,
    'term': ENDS,
    'nan': ('not finite',),
    'garbage': ('damaged',),
  }.get(fault['kind'], (*ENDS, 'late', 'stale'))
  return next((event for event in mine if event['kind'] in wanted), None)


def spoken(event: dict[str, Any]) -> str:
  """An event in words."""
  return {
    'died': 'died and was replaced',
    'fenced': 'fenced and replaced',
    'failed': 'failed and was replaced',
    'late': f'came late ({event["detail"]}) and counted less',
    'stale': 'came too late and was dropped',
    'damaged': 'refused: the digest tells',
    'not finite': 'refused: not finite',
  }[event['kind']]


def rate(run: dict[str, Any]) -> float:
  """Committed tokens a second."""
  last = run['lines'][-1]
  return last['tokens'] / last['seconds']


def losses(run: dict[str, Any]) -> tuple[list[float], list[float]]:
  """Tokens and validation losses where there are some."""
  lines = [line for line in run['lines'] if 'val_loss' in line]
  return [line['tokens'] for line in lines], [
    line['val_loss'] for line in lines
  ]


def growth(run: dict[str, Any], who: str, what: str) -> float | None:
  """From the second quarter's median to the last one's, as a share."""
  values = [s[who][what] for s in run['samples'] if who in s]
  if len(values) < 8:
    return None
  quarter = len(values) // 4
  first = statistics.median(values[quarter : 2 * quarter])
  return statistics.median(values[-quarter:]) / first - 1


def findings(runs: list[dict[str, Any]]) -> dict[str, Any]:
  """What the runs show, as JSON.

  Args:
    runs: with faults first, if there are both.

  Returns:
    Goodput, losses, what faults cost in all, and growth.
  """
  first, *others = runs
  rounds = [line['round_seconds'] for line in first['lines']]
  table = costs(first)
  found = {
    'minutes': first['lines'][-1]['seconds'] / 60,
    'rounds': len(rounds),
    'median_round_seconds': statistics.median(rounds),
    'longest_round_seconds': max(rounds),
    'tokens': first['lines'][-1]['tokens'],
    'tokens_a_second': rate(first),
    'val_loss': losses(first)[1][-1],
    'faults': len(table),
    'counts': first['counts'],
    'costs': table,
    'growth': {
      f'{who} {what}': growth(first, who, what)
      for who in ('coordinator', 'replicas', 'Ray')
      for what in ('bytes', 'files')
    },
  }
  for calm in others:
    found['goodput'] = rate(first) / rate(calm)
    tokens, values = losses(calm)
    at_equal = np.interp(found['tokens'], tokens, values)
    found['calm_val_loss'] = float(at_equal)
    found['calm_tokens_a_second'] = rate(calm)
    found['loss_ratio'] = found['val_loss'] / found['calm_val_loss']
  return found


def summary(found: dict[str, Any]) -> str:
  """The findings in a few sentences."""
  words = (
    f'{found["rounds"]} rounds in {found["minutes"]:.1f} minutes, with '
    f'{found["faults"]} faults; the longest round took '
    f'{duration(found["longest_round_seconds"])}, the median '
    f'{duration(found["median_round_seconds"])}.'
  )
  if 'goodput' in found:
    words += (
      f' Goodput: {found["goodput"]:.0%} of the run without faults. '
      f'Validation loss {found["val_loss"]:.4f}, and '
      f'{found["calm_val_loss"]:.4f} without faults at as many committed '
      f'tokens ({found["loss_ratio"] - 1:+.1%}).'
    )
  return words


def write(path: Path, results: dict[str, Any]) -> None:
  """Writes one file that needs nothing else, not even a network."""
  runs, found = results['runs'], results['findings']
  parts = [
    f'<p>{html.escape(summary(found))}</p>',
    '<figure>',
    svg(draw_losses, runs, 'Validation loss over committed tokens'),
    '</figure>',
    '<h2>Progress, and when faults came</h2><figure>',
    svg(draw_progress, runs, 'Committed tokens over time'),
    '</figure>',
    '<h2>What faults cost</h2>',
    fault_table(found['costs']),
    '<h2>What became of all changes</h2>',
    html_table(
      ('verdict', 'changes'),
      [(name, f'{count:,}') for name, count in found['counts'].items()],
    ),
    '<h2>Memory and open files</h2><figure>',
    svg(draw_memory, runs[0], 'Resident memory over time', 3.0),
    svg(draw_files, runs[0], 'Open files over time', 3.0),
    '</figure>',
    growth_table(found['growth']),
    '<h2>Settings</h2><div class="facts">',
    html_table(
      ('setting', 'value'),
      [(name, json.dumps(v)) for name, v in results['settings'].items()],
    ),
    '</div>',
  ]
  title = 'Elastic replicas with faults' if found['faults'] else 'Replicas'
  path.write_text(page(title, '\n'.join(parts)), encoding='utf-8')


def fault_table(table: list[dict[str, Any]]) -> str:
  """A row for each fault, and one for all of a kind."""
  if not table:
    return '<p>There were none.</p>'
  rows = [
    (
      f'{duration(cost["seconds"])}: {WORDS[cost["kind"]]}',
      ', '.join(map(str, cost['replicas'])),
      cost['outcome'],
      str(cost['changes_lost']),
      f'{cost["residual_lost"]:.2g}',
      *(
        '-' if cost[name] is None else duration(cost[name])
        for name in ('round_seconds', 'back_seconds')
      ),
    )
    for cost in table
  ]
  columns = (
    *('fault', 'replicas', 'what came of it', 'changes lost'),
    *('residual lost', 'that round', 'back after'),
  )
  return html_table(columns, rows) + (
    '<p class="units">Residual lost: the norm last reported, over the number '
    'of replicas.</p>'
  )


def growth_table(found: dict[str, float | None]) -> str:
  """From the second quarter of the run to the last."""
  cells = [
    (name, '-' if value is None else f'{value:+.1%}')
    for name, value in found.items()
  ]
  return html_table(('median, from the second quarter to the last', ''), cells)


def draw_losses(axes, runs) -> None:
  for run, color in zip(runs, COLORS, strict=False):
    tokens, values = losses(run)
    axes.plot(
      tokens, values, color=color, marker='o', markersize=3, label=run['name']
    )
  axes.xaxis.set_major_formatter(EngFormatter())
  axes.set_xlabel('committed tokens')
  axes.set_ylabel('validation loss (nats a byte)')
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False)


def draw_progress(axes, runs) -> None:
  for run, color in zip(runs, COLORS, strict=False):
    axes.plot(
      [line['seconds'] for line in run['lines']],
      [line['tokens'] for line in run['lines']],
      color=color,
      label=run['name'],
    )
  for fault in runs[0]['faults']:
    if fault['done'] is not None:
      axes.axvline(fault['done'], color=COLORS[1], alpha=0.25, linewidth=1)
  axes.set_xlabel('seconds')
  axes.yaxis.set_major_formatter(EngFormatter())
  axes.set_ylabel('committed tokens')
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False)


def draw_memory(axes, run) -> None:
  draw_usage(axes, run, 'bytes', 1e9, 'resident memory (GB)')


def draw_files(axes, run) -> None:
  draw_usage(axes, run, 'files', 1, 'open files')


def draw_usage(axes, run, what, unit, label) -> None:
  for who, color in zip(
    ('coordinator', 'replicas', 'Ray'), COLORS, strict=False
  ):
    samples = [s for s in run['samples'] if who in s]
    axes.plot(
      [s['seconds'] for s in samples],
      [s[who][what] / unit for s in samples],
      color=color,
      label=who,
    )
  axes.set_xlabel('seconds')
  axes.set_ylabel(label)
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False)
