"""The definition of top-k: exact, ties to the lower index."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from jaxdist.kernels.numbers import float_bits

INFINITY = 0x7F800000  # The bits of a float.


def ranks(x: Float32[Array, '*shape']) -> Int32[Array, '*shape']:
  """Integers in the order of magnitudes, with NaN as infinity."""
  return jnp.minimum(float_bits(jnp.abs(x)), INFINITY)


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


def top_k_with_feedback(
  x: Float32[Array, 'rows size'],
  residual: Float32[Array, 'rows size'],
  *,
  k: int,
) -> tuple[
  Float32[Array, 'rows k'], UInt32[Array, 'rows k'], Float32[Array, 'rows size']
]:
  """Selects of ``x + residual``, and says what is left."""
  target = x + residual
  values, indices = top_k(target, k=k)
  sent = scatter(jnp.ones_like(values), indices, size=x.shape[1])
  return values, indices, jnp.where(sent > 0, 0.0, target)


def scatter_mean(
  values: Float32[Array, 'n rows k'],
  indices: UInt32[Array, 'n rows k'],
  *,
  size: int,
) -> Float32[Array, 'rows size']:
  """The mean over workers of rows of zeros with their values in place."""

  def add(total, values, indices):
    return total.at[indices].add(values, mode='drop', unique_indices=True)

  total, _ = jax.lax.scan(
    lambda total, one: (jax.vmap(add)(total, *one), None),
    scatter(values[0], indices[0], size=size),
    (values[1:], indices[1:]),
  )
  return total / values.shape[0]
