"""Random linear sketches of each block, undone by their transpose."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key

from jaxdist.compressors.base import Compressor
from jaxdist.compressors.checks import (
  call,
  check_block_size,
  check_density,
  check_one_of,
)
from jaxdist.compressors.random_k import unseeded
from jaxdist.compressors.top_k import Sparse, num_kept

Family = Literal['count', 'gaussian']


def _matrix(
  family: Family, key: Key[Array, ''], size: int, length: int
) -> Float32[Array, 'size length']:
  """What a row of numbers is multiplied with."""
  if family == 'gaussian':
    return jax.random.normal(key, (size, length)) / jnp.sqrt(length)
  place_key, sign_key = jax.random.split(key)
  places = jax.random.randint(place_key, (size,), 0, length)
  signs = jax.random.rademacher(sign_key, (size,), jnp.float32)
  return signs[:, None] * jax.nn.one_hot(places, length)


def _product(x, matrix):
  """In float32, also where products have fewer bits unless told."""
  return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


def sketch(
  density: float, *, family: Family = 'count', block_size: int = 1024
) -> Compressor:
  r"""Sends random sums of the numbers of each block.

  .. math::

    D(E(x)) = R^T R x, \qquad R \in \mathbb{R}^{b \times B}, \qquad
    b = \max(1, \mathrm{round}(\text{density} \cdot B))

  All workers draw :math:`R` from a key that they share, anew in each exchange,
  once for all blocks; it is never sent. ``'count'``: each number is added, with
  a random sign, to one of the :math:`b` sums (count sketch). ``'gaussian'``:
  all numbers of R are drawn from :math:`\mathcal{N}(0, 1/b)`. The third of the
  family, SRHT, is ``rotated(random_k(density, unbiased=True))``, with the least
  noise.

  Unbiased, :math:`E\|D(E(x)) - x\|^2 = \alpha \|x\|^2` with :math:`\alpha = (B
  - 1) / b` (count) or :math:`(B + 1) / b` (gaussian), so that steps have to be
  shorter by :math:`1 + \alpha`: ``2 - code.contraction``. What is saved is
  bytes a round, not bytes in all.

  **On the wire:** ``32 * density`` bits a number. Linear: one all-reduce.

  Contraction :math:`1 - \alpha`. A block with a NaN or an infinity anywhere
  decodes to NaN.

  Args:
    density: length of a sketch, as a part of the block's, in (0, 1].
    family: of the matrix.
    block_size: numbers in a block, a multiple of 128. A block takes ``2 * b *
      B`` multiplications.

  Returns:
    A :class:`Compressor`, to be used through ``.at(shared_key)``.

  Raises:
    ValueError: if an argument is not as above.

  Examples:
    >>> import jaxdist as jd
    >>> import optax
    >>> code = jd.sketch(1 / 8)
    >>> 2 - code.contraction  # Steps are shorter by this.
    8.9921875
    >>> tx = optax.chain(
    ...   jd.communicate(jd.mean('data', code)),
    ...   optax.sgd(0.1 / (2 - code.contraction)),
    ... )

  References:
    Song et al, `Sketching for First Order Method
    <https://arxiv.org/abs/2210.08371>`_, 2023
  """
  density = check_density(density)
  check_one_of('family', family, ('count', 'gaussian'))
  block_size = check_block_size(block_size)
  options = {'family': family} if family != 'count' else {}
  name = call('sketch', density, **options, block_size=block_size)
  largest = float(jnp.finfo(jnp.float32).max)

  def gain(size):
    """A power of two that no sum exceeds its largest number by."""
    return 8.0 * 2 ** size.bit_length()

  def seeded(shared_key):
    def matrix(size):
      return _matrix(family, shared_key, size, num_kept(density, size))

    def encode(x, key):
      del key
      size = x.shape[1]
      # Finite numbers near the end of the range stay finite.
      sums = _product(x / gain(size), matrix(size)) * gain(size)
      finite = jnp.isfinite(x).all(axis=1, keepdims=True)
      sums = jnp.where(finite, jnp.clip(sums, -largest, largest), jnp.nan)
      return Sparse(sums, None, size)

    def decode(payload):
      size = payload.size
      y = _product(payload.values / gain(size), matrix(size).T) * gain(size)
      return jnp.clip(y, -largest, largest)

    return dataclasses.replace(code, encode=encode, decode=decode, seeded=None)

  b = num_kept(density, block_size)
  code = Compressor(
    name=name,
    encode=unseeded(name),
    decode=unseeded(name),
    block_size=block_size,
    contraction=1 - (block_size + (1 if family == 'gaussian' else -1)) / b,
    unbiased=True,
    linear=True,
    seeded=seeded,
  )
  return code
