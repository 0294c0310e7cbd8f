"""SCALLION and SCAFCOM: local steps that controls keep from drifting apart."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxdist.communicators import checks, collectives
from jaxdist.communicators.base import Communicator
from jaxdist.outer.local_steps import Meeting, local_steps
from jaxdist.outer.participation import (
  check_participation,
  drawn_weight,
  num_drawn,
)
from jaxdist.state import PerWorker
from jaxdist.transforms import base
from jaxdist.transforms.error_feedback import zero_residual


class ControlState(NamedTuple):
  """State of the rounds of :func:`scallion` and :func:`scafcom`.

  Attributes:
    anchor: where the round began, in float32. The same on all workers.
    control: c, the mean of the workers' controls. The same on all workers.
    own: :math:`c_i`, what all know of this worker's gradient. Each worker's.
    momentum: :math:`v_i`; ``None`` for SCALLION. Each worker's own.
    apart: sum over the round so far of gradients minus ``own``. Each worker's.
    communicator: the communicator's.
    count: rounds so far. The same on all workers.
    skipped: rounds dropped for a non-finite number. The same on all workers.
  """

  anchor: optax.Params
  control: optax.Updates
  own: PerWorker
  momentum: PerWorker
  apart: PerWorker
  communicator: Any
  count: Int32[Array, '']
  skipped: Int32[Array, '']


def scallion(
  learning_rate: optax.ScalarOrSchedule,
  communicator: Communicator,
  every: int,
  *,
  scale: float = 0.1,
  participation: float = 1.0,
  server_learning_rate: float = 1.0,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""SGD in local steps, corrected by controls; unbiased codes.

  .. math::

    \text{K times:}\quad
    y^{(i)} &\gets y^{(i)} - \eta\,(g^{(i)} - c_i + c) \\
    \text{then, on the m workers } S:\quad
    q_i &= D\big(E(\alpha\,(\overline{g^{(i)}} - c_i))\big), \qquad
    c_i \gets c_i + q_i \\
    x &\gets x - \eta_s \eta K \Big(\frac1m \sum_{i \in S} q_i + c\Big),
    \qquad c \gets c + \frac1W \sum_{i \in S} q_i,
    \qquad y^{(i)} \gets x

  SCAFFOLD in a form with one message a worker, compressed: what is sent
  vanishes as gradients come to rest, however much the workers differ. With a
  code that drops nothing and ``scale=1`` it is SCAFFOLD; with ``every=1`` and
  all workers, that is data parallelism.

  **On the wire:** what the communicator sends, every ``every`` steps, also from
  workers that do not take part: they send zeros, take no steps, and keep their
  controls. It costs each worker four more float32 copies of the parameters.

  Args:
    learning_rate: :math:`\eta` of the local steps, a number or a schedule over
      steps; :math:`\eta K` then is its sum over the round.
    communicator: one whose result is the same on all workers and whose code is
      unbiased.
    every: K, steps in a round, at least 1.
    scale: :math:`\alpha` in (0, 1], about 1 over 1 plus the code's variance.
      Near 1 a code of high variance, such as ``random_k``, diverges.
    participation: the share of workers that take part in a round, in (0, 1]; m
      is rounded, and at least 1.
    server_learning_rate: :math:`\eta_s`.
    seed: of the draws of participants.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view. Its
    parameters drift: :func:`jaxdist.init` keeps one copy for each worker.

  Raises:
    ValueError: if an option is out of range, workers would get different
      results or late ones, the code is biased, or it does not contract and may
      be encoded twice, as with ``'auto'``.

  Examples:
    A hundred clients on one device, of which ten take part in a round:

    >>> import jax, jax.numpy as jnp
    >>> import jaxdist as jd
    >>> code = jd.random_k(0.1, block_size=128, unbiased=True)
    >>> tx = jd.scallion(0.1, jd.mean('data', code), 2, participation=0.1)
    >>> where = {'workers': 100, 'axis': 'data'}
    >>> state = jd.init(tx, jnp.zeros(3), **where)
    >>> loss_fn = lambda w, x: jnp.mean((w - x) ** 2)
    >>> step = jd.train_step(loss_fn, tx, **where)
    >>> for _ in range(2):
    ...   state, metrics = step(state, jnp.ones((100, 3)))

  References:
    Huang et al, `Stochastic Controlled Averaging for Federated Learning with
    Communication Compression <https://arxiv.org/abs/2308.08165>`_, 2024
    (algorithm 2)
  """
  if isinstance(communicator, Communicator) and not communicator.unbiased:
    raise ValueError(
      f'communicator must have an unbiased code, and {communicator!r} has '
      f'not. Use jd.scafcom.'
    )
  checks.check_fraction('scale', scale)
  return _controlled(
    learning_rate,
    communicator,
    every,
    scale,
    1.0,
    participation,
    server_learning_rate,
    seed,
  )


def scafcom(
  learning_rate: optax.ScalarOrSchedule,
  communicator: Communicator,
  every: int,
  *,
  beta: float = 0.2,
  participation: float = 1.0,
  server_learning_rate: float = 1.0,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r""":func:`scallion` with local momentum, for biased codes that contract.

  .. math::

    \text{K times:}\quad
    y^{(i)} &\gets y^{(i)}
      - \eta\,(\beta g^{(i)} + (1 - \beta) v_i - c_i + c) \\
    \text{then, on the m workers } S:\quad
    v_i &\gets (1 - \beta) v_i + \beta\, \overline{g^{(i)}}, \qquad
    q_i = D(E(v_i - c_i))

  and the rest as there. With ``beta=1`` and a code that drops nothing it is
  SCAFFOLD; with ``every=1`` and all workers, EF21-SGDM.

  **On the wire:** as :func:`scallion`. It costs each worker five more float32
  copies of the parameters.

  Args:
    learning_rate: as of :func:`scallion`.
    communicator: one whose result is the same on all workers and whose code
      contracts.
    every: K, steps in a round, at least 1.
    beta: the share of new gradients in the momentum, in (0, 1].
    participation: as of :func:`scallion`.
    server_learning_rate: :math:`\eta_s`.
    seed: of the draws of participants.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view. Its
    parameters drift: :func:`jaxdist.init` keeps one copy for each worker.

  Raises:
    ValueError: if an option is out of range, workers would get different
      results or late ones, or the code does not contract.

  Examples:
    >>> import jaxdist as jd
    >>> tx = jd.scafcom(
    ...   0.1, jd.mean('data', jd.top_k(0.01)), every=10, participation=0.1
    ... )

  References:
    Huang et al, 2024, as above (algorithm 3)
  """
  base.check_communicator(communicator, agrees=True)
  base.check_feedback(communicator)
  checks.check_fraction('beta', beta)
  return _controlled(
    learning_rate,
    communicator,
    every,
    1.0,
    beta,
    participation,
    server_learning_rate,
    seed,
  )


def _controlled(
  learning_rate,
  communicator,
  every,
  scale,
  beta,
  participation,
  server_learning_rate,
  seed,
):
  """Both: SCALLION has no momentum, SCAFCOM no scale."""
  base.check_communicator(communicator, agrees=True)
  base.check_prompt(communicator)
  # Controls add up all that was ever sent: what a second encoding drops must
  # come later, or one worker's own sum would have for good what the mean has
  # not.
  contracts = communicator.contraction >= 0
  if communicator.encodes_twice and not contracts:
    raise ValueError(
      f'communicator must encode once where its code does not contract, and '
      f"{communicator!r} may take 'two_shot'. Use method='gather' or 'psum'."
    )
  base.check_steps('every', every, 1)
  check_participation(participation)
  if not server_learning_rate > 0:
    raise ValueError(
      f'server_learning_rate must be positive, got {server_learning_rate}.'
    )
  axis = communicator.axis
  drawn = drawn_weight(axis, participation, seed)
  rate = learning_rate
  if not callable(learning_rate):
    rate = lambda step: jnp.float32(learning_rate)

  def init(params):
    zeros = zero_residual(params, axis)
    return ControlState(
      jax.tree.map(lambda x: x.astype(jnp.float32), params),
      base.zeros(params),
      zeros,
      zeros if beta < 1 else PerWorker(None),
      zeros,
      communicator.init(params, feedback=contracts),
      jnp.zeros((), jnp.int32),
      jnp.zeros((), jnp.int32),
    )

  def direct(gradients, state, step):
    own = state.own.value
    new = jax.tree.map(lambda g, c: g.astype(jnp.float32) - c, gradients, own)
    along = jax.tree.map(lambda a, c: beta * a + c, new, state.control)
    if beta < 1:
      along = jax.tree.map(
        lambda d, v, c: d + (1 - beta) * (v - c),
        along,
        state.momentum.value,
        own,
      )
    # A step that is left out counts as one with the gradient that all expect.
    counts = base.all_finite(gradients) & (drawn(state.count) > 0)
    apart = base.where(
      counts, optax.tree.add(state.apart.value, new), state.apart.value
    )
    along = optax.tree.scale(rate(step), along)
    return along, state._replace(apart=PerWorker(apart))

  def meet(params, state, turn):
    del params, turn
    weight, own = drawn(state.count), state.own.value
    new = optax.tree.scale(1 / every, state.apart.value)
    momentum = None
    if beta < 1:
      momentum = jax.tree.map(
        lambda v, c, a: (1 - beta) * v + beta * (c + a),
        state.momentum.value,
        own,
        new,
      )
      new = optax.tree.sub(momentum, own)
      momentum = base.where(weight > 0, momentum, state.momentum.value)
    message = base.where(
      weight > 0,
      optax.tree.scale(scale, new),
      optax.tree.zeros_like(new),
    )
    mean, sent, comm_state = communicator.exchange(message, state.communicator)
    workers = collectives.axis_size(axis)
    over_drawn = workers / num_drawn(participation, workers)
    steps = state.count * every + jnp.arange(every)
    length = server_learning_rate * jnp.sum(jax.vmap(rate)(steps))
    anchor = jax.tree.map(
      lambda x, q, c: x - length * (over_drawn * q + c),
      state.anchor,
      mean,
      state.control,
    )
    after = state._replace(
      anchor=anchor,
      control=optax.tree.add(state.control, mean),
      own=PerWorker(optax.tree.add(own, sent)),
      momentum=PerWorker(momentum),
      communicator=comm_state,
    )
    finite = base.all_finite(mean)
    after = base.where(finite, after, state)._replace(
      apart=PerWorker(optax.tree.zeros_like(state.apart.value)),
      count=state.count + 1,
      skipped=state.skipped + jnp.where(finite, 0, 1),
    )
    return collectives.vary(after.anchor, axis), after

  takes_part = None
  if participation < 1:
    takes_part = lambda state: drawn(state.count) > 0
  meeting = Meeting(axis, init, meet, takes_part=takes_part, direct=direct)
  return local_steps(optax.sgd(1.0), meeting, every)
