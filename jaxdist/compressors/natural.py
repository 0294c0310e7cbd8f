"""Powers of two at random: a float without its mantissa."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from jaxdist.compressors.base import Compressor, Packed
from jaxdist.compressors.checks import call, check_block_size
from jaxdist.kernels import numbers

MANTISSA = 0x7FFFFF  # Mask of a float32's 23 mantissa bits.
NOT_FINITE = 256  # In place of the largest exponent field of a block.


class Natural(NamedTuple):
  """Signs and exponents.

  Attributes:
    codes: sign bit, then 0 for zero or the exponent above the smallest, plus 1.
    top: exponent field of the largest power of two in each block.
  """

  codes: Packed
  top: UInt32[Array, 'blocks 1']


def natural(*, block_size: int = 1024) -> Compressor:
  r"""Rounds each number at random to one of the powers of two beside it.

  .. math::

    D(E(x))_i = \mathrm{sign}(x_i) \, 2^{e_i + b_i}, \qquad e_i = \lfloor
    \log_2 |x_i| \rfloor, \quad P(b_i = 1) = |x_i| / 2^{e_i} - 1

  Adding random bits to a float's mantissa does it: the carry moves the
  exponent. The 127 powers of two from the block's largest down are coded. What
  is below the smallest of them becomes that one or zero, at random too, so the
  code is unbiased there as well (all to within :math:`2^{-17}` of a power).

  **On the wire:** ``8 + 32 / block_size`` bits a number.

  Contraction 7/8: the variance between two powers of two is at most 1/8 of the
  square, at 4/3 of the lower one. Unbiased. A number that rounds to
  :math:`2^{128}` becomes the largest float32 instead.

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
    >>> code = jd.natural()
    >>> x = jnp.array([[4., -0.5, 0., 1.]])
    >>> code.decode(code.encode(x, jax.random.key(0)))
    Array([[ 4. , -0.5,  0. ,  1. ]], dtype=float32)

  References:
    Horvath et al, `Natural Compression for Distributed Deep Learning
    <https://arxiv.org/abs/1905.10988>`_, 2019
  """
  block_size = check_block_size(block_size)

  def encode(x, key):
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # Uniform in units of 2**-32, odd multiples of 2**15.
    random = numbers.random_bits(numbers.seed(key), *x.shape) << 16 | 0x8000
    sign, magnitude = bits >> 31, bits & 0x7FFFFFFF
    field = (magnitude >> 23).astype(jnp.int32)
    rounded = ((magnitude + (random >> 9)) >> 23).astype(jnp.int32)
    top = numbers.row_max(rounded)
    smallest = top - 126

    # Below the smallest power: |x| / 2**smallest in units of 2**-32. A
    # subnormal number is its mantissa doubled, with the exponent field 0.
    mantissa = magnitude & MANTISSA
    mantissa = jnp.where(field > 0, mantissa | (MANTISSA + 1), mantissa << 1)
    shift = jnp.clip(smallest - field - 1, 0, 31).astype(jnp.uint32)
    raised = random < (mantissa << 8) >> shift

    codes = jnp.where(rounded == 0, 0, rounded - smallest + 1)
    codes = jnp.where(field < smallest, raised, codes).astype(jnp.uint32)
    finite = jnp.isfinite(numbers.largest_magnitude(x))
    return Natural(
      Packed.pack(sign << 7 | codes & 127, 8),
      jnp.where(finite, top, NOT_FINITE).astype(jnp.uint32),
    )

  def decode(payload):
    codes = payload.codes.unpack()
    power = codes & 127
    field = power + payload.top - 127
    # 2**128 is no float32.
    bits = jnp.where(field >= 255, 0x7F7FFFFF, field << 23)
    bits = jnp.where(power == 0, 0, bits) | (codes >> 7 << 31)
    x = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(payload.top == NOT_FINITE, jnp.nan, x)

  return Compressor(
    name=call('natural', block_size=block_size),
    encode=encode,
    decode=decode,
    block_size=block_size,
    contraction=7 / 8,
    unbiased=True,
  )
