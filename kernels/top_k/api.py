"""Picks the largest numbers of each row, and puts them back."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt32

from jaxdist.kernels.checks import check_between, check_rows
from jaxdist.kernels.dispatch import Form, Op
from jaxdist.kernels.top_k import reference

_top_k = Op('top_k', {'xla': Form(reference.top_k)})
_scatter = Op('scatter', {'xla': Form(reference.scatter)})


def top_k(
  x: Float32[Array, 'rows size'],
  k: int,
  *,
  implementation: str | None = None,
) -> tuple[Float32[Array, 'rows k'], UInt32[Array, 'rows k']]:
  """The ``k`` numbers of each row that are largest in magnitude.

  Exact. Of equal magnitudes the lower index is taken, and NaN counts as
  infinity, so it is always among the first.

  Args:
    x: rows of numbers.
    k: how many to take of each row.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    The numbers, largest magnitude first, and their places in the row.

  Examples:
    >>> top_k(jnp.array([[1., -3., 2., 0.]]), 2)
    (Array([[-3.,  2.]], dtype=float32), Array([[1, 2]], dtype=uint32))
  """
  check_rows('x', x, jnp.float32)
  check_between('k', k, 1, x.shape[1])
  return _top_k(x, k=k, implementation=implementation)


def scatter(
  values: Float32[Array, 'rows k'],
  indices: UInt32[Array, 'rows k'],
  size: int,
  *,
  implementation: str | None = None,
) -> Float32[Array, 'rows size']:
  """Rows of zeros with ``values`` at ``indices``.

  Args:
    values: numbers to place.
    indices: their places, different within a row.
    size: length of a row of the result.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    The rows.

  Examples:
    >>> scatter(jnp.array([[5., 6.]]), jnp.array([[3, 0]], jnp.uint32), 4)
    Array([[6., 0., 0., 5.]], dtype=float32)
  """
  check_rows('values', values, jnp.float32)
  check_rows('indices', indices, jnp.uint32)
  return _scatter(values, indices, size=size, implementation=implementation)
