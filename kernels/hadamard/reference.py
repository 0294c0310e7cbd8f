"""The definition of the random rotation ``H diag(signs)``.

``H[i, j] = (-1)**popcount(i & j) / sqrt(size)`` is a Kronecker product of
smaller ones: a row, seen as a matrix, is multiplied by one from each side. Two
products with matrices of about ``sqrt(size)`` move less memory than
``log2(size)`` passes of additions.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Key


def signs(key: Key[Array, ''], size: int) -> Float32[Array, 'size']:
  """Random ones."""
  return jax.random.rademacher(key, (size,), jnp.float32)


def matrix(size: int) -> np.ndarray:
  """Entries 1 and -1, not normalised."""
  h = np.ones((1, 1), np.float32)
  while len(h) < size:
    h = np.block([[h, h], [h, -h]])
  return h


def hadamard(x: Float32[Array, 'rows size']) -> Float32[Array, 'rows size']:
  """Each row times ``H``, which is its own inverse."""
  rows, size = x.shape
  left = 2 ** (size.bit_length() // 2)
  right = size // left
  # All of the normalisation goes into the first product, so that no
  # intermediate result exceeds the bound of the final one.
  y = jnp.einsum(
    'rab,bd->rad',
    x.reshape(rows, left, right),
    matrix(right) * np.float32(size**-0.5),
    precision='highest',
  )
  y = jnp.einsum('rad,ac->rcd', y, matrix(left), precision='highest')
  return y.reshape(rows, size)


def rotate(
  x: Float32[Array, 'rows size'], key: Key[Array, '']
) -> Float32[Array, 'rows size']:
  """Flips random columns, then multiplies each row by ``H``."""
  return hadamard(x * signs(key, x.shape[1]))


def unrotate(
  y: Float32[Array, 'rows size'], key: Key[Array, '']
) -> Float32[Array, 'rows size']:
  """The inverse of :func:`rotate`."""
  return hadamard(y) * signs(key, y.shape[1])
