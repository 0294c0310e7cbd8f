"""The definition of quantization to grids of 8, 4 and 2 bits."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Key, UInt32

from jaxdist.kernels.numbers import (
  TINY,
  largest_magnitude,
  relative,
  to_codes,
  to_floats,
  uniform,
)
from jaxdist.kernels.pack import reference as packing

STEP = 0.9957  # Of the best 4-level uniform quantizer of a Gaussian; Max, 1960.


def quantize(
  x: Float32[Array, 'rows size'], key: Key[Array, ''] | None, *, bits: int
) -> tuple[UInt32[Array, 'rows words'], Float32[Array, 'rows 1']]:
  """Packed codes and the scale of each row."""
  largest = largest_magnitude(x)
  if bits == 2:
    codes, scale = _four_levels(x, largest, key)
  else:
    q_max = 2 ** (bits - 1) - 1
    scale = jnp.maximum(largest / q_max, TINY)
    y = x / scale
    q = jnp.round(y) if key is None else jnp.floor(y + uniform(key, x.shape))
    codes = jnp.clip(q, -q_max, q_max) + q_max
  return packing.pack(to_codes(codes), bits=bits), scale


def _four_levels(x, largest, key):
  """Codes 0..3 for the levels -3a, -a, a, 3a, and a."""
  y = relative(x, largest)  # No sum of squares overflows now.
  if key is not None:
    # Neighbouring levels are 2a apart, and a is a third of the largest.
    codes = jnp.clip(jnp.floor(1.5 * y + 1.5 + uniform(key, x.shape)), 0, 3)
    return codes, largest * jnp.float32(1 / 3)
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
