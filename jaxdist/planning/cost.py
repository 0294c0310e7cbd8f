"""How long a compiled step takes, by a model of its links."""

import collections
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxdist.accounting.collective import Collective
from jaxdist.accounting.table import Traffic
from jaxdist.planning.links import Link


class StepTime(NamedTuple):
  """Seconds of one step on one device.

  Attributes:
    compute: all that is no transfer.
    transfer: for each link, how long it is busy.
    exposed: for each link, how long compute waits for it.
  """

  compute: float
  transfer: dict[str, float]
  exposed: dict[str, float]

  @property
  def total(self) -> float:
    """Compute, and what of the transfers it does not hide."""
    return self.compute + sum(self.exposed.values())


def step_time(
  traffic: Traffic, links: Mapping[str, Link], *, efficiency: float = 0.5
) -> StepTime:
  r"""Predicts how long a step takes from its compiled schedule.

  .. math::

    t = \frac{c}{\eta} + \sum_\text{links} \sum_j
      \max\Big(0,\ r_j l + \frac{b_j}{B} - \frac{c_j}{\eta}\Big)

  with :math:`c` the program's compute at the chip's best rates, and for each
  stretch j of the schedule in which transfers over a link are open its
  :math:`r_j` collectives, :math:`b_j` bytes and compute :math:`c_j`. Links do
  not disturb each other, and a link is as fast as it can be: a bound from
  below, good for comparing methods.

  Args:
    traffic: of the step.
    links: for each link in ``traffic.by_link()`` what it carries, as in
      ``jd.LINKS[device_kind]``.
    efficiency: :math:`\eta`, the share of the chip's best rates that compute
      reaches. Large models train at 0.4 to 0.6.

  Returns:
    A :class:`StepTime`.

  Raises:
    ValueError: if a link is not in ``links``, or ``efficiency`` is not in
      (0, 1].

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import jaxdist as jd
    >>> where = {'mesh': jax.make_mesh((4,), ('data',)), 'axis': 'data'}
    >>> tx = jd.communicate(jd.mean('data'))
    >>> state = jd.init(tx, jnp.zeros(1000), **where)
    >>> step = jd.train_step(lambda w, x: jnp.mean((w - x) ** 2), tx, **where)
    >>> sent = jd.traffic(step, state, jnp.zeros((4, 1000)))
    >>> slow = {'inside a host': jd.Link(bytes_per_second=1e6)}
    >>> round(jd.step_time(sent, slow).exposed['inside a host'], 4)
    0.0062
  """
  if not 0 < efficiency <= 1:
    raise ValueError(f'efficiency must be in (0, 1], got {efficiency}.')
  missing = sorted(set(traffic.by_link()) - set(links))
  if missing:
    raise ValueError(
      f'links must say what {missing} carry, got only {sorted(links)}.'
    )
  seconds = {each.name: each.seconds for each in traffic.schedules}
  stretches: dict[tuple[str, str], list[Collective]]
  stretches = collections.defaultdict(list)
  for row in traffic.rows:
    stretches[row.schedule, row.link].append(row)
  transfer = dict.fromkeys(traffic.by_link(), 0.0)
  exposed = dict(transfer)
  for (schedule, link), rows in stretches.items():
    for stretch in _open_together(rows):
      # Arrays that travel together start and end as one.
      rounds = len({(row.kind, row.start, row.end) for row in stretch})
      busy = links[link].seconds(sum(r.bytes_sent for r in stretch), rounds)
      last = max(row.end for row in stretch)
      hidden = (last - stretch[0].start) * seconds[schedule] / efficiency
      times = stretch[0].times
      transfer[link] += times * busy
      exposed[link] += times * max(0.0, busy - hidden)
  return StepTime(traffic.work.seconds / efficiency, transfer, exposed)


def _open_together(rows: Sequence[Collective]) -> list[list[Collective]]:
  """Rows of one schedule, in stretches during which some are always open."""
  stretches: list[list[Collective]] = []
  end = -1.0
  for row in sorted(rows, key=lambda row: (row.start, row.end)):
    if row.start < end:
      stretches[-1].append(row)
    else:
      stretches.append([row])
    end = max(end, row.end)
  return stretches
