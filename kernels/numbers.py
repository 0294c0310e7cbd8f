"""Conversions that several operations share.

Kernels call these on tiles and definitions on whole arrays, so that the same
numbers come out.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Key, UInt32

# Smaller float32 numbers are subnormal: many chips take them as zero. Scales
# are kept above it, so that a row of zeros needs no case of its own.
TINY = 2.0**-126

LANES = 128  # Numbers in a vector register of a TPU; CPUs take some at a time.
MOST_COLUMNS = 64  # Of that width, in one expression.

ROUNDS = 13  # Of Threefry's 20. Rounding needs even bits, not secret ones.
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)  # Of Threefry2x32.


def float_bits(x: Float32[Array, '*shape']) -> Int32[Array, '*shape']:
  """The bits of floats."""
  return jax.lax.bitcast_convert_type(x, jnp.int32)


def from_float_bits(bits: Int32[Array, '*shape']) -> Float32[Array, '*shape']:
  """The inverse of :func:`float_bits`."""
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def row_max(x: Int32[Array, 'rows size']) -> Int32[Array, 'rows 1']:
  """The largest integer of each row."""
  size = x.shape[1]
  if size % LANES == 0 and size <= MOST_COLUMNS * LANES:
    # XLA:CPU takes the integers of a row one by one, those of columns abreast.
    columns = [x[:, j : j + LANES] for j in range(0, size, LANES)]
    x = functools.reduce(jnp.maximum, columns)
  return jnp.max(x, axis=1, keepdims=True)


def largest_magnitude(
  x: Float32[Array, 'rows size'],
) -> Float32[Array, 'rows 1']:
  """The largest magnitude in each row; NaN if there is one."""
  # As integers: bit patterns of magnitudes are in order, with NaN at the top.
  # XLA:CPU's float maximum loses a NaN where rows are batched by vmap.
  return from_float_bits(row_max(float_bits(jnp.abs(x))))


def row_sum(x: Float32[Array, 'rows size']) -> Float32[Array, 'rows 1']:
  """The sum of each row; of numbers in the order of a tree where it can be."""
  # Halves of registers are added abreast; XLA:CPU would first write down what
  # it adds up along a row, if that is computed.
  while x.shape[1] % (2 * LANES) == 0 and x.shape[1] <= MOST_COLUMNS * LANES:
    half = x.shape[1] // 2
    x = x[:, :half] + x[:, half:]
  return jnp.sum(x, axis=1, keepdims=True)


def column_sum(x: Int32[Array, 'b m lanes']) -> Int32[Array, 'b 1 lanes']:
  """The sum over ``m``, by halves.

  XLA:CPU writes that as one loop of vectors. For a sum of integers that are
  computed it takes number by number, and is ten times slower.
  """
  while x.shape[1] % 2 == 0:
    half = x.shape[1] // 2
    x = x[:, :half] + x[:, half:]
  return sum(x[:, i : i + 1] for i in range(x.shape[1]))


def relative(
  x: Float32[Array, '*shape'], scale: Float32[Array, '*#shape']
) -> Float32[Array, '*shape']:
  """``x / scale`` for any float32 ``scale``, and 0 for 0 / 0."""
  # One division a row. The reciprocal of a scale above 2**126 would be
  # subnormal, hence zero. XLA moves constant factors between x and the
  # reciprocal, but not through a select.
  down = jnp.where(scale > 2.0**100, 2.0**-50, 1.0)
  return x * down * (1 / jnp.maximum(scale * down, TINY))


def in_units(
  x: Float32[Array, '*shape'], largest: Float32[Array, '*#shape']
) -> tuple[Float32[Array, '*shape'], Float32[Array, '*#shape']]:
  """``x`` in units of a power of two near the largest of a row, and the unit.

  No sum of squares overflows, nothing is rounded, and a number takes one
  product where :func:`relative` takes two.
  """
  exponent = float_bits(largest) & 0x7F800000
  # So that the unit's reciprocal is no subnormal number.
  unit = jnp.clip(exponent, 1 << 23, 253 << 23)
  return x * from_float_bits((254 << 23) - unit), from_float_bits(unit)


def seed(key: Key[Array, '']) -> UInt32[Array, '2']:
  """What :func:`random_bits` needs of a key of whichever generator."""
  return jax.random.bits(key, (2,), jnp.uint32)


def threefry(
  seed: tuple[UInt32[Array, ''], UInt32[Array, '']],
  x: UInt32[Array, '*shape'],
  y: UInt32[Array, '*shape'],
) -> tuple[UInt32[Array, '*shape'], UInt32[Array, '*shape']]:
  """Random bits at the places ``(x, y)``: Threefry2x32, see ``ROUNDS``.

  Only sums, shifts and exclusive ors of 32 bits, which every backend has and
  takes as the same.
  """
  keys = (*seed, seed[0] ^ seed[1] ^ jnp.uint32(0x1BD11BDA))
  x, y = x + keys[0], y + keys[1]
  for i in range(ROUNDS):
    left = ROTATIONS[i % 8]
    x = x + y
    y = ((y << left) | (y >> (32 - left))) ^ x
    if i % 4 == 3:
      turn = i // 4 + 1
      x = x + keys[turn % 3]
      y = y + (keys[(turn + 1) % 3] + jnp.uint32(turn))
  return x, y


def random_bits(
  seed: UInt32[Array, '2'], rows: int, size: int
) -> UInt32[Array, 'rows size']:
  """16 random bits for each number, that a seed, row and column decide."""
  # A call yields 64 bits, for one column in each quarter of the row. They are
  # drawn for each column anew: XLA would write down what it draws once.
  quarter = max(1, -(-size // 4))
  row = jax.lax.broadcasted_iota(jnp.uint32, (rows, size), 0)
  column = jax.lax.broadcasted_iota(jnp.uint32, (rows, size), 1)
  part = column // quarter
  low, high = threefry(tuple(seed), row, column - part * quarter)
  word = jnp.where(part < 2, low, high)
  return jnp.where(part % 2 == 0, word & 0xFFFF, word >> 16)


def to_dither(bits: UInt32[Array, '*shape']) -> Float32[Array, '*shape']:
  """Uniform numbers inside (-1/2, 1/2), odd multiples of 2**-17.

  Args:
    bits: random ones, of which the lower 16 count.
  """
  mantissa = (bits << 7 & 0x7FFF80).astype(jnp.int32)
  return from_float_bits(mantissa | 0x3F800000) - (1.5 - 2.0**-17)


def to_codes(x: Float32[Array, '*shape']) -> UInt32[Array, '*shape']:
  """Integers held by small non-negative floats; NaN becomes anything."""
  # Through int32: vector units convert to it, but few convert to uint32.
  return x.astype(jnp.int32).astype(jnp.uint32)


def to_floats(codes: UInt32[Array, '*shape']) -> Float32[Array, '*shape']:
  """The inverse of :func:`to_codes`."""
  return codes.astype(jnp.int32).astype(jnp.float32)
