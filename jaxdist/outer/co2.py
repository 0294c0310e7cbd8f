"""CO2: an outer step that is one round late, so that nobody waits for it."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxdist.communicators import collectives
from jaxdist.communicators.base import Communicator
from jaxdist.outer.averaging import exchange_changes, with_feedback
from jaxdist.outer.local_steps import Meeting, local_steps
from jaxdist.state import PerWorker
from jaxdist.transforms import base
from jaxdist.transforms.error_feedback import zero_residual


class CO2State(NamedTuple):
  """State of the outer step of :func:`co2`.

  Attributes:
    slow: where this round began, in float32. The same on all workers.
    previous: where the round before it began. The same on all workers.
    momentum: of the outer step, in float32. The same on all workers.
    snapshot: the change of the last round, on its way; ``None`` without a
      delay. Each worker's own.
    residual: what was dropped from the changes sent so far; ``None`` without
      feedback. Each worker's own.
    communicator: the communicator's.
    skipped: rounds dropped for a non-finite change. The same on all workers.
  """

  slow: optax.Params
  previous: optax.Params
  momentum: optax.Params
  snapshot: PerWorker
  residual: PerWorker
  communicator: Any
  skipped: Int32[Array, '']


def co2(
  inner: optax.GradientTransformation,
  communicator: Communicator,
  every: int,
  *,
  learning_rate: float = 1.0,
  momentum: float = 0.2,
  clip: float = 1.0,
  penalty: float | None = None,
  anchor: Literal['previous', 'current'] = 'previous',
  delay: int = 1,
  feedback: bool | None = None,
  decay: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Takes steps locally; an outer step follows the mean change a round late.

  At the end of round r, with :math:`\theta^{(i)}_r` where worker i has come
  from the slow parameters :math:`x_r` and :math:`\bar\theta_{r-1}` the mean
  that was reduced meanwhile,

  .. math::

    d &= x_{r-1} - \bar\theta_{r-1}, \qquad
    \Lambda = 1 + \frac{\|x_r - x_{r-1}\|}{\|d\|} \\
    m &\gets \text{clip}(\mu m + d / \Lambda, \pm\phi), \qquad
    x_{r+1} = x_r - \eta\, m, \qquad \theta^{(i)} \gets x_{r+1}

  The staleness penalty :math:`\Lambda` is 1 where the slow parameters have not
  moved since the round that the late change is of; it and the clipping keep the
  outer step from overshooting. In the first round nothing is there yet.

  Without ``delay`` there is no staleness: this is SlowMo, and with
  ``momentum=0`` :func:`jaxdist.local_sgd`.

  **On the wire:** what the communicator sends, every ``every`` steps. It is the
  change of the round before, so in the step that :func:`jaxdist.train_step`
  makes, its transfer lies open across the whole forward and backward pass of a
  round's last step. It costs each worker four more float32 copies of the
  parameters, five with feedback.

  Args:
    inner: any optimizer; its state stays with its worker.
    communicator: what exchanges the changes; its result agrees.
    every: steps in a round, at least 1.
    learning_rate: :math:`\eta`.
    momentum: :math:`\mu` in [0, 1). With 0.5, where all rounds are alike, the
      penalty is 2 and the outer step just a round's change; short runs, whose
      rounds are not, want less.
    clip: :math:`\phi`, the largest number in the momentum.
    penalty: instead of the norms' ratio, a constant for :math:`\Lambda`, at
      least 1.
    anchor: ``'current'`` takes :math:`d = x_r - \bar\theta_{r-1}`: stable
      without a penalty, but every other round then is a run of its own.
    delay: rounds that the mean is late, 1 or 0.
    feedback: whether to keep what the code drops and send it next time.
      ``None``: if the code is biased.
    decay: of the residual, in (0, 1].

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view. Its
    parameters drift: :func:`jaxdist.init` keeps one copy for each worker.

  Raises:
    ValueError: if an option is out of range, or workers would get different
      results.

  Examples:
    >>> import jaxdist as jd
    >>> tx = jd.co2(optax.adamw(4e-4), jd.mean('data'), every=48, clip=0.03)

  References:
    Sun et al, `CO2 <https://arxiv.org/abs/2401.16265>`_, 2024 (the formula of
    the penalty is ours: it is 1 where nothing moved, and grows with the gap)
  """
  base.check_communicator(communicator, agrees=True)
  _check(learning_rate, momentum, clip, penalty, anchor, delay)
  feedback = with_feedback(communicator, feedback, decay)
  axis = communicator.axis

  def init(params):
    slow = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    zeros = zero_residual(params, axis)
    return CO2State(
      slow,
      slow,
      optax.tree.zeros_like(slow),
      zeros if delay else PerWorker(None),
      zeros if feedback else PerWorker(None),
      communicator.init(params, feedback=feedback),
      jnp.zeros((), jnp.int32),
    )

  def meet(params, state, turn):
    del turn
    change = jax.tree.map(
      lambda p, s: p.astype(jnp.float32) - s, params, state.slow
    )
    mean, residual, comm_state = exchange_changes(
      communicator,
      state.snapshot.value if delay else change,
      state.residual,
      state.communicator,
      decay,
    )
    moved = jax.tree.map(jnp.subtract, state.slow, state.previous)
    descent = jax.tree.map(jnp.negative, mean)
    if delay and anchor == 'current':
      descent = jax.tree.map(jnp.add, descent, moved)
    divisor = penalty
    if penalty is None:
      stale = optax.tree.norm(moved) if delay else 0.0
      divisor = 1 + stale / (optax.tree.norm(descent) + 1e-12)
    trace = jax.tree.map(
      lambda m, d: jnp.clip(momentum * m + d / divisor, -clip, clip),
      state.momentum,
      descent,
    )
    slow = jax.tree.map(lambda s, m: s - learning_rate * m, state.slow, trace)
    finite = base.all_finite(mean)
    new = state._replace(
      slow=slow,
      previous=state.slow,
      momentum=trace,
      residual=residual,
      communicator=comm_state,
    )
    new = base.where(finite, new, state)._replace(
      snapshot=PerWorker(change if delay else None),
      skipped=state.skipped + jnp.where(finite, 0, 1),
    )
    return collectives.vary(new.slow, axis), new

  meeting = Meeting(axis, init, meet, ahead=delay > 0)
  return local_steps(inner, meeting, every)


def _check(learning_rate, momentum, clip, penalty, anchor, delay):
  if learning_rate < 0:
    raise ValueError(f'learning_rate must be at least 0, got {learning_rate}.')
  if not 0 <= momentum < 1:
    raise ValueError(f'momentum must be in [0, 1), got {momentum}.')
  if not clip > 0:
    raise ValueError(f'clip must be positive, got {clip}.')
  if penalty is not None and penalty < 1:
    raise ValueError(f'penalty must be at least 1, got {penalty}.')
  if anchor not in ('previous', 'current'):
    raise ValueError(f"anchor must be 'previous' or 'current', got {anchor!r}.")
  if delay not in (0, 1):
    raise ValueError(f'delay must be 0 or 1 rounds, got {delay!r}.')
