"""A few levels for each block, found by k-means: each number says which."""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt32

from jaxdist.compressors.base import Compressor, Packed
from jaxdist.compressors.checks import call, check_block_size, check_density
from jaxdist.compressors.top_k import num_kept
from jaxdist.kernels.numbers import largest_magnitude, relative
from jaxdist.kernels.top_k import api as selection

_ITERATIONS = 4


class Codebook(NamedTuple):
  """Which level each number has.

  Attributes:
    codes: the level's number.
    levels: of each block, in ascending order.
  """

  codes: Packed
  levels: Float32[Array, 'blocks levels']


def _nearest(
  x: Float32[Array, 'blocks size'], levels: Float32[Array, 'blocks levels']
) -> UInt32[Array, 'blocks size']:
  """The number of the nearest level, of two the lower one."""
  codes = jnp.zeros(x.shape, jnp.uint32)
  for j in range(levels.shape[1] - 1):
    middle = (levels[:, j : j + 1] + levels[:, j + 1 : j + 2]) / 2
    codes += (x > middle).astype(jnp.uint32)
  return codes


def _means(x, codes, levels):
  """The mean of each level's numbers; the level where there are none."""
  means = []
  for j in range(levels.shape[1]):
    mine = codes == j
    count = jnp.sum(mine, axis=1)
    total = jnp.sum(jnp.where(mine, x, 0), axis=1)
    means.append(
      jnp.where(count > 0, total / jnp.maximum(count, 1), levels[:, j])
    )
  return jnp.stack(means, axis=1)


def codebook(
  levels: int = 3, *, density: float = 1.0, block_size: int | None = 1024
) -> Compressor:
  r"""Replaces each number by the nearest of a few levels (k-means, FedZip).

  .. math::

    D(E(x))_i = c_{j(i)}, \qquad j(i) = \arg\min_j |x_i - c_j|, \qquad c_j =
    \text{mean of } \{x_i : j(i) = j\}

  four times over (Lloyd), from levels evenly spaced between the least and the
  largest number. With a ``density`` below 1, only so many numbers, the largest
  in magnitude, are kept beforehand; the others become 0, and the level nearest
  to 0 is 0, so that they stay so. (FedZip lets that level be a mean, of mostly
  zeros: a tiny constant for all of them, which can add error.)

  Codes of levels that are rare have less entropy than bits:
  :func:`jaxdist.pack` writes them so where they leave as a message or file.

  **On the wire:** ``ceil(log2(levels)) + 32 * levels / block_size`` bits a
  number, whatever the density.

  Contraction :math:`1 / B`, with :math:`B` the block size: the level of the
  largest number is the mean of numbers that are at least half as large, so it
  takes :math:`\max x^2` off the error, and each iteration lowers that. With
  two levels and density 1, where they are only of one sign, :math:`1 / B^2`.
  These are worst cases; on a Gaussian three levels leave 0.2 of it.

  Args:
    levels: how many, 2 to 16.
    density: the part of the numbers that is kept, in (0, 1].
    block_size: numbers in a block, a multiple of 128; None for one codebook
      for the whole tree.

  Returns:
    A :class:`Compressor`.

  Raises:
    ValueError: if ``levels``, ``density`` or ``block_size`` is not as above.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> code = jd.codebook(3)
    >>> x = jnp.array([[1., -3., 0., 2., -3., 1., 6., 1.]])
    >>> code.decode(code.encode(x, jax.random.key(0)))
    Array([[ 1., -3.,  1.,  1., -3.,  1.,  6.,  1.]], dtype=float32)

  References:
    Malekijoo et al, `FEDZIP: A Compression Framework for
    Communication-Efficient Federated Learning
    <https://arxiv.org/abs/2102.01593>`_, 2021
  """
  if isinstance(levels, bool) or not isinstance(levels, numbers.Integral):
    raise TypeError(f'levels must be an int, got {levels!r}.')
  if not 2 <= levels <= 16:
    raise ValueError(f'levels must be 2 to 16, got {levels}.')
  density = check_density(density)
  if block_size is not None:
    block_size = check_block_size(block_size)
  bits = (levels - 1).bit_length()

  def encode(x: Any, key: Any) -> Codebook:
    del key
    size = x.shape[1]
    prunes = num_kept(density, size) < size
    scale = largest_magnitude(x)
    x = relative(x, scale)
    if prunes:
      kept, indices = selection.top_k(x, num_kept(density, size))
      x = selection.scatter(kept, indices, size)
    least = jnp.min(x, axis=1, keepdims=True)
    most = jnp.max(x, axis=1, keepdims=True)
    book = least + (most - least) * jnp.arange(levels) / (levels - 1)
    # Where there is a level for zeros, it stays that.
    free = jnp.ones(book.shape, bool)
    if prunes:
      free = jnp.arange(levels) != jnp.argmin(jnp.abs(book), 1, keepdims=True)

    def iterate(_, book):
      codes = _nearest(x, book)
      return jnp.where(free, _means(x, codes, book), 0)

    book = jnp.where(free, book, 0)
    book = jax.lax.fori_loop(1, _ITERATIONS, iterate, book)
    codes = _nearest(x, book)
    book = iterate(_ITERATIONS, book)
    return Codebook(Packed.pack(codes, bits), book * scale)

  def decode(payload: Codebook) -> Float32[Array, 'blocks size']:
    codes = payload.codes.unpack()
    x = jnp.broadcast_to(payload.levels[:, :1], codes.shape)
    for j in range(1, levels):
      x = jnp.where(codes >= j, payload.levels[:, j : j + 1], x)
    return x

  one_sided = levels == 2 and density == 1
  options = {'density': density} if density < 1 else {}
  return Compressor(
    name=call('codebook', levels, **options, block_size=block_size),
    encode=encode,
    decode=decode,
    block_size=block_size,
    # A block of everything is no longer than an index can say.
    contraction=(block_size or 2**31) ** (-2.0 if one_sided else -1.0),
  )
