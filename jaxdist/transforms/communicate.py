"""Updates through a communicator, with nothing remembered."""

import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxdist.communicators.base import Communicator
from jaxdist.transforms import base


class CommunicateState(NamedTuple):
  """State of :func:`communicate`.

  Attributes:
    communicator: the communicator's.
    skipped: exchanges dropped for a non-finite number. The same on all workers.
    layout: what the params looked like at init.
  """

  communicator: Any
  skipped: Int32[Array, '']
  layout: base.Layout


def communicate(communicator: Communicator) -> optax.GradientTransformation:
  """Replaces each worker's updates by what the communicator makes of all.

  With ``jd.mean(axis)`` this is data parallelism. If a worker's updates are not
  finite, all workers see that in the result and put out zeros together.

  Args:
    communicator: one whose result is the same on all workers. A biased code
      loses what it drops for good: a warning says so; see
      :func:`jaxdist.error_feedback`.

  Returns:
    A :class:`optax.GradientTransformation` for the worker view.

  Raises:
    ValueError: if workers would get different results.

  Examples:
    >>> import jax
    >>> import jaxdist as jd
    >>> tx = jd.communicate(jd.mean('data'))
    >>> grads = jnp.array([[1.0, 2.0], [3.0, 6.0]])  # Two workers.
    >>> update = lambda g: tx.update(g, tx.init(g))[0]
    >>> jax.vmap(update, axis_name='data')(grads)
    Array([[2., 4.],
           [2., 4.]], dtype=float32)
  """
  base.check_communicator(communicator, agrees=True)
  if not communicator.unbiased:
    warnings.warn(
      f'{communicator!r} is biased, and without feedback what it drops is lost '
      f'for good; use jd.error_feedback.',
      stacklevel=2,
    )

  def init_fn(params):
    return CommunicateState(
      communicator.init(params, feedback=False),
      jnp.zeros((), jnp.int32),
      base.Layout.of(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    base.check_updates(updates, state.layout, communicator.axis)
    mean, _, comm_state = communicator.exchange(updates, state.communicator)
    new = state._replace(communicator=comm_state)
    return base.settle(mean, new, state, like=updates)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
