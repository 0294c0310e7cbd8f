"""A communicator whose result is applied one step late, behind the compute."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxdist.communicators import base, collectives
from jaxdist.state import PerWorker


class DelayedState(NamedTuple):
  """State of :func:`delayed`.

  Attributes:
    pending: the tree of the last exchange, in float32, which travels in the
      next one. Each worker's own.
    communicator: the delayed communicator's.
    lost: exchanges whose result was not finite. The same on all workers.
  """

  pending: PerWorker
  communicator: Any
  lost: Int32[Array, '']


def delayed(communicator: base.Communicator) -> base.Communicator:
  r"""Exchanges what was handed in one step ago.

  .. math::

    \bar x_t = \text{exchange}(x_{t-1}), \qquad x_{-1} = 0

  What travels is in the state when a step begins, and nothing in the step's
  forward and backward pass waits for it: the compiler can keep the transfer
  open until the very end. ``sent`` is what the communicator has taken over for
  good: all of :math:`x_t`, less what the code dropped from
  :math:`x_{t-1}`, so that feedback sends that part again. What is in flight is
  finite; where its exchange is not all the same, as a sum near the end of the
  range, it would be so each time, and is given up: the result is zero.

  **On the wire:** what the communicator sends, and one int32 all-reduce by
  which a number that is not finite shows at once: it must not be in flight.

  Args:
    communicator: any whose result agrees between workers.

  Returns:
    A communicator whose first result is zero.
  """
  axis = communicator.axis

  def init(tree, feedback=False):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)
    return DelayedState(
      PerWorker(collectives.vary(zeros, axis)),
      communicator.init(tree, feedback=feedback),
      jnp.zeros((), jnp.int32),
    )

  def exchange(tree, state):
    base.exchanged_leaves(tree)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    pending = state.pending.value
    result, sent, inner = communicator.exchange(pending, state.communicator)
    bad = 1 - base.all_finite(wide).astype(jnp.int32)
    bad = collectives.psum(bad, axis) > 0  # the wire
    arrived = base.all_finite(result)
    result = jax.tree.map(
      lambda r, x: jnp.where(
        bad, jnp.nan, base.cast(jnp.where(arrived, r, 0), x.dtype)
      ),
      result,
      tree,
    )
    sent = jax.tree.map(
      lambda x, s, p: jnp.where(arrived, x + (s - p), x), wide, sent, pending
    )
    inner = base.where(arrived, inner, state.communicator)
    lost = state.lost + jnp.where(arrived, 0, 1)
    return result, sent, DelayedState(PerWorker(wide), inner, lost)

  def bytes_sent(tree, workers):
    agreement = 2 * 4 * (workers - 1) / workers
    return communicator.bytes_sent(tree, workers) + agreement

  return dataclasses.replace(
    communicator,
    name=f'{communicator.name[:-1]}, delay=1)',
    init=init,
    exchange=exchange,
    bytes_sent=bytes_sent,
  )
