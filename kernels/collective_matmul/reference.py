"""The definition: a collective, and a product after or before it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def product(x: Array, w: Array) -> Array:
  """``x @ w`` with sums in float32 at least."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.matmul(x, w, preferred_element_type=wide)


def all_gather_matmul(
  x: Float[Array, 'rows inner'], w: Float[Array, 'inner cols'], *, axis: str
) -> Float[Array, 'all_rows cols']:
  """All workers' rows times this worker's columns."""
  gathered = jax.lax.all_gather(x, axis, tiled=True)
  return product(gathered, w).astype(x.dtype)


def matmul_reduce_scatter(
  x: Float[Array, 'all_rows inner'], w: Float[Array, 'inner cols'], *, axis: str
) -> Float[Array, 'rows cols']:
  """This worker's rows of the sum of all workers' products."""
  total = jax.lax.psum_scatter(product(x, w), axis, tiled=True)
  return total.astype(x.dtype)
