"""Rotation on GPUs: one pass over memory, by additions alone.

A program takes 2**14 numbers, which are one row or several, as a square matrix.
A thread holds a row of it and adds and subtracts its numbers. Then it gets a
column from the others, through shared memory, and does the same with those
numbers of it that belong to one row of the array.
"""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, Key

from jaxdist import compat
from jaxdist.kernels import gpu
from jaxdist.kernels.hadamard.reference import signs
from jaxdist.kernels.tpu import result

THREADS = gpu.THREADS
LARGEST_ROW = THREADS**2


def cannot_rotate(x: Any, key: Any) -> str | None:
  """What :func:`rotate` and :func:`unrotate` would need instead."""
  del key
  rows, size = x.shape
  if not THREADS <= size <= LARGEST_ROW:
    return f'rows of {THREADS} to {LARGEST_ROW} numbers, not {size}'
  return gpu.cannot_run(rows, LARGEST_ROW // size)


def _layouts():
  """Threads along the columns of a matrix, and along its rows."""
  from jax.experimental.pallas import mosaic_gpu

  tiled, tiling = mosaic_gpu.Layout.TILED, mosaic_gpu.Tiling
  dims = {'warp_dims': (-3,), 'lane_dims': (-2,), 'vector_dim': -1}
  along_columns = tiled(tiling(((1, THREADS), (32,), (1,))), **dims)
  dims = {'warp_dims': (-4,), 'lane_dims': (-2,), 'vector_dim': -1}
  along_rows = tiled(tiling(((THREADS, 1), (32, 1))), **dims)
  return along_columns, along_rows


def _butterflies(x, axis):
  """Times a Walsh-Hadamard matrix, along an axis; numbers there by themselves.

  Args:
    x: of which all that lies along the axis is in one thread.
    axis: of a power of two.
  """
  half = x.shape[axis] // 2
  if half == 0:
    return [x]
  before = axis * (slice(None),)
  low, high = x[(*before, slice(half))], x[(*before, slice(half, None))]
  return _butterflies(low + high, axis) + _butterflies(low - high, axis)


def _hadamard(x, before, after):
  rows, size = x.shape
  some = LARGEST_ROW // size  # Rows of a program.
  square = lambda flips: jnp.tile(flips, some).reshape(THREADS, THREADS)
  # Normalised at first, so that nothing on the way exceeds the result.
  factors = [square(before * np.float32(size**-0.5))]
  factors += [] if after is None else [square(after)]

  def kernel(x_ref, before_ref, *refs):
    *after_ref, y_ref, scratch_ref = refs
    from jax.experimental.pallas import mosaic_gpu

    along_columns, along_rows = _layouts()
    first = gpu.first_row(rows, some) * (size // THREADS)
    everywhere = pl.ds(0, THREADS)
    x = compat.load_registers(x_ref, (pl.ds(first, THREADS),), along_columns)
    before = compat.load_registers(before_ref, (everywhere,), along_columns)
    matrix = everywhere, everywhere
    compat.store_registers(scratch_ref, matrix, x * before)
    mosaic_gpu.commit_smem()  # Waits for all.
    x = compat.load_registers(scratch_ref, matrix, along_rows)
    for i, part in enumerate(_butterflies(x, 1)):
      compat.store_registers(scratch_ref, (everywhere, pl.ds(i, 1)), part)
    mosaic_gpu.commit_smem()
    x = compat.load_registers(scratch_ref, matrix, along_columns)
    row = size // THREADS
    parts = [_butterflies(x[i : i + row], 0) for i in range(0, THREADS, row)]
    for i, part in enumerate(itertools.chain(*parts)):
      for ref in after_ref:
        part *= compat.load_registers(ref, (pl.ds(i, 1),), along_columns)
      compat.store_registers(y_ref, (pl.ds(first + i, 1),), part)

  shape = rows * size // THREADS, THREADS
  (y,) = gpu.call(
    kernel,
    [result(shape, jnp.float32, x, *factors)],
    x.reshape(shape),
    *factors,
    programs=pl.cdiv(rows, some),
    # As much more as keeps rows apart in their banks, and still aligned for
    # the instructions that move matrices, which JAX does not look after.
    scratch=[gpu.shared((THREADS, THREADS + 4), jnp.float32)],
  )
  return y.reshape(rows, size)


def rotate(
  x: Float32[Array, 'rows size'], key: Key[Array, '']
) -> Float32[Array, 'rows size']:
  """Flips random columns, then multiplies each row by ``H``."""
  return _hadamard(x, signs(key, x.shape[1]), None)


def unrotate(
  y: Float32[Array, 'rows size'], key: Key[Array, '']
) -> Float32[Array, 'rows size']:
  """The inverse of :func:`rotate`."""
  flips = signs(key, y.shape[1])
  return _hadamard(y, jnp.ones_like(flips), flips)
