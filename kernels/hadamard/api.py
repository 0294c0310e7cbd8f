"""Rotates rows at random by a Walsh-Hadamard matrix, and back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key

from jaxdist.kernels.checks import check_rows
from jaxdist.kernels.dispatch import Form, Op
from jaxdist.kernels.hadamard import gpu, reference, tpu


def _op(name):
  kernel = jax.jit(getattr(tpu, name))
  return Op(
    name,
    {
      'xla': Form(getattr(reference, name)),
      'tpu': Form(kernel, ('tpu',), tpu.cannot_rotate),
      # It has not run on a GPU.
      'gpu': Form(
        jax.jit(getattr(gpu, name)),
        ('cuda',),
        gpu.cannot_rotate,
        automatic=False,
      ),
    },
  )


_rotate, _unrotate = _op('rotate'), _op('unrotate')


def _check(name: str, x: Float32[Array, 'rows size']) -> None:
  check_rows(name, x, jnp.float32)
  size = x.shape[1]
  if size < 1 or size & (size - 1):
    raise ValueError(
      f'{name} must have rows whose length is a power of two, got {size}.'
    )


def rotate(
  x: Float32[Array, 'rows size'],
  key: Key[Array, ''],
  *,
  implementation: str | None = None,
) -> Float32[Array, 'rows size']:
  """Multiplies each row by an orthonormal matrix drawn from ``key``.

  The matrix is a Walsh-Hadamard matrix after random signs. It keeps lengths,
  and makes the numbers of any row look Gaussian.

  Args:
    x: rows whose length is a power of two.
    key: draws the signs; one draw for all rows.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`. ``'gpu'`` has
      not run on a GPU yet, so that only its name picks it.

  Returns:
    The rotated rows.

  Examples:
    >>> abs(rotate(jnp.array([[2., 0., 0., 0.]]), jax.random.key(0)))
    Array([[1., 1., 1., 1.]], dtype=float32)
  """
  _check('x', x)
  return _rotate(x, key, implementation=implementation)


def unrotate(
  y: Float32[Array, 'rows size'],
  key: Key[Array, ''],
  *,
  implementation: str | None = None,
) -> Float32[Array, 'rows size']:
  """The inverse of :func:`rotate` with the same key.

  Args:
    y: rotated rows.
    key: as given to :func:`rotate`.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    The rows.

  Examples:
    >>> key = jax.random.key(0)
    >>> unrotate(rotate(jnp.array([[1., 2., 3., 4.]]), key), key)
    Array([[1., 2., 3., 4.]], dtype=float32)
  """
  _check('y', y)
  return _unrotate(y, key, implementation=implementation)
