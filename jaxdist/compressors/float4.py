"""Four-bit floats without a mantissa: sign and power of two."""

import math

from jaxdist.compressors.base import Compressor
from jaxdist.compressors.checks import call, check_block_size
from jaxdist.compressors.quantize import codec


def float4(*, block_size: int = 1024) -> Compressor:
  r"""Rounds each number to a power of two times the block's largest (E3M0).

  .. math::

    D(E(x))_i = \mathrm{sign}(x_i) \, 2^{e_i} s, \qquad s = \max|x|, \quad
    e_i = \mathrm{clip}(\mathrm{round}(\log_2 (|x_i| / s)), -6, 0)

  and zero where :math:`|x_i| < 2^{-6.5} s`. Powers of two are made from
  exponent bits, so numbers on the grid are reproduced exactly.

  **On the wire:** ``4 + 32 / block_size`` bits a number.

  Contraction :math:`\min(2 \sqrt 2 - 2, 1 / (1 + (B - 1) \, 2^{-13}))`, 0.828
  for blocks up to 1024: a rounded number errs by at most :math:`\sqrt 2 - 1`
  of itself, and what is dropped is below :math:`2^{-6.5}` of the largest,
  which is exact.

  Args:
    block_size: numbers in a block, a multiple of 128.

  Returns:
    A :class:`Compressor`.

  Raises:
    ValueError: if ``block_size`` is not a positive multiple of 128.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> code = jd.float4()
    >>> x = jnp.array([[8., -3., 1., 0.01]])
    >>> code.decode(code.encode(x, jax.random.key(0)))
    Array([[ 8., -4.,  1.,  0.]], dtype=float32)

  References:
    Douillard et al, `Streaming DiLoCo with overlapping communication
    <https://arxiv.org/abs/2501.18512>`_, 2025
  """
  block_size = check_block_size(block_size)

  return Compressor(
    name=call('float4', block_size=block_size),
    **codec('e3m0', 4),
    block_size=block_size,
    contraction=min(
      2 * math.sqrt(2) - 2, 1 / (1 + (block_size - 1) * 2.0**-13)
    ),
  )
