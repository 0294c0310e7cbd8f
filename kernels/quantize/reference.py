"""The definition of quantization in the formats of ``formats.py``."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key, UInt32

from jaxdist.kernels import numbers
from jaxdist.kernels.pack import reference as packing
from jaxdist.kernels.quantize.formats import FORMATS


def quantize(
  x: Float32[Array, 'rows size'], key: Key[Array, ''] | None, *, format: str
) -> tuple[UInt32[Array, 'rows words'], Float32[Array, 'rows 1']]:
  """Packed codes and the scale of each row."""
  codes, scale = _encode(x, key, format)
  return _pack(codes, format), scale


def _encode(x, key, format):
  dither = None
  if key is not None:
    bits = numbers.random_bits(numbers.seed(key), *x.shape)
    dither = numbers.to_dither(bits)
  return FORMATS[format].encode(x, dither)


def _pack(codes, format):
  return packing.pack(codes.astype(jnp.uint32), bits=FORMATS[format].bits)


def dequantize(
  words: UInt32[Array, 'rows words'],
  scale: Float32[Array, 'rows 1'],
  *,
  format: str,
  count: int,
) -> Float32[Array, 'rows count']:
  """The numbers that the codes stand for."""
  bits = FORMATS[format].bits
  codes = packing.unpack(words, bits=bits, count=count)
  top = (codes << (32 - bits)).astype(jnp.int32)
  return FORMATS[format].decode(top, scale)


def quantize_with_feedback(
  x: Float32[Array, 'rows size'],
  residual: Float32[Array, 'rows size'],
  key: Key[Array, ''] | None,
  *,
  format: str,
) -> tuple[
  UInt32[Array, 'rows words'],
  Float32[Array, 'rows 1'],
  Float32[Array, 'rows size'],
]:
  """Codes ``x + residual``, and says what that dropped."""
  target, code = x + residual, FORMATS[format]
  codes, scale = _encode(target, key, format)
  decoded = code.decode(codes << (32 - code.bits), scale)
  return _pack(codes, format), scale, target - decoded


def dequantize_mean(
  words: UInt32[Array, 'n rows words'],
  scale: Float32[Array, 'n rows 1'],
  *,
  format: str,
  count: int,
) -> Float32[Array, 'rows count']:
  """The mean of what ``n`` workers coded, added up in order."""

  def decoded(one):
    return dequantize(*one, format=format, count=count)

  total, _ = jax.lax.scan(
    lambda total, one: (total + decoded(one), None),
    decoded((words[0], scale[0])),
    (words[1:], scale[1:]),
    unroll=8,  # A loop would read and write the total once for each worker.
  )
  return total / words.shape[0]
