"""The mean over workers through a low-rank factorisation: PowerSGD."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxdist.communicators import base, checks, collectives
from jaxdist.kernels.orthonormalize.api import orthonormalize


class LowRankMeanState(NamedTuple):
  """State of :func:`low_rank_mean`; the same on all workers.

  Attributes:
    count: exchanges so far; seeds fresh columns.
    bases: for each leaf the right factor of the last exchange, from which the
      next power iteration starts; of no columns where it is not factored.
  """

  count: Int32[Array, '']
  bases: list[Float[Array, 'cols rank']]


def low_rank_mean(axis: str, rank: int, *, seed: int = 0) -> base.Communicator:
  r"""The mean of matrices, each sent as its part in a shared subspace.

  One step of a power iteration, warm-started from the last exchange:

  .. math::

    P = \operatorname{orth}\Big(\frac1W \sum_i M_i Q\Big), \qquad
    Q_i' = M_i^\top P, \qquad \bar M = P \Big(\frac1W\sum_i Q_i'\Big)^\top

  and this worker's contribution is :math:`P Q_i'^\top`. Leaves with more than
  two dimensions are matrices of their last dimension; leaves that the factors
  would not make smaller (vectors, small matrices) travel whole in the first
  sum. **On the wire:** two float32 all-reduces, of ``rank * rows`` and ``rank *
  columns`` numbers for each factored leaf. Factors are linear, so nothing is
  encoded twice. A column of Q that vanished (a leaf whose gradient was zero) is
  drawn anew.

  Args:
    axis: name of the axis that the workers lie along.
    rank: columns of the factors, at least 1.
    seed: of the first and of fresh columns.

  Returns:
    A :class:`Communicator`; biased, made for feedback.

  Raises:
    ValueError: if an option is out of range.

  Examples:
    >>> import jaxdist as jd
    >>> params = {'w': jnp.zeros((512, 256)), 'b': jnp.zeros(256)}
    >>> jd.low_rank_mean('data', rank=4).bytes_sent(params, workers=2)
    13312.0

  References:
    Vogels et al, `PowerSGD <https://arxiv.org/abs/1905.13727>`_, 2019,
    algorithms 1 and 2
  """
  checks.check_axis(axis)
  rank = checks.integer('rank', rank, 1)
  seed = checks.seed(seed)

  def init(shapes, feedback):
    del feedback  # One linear encoding: the caller's residual has it all.
    columns = lambda s: rank if _is_factored(s, rank) else 0
    zeros = [
      jnp.zeros((_matrix_shape(s)[1], columns(s)), jnp.float32) for s in shapes
    ]
    return LowRankMeanState(jnp.zeros((), jnp.int32), zeros)

  def exchange(leaves, state):
    factored = [_is_factored(leaf, rank) for leaf in leaves]
    matrices = [
      leaf.reshape(_matrix_shape(leaf))
      for leaf, is_factored in zip(leaves, factored, strict=True)
      if is_factored
    ]
    whole = [
      leaf
      for leaf, is_factored in zip(leaves, factored, strict=True)
      if not is_factored
    ]
    key = collectives.exchange_key(seed, state.count)
    keys = jax.random.split(key, max(1, len(matrices)))
    # A state of a larger rank will do: see per_leaf.
    starts = [
      q[:, :rank]
      for q, is_factored in zip(state.bases, factored, strict=True)
      if is_factored
    ]
    starts = map(_with_fresh_columns, starts, keys)
    products = [m @ q for m, q in zip(matrices, starts, strict=True)]

    *products, means = _fused_mean([*products, whole], axis)  # the wire
    left = [orthonormalize(p) for p in products]
    own = [m.T @ p for m, p in zip(matrices, left, strict=True)]
    right = _fused_mean(own, axis)  # the wire

    def merged(rights, others):
      outer = (p @ q.T for p, q in zip(left, rights, strict=True))
      others = iter(others)
      return [
        next(outer).reshape(leaf.shape) if is_factored else next(others)
        for leaf, is_factored in zip(leaves, factored, strict=True)
      ]

    rights = iter(right)
    bases = [
      _widened(next(rights), q.shape[1]) if is_factored else q
      for q, is_factored in zip(state.bases, factored, strict=True)
    ]
    state = LowRankMeanState(state.count + 1, bases)
    return merged(right, means), merged(own, whole), state

  def bytes_sent(shapes, workers):
    numbers = sum(
      rank * sum(_matrix_shape(s))
      if _is_factored(s, rank)
      else math.prod(s.shape)
      for s in shapes
    )
    return 2 * 4 * numbers * (workers - 1) / workers

  return base.over_leaves(
    f'low_rank_mean({axis!r}, rank={rank})',
    axis,
    init,
    exchange,
    bytes_sent,
    contraction=0.0,  # A projection never expands; nothing more is certain.
    unbiased=False,
  )


def _matrix_shape(leaf):
  if leaf.ndim < 2:
    return (math.prod(leaf.shape), 1)
  return (math.prod(leaf.shape[:-1]), leaf.shape[-1])


def _is_factored(leaf, rank):
  rows, cols = _matrix_shape(leaf)
  return rank * (rows + cols) < rows * cols


def _with_fresh_columns(q, key):
  """Replaces columns without direction, as all are at the first exchange."""
  vanished = jnp.sum(q * q, axis=0) == 0
  return jnp.where(vanished, jax.random.normal(key, q.shape), q)


def _widened(q, columns):
  """A base with room for more columns, which vanish."""
  return jnp.pad(q, ((0, 0), (0, columns - q.shape[1])))


def _fused_mean(tree, axis):
  """The mean over workers of all leaves, in one all-reduce."""
  leaves, treedef = jax.tree.flatten(tree)
  if not leaves:
    return tree
  flat = jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
  mean = jax.lax.psum(flat, axis) / jax.lax.axis_size(axis)
  ends = [0]
  for leaf in leaves:
    ends.append(ends[-1] + leaf.size)
  return jax.tree.unflatten(
    treedef,
    [
      mean[a:b].reshape(leaf.shape)
      for a, b, leaf in zip(ends, ends[1:], leaves, strict=False)
    ],
  )
