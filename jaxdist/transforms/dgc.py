"""Deep Gradient Compression: momentum is built up where gradients wait."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxdist.communicators import collectives
from jaxdist.communicators.base import Communicator
from jaxdist.communicators.partition import partition
from jaxdist.communicators.uncompressed import uncompressed
from jaxdist.state import PerWorker
from jaxdist.transforms import base
from jaxdist.transforms.error_feedback import zero_residual


class DGCState(NamedTuple):
  """State of :func:`dgc`.

  Attributes:
    momentum: of each worker's gradients, in float32, shaped like the params.
      Each worker's own.
    residual: the velocity that was not sent so far, likewise.
    communicator: the communicators'.
    skipped: exchanges dropped for a non-finite number. The same on all workers.
    layout: what the params looked like at init.
  """

  momentum: PerWorker
  residual: PerWorker
  communicator: Any
  skipped: Int32[Array, '']
  layout: base.Layout


def dgc(
  communicator: Communicator,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
  masking: bool = True,
  max_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Momentum SGD whose velocities wait on their worker until they are large.

  .. math::

    u_t = m u_{t-1} + g_t, \qquad x_t = v_{t-1} + u_t, \qquad
    v_t = x_t - D(E(x_t)), \qquad u_t \gets 0 \text{ where sent}

  for each worker's gradient :math:`g`, and the update is the mean of what the
  workers send. With Nesterov's momentum :math:`u_t = m (u_{t-1} + g_t)` and
  :math:`x_t = v_{t-1} + u_t + g_t`. It has its momentum inside: follow it by
  the learning rate alone, as in ``optax.chain(jd.dgc(...), optax.sgd(0.1))``.

  **On the wire:** matrices go through the communicator; leaves with fewer than
  two dimensions, such as biases, go whole in float32 and are never masked. With
  a code that drops nothing and no masking it is momentum SGD; without momentum
  it is :func:`jaxdist.error_feedback`. If a worker's updates are not finite,
  all put out zeros together and keep what they hold back.

  A high compression from the first step on can hurt: the paper sends more in
  the first epochs, for which there is :func:`jaxdist.staged`.

  Args:
    communicator: for matrices, made for a sparse code, and with the same result
      on all workers.
    momentum: :math:`m` in [0, 1).
    nesterov: whether to use Nesterov's momentum.
    masking: whether momentum restarts from zero where a number was sent, lest
      it carries old gradients on. It damps the momentum; with a code that sends
      all numbers none is left.
    max_norm: the norm to which the mean gradient would be clipped. Each worker
      clips its own, before it is added to anything, to :math:`\sqrt W` times
      that, which is the norm of a gradient of which the mean of W is so large
      and that is mostly noise.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view.

  Raises:
    ValueError: if workers would get different results, the code does not
      contract, or a number is out of range.

  Examples:
    >>> import jaxdist as jd
    >>> sparse = lambda d: jd.mean('data', jd.top_k(d), 'gather')
    >>> tx = optax.chain(
    ...   jd.dgc(
    ...     jd.staged(
    ...       [jd.mean('data'), sparse(1 / 16), sparse(1 / 250), sparse(1e-3)],
    ...       boundaries=[500, 1000, 1500],
    ...     ),
    ...     max_norm=1.0,
    ...   ),
    ...   optax.sgd(0.1),
    ... )

  References:
    Lin et al, `Deep Gradient Compression <https://arxiv.org/abs/1712.01887>`_,
    2018
  """
  base.check_communicator(communicator, agrees=True)
  base.check_feedback(communicator)
  if not 0 <= momentum < 1:
    raise ValueError(f'momentum must be in [0, 1), got {momentum}.')
  if max_norm is not None and not max_norm > 0:
    raise ValueError(f'max_norm must be positive, got {max_norm}.')
  axis = communicator.axis
  exchanger = partition(
    {'matrix': communicator, 'whole': uncompressed(communicator)},
    lambda tree: jax.tree.map(
      lambda x: 'matrix' if x.ndim > 1 else 'whole', tree
    ),
  )

  def init_fn(params):
    return DGCState(
      zero_residual(params, axis),
      zero_residual(params, axis),
      exchanger.init(params, feedback=True),
      jnp.zeros((), jnp.int32),
      base.Layout.of(params),
    )

  def clipped(grads):
    if max_norm is None:
      return grads
    limit = max_norm * collectives.axis_size(axis) ** 0.5
    factor = jnp.minimum(1, limit / optax.tree.norm(grads))
    return jax.tree.map(lambda g: g * factor, grads)

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    base.check_updates(updates, state.layout, axis)
    grads = clipped(jax.tree.map(lambda g: g.astype(jnp.float32), updates))
    if nesterov:
      u = jax.tree.map(
        lambda u, g: momentum * (u + g), state.momentum.value, grads
      )
      velocity = optax.tree.add(u, grads)
    else:
      u = jax.tree.map(
        lambda u, g: momentum * u + g, state.momentum.value, grads
      )
      velocity = u
    target = optax.tree.add(velocity, state.residual.value)
    result, sent, comm_state = exchanger.exchange(target, state.communicator)
    if masking:
      u = jax.tree.map(
        lambda u, s: jnp.where(s != 0, 0, u) if s.ndim > 1 else u, u, sent
      )
    new = state._replace(
      # An empty leaf would lose the mark here.
      momentum=PerWorker(collectives.vary(u, axis)),
      residual=PerWorker(optax.tree.sub(target, sent)),
      communicator=comm_state,
    )
    return base.settle(result, new, state, like=updates)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
