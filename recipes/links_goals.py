"""What was hoped for of slow links, beside what links.py measured."""

import math

from links_found import COMPRESSED_PEER, DENSE_PEER, Measured


def goals(found: Measured) -> list[tuple[str, str, str, bool]]:
  """What was hoped for: words, the goal, what was measured, whether it is so.

  Of several methods the best counts; its name stands beside the figure. Beside
  what is sooner than a peer: how many steps without any exchange fit into one
  of the peer's.
  """
  rows = []

  def best(what, rate, goal, values, at_most, beside=''):
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
        f'{value:.3g} ({name}){beside}',
        value <= goal if at_most else value >= goal,
      )
    )

  for rate, over, ddp in (('100mbit', 1.2, 5), ('10mbit', 2, 20)):
    runs = found.own(rate)
    over_limit = [(r.name, r.over(found.limit(r))) for r in runs]
    best('step over the limit', rate, over, over_limit, at_most=True)
    for i, (name, goal) in enumerate(((DENSE_PEER, ddp), (COMPRESSED_PEER, 2))):
      peer = found.at(rate, name)
      if not (runs and peer):
        continue
      # No method can do better, unless it learns more in a step.
      most = peer.over(found.limit(runs[0]))
      values = [(r.name, found.sooner(r)[i]) for r in runs]
      beside = f'; without exchange {most:.3g}'
      what = f'sooner than {name}'
      best(what, rate, goal, values, at_most=False, beside=beside)
  shares = [(e.code, e.share) for e in found.exchanges if e.rate == '100mbit']
  best('share of the link', '100mbit', 0.9, shares, at_most=False)

  def within(what, part, ratios):
    """``ratios``: of each run that has one, with its name."""
    off = [
      (abs(ratio - 1), name) for name, ratio in ratios if ratio is not None
    ]
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
