"""What links.py measured: tables for the terminal, a page and numbers to keep."""

import dataclasses
import html
import json
import math
from pathlib import Path
from typing import Any

import jax
import links_found as lf
import record
from compared import COLORS
from flax import nnx
from links_found import Exchange, Found
from model import Transformer
from page import duration, html_table, page, size, svg
from rich.table import Table

import jaxdist as jd

TIMES = (
  'rate',
  'run',
  'step',
  'of limit',
  'advise',
  'step_time',
  'loss',
  'sooner than DDP',
  'than PowerSGD',
)
BYTES = (
  'rate',
  'run',
  'interface',
  'carried',
  'jd.traffic',
  'agreement',
  'link busy',
)
EXCHANGES = ('rate', 'code', 'payload', 'time', 'share of the link')
TIMES_NOTE = (
  'Step: median over stretches between validations, then over rounds. Of limit: '
  'over a step with no exchange at all of the same framework, round by round. '
  'Advise, step_time: what jd.advise and jd.step_time predict, from the limit '
  'and a link measured with plain sums. Loss: the last validation, nats a byte. '
  'Sooner: how many times sooner than PyTorch it has the higher of both last '
  'losses, on the clock, round by round.'
)
BYTES_NOTE = (
  'A host and a step. Interface: sent, as its interface counted. Carried: '
  f'without the {lf.netns.HEADER_BYTES} bytes of Ethernet, IP and TCP headers '
  f'of each packet, which take {lf.netns.HEADER_BYTES / 15.14:.1f}% of a full '
  'one. Agreement: carried over jd.traffic; what is more are headers of gloo '
  "and JAX's own messages. Link busy: share of its rate, over all of the time."
)
EXCHANGES_NOTE = (
  'One jd.mean of float32 gradients, coding and decoding included; payload: what '
  'a host sends. Headers leave at most 95.6% of a link to what they carry.'
)


@dataclasses.dataclass(frozen=True)
class Measured:
  """All that was measured.

  Attributes:
    hosts: how many.
    params: shapes of the model's parameters.
    runs: of all contenders at all rates.
    exchanges: the bare ones.
    links: what plain sums measured, by rate.
  """

  hosts: int
  params: Any
  runs: list[Found]
  exchanges: list[Exchange]
  links: dict[str, jd.Link]

  def at(self, rate: str, name: str) -> Found | None:
    """A contender at a rate."""
    is_it = lambda run: run.rate == rate and run.name == name
    return next(filter(is_it, self.runs), None)

  def limit(self, run: Found) -> Found:
    """The step with no exchange, of the same framework."""
    return self.at(run.rate, lf.LIMITS[run.name in lf.PEERS])

  def predictions(self, run: Found) -> tuple[float | None, float | None]:
    """What jd.advise and jd.step_time say that a step takes."""
    if run.name in lf.LIMITS + lf.PEERS:
      return None, None
    limit, link = self.limit(run), self.links[run.rate]
    return (
      lf.advised(run.name, self.params, self.hosts, limit, link),
      lf.predicted(run, limit, link),
    )

  def sooner(self, run: Found) -> tuple[float | None, float | None]:
    """How many times sooner than plain DDP, and than with PowerSGD."""
    peers = [self.at(run.rate, name) for name in lf.PEERS[1:]]
    if run.name in lf.LIMITS:
      return None, None
    return tuple(peer and lf.sooner(run, peer) for peer in peers)

  def own(self, rate: str) -> list[Found]:
    """The methods of jaxdist at a rate."""
    others = lf.LIMITS + lf.PEERS
    return [r for r in self.runs if r.rate == rate and r.name not in others]


def read(config: Any, names: list[str]) -> Measured:
  """Reads the files of a finished comparison.

  Args:
    config: of links.py.
    names: of the contenders.
  """
  folder = config.out / 'runs'

  def parameters():
    model = Transformer(
      config.layers, config.width, config.heads, nnx.Rngs(0)
    )
    return nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])

  return Measured(
    config.hosts,
    jax.eval_shape(parameters),
    lf.load(
      folder,
      config.rates,
      names,
      config.rounds,
      config.steps,
      config.every_eval,
    ),
    lf.load_exchanges(folder, config.rates),
    lf.load_links(folder, config.rates),
  )


def _times(value):
  return '' if value is None else f'{value:.3g}x'


def times_rows(found: Measured) -> list[tuple[str, ...]]:
  """Cells of the table of times."""
  rows = []
  for run in found.runs:
    advised, predicted = found.predictions(run)
    is_limit = run.name in lf.LIMITS
    loss = run.losses[:, -1].mean()
    rows.append(
      (
        run.rate,
        run.name,
        duration(run.step_seconds),
        '' if is_limit else _times(run.over(found.limit(run))),
        '' if advised is None else duration(advised),
        '' if predicted is None else duration(predicted),
        '' if is_limit else f'{loss:.3f}',
        *map(_times, found.sooner(run)),
      )
    )
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
      f'{100 * each.share:.1f}%',
    )
    for each in found.exchanges
  ]


def goals(found: Measured) -> list[tuple[str, str, str, bool]]:
  """What was hoped for: words, the goal, what was measured, whether it is so.

  Of several methods the best counts; its name stands beside the figure.
  """
  rows = []

  def best(what, rate, goal, values, at_most):
    """``values``: name and figure of each method."""
    values = [(v, n) for n, v in values if v is not None and math.isfinite(v)]
    if not values:
      return
    value, name = min(values) if at_most else max(values)
    sign = 'at most' if at_most else 'at least'
    rows.append(
      (
        f'{what}, {rate}',
        f'{sign} {goal:g}',
        f'{value:.3g} ({name})',
        value <= goal if at_most else value >= goal,
      )
    )

  for rate, over, ddp in (('100mbit', 1.2, 5), ('10mbit', 2, 20)):
    runs = found.own(rate)
    over_limit = [(r.name, r.over(found.limit(r))) for r in runs]
    best('step over the limit', rate, over, over_limit, at_most=True)
    for i, (peer, goal) in enumerate((('DDP', ddp), ('PowerSGD', 2))):
      values = [(r.name, found.sooner(r)[i]) for r in runs]
      best(f'sooner than {peer}', rate, goal, values, at_most=False)
  shares = [(e.code, e.share) for e in found.exchanges if e.rate == '100mbit']
  best('share of the link', '100mbit', 0.9, shares, at_most=False)

  def within(what, part, ratios):
    """``ratios``: of each run that has one, with its name."""
    off = [(abs(ratio - 1), name) for name, ratio in ratios if ratio is not None]
    if off:
      worst, name = max(off)
      held = sum(each <= part for each, _ in off)
      rows.append(
        (
          what,
          f'within {100 * part:g}%',
          f'{held} of {len(off)}, worst {100 * worst:.1f}% ({name})',
          held == len(off),
        )
      )

  label = lambda run: f'{run.name}, {run.rate}'
  within(
    'interface and jd.traffic',
    0.05,
    [(label(run), run.agreement) for run in found.runs],
  )
  for i, what in enumerate(('jd.advise', 'jd.step_time')):
    ratios = [(label(r), found.predictions(r)[i], r) for r in found.runs]
    within(
      f'{what} and measured step',
      0.25,
      [(name, s / r.step_seconds) for name, s, r in ratios if s is not None],
    )
  return rows


def tables(found: Measured) -> list[tuple[str, tuple[str, ...], list, str]]:
  """Title, columns, cells and note of each table."""
  verdict = lambda reached: 'yes' if reached else 'no'
  return [
    ('Time', TIMES, times_rows(found), TIMES_NOTE),
    ('Bytes', BYTES, bytes_rows(found), BYTES_NOTE),
    ('A bare exchange', EXCHANGES, exchange_rows(found), EXCHANGES_NOTE),
    (
      'Goals',
      ('what', 'goal', 'measured', 'reached'),
      [(*row[:3], verdict(row[3])) for row in goals(found)],
      'The best of the methods counts.',
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
    )
    for i, name in enumerate(columns):
      table.add_column(name, justify='right' if i > 1 else 'left')
    for i, row in enumerate(rows):
      ends = i + 1 < len(rows) and rows[i + 1][0] != row[0]
      table.add_row(*row, end_section=ends and columns[0] == 'rate')
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
      name: [dict(zip(columns, row, strict=True)) for row in rows]
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
  axes.set_xscale('log')
  axes.xaxis.set_major_formatter(lambda value, _: duration(value))
  axes.set_xlabel('time in training; a line for each round')
  axes.set_ylabel('validation loss (nats a byte)')
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False)
