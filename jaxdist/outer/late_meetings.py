"""When to meet, if most of what may be sent is to be sent late."""


def late_meetings(
  steps: int, meetings: int, *, share: float = 0.5, window: float = 0.1
) -> tuple[int, ...]:
  r"""Spreads meetings so that a share of them lies in the last steps.

  Workers that have drifted apart come together again in a few rounds, and drift
  apart again in a few more: meetings help most at the end. The last step always
  has one.

  Args:
    steps: of the whole run.
    meetings: how many there are in all, at most ``steps``.
    share: of the meetings that lie in the last ``window``, in [0, 1], as far as
      there are steps for them. With ``share == window`` they are uniform.
    window: the last part of the steps, in (0, 1].

  Returns:
    The steps after which workers meet, for ``every`` of
    :func:`jaxdist.local_sgd`, :func:`jaxdist.diloco` or
    :func:`jaxdist.noloco`.

  Raises:
    ValueError: if an argument is out of range.

  Examples:
    >>> import jaxdist as jd
    >>> jd.late_meetings(steps=100, meetings=5, share=0.6, window=0.06)
    (47, 94, 96, 98, 100)

  References:
    Zhu et al, `On the Surprising Effectiveness of a Single Global Merging in
    Decentralized Learning <https://arxiv.org/abs/2507.06542>`_, 2025
    (its window of dense communication)
  """
  if not 1 <= meetings <= steps:
    raise ValueError(
      f'meetings must be at least 1 and at most the number of steps, {steps}, '
      f'got {meetings}.'
    )
  if not 0 <= share <= 1:
    raise ValueError(f'share must be in [0, 1], got {share}.')
  if not 0 < window <= 1:
    raise ValueError(f'window must be in (0, 1], got {window}.')
  last = max(1, round(window * steps))
  early_steps = steps - last
  # The last step has a meeting, and neither part more than it has steps.
  late = min(max(1, round(share * meetings)), last)
  late = max(late, meetings - early_steps)
  early = meetings - late
  return (
    *((i + 1) * early_steps // early for i in range(early)),
    *(early_steps + (i + 1) * last // late for i in range(late)),
  )
