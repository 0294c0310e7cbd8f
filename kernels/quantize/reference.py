"""The definition of quantization to grids of 8, 4 and 2 bits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key, UInt32

from jaxdist.kernels.pack import reference as packing

TINY = 2.0**-126  # Smaller float32 numbers are subnormal: many chips drop them.
STEP = 0.9957  # Of the best 4-level uniform quantizer of a Gaussian; Max, 1960.


def uniform(
  key: Key[Array, ''], shape: tuple[int, ...]
) -> Float32[Array, '...']:
  """Uniform numbers in [0, 1), multiples of 2**-24."""
  bits = jax.random.bits(key, shape, jnp.uint32)
  return (bits >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24


def to_codes(x: Float32[Array, '*shape']) -> UInt32[Array, '*shape']:
  """Integers held by small non-negative floats; NaN becomes anything."""
  # Through int32: vector units convert to it, but few convert to uint32.
  return x.astype(jnp.int32).astype(jnp.uint32)


def to_floats(codes: UInt32[Array, '*shape']) -> Float32[Array, '*shape']:
  """The inverse of :func:`to_codes`."""
  return codes.astype(jnp.int32).astype(jnp.float32)


def quantize(
  x: Float32[Array, 'rows size'], key: Key[Array, ''] | None, *, bits: int
) -> tuple[UInt32[Array, 'rows words'], Float32[Array, 'rows 1']]:
  """Packed codes and the scale of each row."""
  largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
  if bits == 2:
    codes, scale = _four_levels(x, jnp.maximum(largest, TINY), key)
  else:
    q_max = 2 ** (bits - 1) - 1
    scale = jnp.maximum(largest / q_max, TINY)
    y = x / scale
    q = jnp.round(y) if key is None else jnp.floor(y + uniform(key, x.shape))
    codes = jnp.clip(q, -q_max, q_max) + q_max
  return packing.pack(to_codes(codes), bits=bits), scale


def _four_levels(x, largest, key):
  """Codes 0..3 for the levels -3a, -a, a, 3a, and a."""
  y = x / largest  # No sum of squares overflows now.
  if key is not None:
    # Neighbouring levels are 2a apart, and a is a third of the largest.
    codes = jnp.clip(jnp.floor(1.5 * y + 1.5 + uniform(key, x.shape)), 0, 3)
    return codes, largest * jnp.float32(1 / 3) * (y != 0).any(1, keepdims=True)
  rms = jnp.sqrt(jnp.mean(y * y, axis=1, keepdims=True))
  level = jnp.where(jnp.abs(y) >= STEP * rms, 3.0, 1.0)
  # Least squares makes the decoded row a projection of the row, so it is never
  # longer than the row, whatever the distribution.
  a = jnp.sum(level * jnp.abs(y), axis=1, keepdims=True)
  a = a / jnp.sum(level * level, axis=1, keepdims=True) * largest
  return (jnp.where(y < 0, -level, level) + 3) / 2, a


def dequantize(
  words: UInt32[Array, 'rows words'],
  scale: Float32[Array, 'rows 1'],
  *,
  bits: int,
  count: int,
) -> Float32[Array, 'rows count']:
  """The numbers that the codes stand for."""
  codes = to_floats(packing.unpack(words, bits=bits, count=count))
  q = 2 * codes - 3 if bits == 2 else codes - (2 ** (bits - 1) - 1)
  return q * scale
