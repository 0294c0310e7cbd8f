"""Number formats: what a row of floats becomes, and what its codes stand for.

Every format writes a row as one float32 scale and codes of a few bits, and a
number decodes to a level times the scale. The functions here are the
definition; kernels call them on tiles.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from jaxdist.kernels.numbers import (
  TINY,
  float_bits,
  from_float_bits,
  in_units,
  largest_magnitude,
  relative,
  row_sum,
)

STEP = 0.9957  # Of the best 4-level uniform quantizer of a Gaussian; Max, 1960.

# Added to a float's bits, carries into the exponent if the mantissa is above
# the square root of two: the exponent is then the rounded binary logarithm.
# 0x3504F4 is the first mantissa above it.
ROUND_LOG = 0x800000 - 0x3504F4

SIGN = -(2**31)  # The top bit of an int32.


@dataclasses.dataclass(frozen=True)
class Format:
  """A code for numbers, relative to a scale for each row.

  Attributes:
    bits: width of a code.
    encode: ``(x, dither) -> (codes, scale)``. Codes are below ``2**bits``;
      with ``dither``, uniform in (-1/2, 1/2), they are rounded at random. A
      row with a NaN or an infinity gets a scale that is not finite.
    decode: ``(top, scale) -> x``, what codes stand for, from integers with the
      code in their top bits and anything below.
    stochastic: whether ``encode`` takes a dither.
  """

  bits: int
  encode: Callable[..., tuple[Int32[Array, 'r n'], Float32[Array, 'r 1']]]
  decode: Callable[..., Float32[Array, 'r n']]
  stochastic: bool = False


def rounded(y):
  """Integers nearest to small floats, ties to even, in the lower 22 bits."""
  # Where the float's step is 1, adding rounds, and the low bits are the
  # integer in two's complement.
  return float_bits(y + 1.5 * 2.0**23)


def _encode_grid(bits, x, dither):
  q_max = 2 ** (bits - 1) - 1
  scale = jnp.maximum(largest_magnitude(x) * jnp.float32(1 / q_max), TINY)
  y = x * (1 / scale)
  if dither is not None:
    # The largest is a rounding away from the end of the grid, on either side.
    y = jnp.clip(y + dither, -q_max, q_max)
  return rounded(y) & (2**bits - 1), scale


def _decode_grid(bits, top, scale):
  return (top >> (32 - bits)).astype(jnp.float32) * scale  # Keeps the sign.


def _encode_four_levels(x, dither):
  """Codes 2, 3, 0, 1 for the levels -3a, -a, a, 3a, and a."""
  largest = largest_magnitude(x)
  if dither is not None:
    # Neighbouring levels are 2a apart, and a is a third of the largest.
    y = relative(x, largest)
    up = rounded(jnp.clip(1.5 * y + 1.5 + dither, 0, 3))
    return (up + 2) & 3, largest * jnp.float32(1 / 3)
  y, unit = in_units(x, largest)  # No sum of squares overflows now.
  magnitude = jnp.abs(y)
  rms = jnp.sqrt(row_sum(y * y) * (1 / x.shape[1]))
  # Compared as integers: XLA:CPU would write the limit down for each number.
  big = float_bits(magnitude) >= float_bits(STEP * rms)
  # Least squares makes the decoded row a projection of the row, so it is never
  # longer than the row, whatever the distribution.
  level = jnp.where(big, 3.0, 1.0)
  a = row_sum(level * magnitude) / row_sum(level * level) * unit
  return jnp.where(y < 0, 3, 0) ^ jnp.where(big, 1, 0), a


def _decode_four_levels(top, scale):
  # The sign and the bit below it, as twice a number from -2 to 1, plus one.
  return ((top >> 29) | 1).astype(jnp.float32) * scale


def _encode_sign(x, dither):
  del dither
  # The sum of a row of large numbers would overflow.
  y, unit = in_units(x, largest_magnitude(x))
  mean = row_sum(jnp.abs(y)) * (1 / x.shape[1])
  return jnp.where(x < 0, 1, 0), mean * unit


def _decode_sign(top, scale):
  return from_float_bits(float_bits(scale) ^ (top & SIGN))


def _encode_e3m0(x, dither):
  del dither
  scale = largest_magnitude(x)
  y = jnp.maximum(relative(jnp.abs(x), scale), 2.0**-7)
  exponent = (float_bits(y) + ROUND_LOG) >> 23
  return ((exponent - 120) & 7) + jnp.where(x < 0, 8, 0), scale


def _decode_e3m0(top, scale):
  # The sign stays, the exponent moves to its place in a float.
  code = (top >> 5) & (SIGN | 7 << 23)
  power = from_float_bits(code + (120 << 23))
  return jnp.where(code & 7 << 23 == 0, 0.0, power) * scale


def _encode_minifloat(exponent_bits, mantissa_bits, largest, x, dither):
  """Nearest float with a subnormal range, ties to even, as IEEE formats."""
  del dither
  scale = jnp.maximum(largest_magnitude(x) * jnp.float32(1 / largest), TINY)
  y = jnp.abs(x * (1 / scale))
  bits, drop = float_bits(y), 23 - mantissa_bits
  least = 2 - 2 ** (exponent_bits - 1)  # Exponent of the smallest normal.
  even = (bits >> drop) & 1
  normal = (bits + (2 ** (drop - 1) - 1) + even) >> drop
  normal -= (126 + least) << mantissa_bits
  subnormal = rounded(y * 2.0 ** (mantissa_bits - least))
  codes = jnp.where(y < 2.0**least, subnormal, normal)
  sign = jnp.where(x < 0, 1 << (exponent_bits + mantissa_bits), 0)
  return (codes & (2 ** (exponent_bits + mantissa_bits) - 1)) | sign, scale


def _decode_minifloat(exponent_bits, mantissa_bits, top, scale):
  least = 2 - 2 ** (exponent_bits - 1)
  code = jax.lax.shift_right_logical(top, jnp.int32(8 - exponent_bits))
  code &= 2**23 * 2**exponent_bits - 2 ** (23 - mantissa_bits)
  x = from_float_bits(code + ((126 + least) << 23))
  # Below the normal range a float's leading bit counts as zero, and its unit is
  # twice what it seems.
  x += jnp.minimum(x - 2.0**least, 0)
  return from_float_bits(float_bits(x) | (top & SIGN)) * scale


def _grid(bits):
  return Format(
    bits,
    functools.partial(_encode_grid, bits),
    functools.partial(_decode_grid, bits),
    stochastic=True,
  )


def _minifloat(exponent_bits, mantissa_bits, largest):
  sizes = exponent_bits, mantissa_bits
  return Format(
    1 + sum(sizes),
    functools.partial(_encode_minifloat, *sizes, largest),
    functools.partial(_decode_minifloat, *sizes),
  )


FORMATS = {
  'int8': _grid(8),
  'int4': _grid(4),
  'int2': Format(2, _encode_four_levels, _decode_four_levels, stochastic=True),
  'sign': Format(1, _encode_sign, _decode_sign),
  'e3m0': Format(4, _encode_e3m0, _decode_e3m0),
  'e2m1': _minifloat(2, 1, 6.0),
  'e4m3': _minifloat(4, 3, 448.0),
}
