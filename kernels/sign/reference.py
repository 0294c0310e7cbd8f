"""The definition of sign coding."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt32

from jaxdist.kernels.pack import reference as packing
from jaxdist.kernels.quantize.reference import TINY, to_floats


def sign(
  x: Float32[Array, 'rows size'],
) -> tuple[UInt32[Array, 'rows words'], Float32[Array, 'rows 1']]:
  """Packed signs, 1 for a negative number, and the mean magnitude."""
  magnitude = jnp.abs(x)
  # The sum of a row of large numbers would overflow; relative ones do not.
  largest = jnp.maximum(jnp.max(magnitude, axis=1, keepdims=True), TINY)
  scale = largest * jnp.mean(magnitude / largest, axis=1, keepdims=True)
  return packing.pack((x < 0).astype(jnp.uint32), bits=1), scale


def unsign(
  words: UInt32[Array, 'rows words'],
  scale: Float32[Array, 'rows 1'],
  *,
  count: int,
) -> Float32[Array, 'rows count']:
  """The mean magnitude with each number's sign."""
  negative = to_floats(packing.unpack(words, bits=1, count=count))
  return (1 - 2 * negative) * scale
