"""The definition of sign coding."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt32

from jaxdist.kernels.numbers import largest_magnitude, relative, to_floats
from jaxdist.kernels.pack import reference as packing


def sign(
  x: Float32[Array, 'rows size'],
) -> tuple[UInt32[Array, 'rows words'], Float32[Array, 'rows 1']]:
  """Packed signs, 1 for a negative number, and the mean magnitude."""
  # The sum of a row of large numbers would overflow; relative ones do not.
  largest = largest_magnitude(x)
  mean = jnp.mean(relative(jnp.abs(x), largest), axis=1, keepdims=True)
  return packing.pack((x < 0).astype(jnp.uint32), bits=1), mean * largest


def unsign(
  words: UInt32[Array, 'rows words'],
  scale: Float32[Array, 'rows 1'],
  *,
  count: int,
) -> Float32[Array, 'rows count']:
  """The mean magnitude with each number's sign."""
  negative = to_floats(packing.unpack(words, bits=1, count=count))
  return (1 - 2 * negative) * scale
