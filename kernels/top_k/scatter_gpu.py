"""Puts selected numbers back into rows on GPUs, and adds up those of workers.

A row lies in the registers of a warp, a thousand numbers at a time: a number
goes to its place by a comparison with all places. Nothing is scattered, and
memory is written once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, UInt32

from jaxdist.kernels import gpu
from jaxdist.kernels.tpu import result

MOST = 32  # Registers of a thread that are filled at a time.


def cannot_scatter(values: Any, indices: Any, *, size: int) -> str | None:
  """What :func:`scatter` and :func:`scatter_mean` would need instead."""
  del indices
  if size % gpu.LANES:
    return f'rows of a multiple of {gpu.LANES} numbers, not {size}'
  return gpu.cannot_run(values.shape[-2])


def _kernel(values_ref, indices_ref, x_ref):
  workers, rows, k = values_ref.shape
  _, parts, some, lanes = x_ref.shape
  here = pl.ds(gpu.first_row(rows), gpu.ROWS)
  shape = gpu.ROWS, some, lanes
  lane = gpu.iota(shape, 1) * lanes + gpu.iota(shape, 2)

  def fill(part, _):
    place = part * some * lanes + lane

    def decoded(n):
      def put(j, x):
        value, index = (
          gpu.along_rows(jnp.max, gpu.load(ref, n, here, pl.ds(j, 1)))
          for ref in (values_ref, indices_ref)
        )
        hit = place == gpu.spread(index.astype(jnp.int32), shape)
        return jnp.where(hit, gpu.spread(value, shape), x)

      zeros = gpu.filled(shape, 0, jnp.float32)
      return jax.lax.fori_loop(0, k, put, zeros)

    total = jax.lax.fori_loop(
      1, workers, lambda n, total: total + decoded(n), decoded(0)
    )
    gpu.store(x_ref, here, part, value=total / workers)

  jax.lax.fori_loop(0, parts, fill, None)


def scatter_mean(
  values: Float32[Array, 'n rows k'],
  indices: UInt32[Array, 'n rows k'],
  *,
  size: int,
) -> Float32[Array, 'rows size']:
  """The mean over workers of rows of zeros with their values in place."""
  rows, registers = values.shape[1], size // gpu.LANES
  some = max(n for n in range(1, MOST + 1) if registers % n == 0)
  shape = rows, registers // some, some, gpu.LANES
  output = result(shape, jnp.float32, values, indices)
  (x,) = gpu.call(
    _kernel, [output], values, indices, programs=pl.cdiv(rows, gpu.ROWS)
  )
  return x.reshape(rows, size)


def scatter(
  values: Float32[Array, 'rows k'],
  indices: UInt32[Array, 'rows k'],
  *,
  size: int,
) -> Float32[Array, 'rows size']:
  """Rows of zeros with ``values`` at ``indices``."""
  return scatter_mean(values[None], indices[None], size=size)
