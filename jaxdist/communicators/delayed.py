"""A mean that is applied one step late: its transfer waits for no compute."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxdist.communicators import base, collectives
from jaxdist.communicators.rounds import Rounds
from jaxdist.state import PerWorker


class DelayedState(NamedTuple):
  """State of :func:`delayed`.

  Attributes:
    count: exchanges so far; seeds the codes. The same on all workers.
    words: what travels in the next exchange, encoded, for each bucket; None if
      there is no code. Each worker's own.
    is_encoded: 1 if ``words`` are those of ``sent``; 0 before the first
      exchange and where the number of workers has changed since.
    sent: the leaves that it decodes to, in float32. Each worker's own.
    dropped: as in :class:`jaxdist.communicators.mean.MeanState`.
    lost: exchanges whose result was not finite. The same on all workers.
  """

  count: Int32[Array, '']
  words: PerWorker
  is_encoded: PerWorker
  sent: PerWorker
  dropped: PerWorker
  lost: Int32[Array, '']


def delayed(rounds: Rounds, name: str, coded: bool) -> base.Communicator:
  r"""The mean of what was handed in one step ago.

  .. math::

    \bar x_t = \frac1W \sum_i D(w_t^{(i)}), \qquad
    w_{t+1} = E(x_t), \qquad w_0 = 0

  A step ends by encoding; what it encodes is in the state when the next begins,
  so that nothing in the forward and backward pass waits for the transfer, nor
  the transfer for them: the compiler can keep it open until the very end. Of
  two rounds that holds for the first. ``sent`` is :math:`D(w_{t+1})`, what has
  been taken over for good.

  Words cannot be averaged. When the number of workers changes they are
  forgotten, and the mean over workers of what they decode to, which the state
  has too, is encoded anew with the next updates.

  What is in flight is finite; where the mean of it is not, as a sum near the
  end of the range, it would be so each time, and is given up: the result is
  zero. **On the wire:** what ``rounds`` send, and one int32 all-reduce by which
  a number that is not finite shows at once: it must not be in flight.

  Args:
    rounds: of the mean.
    name: of the communicator.
    coded: whether to keep words: without a code they are what is sent itself.

  Returns:
    A communicator whose first result is zero.
  """
  axis = rounds.axis

  def new_state(count, words, sent, dropped, lost, is_encoded=1):
    is_encoded = jnp.int32(is_encoded) if coded else None
    own = collectives.vary((words if coded else None, is_encoded, sent), axis)
    return DelayedState(
      count,
      PerWorker(own[0], 'zero'),
      PerWorker(own[1], 'zero'),
      PerWorker(own[2]),
      dropped,
      lost,
    )

  def init(shapes, feedback):
    zeros = [jnp.zeros(s.shape, jnp.float32) for s in shapes]
    count = jnp.zeros((), jnp.int32)
    dropped = rounds.new_rows(shapes, feedback)
    encode = lambda: rounds.encode(zeros, count, rounds.rows(dropped, shapes))
    like = jax.eval_shape(encode)[0]
    words = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return new_state(count, words, zeros, dropped, count, is_encoded=0)

  def exchange(leaves, state):
    rows = rounds.rows(state.dropped, leaves)
    if coded:
      words = state.words.value
    else:
      words, _, _ = rounds.encode(state.sent.value, state.count, rows)
    results, new_rows = rounds.exchange(words, leaves, state.count - 1, rows)
    arrived = base.all_finite(results)
    rows = base.where(arrived, new_rows, rows)
    sent = sent_now = leaves
    if coded:
      # What was in flight when the number of workers changed starts once more.
      again = [
        jnp.where(state.is_encoded.value, 0, x) for x in state.sent.value
      ]
      words, sent, rows = rounds.encode(
        list(map(jnp.add, leaves, again)), state.count, rows
      )
      sent_now = list(map(jnp.subtract, sent, again))
    results = _checked(results, arrived, (leaves, sent), axis)
    lost = state.lost + jnp.where(arrived, 0, 1)
    dropped = rounds.held(rows)
    return (
      results,
      sent_now,
      new_state(state.count + 1, words, sent, dropped, lost),
    )

  def alone(leaves, state):
    """Gives back the last updates, and what was dropped before."""
    feedback = state.dropped.value is not None
    leaves = [leaf.astype(jnp.float32) for leaf in leaves]
    results = state.sent.value
    if feedback:
      owed = rounds.owed(state.dropped.value, leaves)
      results = list(map(jnp.add, results, owed))
    arrived = base.all_finite(results)
    new = init(leaves, feedback)._replace(
      count=state.count + 1,
      sent=PerWorker(collectives.vary(leaves, axis)),
      lost=state.lost + jnp.where(arrived, 0, 1),
    )
    return _checked(results, arrived, leaves, axis), new

  def bytes_sent(shapes, workers):
    agreement = 2 * 4 * (workers - 1) / workers
    return rounds.bytes_sent(shapes, workers) + agreement

  return base.over_leaves(
    name,
    axis,
    init,
    exchange,
    bytes_sent,
    alone,
    contraction=rounds.code.contraction,
    unbiased=rounds.code.unbiased,
    late=True,
    encodes_twice=rounds.encodes_twice,
  )


def _checked(results, arrived, handed_in, axis):
  """Zeros for what is given up; not a number if what is handed in is none."""
  bad = 1 - base.all_finite(handed_in).astype(jnp.int32)
  bad = collectives.psum(bad, axis) > 0  # the wire
  return [jnp.where(bad, jnp.nan, jnp.where(arrived, r, 0)) for r in results]
