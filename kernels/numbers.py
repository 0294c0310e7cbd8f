"""Conversions that several operations share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key, UInt32

# Smaller float32 numbers are subnormal: many chips take them as zero. Scales
# are kept above it, so that a row of zeros needs no case of its own.
TINY = 2.0**-126


def largest_magnitude(
  x: Float32[Array, 'rows size'],
) -> Float32[Array, 'rows 1']:
  """The largest magnitude in each row; NaN if there is one."""
  return jnp.max(jnp.abs(x), axis=1, keepdims=True)


def relative(
  x: Float32[Array, 'rows size'], scale: Float32[Array, 'rows 1']
) -> Float32[Array, 'rows size']:
  """``x / scale`` for any float32 ``scale``, and 0 for 0 / 0."""
  # XLA turns division by a broadcast into a product with the reciprocal, which
  # is subnormal, hence zero, for scales above 2**126. It moves constant factors
  # between x and the reciprocal, but not through a select.
  big = scale > 2.0**100
  x = jnp.where(big, x * 2.0**-50, x)
  scale = jnp.where(big, scale * 2.0**-50, scale)
  return x / jnp.maximum(scale, TINY)


def uniform(
  key: Key[Array, ''], shape: tuple[int, ...]
) -> Float32[Array, '...']:
  """Uniform numbers in [0, 1), multiples of 2**-24."""
  bits = jax.random.bits(key, shape, jnp.uint32)
  return to_floats(bits >> 8) * 2.0**-24


def to_codes(x: Float32[Array, '*shape']) -> UInt32[Array, '*shape']:
  """Integers held by small non-negative floats; NaN becomes anything."""
  # Through int32: vector units convert to it, but few convert to uint32.
  return x.astype(jnp.int32).astype(jnp.uint32)


def to_floats(codes: UInt32[Array, '*shape']) -> Float32[Array, '*shape']:
  """The inverse of :func:`to_codes`."""
  return codes.astype(jnp.int32).astype(jnp.float32)
