"""Quantizes rows to integer grids, packed, and back."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Key, UInt32

from jaxdist.kernels.checks import check_rows
from jaxdist.kernels.dispatch import Form, Op
from jaxdist.kernels.quantize import reference

_quantize = Op('quantize', {'xla': Form(reference.quantize)})
_dequantize = Op('dequantize', {'xla': Form(reference.dequantize)})


def _check_bits(bits: int) -> None:
  if bits not in (8, 4, 2):
    raise ValueError(f'bits must be 8, 4 or 2, got {bits!r}.')


def quantize(
  x: Float32[Array, 'rows size'],
  bits: int,
  *,
  key: Key[Array, ''] | None = None,
  implementation: str | None = None,
) -> tuple[UInt32[Array, 'rows words'], Float32[Array, 'rows 1']]:
  """Rounds each row to a grid of its own.

  With 8 and 4 bits the grid is ``scale * (-q..q)``, where ``q`` is 127 or 7 and
  the largest magnitude lies on the grid. With 2 bits it is ``scale * {-3, -1,
  1, 3}``; a row of zeros has scale 0.

  Args:
    x: rows of numbers.
    bits: 8, 4 or 2.
    key: rounds up or down at random, without bias; ``None`` rounds to nearest.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    Packed codes and the scales. A row with a NaN or an infinity has a scale
    that is not finite.

  Examples:
    >>> words, scale = quantize(jnp.array([[7., -2.2, 0., 3.4]]), 4)
    >>> dequantize(words, scale, 4, 4)
    Array([[ 7., -2.,  0.,  3.]], dtype=float32)
  """
  check_rows('x', x, jnp.float32)
  _check_bits(bits)
  return _quantize(x, key, bits=bits, implementation=implementation)


def dequantize(
  words: UInt32[Array, 'rows words'],
  scale: Float32[Array, 'rows 1'],
  bits: int,
  count: int,
  *,
  implementation: str | None = None,
) -> Float32[Array, 'rows count']:
  """The numbers that :func:`quantize` rounded to.

  Args:
    words: packed codes.
    scale: of each row.
    bits: 8, 4 or 2.
    count: numbers in a row.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    The rows.
  """
  check_rows('words', words, jnp.uint32)
  check_rows('scale', scale, jnp.float32)
  _check_bits(bits)
  return _dequantize(
    words, scale, bits=bits, count=count, implementation=implementation
  )
