"""Picks the largest numbers of each row, and puts them back."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt32

from jaxdist.kernels.checks import check_between, check_rows, check_shape
from jaxdist.kernels.dispatch import Form, Op
from jaxdist.kernels.top_k import (
  cpu,
  gpu,
  reference,
  scatter_gpu,
  scatter_tpu,
  threshold,
  tpu,
)


def _form(module, name, platform, cannot, static):
  # Traced once for each shape: kernels are long.
  kernel = jax.jit(getattr(module, name), static_argnames=static)
  # Those for GPUs have not run on one.
  return Form(kernel, (platform,), cannot, automatic=platform != 'cuda')


def _selection(name, **long_rows):
  return Op(
    name,
    {
      'xla': Form(getattr(reference, name)),
      **long_rows,
      'cpu': _form(cpu, name, 'cpu', cpu.cannot_select, 'k'),
      'tpu': _form(tpu, name, 'tpu', tpu.cannot_select, 'k'),
      'gpu': _form(gpu, name, 'cuda', gpu.cannot_select, 'k'),
    },
  )


def _scattering(name):
  return Op(
    name,
    {
      'xla': Form(getattr(reference, name)),
      'tpu': _form(
        scatter_tpu, name, 'tpu', scatter_tpu.cannot_scatter, 'size'
      ),
      'gpu': _form(
        scatter_gpu, name, 'cuda', scatter_gpu.cannot_scatter, 'size'
      ),
    },
  )


_top_k = _selection(
  'top_k', threshold=Form(threshold.top_k, None, threshold.cannot_select)
)
_with_feedback = _selection('top_k_with_feedback')
_scatter = _scattering('scatter')
_scatter_mean = _scattering('scatter_mean')


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
    implementation: see :class:`jaxdist.kernels.dispatch.Op`. ``'gpu'`` has
      not run on a GPU yet, so that only its name picks it.

  Returns:
    The numbers and their places in the row, in an order that differs between
    implementations.

  Examples:
    >>> top_k(jnp.array([[1., -3., 2., 0.]]), 2)
    (Array([[-3.,  2.]], dtype=float32), Array([[1, 2]], dtype=uint32))
  """
  check_rows('x', x, jnp.float32)
  check_between('k', k, 1, x.shape[1])
  return _top_k(x, k=k, implementation=implementation)


def top_k_with_feedback(
  x: Float32[Array, 'rows size'],
  residual: Float32[Array, 'rows size'],
  k: int,
  *,
  implementation: str | None = None,
) -> tuple[
  Float32[Array, 'rows k'], UInt32[Array, 'rows k'], Float32[Array, 'rows size']
]:
  """Selects of what is new and what was left before, in one pass over memory.

  Args:
    x: rows of numbers.
    residual: what was left of the rows before.
    k: how many to take of each row.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    What :func:`top_k` returns for ``x + residual``, and that sum with zeros
    where a number was taken.

  Examples:
    >>> x = jnp.array([[1., -3., 2., 0.]])
    >>> top_k_with_feedback(x, jnp.zeros((1, 4)), 2)[2]
    Array([[1., 0., 0., 0.]], dtype=float32)
  """
  check_rows('x', x, jnp.float32)
  check_rows('residual', residual, jnp.float32)
  check_shape('residual', residual, x.shape)
  check_between('k', k, 1, x.shape[1])
  return _with_feedback(x, residual, k=k, implementation=implementation)


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
    implementation: see :class:`jaxdist.kernels.dispatch.Op`. ``'gpu'`` has
      not run on a GPU yet, so that only its name picks it.

  Returns:
    The rows.

  Examples:
    >>> scatter(jnp.array([[5., 6.]]), jnp.array([[3, 0]], jnp.uint32), 4)
    Array([[6., 0., 0., 5.]], dtype=float32)
  """
  check_rows('values', values, jnp.float32)
  check_rows('indices', indices, jnp.uint32)
  _check_places(values, indices, size)
  return _scatter(values, indices, size=size, implementation=implementation)


def scatter_mean(
  values: Float32[Array, 'n rows k'],
  indices: UInt32[Array, 'n rows k'],
  size: int,
  *,
  implementation: str | None = None,
) -> Float32[Array, 'rows size']:
  """The mean over ``n`` workers of what :func:`scatter` makes of theirs.

  Args:
    values: numbers of each worker.
    indices: their places, different within a row.
    size: length of a row of the result.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    The mean; float32 sums, in the workers' order.

  Examples:
    >>> values = jnp.array([[[5.]], [[3.]]])
    >>> scatter_mean(values, jnp.array([[[3]], [[0]]], jnp.uint32), 4)
    Array([[1.5, 0. , 0. , 2.5]], dtype=float32)
  """
  check_rows('values', values, jnp.float32, ndim=3)
  check_rows('indices', indices, jnp.uint32, ndim=3)
  _check_places(values, indices, size)
  return _scatter_mean(
    values, indices, size=size, implementation=implementation
  )


def _check_places(values, indices, size):
  check_shape('indices', indices, values.shape)
  check_between('size', size, max(1, values.shape[-1]), 2**31 - 1)
