"""The plots of a comparison's page."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from page import over_time, size

if TYPE_CHECKING:
  from compared import Compared

# Told apart on white and on black; beyond them lines are dashed.
COLORS = (
  '#3d7edb',
  '#e0701b',
  '#2f9e6e',
  '#a55bd0',
  '#d84a5f',
  '#8a7a2f',
  '#1f9bb0',
  '#9a6b52',
)
DASHES = ('-', '--', ':')


def front(found: list['Compared']) -> list['Compared']:
  """Those that no other beats in loss and bytes, most bytes first."""
  best, kept = math.inf, []
  for each in sorted(found, key=lambda e: (e.bytes_a_step, e.ends.mean())):
    if each.ends.mean() < best:
      best = each.ends.mean()
      kept.append(each)
  return kept[::-1]


def style(i: int) -> dict[str, Any]:
  """How the i-th line looks."""
  dash = DASHES[i // len(COLORS) % len(DASHES)]
  return {'color': COLORS[i % len(COLORS)], 'linestyle': dash}


def draw_ends(axes, found: list['Compared']) -> None:
  """Last loss against bytes, a point for each method."""
  best = front(found)
  axes.plot(
    [each.bytes_a_step for each in best],
    [each.ends.mean() for each in best],
    color=COLORS[0],
    alpha=0.4,
    linewidth=6,
    solid_capstyle='round',
  )
  for each in found:
    color = COLORS[0] if each in best else COLORS[1]
    mean = each.ends.mean()
    spread = [[mean - each.ends.min()], [each.ends.max() - mean]]
    axes.errorbar(
      each.bytes_a_step, mean, spread, color=color, marker='o', markersize=5
    )
  axes.set_ylabel('validation loss (nats a byte)')
  over_bytes(axes, 'sent by each worker in a step, on average')
  axes.margins(x=0.12)
  name_points(axes, found)


def name_points(axes, found: list['Compared']) -> None:
  """Writes each method's name beside its point, above or below others."""
  axes.autoscale_view()
  taken: list[tuple[float, float, float]] = []
  for each in found:
    point = (each.bytes_a_step, each.ends.mean())
    left, y = axes.transData.transform(point)
    right = left + 7 * len(each.name)
    # Nearest first: lines are 14 pixels high.
    for shift in (3, -11, 10, -18, 17, -25, 24):
      if not any(
        left < other[1] and other[0] < right and abs(y + shift - other[2]) < 14
        for other in taken
      ):
        break
    taken.append((left, right, y + shift))
    axes.annotate(
      each.name, point, (7, shift), textcoords='offset points', fontsize=9
    )


def draw_over_bytes(axes, found: list['Compared']) -> None:
  draw_losses(axes, found, lambda each: each.sent)
  over_bytes(axes, 'sent by each worker so far')


def over_bytes(axes, label: str) -> None:
  axes.set_xscale('log')
  axes.xaxis.set_major_formatter(lambda value, _: size(value))
  axes.set_xlabel(label)


def draw_over_steps(axes, found: list['Compared']) -> None:
  draw_losses(axes, found, lambda each: each.steps)
  axes.set_xlabel('step')


def draw_over_time(axes, found: list['Compared'], rate: float) -> None:
  draw_losses(axes, found, lambda each: each.seconds[rate])
  over_time(axes, 'predicted time')


def draw_losses(axes, found: list['Compared'], x) -> None:
  """The mean over seeds of each method, and its range."""
  for i, each in enumerate(found):
    axes.plot(
      x(each), each.losses.mean(axis=0), **style(i), label=each.name, lw=1.6
    )
    axes.fill_between(
      x(each),
      each.losses.min(axis=0),
      each.losses.max(axis=0),
      color=style(i)['color'],
      alpha=0.12,
      linewidth=0,
    )
  # The first drop is not where methods differ.
  early = max(1, len(found[0].steps) // 4)
  tops = [
    each.losses[:, min(early, len(each.steps) - 1)].mean() for each in found
  ]
  axes.set_ylim(top=np.nanmax(tops) + 0.1)
  axes.set_ylabel('validation loss (nats a byte)')
  axes.legend(
    loc='center left', bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9
  )
