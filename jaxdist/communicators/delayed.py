"""A communicator whose result is applied one step late, behind the compute."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdist.communicators import base, collectives
from jaxdist.state import PerWorker


class DelayedState(NamedTuple):
  """State of :func:`delayed`.

  Attributes:
    pending: the tree of the last exchange, in float32, which travels in the
      next one. Each worker's own.
    communicator: the delayed communicator's.
  """

  pending: PerWorker
  communicator: Any


def delayed(communicator: base.Communicator) -> base.Communicator:
  r"""Exchanges what was handed in one step ago.

  .. math::

    \bar x_t = \text{exchange}(x_{t-1}), \qquad x_{-1} = 0

  What travels is in the state when a step begins, and nothing in the step's
  forward and backward pass waits for it: the compiler can keep the transfer
  open until the very end. ``sent`` is what the communicator has taken over for
  good: all of :math:`x_t`, less what the code dropped from
  :math:`x_{t-1}`, so that feedback sends that part again.

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
    )

  def exchange(tree, state):
    base.exchanged_leaves(tree)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    pending = state.pending.value
    result, sent, inner = communicator.exchange(pending, state.communicator)
    ok = jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(wide)])
    bad = collectives.psum(1 - jnp.all(ok).astype(jnp.int32), axis)  # the wire
    result = jax.tree.map(
      lambda r, x: jnp.where(bad > 0, jnp.nan, r).astype(x.dtype), result, tree
    )
    sent = jax.tree.map(lambda x, s, p: x + (s - p), wide, sent, pending)
    return result, sent, DelayedState(PerWorker(wide), inner)

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
