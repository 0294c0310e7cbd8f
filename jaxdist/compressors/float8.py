"""Eight-bit floats with a scale for each block."""

from jaxdist.compressors.base import Compressor
from jaxdist.compressors.checks import call, check_block_size
from jaxdist.compressors.quantize import codec

LARGEST = 448.0  # Of float8_e4m3fn.


def float8(*, block_size: int = 1024) -> Compressor:
  r"""Rounds to 8-bit floats (E4M3), scaled so that the largest is 448.

  .. math::

    D(E(x)) = s \, \mathrm{e4m3}(x / s), \qquad s = \max|x| / 448

  **On the wire:** ``8 + 32 / block_size`` bits a number.

  Contraction :math:`\min(1 - 17^{-2}, 1 / (1 + (B - 1) (2^{-10} / 448)^2))`,
  0.997: with three bits of mantissa a number errs by at most 1/17 of itself,
  and below the normal range by at most :math:`2^{-10} s`, or itself.

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
    >>> code = jd.float8()
    >>> x = jnp.array([[448., -33., 1., 0.0001]])
    >>> code.decode(code.encode(x, jax.random.key(0)))
    Array([[448., -32.,   1.,   0.]], dtype=float32)

  References:
    Micikevicius et al, `FP8 Formats for Deep Learning
    <https://arxiv.org/abs/2209.05433>`_, 2022
  """
  block_size = check_block_size(block_size)

  return Compressor(
    name=call('float8', block_size=block_size),
    **codec('e4m3', 8),
    block_size=block_size,
    contraction=min(
      1 - 17.0**-2, 1 / (1 + (block_size - 1) * (2.0**-10 / LARGEST) ** 2)
    ),
  )
