"""Orthonormal columns that span what a tall matrix's columns span."""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxdist.kernels.checks import check_rows
from jaxdist.kernels.dispatch import Form, Op
from jaxdist.kernels.orthonormalize import reference

_orthonormalize = Op('orthonormalize', {'xla': Form(reference.orthonormalize)})


def orthonormalize(
  x: Float32[Array, 'rows cols'], *, implementation: str | None = None
) -> Float32[Array, 'rows cols']:
  """Gram-Schmidt from the left, by products of matrices alone.

  To float32's precision for columns of any scale, of which at least 1e-6 lies
  outside the span of those before them. Of less, rounding decides the
  direction; it is orthogonal to the others all the same, or zero. Columns of
  zeros stay so: the result times its transpose is always a projection.

  Args:
    x: a matrix with at least as many rows as columns.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    The columns. A NaN or an infinity makes NaN of all.

  Examples:
    >>> orthonormalize(jnp.array([[2., 3.], [0., 4.], [0., 0.]]))
    Array([[1., 0.],
           [0., 1.],
           [0., 0.]], dtype=float32)

  References:
    Yamamoto et al, `Roundoff Error Analysis of the CholeskyQR2 Algorithm
    <https://etna.math.kent.edu/vol.44.2015/pp306-326.dir/pp306-326.pdf>`_,
    2015, with Gram-Schmidt in place of the Cholesky factorisation
  """
  check_rows('x', x, jnp.float32)
  if x.shape[0] < x.shape[1]:
    raise ValueError(
      f'x must have at least as many rows as columns, got shape {x.shape}.'
    )
  return _orthonormalize(x, implementation=implementation)
