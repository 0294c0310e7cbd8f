"""Number formats: what a row of floats becomes, and what its codes stand for.

Every format writes a row as one float32 scale and codes of a few bits, and a
number decodes to a level times the scale. The functions here are the
definition; kernels call them on tiles.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

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
class Rows:
  """What formats ask about rows of numbers.

  Attributes:
    size: of a row.
    largest: magnitude in each row; NaN if there is one.
    total: ``(function, *numbers) -> sums``. Adds up along rows what a function
      makes of each of their numbers and of those that are one for each row.
  """

  size: int
  largest: Float32[Array, '*rows']
  total: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Format:
  """A code for numbers, relative to a scale for each row.

  Attributes:
    bits: width of a code.
    fit: ``(rows, random) -> (scale, *numbers)`` for :class:`Rows`: the scale,
      and what else ``code`` needs, one for each row.
    code: ``(x, dither, *numbers) -> codes``, each number by itself. Codes are
      below ``2**bits``; with ``dither``, uniform in (-1/2, 1/2), they are
      rounded at random.
    decode: ``(top, scale) -> x``, what codes stand for, from integers with the
      code in their top bits and anything below.
    stochastic: whether ``code`` takes a dither.
  """

  bits: int
  fit: Callable[..., tuple[Float32[Array, '*rows'], ...]]
  code: Callable[..., Int32[Array, '*shape']]
  decode: Callable[..., Float32[Array, '*shape']]
  stochastic: bool = False

  def encode(
    self, x: Float32[Array, 'r n'], dither: Float32[Array, 'r n'] | None
  ) -> tuple[Int32[Array, 'r n'], Float32[Array, 'r 1']]:
    """Codes, and scales; one that is not finite for a row with such numbers."""

    def total(function, *numbers):
      return jax.tree.map(row_sum, function(x, *numbers))

    rows = Rows(x.shape[1], largest_magnitude(x), total)
    scale, *numbers = self.fit(rows, random=dither is not None)
    return self.code(x, dither, *numbers), scale


def rounded(y):
  """Integers nearest to small floats, ties to even, in the lower 22 bits."""
  # Where the float's step is 1, adding rounds, and the low bits are the
  # integer in two's complement.
  return float_bits(y + 1.5 * 2.0**23)


def _fit_grid(q_max, rows, *, random):
  """For grids up to ``q_max``: the scale, and its inverse."""
  del random
  scale = jnp.maximum(rows.largest * jnp.float32(1 / q_max), TINY)
  return scale, 1 / scale


def _code_grid(bits, x, dither, inverse):
  q_max = 2 ** (bits - 1) - 1
  y = x * inverse
  if dither is not None:
    # The largest is a rounding away from the end of the grid, on either side.
    y = jnp.clip(y + dither, -q_max, q_max)
  return rounded(y) & (2**bits - 1)


def _decode_grid(bits, top, scale):
  return (top >> (32 - bits)).astype(jnp.float32) * scale  # Keeps the sign.


def _magnitude(x, largest):
  return in_units(jnp.abs(x), largest)[0]


def _is_big(y, limit):
  # Compared as integers: XLA:CPU would write the limit down for each number.
  return float_bits(y * y) >= float_bits(limit)


def _fit_four_levels(rows, *, random):
  """``a`` for the levels -3a, -a, a, 3a; the largest; squares that are big."""
  largest = rows.largest
  if random:
    # Neighbouring levels are 2a apart, and a is a third of the largest.
    return largest * jnp.float32(1 / 3), largest

  def square(x, largest):
    y, _ = in_units(x, largest)  # No sum of squares overflows now.
    return y * y

  limit = rows.total(square, largest) * (STEP**2 / rows.size)

  def products(x, largest, limit):
    y, _ = in_units(x, largest)
    level = jnp.where(_is_big(y, limit), 3.0, 1.0)
    return level * jnp.abs(y), level * level

  # Least squares makes the decoded row a projection of the row, so it is never
  # longer than the row, whatever the distribution.
  along, levels = rows.total(products, largest, limit)
  return along / levels * in_units(largest, largest)[1], largest, limit


def _code_four_levels(x, dither, largest, limit=None):
  """Codes 2, 3, 0, 1 for the levels -3a, -a, a, 3a."""
  if dither is not None:
    y = relative(x, largest)
    up = rounded(jnp.clip(1.5 * y + 1.5 + dither, 0, 3))
    return (up + 2) & 3
  y, _ = in_units(x, largest)
  big = _is_big(y, limit)
  return jnp.where(x < 0, 3, 0) ^ jnp.where(big, 1, 0)


def _decode_four_levels(top, scale):
  # The sign and the bit below it, as twice a number from -2 to 1, plus one.
  return ((top >> 29) | 1).astype(jnp.float32) * scale


def _fit_sign(rows, *, random):
  del random
  # The sum of a row of large numbers would overflow.
  mean = rows.total(_magnitude, rows.largest) * (1 / rows.size)
  return (mean * in_units(rows.largest, rows.largest)[1],)


def _code_sign(x, dither):
  del dither
  return jnp.where(x < 0, 1, 0)


def _decode_sign(top, scale):
  return from_float_bits(float_bits(scale) ^ (top & SIGN))


def _fit_e3m0(rows, *, random):
  del random
  return rows.largest, rows.largest


def _code_e3m0(x, dither, scale):
  del dither
  y = jnp.maximum(relative(jnp.abs(x), scale), 2.0**-7)
  exponent = (float_bits(y) + ROUND_LOG) >> 23
  return ((exponent - 120) & 7) + jnp.where(x < 0, 8, 0)


def _decode_e3m0(top, scale):
  # The sign stays, the exponent moves to its place in a float.
  code = (top >> 5) & (SIGN | 7 << 23)
  power = from_float_bits(code + (120 << 23))
  return jnp.where(code & 7 << 23 == 0, 0.0, power) * scale


def _code_minifloat(exponent_bits, mantissa_bits, x, dither, inverse):
  """Nearest float with a subnormal range, ties to even, as IEEE formats."""
  del dither
  y = jnp.abs(x * inverse)
  bits, drop = float_bits(y), 23 - mantissa_bits
  least = 2 - 2 ** (exponent_bits - 1)  # Exponent of the smallest normal.
  even = (bits >> drop) & 1
  normal = (bits + (2 ** (drop - 1) - 1) + even) >> drop
  normal -= (126 + least) << mantissa_bits
  subnormal = rounded(y * 2.0 ** (mantissa_bits - least))
  codes = jnp.where(y < 2.0**least, subnormal, normal)
  sign = jnp.where(x < 0, 1 << (exponent_bits + mantissa_bits), 0)
  return (codes & (2 ** (exponent_bits + mantissa_bits) - 1)) | sign


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
    functools.partial(_fit_grid, 2 ** (bits - 1) - 1),
    functools.partial(_code_grid, bits),
    functools.partial(_decode_grid, bits),
    stochastic=True,
  )


def _minifloat(exponent_bits, mantissa_bits, largest):
  sizes = exponent_bits, mantissa_bits
  return Format(
    1 + sum(sizes),
    functools.partial(_fit_grid, largest),
    functools.partial(_code_minifloat, *sizes),
    functools.partial(_decode_minifloat, *sizes),
  )


FORMATS = {
  'int8': _grid(8),
  'int4': _grid(4),
  'int2': Format(
    2,
    _fit_four_levels,
    _code_four_levels,
    _decode_four_levels,
    stochastic=True,
  ),
  'sign': Format(1, _fit_sign, _code_sign, _decode_sign),
  'e3m0': Format(4, _fit_e3m0, _code_e3m0, _decode_e3m0),
  'e2m1': _minifloat(2, 1, 6.0),
  'e4m3': _minifloat(4, 3, 448.0),
}
