"""The definition of top-k: exact, ties to the lower index."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt32


def top_k(
  x: Float32[Array, 'rows size'], *, k: int
) -> tuple[Float32[Array, 'rows k'], UInt32[Array, 'rows k']]:
  """The ``k`` numbers of each row that are largest in magnitude."""
  # Backends disagree on where NaN ranks; as infinity it ranks first on all.
  magnitude = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))
  _, indices = jax.lax.top_k(magnitude, k)
  values = jnp.take_along_axis(x, indices, axis=1, mode='clip')
  return values, indices.astype(jnp.uint32)


def scatter(
  values: Float32[Array, 'rows k'],
  indices: UInt32[Array, 'rows k'],
  *,
  size: int,
) -> Float32[Array, 'rows size']:
  """Rows of zeros with ``values`` at ``indices``."""

  def place(values, indices):
    zeros = jnp.zeros(size, jnp.float32)
    return zeros.at[indices].set(values, mode='drop', unique_indices=True)

  return jax.vmap(place)(values, indices)
