"""What a comparison of many methods found: a table, a page and numbers."""

import collections
import dataclasses
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compared_plots as plots
import methods
import numpy as np
import record
from page import duration, html_table, page, size, svg
from rich.table import Table

import jaxdist as jd

UNITS = (
  'Validation loss in nats a byte: mean over the seeds and its standard error; '
  'above the first: mean over the seeds of the ratio to the run of the same '
  'seed. Sent: by each worker, on average and in the step that sends most. '
  'Predicted: a step on a link of so many Mbit/s for each worker; no transfer '
  'is hidden, as in the program compiled for CPUs.'
)


def kept(run: record.Run) -> dict[str, Any]:
  """What is kept of a finished run."""
  evaluated = [line for line in run.lines if 'val_loss' in line]
  return {
    'steps': [line['step'] for line in evaluated],
    'losses': [line['val_loss'] for line in evaluated],
    'skipped': run.lines[-1]['skipped'],
    'step_seconds': run.step_seconds,
    'traffic': json.loads(run.traffic.to_json()),
  }


@dataclasses.dataclass(frozen=True)
class Compared:
  """One method over several seeds.

  Attributes:
    name: the method's.
    steps: after which it was evaluated.
    losses: validation losses, ``(seeds, evaluations)``.
    traffic: of its step, once warm-ups are over.
    sent: bytes that a worker has sent by then.
    seconds: predicted time until then, by the link's Mbit/s.
    skipped: steps that any seed left out.
  """

  name: str
  steps: np.ndarray
  losses: np.ndarray
  traffic: jd.Traffic
  sent: np.ndarray
  seconds: dict[float, np.ndarray]
  skipped: int

  @classmethod
  def of(
    cls, name: str, runs: Sequence[dict], mbits: Sequence[float]
  ) -> 'Compared':
    """From what was kept of its runs, and links to predict times for."""
    traffic = jd.Traffic.from_json(json.dumps(runs[0]['traffic']))
    steps = np.array(runs[0]['steps'])

    def so_far(of):
      stages = map(methods.find(name).stages, steps)
      return np.array([methods.total(of, traffic, each) for each in stages])

    def seconds(rate):
      link = jd.Link(rate * 1e6 / 8)
      return lambda traffic: (
        jd.step_time(traffic, dict.fromkeys(traffic.by_link(), link)).total
      )

    return cls(
      name,
      steps,
      np.array([run['losses'] for run in runs], float),  # None becomes NaN.
      traffic,
      so_far(methods.bytes_a_step),
      {rate: so_far(seconds(rate)) for rate in mbits},
      max(run['skipped'] for run in runs),
    )

  @property
  def ends(self) -> np.ndarray:
    """Each seed's last loss."""
    return self.losses[:, -1]

  @property
  def bytes_a_step(self) -> float:
    """That a worker sends, on average."""
    return self.sent[-1] / self.steps[-1]

  @property
  def step_seconds(self) -> dict[float, float]:
    """Predicted on average, by the link's Mbit/s."""
    return {
      rate: all[-1] / self.steps[-1] for rate, all in self.seconds.items()
    }

  @property
  def peak_bytes(self) -> float:
    """That a worker sends in the step that sends most."""
    sent = collections.Counter()
    for row in self.traffic.rows:
      sent[row.schedule] += row.bytes_sent
    always = sent.pop(self.traffic.schedules[0].name, 0.0)
    return always + max(sent.values(), default=0.0)  # It takes one branch.

  def above(self, other: 'Compared') -> np.ndarray:
    """Each seed's last loss over the other's, less 1."""
    return self.ends / other.ends - 1


def standard_error(values: np.ndarray) -> float:
  """Of the mean; of a single value nothing is known, and it is 0."""
  if len(values) < 2:
    return 0.0
  return values.std(ddof=1) / math.sqrt(len(values))


def with_error(values: np.ndarray, form: str) -> str:
  """Mean and standard error; of a single value just that."""
  if len(values) < 2:
    return format(values[0], form)
  error = standard_error(values)
  return f'{values.mean():{form}} ± {error:{form.lstrip("+")}}'


def fewer(first: Compared, other: Compared) -> str:
  """How many times fewer bytes than the first."""
  if not other.bytes_a_step:
    return 'sends nothing' if first.bytes_a_step else '1x'
  return f'{first.bytes_a_step / other.bytes_a_step:.3g}x'


def columns(found: list[Compared]) -> list[str]:
  """Names of what :func:`cells` returns."""
  return [
    'method',
    'loss',
    f'above {found[0].name}',
    'sent a step',
    'at most',
    'fewer bytes',
    *(f'{link(rate)}' for rate in found[0].seconds),
  ]


def link(mbits: float) -> str:
  """A link's name."""
  return f'{mbits:g} Mbit/s' if mbits < 1000 else f'{mbits / 1000:g} Gbit/s'


def cells(found: list[Compared]) -> list[list[str]]:
  """The table, lowest loss first."""
  return [
    [
      each.name + (f' ({each.skipped} skipped)' if each.skipped else ''),
      with_error(each.ends, '.3f'),
      with_error(100 * each.above(found[0]), '+.1f') + '%',
      size(each.bytes_a_step),
      size(each.peak_bytes),
      fewer(found[0], each),
      *map(duration, each.step_seconds.values()),
    ]
    for each in by_loss(found)
  ]


def by_loss(found: list[Compared]) -> list[Compared]:
  """Lowest first; last what diverged."""
  return sorted(found, key=lambda e: np.nan_to_num(e.ends.mean(), nan=np.inf))


def terminal_table(found: list[Compared]) -> Table:
  """The table for the terminal."""
  table = Table(
    title=f'{found[0].losses.shape[0]} seeds, {found[0].steps[-1]} steps',
    caption=UNITS,
    title_justify='left',
    caption_justify='left',
  )
  for i, name in enumerate(columns(found)):
    table.add_column(name, justify='right' if i else 'left')
  for row in cells(found):
    table.add_row(*row)
  return table


def write(folder: Path, found: list[Compared], facts: dict[str, Any]) -> None:
  """Writes ``report.html``, which needs nothing else, and ``results.json``.

  Args:
    folder: where to.
    found: the methods; the first is what others are compared with.
    facts: settings and versions to list.
  """
  numbers = {
    'settings': facts,
    'methods': {
      each.name: {
        'losses': record.plain(each.losses.tolist()),
        'steps': each.steps.tolist(),
        'bytes_a_step': each.bytes_a_step,
        'peak_bytes': each.peak_bytes,
        'step_seconds_by_mbits': each.step_seconds,
        'skipped': each.skipped,
      }
      for each in found
    },
  }
  record.replace(folder / 'results.json', json.dumps(numbers, indent=2) + '\n')
  senders = [each for each in by_loss(found) if each.bytes_a_step]
  ended = [each for each in senders if np.isfinite(each.ends).all()]
  times = ''.join(
    TIME.format(
      link=link(rate),
      figure=svg(
        lambda axes, found, rate=rate: plots.draw_over_time(axes, found, rate),
        by_loss(found),
        f'Loss over predicted time at {link(rate)}',
      ),
    )
    for rate in found[0].seconds
  )
  body = BODY.format(
    summary=html.escape(summary(found)),
    table=html_table(columns(found), cells(found)),
    units=html.escape(UNITS),
    ends=svg(plots.draw_ends, ended, 'Last loss and bytes a step', 5.0),
    over_bytes=svg(plots.draw_over_bytes, senders, 'Loss over bytes sent', 5.0),
    over_steps=svg(
      plots.draw_over_steps, by_loss(found), 'Loss over steps', 5.0
    ),
    times=times,
    facts=html_table(
      ('setting', 'value'),
      [
        (name, value if isinstance(value, str) else json.dumps(value))
        for name, value in facts.items()
      ],
    ),
  )
  title = f'{len(found)} methods on the language model'
  record.replace(folder / 'report.html', page(title, body))


def summary(found: list[Compared]) -> str:
  """The result in a few sentences."""
  first, *others = found
  seeds = first.losses.shape[0]
  words = [
    f'{first.name.capitalize()} ends at {first.ends.mean():.3f} nats a byte '
    f'after {first.steps[-1]} steps (mean of {seeds} '
    f'{"seeds" if seeds > 1 else "seed"}) and sends '
    f'{size(first.bytes_a_step)} a worker a step.'
  ]
  named = set()
  for limit in (1, 3, 10):
    near = [e for e in others if 100 * e.above(first).mean() <= limit]
    least = min(near, key=lambda each: each.bytes_a_step, default=None)
    if least and least.name not in named:
      named.add(least.name)
      words.append(
        f'Within {limit}% of that loss {least.name} sends least: '
        f'{size(least.bytes_a_step)}, {fewer(first, least)} fewer.'
      )
  return ' '.join(words)


BODY = """<p>{summary}</p>
{table}
<p class="units">{units}</p>
<h2>Loss against bytes</h2>
<p>A point for each method: its last loss, with the least and the greatest of
the seeds. The band joins those that no other beats in both.</p>
<figure>{ends}</figure>
<h2>Loss over bytes sent by each worker</h2>
<p>Mean over the seeds, with their range; named from the lowest last loss to the
highest. Bytes are read from the compiled program.</p>
<figure>{over_bytes}</figure>
<h2>Loss over steps</h2>
<figure>{over_steps}</figure>
{times}
<h2>Settings and versions</h2>
<div class="facts">{facts}</div>
"""
TIME = """<h2>Loss over predicted time at {link}</h2>
<figure>{figure}</figure>
"""
