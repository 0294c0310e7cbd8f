"""The definition: Gram-Schmidt on the products of columns, three times.

All that is large is two matrix products a pass, as in CholeskyQR. Products of
columns in float32 don't tell what is left of a column below a thousandth of it,
so a pass stretches that a thousandfold at most, and the next one sees it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxdist.kernels.numbers import largest_magnitude, relative

PASSES = 3  # Two for what is left of a column at 1e-6 of it, one to clean up.
LEAST = 2.0**-20  # Of a column's squared length that one pass sees.


def _coefficients(gram: Float32[Array, 'n n']) -> Float32[Array, 'n n']:
  """Of the columns, such that their combinations are orthonormal."""
  n = len(gram)

  def add(j, found):
    """Column ``j`` without what the ones before it have of it."""
    new = jnp.eye(n)[j] - found @ (found.T @ gram[j])
    square = new @ gram @ new
    return found.at[:, j].set(new / jnp.sqrt(jnp.maximum(square, LEAST)))

  with jax.default_matmul_precision('highest'):
    return jax.lax.fori_loop(0, n, add, jnp.zeros_like(gram))


def orthonormalize(
  x: Float32[Array, 'rows cols'],
) -> Float32[Array, 'rows cols']:
  """Orthonormal columns, each in the span of those up to its own."""

  def one_pass(_, x):
    # Columns of any scale become comparable.
    x = relative(x.T, largest_magnitude(x.T))
    length = jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True))
    x = x * (1 / jnp.maximum(length, 1))  # The largest number is 1, or all 0.
    gram = jnp.matmul(x, x.T, precision='highest')
    return jnp.matmul(_coefficients(gram).T, x, precision='highest').T

  return jax.lax.fori_loop(0, PASSES, one_pass, x)
