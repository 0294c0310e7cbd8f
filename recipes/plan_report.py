"""What a plan found: a table for the terminal, a page to keep."""

import base64
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from page import COLORS, TEXT, duration, html_table, page, size, svg
from rich.box import SIMPLE_HEAD
from rich.table import Table

COLUMNS = (
  'method',
  'memory',
  'between',
  'fewer',
  'inside',
  'exposed',
  'step',
  'faster',
  'pays below',
)
NOTES = (
  "For one chip and one step. Memory and bytes are the compiled program's; "
  'what is sent once in many steps counts for its share. Between and inside: '
  'over the links between slices and those of a slice; of GPUs, hosts. '
  'Exposed: how long compute waits for transfers between them, by the cost '
  'model. Pays below: the bandwidth of a chip between them below which a step '
  'is faster than dense. Steps are compared, not what they learn.'
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one method costs on the pod.

  Attributes:
    method: its name.
    slices: that it was compiled for.
    far: the link between them.
    near: the link inside one.
    memory: bytes of a chip's memory.
    bytes_by_link: that a chip sends in a step, on average.
    claimed: bytes over the far link by the communicator's own account.
    seconds: of a step.
    exposed: seconds that compute waits for transfers between slices.
    break_even: bytes a second between slices below which it beats dense.
    compile_seconds: that it took to find out.
    by_slices: bytes a chip sends between slices, claimed for other numbers.
    gathered: the same if each slice got the payloads of all; None where
      payloads are not gathered at all.
  """

  method: str
  slices: int
  far: str
  near: str
  memory: int
  bytes_by_link: dict[str, float]
  claimed: float
  seconds: float
  exposed: float
  break_even: float | None
  compile_seconds: float
  by_slices: dict[int, float]
  gathered: dict[int, float] | None = None


def rows(plans: list[Plan]) -> list[tuple[str, ...]]:
  """The table's cells; the first plan is dense."""
  dense = plans[0]
  return [
    (
      plan.method,
      size(plan.memory),
      size(plan.bytes_by_link[plan.far]),
      f'{dense.bytes_by_link[plan.far] / plan.bytes_by_link[plan.far]:.3g}x',
      size(plan.bytes_by_link.get(plan.near, 0)),
      duration(plan.exposed),
      duration(plan.seconds),
      f'{dense.seconds / plan.seconds:.2f}x',
      rate(plan.break_even),
    )
    for plan in plans
  ]


def rate(bytes_per_second: float | None) -> str:
  """A bandwidth as people say it.

  >>> rate(0.0), rate(3.125e9), rate(math.inf)
  ('never', '25 Gbit/s', 'any')
  """
  if bytes_per_second is None:
    return ''
  if bytes_per_second == 0:
    return 'never'
  if math.isinf(bytes_per_second):
    return 'any'
  gbits = bytes_per_second * 8 / 1e9
  return f'{gbits:,.0f} Gbit/s' if gbits >= 100 else f'{gbits:.3g} Gbit/s'


def terminal_table(plans: list[Plan], title: str) -> Table:
  """The plans side by side."""
  table = Table(
    title=title,
    caption=NOTES,
    caption_justify='left',
    box=SIMPLE_HEAD,
    padding=0,
    pad_edge=False,
  )
  for i, column in enumerate(COLUMNS):
    table.add_column(column, justify='right' if i else 'left', no_wrap=True)
  for row in rows(plans):
    table.add_row(*row)
  return table


def write(
  folder: Path, plans: list[Plan], title: str, facts: dict[str, Any]
) -> None:
  """Writes ``report.html``, with the schedules of ``folder`` inside it."""
  lines = html_table(
    ('setting', 'value'), [(k, json.dumps(v)) for k, v in facts.items()]
  )
  schedules = '\n'.join(
    f'<h2>Schedule: {plan.method}</h2>\n<figure><img alt="schedule" '
    f'style="width:100%" src="{_inline(folder, plan)}"></figure>'
    for plan in plans
  )
  far = plans[0].far
  many = far.removeprefix('between ')
  body = f"""
<p>{NOTES}</p>
{html_table(COLUMNS, rows(plans))}
<h2>A step: compute, and waiting for transfers</h2>
<figure>{svg(draw_steps, plans, 'Step time', 1 + 0.4 * len(plans))}</figure>
<h2>Bytes that a chip sends {far}, over the number of {many}</h2>
<p>Lines: what the communicators claim. Dots: compiled. Codes go in two rounds,
by which a chip sends about twice its payload at any number of {many}; dotted:
what gathering all payloads would take.</p>
<figure>{svg(draw_slices, plans, f'Bytes over {many}')}</figure>
{schedules}
<h2>Settings</h2>
<div class="facts">{lines}</div>
"""
  (folder / 'report.html').write_text(page(title, body), encoding='utf-8')


def _inline(folder, plan):
  image = (folder / f'schedule-{plan.method}.png').read_bytes()
  return f'data:image/png;base64,{base64.b64encode(image).decode()}'


def draw_steps(axes, plans: list[Plan]) -> None:
  names = [plan.method for plan in plans]
  waits = [plan.exposed * 1e3 for plan in plans]
  rest = [(plan.seconds - plan.exposed) * 1e3 for plan in plans]
  axes.barh(names, rest, color=COLORS[0], label=f'compute and {plans[0].near}')
  axes.barh(names, waits, left=rest, color=COLORS[1], label=plans[0].far)
  axes.invert_yaxis()
  axes.set_xlabel('milliseconds')
  axes.legend(loc='lower right', bbox_to_anchor=(1, 1), ncols=2, frameon=False)


def draw_slices(axes, plans: list[Plan]) -> None:
  for i, plan in enumerate(plans):
    color = COLORS[i % len(COLORS)]
    style = '-' if i < len(COLORS) else '--'
    counts, sent = zip(*plan.by_slices.items(), strict=True)
    axes.plot(counts, sent, style, color=color, label=plan.method)
    axes.plot(
      plan.slices, plan.bytes_by_link[plan.far], 'o', color=color, clip_on=False
    )
  gathered = next((p for p in plans if p.gathered), None)
  if gathered:
    label = f'{gathered.method}, if gathered'
    axes.plot(
      *zip(*gathered.gathered.items(), strict=True),
      ':',
      color=TEXT,
      label=label,
    )
  axes.set_xscale('log', base=2)
  axes.set_yscale('log')
  axes.set_xticks(counts, [str(n) for n in counts])
  axes.minorticks_off()
  axes.yaxis.set_major_formatter(lambda value, _: size(value))
  axes.set_xlabel(plans[0].far.removeprefix('between '))
  axes.set_ylabel('a chip, a step')
  axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False)
