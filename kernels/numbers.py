"""Conversions that several operations share.

Kernels call these on tiles and definitions on whole arrays, so that the same
numbers come out.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Key, UInt32

# Smaller float32 numbers are subnormal: many chips take them as zero. Scales
# are kept above it, so that a row of zeros needs no case of its own.
TINY = 2.0**-126

ROUNDS = 13  # Of Threefry's 20. Rounding needs even bits, not secret ones.
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)  # Of Threefry2x32.


def float_bits(x: Float32[Array, '*shape']) -> Int32[Array, '*shape']:
  """The bits of floats."""
  return jax.lax.bitcast_convert_type(x, jnp.int32)


def from_float_bits(bits: Int32[Array, '*shape']) -> Float32[Array, '*shape']:
  """The inverse of :func:`float_bits`."""
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def largest_magnitude(
  x: Float32[Array, 'rows size'],
) -> Float32[Array, 'rows 1']:
  """The largest magnitude in each row; NaN if there is one."""
  # As integers: bit patterns of magnitudes are in order, with NaN at the top.
  # XLA:CPU's float maximum loses a NaN where rows are batched by vmap.
  top = jnp.max(float_bits(jnp.abs(x)), axis=1, keepdims=True)
  return from_float_bits(top)


def relative(
  x: Float32[Array, 'rows size'], scale: Float32[Array, 'rows 1']
) -> Float32[Array, 'rows size']:
  """``x / scale`` for any float32 ``scale``, and 0 for 0 / 0."""
  # One division a row. The reciprocal of a scale above 2**126 would be
  # subnormal, hence zero. XLA moves constant factors between x and the
  # reciprocal, but not through a select.
  down = jnp.where(scale > 2.0**100, 2.0**-50, 1.0)
  return x * down * (1 / jnp.maximum(scale * down, TINY))


def uniform(
  key: Key[Array, ''], shape: tuple[int, ...]
) -> Float32[Array, '...']:
  """Uniform numbers in [0, 1), multiples of 2**-24."""
  bits = jax.random.bits(key, shape, jnp.uint32)
  return to_floats(bits >> 8) * 2.0**-24


def seed(key: Key[Array, '']) -> UInt32[Array, '2']:
  """What :func:`dither` needs of a key, whichever generator the key is for."""
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


def dither(
  seed: tuple[UInt32[Array, ''], UInt32[Array, '']],
  rows: tuple[UInt32[Array, ''] | int, int],
  size: int,
) -> Float32[Array, 'rows size']:
  """Uniform numbers inside (-1/2, 1/2), odd multiples of 2**-17.

  Args:
    seed: the two words of :func:`seed`.
    rows: the first row, and how many.
    size: length of a row.

  Returns:
    Numbers that depend on the seed, the row and the column alone.
  """
  first, count = rows
  # A call yields 64 bits: 16 for one column in each quarter of the row.
  shape = (count, -(-size // 4))
  row = jax.lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.uint32)
  column = jax.lax.broadcasted_iota(jnp.int32, shape, 1).astype(jnp.uint32)
  parts = []
  for word in threefry(seed, row + jnp.uint32(first), column):
    parts += [word << 7, word >> 9]
  bits = jnp.concatenate(parts, axis=1)[:, :size] & 0x7FFF80
  one_to_two = from_float_bits((bits | 0x3F800000).astype(jnp.int32))
  return one_to_two - (1.5 - 2.0**-17)


def to_codes(x: Float32[Array, '*shape']) -> UInt32[Array, '*shape']:
  """Integers held by small non-negative floats; NaN becomes anything."""
  # Through int32: vector units convert to it, but few convert to uint32.
  return x.astype(jnp.int32).astype(jnp.uint32)


def to_floats(codes: UInt32[Array, '*shape']) -> Float32[Array, '*shape']:
  """The inverse of :func:`to_codes`."""
  return codes.astype(jnp.int32).astype(jnp.float32)
