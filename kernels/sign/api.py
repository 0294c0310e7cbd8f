"""Codes rows by their signs, packed, and their mean magnitude, and back."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt32

from jaxdist.kernels.checks import check_rows
from jaxdist.kernels.dispatch import Form, Op
from jaxdist.kernels.sign import reference

_sign = Op('sign', {'xla': Form(reference.sign)})
_unsign = Op('unsign', {'xla': Form(reference.unsign)})


def sign(
  x: Float32[Array, 'rows size'], *, implementation: str | None = None
) -> tuple[UInt32[Array, 'rows words'], Float32[Array, 'rows 1']]:
  """Signs of each row's numbers, one bit each, and their mean magnitude.

  Args:
    x: rows of numbers. Zero counts as positive.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    Packed signs and the scales. A row with a NaN or an infinity has a scale
    that is not finite.

  Examples:
    >>> words, scale = sign(jnp.array([[1., -3., 2., 2.]]))
    >>> unsign(words, scale, 4)
    Array([[ 2., -2.,  2.,  2.]], dtype=float32)
  """
  check_rows('x', x, jnp.float32)
  return _sign(x, implementation=implementation)


def unsign(
  words: UInt32[Array, 'rows words'],
  scale: Float32[Array, 'rows 1'],
  count: int,
  *,
  implementation: str | None = None,
) -> Float32[Array, 'rows count']:
  """The rows that :func:`sign` coded: plus or minus the scale.

  Args:
    words: packed signs.
    scale: of each row.
    count: numbers in a row.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    The rows.
  """
  check_rows('words', words, jnp.uint32)
  check_rows('scale', scale, jnp.float32)
  return _unsign(words, scale, count=count, implementation=implementation)
