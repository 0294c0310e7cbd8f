"""The mean over workers of what each of them encodes."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxdist.communicators import base, checks
from jaxdist.communicators.delayed import delayed
from jaxdist.communicators.rounds import Method, Rounds
from jaxdist.compressors import base as codes
from jaxdist.compressors.identity import identity
from jaxdist.state import PerWorker


class MeanState(NamedTuple):
  """State of :func:`mean`.

  Attributes:
    count: exchanges so far; seeds the codes. The same on all workers.
    dropped: what encoding the reduced chunks dropped, for each bucket a block
      matrix of this worker's chunk; ``None`` where there is never a second
      encoding, or no feedback. Each worker's own.
  """

  count: Int32[Array, '']
  dropped: PerWorker


def mean(
  axis: str,
  compressor: codes.Compressor | None = None,
  method: Method = 'auto',
  delay: int = 0,
  *,
  bucket_bytes: int = 2**28,
  seed: int = 0,
) -> base.Communicator:
  r"""The mean over workers of what their trees decode to.

  .. math:: \bar x = \frac1W \sum_i D(E(x_i))

  Leaves are laid end to end, cut into buckets and blocks, encoded, and
  exchanged as packed words by one of three patterns. **On the wire**, for a
  payload of p bytes a worker, each worker sends

  ============ ================ ==============================================
  ``psum``     2 p (W-1)/W      payloads are summed on the way; linear codes
  ``gather``   p (W-1)          every worker gets all payloads and decodes them
  ``two_shot`` about 2 p (W-1)/W  each worker reduces one chunk (all_to_all) and
                                encodes its mean again (all_gather)
  ============ ================ ==============================================

  in one collective a bucket and round. With feedback, what the second encoding
  of ``two_shot`` drops is kept by the worker that encoded it and added to its
  chunk next time, as the server error of 1-bit Adam; where ``'auto'`` takes
  another pattern after a change of the number of workers, it travels with the
  next exchange. With one worker nothing is sent and nothing is lost. Bits on
  the wire need no further agreement: a non-finite number on one worker makes
  the result non-finite on all.

  Args:
    axis: name of the axis that the workers lie along.
    compressor: the code; ``None`` sends float32.
    method: the pattern. ``'auto'`` takes ``psum`` for linear codes, else
      ``gather`` where it sends no more than ``two_shot`` or is small (64 KiB),
      else ``two_shot``.
    delay: 1 gives the mean of what was handed in one step ago (zeros at first).
      A step encodes what the next one sends, so that in a step nothing waits
      for the transfer, nor the transfer for anything; of ``two_shot`` that
      holds for the first round. One int32 all-reduce more tells at once of
      numbers that are not finite.
    bucket_bytes: float32 bytes of updates in a bucket; bounds the memory that
      encoding needs.
    seed: of the codes that draw random numbers.

  Returns:
    A :class:`Communicator`.

  Raises:
    ValueError: for a pattern that cannot be right with this code, or an option
      out of range.

  Examples:
    >>> import jaxdist as jd
    >>> communicator = jd.mean('data', jd.quantize(bits=4))
    >>> dense = jd.mean('data')
    >>> params = {'w': jnp.zeros((1024, 1024))}
    >>> dense.bytes_sent(params, 8) / communicator.bytes_sent(params, 8)
    7.93...

  References:
    Tang et al, `1-bit Adam <https://arxiv.org/abs/2102.02888>`_, 2021 (the two
    rounds and the second residual)
  """
  checks.check_axis(axis)
  checks.check_compressor(compressor)
  code = compressor if compressor is not None else identity(block_size=128)
  _check_method(method, code)
  delay = checks.integer('delay', delay, 0, 2)
  bucket_bytes = checks.integer('bucket_bytes', bucket_bytes, 1)
  seed = checks.seed(seed)
  rounds = Rounds(axis, code, method, bucket_bytes, seed)
  name = f'mean({axis!r}'
  name += f', {code!r}' if compressor is not None else ''
  name += f', method={method!r}' if method != 'auto' else ''
  if delay:
    return delayed(rounds, f'{name}, delay=1)', coded=compressor is not None)

  def init(shapes, feedback):
    return MeanState(
      jnp.zeros((), jnp.int32), rounds.new_rows(shapes, feedback)
    )

  def exchange(leaves, state):
    rows = rounds.rows(state.dropped, leaves)
    crossing, sents, rows = rounds.encode(leaves, state.count, rows)
    results, rows = rounds.exchange(crossing, leaves, state.count, rows)
    return results, sents, MeanState(state.count + 1, rounds.held(rows))

  def alone(leaves, state):
    """Takes what was dropped while there were more workers."""
    if state.dropped.value is None:
      return leaves, state
    owed = rounds.owed(state.dropped.value, leaves)
    return list(map(jnp.add, leaves, owed)), init(leaves, feedback=True)

  return base.over_leaves(
    f'{name})',
    axis,
    init,
    exchange,
    rounds.bytes_sent,
    alone,
    contraction=code.contraction,
    unbiased=code.unbiased,
    encodes_twice=rounds.encodes_twice,
  )


def _check_method(method, code):
  methods = Method.__args__
  if method not in methods:
    raise ValueError(f'method must be one of {methods}, got {method!r}.')
  if method == 'psum' and not code.linear:
    raise ValueError(
      f"method='psum' sums payloads before decoding and needs a linear code; "
      f'{code!r} is not. Use method="gather", "two_shot" or "auto".'
    )
  if method == 'two_shot' and code.block_size is None:
    raise ValueError(
      f"method='two_shot' gives each worker some of the blocks; {code!r} has "
      f'only one. Use method="gather".'
    )
