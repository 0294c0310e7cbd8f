"""Error feedback: remember what compression dropped, and send it next time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int32

from jaxdist.communicators import collectives
from jaxdist.communicators.base import Communicator
from jaxdist.state import Axis, PerWorker
from jaxdist.transforms import base


class ErrorFeedbackState(NamedTuple):
  """State of :func:`error_feedback`.

  Attributes:
    residual: what has been dropped so far, in float32, shaped like the params.
      Each worker's own; the mean over workers is what the model is still owed.
    communicator: the communicator's.
    skipped: exchanges dropped for a non-finite number. The same on all workers.
    layout: what the params looked like at init.
  """

  residual: PerWorker
  communicator: Any
  skipped: Int32[Array, '']
  layout: base.Layout


def error_feedback(
  communicator: Communicator, *, decay: ArrayLike = 1.0
) -> optax.GradientTransformation:
  r"""Communicates updates and carries what was dropped into the next step.

  .. math::

    x_t = g_t + \beta e_t, \qquad
    \bar g_t = \frac1W \sum_i D(E(x_t^{(i)})), \qquad
    e_{t+1} = x_t - D(E(x_t))

  **On the wire:** what the communicator sends. With a code that drops nothing
  the residual stays zero. If a worker's updates are not finite, all workers see
  that in the result: they put out zeros together and keep their residuals.

  Args:
    communicator: one whose result is the same on all workers.
    decay: :math:`\beta` in (0, 1]; below 1 forgets old residuals, which lag
      behind.

  Returns:
    A :class:`optax.GradientTransformation` for the worker view.

  Raises:
    ValueError: if workers would get different results, the code does not
      contract (its residual would grow without bound), or ``decay`` is outside
      (0, 1].

  Examples:
    >>> import jaxdist as jd
    >>> code = jd.top_k(1 / 128, block_size=128)  # One number of 128.
    >>> tx = jd.error_feedback(jd.mean('data', code))
    >>> def two_steps(g):
    ...   first, state = tx.update(g, tx.init(g))
    ...   second, state = tx.update(jnp.zeros_like(g), state)
    ...   return first, second
    >>> jax.vmap(two_steps, axis_name='data')(jnp.array([[3., 1.], [3., 1.]]))
    (Array([[3., 0.], [3., 0.]], dtype=float32),
     Array([[0., 1.], [0., 1.]], dtype=float32))

  References:
    Seide et al, 1-Bit Stochastic Gradient Descent, Interspeech 2014;
    Karimireddy et al, `Error Feedback Fixes SignSGD
    <https://arxiv.org/abs/1901.09847>`_, 2019 (algorithm 2)
  """
  base.check_communicator(communicator, agrees=True)
  base.check_feedback(communicator, decay)

  def init_fn(params):
    return ErrorFeedbackState(
      zero_residual(params, communicator.axis),
      communicator.init(params, feedback=True),
      jnp.zeros((), jnp.int32),
      base.Layout.of(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    base.check_updates(updates, state.layout, communicator.axis)
    mean, residual, comm_state = exchange_with_feedback(
      communicator, updates, state.residual, state.communicator, decay
    )
    new = state._replace(residual=residual, communicator=comm_state)
    return base.settle(mean, new, state, like=updates)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def zero_residual(params: optax.Params, axis: Axis) -> PerWorker:
  """A residual before anything was dropped."""
  return PerWorker(collectives.vary(base.zeros(params), axis))


def exchange_with_feedback(
  communicator: Communicator,
  updates: optax.Updates,
  residual: PerWorker,
  communicator_state: Any,
  decay: ArrayLike,
) -> tuple[optax.Updates, PerWorker, Any]:
  """One exchange of updates plus decayed residual.

  Returns:
    The communicator's result in float32, the new residual, and the
    communicator's new state.
  """
  target = jax.tree.map(
    lambda g, e: g.astype(jnp.float32) + decay * e, updates, residual.value
  )
  mean, sent, state = communicator.exchange(target, communicator_state)
  residual = PerWorker(jax.tree.map(jnp.subtract, target, sent))
  return mean, residual, state
