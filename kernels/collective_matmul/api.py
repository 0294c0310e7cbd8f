"""Matrix products over all workers' rows, and sums of products over workers."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdist import compat
from jaxdist.kernels.collective_matmul import reference, ring, tpu
from jaxdist.kernels.dispatch import Form, Op


def _op(name, cannot):
  return Op(
    name,
    {
      'xla': Form(getattr(ring, name)),
      'plain': Form(getattr(reference, name), automatic=False),
      'tpu': Form(getattr(tpu, name), ('tpu',), cannot, automatic=False),
    },
  )


_gather_op = _op('all_gather_matmul', tpu.cannot_gather)
_scatter_op = _op('matmul_reduce_scatter', tpu.cannot_scatter)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gather(x, w, axis, implementation):
  return _gather_op(x, w, axis=axis, implementation=implementation)


def _gather_backward(axis, implementation, inputs, dy):
  del implementation
  (x, w), workers = inputs, jax.lax.axis_size(axis)
  part = lambda i: reference.product(ring.chunk(dy, i, workers), w.T)
  dx = ring.scattered(part, axis)
  dw = sum(
    reference.product(one.T, ring.chunk(dy, index, workers))
    for index, one in ring.gathered(x, axis)
  )
  return dx.astype(x.dtype), dw.astype(w.dtype)


_gather.defvjp(
  lambda x, w, *static: (_gather(x, w, *static), (x, w)), _gather_backward
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _scatter(x, w, axis, implementation):
  return _scatter_op(x, w, axis=axis, implementation=implementation)


def _scatter_backward(axis, implementation, inputs, dy):
  del implementation
  (x, w), workers = inputs, jax.lax.axis_size(axis)
  dx, dw = jnp.zeros_like(x), 0.0
  # Once around the ring for both.
  for index, one in ring.gathered(dy, axis):
    rows = reference.product(one, w.T).astype(x.dtype)
    dx = ring.with_chunk(dx, index, rows)
    dw += reference.product(ring.chunk(x, index, workers).T, one)
  return dx, dw.astype(w.dtype)


_scatter.defvjp(
  lambda x, w, *static: (_scatter(x, w, *static), (x, w)), _scatter_backward
)


def all_gather_matmul(
  x: Float[Array, 'rows inner'],
  w: Float[Array, 'inner cols'],
  axis: str,
  *,
  implementation: str | None = None,
) -> Float[Array, 'all_rows cols']:
  r"""The rows of all workers times this worker's columns.

  .. math::

    Y_i = \begin{pmatrix} X_0 \\ \vdots \\ X_{W-1} \end{pmatrix} w_i

  Chunks go around a ring in both directions, each while the product of the one
  before it is computed. Differentiable in both arguments; what flows back goes
  around the ring too, as :func:`matmul_reduce_scatter`.

  **On the wire:** as for an all-gather, ``rows * inner`` numbers to each of
  ``workers - 1`` others; backwards that twice, for ``x`` and for its gradient
  (in float32).

  Args:
    x: this worker's rows.
    w: this worker's columns of the other factor.
    axis: name of the axis that the workers lie along.
    implementation: ``'xla'``, the ring; ``'plain'``, an all-gather and then
      one product; ``'tpu'``, a kernel that sends by itself and has not run on a
      TPU yet, so that only its name picks it. See
      :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    The product, of dtype ``x.dtype``; sums are in float32 at least.

  Examples:
    >>> x = jnp.array([[[1.]], [[2.]]])
    >>> w = jnp.array([[[3.]], [[4.]]])
    >>> product = lambda x, w: all_gather_matmul(x, w, 'i')
    >>> jax.vmap(product, axis_name='i')(x, w)[:, :, 0]
    Array([[3., 6.],
           [4., 8.]], dtype=float32)

  References:
    Wang et al, `Overlap Communication with Dependent Computation via
    Decomposition <https://doi.org/10.1145/3567955.3567959>`_, 2023
  """
  _check(x, w)
  return _gather(*_vary(x, w, axis), axis, implementation)


def matmul_reduce_scatter(
  x: Float[Array, 'all_rows inner'],
  w: Float[Array, 'inner cols'],
  axis: str,
  *,
  implementation: str | None = None,
) -> Float[Array, 'rows cols']:
  r"""This worker's rows of the sum over workers of their products.

  .. math::

    Y_i = \Big(\sum_j X_j w_j\Big)_{\text{rows of } i}

  Sums go around a ring in both directions; while one is on its way, what is
  added to it next is computed. Differentiable in both arguments; the gradient
  goes around the ring once, as in :func:`all_gather_matmul`, for both.

  **On the wire:** as for a reduce-scatter, ``rows * cols`` float32 numbers to
  each of ``workers - 1`` others; backwards the same in ``x.dtype``.

  Args:
    x: this worker's columns, of all rows.
    w: this worker's rows of the other factor.
    axis: name of the axis that the workers lie along.
    implementation: as in :func:`all_gather_matmul`.

  Returns:
    This worker's share of the rows, of dtype ``x.dtype``; sums are in float32
    at least.

  Examples:
    >>> x = jnp.array([[[1.], [2.]], [[3.], [4.]]])
    >>> w = jnp.array([[[1.]], [[10.]]])
    >>> product = lambda x, w: matmul_reduce_scatter(x, w, 'i')
    >>> jax.vmap(product, axis_name='i')(x, w)[:, :, 0]
    Array([[31.],
           [42.]], dtype=float32)

  References:
    Pati et al, `T3: Transparent Tracking and Triggering for Fine-grained
    Overlap of Compute and Collectives <https://arxiv.org/abs/2401.16677>`_,
    2024, of which this is a form in software
  """
  _check(x, w)
  workers = jax.lax.axis_size(axis)
  if x.shape[0] % workers:
    raise ValueError(
      f'x must have a multiple of {workers} rows, one share for each worker, '
      f'got shape {x.shape}.'
    )
  return _scatter(*_vary(x, w, axis), axis, implementation)


def _check(x, w):
  if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
    raise ValueError(
      f'x and w must be matrices that can be multiplied, got shapes {x.shape} '
      f'and {w.shape}.'
    )
  if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f'x and w must be of one floating dtype, got {x.dtype} and {w.dtype}.'
    )


def _vary(x, w, axis):
  """Marks both as varying wherever one does, and along ``axis``.

  Only where types say such things. Gradients are then typed as what they are
  of, and summed where one of the two was the same on several devices.
  """
  if axis not in compat.varying_axes(jax.lax.axis_index(axis)):
    return x, w
  axes = compat.varying_axes(x) | compat.varying_axes(w) | {axis}

  def marked(a):
    missing = tuple(sorted(axes - compat.varying_axes(a)))
    return jax.lax.pcast(a, missing, to='varying') if missing else a

  return marked(x), marked(w)
